"""The losses of posteriors, compared with a slow reference, and in the known pitfalls of methods.md."""

import functools
import math

import pytest
import reference
import torch

from espnet_kd.frames import select
from espnet_kd.losses import blank_kl, consistency, delayed_kl, factorized_kl, guided_ctc, kl, softmax_l2
from espnet_kd.topk import compress

LOSSES = {
    "kl": kl,
    "blank_kl": blank_kl,
    "factorized_kl": factorized_kl,
    "softmax_l2": softmax_l2,
    "guided_ctc": guided_ctc,
    "guided_ctc_log": functools.partial(guided_ctc, log=True),
    "delayed_kl": delayed_kl,
    "consistency": consistency,
}
GUIDED = ["guided_ctc", "guided_ctc_log"]  # these use non-blank frames only and are not distances
each_loss = pytest.mark.parametrize("name", LOSSES)
# consistency has no teacher: both its inputs get gradients, which test_variant_losses.py checks.
each_with_teacher = pytest.mark.parametrize("name", [n for n in LOSSES if n != "consistency"])
each_distance = pytest.mark.parametrize("name", [n for n in LOSSES if n not in GUIDED])


def with_gradient(name, student, teacher, lengths, **options):
    """The loss and its gradient with respect to the student."""
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
    assert expected != 0
    got = LOSSES[name](student, teacher, lengths, blank_id=blank_id, temperature=temperature)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(expected, rel=1e-12)


@each_loss
def test_frames_replace_valid_ones(name):
    student, teacher, lengths, mask = reference.batch()
    frames = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    assert 2 < frames.sum() < mask.sum()
    got = LOSSES[name](student, teacher, lengths, frames=frames)
    options = {"lengths": lengths} if name == "delayed_kl" else {}
    assert got.item() == pytest.approx(getattr(reference, name)(student, teacher, frames, **options), rel=1e-12)


@each_with_teacher
@pytest.mark.parametrize("blank_id, temperature", [(0, 1.0), (3, 2.0)])
def test_gradcheck(name, blank_id, temperature):
    student, teacher, lengths, _ = reference.batch((4, 2), width=5)
    options = dict(
        blank_id=blank_id, temperature=temperature, **(reference.ALL_WEIGHTS if name == "factorized_kl" else {})
    )
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](x, teacher, lengths, **options), student.requires_grad_(), atol=1e-7
    )


@pytest.mark.parametrize("name", ["kl", "blank_kl", "factorized_kl", "delayed_kl", "consistency"])
def test_sums_over_the_vocabulary(name):
    """``kl_div(reduction="mean")`` would divide by V too. Neither V nor copies of the batch may scale the loss."""
    student, teacher, lengths, _ = reference.batch()
    # Splitting the mass of every token into two equal tokens does not change any divergence.
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
def test_impossible_tokens_and_copies_of_the_batch_scale_nothing(name):
    student, teacher, lengths, _ = reference.batch()
    once = LOSSES[name](student, teacher, lengths)
    wide = (torch.nn.functional.pad(x, (0, 6), value=-math.inf) for x in (student, teacher))
    torch.testing.assert_close(LOSSES[name](*wide, lengths), once, rtol=1e-12, atol=0)
    twice = LOSSES[name](student.repeat(2, 1, 1), teacher.repeat(2, 1, 1), lengths.repeat(2))
    torch.testing.assert_close(twice, once, rtol=1e-12, atol=0)


@each_loss
def test_one_frame_utterance(name):
    student, teacher, lengths, mask = reference.batch((1,))
    if name in GUIDED:
        teacher[..., 3] = teacher.amax(-1) + 1  # these losses skip blank frames
    got, grad = with_gradient(name, student, teacher, lengths)
    assert got.item() == pytest.approx(getattr(reference, name)(student, teacher, mask), rel=1e-12)
    assert grad.abs().sum() > 0


@each_loss
@pytest.mark.parametrize("winner", [0, 1])
def test_a_half_may_be_empty(name, winner):
    """All frames are blank, or none is: the empty half adds 0, and nothing is NaN."""
    student, teacher, lengths, mask = reference.batch()
    teacher[..., winner] = teacher.amax(-1) + 1
    options = reference.ALL_WEIGHTS if name == "factorized_kl" else {}
    expected = {"weights": (1, 1, 1)} if options else {}
    got, grad = with_gradient(name, student, teacher, lengths, **options)
    assert got.item() == pytest.approx(getattr(reference, name)(student, teacher, mask, **expected), rel=1e-12)
    assert grad.isfinite().all()
    if winner == 0 and name in GUIDED:
        assert got == 0 and (grad == 0).all()
    else:
        assert grad.abs().sum() > 0


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
    """(1, 1, V) log-probabilities with all mass on one token."""
    return torch.full((1, 1, width), -math.inf, dtype=dtype).index_fill(2, torch.tensor([token]), 0.0)


@each_with_teacher
@pytest.mark.parametrize("token", [0, 2])
@pytest.mark.parametrize("blank_id", [0, 2, 4])
def test_certain_teacher(name, token, blank_id):
    """The teacher's posteriors are exactly 0 and 1."""
    student = reference.batch((1,), width=5)[0]
    options = dict(blank_id=blank_id, **(reference.ALL_WEIGHTS if name == "factorized_kl" else {}))
    got, grad = with_gradient(name, student, one_hot(token), torch.tensor([1]), **options)
    q = reference.softmax(student[0, 0].tolist())
    is_spike = token != blank_id
    expected = {
        "blank_kl": -math.log(1 - q[blank_id] if is_spike else q[token]),
        "softmax_l2": sum((v - (k == token)) ** 2 for k, v in enumerate(q)),
        "guided_ctc": -q[token] * is_spike,
        "guided_ctc_log": -math.log(q[token]) * is_spike,
    }.get(name, -math.log(q[token]))
    assert got.item() == pytest.approx(expected, rel=1e-10)
    assert grad.isfinite().all()
    assert (grad.abs().sum() > 0) == (is_spike or name not in GUIDED)
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](x, one_hot(token), torch.tensor([1]), **options), student.requires_grad_()
    )


@each_with_teacher
@pytest.mark.parametrize("big, dtype", [(1e4, torch.float64), (1e4, torch.float16), (6e4, torch.bfloat16)])
def test_certain_student_who_is_wrong(name, big, dtype):
    """The expected gradients are derived by hand: q − p for divergences and log q, 0 for a saturated softmax."""
    student = torch.full((1, 1, 5), -big, dtype=dtype).index_fill(2, torch.tensor([1]), big)
    teacher = torch.tensor([[[1.0, -2.0, 3.0, 0.5, 0.0]]], dtype=dtype)
    options = reference.ALL_WEIGHTS if name == "factorized_kl" else {}
    got, grad = with_gradient(name, student, teacher, torch.tensor([1]), **options)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = {
        # −b for blank. The other tokens share +b in proportion to the student's posterior, which is all on token 1.
        "blank_kl": torch.cat([-p[..., :1], p[..., :1] * q[..., 1:]], -1),
        "softmax_l2": torch.zeros_like(p),
        "guided_ctc": torch.zeros_like(p),
        "guided_ctc_log": q - torch.nn.functional.one_hot(p.argmax(-1), 5),
    }.get(name, q - p)
    assert got.isfinite()
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 4e-3)


@each_loss
@pytest.mark.parametrize("token", [0, 2])
def test_certain_student_and_teacher_who_agree(name, token):
    """Where student and teacher are both −∞ they agree: the loss is 0 and the gradient has no NaN."""
    options = reference.ALL_WEIGHTS if name == "factorized_kl" else {}
    got, grad = with_gradient(name, one_hot(token), one_hot(token), torch.tensor([1]), **options)
    assert got == (-1 if name == "guided_ctc" and token else 0)  # the minimum of −q
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
    options = reference.ALL_WEIGHTS if name == "factorized_kl" else {}
    expected = {"weights": (1, 1, 1)} if options else {}
    got, grad = with_gradient(name, student, teacher, lengths, **options)
    assert got.dtype == torch.float32
    assert grad.dtype == dtype
    # float64 holds the inputs exactly. 1e-5 allows for float32 arithmetic; half precision would be off by 1e-3 or more.
    reference_value = getattr(reference, name)(student.double(), teacher.double(), mask, **expected)
    assert got.item() == pytest.approx(reference_value, rel=1e-5)


@each_loss
@pytest.mark.parametrize("dtype, big", [(torch.float16, 60000), (torch.bfloat16, 60000), (torch.float16, 1e4)])
def test_half_precision_with_big_logits(name, dtype, big):
    """With masks of ±1e4 or logits near the largest half, differences overflow in half but not in float32."""
    student, teacher, lengths, mask = reference.batch((6,), dtype=dtype)
    teacher[0, 1] = torch.tensor([-big, big, -big, 0, 0, 0], dtype=dtype)
    teacher[0, 2] = torch.tensor([big, -big, -big, -big, -big, -big], dtype=dtype)
    student[..., 5] = teacher[..., 5] = -big
    options = reference.ALL_WEIGHTS if name == "factorized_kl" else {}
    got, grad = with_gradient(name, student, teacher, lengths, **options)
    assert got.isfinite() and grad.isfinite().all()
    if name not in ("factorized_kl", "consistency"):  # the references of these two would divide by 0
        expected = getattr(reference, name)(student.double(), teacher.double(), mask)
        assert got.item() == pytest.approx(expected, rel=1e-4)
    else:
        alone = LOSSES[name](student.double(), teacher.double(), lengths, **options).item()
        assert got.item() == pytest.approx(alone, rel=1e-4)


@each_with_teacher
def test_no_gradient_to_the_teacher(name):
    student, teacher, lengths, _ = reference.batch()
    student.requires_grad_()
    teacher.requires_grad_()
    LOSSES[name](student, teacher, lengths).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@each_loss
@pytest.mark.parametrize("rule, options", [("all", {}), ("symmetric", {"n": 1}), ("threshold", {"theta": 0.3})])
def test_selected_frames(name, rule, options):
    """The result of ``select`` works as ``frames``; the rule ``all`` changes nothing."""
    student, teacher, lengths, mask = reference.batch((9, 5, 1), scale=1.0)
    frames = select(teacher, lengths, rule, **options)
    got, grad = with_gradient(name, student, teacher, lengths, frames=frames)
    if rule == "all":
        plain, plain_grad = with_gradient(name, student, teacher, lengths)
        assert got == plain and torch.equal(grad, plain_grad)
    else:
        assert 0 < frames.sum() < mask.sum()
        more = {"lengths": lengths} if name == "delayed_kl" else {}
        expected = getattr(reference, name)(student, teacher, frames, **more)
        assert got.item() == pytest.approx(expected, rel=1e-12)


@each_loss
@pytest.mark.parametrize(
    "rule, options", [("elimination", {}), ("symmetric", {"n": 3}), ("trim", {}), ("random", {"ratio": 2.0})]
)
def test_selection_of_a_batch_without_nonblank_frames(name, rule, options):
    student, teacher, lengths, _ = reference.batch()
    teacher[..., 0] = teacher.amax(-1) + 1
    frames = select(teacher, lengths, rule, **options)
    assert not frames.any()
    got, grad = with_gradient(name, student, teacher, lengths, frames=frames)
    assert got == 0
    assert torch.equal(grad, torch.zeros_like(student))


@each_loss
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_log_probabilities_may_stand_for_logits(name, temperature):
    student, teacher, lengths, _ = reference.batch()
    of_logits = LOSSES[name](student, teacher, lengths, temperature=temperature)
    of_log_probs = LOSSES[name](student.log_softmax(-1), teacher.log_softmax(-1), lengths, temperature=temperature)
    torch.testing.assert_close(of_log_probs, of_logits, rtol=1e-12, atol=0)


@each_distance
def test_zero_for_equal_posteriors(name):
    student, _, lengths, _ = reference.batch()
    got, grad = with_gradient(name, student, student + 7.0, lengths)
    assert got.item() == pytest.approx(0, abs=1e-14)
    assert grad.abs().max() < 1e-14


@pytest.mark.parametrize("name", ["blank_kl", "factorized_kl"])
@pytest.mark.parametrize("cached", [False, True])
def test_student_and_teacher_of_different_types(name, cached):
    student, teacher, lengths, _ = reference.batch()
    options = {"nonblank_on_blank_weight": 0.5} if name == "factorized_kl" else {}
    expected = with_gradient(name, student, teacher, lengths, **options)
    for mine, theirs in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        said = compress(teacher.to(theirs), teacher.size(-1)) if cached else teacher.to(theirs)
        got, grad = with_gradient(name, student.to(mine), said, lengths, **options)
        assert grad.dtype == mine
        torch.testing.assert_close(got.double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "blank_kl", "factorized_kl", "softmax_l2", *GUIDED])
def test_other_numbers_of_frames_are_refused(name):
    """Otherwise a student frame would be compared with a different teacher frame."""
    student, teacher, lengths, _ = reference.batch()
    with pytest.raises((ValueError, IndexError)):
        LOSSES[name](student[:, :-1], teacher, (lengths - 1).clamp(min=0))


def test_student_most_wrong_still_learns():
    """The student's blank logit is 20, the teacher is certain of a token: BKL is 16.6 and its gradient 1.

    ``log1p(-exp)`` would give NaN or 0.
    """
    student, teacher = torch.zeros(1, 1, 31), torch.zeros(1, 1, 31)
    student[..., 0] = 20.0
    teacher[..., 3] = 60.0
    got, grad = with_gradient("blank_kl", student, teacher, torch.tensor([1]))
    assert got.item() == pytest.approx(20 - math.log(30), abs=1e-4)  # 16.6
    assert grad[0, 0, 0].item() == pytest.approx(1.0, abs=1e-4)
    assert grad[0, 0, 1:].sum().item() == pytest.approx(-1.0, abs=1e-4)
