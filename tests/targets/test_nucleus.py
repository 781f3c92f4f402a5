"""A target cache keeps the tokens of a frame that carry its mass, in few bytes and with a known error."""

import math

import kaldiio
import numpy as np
import pytest
import torch

from espnet_kd.losses import factorized_kl, kl
from espnet_kd.targets.cache import Policy, ark_names
from espnet_kd.targets.cache_writer import compression
from espnet_kd.targets.nucleus import (
    LEVELS,
    NONE,
    SPAN,
    dequantise,
    in_nucleus,
    pack_targets,
    quantise,
    read_ids,
    unpack_targets,
    write_ids,
)
from espnet_kd.topk import compress


def logits(frames, num_tokens, seed=0, scale=3.0):
    """Logits of a teacher that is sure of some frames and unsure of others; blank and non-blank frames alternate."""
    torch.manual_seed(seed)
    x = torch.randn(frames, num_tokens) * torch.linspace(0.5, scale, frames)[:, None]
    x[::2, 0] += 12
    return x


def written_and_read(targets, policy, place):
    """Write targets to Kaldi arks and read them back; return them and the size of each ark."""
    back, sizes = [], {}
    for name, x in zip(ark_names(policy), pack_targets(targets, [], policy)):
        file = place / name
        kaldiio.save_mat(str(file), x, compression_method=compression(name, x, policy))
        back.append(np.array(kaldiio.load_mat(str(file)), dtype=np.float32))
        sizes[name] = file.stat().st_size
    return unpack_targets([back], policy, targets.num_tokens), sizes


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99, 1.0])
def test_as_many_tokens_as_carry_the_mass(mass):
    targets = compress(logits(60, 40), 20)
    kept = in_nucleus(targets, mass)
    p = targets.log_probs.exp()
    total = targets.log_blank.exp() + (p * kept).sum(1)
    less = total - (p * kept).where(kept, torch.inf).amin(1)  # without the least likely kept token
    counts = kept.sum(1)
    assert (kept == (torch.arange(20) < counts[:, None])).all() and (counts >= 1).all()
    assert ((total >= mass - 1e-6) | (counts == 20)).all()
    assert ((less < mass) | (counts == 1)).all()
    if mass < 1:
        assert counts.min() == 1 and counts.max() > 5


@pytest.mark.parametrize("span", [0.5, 4.0, 12.0])
def test_codes_are_off_by_what_is_stated(span):
    below = torch.linspace(0, span, 1000, dtype=torch.float64)
    log_p = (-below).log_softmax(0)
    codes, spans = quantise(log_p[None])
    assert codes.min() == 0 and 0.95 * LEVELS < codes.max() <= LEVELS
    assert 0 <= spans.item() - span / SPAN * 255 <= 1 + 1e-6  # spans are rounded up
    got = dequantise(codes, spans)[0]
    ratio = (got - got[0]) - (log_p - log_p[0])
    allowed = ((spans * SPAN / 255) * below).sqrt() / LEVELS + 0.25 * span / LEVELS**2
    assert (ratio.abs() <= 1.001 * allowed + 1e-9).all() and ratio.abs().max() > 0.8 * allowed.max()
    assert got.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_none_is_none():
    log_p = torch.tensor([[0.0, -math.inf, -30.0], [-1.0, -1.0, -1.0], [-math.inf, 0.0, -2.0]])
    codes, spans = quantise(log_p)
    assert codes.tolist()[:2] == [[0, NONE, NONE], [0, 0, 0]] and spans.tolist()[:2] == [0, 0]
    assert codes[2, 0] == NONE
    torch.testing.assert_close(dequantise(codes, spans)[1].exp(), torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("num_tokens", "frames"), [(500, 300), (1024, 40), (1025, 40), (65536, 40), (65537, 40), (60, 33000)]
)
def test_ids_and_frames_come_back_as_they_were(num_tokens, frames, tmp_path):
    """The numbers of tokens include those that need more bytes, and the largest id occurs."""
    x = logits(frames, num_tokens)
    x[1, num_tokens - 1] = 30.0
    targets = compress(x, 16)
    policy = Policy(16, mass=0.99)
    got, sizes = written_and_read(targets, policy, tmp_path)
    spoken = targets.argmax() != 0
    assert torch.equal(got.argmax(), targets.argmax()) and 0.3 < spoken.float().mean() < 0.7
    kept = in_nucleus(targets[spoken], policy.mass)
    assert torch.equal(got.tokens[spoken][:, 0], targets.tokens[spoken][:, 0])  # the most likely token
    p = kept * targets.log_probs[spoken].exp()
    expected = torch.zeros(int(spoken.sum()), num_tokens).scatter(1, targets.tokens[spoken], p)
    found = torch.zeros_like(expected).scatter(1, got.tokens[spoken], got.log_probs[spoken].exp())
    assert torch.equal(found[:, 1:] > 0, expected[:, 1:] > 0)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], atol=6e-3, rtol=0)
    assert (got.log_probs[~spoken] == -torch.inf).all()
    each = sizes["tokens"] / int(kept.sum())
    assert each == pytest.approx(2 if num_tokens <= 65536 else 4, abs=0.1) if num_tokens > 1024 else each < 2
    assert sizes["log_probs"] == pytest.approx(int(kept.sum() + 2 * spoken.sum()), abs=30)
    assert sizes["blank"] == pytest.approx(2 * frames, abs=30)


@pytest.mark.parametrize("num_tokens", [4, 255, 256, 257, 511, 512, 1024])
def test_ids_in_bytes(num_tokens):
    """The rows have all sizes and include the smallest and the largest id."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randperm(num_tokens - 1, generator=draw)[:n] + 1 for n in (1, 2, num_tokens - 1, 3, 1)]
    rows += [torch.tensor([num_tokens - 1]), torch.tensor([1]), torch.tensor([num_tokens - 1, 1, 2])]
    rows = [torch.cat([row[:1], row[1:].sort().values]) for row in rows]
    ids, counts = torch.cat(rows), torch.tensor([len(row) for row in rows])
    written = write_ids(ids, counts, num_tokens)
    assert written.min() >= 0 and written.max() <= 255
    assert torch.equal(read_ids(written, counts, num_tokens), ids)
    for broken in (written[:-1], torch.cat([written, written[:1] * 0 + 255])):
        with pytest.raises(ValueError, match=r"tokens\.ark"):
            read_ids(broken, counts, num_tokens)
    assert len(write_ids(ids[:0], counts[:0], num_tokens)) == len(read_ids(ids[:0], counts[:0], num_tokens)) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("tokens_on", ["nonblank", "all"])
def test_what_is_read_sums_to_one(tokens_on, temperature, tmp_path):
    targets = compress(logits(200, 50), 12, (temperature,))
    temperatures = (temperature,) if temperature != 1 else ()
    got, _ = written_and_read(targets, Policy(12, 0.98, tokens_on, temperatures), tmp_path)
    there = got[got.log_probs[:, 0] > -torch.inf]
    assert len(there.log_blank) == (200 if tokens_on == "all" else int((targets.argmax() != 0).sum()))
    parts = there.log_blank_at(temperature).exp(), there.log_tokens_at(temperature).exp().sum(1)
    # The log-odds at the two temperatures are rounded separately, which leaves an error of about 0.001.
    torch.testing.assert_close(sum(parts) + there.remainder_at(temperature), torch.ones(len(there.log_blank)),
                               atol=2e-3 if temperature != 1 else 1e-5, rtol=0)  # fmt: skip
    torch.testing.assert_close(
        got.log_blank_at(temperature).exp(), targets.log_blank_at(temperature).exp(), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("loss, tokens_on", [(factorized_kl, "nonblank"), (kl, "all")])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_and_gradients_are_nearly_those_of_the_logits(loss, tokens_on, temperature, tmp_path):
    x = logits(300, 60)
    temperatures = (temperature,) if temperature != 1 else ()
    got, _ = written_and_read(compress(x, 59, temperatures), Policy(59, 0.999, tokens_on, temperatures), tmp_path)
    student = torch.randn(1, 300, 60)
    values, gradients = [], []
    for teacher in (x[None], got[None]):
        leaf = student.clone().requires_grad_()
        values.append(loss(leaf, teacher, torch.tensor([300]), temperature=temperature))
        values[-1].backward()
        gradients.append(leaf.grad)
    # At temperature 2 the tokens that are not kept have more weight.
    assert values[1].item() == pytest.approx(values[0].item(), rel=0.01 * temperature)
    assert (gradients[1] - gradients[0]).norm() < 0.01 * temperature * gradients[0].norm()


@pytest.mark.parametrize("frames, certain", [(1, False), (0, False), (4, True), (1, True)])
@pytest.mark.parametrize("tokens_on", ["nonblank", "all"])
def test_few_frames_and_certain_ones(tokens_on, frames, certain, tmp_path):
    x = logits(frames, 9) if frames else torch.zeros(0, 9)
    if certain:  # certain of blank and of a token in turn
        x = torch.full((frames, 9), -torch.inf)
        x[::2, 0], x[1::2, 3] = 0.0, 0.0
    targets = compress(x, 5)
    policy = Policy(5, 0.99, tokens_on)
    if frames:
        arrays = pack_targets(targets, [], policy)
        got = unpack_targets([arrays], policy, 9)
        torch.testing.assert_close(got.log_blank.exp(), targets.log_blank.exp(), atol=1e-3, rtol=0)
        assert torch.equal(got.argmax(), targets.argmax())
        assert not got[got.log_probs[:, 0] > -torch.inf].remainder_at(1.0).isnan().any()
    else:
        assert [len(a) for a in pack_targets(targets, [], policy)] == [0, 0, 0, 0]


def test_blank_is_the_likeliest_after_rounding_exactly_where_it_was(tmp_path):
    """Tested on frames in which a token and blank are nearly equal."""
    x = torch.full((400, 9), -6.0)
    x[:, 0] = 0.0
    x[:, 2] = torch.linspace(-1e-3, 1e-3, 400)
    targets = compress(x, 5)
    for tokens_on in ("nonblank", "all"):
        got, _ = written_and_read(targets, Policy(5, 0.99, tokens_on), tmp_path)
        assert torch.equal(got.argmax(), targets.argmax()) and 0 < (targets.argmax() != 0).sum() < 400


@pytest.mark.parametrize("name, index, value", [
    ("blank", 0, None), ("rows", (0, 0), 10**4), ("rows", (0, 0), -1), ("rows", (0, 1), 0), ("rows", (0, 1), 300),
    ("tokens", (0, 0), 255), ("tokens", (3, 0), 200), ("log_probs", (0, 0), 300), ("log_probs", (0, 0), -1),
])  # fmt: skip
def test_arrays_that_do_not_belong_together_are_refused(name, index, value):
    policy = Policy(12, 0.98)
    arrays = pack_targets(compress(logits(50, 40), 12), [], policy)
    place = ark_names(policy).index(name)
    if value is None:
        arrays[place] = np.concatenate([arrays[place]] * 2, 1)
    else:
        arrays[place][index] = value
    with pytest.raises(ValueError, match=r"\.ark holds no such array"):
        unpack_targets([arrays], policy, 40)


def test_several_utterances_at_once():
    """The utterances differ in length; between them are one without a row and one without a frame."""
    policy = Policy(12, 0.98, temperatures=(2.0,))
    targets = [compress(logits(n, 40, seed=n), 12, (2.0,)) for n in (30, 1, 7)]
    arrays = [pack_targets(x, [], policy) for x in targets]
    empty = [a[:0] for a in arrays[0]]
    assert len(arrays[1][1]) == 0  # only a blank frame
    together = unpack_targets([arrays[0], empty, arrays[1], arrays[2]], policy, 40)
    start = 0
    for x in (unpack_targets([a], policy, 40) for a in arrays):
        n, k = x.tokens.shape
        part = together[slice(start, start + n)]
        assert torch.equal(part.log_blank, x.log_blank) and torch.equal(part.norms[2.0], x.norms[2.0])
        assert torch.equal(part.tokens[:, :k], x.tokens) and torch.equal(part.log_probs[:, :k], x.log_probs)
        assert (part.log_probs[:, k:] == -torch.inf).all()
        start += n
    assert start == len(together.log_blank)
