"""Run commands of asr_kd_data in forks that kill themselves (SIGKILL) before a random file operation.

    python kill_points.py SEED KILLS < commands.json

In directory ``0`` each command runs without a kill. In ``1`` … ``KILLS`` each command is killed at a random moment and
given again until it ends; the files must then be the same as in ``0``. The directories are made in the working
directory, and relative paths start from them. The script is a process of its own, because forks do not go together
with the threads of a test run.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import sys
from pathlib import Path
from typing import List

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from killing import run_forked
from tiny_layouts import snapshot
from tqdm import tqdm

from espnet_kd.bin import asr_kd_data


def main(seed: int, kills: int, commands: List[List[str]]) -> None:
    """Exit with a message if a killed run's result differs."""
    rng = random.Random(seed)
    top = Path.cwd()
    killed = 0
    tqdm.monitor_interval = 0  # no monitor thread, because this process forks
    for attempt in range(kills + 1):
        (top / str(attempt)).mkdir()
        os.chdir(top / str(attempt))
        if attempt == 0:
            totals = [run_forked(functools.partial(asr_kd_data.main, command), None) for command in commands]
            want = snapshot(Path())
            continue
        moments = []
        for command, total in zip(commands, totals):
            work = functools.partial(asr_kd_data.main, command)
            moments.append(rng.randint(1, total))
            assert run_forked(work, moments[-1]) == -1
            killed += 1
            moments.append(rng.randint(1, 2 * total))  # this run is killed again, or ends before
            if run_forked(work, moments[-1]) == -1:
                killed += 1
                run_forked(work, None)
        found = snapshot(Path())
        if found != want:
            names = sorted(k for k in {*found, *want} if found.get(k) != want.get(k))
            sys.exit(f"killed before operations {moments} of {totals}: different: {names}")
    print(f"{kills} times each, {killed} kills, of {totals} operations")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    main(int(sys.argv[1]), int(sys.argv[2]), json.load(sys.stdin))
