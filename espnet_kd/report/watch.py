"""The progress of running experiments: one line for each run."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.experiments.history import read_progress, seconds
from espnet_kd.report.sections import duration
from espnet_kd.safe_yaml import parse_yaml

REFRESH = 5.0  #: seconds
#: A run is called silent if it has written nothing for the time of this number of epochs.
SILENT = 2.0


@dataclass
class Status:
    """One run: a teacher, a plain student or a distilled one (in earlier versions, one of its KD stages)."""

    name: str
    what: str
    epoch: int  #: the last finished epoch
    epochs: Optional[int]
    loss: Optional[float]  #: validation loss of the last finished epoch
    left: Optional[float]  #: remaining seconds; None while the first epoch runs
    silent: float  #: seconds since anything was written
    finished: bool
    pace: float  #: seconds per epoch; 0 while the first one runs

    def __str__(self) -> str:
        known = self.epoch or not self.finished  # unknown for a finished run without checkpoint and log
        parts = [f"{self.name}: {self.what}", *([f"epoch {self.epoch} of {self.epochs or '?'}"] if known else [])]
        if self.loss is not None:
            parts.append(f"validation loss {self.loss:.3f}")
        if self.finished:
            parts.append("finished")
        elif self.pace and self.silent > SILENT * self.pace:
            parts.append(f"nothing written for {duration(self.silent)}: has it stopped?")
        else:
            parts.append("first epoch" if self.left is None else f"{duration(self.left)} left")
        return ", ".join(parts)


def watch(expdirs: Sequence[Path], once: bool = False) -> None:
    """Print the status of every run below ``expdirs`` (or of one experiment), again and again until Ctrl-C.

    Raises:
        UserError: no such directory, or with ``once`` no run in it.
    """
    for expdir in expdirs:
        if not expdir.is_dir():
            raise UserError(f"{expdir} is not a directory; give one that holds experiments")
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)  # hides warnings about checkpoints that are being written
    try:
        while True:
            lines = [str(read_status(*run)) for expdir in expdirs for run in find_runs(expdir)]
            if once and not lines:
                raise UserError(f"no run in {' '.join(map(str, expdirs))}: none has a config.yaml; train one first")
            if sys.stdout.isatty() and not once:
                print("\x1b[H\x1b[2J", end="")
            print("\n".join(lines or ["no run yet"]), flush=True)
            if once:
                return
            time.sleep(REFRESH)
    except KeyboardInterrupt:
        return  # Ctrl-C is the usual way to end it
    finally:
        root.setLevel(before)


def find_runs(expdir: Path) -> Iterator[Tuple[Path, str]]:
    """(directory, name) of every run: each experiment, and before it its KD stages if each of them was a run."""
    experiments = [expdir] if (expdir / "config.yaml").is_file() else sorted(p for p in expdir.iterdir() if p.is_dir())
    for experiment in experiments:
        stages = [p for p in experiment.glob("kd_stage*/") if re.fullmatch(r"kd_stage\d+", p.name)]
        # If all KD stages were one training, these directories hold only the student at the end of each KD stage.
        stages = [p for p in stages if (p / "kd_stage.json").is_file() or (p / "checkpoint.pth").is_file()]
        for run in (*sorted(stages, key=lambda p: int(p.name[len("kd_stage") :])), experiment):
            # A training writes config.yaml first. Directories of statistics have theirs only in subdirectories.
            if (run / "config.yaml").is_file():
                yield run, experiment.resolve().name


def read_status(run: Path, name: str) -> Status:
    """Read the state of a run from its files; missing or incomplete files are treated as absent."""
    record = _read(run / "kd_stage.json")
    facts = _read(run / "experiment.json")
    history = read_progress(run) or {}
    epoch = max(history, default=0)
    what = (
        f"{record['method']}, KD stage {_kd_stage(record, epoch)}"
        if "method" in record
        else facts.get("role", "training")
    )
    config = _read_config(run / "config.yaml")
    epochs = record.get("epochs") or _whole_number(config.get("max_epoch"))
    valid = history[epoch].get("valid", {}) if history else {}
    pace = seconds(history) / len(history) if history else 0.0
    silent = time.time() - max(_written(run), default=run.stat().st_mtime)
    since = time.time() - (run / "checkpoint.pth").stat().st_mtime if (run / "checkpoint.pth").exists() else 0.0
    left_alone = not history and _has_result(run) and not (run / "checkpoint.pth").exists()
    # A model still has its experiment.json while a higher max_epoch extends its training. The record of a distilled
    # student is up to date; without one, only patience ends a training before its last epoch.
    extended = history and epochs and epoch < epochs and config.get("patience") is None
    described = bool(facts) and "finished" not in record and not extended
    finished = bool(record.get("finished") or described or (epochs and epoch >= epochs) or left_alone)
    left = max(0.0, (epochs - epoch) * pace - since) if epochs and pace else None
    return Status(name, str(what), epoch, epochs, valid.get("loss"), left, silent, finished, pace)


def _has_result(run: Path) -> bool:
    """Whether the run has an average of its epochs or an exported model, which only a finished training has."""
    return any(next(run.glob(pattern), None) for pattern in ("*.ave.pth", "*.ave_*best.pth", "model.pth"))


def _kd_stage(record: Dict[str, Any], epoch: int) -> Any:
    """The KD stage of the training after ``epoch`` epochs: the one in which the next epoch begins."""
    stages = record.get("stages")
    if not isinstance(stages, list):
        return record.get("kd_stage")  # in earlier versions, each KD stage was a training of its own
    try:
        return next((s["kd_stage"] for s in stages if s["epochs"][1] > epoch), stages[-1]["kd_stage"])
    except (KeyError, TypeError, IndexError):
        return None


def _written(run: Path) -> List[float]:
    """Times of a run's checkpoint, config.yaml and logs; the logs of KD stages are in the experiment's directory."""
    logs = [*run.glob("train*.log"), *(run.parent.glob(f"train.{run.name}.log"))]
    return [p.stat().st_mtime for p in (*logs, run / "checkpoint.pth", run / "config.yaml") if p.exists()]


def _read_config(path: Path) -> Dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, UserError):
        return {}
    return content if isinstance(content, dict) else {}


def _whole_number(value: Any) -> Optional[int]:
    return value if isinstance(value, int) else None


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
