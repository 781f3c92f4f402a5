"""What the losses share: precision, the frames that count, empty means, blank mass without cancellation."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.topk import Posterior


def full_precision(x: Tensor) -> Tensor:
    """float32 for half types; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def counted_frames(teacher: Posterior, lengths: Tensor, frames: Optional[Tensor]) -> Tensor:
    """(B, T) bool: ``frames`` where given, else the frames inside ``lengths``."""
    return fr.valid(lengths, teacher.size(1)) if frames is None else frames


def mean(values: Tensor, student: Tensor) -> Tensor:
    """Mean of ``values``, or a zero with a gradient path to ``student`` when there are none."""
    # An empty slice rather than 0 * student: that would be NaN where the student holds an infinity.
    return values.mean() if values.numel() else student[..., :0].sum()


class BlankSplit(NamedTuple):
    """How a posterior is split: blank or not."""

    log_blank: Tensor  #: (N,) log b
    log_nonblank: Tensor  #: (N,) log(1 − b), from the non-blank logits: exact where b rounds to 1
    token_norm: Tensor  #: (N,) logsumexp of the scaled non-blank logits
    is_nonblank: Tensor  #: (N,) bool: the likeliest of all is not blank

    def select(self, rows: Tensor) -> BlankSplit:
        """Of some of the frames."""
        return BlankSplit(*(x[rows] for x in self))


def split_blank(rows: Tensor, blank_id: int, temperature: float) -> BlankSplit:
    """Split (N, V) logits, or log-probabilities, at ``temperature``. ``rows`` are overwritten.

    In place because on a CPU a new tensor of a megabyte costs more than the exponentials in it.
    """
    blank = rows[:, blank_id].clone()
    # As argmax has it: of equals the first.
    is_nonblank = torch.zeros_like(blank, dtype=torch.bool)
    if blank_id + 1 < rows.size(1):
        is_nonblank |= rows[:, blank_id + 1 :].amax(-1) > blank
    if blank_id:
        is_nonblank |= rows[:, :blank_id].amax(-1) >= blank
    if temperature != 1:
        blank /= temperature
        rows /= temperature
    rows[:, blank_id] = -torch.inf
    top = rows.amax(-1)
    # Where no token has any mass the top is −∞, and −∞ − −∞ would be NaN instead of "no mass".
    norm = rows.sub_(finite(top)[:, None]).exp_().sum(-1).log_().add_(top)
    total = torch.logaddexp(blank, norm)
    return BlankSplit(blank - total, norm - total, norm, is_nonblank)


def finite(x: Tensor) -> Tensor:
    """0 for −∞: as something to subtract from −∞."""
    return x.masked_fill(x == -torch.inf, 0.0)


def cross(log_p: Tensor, log_p_inner: Tensor, log_q: Tensor) -> Tensor:
    """p · (log_p_inner − log_q), 0 where p is 0: there a certain student's −∞ is not an error."""
    p = log_p.exp()
    zero = p == 0
    # Both masks are needed: of the value, and of the gradient's 0 · ∞.
    return torch.where(zero, 0.0, p * (log_p_inner.masked_fill(zero, 0.0) - log_q.masked_fill(zero, 0.0)))


def pick(student: Tensor, teacher: Posterior, frames: Tensor) -> Tuple[Tensor, Posterior]:
    """(N, V) student and teacher rows of the frames that count; padding is left behind before any arithmetic."""
    return student[frames], teacher.detach()[frames]
