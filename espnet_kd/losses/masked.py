"""Factorized KL in plain torch with all shapes known beforehand, so that the host never waits for the device.

All frames are computed; frames that don't count, or whose tokens aren't read, are left out of the sums.
"""

from __future__ import annotations

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_kd.losses.common import BlankSplit, Counted, binary, cross, finite, full_precision, pick
from espnet_kd.topk import Posterior, TopK, log_sum


def weighted_parts(
    student_logits: Tensor,
    teacher_logits: Posterior,
    counted: Counted,
    blank_id: int,
    temperature: float,
    weights: Tuple[float, float, float],
) -> Tensor:
    """w_B · mean(BKL) + w_N · mean_NB((1−b^T)·NKL) + w_F · mean_BL((1−b^T)·NKL), with autograd's gradient."""
    student, teacher = pick(student_logits, teacher_logits, counted)
    scaled = full_precision(student) / temperature
    q, log_q = _split(scaled, blank_id)
    if isinstance(teacher, TopK):
        log_blank, log_nonblank = teacher.log_blank_at(temperature), teacher.log_nonblank_at(temperature)
        p = BlankSplit(log_blank, log_nonblank, log_nonblank, teacher.argmax() != 0)
    else:
        teacher = full_precision(teacher)
        is_nonblank = teacher.argmax(-1) != blank_id
        p, log_p = _split(teacher / temperature, blank_id)
        p = p._replace(is_nonblank=is_nonblank)
    loss = weights[0] * counted.mean(binary(p, q), student_logits) if weights[0] else student_logits[..., :0].sum()
    for weight, half in zip(weights[1:], (p.is_nonblank, ~p.is_nonblank)):
        if weight:
            if isinstance(teacher, TopK):
                each = _bucket_tokens(teacher, p, log_q, half, temperature)
            else:
                each = _tokens(log_p, p, log_q, half)
            loss = loss + weight * counted.mean(each, student_logits, where=half)
    return loss


def _split(scaled: Tensor, blank_id: int) -> Tuple[BlankSplit, Tensor]:
    """Split scaled logits (N, V); and log q̃ (N, V), −∞ in the blank's column. ``is_nonblank`` is empty."""
    blank = scaled[:, blank_id]
    column = torch.arange(scaled.size(1), device=scaled.device) == blank_id
    tokens = scaled.masked_fill(column, -torch.inf)
    norm = log_sum(tokens)
    log_inner = tokens - finite(norm)[:, None]
    return BlankSplit(F.logsigmoid(blank - norm), F.logsigmoid(norm - blank), norm, column[:0]), log_inner


def _tokens(log_p: Tensor, p: BlankSplit, log_q: Tensor, read: Tensor) -> Tensor:
    """(N,) (1−b^T)·NKL of log p̃ and log q̃ (N, V); 0 on frames outside ``read``."""
    # The mass is set to 0 (−∞) instead of a product with 0, so that neither value nor gradient can be NaN.
    whole = (log_p + p.log_nonblank[:, None]).masked_fill(~read[:, None], -torch.inf)
    return cross(whole, log_p, log_q).sum(-1)


def _bucket_tokens(teacher: TopK, p: BlankSplit, log_q: Tensor, read: Tensor, temperature: float) -> Tensor:
    """Like :func:`_tokens`, over the kept tokens and the remainder."""
    parts = [teacher.log_tokens_at(temperature), teacher.remainder_at(temperature).log()[:, None]]
    log_p = torch.cat(parts, 1).masked_fill(~read[:, None], -torch.inf)
    others = log_sum(log_q.scatter(1, teacher.tokens, -torch.inf))
    log_q = torch.cat([log_q.gather(1, teacher.tokens), others[:, None]], 1)
    return cross(log_p, log_p - finite(p.log_nonblank)[:, None], log_q).sum(-1)
