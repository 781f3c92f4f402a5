"""A call of run.sh as a step of a job, and the states in which it may be."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Tuple


class State(enum.Enum):
    """The state of a step."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    LOST = "lost"  #: never started, because a step that it needs has failed or is lost


@dataclass(frozen=True)
class Step:
    """One call of run.sh."""

    name: str  #: shown on the console; the name of its log is made from it
    options: Tuple[str, ...]  #: options of run.sh besides those of the whole job
    needs: Tuple[str, ...] = ()  #: names of the steps that must succeed before it starts
    after: Tuple[str, ...] = ()  #: names of the steps that must end before it starts, successful or not
    directory: Optional[Path] = None  #: directory of its training; epochs are counted in the logs there
    epochs: int = 0  #: epochs of its training; 0 if it trains nothing, or if their number is not known
    experiment: str = ""  #: the experiment that it leaves to be decoded, relative to the recipe; empty: none

    @property
    def log_name(self) -> str:
        """File name of its log."""
        return re.sub("[, ]+", "_", self.name) + ".log"

    def finished_epochs(self, state: State) -> int:
        """How many epochs of its training are finished, those of earlier calls included."""
        if not self.epochs or state is State.DONE:
            return self.epochs
        logs = self.directory.glob("train*.log") if self.directory else ()
        return min(self.epochs, sum(log.read_bytes().count(b"epoch results") for log in logs))
