"""The output of a running job: a line for each step that ends, and one line of progress for the whole job."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Mapping, Sequence

from espnet_kd.runs.steps import State, Step


class Console:
    """Writes to standard error. A terminal has one line of progress, which is overwritten; a file has one a minute."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self._interval = 2 if self.terminal else 60  #: seconds between two lines of progress
        self._shown = time.monotonic()

    def clear(self) -> None:
        """Remove the line of progress from a terminal."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def log(self, text: str) -> None:
        """Write a line that stays."""
        self.clear()
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def log_end_of(self, file: Path) -> None:
        """Write the last lines of a file; each update of a progress bar counts as a line."""
        last = file.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        print("\n".join(last), file=sys.stderr, flush=True)

    def is_due(self) -> bool:
        """Whether progress is to be shown again; if so, the interval until the next time begins now."""
        due = time.monotonic() - self._shown >= self._interval
        if due:
            self._shown = time.monotonic()
        return due

    def show(self, progress: str) -> None:
        """Show a line of progress."""
        if not self.terminal:
            return self.log(progress)
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
        except OSError:
            columns = 0
        if columns < 2:
            columns = 80  # the terminal does not report its width
        print(f"\r\033[K{progress[: columns - 1]}", end="", file=sys.stderr, flush=True)


class Pace:
    """How fast the trainings of a job are, by the epochs that they have finished since it began."""

    def __init__(self, steps: Sequence[Step], states: Mapping[str, State]):
        self._steps, self._states = steps, states
        self._since, self._before = time.monotonic(), self._finished()

    def _finished(self) -> int:
        return sum(s.finished_epochs(self._states[s.name]) for s in self._steps if not self._is_lost(s))

    def _is_lost(self, step: Step) -> bool:
        return self._states[step.name] is State.LOST

    def left(self) -> str:
        """The remaining time of the trainings in words; empty while it is not known."""
        total, finished = sum(s.epochs for s in self._steps if not self._is_lost(s)), self._finished()
        if not self._before < finished < total:
            return ""
        seconds = (time.monotonic() - self._since) / (finished - self._before) * (total - finished)
        return f"about {time_in_words(seconds)} of training left"


def progress(steps: Sequence[Step], states: Mapping[str, State], began: Mapping[str, float], pace: Pace) -> str:
    """The line of progress: how many steps are over, the time left, and what runs.

    Args:
        began: the start of each step that has started, by :func:`time.monotonic`.
    """
    running = []
    for step in steps:
        if states[step.name] is State.RUNNING:
            epochs = f"epoch {step.finished_epochs(State.RUNNING)} of {step.epochs}"
            so_far = epochs if step.epochs else time_in_words(time.monotonic() - began[step.name])
            running.append(f"{step.name}, {so_far}")
    done = ", ".join(filter(None, [f"{over(states)} of {len(steps)} done" if len(steps) > 1 else "", pace.left()]))
    return "; ".join(filter(None, [done, f"running: {'; '.join(running)}"]))


def over(states: Mapping[str, State]) -> int:
    """How many steps have ended."""
    return sum(state in (State.DONE, State.FAILED) for state in states.values())


def time_in_words(seconds: float) -> str:
    """A time, in seconds or minutes."""
    return f"{int(seconds)} s" if seconds < 100 else f"{int(seconds + 30) // 60} min"
