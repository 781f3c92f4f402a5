"""kl, blank_kl, factorized_kl: against a slow reference, and the traps of methods.md."""

import math

import pytest
import reference
import torch

from espnet_kd.losses import blank_kl, factorized_kl, kl

LOSSES = {"kl": kl, "blank_kl": blank_kl, "factorized_kl": factorized_kl}
ALL_WEIGHTS = dict(blank_weight=1.0, nonblank_weight=1.0, nonblank_on_blank_weight=1.0)
each_loss = pytest.mark.parametrize("name", LOSSES)


def with_gradient(name, student, teacher, lengths, **options):
    """Loss and its gradient on the student."""
    student = student.detach().clone().requires_grad_()
    loss = LOSSES[name](student, teacher, lengths, **options)
    loss.backward()
    return loss.detach(), student.grad


@each_loss
@pytest.mark.parametrize("blank_id", [0, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_equals_reference(name, blank_id, temperature):
    student, teacher, lengths, mask = reference.batch()
    teacher[..., [0, blank_id]] = teacher[..., [blank_id, 0]]
    expected = getattr(reference, name)(student, teacher, mask, blank_id, temperature)
    got = LOSSES[name](student, teacher, lengths, blank_id=blank_id, temperature=temperature)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, 2.0, 0.7)])
def test_weights_of_factorized_kl(weights):
    student, teacher, lengths, mask = reference.batch()
    got = factorized_kl(
        student, teacher, lengths, blank_weight=weights[0], nonblank_weight=weights[1],
        nonblank_on_blank_weight=weights[2],
    )  # fmt: skip
    assert got.item() == pytest.approx(reference.factorized_kl(student, teacher, mask, weights=weights), rel=1e-12)


@each_loss
def test_frames_replace_valid_ones(name):
    student, teacher, lengths, mask = reference.batch()
    frames = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    assert 2 < frames.sum() < mask.sum()
    got = LOSSES[name](student, teacher, lengths, frames=frames)
    assert got.item() == pytest.approx(getattr(reference, name)(student, teacher, frames), rel=1e-12)


@each_loss
@pytest.mark.parametrize("blank_id, temperature", [(0, 1.0), (3, 2.0)])
def test_gradcheck(name, blank_id, temperature):
    student, teacher, lengths, _ = reference.batch((4, 2), width=5)
    options = dict(blank_id=blank_id, temperature=temperature, **(ALL_WEIGHTS if name == "factorized_kl" else {}))
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](x, teacher, lengths, **options), student.requires_grad_(), atol=1e-7
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_identity_frame_by_frame(temperature):
    """KL = BKL + (1−b)·NKL: with all weights 1, a frame at a time, so that means are sums."""
    student, teacher, lengths, mask = reference.batch((20, 20), scale=4.0)
    one = torch.tensor([1])
    kinds = set()
    for s, t in zip(student[mask], teacher[mask]):
        s, t = s[None, None], t[None, None]
        whole = kl(s, t, one, temperature=temperature).item()
        parts = factorized_kl(s, t, one, temperature=temperature, **ALL_WEIGHTS).item()
        p, q = (reference.softmax(x[0, 0].tolist(), temperature) for x in (t, s))
        assert whole == pytest.approx(parts, abs=1e-9)
        assert whole == pytest.approx(reference.binary(p, q, 0) + (1 - p[0]) * reference.tokens(p, q, 0), abs=1e-9)
        kinds.add(t.argmax().item() == 0)
    assert kinds == {True, False}


@each_loss
def test_sums_over_the_vocabulary(name):
    """``kl_div(reduction="mean")`` would divide by V too. Neither V nor copies of the batch may scale the loss."""
    student, teacher, lengths, _ = reference.batch()
    # Splitting every token's mass in two equal tokens leaves all three divergences as they were.
    wide_s, wide_t = (torch.cat([x, x[..., 1:]], -1) for x in (student, teacher))
    wide_s[..., 0] += math.log(2)
    wide_t[..., 0] += math.log(2)
    assert torch.equal(teacher.argmax(-1) == 0, wide_t.argmax(-1) == 0)
    once = LOSSES[name](student, teacher, lengths)
    torch.testing.assert_close(LOSSES[name](wide_s, wide_t, lengths), once, rtol=1e-10, atol=0)
    twice = LOSSES[name](student.repeat(2, 1, 1), teacher.repeat(2, 1, 1), lengths.repeat(2))
    torch.testing.assert_close(twice, once, rtol=1e-10, atol=0)


@each_loss
@pytest.mark.parametrize("fill", [0.0, 1e4, math.inf, -math.inf, math.nan])
def test_padding_is_never_read(name, fill):
    student, teacher, lengths, mask = reference.batch()
    loss, grad = with_gradient(name, student, teacher, lengths)
    padded_s, padded_t = (x.masked_fill(~mask[..., None], fill) for x in (student, teacher))
    padded_loss, padded_grad = with_gradient(name, padded_s, padded_t, lengths)
    assert padded_loss == loss
    assert torch.equal(padded_grad, grad)
    assert grad[mask].abs().sum() > 0
    assert (padded_grad[~mask] == 0).all()


@each_loss
def test_one_frame_utterance(name):
    student, teacher, lengths, mask = reference.batch((1,))
    got, grad = with_gradient(name, student, teacher, lengths)
    assert got.item() == pytest.approx(getattr(reference, name)(student, teacher, mask), rel=1e-12)
    assert grad.abs().sum() > 0


@each_loss
@pytest.mark.parametrize("winner", [0, 1])
def test_a_half_may_be_empty(name, winner):
    """All blank, or no blank at all: the other half counts 0, nothing is NaN."""
    student, teacher, lengths, mask = reference.batch()
    teacher[..., winner] = teacher.amax(-1) + 1
    options = ALL_WEIGHTS if name == "factorized_kl" else {}
    expected = {"weights": (1, 1, 1)} if options else {}
    got, grad = with_gradient(name, student, teacher, lengths, **options)
    assert got.item() == pytest.approx(getattr(reference, name)(student, teacher, mask, **expected), rel=1e-12)
    assert grad.isfinite().all() and grad.abs().sum() > 0


@each_loss
@pytest.mark.parametrize("broken", [False, True])
def test_no_frame_gives_zero_with_a_gradient_path(name, broken):
    student, teacher, lengths, mask = reference.batch()
    if broken:
        student[0, 0] = math.inf
    got, grad = with_gradient(name, student, teacher, lengths, frames=torch.zeros_like(mask))
    assert got == 0
    assert torch.equal(grad, torch.zeros_like(student))


def one_hot(token, width=5, dtype=torch.float64):
    """(1, 1, V) log-probabilities that are certain."""
    return torch.full((1, 1, width), -math.inf, dtype=dtype).index_fill(2, torch.tensor([token]), 0.0)


@each_loss
@pytest.mark.parametrize("token", [0, 2])
@pytest.mark.parametrize("blank_id", [0, 2, 4])
def test_certain_teacher(name, token, blank_id):
    """Posteriors of exactly 0 and 1."""
    student = reference.batch((1,), width=5)[0]
    options = ALL_WEIGHTS if name == "factorized_kl" else {}
    got, grad = with_gradient(name, student, one_hot(token), torch.tensor([1]), blank_id=blank_id, **options)
    q = reference.softmax(student[0, 0].tolist())
    against = q[token]
    if name == "blank_kl" and token != blank_id:
        against = 1 - q[blank_id]
    assert got.item() == pytest.approx(-math.log(against), rel=1e-10)
    assert grad.isfinite().all() and grad.abs().sum() > 0


@each_loss
@pytest.mark.parametrize("token", [0, 2])
def test_certain_student_and_teacher_who_agree(name, token):
    """−∞ on both sides is agreement: loss 0, and no NaN in the gradient."""
    options = ALL_WEIGHTS if name == "factorized_kl" else {}
    got, grad = with_gradient(name, one_hot(token), one_hot(token), torch.tensor([1]), **options)
    assert got == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@each_loss
def test_student_without_mass_where_the_teacher_has_none(name):
    student, teacher, lengths, mask = reference.batch()
    student[..., 4] = teacher[..., 4] = -math.inf
    got, grad = with_gradient(name, student, teacher, lengths)
    keep = [0, 1, 2, 3, 5]
    assert got.item() == pytest.approx(
        getattr(reference, name)(student[..., keep], teacher[..., keep], mask), rel=1e-12
    )
    assert grad.isfinite().all()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    student, teacher, lengths, mask = reference.batch((30, 30), width=50, dtype=dtype)
    options = ALL_WEIGHTS if name == "factorized_kl" else {}
    expected = {"weights": (1, 1, 1)} if options else {}
    got, grad = with_gradient(name, student, teacher, lengths, **options)
    assert got.dtype == torch.float32
    assert grad.dtype == dtype
    # The inputs are exact in float64: 1e-5 is float32's arithmetic; half's would be off by 1e-3 and more.
    reference_value = getattr(reference, name)(student.double(), teacher.double(), mask, **expected)
    assert got.item() == pytest.approx(reference_value, rel=1e-5)


@each_loss
@pytest.mark.parametrize("dtype, big", [(torch.float16, 60000), (torch.bfloat16, 60000), (torch.float16, 1e4)])
def test_half_precision_with_big_logits(name, dtype, big):
    """Masks of ±1e4 and logits near the largest half: differences overflow in half, not in float32."""
    student, teacher, lengths, mask = reference.batch((6,), dtype=dtype)
    teacher[0, 1] = torch.tensor([-big, big, -big, 0, 0, 0], dtype=dtype)
    teacher[0, 2] = torch.tensor([big, -big, -big, -big, -big, -big], dtype=dtype)
    student[..., 5] = teacher[..., 5] = -big
    options = ALL_WEIGHTS if name == "factorized_kl" else {}
    got, grad = with_gradient(name, student, teacher, lengths, **options)
    assert got.isfinite() and grad.isfinite().all()
    expected = getattr(reference, "kl" if name == "kl" else "blank_kl")(student.double(), teacher.double(), mask)
    if name != "factorized_kl":
        assert got.item() == pytest.approx(expected, rel=1e-4)
    else:
        alone = LOSSES[name](student.double(), teacher.double(), lengths, **options).item()
        assert got.item() == pytest.approx(alone, rel=1e-4)


@each_loss
def test_no_gradient_to_the_teacher(name):
    student, teacher, lengths, _ = reference.batch()
    student.requires_grad_()
    teacher.requires_grad_()
    LOSSES[name](student, teacher, lengths).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@each_loss
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_log_probabilities_may_stand_for_logits(name, temperature):
    student, teacher, lengths, _ = reference.batch()
    of_logits = LOSSES[name](student, teacher, lengths, temperature=temperature)
    of_log_probs = LOSSES[name](student.log_softmax(-1), teacher.log_softmax(-1), lengths, temperature=temperature)
    torch.testing.assert_close(of_log_probs, of_logits, rtol=1e-12, atol=0)


@each_loss
def test_zero_for_equal_posteriors(name):
    student, _, lengths, _ = reference.batch()
    got, grad = with_gradient(name, student, student + 7.0, lengths)
    assert got.item() == pytest.approx(0, abs=1e-14)
    assert grad.abs().max() < 1e-14


def test_student_most_wrong_still_learns():
    """Student sure of blank by 20, teacher of a token: BKL 16.6, gradient 1; log1p(-exp) would give NaN or 0."""
    student, teacher = torch.zeros(1, 1, 31), torch.zeros(1, 1, 31)
    student[..., 0] = 20.0
    teacher[..., 3] = 60.0
    got, grad = with_gradient("blank_kl", student, teacher, torch.tensor([1]))
    assert got.item() == pytest.approx(20 - math.log(30), abs=1e-4)  # 16.6
    assert grad[0, 0, 0].item() == pytest.approx(1.0, abs=1e-4)
    assert grad[0, 0, 1:].sum().item() == pytest.approx(-1.0, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_factorized_kl_ignores_which_token_on_blank_frames(temperature):
    student, teacher, lengths, mask = reference.batch()
    blank = teacher.argmax(-1) == 0
    permuted = teacher.clone()
    permuted[blank] = teacher[blank][:, [0, 3, 1, 5, 2, 4]]
    before = factorized_kl(student, teacher, lengths, temperature=temperature)
    after = factorized_kl(student, permuted, lengths, temperature=temperature)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=0)
    # The plain KL and the third weight do see it.
    assert (kl(student, teacher, lengths) - kl(student, permuted, lengths)).abs() > 1e-3
    seen = [factorized_kl(student, x, lengths, nonblank_on_blank_weight=1.0) for x in (teacher, permuted)]
    assert (seen[0] - seen[1]).abs() > 1e-3


def test_factorized_kl_reads_blank_mass_only_on_blank_frames_at_temperature_1():
    student, teacher, lengths, _ = reference.batch()
    p = teacher.softmax(-1)
    blank = teacher.argmax(-1) == 0
    # Redistribute what is not blank: halfway to uniform, so that blank keeps both its mass and the lead.
    flat = p.clone()
    flat[..., 1:] = 0.5 * p[..., 1:] + 0.5 * (1 - p[..., :1]) / 5
    moved = torch.where(blank[..., None], flat, p).log()
    assert torch.equal(moved.argmax(-1) == 0, blank)
    one = [factorized_kl(student, x, lengths) for x in (teacher, moved)]
    torch.testing.assert_close(one[0], one[1], rtol=1e-12, atol=0)
    two = [factorized_kl(student, x, lengths, temperature=2.0) for x in (teacher, moved)]
    assert (two[0] - two[1]).abs() > 1e-4  # at τ ≠ 1 it moves the blank mass itself


def test_nonblank_rule_is_at_temperature_1():
    """At a high temperature no token beats another by much, but NB and BL stay what they were."""
    student, teacher, lengths, mask = reference.batch()
    got = factorized_kl(student, teacher, lengths, temperature=50.0, **ALL_WEIGHTS)
    expected = reference.factorized_kl(student, teacher, mask, temperature=50.0, weights=(1, 1, 1))
    assert got.item() == pytest.approx(expected, rel=1e-9)
