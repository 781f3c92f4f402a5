"""Which frames count, and how a teacher's frames are laid beside a student's. Torch only.

Conventions: ``lengths`` (B,) counts frames; masks are (B, T) bool, True where a frame counts; blank is token 0
unless said otherwise; frame shifts are in seconds.
"""

from __future__ import annotations

import math
from typing import Tuple

import torch
from torch import Tensor


def valid(lengths: Tensor, num_frames: int) -> Tensor:
    """Mask (B, T) of the frames inside each utterance."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def nonblank(teacher_logits: Tensor, frames: Tensor, blank_id: int = 0) -> Tensor:
    """NB: those of ``frames`` whose teacher argmax (at temperature 1) is not blank.

    Args:
        teacher_logits: (B, T, V), log-probabilities just as well.
        frames: (B, T) bool, usually ``valid(...)``.
    """
    return frames & (teacher_logits.argmax(-1) != blank_id)


def nearest_multiple(shift: float, other: float) -> float:
    """Ratio ``shift / other``, freed of rounding when it is within 1 % of a half or a whole number."""
    ratio = shift / other
    halves = round(ratio * 2) / 2
    return halves if halves and abs(ratio / halves - 1) < 0.01 else ratio


def align(
    logits: Tensor,
    hidden: dict[str, Tensor],
    lengths: Tensor,
    frame_shift: float,
    student_frames: int,
    student_lengths: Tensor,
    student_shift: float,
    *,
    blank_id: int = 0,
    pool: str = "least_blank",
) -> Tuple[Tensor, dict[str, Tensor], Tensor]:
    """Lay a teacher's outputs beside a student's frames.

    Student frame i covers the teacher frames [i·r, (i+1)·r), r = student_shift / frame_shift. Of the covered frames the
    posterior is that with the lowest p(blank) (``least_blank``: a mean would blur CTC's spikes) or their ``mean``;
    hidden states are averaged. For r < 1 both are those of the teacher frame in which the student frame's middle lies.

    Args:
        logits: (B, T', V) teacher logits or log-probabilities.
        hidden: tap name → (B, T', D).
        lengths: (B,) teacher frames.
        student_frames: T, the student's padded length.
        student_lengths: (B,) student frames.

    Returns:
        logits (B, T, V), hidden {name: (B, T, D)}, lengths (B,): the frames that both have.

    Raises:
        ValueError: lengths differ by more than two frames of the slower rate; the message names both.
    """
    ratio = nearest_multiple(student_shift, frame_shift)
    # In units of teacher frames, so that equal rates stay whole numbers.
    difference = (student_lengths * ratio - lengths).abs().max().item()
    if difference > 2 * max(ratio, 1.0) + 1e-6:
        raise ValueError(
            f"the lengths of teacher and student differ by more than two frames: teacher {lengths.tolist()} frames of "
            f"{frame_shift * 1000:g} ms, student {student_lengths.tolist()} frames of {student_shift * 1000:g} ms"
        )
    if ratio == 1:
        both = torch.minimum(student_lengths, lengths)
        return _fit(logits, student_frames), {k: _fit(h, student_frames) for k, h in hidden.items()}, both

    start = torch.arange(student_frames, device=logits.device)
    if ratio < 1:
        covered = ((start + 0.5) * ratio).long()[:, None]  # (T, 1)
        inside = torch.ones_like(covered, dtype=torch.bool)
    else:
        first = torch.ceil(start * ratio - 1e-9).long()
        last = torch.ceil((start + 1) * ratio - 1e-9).long()  # exclusive
        covered = first[:, None] + torch.arange(math.ceil(ratio), device=logits.device)  # (T, K)
        inside = covered < last[:, None]
    inside = inside & (covered < lengths[:, None, None])  # (B, T, K)
    # A student frame counts only where it covers a teacher frame: with r = 1.5 the last may begin after the last one.
    both = torch.minimum(student_lengths, inside.any(-1).sum(-1).to(student_lengths.dtype))
    covered = covered.clamp(max=logits.size(1) - 1)
    batch = torch.arange(logits.size(0), device=logits.device)[:, None]

    weights = inside / inside.sum(-1, keepdim=True).clamp(min=1)  # (B, T, K)
    hidden = {
        k: (h[:, covered].masked_fill(~inside[..., None], 0.0) * weights[..., None].to(h.dtype)).sum(2)
        for k, h in hidden.items()
    }
    if pool == "mean":
        log_probs = logits.log_softmax(-1)[:, covered]  # (B, T, K, V)
        log_weights = weights.to(log_probs.dtype).log()[..., None]
        return torch.logsumexp((log_probs + log_weights).masked_fill(~inside[..., None], -torch.inf), 2), hidden, both
    blank = logits[..., blank_id] - torch.logsumexp(logits, -1)  # (B, T')
    best = blank[:, covered].masked_fill(~inside, torch.inf).argmin(-1)  # (B, T)
    chosen = covered.expand(logits.size(0), -1, -1).gather(2, best[..., None])[..., 0]  # (B, T)
    return logits[batch, chosen], hidden, both


def _fit(x: Tensor, num_frames: int) -> Tensor:
    """Cut or zero-pad (B, T', …) to T frames; padding lies outside the common lengths and is never read."""
    if x.size(1) >= num_frames:
        return x[:, :num_frames]
    return torch.cat([x, x.new_zeros(x.size(0), num_frames - x.size(1), *x.shape[2:])], dim=1)
