"""Cached targets in place of logits: equal results if all tokens are kept, and safe ones if some are dropped."""

import math

import pytest
import torch

from espnet_kd import frames as fr
from espnet_kd import losses
from espnet_kd.topk import TopK, compress

V = 9
LOSSES = {
    "kl": losses.kl,
    "softmax_l2": losses.softmax_l2,
    "blank_kl": losses.blank_kl,
    "factorized_kl": losses.factorized_kl,
    "guided_ctc": losses.guided_ctc,
    "delayed_kl": losses.delayed_kl,
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def batch(seed=0, utts=3, frames=7, width=V, scale=2.0):
    torch.manual_seed(seed)
    student, teacher = (scale * torch.randn(utts, frames, width, dtype=torch.float64) for _ in range(2))
    teacher[..., 0] += scale
    return student, teacher, torch.tensor([frames, 4, 1][:utts])


def value_and_gradient(name, student, teacher, lengths, **options):
    student = student.clone().requires_grad_()
    loss = LOSSES[name](student, teacher, lengths, **options)
    loss.backward()
    return loss.detach(), student.grad


@each_loss
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_kept_equals_logits(name, temperature):
    student, teacher, lengths = batch()
    short = compress(teacher, V - 1, (temperature,))
    for got, expected in zip(
        value_and_gradient(name, student, short, lengths, temperature=temperature),
        value_and_gradient(name, student, teacher, lengths, temperature=temperature),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.0), (0.5, 2.0, 0.7)])
def test_factorized_kl_over_buckets_equals_the_definition(weights):
    """The definition, written with loops: KL over the kept tokens and one bucket of all others."""
    student, teacher, lengths = batch()
    short = compress(teacher, 3)
    sums = {True: [], False: []}
    binary = []
    for b, n in enumerate(lengths):
        for t in range(n):
            p, q = teacher[b, t].softmax(-1), student[b, t].softmax(-1)
            kept = short.tokens[b, t]
            p_parts = [*p[kept], 1 - p[0] - p[kept].sum()]
            q_parts = [*q[kept], 1 - q[0] - q[kept].sum()]
            tokens = sum(x * math.log((x / (1 - p[0])) / (y / (1 - q[0]))) for x, y in zip(p_parts, q_parts))
            binary.append(p[0] * math.log(p[0] / q[0]) + (1 - p[0]) * math.log((1 - p[0]) / (1 - q[0])))
            sums[bool(p.argmax() != 0)].append(tokens)
    expected = sum(
        w * sum(values) / len(values) for w, values in zip(weights, (binary, sums[True], sums[False])) if values
    )
    options = dict(zip(("blank_weight", "nonblank_weight", "nonblank_on_blank_weight"), weights))
    got = losses.factorized_kl(student, short, lengths, **options)
    assert got.item() == pytest.approx(float(expected), rel=1e-9)


@each_loss
def test_gradcheck(name):
    student, teacher, lengths = batch(frames=4, utts=2)
    short = compress(teacher, 3)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, short, lengths), student.requires_grad_())


@each_loss
def test_padding_is_never_read(name):
    student, teacher, lengths = batch()
    expected = value_and_gradient(name, student, compress(teacher, 3), lengths)
    outside = ~fr.valid(lengths, student.size(1))
    student[outside] = math.nan
    short = compress(teacher, 3).map(lambda x: x.masked_fill(outside.view(*outside.shape, *[1] * (x.dim() - 2)), 0))
    for got, want in zip(value_and_gradient(name, student, short, lengths), expected):
        torch.testing.assert_close(got, want)


@each_loss
def test_no_frame_gives_zero_with_a_gradient_path(name):
    student, teacher, lengths = batch()
    loss, grad = value_and_gradient(
        name, student, compress(teacher, 3), lengths, frames=torch.zeros(3, 7, dtype=torch.bool)
    )
    assert loss == 0 and not grad.any()


@each_loss
@pytest.mark.parametrize("token", [0, 2])
def test_certain_teacher(name, token):
    """The posteriors are exactly 0 and 1; for token 0, the utterances are all blank."""
    student, _, lengths = batch()
    certain = torch.full((3, 7, V), -math.inf, dtype=torch.float64)
    certain[..., token] = 0.0
    expected = value_and_gradient(name, student, certain, lengths)
    got = value_and_gradient(name, student, compress(certain, 3), lengths)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher, lengths = batch()
    short = compress(teacher.float(), 3)
    got, grad = value_and_gradient(name, student.to(dtype), short, lengths)
    expected, _ = value_and_gradient(name, student.to(dtype).float(), short, lengths)
    assert got.dtype == torch.float32 and grad.dtype == dtype and grad.isfinite().all()
    torch.testing.assert_close(got, expected)


def test_student_most_wrong_still_learns():
    """The student is sure of blank by 20, the teacher of a token: the loss is 20, the blank logit's gradient 1."""
    student = torch.zeros(1, 1, V).index_fill(-1, torch.tensor([0]), 20.0).requires_grad_()
    teacher = torch.full((1, 1, V), -30.0).index_fill(-1, torch.tensor([3]), 0.0)
    loss = losses.blank_kl(student, compress(teacher, 3), torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(20.0 - math.log(V - 1), rel=1e-3)
    assert student.grad[0, 0, 0].item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    "rule, options",
    [
        *(("all", {}), ("elimination", {}), ("symmetric", {"n": 1}), ("trim", {}), ("threshold", {"theta": 0.3})),
        ("elimination", {"log_prior": torch.linspace(-3, -1, V), "prior_scale": 0.5}),
    ],
)
def test_selections_agree(rule, options):
    _, teacher, lengths = batch(frames=40, utts=2)
    lengths = torch.tensor([40, 17])
    torch.testing.assert_close(
        fr.select(compress(teacher, V - 1), lengths, rule, **options), fr.select(teacher, lengths, rule, **options)
    )


@pytest.mark.parametrize("shift", [0.02, 0.04, 0.06, 0.08])
def test_alignment_agrees(shift):
    _, teacher, _ = batch(utts=2, frames=12)
    lengths = torch.tensor([12, 6])
    frames = math.ceil(12 * 0.04 / shift)
    student_lengths = (lengths * 0.04 / shift).long()
    dense, _, both = fr.align(teacher, {}, lengths, 0.04, frames, student_lengths, shift)
    short, _, short_both = fr.align(compress(teacher, V - 1), {}, lengths, 0.04, frames, student_lengths, shift)
    assert both.tolist() == short_both.tolist()
    inside = fr.valid(both, frames)
    expected = compress(dense, V - 1)
    torch.testing.assert_close(short.log_probs[inside], expected.log_probs[inside])
    torch.testing.assert_close(short.log_blank[inside], expected.log_blank[inside])


def test_mean_pooling_is_refused():
    _, teacher, _ = batch(utts=1, frames=8)
    with pytest.raises(ValueError, match="pool: mean"):
        fr.align(compress(teacher, 2), {}, torch.tensor([8]), 0.02, 4, torch.tensor([4]), 0.04, pool="mean")


def dropped(short: TopK, where: torch.Tensor) -> TopK:
    """``short`` without tokens on the frames ``where``."""
    log_probs = short.log_probs.masked_fill(where[..., None], -torch.inf)
    return TopK(short.log_blank, short.tokens, log_probs, short.num_tokens)


def test_tokens_on_nonblank_frames_are_enough_for_factorized_kl():
    student, teacher, lengths = batch(frames=12, utts=2)
    short = compress(teacher, 4)
    without = dropped(short, short.argmax() == 0)
    for got, want in zip(
        value_and_gradient("factorized_kl", student, without, lengths),
        value_and_gradient("factorized_kl", student, short, lengths),
    ):
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="keep no tokens"):
        losses.kl(student, without, lengths)


def test_temperature_that_was_not_kept_is_refused():
    student, teacher, lengths = batch()
    with pytest.raises(ValueError, match="temperature 2"):
        losses.kl(student, compress(teacher, 3), lengths, temperature=2.0)


def test_blank_is_exact_where_it_rounds_to_one():
    logits = torch.zeros(1, 1, V)
    logits[..., 0] = 30.0
    short = compress(logits, 2)
    assert short.log_nonblank_at(1.0).item() == pytest.approx(math.log(V - 1) - 30, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0])
def test_sure_teacher_in_single_precision_at_a_temperature(temperature):
    """p(blank) at τ is computed as a difference of numbers near 0; it must not exceed 1."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 400, 50)
    logits[..., 0] += torch.linspace(5, 40, 400)
    student = torch.randn(1, 400, 50).requires_grad_()
    short = compress(logits, 8, (temperature,))
    exact = compress(logits.double(), 8, (temperature,))
    got, expected = (x.log_nonblank_at(temperature).exp().double() for x in (short, exact))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=3e-7)
    losses.blank_kl(student, short, torch.tensor([400]), temperature=temperature).backward()
    assert student.grad.isfinite().all()


def test_weights_of_representations_agree():
    _, teacher, _ = batch()
    torch.testing.assert_close(losses.nonblank_mass(compress(teacher, 1)), losses.nonblank_mass(teacher))
