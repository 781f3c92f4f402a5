"""Losses that are not finite: the utterances are named, the step is skipped and counted, too many end the training.

The skipping is ESPnet's: its trainer moves no parameter by gradients that are not finite, in a parallel run on no rank.
Batch normalisation would keep what such a step left in its running statistics; they are put back. In validation ESPnet
leaves such a batch out of the averages without a word.
"""

from __future__ import annotations

import logging
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from espnet_kd.cli import UserError
from espnet_kd.distill.schedule import Progress


class NonFiniteLosses:
    """Watches the forward of a model.

    Args:
        limit: so many batches of an epoch, training and validation together, may have a loss that is not finite; in a
            parallel run those of each process. The same few utterances come back in every epoch, a model that has
            diverged exceeds any limit in the same one.
        progress: names epoch and step.
    """

    def __init__(self, limit: int, progress: Progress):
        self.limit = limit
        self.progress = progress
        self.epoch = self.count = 0
        self._before: List[Tuple[Tensor, Tensor]] = []

    def watch(self, model: torch.nn.Module) -> None:
        """Look at every loss of an ESPnet model from now on; its forward raises UserError past the limit."""
        self._norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        model.register_forward_pre_hook(self._remember)
        model.register_forward_hook(self._check, with_kwargs=True)

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
        if torch.isfinite(loss).all():
            return
        if self.epoch != self.progress.epoch:
            self.epoch, self.count = self.progress.epoch, 0
        self.count += 1
        if model.training:
            for buffer, value in self._before:
                buffer.data.copy_(value)  # .data: the backward pass, whose result is thrown away, still comes
        parts = {k: float(v) for k, v in stats.items() if k.startswith("loss") and v is not None}
        parts = ", ".join(f"{k} {v}" for k, v in parts.items() if not abs(v) < float("inf"))
        utt_ids = batch.get("utt_id", ())
        silent = [u for u, x in zip(utt_ids, batch.get("speech", ())) if not torch.isfinite(x).all()]
        of = f"the audio of {', '.join(silent)}" if silent else f"utterances {', '.join(utt_ids)}"
        step = f"step {self.progress.step + 1}" if model.training else "validation"
        where = f"epoch {self.epoch}, {step}: the loss is not finite ({parts}), {of}"
        if self.count > self.limit:
            raise UserError(
                f"{where}: more than --max_nonfinite {self.limit} such batches in one epoch; look at this audio and "
                "text, or train with a lower learning rate (optim_conf: lr); the log names the others"
            )
        done = "the step is skipped" if model.training else "the batch is left out of the averages"
        logging.warning("%s: %s (%d of at most %d in an epoch)", where, done, self.count, self.limit)
