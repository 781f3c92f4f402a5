"""factorized_representation: hidden states matched on non-blank and blank frames apart."""

import math

import pytest
import reference
import torch

from espnet_kd.losses import factorized_representation

each_distance = pytest.mark.parametrize("distance", ["cosine", "l2"])


def hidden(lengths=(7, 4, 1), width=8, dtype=torch.float64):
    student, teacher, lengths, mask = reference.batch(lengths, width, seed=1, dtype=dtype)
    return student, teacher, reference.batch(tuple(lengths.tolist()))[1], lengths, mask


def with_gradient(student, *args, **options):
    student = student.detach().clone().requires_grad_()
    loss = factorized_representation(student, *args, **options)
    loss.backward()
    return loss.detach(), student.grad


@each_distance
@pytest.mark.parametrize("blank_id", [0, 3])
def test_equals_reference(distance, blank_id):
    student, teacher, logits, lengths, mask = hidden()
    logits[..., [0, blank_id]] = logits[..., [blank_id, 0]]
    got = factorized_representation(student, teacher, logits, lengths, blank_id=blank_id, distance=distance)
    expected = reference.factorized_representation(student, teacher, logits, mask, distance, blank_id)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@each_distance
def test_gradcheck(distance):
    student, teacher, logits, lengths, _ = hidden((3, 2), width=4)
    assert torch.autograd.gradcheck(
        lambda x: factorized_representation(x, teacher, logits, lengths, distance=distance), student.requires_grad_()
    )


@each_distance
def test_frames_replace_valid_ones(distance):
    student, teacher, logits, lengths, mask = hidden()
    frames = mask & (torch.arange(7) % 3 != 1)
    got = factorized_representation(student, teacher, logits, lengths, distance=distance, frames=frames)
    expected = reference.factorized_representation(student, teacher, logits, frames, distance)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@each_distance
def test_few_nonblank_frames_count_as_much_as_many_blank_ones(distance):
    student, teacher, logits, lengths, _ = hidden((40,))
    logits[0, :, 0] += 100.0
    logits[0, 11, 1] += 200.0
    _, grad = with_gradient(student, teacher, logits, lengths, distance=distance)
    lone = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([11]), True)
    expected = [
        reference.factorized_representation(student, teacher, logits, half[None], distance) for half in (lone, ~lone)
    ]
    got = factorized_representation(student, teacher, logits, lengths, distance=distance)
    assert got.item() == pytest.approx(sum(expected), rel=1e-12)  # each already carries its ½
    assert grad[0, 11].norm() > 5 * grad[0, ~lone].norm(dim=-1).mean()


@each_distance
@pytest.mark.parametrize("winner", [0, 1])
def test_an_empty_half_counts_zero(distance, winner):
    student, teacher, logits, lengths, mask = hidden()
    logits[..., winner] = 1e3
    got, grad = with_gradient(student, teacher, logits, lengths, distance=distance)
    expected = reference.factorized_representation(student, teacher, logits, mask, distance)
    assert got.item() == pytest.approx(expected, rel=1e-12) and expected > 0
    assert grad.isfinite().all()


@each_distance
def test_no_frame_gives_zero_with_a_gradient_path(distance):
    student, teacher, logits, lengths, mask = hidden()
    student[0, 0] = math.nan
    got, grad = with_gradient(student, teacher, logits, lengths, distance=distance, frames=torch.zeros_like(mask))
    assert got == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@each_distance
@pytest.mark.parametrize("fill", [0.0, math.inf, math.nan])
def test_padding_is_never_read(distance, fill):
    student, teacher, logits, lengths, mask = hidden()
    loss, grad = with_gradient(student, teacher, logits, lengths, distance=distance)
    padded = [x.masked_fill(~mask[..., None], fill) for x in (student, teacher, logits)]
    padded_loss, padded_grad = with_gradient(*padded, lengths, distance=distance)
    assert padded_loss == loss
    assert torch.equal(padded_grad, grad)
    assert (padded_grad[~mask] == 0).all() and grad[mask].abs().sum() > 0


@each_distance
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_zero_vectors_are_finite(distance, whose, dtype):
    student, teacher, logits, lengths, _ = hidden(dtype=dtype)
    if whose != "teacher":
        student.zero_()
    if whose != "student":
        teacher.zero_()
    got, grad = with_gradient(student, teacher, logits, lengths, distance=distance)
    assert got.isfinite() and grad.isfinite().all()
    assert grad.abs().max() <= 10  # and not 1/ε
    if distance == "cosine":
        assert got == 1.0


def test_cosine_ignores_length_and_l2_divides_by_width():
    student, teacher, logits, lengths, _ = hidden()
    one = factorized_representation(student, teacher, logits, lengths)
    torch.testing.assert_close(factorized_representation(student * 3, teacher / 7, logits, lengths), one)
    l2 = factorized_representation(student, teacher, logits, lengths, distance="l2")
    wide = [x.repeat(1, 1, 2) for x in (student, teacher)]
    torch.testing.assert_close(factorized_representation(*wide, logits, lengths, distance="l2"), l2)


@each_distance
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(distance, dtype):
    student, teacher, logits, lengths, mask = hidden((30, 20), width=64, dtype=dtype)
    student = student * 100  # squares overflow in float16
    got, grad = with_gradient(student, teacher, logits, lengths, distance=distance)
    assert got.dtype == torch.float32
    expected = reference.factorized_representation(student.double(), teacher.double(), logits, mask, distance)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    assert grad.isfinite().all()


def test_no_gradient_to_the_teacher():
    student, teacher, logits, lengths, _ = hidden()
    for x in (student, teacher, logits):
        x.requires_grad_()
    factorized_representation(student, teacher, logits, lengths).backward()
    assert teacher.grad is None and logits.grad is None
    assert student.grad.abs().sum() > 0


def test_unknown_distance_is_refused():
    student, teacher, logits, lengths, _ = hidden()
    with pytest.raises(ValueError, match="cosine or l2, not 'manhattan'"):
        factorized_representation(student, teacher, logits, lengths, distance="manhattan")
