"""A call of run.sh as a step of a job, and the states in which it may be."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Tuple


class State(enum.Enum):
    """Of a step."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    LOST = "lost"  #: never started, because a step that it needs has failed or is lost


@dataclass(frozen=True)
class Step:
    """One call of run.sh."""

    name: str  #: on the console; also of its log
    options: Tuple[str, ...]  #: beside those of the whole job
    needs: Tuple[str, ...] = ()  #: names of the steps that have to end well before it starts
    after: Tuple[str, ...] = ()  #: names of the steps that have to be over before it starts, whatever their end
    directory: Optional[Path] = None  #: of its training, with the logs in which epochs are counted
    epochs: int = 0  #: of its training; 0: it trains nothing, or their number is not known
    experiment: str = ""  #: what it leaves to be decoded, as seen from the recipe; empty: nothing

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
