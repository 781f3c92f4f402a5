"""Resuming after a kill: ESPnet overwrites checkpoints in place, so that one may be incomplete or missing."""

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
from espnet_kd.experiments.models import load_safely
from espnet_kd.files import replacing

CHECKPOINT = "checkpoint.pth"
PREVIOUS = "checkpoint.prev.pth"


def keep_previous(output_dir: Path) -> None:
    """Copy the finished checkpoint aside, before the trainer overwrites it. Call at the start of an epoch."""
    checkpoint = output_dir / CHECKPOINT
    if checkpoint.is_file():
        part = output_dir / (PREVIOUS + ".part")
        shutil.copyfile(checkpoint, part)
        os.replace(part, output_dir / PREVIOUS)


def load_checkpoint(path: Path) -> Dict[str, Any]:
    """Load a checkpoint of ESPnet's trainer: tensors, and of other objects only the numbers and times of its reporter.

    Raises:
        UserError: the file is complete, but holds other objects (:func:`espnet_kd.experiments.models.load_safely`).
        Any error of torch for an absent or damaged file.
    """
    scalars = [type(np.dtype(t)) for t in ("float32", "float64", "int64")]
    allowed = [datetime.timedelta, np.dtype, np.float64(0).__reduce__()[0], *scalars]
    # Memory-mapped, so that reading the reporter's few numbers does not read model and optimizer.
    return load_safely(path, allowed, mmap=True)


def read_checkpoint(path: Path) -> Optional[Dict[str, Any]]:
    """As :func:`load_checkpoint`, but None where the file is absent or damaged.

    ESPnet itself loads a checkpoint with any objects in it; call this before a resume.
    """
    if not path.is_file():
        return None
    try:
        states = load_checkpoint(path)
        states["model"], states["reporter"]["epoch"]
        return states
    except (MemoryError, UserError):
        raise
    except Exception as e:  # a damaged file may raise any error
        # EINVAL comes from a place beyond the end of a cut file. Other errors of the system, such as a disk that does
        # not respond, do not mean that the file is damaged.
        if isinstance(e, OSError) and e.errno != errno.EINVAL:
            raise
        logging.warning("%s is damaged (%s)", path, str(e).splitlines()[0] if str(e) else type(e).__name__)
        return None


def check_ended(output_dir: Path, max_epoch: int, early: bool) -> None:
    """Refuse the output of a training that has not ended.

    Args:
        early: whether the training may end before ``max_epoch`` (ESPnet's ``patience``).

    Raises:
        UserError: there is no readable checkpoint, or it is that of an epoch before the last.
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


def mend(output_dir: Path) -> int:
    """Make a killed run resumable, and log what was done.

    A damaged checkpoint is replaced by that of the previous epoch, or by a fresh start. An epoch's model that is
    missing or damaged is written again from its checkpoint.

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
    except Exception:  # the file is absent or damaged
        return False
