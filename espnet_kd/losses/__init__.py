"""Distillation losses: pure functions of tensors.

All are called ``f(student_logits, teacher_logits, lengths, *, blank_id, temperature, frames, …) → scalar`` with logits
or log-probabilities (B, T, V), lengths (B,) and, in place of the valid frames, ``frames`` (B, T) bool. They sum over
V, average over the frames that count, send no gradient to the teacher, compute in float32 or better, and give 0 with a
gradient path when no frame counts. None multiplies by τ².
"""

from espnet_kd.losses.divergence import kl
from espnet_kd.losses.factorized import blank_kl, factorized_kl, factorized_representation

__all__ = ["blank_kl", "factorized_kl", "factorized_representation", "kl"]
