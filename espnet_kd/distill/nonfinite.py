"""Losses that are not finite: the log names the utterances, the step is skipped, and too many of them end the training.

ESPnet's trainer skips the step: it does not update parameters by gradients that are not finite, on any rank of a
parallel run. The running statistics of batch normalisation, which such a step has changed, are restored here. In
validation ESPnet leaves such a batch out of the averages without a message.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from espnet_kd.backend import may_look
from espnet_kd.cli import UserError
from espnet_kd.distill.schedule import Progress
from espnet_kd.late import Later


@dataclass(frozen=True)
class _Step:
    """The data of one forward of the model, for a message."""

    epoch: int
    number: int
    training: bool
    parts: Dict[str, Any]
    batch: Dict[str, Any]

    def __str__(self) -> str:
        parts = {k: float(v) for k, v in self.parts.items() if k.startswith("loss") and v is not None}
        losses = ", ".join(f"{k} {v}" for k, v in parts.items() if not abs(v) < float("inf"))
        utt_ids = self.batch.get("utt_id", ())
        silent = [u for u, x in zip(utt_ids, self.batch.get("speech", ())) if not torch.isfinite(x).all()]
        of = f"the audio of {', '.join(silent)}" if silent else f"utterances {', '.join(utt_ids)}"
        step = f"step {self.number}" if self.training else "validation"
        return f"epoch {self.epoch}, {step}: the loss is not finite ({losses}), {of}"


class NonFiniteLosses:
    """Checks the losses that a model's ``forward`` returns.

    Args:
        limit: largest number of batches of an epoch, training and validation together, whose loss may not be finite;
            in a parallel run, of each process. A few damaged utterances stay below it in every epoch; a model that has
            diverged exceeds it within one epoch.
        progress: has the current epoch and step.

    On a GPU a step is reported when a later one begins, so that the host does not wait.
    """

    def __init__(self, limit: int, progress: Progress):
        self.limit = limit
        self.progress = progress
        self.epoch = self.count = 0
        self._before: List[Tuple[Tensor, Tensor]] = []
        self._later = Later()

    def watch(self, model: torch.nn.Module) -> None:
        """Check every loss of an ESPnet model from now on; its forward raises UserError beyond the limit."""
        self._norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        model.register_forward_pre_hook(self._remember)
        model.register_forward_hook(self._check, with_kwargs=True)

    def finish(self) -> None:
        """Check the last steps too (:class:`UserError` as above)."""
        self._later.finish()

    def _remember(self, model: torch.nn.Module, args: Tuple[Any, ...]) -> None:
        if model.training:
            self._before = [(b, b.clone()) for m in self._norms for b in m.buffers(recurse=False)]

    def _check(
        self,
        model: torch.nn.Module,
        args: Tuple[Any, ...],
        batch: Dict[str, Any],
        output: Tuple[Tensor, Dict[str, Any], Tensor],
    ) -> None:
        loss, stats = output[:2]
        bad = ~torch.isfinite(loss.detach()).all()
        if model.training and (not may_look(bad) or bad):
            for buffer, value in self._before:
                # .data hides the change from autograd: the backward pass still runs, although its result is not used
                buffer.data.copy_(torch.where(bad, value, buffer))
        step = _Step(self.progress.epoch, self.progress.step + 1, model.training, stats, batch)
        self._later(bad, lambda: self._report(step))

    def _report(self, step: _Step) -> None:
        if self.epoch != step.epoch:
            self.epoch, self.count = step.epoch, 0
        self.count += 1
        if self.count > self.limit:
            raise UserError(
                f"{step}: more than --max_nonfinite {self.limit} such batches in one epoch; look at this audio and "
                "text, or train with a lower learning rate (optim_conf: lr); the log names the others"
            )
        done = "the step is skipped" if step.training else "the batch is left out of the averages"
        logging.warning("%s: %s (%d of at most %d in an epoch)", step, done, self.count, self.limit)
