"""Training statistics of a finished or running ESPnet run, read from its checkpoint, or else from its log."""

from __future__ import annotations

import datetime
import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

#: {epoch: {"train" | "valid": {statistic: value}}}; "time" is in seconds.
History = Dict[int, Dict[str, Dict[str, float]]]


@dataclass
class StageHistory:
    """A KD stage of a training: its number in the page, its first and last epoch, and their statistics.

    A KD stage may begin within an epoch; this epoch is then also the last one of the previous KD stage.
    """

    number: int
    first: int
    last: int
    history: History

    @property
    def epochs(self) -> str:
        """The trained epochs as text."""
        last = max(self.history, default=self.last)
        return str(self.first) if self.first == last else f"{self.first}–{last}"


def read_parts(expdir: Path) -> List[StageHistory]:
    """The KD stages of an experiment that is one training, up to its last finished epoch.

    [] if there is no such record, or if each KD stage was a training of its own (:func:`read_stages`).
    """
    try:
        record = json.loads((expdir / "kd_stage.json").read_text(encoding="utf-8"))
        places = [(int(s["kd_stage"]), *map(int, s["epochs"])) for s in record["stages"]]
        parts = [StageHistory(number, first, last, {}) for number, first, last in places]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    history = read_history(expdir) or {}
    for part in parts:
        part.history = {epoch: history[epoch] for epoch in history if part.first <= epoch <= part.last}
    return [part for part in parts if part.history]


def read_history(run_dir: Path) -> Optional[History]:
    """Statistics of every epoch of one run, or None if it has left none that can be read."""
    for name in ("checkpoint.pth", "checkpoint.prev.pth"):
        if (run_dir / name).is_file():
            history = _from_checkpoint(run_dir / name)
            if history:
                return history
    return _from_logs(run_dir) or None


def read_progress(run_dir: Path) -> Optional[History]:
    """Like :func:`read_history`, for a running training: its logs are read first, which does not need torch."""
    return _from_logs(run_dir) or read_history(run_dir)


def read_stages(expdir: Path) -> List[History]:
    """Histories of an experiment's trainings: one for all KD stages together, from the directory itself.

    If each KD stage was a training of its own, their order is kd_stage1, kd_stage2, …, then the directory itself. A
    run without statistics is left out, so that an experiment that was never trained here gives [].
    """
    earlier = [p for p in expdir.glob("kd_stage*") if re.fullmatch(r"kd_stage\d+", p.name) and p.is_dir()]
    runs = sorted(earlier, key=lambda p: int(p.name[len("kd_stage") :])) + [expdir]
    return [h for h in map(read_history, runs) if h]


def seconds(history: History) -> float:
    """Wall time of a run's epochs in seconds: training, validation and all else that ESPnet's reporter timed."""
    return sum(stats.get("time", 0.0) for phases in history.values() for stats in phases.values())


def _from_checkpoint(path: Path) -> Optional[History]:
    from espnet_kd.experiments.checkpoints import load_checkpoint  # imported here, because it imports torch

    try:
        stats = load_checkpoint(path)["reporter"]["stats"]
        return {int(epoch): {k: _numbers(v) for k, v in phases.items()} for epoch, phases in stats.items()}
    except Exception as e:  # torch raises many kinds of errors; none is fatal, because the log is tried next
        logging.warning("no statistics from %s (%s); trying the log", path, str(e).split("\n")[0][:100])
        return None


def _numbers(stats: Dict) -> Dict[str, float]:
    """The numbers among a reporter's values, durations in seconds."""
    found = {}
    for key, value in stats.items():
        value = value.total_seconds() if isinstance(value, datetime.timedelta) else value
        try:
            found[key] = float(value)
        except (TypeError, ValueError):
            continue
    return found


def _from_logs(run_dir: Path) -> History:
    """Parse the lines ``<n>epoch results: [train] a=1.0, …, [valid] …`` of its logs, older files first.

    An epoch that was trained again after a kill has several such lines, of which the last one counts.
    """
    history: History = {}
    for log in sorted(_logs(run_dir), key=lambda p: p.stat().st_mtime):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            match = re.search(r"(\d+)epoch results: (.*)", line)
            if match:
                parts = re.split(r"(?:^|, )\[(\w+)\] ", match[2])[1:]
                history[int(match[1])] = {k: _parse_stats(v) for k, v in zip(parts[::2], parts[1::2])}
    return history


def _logs(run_dir: Path) -> List[Path]:
    """The logs of a run. If each KD stage was a training of its own, all logs may be in the last one's directory."""
    try:
        stage = json.loads((run_dir / "kd_stage.json").read_text(encoding="utf-8"))["kd_stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return list(run_dir.glob("train*.log"))
    name = f"train.kd_stage{stage}.log"
    return [p for p in (run_dir / name, run_dir.parent / name) if p.is_file()]


def _parse_stats(text: str) -> Dict[str, float]:
    found = {}
    # A duration holds commas ("1 hour, 2 minutes and 3.5 seconds"), so split only before the next "name=".
    for item in re.split(r", (?=\w+=)", text):
        key, _, value = item.partition("=")
        if key == "time":
            if math.isfinite(took := _parse_duration(value)):
                found[key] = took
            continue
        try:
            found[key] = float(value)
        except ValueError:
            continue
    return found


def _parse_duration(text: str) -> float:
    """Seconds of ``humanfriendly.format_timespan``'s output, which its own parser doesn't read."""
    import humanfriendly

    parts = re.findall(r"[\d.]+ [a-z]+", text)
    try:
        return sum(map(humanfriendly.parse_timespan, parts)) if parts else math.nan
    except humanfriendly.InvalidTimespan:  # the line is still being written
        return math.nan
