"""Losses on hidden states, which a learned projection has brought to the same width.

``d`` is a distance per frame; see each function for its source.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.backend import without_gradient
from espnet_kd.losses.common import Counted, check_sizes, full_precision, pick, split_blank
from espnet_kd.topk import Posterior, TopK


def factorized_representation(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    teacher_logits: Posterior,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    distance: str = "cosine",
    frames: Optional[Tensor] = None,
) -> Tensor:
    """½ (mean_NB d + mean_BL d), so that the few non-blank frames count as much as the many blank frames.

    Args:
        student_hidden: (B, T, D), already projected to the teacher's width.
        teacher_hidden: (B, T, D); no gradient flows to it.
        teacher_logits: (B, T, V), whose argmax separates NB from BL.
        lengths: (B,) frames.
        distance: ``cosine`` (1 − cosine; public port) or ``l2`` (squared difference, mean over D; reconstruction).
        frames: (B, T) bool narrowing the valid frames.

    Returns:
        scalar; an empty half counts 0.

    Raises:
        ValueError: ``distance`` is unknown.

    Source: KD stage 2 of the progressive method (the paper); the distance is a choice.
    """
    check_sizes(student_hidden, teacher_hidden, lengths, frames)
    counted = Counted.of(student_hidden, teacher_logits, lengths, frames)
    student, teacher = pick(student_hidden, teacher_hidden, counted)
    student, teacher = full_precision(student), full_precision(teacher)
    if distance == "cosine":
        d = 1 - (_unit(student) * _unit(teacher)).sum(-1)
    elif distance == "l2":
        d = _squared(student, teacher)
    else:
        raise ValueError(f"distance must be cosine or l2, not {distance!r}")
    is_nonblank = counted.take(fr.nonblank(teacher_logits, counted.mask, blank_id))
    nonblank, blank = (counted.mean(d, student_hidden, where=half) for half in (is_nonblank, ~is_nonblank))
    return 0.5 * (nonblank + blank)


def weighted_representation(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lengths: Tensor,
    *,
    weights: Tensor,
    frames: Optional[Tensor] = None,
) -> Tensor:
    """Mean over frames of w_t · d_t, where w_t weights the frame and d_t is the squared difference (mean over D).

    Args:
        student_hidden: (B, T, D), already projected to the teacher's width.
        teacher_hidden: (B, T, D); no gradient flows to it.
        lengths: (B,) frames.
        weights: (B, T) ≥ 0, such as :func:`nonblank_mass` or :func:`activation_energy`; scaled here to mean 1 over the
            frames of the batch that count. No gradient flows to it.
        frames: (B, T) bool narrowing the valid frames.

    Returns:
        scalar; 0 with a gradient path where the weights add up to 0 or no frame counts.

    Source: step 1 of TutorNet, Yoon et al., TASLP 2021, arXiv 2008.00671 (the paper); that the weights have mean 1 and
    that d is a mean over D is reconstruction.
    """
    # Frames of weight 0 add nothing to either sum; they are left out, because 0 · ∞ would be NaN.
    counted = Counted.of(student_hidden, teacher_hidden, lengths, frames)
    counted = Counted(counted.mask & (weights.detach() != 0))
    student, teacher = pick(student_hidden, teacher_hidden, counted)
    d = _squared(full_precision(student), full_precision(teacher))
    w = counted.take(weights.detach()).double()  # in float32 the sum of large weights overflows, and tiny ones round
    return counted.mean((w / counted.mean(w, weights.detach())).to(d.dtype) * d, student_hidden)


@without_gradient
def nonblank_mass(teacher_logits: Posterior, *, blank_id: int = 0) -> Tensor:
    """1 − p(blank), exact also where p(blank) rounds to 1: the probability of any token.

    Args:
        teacher_logits: (B, T, V), or log-probabilities.
        blank_id: index of blank.

    Returns:
        (B, T) weights in [0, 1]; those in the padding have no meaning.

    Source: one reading of TutorNet's frame weight; reconstruction.
    """
    if isinstance(teacher_logits, TopK):
        return teacher_logits.log_nonblank_at(1.0).exp()
    rows = full_precision(teacher_logits.flatten(0, 1).detach().clone())
    flat = split_blank(rows, blank_id, 1.0).log_nonblank.exp()
    return flat.unflatten(0, teacher_logits.shape[:2])


@without_gradient
def activation_energy(teacher_hidden: Tensor) -> Tensor:
    """Mean square over D of (B, T, D): (B, T) weights ≥ 0.

    Source: another reading of TutorNet's frame weight; reconstruction.
    """
    return full_precision(teacher_hidden).square().mean(-1)


def _squared(student: Tensor, teacher: Tensor) -> Tensor:
    """(N,) squared difference, mean over D."""
    return (student - teacher).square().mean(-1)


def _unit(x: Tensor) -> Tensor:
    """(N, D) on the unit sphere; a zero vector stays zero (distance 1), with a gradient of length 1 rather than 1/ε."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / norm.masked_fill(norm < 1e-8, 1.0)
