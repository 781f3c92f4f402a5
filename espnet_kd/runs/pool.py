"""Runs the steps of a job: each as soon as those that it needs have ended and there is room, in a process group."""

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

#: Seconds between two looks at what runs; a step is prepared for minutes and trains for hours.
INTERVAL = 0.1
#: Seconds that a process has to end after SIGTERM.
GRACE = 15.0


class Stopped(Exception):
    """A signal has ended the job; ``number`` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Pool:
    """Runs steps, and ends all that it has started when it is left: use it in a ``with`` statement.

    Args:
        command: what every step begins with: run.sh and the options of the whole job.
        logs: a directory; each step's output goes into a file of its own.
        jobs: how many steps run side by side.
    """

    def __init__(self, command: Sequence[str], logs: Path, jobs: int, console: Console):
        self._command, self._logs, self._jobs, self._console = command, logs, jobs, console
        self._running: Dict[str, subprocess.Popen] = {}
        self._began: Dict[str, float] = {}
        self._signal = 0
        self.exit_codes: Dict[str, int] = {}  #: of the steps that have ended, as a shell gives them

    def __enter__(self) -> Pool:
        # What is ignored stays so: SIGHUP under nohup, SIGINT in the background of a script. The handler only makes a
        # note, so that no process is started without being known here.
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
        """Run all steps, those first that come first if they can.

        Args:
            stop_at_failure: return as soon as a step has failed; what runs beside it goes on until the pool is left.

        Returns:
            {name: state in which it was left}

        Raises:
            Stopped: by a signal.
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
                start_new_session=True,  # a process group, which is ended as a whole
            )  # fmt: skip
        self._began[step.name] = time.monotonic()

    def _ended(self, steps: Sequence[Step]) -> Iterator[Step]:
        for step in steps:
            if step.name in self._running and self._running[step.name].poll() is not None:
                yield step

    def _end(self, step: Step, number: int, total: int) -> State:
        """Take note of a step that has ended, the one of this number of a total."""
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
    """Send a signal to a process group, if there is still somebody in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, number)
