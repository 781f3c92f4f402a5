"""Checks at the end of an epoch, and the student that is kept at the end of a KD stage."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from espnet_kd.cli import UserError
from espnet_kd.distill.plan import Plan
from espnet_kd.distill.record import finished_stage
from espnet_kd.distill.schedule import Progress
from espnet_kd.experiments.checkpoints import CHECKPOINT, PREVIOUS
from espnet_kd.experiments.models import load_safely, student_only
from espnet_kd.files import replacing

STUDENT = "student.pth"  #: the student at the end of a KD stage


def check_updated(output_dir: Path, progress: Progress, first_rank: bool = True) -> None:
    """Refuse a training whose last epoch did not change the model; the first rank removes that epoch.

    ESPnet ends such a training without an error, and would count the epoch as trained when it is resumed. All ranks of
    a parallel run call this.

    Raises:
        UserError: no step of the epoch had finite gradients.
    """
    if progress.updates != 0:
        return
    if first_rank:
        checkpoint, previous = output_dir / CHECKPOINT, output_dir / PREVIOUS
        if previous.is_file() and progress.epoch > 1:
            os.replace(previous, checkpoint)
        else:
            checkpoint.unlink(missing_ok=True)
        (output_dir / f"{progress.epoch}epoch.pth").unlink(missing_ok=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait, because a rank's exit may end the others
    lower = "lower the learning rate (optim_conf: lr)"
    raise UserError(
        f"{output_dir}: no step of epoch {progress.epoch} had finite gradients, or it has fewer batches than "
        "accum_grad: nothing was learnt in it, and it is not counted; see the log, and "
        + (lower if progress.epoch == 1 else f"train into another directory: {lower}")
    )


def hand_over(output_dir: Path, plan: Plan, epoch: int, stopped: bool = False) -> None:
    """Keep the student of each KD stage that ends in ``epoch``, which has just been trained.

    A KD stage that is finished by the record keeps its student: with more epochs it would end later by the plan. The
    student of the last KD stage is ``student.pth`` in ``output_dir``; that of an earlier one is written to the
    directory ``kd_stage<k>`` with its configuration, so that it can be decoded.

    Args:
        stopped: whether training ended with this epoch, perhaps before ``max_epoch`` (ESPnet's ``patience``).
    """
    finished = finished_stage(output_dir)
    for phase in plan.phases:
        if phase.epochs(plan.max_epoch)[1] != epoch and not (stopped and phase is plan.phases[-1]):
            continue
        number = phase.stage.number
        out = output_dir if number == plan.numbers[-1] else output_dir / f"kd_stage{number}"
        model = output_dir / f"{epoch}epoch.pth"
        if (out / STUDENT).is_file() and (number <= finished or not model.is_file()):
            continue  # kept earlier; training has gone on, and ESPnet may have removed that epoch's model
        out.mkdir(exist_ok=True)
        with replacing(out / STUDENT, "wb") as f:
            torch.save(student_only(load_safely(model)), f)
        if out != output_dir:
            with replacing(out / "config.yaml") as f:
                f.write((output_dir / "config.yaml").read_text(encoding="utf-8"))
