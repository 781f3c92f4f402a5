"""Frame-level divergences on the whole softmax: Kullback–Leibler."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from espnet_kd.losses.common import counted_frames, cross, full_precision, mean, pick


def kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    temperature: float = 1.0,
    frames: Optional[Tensor] = None,
) -> Tensor:
    """KL(p‖q), summed over V and averaged over the frames that count.

    Args:
        student_logits: (B, T, V), or log-probabilities.
        teacher_logits: (B, T, V); no gradient flows to it.
        lengths: (B,) frames.
        blank_id: unused; every loss takes it.
        temperature: τ > 0 for both; not followed by a factor τ².
        frames: (B, T) bool in place of the valid frames.

    Returns:
        scalar, in nats per frame; 0 with a gradient path when no frame counts.

    Source: the softmax-level baseline of every paper here.
    """
    del blank_id
    student, teacher = pick(student_logits, teacher_logits, counted_frames(teacher_logits, lengths, frames))
    log_q = (full_precision(student) / temperature).log_softmax(-1)
    log_p = (full_precision(teacher) / temperature).log_softmax(-1)
    return mean(cross(log_p, log_p, log_q).sum(-1), student_logits)
