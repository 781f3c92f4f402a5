"""kill -9 in every stage of the embedded recipe; the same command then gives the same results as without a kill.

Every stage first runs without a kill, while its events are counted (killing.py), and is undone. Then it is killed
twice, each time before a random event, and run once more to its end. The recipe's directory is compared with that of
the first run, except times and logs: data, statistics, every parameter, texts, scores. The commands' processes are
forks of one that has already imported ESPnet (zygote.py).
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import zygote
from killing import group_environment
from recipe import TINY, Recipe

from espnet_kd.experiments.checkpoints import load_checkpoint

SMALL = ["--local_data_opts", "--train 24 --valid 6 --test 8", "--nj", "1"]
SMALL += ["--teacher_args", f"{TINY} --num_workers 0 --max_epoch 3"]
SMALL += ["--train_args", f"{TINY} --num_workers 0 --max_epoch 5"]
CACHED = ["--target_cache", "true", "--tag", "cached"]
#: (stage, options) in this order, because each step uses the results of the earlier ones.
STEPS = [
    *((stage, []) for stage in range(1, 7)),
    (7, ["--method", "sequence_kd"]),
    *((stage, CACHED) for stage in (7, 8, 9, 10)),
    *((stage, []) for stage in range(8, 14)),
]
KILLS = 2  # kills in each step
#: Temporary files that a killed command leaves. They are no results, and some commands remove them.
LEFTOVER = re.compile(r"(^|/)(\.[^/]+\.[a-z0-9_]{8}|checkpoint\.damaged\.pth)$")
#: Entries that describe a run and its speed, not its results.
PASSING = {"train_seconds", "load_seconds", "decode_seconds", "read_seconds", "rtf", "date"}


def leave_out_times(content):
    if isinstance(content, dict):
        return {k: leave_out_times(v) for k, v in content.items() if k not in PASSING}
    return [leave_out_times(v) for v in content] if isinstance(content, list) else content


def contents(directory: Path) -> dict:
    """The results of a recipe by file name."""
    found = {}
    for path in sorted(p for top in ("data", "dump", "exp") for p in (directory / top).rglob("*")):
        name = str(path.relative_to(directory))
        if LEFTOVER.search(name):
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif not path.is_file() or path.suffix in (".log", ".png", ".html", ".md", ".lock") or "tensorboard" in name:
            continue
        elif path.suffix == ".pth":
            state = load_checkpoint(path)
            found[name] = {k: v.clone() for k, v in state.get("model", state).items()}
        elif path.suffix == ".json":
            found[name] = leave_out_times(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def differing(one: dict, other: dict) -> list:
    def same(x, y) -> bool:
        if isinstance(x, dict) and any(isinstance(v, torch.Tensor) for v in x.values()):
            return x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items())
        return x == y

    return sorted(k for k in {*one, *other} if k not in one or k not in other or not same(one[k], other[k]))


class Killed:
    """The recipe, whose processes are forks of one that has already imported ESPnet."""

    def __init__(self, egs2: Path, directory: Path):
        self.recipe = Recipe(egs2, "mini")
        self.dir, self.kept, self.counter = self.recipe.dir, directory / "kept", directory / "events"
        address = directory / "socket"
        self.server = subprocess.Popen(
            [sys.executable, zygote.__file__, str(address)], env={**self.recipe.env, "PYTHONIOENCODING": "UTF-8"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        zygote.write_client(directory / "bin/python3", address)
        self.recipe.env["PATH"] = f"{directory / 'bin'}:{self.recipe.env['PATH']}"
        assert b"ready\n" in self.server.stdout  # skips the output of ESPnet's import

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(10)

    def keep(self) -> None:
        """Copy the current results."""
        shutil.rmtree(self.kept, ignore_errors=True)
        for name in ("data", "dump", "exp"):
            if (self.dir / name).exists():
                shutil.copytree(self.dir / name, self.kept / name, symlinks=True)

    def undo(self) -> None:
        """Restore the copy of :meth:`keep`, including the times of files."""
        for name in ("data", "dump", "exp"):
            shutil.rmtree(self.dir / name, ignore_errors=True)
            if (self.kept / name).exists():
                shutil.copytree(self.kept / name, self.dir / name, symlinks=True)

    def run(self, options: list, kill_at: int = 0) -> int:
        """Run a stage and return the number of its events, or -1 if it was killed before number ``kill_at``."""
        run = subprocess.Popen(
            self.recipe.command(*options), cwd=self.dir, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, preexec_fn=os.setpgrp,
            env={**self.recipe.env, **group_environment(self.counter, kill_at)},
        )  # fmt: skip
        said, _ = run.communicate(timeout=900)
        if run.returncode == -signal.SIGKILL:
            while any(self.alive(run.pid)):
                time.sleep(0.01)
            return -1
        assert run.returncode == 0, said[-6000:]
        return self.counter.stat().st_size

    @staticmethod
    def alive(group: int):
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    yield process


@pytest.fixture(scope="module")
def killed(egs2, tmp_path_factory):
    result = Killed(egs2, tmp_path_factory.mktemp("killed"))
    yield result
    result.close()


@pytest.mark.faults("kill -9 of a stage of run.sh")
def test_killed_in_every_stage(killed, record_property):
    draw, kills = random.Random(0), []
    for stage, more in STEPS:
        options = [*SMALL, *more, "--stage", str(stage), "--stop_stage", str(stage)]
        killed.keep()
        events = killed.run(options)
        want = contents(killed.dir)
        killed.undo()
        moments = [draw.randint(1, events)]
        assert killed.run(options, moments[0]) == -1
        for _ in range(KILLS - 1):
            # Among the events that remain. If the stage ends before this one, it is not killed and does not count.
            moment = draw.randint(1, max(1, events - moments[-1]))
            if killed.run(options, moment) == -1:
                moments.append(moment)
        killed.recipe.run(*options)
        different = differing(want, contents(killed.dir))
        assert not different, f"stage {stage} {more}, killed before {moments} of {events} events: {different}"
        kills += moments
    assert len(kills) >= len(STEPS)
    record_property("faults", len(kills))
    rows = json.loads((killed.dir / "exp/results.json").read_text())
    assert {row["role"] for row in rows} == {"teacher", "plain", "student"}
