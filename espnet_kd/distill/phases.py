"""What the KD stages change in ESPnet's trainer when they begin."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import torch

from espnet_kd.distill.plan import Plan
from espnet_kd.distill.schedule import Progress

#: Key of an optimizer's parameter groups, and so of a checkpoint: the part of the training that the optimizer is of.
PART = "kd_part"


@dataclass
class PhaseChanges:
    """The optimizers and schedules of a training, which ``restart`` renews, and its patience.

    Only the last KD stage may end early (``patience``). A KD stage with ``restart`` begins with an optimizer and a
    schedule without history. Both are in the checkpoint, so that a resumed training continues exactly.
    """

    plan: Plan
    progress: Progress
    scheduler_conf: Mapping[str, Any]
    optimizers: Sequence[torch.optim.Optimizer]
    schedulers: Sequence[Any]
    trainer_options: Any

    def __post_init__(self) -> None:
        restarts = self.plan.phases[-1].part > 0
        self.new = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers if restarts]
        self.patience = self.trainer_options.patience
        self.part = -1  # that of the optimizers

    def at_epoch(self, epoch: int) -> None:
        """Set what holds from the beginning of an epoch, also after a resume."""
        if epoch > 1 and self.part < 0 and self.new:
            found = self.optimizers[0].param_groups[0].get(PART)
            # Checkpoints of earlier versions, which restarted between epochs, do not have it.
            self.part = self.plan.before(epoch).part if found is None else found
        earlier = [phase.epochs(self.plan.max_epoch)[1] for phase in self.plan.phases[:-1]]
        self.trainer_options.patience = self.patience if epoch > max(earlier, default=0) else None

    def at_step(self) -> None:
        """Restart the optimizers and schedules if a KD stage begins with this step that asks for it."""
        part = self.plan.at(self.progress).phase.part
        if part > self.part and self.new:
            self._restart(self.plan.share(part))
            self.part = part
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group[PART] = part

    def _restart(self, share: float) -> None:
        conf = dict(self.scheduler_conf)
        # A part gets its share of the warm-up [ours], because a short part would never leave the whole warm-up.
        if conf.get("warmup_steps"):
            conf["warmup_steps"] = max(1, round(conf["warmup_steps"] * share))
        for optimizer, scheduler, new in zip(self.optimizers, self.schedulers, self.new):
            optimizer.load_state_dict(copy.deepcopy(new))  # it would train the tensors of ``new``
            for group in optimizer.param_groups:
                group["lr"] = group.get("initial_lr", group["lr"])  # a schedule has changed it
            if scheduler is not None:  # the trainer's list holds this object
                vars(scheduler).update(vars(type(scheduler)(optimizer, **conf)))
