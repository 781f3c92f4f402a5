"""Resuming after a kill: ESPnet writes checkpoints in place, so one may be half written or missing."""

from __future__ import annotations

import datetime
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
import torch

from espnet_kd.cli import UserError
from espnet_kd.distill.plan import Plan
from espnet_kd.distill.schedule import Progress
from espnet_kd.files import replacing
from espnet_kd.targets.experiment import load_safely, student_only

CHECKPOINT = "checkpoint.pth"
PREVIOUS = "checkpoint.prev.pth"
STUDENT = "student.pth"  #: the student alone, as a KD stage ends with it


def keep_previous(output_dir: Path) -> None:
    """Copy the finished checkpoint aside, before the trainer overwrites it. Call at the start of an epoch."""
    checkpoint = output_dir / CHECKPOINT
    if checkpoint.is_file():
        part = output_dir / (PREVIOUS + ".part")
        shutil.copyfile(checkpoint, part)
        os.replace(part, output_dir / PREVIOUS)


def load_checkpoint(path: Path) -> Dict[str, Any]:
    """Load what ESPnet's trainer wrote: tensors, and of other objects only the numbers and times of its reporter.

    Raises:
        UserError: a whole file that holds anything else (:func:`espnet_kd.targets.experiment.load_safely`).
        Whatever torch raises for an absent or damaged one.
    """
    scalars = [type(np.dtype(t)) for t in ("float32", "float64", "int64")]
    allowed = [datetime.timedelta, np.dtype, np.float64(0).__reduce__()[0], *scalars]
    # Memory-mapped: who wants the reporter's few numbers does not read model and optimizer.
    return load_safely(path, allowed, mmap=True)


def read_checkpoint(path: Path) -> Optional[Dict[str, Any]]:
    """As :func:`load_checkpoint`, but None where the file is absent or damaged.

    ESPnet itself loads a checkpoint with all that it holds: whoever resumes calls this first.
    """
    if not path.is_file():
        return None
    try:
        states = load_checkpoint(path)
        states["model"], states["reporter"]["epoch"]
        return states
    except (MemoryError, UserError):
        raise
    except Exception as e:  # whatever a damaged archive raises, the answer is the same: not this one
        # EINVAL is of places that a cut file lacks. After any other the file may be well: the disk did not answer.
        if isinstance(e, OSError) and e.errno != errno.EINVAL:
            raise
        logging.warning("%s is damaged (%s)", path, str(e).splitlines()[0] if str(e) else type(e).__name__)
        return None


def check_ended(output_dir: Path, max_epoch: int, early: bool) -> None:
    """Refuse what a training left that has not ended.

    Args:
        early: whether it may end before ``max_epoch`` (ESPnet's ``patience``).

    Raises:
        UserError: no readable checkpoint, or that of an epoch before the last.
    """
    states = read_checkpoint(output_dir / CHECKPOINT)
    if states is None:
        raise UserError(f"training left no readable checkpoint in {output_dir}; see its log")
    epoch = states["reporter"]["epoch"]
    if epoch < max_epoch and not early:
        raise UserError(
            f"training ended after epoch {epoch} of {max_epoch} in {output_dir}; see its log (patience may only end "
            "the last KD stage)"
        )


def check_updated(output_dir: Path, progress: Progress, first_rank: bool = True) -> None:
    """Refuse a training whose last epoch did not change the model; the first rank takes that epoch back.

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
        torch.distributed.barrier()  # a process that leaves with an error may end the others
    lower = "lower the learning rate (optim_conf: lr)"
    raise UserError(
        f"{output_dir}: no step of epoch {progress.epoch} had finite gradients, or it has fewer batches than "
        "accum_grad: nothing was learnt in it, and it is not counted; see the log, and "
        + (lower if progress.epoch == 1 else f"train into another directory: {lower}")
    )


def forget_optimizer(output_dir: Path) -> None:
    """Take optimizer and schedule out of a checkpoint: ESPnet's resume then goes on with new ones."""
    states = {**load_checkpoint(output_dir / CHECKPOINT), "optimizers": [], "schedulers": []}
    with replacing(output_dir / CHECKPOINT, "wb") as f:
        torch.save(states, f)


def hand_over(output_dir: Path, plan: Plan, epoch: int, stopped: bool = False) -> None:
    """Keep the student that a KD stage ends with: of each that ends in ``epoch``, which has just been trained.

    That of the last KD stage is ``student.pth`` in ``output_dir`` itself; that of an earlier one lies in its directory
    ``kd_stage<k>`` with the configuration, so that it can be decoded.

    Args:
        stopped: whether training ended with this epoch, perhaps before ``max_epoch`` (ESPnet's ``patience``).
    """
    for phase in plan.phases:
        if phase.epochs(plan.max_epoch)[1] != epoch and not (stopped and phase is plan.phases[-1]):
            continue
        number = phase.stage.number
        out = output_dir if number == plan.numbers[-1] else output_dir / f"kd_stage{number}"
        model = output_dir / f"{epoch}epoch.pth"
        if not model.is_file() and (out / STUDENT).is_file():
            continue  # training went on long ago, and ESPnet has removed that epoch's model
        out.mkdir(exist_ok=True)
        with replacing(out / STUDENT, "wb") as f:
            torch.save(student_only(load_safely(model)), f)
        if out != output_dir:
            with replacing(out / "config.yaml") as f:
                f.write((output_dir / "config.yaml").read_text(encoding="utf-8"))


def mend(output_dir: Path) -> int:
    """Make a killed run resumable, and log what was done.

    A damaged checkpoint gives way to the previous epoch's, or to a fresh start; an epoch's model that is missing or
    damaged is written again from its checkpoint.

    Returns:
        the last finished epoch, 0 for a fresh start
    """
    states = read_checkpoint(output_dir / CHECKPOINT)
    if states is None:
        states = read_checkpoint(output_dir / PREVIOUS)
        if (output_dir / CHECKPOINT).exists():
            os.replace(output_dir / CHECKPOINT, output_dir / "checkpoint.damaged.pth")
        if states is None:
            return 0
        logging.warning("going back to %s, epoch %d", output_dir / PREVIOUS, states["reporter"]["epoch"])
        part = output_dir / (CHECKPOINT + ".part")
        shutil.copyfile(output_dir / PREVIOUS, part)
        os.replace(part, output_dir / CHECKPOINT)
    epoch = states["reporter"]["epoch"]
    model = output_dir / f"{epoch}epoch.pth"
    if not _same(model, states["model"]):
        logging.warning("writing %s again from the checkpoint", model)
        with replacing(model, "wb") as f:
            torch.save(states["model"], f)
    # Later epochs' models belong to the damaged checkpoint and will be trained again.
    (output_dir / f"{epoch + 1}epoch.pth").unlink(missing_ok=True)
    return epoch


def _same(path: Path, state: Dict[str, torch.Tensor]) -> bool:
    try:
        found = load_safely(path)
        return found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())
    except Exception:  # absent or damaged
        return False
