"""Runs the steps of a job, each in a process group, as soon as the steps that it needs have ended and there is room."""

from __future__ import annotations

import contextlib
import graphlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Sequence

from espnet_kd.runs.console import Console, Pace, over, progress, time_in_words
from espnet_kd.runs.steps import State, Step

#: Seconds between two checks of the running steps; negligible beside the minutes or hours of a step.
INTERVAL = 0.1
#: Seconds that a process has to end after SIGTERM.
GRACE = 15.0


class Stopped(Exception):
    """A signal has ended the job; ``number`` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Pool:
    """Runs steps inside a ``with`` statement, at whose end all processes that it has started are ended.

    Args:
        command: the beginning of every step's command: run.sh and the options of the whole job.
        logs: a directory; each step's output goes into a file of its own.
        jobs: how many steps may run at the same time.
    """

    def __init__(self, command: Sequence[str], logs: Path, jobs: int, console: Console):
        self._command, self._logs, self._jobs, self._console = command, logs, jobs, console
        self._running: Dict[str, subprocess.Popen] = {}
        self._began: Dict[str, float] = {}
        self._signal = 0
        self.exit_codes: Dict[str, int] = {}  #: {step that has ended: exit code, as a shell gives it}

    def __enter__(self) -> Pool:
        # Ignored signals stay ignored: SIGHUP under nohup, SIGINT for a background job of a script. The handler only
        # stores the signal: an exception from it could come between the start of a process and its entry in _running.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._handlers = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        for number in self._handlers:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._console.clear()
        end_groups(self._running.values())
        self._running.clear()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self._signal = number

    def run(self, steps: Sequence[Step], stop_at_failure: bool = False) -> Dict[str, State]:
        """Run all steps; of several that can start, the first in ``steps`` starts first.

        Args:
            stop_at_failure: return as soon as a step has failed; other steps run on until the pool is left.

        Returns:
            {name of a step: its last state}

        Raises:
            Stopped: a signal has arrived.
        """
        states = {step.name: State.WAITING for step in steps}
        graph = graphlib.TopologicalSorter({step.name: (*step.needs, *step.after) for step in steps})
        graph.prepare()
        pace = Pace(steps, states)
        ready: List[str] = []
        while graph.is_active():
            if self._signal:
                raise Stopped(self._signal)
            for step in self._ended(steps):
                states[step.name] = self._end(step, over(states) + 1, len(steps))
                graph.done(step.name)
                if stop_at_failure and states[step.name] is State.FAILED:
                    return states
            ready += graph.get_ready()
            for step in [step for step in steps if step.name in ready]:
                if any(states[name] is not State.DONE for name in step.needs):
                    states[step.name] = State.LOST
                    graph.done(step.name)
                elif len(self._running) < self._jobs:
                    states[step.name] = State.RUNNING
                    self._start(step)
                else:
                    continue
                ready.remove(step.name)
            if self._console.is_due():
                self._console.show(progress(steps, states, self._began, pace))
            time.sleep(INTERVAL)
        return states

    def _start(self, step: Step) -> None:
        with (self._logs / step.log_name).open("wb") as log:
            self._running[step.name] = subprocess.Popen(
                [*self._command, *step.options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,  # makes a process group, which can be ended as a whole
            )  # fmt: skip
        self._began[step.name] = time.monotonic()

    def _ended(self, steps: Sequence[Step]) -> Iterator[Step]:
        for step in steps:
            if step.name in self._running and self._running[step.name].poll() is not None:
                yield step

    def _end(self, step: Step, number: int, total: int) -> State:
        """Record and log a step that has ended, as the ``number``-th of ``total``."""
        counted = f"{number} of {total}: " if total > 1 else ""
        code = self._running.pop(step.name).returncode
        self.exit_codes[step.name] = code if code >= 0 else 128 - code
        if code == 0:
            self._console.log(f"{counted}{step.name}, {time_in_words(time.monotonic() - self._began[step.name])}")
            return State.DONE
        log = self._logs / step.log_name
        self._console.log(f"{counted}{step.name} FAILED; the end of {log}:")
        self._console.log_end_of(log)
        return State.FAILED


def end_groups(leaders: Iterable[subprocess.Popen]) -> None:
    """End processes, each with the process group that it leads, and wait until they have ended."""
    leaders = list(leaders)
    for leader in leaders:
        kill_group(leader, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for leader in leaders:
        with contextlib.suppress(subprocess.TimeoutExpired):
            leader.wait(max(0.0, deadline - time.monotonic()))
        kill_group(leader, signal.SIGKILL)
        leader.wait()


def kill_group(leader: subprocess.Popen, number: int) -> None:
    """Send a signal to a process group, if it still has a process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, number)
