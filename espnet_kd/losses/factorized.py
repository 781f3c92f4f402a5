"""Factorized KL: the divergence of blank against non-blank, and that of the tokens given non-blank.

With b = p(blank) and p̃(k) = p(k)/(1−b):  KL(p‖q) = BKL + (1−b^T)·NKL  exactly.
Source: Tian et al., Speech Communication 160 (2024) 103071; the functions below state what is a reconstruction.

The device of the tensors decides how it is computed (:mod:`espnet_kd.backend`).
"""

from __future__ import annotations

from typing import Optional, Tuple

from torch import Tensor

from espnet_kd.backend import backend_of
from espnet_kd.losses.common import Counted, check_vocabularies
from espnet_kd.losses.masked import weighted_parts
from espnet_kd.topk import Posterior, TopK


def blank_kl(
    student_logits: Tensor,
    teacher_logits: Posterior,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    temperature: float = 1.0,
    frames: Optional[Tensor] = None,
) -> Tensor:
    """BKL: KL between the binary posteriors (blank, not blank), averaged over the frames that count.

    Arguments and result as in :func:`espnet_kd.losses.kl`. KD stage 1 of the progressive method (the paper; its exact
    form is a reconstruction).
    """
    return _weighted(student_logits, teacher_logits, lengths, frames, blank_id, temperature, (1.0, 0.0, 0.0))


def factorized_kl(
    student_logits: Tensor,
    teacher_logits: Posterior,
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

    BKL is averaged over all frames that count, the other terms over the non-blank (NB) and blank (BL) frames among
    them, by the teacher's argmax at τ = 1; an empty half counts 0. With w_F = 0 only the blank mass is matched on blank
    frames, and the teacher's tokens are read on NB frames only.

    Args:
        blank_weight, nonblank_weight, nonblank_on_blank_weight: w_B, w_N, w_F.
        others: as in :func:`espnet_kd.losses.kl`.

    Source: the factorization is the paper's; the default weights (1, 1, 0) and τ = 1 come from a public port.
    """
    weights = (blank_weight, nonblank_weight, nonblank_on_blank_weight)
    return _weighted(student_logits, teacher_logits, lengths, frames, blank_id, temperature, weights)


def _weighted(
    student: Tensor,
    teacher: Posterior,
    lengths: Tensor,
    frames: Optional[Tensor],
    blank_id: int,
    temperature: float,
    weights: Tuple[float, float, float],
) -> Tensor:
    check_vocabularies(student, teacher)
    if isinstance(teacher, TopK) and blank_id != 0:
        raise ValueError("cached targets have blank as token 0")
    backend = backend_of(student, teacher.log_blank if isinstance(teacher, TopK) else teacher)
    if backend == "fused":
        from espnet_kd.losses import fused

        return fused.factorized_kl(student, teacher, lengths, frames, blank_id, temperature, weights)
    counted = Counted.of(student, teacher, lengths, frames)
    if backend == "rows":
        from espnet_kd.losses.rows import RowwiseFactorizedKL  # imported here: its definition needs torch

        return RowwiseFactorizedKL.apply(student, teacher.detach(), counted.mask, blank_id, temperature, weights)
    return weighted_parts(student, teacher.detach(), counted, blank_id, temperature, weights)
