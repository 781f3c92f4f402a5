"""Run commands of asr_kd_data in forks that kill themselves (SIGKILL) before a random file operation.

    python kill_points.py SEED KILLS < commands.json

In ``0`` each command runs unbroken. In ``1`` … ``KILLS`` each is killed, at another moment each time, and given again
until it ends; what is there afterwards has to be the same. Relative paths count from these directories, which are made
in the working directory. A process of its own, since forks and threads of a test run do not go together.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
from pathlib import Path
from typing import List, Optional

from tiny_layouts import snapshot
from tqdm import tqdm

from espnet_kd.bin import asr_kd_data

OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def run(command: List[str], kill_at: Optional[int]) -> int:
    """Run in a fork; return the number of its file operations, or -1 if it was killed before number ``kill_at``."""
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        done = 0

        def watch(event: str, args: tuple) -> None:
            nonlocal done
            if event in OPERATIONS or (event == "open" and (args[2] or 0) & WRITING):
                done += 1
                if done == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(watch)
            asr_kd_data.main(command)
            os.write(writable, str(done).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writable)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(readable) as f:
        told = f.read()
    if os.WIFSIGNALED(status):
        return -1
    assert os.WEXITSTATUS(status) == 0, command
    return int(told)


def main(seed: int, kills: int, commands: List[List[str]]) -> None:
    """Exit with a message if a killed run's result differs."""
    rng = random.Random(seed)
    top = Path.cwd()
    killed = 0
    tqdm.monitor_interval = 0  # no thread
    for attempt in range(kills + 1):
        (top / str(attempt)).mkdir()
        os.chdir(top / str(attempt))
        if attempt == 0:
            totals = [run(command, None) for command in commands]
            want = snapshot(Path())
            continue
        moments = []
        for command, total in zip(commands, totals):
            moments.append(rng.randint(1, total))
            assert run(command, moments[-1]) == -1
            killed += 1
            moments.append(rng.randint(1, 2 * total))  # and again, or not
            if run(command, moments[-1]) == -1:
                killed += 1
                run(command, None)
        found = snapshot(Path())
        if found != want:
            names = sorted(k for k in {*found, *want} if found.get(k) != want.get(k))
            sys.exit(f"killed before operations {moments} of {totals}: different: {names}")
    print(f"{kills} times each, {killed} kills, of {totals} operations")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    main(int(sys.argv[1]), int(sys.argv[2]), json.load(sys.stdin))
