"""Time and memory that factorized KL adds to CTC, in this package and in a straightforward implementation.

On a GPU the backend for devices without Triton (``masked``) is measured too, if it is not the default.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any, Dict, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_kd.backend import backend_of, using
from espnet_kd.bench.timing import interleaved, median, peak_memory_of
from espnet_kd.losses import factorized_kl

#: utterances, frames, tokens, labels an utterance
SHAPE = (16, 400, 5000, 60)


def plain_factorized_kl(student_logits: Tensor, teacher_logits: Tensor, lengths: Tensor) -> Tensor:
    """:func:`espnet_kd.losses.factorized_kl` with its default weights, written in the most obvious way.

    It computes two full log-softmaxes and the renormalised KL of every frame; a mask selects the non-blank frames.
    """
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    valid = torch.arange(log_q.size(1), device=log_q.device) < lengths[:, None]
    rest_q, rest_p = log_q[..., 1:].logsumexp(-1), log_p[..., 1:].logsumexp(-1)
    blank = log_p[..., 0].exp() * (log_p[..., 0] - log_q[..., 0]) + rest_p.exp() * (rest_p - rest_q)
    tokens_p, tokens_q = log_p[..., 1:] - rest_p[..., None], log_q[..., 1:] - rest_q[..., None]
    tokens = rest_p.exp() * (tokens_p.exp() * (tokens_p - tokens_q)).sum(-1)
    nonblank = valid & (log_p.argmax(-1) != 0)
    return blank[valid].mean() + tokens[nonblank].mean()


class LossStep:
    """Forward and backward of CTC, alone or with a factorized KL, from the student's logits on.

    Args:
        kind: ``ctc``, ``ours``, ``masked``, ``plain``.
        nonblank: share of the frames on which the teacher outputs a token.
    """

    def __init__(self, kind: str, nonblank: float, shape: Any = SHAPE):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        utts, frames, width, labels = shape
        torch.manual_seed(0)
        self.kind = kind
        self.logits = torch.randn(utts, frames, width, device=device, requires_grad=True)
        self.teacher = torch.randn(utts, frames, width, device=device)
        spoken = torch.rand(utts, frames, device=device) < nonblank
        self.teacher[..., 0] = torch.where(spoken, -4.0, 16.0)
        self.lengths = torch.full((utts,), frames, device=device)
        self.labels = torch.randint(1, width, (utts, labels), device=device)
        self.label_lengths = torch.full((utts,), labels, device=device)

    def __call__(self) -> float:
        """Run one step, and return the loss."""
        self.logits.grad = None
        log_probs = self.logits.log_softmax(-1)
        loss = F.ctc_loss(log_probs.transpose(0, 1), self.labels, self.lengths, self.label_lengths)
        if self.kind in ("ours", "masked"):
            with using("masked") if self.kind == "masked" else contextlib.nullcontext():
                loss = loss + factorized_kl(log_probs, self.teacher, self.lengths)
        elif self.kind == "plain":
            loss = loss + plain_factorized_kl(self.logits, self.teacher, self.lengths)
        loss.backward()
        return loss.item()


def bandwidth_share(step: LossStep, rounds: int) -> float:
    """Share of the memory's bandwidth that our loss alone uses, forward and backward.

    The bytes that must move at least (student and teacher read, the student's gradient written) per second, divided by
    the bytes per second that a copy of the logits reads and writes; median over ``rounds`` in which the two take turns.
    On a GPU a turn has many runs in a row, because in training, too, the next is launched while one runs.
    """
    student = step.logits.detach().log_softmax(-1).requires_grad_()
    copy = torch.empty_like(step.teacher)
    many = range(20 if student.is_cuda else 1)

    def loss_alone() -> None:
        for _ in many:
            student.grad = None
            factorized_kl(student, step.teacher, step.lengths).backward()

    def copying() -> None:
        for _ in many:
            copy.copy_(step.teacher)

    seconds = interleaved({"loss": loss_alone, "copy": copying}, rounds)
    return median([3 / 2 * copied / lost for copied, lost in zip(seconds["copy"], seconds["loss"])])


def _one_step(kind: str, nonblank: float, shape: Any) -> None:
    LossStep(kind, nonblank, shape)()


def measure(nonblank: float, rounds: int, shape: Any = SHAPE) -> Dict[str, Union[str, Optional[float]]]:
    """Measure time and memory that each implementation adds to CTC, and the ratios plain / ours.

    The ratios are ``fkl_time`` and ``fkl_memory``. ``fkl_bandwidth``: see `bandwidth_share`. ``backend``: how ours is
    computed.

    Seconds are medians over ``rounds``; if noise hides the time that one of them adds, ``fkl_time`` is None. Bytes are
    peaks above the peak of a process with CTC only and the same inputs, at least 1 MiB.
    """
    alone = LossStep("ours", nonblank, shape)
    backend = backend_of(alone.logits, alone.teacher)
    others = ["ours", "plain", *(["masked"] if backend == "fused" else [])]
    seconds = interleaved({kind: LossStep(kind, nonblank, shape) for kind in ("ctc", *others)}, rounds)
    extra = {kind: median([a - b for a, b in zip(seconds[kind], seconds["ctc"])]) for kind in others}
    peaks = {kind: peak_memory_of(partial(_one_step, kind, nonblank, shape)) for kind in ("ctc", *others)}
    # At least 1 MiB, because the difference is near 0 if the peak lies elsewhere in the step, and is a divisor below.
    more = {kind: max(peaks[kind] - peaks["ctc"], 2**20) for kind in others}
    return {
        "backend": backend,
        "ctc_seconds": median(seconds["ctc"]),
        **{f"{kind}_seconds": extra[kind] for kind in others},
        **{f"{kind}_bytes": more[kind] for kind in others},
        "fkl_time": extra["plain"] / extra["ours"] if min(extra["ours"], extra["plain"]) > 0 else None,
        "fkl_memory": more["plain"] / more["ours"],
        "fkl_bandwidth": bandwidth_share(alone, rounds),
    }
