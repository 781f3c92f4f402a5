"""What the losses share: precision, the frames that count, empty means, blank mass without cancellation."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from espnet_kd import frames as fr


def full_precision(x: Tensor) -> Tensor:
    """float32 for half types; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def counted_frames(teacher: Tensor, lengths: Tensor, frames: Optional[Tensor]) -> Tensor:
    """(B, T) bool: ``frames`` where given, else the frames inside ``lengths``."""
    return fr.valid(lengths, teacher.size(1)) if frames is None else frames


def mean(values: Tensor, student: Tensor) -> Tensor:
    """Mean of ``values``, or a zero with a gradient path to ``student`` when there are none."""
    # An empty slice rather than 0 * student: that would be NaN where the student holds an infinity.
    return values.mean() if values.numel() else student[..., :0].sum()


class BlankSplit(NamedTuple):
    """A posterior split in two: blank or not, and which token given it is one."""

    log_blank: Tensor  #: (N,) log b
    log_nonblank: Tensor  #: (N,) log(1 − b), from the non-blank logits: exact where b rounds to 1
    token_logits: Tensor  #: (N, V−1) scaled non-blank logits
    token_norm: Tensor  #: (N,) their logsumexp


def split_blank(logits: Tensor, blank_id: int, temperature: float) -> BlankSplit:
    """Split (N, V) logits, or log-probabilities, at ``temperature``."""
    scaled = full_precision(logits) / temperature if temperature != 1 else full_precision(logits)
    blank = scaled[:, blank_id]
    if blank_id == 0:
        tokens = scaled[:, 1:]  # a view: no copy of the vocabulary
    else:
        tokens = torch.cat([scaled[:, :blank_id], scaled[:, blank_id + 1 :]], dim=1)
    norm = torch.logsumexp(tokens, -1)
    empty = norm == -torch.inf
    if empty.any():  # certain of blank to the last bit: the gradient of logsumexp would be exp(−∞ − −∞) = NaN there
        norm = torch.logsumexp(tokens.masked_fill(empty[:, None], 0.0), -1).masked_fill(empty, -torch.inf)
    total = torch.logaddexp(blank, norm)
    return BlankSplit(blank - total, norm - total, tokens, norm)


def cross(log_p: Tensor, log_p_inner: Tensor, log_q: Tensor) -> Tensor:
    """p · (log_p_inner − log_q), 0 where p is 0: there a certain student's −∞ is not an error."""
    p = log_p.exp()
    zero = p == 0
    # Both masks are needed: of the value, and of the gradient's 0 · ∞.
    return torch.where(zero, 0.0, p * (log_p_inner.masked_fill(zero, 0.0) - log_q.masked_fill(zero, 0.0)))


def pick(student: Tensor, teacher: Tensor, frames: Tensor) -> Tuple[Tensor, Tensor]:
    """(N, V) student and teacher rows of the frames that count; padding is left behind before any arithmetic."""
    return student[frames], teacher.detach()[frames]
