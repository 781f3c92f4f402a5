"""Guided CTC: a loss that moves the student's spikes to the frames of the teacher's spikes."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.losses.common import Counted, check_vocabularies, full_precision
from espnet_kd.topk import Posterior, log_sum


def guided_ctc(
    student_logits: Tensor,
    teacher_logits: Posterior,
    lengths: Tensor,
    *,
    blank_id: int = 0,
    temperature: float = 1.0,
    frames: Optional[Tensor] = None,
    log: bool = False,
) -> Tensor:
    """−mean_NB q(k*), where k* is the teacher's argmax at τ = 1. Blank frames have no loss.

    Args:
        temperature: τ > 0 of the student's softmax q only; NB and k* don't depend on it.
        frames: (B, T) bool narrowing the valid frames; NB is taken among them.
        log: −mean_NB log q(k*) instead.
        others: as in :func:`espnet_kd.losses.kl`.

    Returns:
        scalar in [−1, 0], with ``log`` in nats ≥ 0; 0 with a gradient path when NB is empty.

    Source: Kurata & Audhkhasi, Interspeech 2019 (the paper, whose sum over an utterance is this mean × frames); the log
    is a common variant.
    """
    check_vocabularies(student_logits, teacher_logits)
    counted = Counted.of(student_logits, teacher_logits, lengths, frames)
    teacher_logits = teacher_logits.detach()
    spikes = Counted(fr.nonblank(teacher_logits, counted.mask, blank_id))
    best = spikes.take(fr.best(teacher_logits))[:, None]
    scaled = full_precision(spikes.take(student_logits)) / temperature
    # Computed from the mass of the other tokens: the gradient is q(k*) · (1 − q(k*)), and for q(k*) near 1 a softmax's
    # q − q² would lose nearly all digits in float32.
    others = log_sum(scaled.scatter(1, best, -torch.inf))
    log_q = F.logsigmoid(scaled.gather(1, best)[:, 0] - others)
    return -spikes.mean(log_q if log else log_q.exp(), student_logits)
