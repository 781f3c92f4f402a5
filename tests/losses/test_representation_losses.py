"""Losses on hidden states: non-blank and blank frames averaged separately, or every frame with its own weight."""

import math

import pytest
import reference
import torch

from espnet_kd.losses import activation_energy, factorized_representation, nonblank_mass, weighted_representation

each_distance = pytest.mark.parametrize("distance", ["cosine", "l2"])
# "weighted" is weighted_representation, with frame weights from the teacher's posteriors.
each_loss = pytest.mark.parametrize("distance", ["cosine", "l2", "weighted"])


def loss_of(student, teacher, logits, lengths, *, distance, blank_id=0, frames=None):
    if distance == "weighted":
        weights = nonblank_mass(logits, blank_id=blank_id)
        return weighted_representation(student, teacher, lengths, weights=weights, frames=frames)
    return factorized_representation(
        student, teacher, logits, lengths, blank_id=blank_id, distance=distance, frames=frames
    )


def expected_of(student, teacher, logits, counted, distance, blank_id=0):
    if distance == "weighted":
        return reference.weighted_representation(student, teacher, counted, reference.nonblank_mass(logits, blank_id))
    return reference.factorized_representation(student, teacher, logits, counted, distance, blank_id)


def hidden(lengths=(7, 4, 1), width=8, dtype=torch.float64):
    student, teacher, lengths, mask = reference.batch(lengths, width, seed=1, dtype=dtype)
    return student, teacher, reference.batch(tuple(lengths.tolist()))[1], lengths, mask


def with_gradient(student, *args, **options):
    student = student.detach().clone().requires_grad_()
    loss = loss_of(student, *args, **options)
    loss.backward()
    return loss.detach(), student.grad


@each_loss
@pytest.mark.parametrize("blank_id", [0, 3])
def test_equals_reference(distance, blank_id):
    student, teacher, logits, lengths, mask = hidden()
    logits[..., [0, blank_id]] = logits[..., [blank_id, 0]]
    got = loss_of(student, teacher, logits, lengths, blank_id=blank_id, distance=distance)
    expected = expected_of(student, teacher, logits, mask, distance, blank_id)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@each_loss
def test_gradcheck(distance):
    student, teacher, logits, lengths, _ = hidden((3, 2), width=4)
    assert torch.autograd.gradcheck(
        lambda x: loss_of(x, teacher, logits, lengths, distance=distance), student.requires_grad_()
    )


@each_loss
def test_frames_replace_valid_ones(distance):
    student, teacher, logits, lengths, mask = hidden()
    frames = mask & (torch.arange(7) % 3 != 1)
    got = loss_of(student, teacher, logits, lengths, distance=distance, frames=frames)
    expected = expected_of(student, teacher, logits, frames, distance)
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
    assert got.item() == pytest.approx(sum(expected), rel=1e-12)  # each reference already includes its factor ½
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


@each_loss
def test_no_frame_gives_zero_with_a_gradient_path(distance):
    student, teacher, logits, lengths, mask = hidden()
    student[0, 0] = math.nan
    got, grad = with_gradient(student, teacher, logits, lengths, distance=distance, frames=torch.zeros_like(mask))
    assert got == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@each_loss
@pytest.mark.parametrize("fill", [0.0, math.inf, math.nan])
def test_padding_is_never_read(distance, fill):
    student, teacher, logits, lengths, mask = hidden()
    loss, grad = with_gradient(student, teacher, logits, lengths, distance=distance)
    padded = [x.masked_fill(~mask[..., None], fill) for x in (student, teacher, logits)]
    padded_loss, padded_grad = with_gradient(*padded, lengths, distance=distance)
    assert padded_loss == loss
    assert torch.equal(padded_grad, grad)
    assert (padded_grad[~mask] == 0).all() and grad[mask].abs().sum() > 0


@each_loss
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
    assert grad.abs().max() <= 10  # a division by a tiny norm would give about 1/ε
    if distance == "cosine":
        assert got == 1.0


def test_cosine_ignores_length_and_l2_divides_by_width():
    student, teacher, logits, lengths, _ = hidden()
    one = factorized_representation(student, teacher, logits, lengths)
    torch.testing.assert_close(factorized_representation(student * 3, teacher / 7, logits, lengths), one)
    l2 = factorized_representation(student, teacher, logits, lengths, distance="l2")
    wide = [x.repeat(1, 1, 2) for x in (student, teacher)]
    torch.testing.assert_close(factorized_representation(*wide, logits, lengths, distance="l2"), l2)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(distance, dtype):
    student, teacher, logits, lengths, mask = hidden((30, 20), width=64, dtype=dtype)
    student = student * 100  # squares overflow in float16
    got, grad = with_gradient(student, teacher, logits, lengths, distance=distance)
    assert got.dtype == torch.float32
    expected = expected_of(student.double(), teacher.double(), logits, mask, distance)
    assert got.item() == pytest.approx(expected, rel=1e-5)
    assert grad.isfinite().all()


@each_loss
def test_no_gradient_to_the_teacher(distance):
    student, teacher, logits, lengths, _ = hidden()
    for x in (student, teacher, logits):
        x.requires_grad_()
    loss_of(student, teacher, logits, lengths, distance=distance).backward()
    assert teacher.grad is None and logits.grad is None
    assert student.grad.abs().sum() > 0


def test_unknown_distance_is_refused():
    student, teacher, logits, lengths, _ = hidden()
    with pytest.raises(ValueError, match="cosine or l2, not 'manhattan'"):
        factorized_representation(student, teacher, logits, lengths, distance="manhattan")


def test_weights_have_mean_1_over_the_frames_that_count():
    student, teacher, _, lengths, mask = hidden()
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    got = weighted_representation(student, teacher, lengths, weights=weights)
    assert got.item() == pytest.approx(reference.weighted_representation(student, teacher, mask, weights), rel=1e-12)
    scaled = weighted_representation(student, teacher, lengths, weights=weights * 1e-3)
    torch.testing.assert_close(scaled, got, rtol=1e-12, atol=0)
    # Weights in padding or outside ``frames`` don't count.
    loud = weights.masked_fill(~mask, math.nan)
    assert weighted_representation(student, teacher, lengths, weights=loud) == got
    frames = mask & (torch.arange(7) % 2 == 0)
    got = weighted_representation(student, teacher, lengths, weights=weights.masked_fill(~frames, 1e9), frames=frames)
    assert got.item() == pytest.approx(reference.weighted_representation(student, teacher, frames, weights), rel=1e-12)


def test_equal_weights_give_the_mean():
    student, teacher, _, lengths, mask = hidden()
    got = weighted_representation(student, teacher, lengths, weights=torch.full(mask.shape, 7.0))
    torch.testing.assert_close(got, (student - teacher)[mask].square().mean(), rtol=1e-6, atol=0)
    # The distance is a mean over D, so that twice the width gives the same loss.
    wide = [x.repeat(1, 1, 2) for x in (student, teacher)]
    again = weighted_representation(*wide, lengths, weights=torch.full(mask.shape, 7.0))
    torch.testing.assert_close(again, got, rtol=1e-12, atol=0)


@pytest.mark.parametrize("broken", [False, True])
def test_all_zero_weights_give_zero_with_a_gradient_path(broken):
    student, teacher, _, lengths, mask = hidden()
    if broken:
        student[0, 0] = math.inf
    student.requires_grad_()
    loss = weighted_representation(student, teacher, lengths, weights=torch.zeros(mask.shape))
    loss.backward()
    assert loss == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_a_frame_of_weight_zero_is_not_read():
    student, teacher, _, lengths, mask = hidden()
    weights = torch.ones(mask.shape, dtype=torch.float64)
    weights[0, 2] = 0
    got = weighted_representation(student, teacher, lengths, weights=weights)
    student[0, 2] = math.inf
    assert weighted_representation(student, teacher, lengths, weights=weights) == got
    assert got.item() == pytest.approx((student - teacher)[mask & (weights > 0)].square().mean().item(), rel=1e-12)


@pytest.mark.parametrize("weight", [1e-45, 1e38])
def test_tiny_and_huge_weights(weight):
    student, teacher, _, lengths, mask = hidden(dtype=torch.float32)
    got = weighted_representation(student, teacher, lengths, weights=torch.full(mask.shape, weight))
    torch.testing.assert_close(got, (student - teacher)[mask].square().mean())


def test_no_gradient_to_the_weights():
    student, teacher, _, lengths, mask = hidden()
    weights = torch.rand(mask.shape).requires_grad_()
    weighted_representation(student.requires_grad_(), teacher, lengths, weights=weights).backward()
    assert weights.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("blank_id", [0, 3])
def test_weight_functions_equal_reference(blank_id):
    student, teacher, logits, _, _ = hidden()
    torch.testing.assert_close(
        nonblank_mass(logits, blank_id=blank_id), reference.nonblank_mass(logits, blank_id), rtol=1e-10, atol=1e-14
    )
    torch.testing.assert_close(activation_energy(teacher), reference.activation_energy(teacher))
    for weights in (nonblank_mass(logits.requires_grad_()), activation_energy(teacher.requires_grad_())):
        assert not weights.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nonblank_mass_does_not_round_to_zero(dtype):
    """p(blank) = 1 − 3e-13 rounds to 1 in float32, but the non-blank mass must not become 0."""
    logits = torch.tensor([[[30.0, 0.0, 0.0, 0.0], [-math.inf, 0.0, 0.0, 0.0], [0.0, *[-math.inf] * 3]]], dtype=dtype)
    got = nonblank_mass(logits)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor([[3 * math.exp(-30), 1.0, 0.0]]), rtol=1e-5, atol=0)


def test_energy_of_half_precision_does_not_overflow():
    assert activation_energy(torch.full((1, 1, 4), 1000.0, dtype=torch.float16)).item() == 1e6
