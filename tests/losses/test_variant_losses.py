"""Properties of delayed_kl, consistency, guided_ctc and softmax_l2 beyond the tests that all losses share."""

import math

import pytest
import reference
import torch

from espnet_kd.losses import consistency, delayed_kl, guided_ctc, kl, softmax_l2


def gradient(loss, student, *args, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, *args, **options)
    value.backward()
    return value.detach(), student.grad


# delayed_kl


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("framed", [False, True])
def test_without_delay_it_is_kl_exactly(dtype, framed):
    student, teacher, lengths, mask = reference.batch((11, 4, 1, 7), dtype=dtype)
    frames = mask & (torch.arange(11) % 3 != 1) if framed else None
    expected, expected_grad = gradient(kl, student, teacher, lengths, temperature=2.0, frames=frames)
    got, grad = gradient(delayed_kl, student, teacher, lengths, temperature=2.0, frames=frames, max_delay=0)
    assert torch.equal(got, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("max_delay", [1, 2, 3, 20])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_largest_delay(max_delay, temperature):
    student, teacher, lengths, mask = reference.batch((9, 6, 3, 2, 1))
    expected = reference.delayed_kl(student, teacher, mask, temperature=temperature, max_delay=max_delay)
    got = delayed_kl(student, teacher, lengths, temperature=temperature, max_delay=max_delay)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    # With random posteriors a delay lowers the loss of some utterances, so that the choice of the delay matters.
    assert got < kl(student, teacher, lengths, temperature=temperature)


def spoken_later(delays, lengths):
    """A student whose frame t + d equals the teacher's frame t. Its first d frames are random."""
    student, teacher, lengths, mask = reference.batch(lengths)
    for b, d in enumerate(delays):
        student[b, d:] = teacher[b, : teacher.size(1) - d]
    return student, teacher, lengths, mask


def test_each_utterance_has_its_own_delay():
    student, teacher, lengths, _ = spoken_later((0, 1, 2), (8, 6, 4))
    assert delayed_kl(student, teacher, lengths, max_delay=2).item() == pytest.approx(0, abs=1e-12)
    too_late = delayed_kl(student, teacher, lengths, max_delay=1)
    assert too_late > 0.1
    alone = delayed_kl(student[2:, :4], teacher[2:, :4], lengths[2:], max_delay=1)
    # The weight of an utterance is its number of frames, not the number that remains after the delay.
    assert too_late.item() == pytest.approx(alone.item() * 4 / (8 + 6 + 4), rel=1e-9)


def test_gradient_flows_through_the_chosen_delay_alone():
    student, teacher, lengths, mask = spoken_later((2, 0), (7, 5))
    student = student + 0.01 * torch.randn(student.shape, generator=torch.Generator().manual_seed(1)).double()
    chosen = [min(m, key=m.get) for m in reference.delays(student, teacher, mask, lengths)]
    assert chosen == [2, 0]
    _, grad = gradient(delayed_kl, student, teacher, lengths, max_delay=2)
    expected = torch.zeros_like(grad)
    for b, d in enumerate(chosen):
        length = lengths[b].item()
        for t in range(length - d):
            difference = student[b, t + d].softmax(-1) - teacher[b, t].softmax(-1)
            expected[b, t + d] = difference / (length - d) * length / lengths.sum()
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-15)
    assert (grad[0, :2] == 0).all()  # with delay 2 these have no teacher frame


def test_a_delay_as_long_as_the_utterance_is_not_used():
    """The utterance has one frame. The student's next frame would fit better, but it is padding and is not read."""
    student, teacher, lengths, _ = spoken_later((1, 0), (2, 3))
    lengths = torch.tensor([1, 3])
    expected = (kl(student[:1], teacher[:1], torch.tensor([1])) * 1 + 0) / 4
    torch.testing.assert_close(delayed_kl(student, teacher, lengths, max_delay=2), expected, rtol=1e-12, atol=1e-15)


def test_frames_choose_the_teachers_frames():
    student, teacher, lengths, mask = spoken_later((2,), (8,))
    frames = torch.zeros_like(mask)
    frames[0, [1, 5, 7]] = True  # frame 7 + 2 is past the end
    assert delayed_kl(student, teacher, lengths, frames=frames).item() == pytest.approx(0, abs=1e-12)
    last = torch.zeros_like(mask)
    last[0, 7] = True  # with any delay but 0 no frame remains
    torch.testing.assert_close(
        delayed_kl(student, teacher, lengths, frames=last), kl(student, teacher, lengths, frames=last)
    )


def test_an_utterance_without_frames_beside_one_that_has_some():
    student, teacher, lengths, mask = reference.batch((5, 4))
    frames = mask.clone()
    frames[1] = False
    got, grad = gradient(delayed_kl, student, teacher, lengths, frames=frames)
    assert got == delayed_kl(student[:1], teacher[:1], lengths[:1])
    assert grad.isfinite().all() and (grad[1] == 0).all()


def test_a_student_who_excludes_the_teachers_token_at_every_delay_is_infinitely_wrong():
    student, teacher, lengths, _ = reference.batch((4,))
    student[..., 2] = -math.inf
    assert delayed_kl(student, teacher, lengths) == math.inf


@pytest.mark.parametrize("max_delay", [-1, 1.5, "2"])
def test_bad_delay_is_refused(max_delay):
    student, teacher, lengths, _ = reference.batch()
    with pytest.raises(ValueError, match="max_delay must be a whole number of frames"):
        delayed_kl(student, teacher, lengths, max_delay=max_delay)


# consistency


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_views_learn_each_from_the_other_as_it_stands(temperature):
    first, second, lengths, mask = reference.batch()
    first.requires_grad_()
    second.requires_grad_()
    consistency(first, second, lengths, temperature=temperature).backward()
    difference = ((first / temperature).softmax(-1) - (second / temperature).softmax(-1)).detach()
    expected = difference.masked_fill(~mask[..., None], 0.0) / (2 * temperature * mask.sum())
    torch.testing.assert_close(first.grad, expected, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(second.grad, -expected, rtol=1e-10, atol=1e-15)


def test_consistency_is_symmetric():
    first, second, lengths, _ = reference.batch()
    assert consistency(first, second, lengths) == consistency(second, first, lengths)


def test_padding_of_the_second_view_gets_no_gradient():
    first, second, lengths, mask = reference.batch()
    second = second.masked_fill(~mask[..., None], math.nan)
    got, grad = gradient(lambda x: consistency(first, x, lengths), second)
    assert got == consistency(first, second.nan_to_num(0.0), lengths)
    assert grad.isfinite().all() and (grad[~mask] == 0).all() and grad[mask].abs().sum() > 0


# guided_ctc, softmax_l2


@pytest.mark.parametrize("log", [False, True])
def test_guided_ctc_leaves_blank_frames_alone(log):
    student, teacher, lengths, mask = reference.batch()
    blank = teacher.argmax(-1) == 0
    _, grad = gradient(guided_ctc, student, teacher, lengths, log=log)
    assert (grad[blank | ~mask] == 0).all()
    assert (grad[~blank & mask].abs().sum(-1) > 0).all()
    # Blank frames do not count in the denominator of the mean either.
    got = guided_ctc(student, teacher, lengths, log=log)
    torch.testing.assert_close(guided_ctc(student, teacher, lengths, log=log, frames=mask & ~blank), got)


def test_guided_ctc_takes_the_guides_spikes_at_temperature_1():
    student, teacher, lengths, _ = reference.batch()
    flat = teacher * 1e-3  # the same argmax, the only thing that is used of the teacher
    for log in (False, True):
        a, b = (guided_ctc(student, x, lengths, temperature=5.0, log=log) for x in (teacher, flat))
        assert a == b


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_every_element_of_the_guided_gradient_is_exact_in_float32(log, scale):
    """Each element has a relative error below 1e-5.

    If q(k*) is near 1, q(k*) · (1 − q(k*)) computed as q − q² would be wrong in the fourth digit.
    """
    _, teacher, lengths, _ = reference.batch((100, 60), width=30, scale=scale)
    noise = torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = (teacher + 0.3 * scale * noise).float()
    _, expected = gradient(guided_ctc, student.double(), teacher, lengths, log=log)
    _, got = gradient(guided_ctc, student, teacher, lengths, log=log)
    seen = expected.abs() > 1e-15
    assert seen.any() and ((got - expected).abs() / expected.abs())[seen].max() < 1e-5


def test_guided_ctc_is_minus_one_at_best():
    _, teacher, lengths, _ = reference.batch()
    assert guided_ctc(teacher * 1e3, teacher, lengths).item() == pytest.approx(-1, abs=1e-9)
    assert guided_ctc(-teacher * 1e3, teacher, lengths).item() == pytest.approx(0, abs=1e-9)


def test_softmax_l2_is_bounded_by_2():
    student, teacher = (torch.full((1, 1, 4), -1e4).index_fill(2, torch.tensor([k]), 1e4) for k in (0, 1))
    assert softmax_l2(student, teacher, torch.tensor([1])) == 2
