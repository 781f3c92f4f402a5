"""Kills at counted events: a process counts its events, and kills itself by SIGKILL before event number N.

An event is an operation that changes files, a step of an optimizer, or a batch that goes into an encoder. The kill thus
happens at the same point on slow and on fast machines, and in the middle of the work.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional

OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(on_event: Callable[[], None]) -> None:
    """Call ``on_event`` before each event of this process, from now on to its end."""

    def audit(event: str, args: tuple) -> None:
        if event in OPERATIONS or (event == "open" and (args[2] or 0) & WRITING):
            on_event()

    sys.addaudithook(audit)
    if "torch" in sys.modules:  # without torch, there is no optimizer and no encoder
        import torch
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        def batch(module: torch.nn.Module, _: object) -> None:
            if type(module).__name__.endswith("Encoder"):
                on_event()

        torch.nn.modules.module.register_module_forward_pre_hook(batch)
        register_optimizer_step_pre_hook(lambda *_: on_event())


def run_forked(work: Callable[[], None], kill_at: Optional[int]) -> int:
    """Run ``work`` in a fork; return the number of its events, or -1 if it was killed before event ``kill_at``."""
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        events = 0

        def on_event() -> None:
            nonlocal events
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            watch(on_event)
            work()
            os.write(writable, str(events).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writable)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(readable) as f:
        counted = f.read()
    if os.WIFSIGNALED(status):
        return -1
    assert os.WEXITSTATUS(status) == 0, "the work has failed"
    return int(counted)


#: Environment variables for a process group whose processes count together: a file that grows by a byte with each
#: event, and the number of the event before which all of them are killed (0: none).
COUNTER, KILL_AT = "TEST_KILL_COUNTER", "TEST_KILL_AT"


def watch_group() -> Callable[[], None]:
    """Count the events of this process together with its group's, if the environment has ``COUNTER``.

    Returns:
        A function that counts one more event.
    """
    if COUNTER not in os.environ:
        return lambda: None
    number = int(os.environ[KILL_AT])
    counter = os.open(os.environ[COUNTER], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_event() -> None:
        os.write(counter, b".")
        if os.fstat(counter).st_size == number:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    watch(on_event)
    return on_event


def group_environment(counter: Path, kill_at: int = 0) -> dict:
    """Environment variables for a process group that counts from 0."""
    counter.unlink(missing_ok=True)
    return {COUNTER: str(counter), KILL_AT: str(kill_at)}
