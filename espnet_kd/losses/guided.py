"""Guided CTC: spikes where the teacher has them."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from espnet_kd import frames as fr
from espnet_kd.losses.common import counted_frames, full_precision, mean
from espnet_kd.topk import Posterior


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
    """−mean_NB q(k*), k* the teacher's argmax at τ = 1: blank frames are left alone.

    Args:
        temperature: τ > 0 of the student's softmax q alone; NB and k* don't depend on it.
        frames: (B, T) bool in place of the valid frames; NB is taken among them.
        log: −mean_NB log q(k*) instead.
        others: as in :func:`espnet_kd.losses.kl`.

    Returns:
        scalar in [−1, 0], with ``log`` in nats ≥ 0; 0 with a gradient path when NB is empty.

    Source: Kurata & Audhkhasi, Interspeech 2019 (the paper, whose sum over an utterance is this mean × frames); the log
    is a common variant.
    """
    spikes = fr.nonblank(teacher_logits, counted_frames(teacher_logits, lengths, frames), blank_id)
    best = teacher_logits.argmax(-1)[spikes][:, None]
    scaled = full_precision(student_logits[spikes]) / temperature
    q = scaled.log_softmax(-1) if log else scaled.softmax(-1)
    return -mean(q.gather(-1, best), student_logits)
