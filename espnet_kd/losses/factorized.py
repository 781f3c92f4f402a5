"""Factorized KL: blank or not, and which token given it is one.

With b = p(blank) and p̃(k) = p(k)/(1−b):  KL(p‖q) = BKL + (1−b^T)·NKL  exactly.
Source: Tian et al., Speech Communication 160 (2024) 103071; what is reconstruction is said below.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.losses.common import BlankSplit, counted_frames, cross, mean, pick, split_blank


def blank_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    temperature: float = 1.0,
    frames: Optional[Tensor] = None,
) -> Tensor:
    """BKL: KL between the binary posteriors (blank, not blank), averaged over the frames that count.

    Arguments and result as in :func:`espnet_kd.losses.kl`. Stage 1 of the progressive method (the paper; its exact
    form is a reconstruction).
    """
    student, teacher = pick(student_logits, teacher_logits, counted_frames(teacher_logits, lengths, frames))
    return mean(
        _binary(split_blank(teacher, blank_id, temperature), split_blank(student, blank_id, temperature)),
        student_logits,
    )


def factorized_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    temperature: float = 1.0,
    frames: Optional[Tensor] = None,
    blank_weight: float = 1.0,
    nonblank_weight: float = 1.0,
    nonblank_on_blank_weight: float = 0.0,
) -> Tensor:
    """w_B · mean(BKL) + w_N · mean_NB((1−b^T)·NKL) + w_F · mean_BL((1−b^T)·NKL).

    BKL is averaged over all frames that count, the others over the non-blank (NB) and the blank (BL) ones among them,
    by the teacher's argmax at τ = 1; an empty half counts 0. With w_F = 0 only the blank mass is matched on blank
    frames, and the vocabulary is read on NB frames only.

    Args:
        blank_weight, nonblank_weight, nonblank_on_blank_weight: w_B, w_N, w_F.
        others: as in :func:`espnet_kd.losses.kl`.

    Source: the factorization is the paper's; the default weights (1, 1, 0) and τ = 1 come from a public port.
    """
    counted = counted_frames(teacher_logits, lengths, frames)
    student, teacher = pick(student_logits, teacher_logits, counted)
    p, q = split_blank(teacher, blank_id, temperature), split_blank(student, blank_id, temperature)
    loss = blank_weight * mean(_binary(p, q), student_logits)
    is_nonblank = fr.nonblank(teacher, counted.new_ones(len(teacher)), blank_id)
    for weight, half in ((nonblank_weight, is_nonblank), (nonblank_on_blank_weight, ~is_nonblank)):
        if weight:
            loss = loss + weight * mean(_tokens(p, q, half), student_logits)
    return loss


def _binary(p: BlankSplit, q: BlankSplit) -> Tensor:
    """(N,) BKL."""
    return cross(p.log_blank, p.log_blank, q.log_blank) + cross(p.log_nonblank, p.log_nonblank, q.log_nonblank)


def _tokens(p: BlankSplit, q: BlankSplit, half: Tensor) -> Tensor:
    """(M,) (1−b^T)·NKL of the frames in ``half`` (N,)."""
    log_p, log_q = (
        # Where no token has any mass the norm is −∞, and −∞ − −∞ would be NaN instead of "no mass".
        x.token_logits[half] - x.token_norm[half].masked_fill(x.token_norm[half] == -torch.inf, 0.0)[:, None]
        for x in (p, q)
    )
    return p.log_nonblank[half].exp() * cross(log_p, log_p, log_q).sum(-1)
