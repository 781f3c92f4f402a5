"""Factorized KL alone: its identity with KL, its weights, and the probabilities that it uses on blank frames."""

import math

import pytest
import reference
import torch

from espnet_kd.losses import factorized_kl, kl
from espnet_kd.losses.rows import _Dense


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, 2.0, 0.7)])
def test_weights_of_factorized_kl(weights):
    student, teacher, lengths, mask = reference.batch()
    got = factorized_kl(
        student, teacher, lengths, blank_weight=weights[0], nonblank_weight=weights[1],
        nonblank_on_blank_weight=weights[2],
    )  # fmt: skip
    assert got.item() == pytest.approx(reference.factorized_kl(student, teacher, mask, weights=weights), rel=1e-12)


def test_identity_over_a_batch():
    """If each weight is the share of its frames, the weighted means add up to plain KL."""
    student, teacher, lengths, mask = reference.batch()
    share = (teacher.argmax(-1) != 0)[mask].double().mean().item()
    assert 0.2 < share < 0.8
    got = factorized_kl(student, teacher, lengths, nonblank_weight=share, nonblank_on_blank_weight=1 - share)
    torch.testing.assert_close(got, kl(student, teacher, lengths), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_identity_frame_by_frame(temperature):
    """KL = BKL + (1−b)·NKL with all weights 1. One frame at a time, because then a mean is a sum."""
    student, teacher, lengths, mask = reference.batch((20, 20), scale=4.0)
    one = torch.tensor([1])
    kinds = set()
    for s, t in zip(student[mask], teacher[mask]):
        s, t = s[None, None], t[None, None]
        whole = kl(s, t, one, temperature=temperature).item()
        parts = factorized_kl(s, t, one, temperature=temperature, **reference.ALL_WEIGHTS).item()
        p, q = (reference.softmax(x[0, 0].tolist(), temperature) for x in (t, s))
        assert whole == pytest.approx(parts, abs=1e-9)
        assert whole == pytest.approx(reference.binary(p, q, 0) + (1 - p[0]) * reference.tokens(p, q, 0), abs=1e-9)
        kinds.add(t.argmax().item() == 0)
    assert kinds == {True, False}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_factorized_kl_ignores_which_token_on_blank_frames(temperature):
    student, teacher, lengths, mask = reference.batch()
    blank = teacher.argmax(-1) == 0
    permuted = teacher.clone()
    permuted[blank] = teacher[blank][:, [0, 3, 1, 5, 2, 4]]
    before = factorized_kl(student, teacher, lengths, temperature=temperature)
    after = factorized_kl(student, permuted, lengths, temperature=temperature)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=0)
    # The permutation does change plain KL, and factorized KL with its third weight.
    assert (kl(student, teacher, lengths) - kl(student, permuted, lengths)).abs() > 1e-3
    seen = [factorized_kl(student, x, lengths, nonblank_on_blank_weight=1.0) for x in (teacher, permuted)]
    assert (seen[0] - seen[1]).abs() > 1e-3


def test_factorized_kl_reads_blank_mass_only_on_blank_frames_at_temperature_1():
    student, teacher, lengths, _ = reference.batch()
    p = teacher.softmax(-1)
    blank = teacher.argmax(-1) == 0
    # Move the other tokens halfway to uniform: blank keeps its mass and stays the most likely token.
    flat = p.clone()
    flat[..., 1:] = 0.5 * p[..., 1:] + 0.5 * (1 - p[..., :1]) / 5
    moved = torch.where(blank[..., None], flat, p).log()
    assert torch.equal(moved.argmax(-1) == 0, blank)
    one = [factorized_kl(student, x, lengths) for x in (teacher, moved)]
    torch.testing.assert_close(one[0], one[1], rtol=1e-12, atol=0)
    two = [factorized_kl(student, x, lengths, temperature=2.0) for x in (teacher, moved)]
    assert (two[0] - two[1]).abs() > 1e-4  # at τ ≠ 1 this changes the blank mass too


def test_nonblank_rule_is_at_temperature_1():
    """The temperature does not change which frames are non-blank: they are chosen at temperature 1."""
    student, teacher, lengths, mask = reference.batch()
    got = factorized_kl(student, teacher, lengths, temperature=50.0, **reference.ALL_WEIGHTS)
    expected = reference.factorized_kl(student, teacher, mask, temperature=50.0, weights=(1, 1, 1))
    assert got.item() == pytest.approx(expected, rel=1e-9)


def test_a_part_of_weight_0_does_not_count_even_if_it_is_infinite():
    """The student's p(blank) is 0, where the teacher's is not."""
    student, teacher, lengths, mask = reference.batch()
    expected = reference.factorized_kl(student, teacher, mask, weights=(0, 1, 0))  # does not depend on p(blank)
    student[..., 0] = -torch.inf
    assert factorized_kl(student, teacher, lengths, blank_weight=0.0).item() == pytest.approx(expected, rel=1e-12)
    assert factorized_kl(student, teacher, lengths).item() == math.inf


def test_ordinary_frames_are_computed_once(chosen):
    """Only frames whose sum is not finite are computed again; the blank's column must not make it so."""
    student, teacher, _, _ = reference.batch()
    log_q, rows = student.flatten(0, 1).clone(), torch.arange(student.size(0) * student.size(1))
    dense = _Dense(teacher, len(rows), 0, 1.0)
    dense.tokens(rows, dense.split(rows), log_q)
    assert log_q.isfinite().all()  # the terms of the sums
