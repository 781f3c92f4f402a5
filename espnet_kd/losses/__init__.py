"""Distillation losses: pure functions of tensors.

Losses on posteriors are called ``f(student_logits, teacher_logits, lengths, *, blank_id, temperature, frames, …) →
scalar`` with logits or log-probabilities (B, T, V); losses on hidden states take (B, T, D) instead and no
temperature. ``lengths`` is (B,); ``frames`` (B, T) bool narrows the valid frames: padding never counts. All losses sum
over V (mean over D), average over the frames that count, send no gradient to the teacher (``consistency`` has two
students and no teacher), compute in float32 or better, and give 0 with a gradient path when no frame counts. No loss
multiplies by τ².

``nonblank_mass`` and ``activation_energy`` are frame weights (B, T) for ``weighted_representation``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from espnet_kd.backend import offer_kernels
from espnet_kd.losses.divergence import consistency, delayed_kl, kl, softmax_l2
from espnet_kd.losses.factorized import blank_kl, factorized_kl
from espnet_kd.losses.guided import guided_ctc
from espnet_kd.losses.representation import (
    activation_energy,
    factorized_representation,
    nonblank_mass,
    weighted_representation,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "activation_energy",
    "blank_kl",
    "consistency",
    "delayed_kl",
    "factorized_kl",
    "factorized_representation",
    "guided_ctc",
    "kl",
    "nonblank_mass",
    "softmax_l2",
    "weighted_representation",
]


def _try_kernels(device: torch.device) -> None:
    from espnet_kd.losses import fused  # imports Triton, which not every machine has

    fused.try_out(device)


offer_kernels(_try_kernels)
