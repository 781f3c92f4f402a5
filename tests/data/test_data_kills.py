"""After SIGKILL at any moment, the same command gives the result of an unbroken run; no process is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Callable, List

import psutil
import pytest
from tiny_layouts import write_aishell, write_librispeech, write_tedlium2

ROOT = Path(__file__).parents[2]
CORPORA = {
    "librispeech": (write_librispeech, ["--train_parts", "train-clean-100", "--valid_parts", "dev-clean"]),
    "aishell": (write_aishell, []),
    "tedlium2": (write_tedlium2, []),
}


@pytest.mark.trains
@pytest.mark.faults("kill -9 of data preparation")
@pytest.mark.parametrize("corpus", list(CORPORA))
def test_stages_one_to_three(corpus: str, tmp_path: Path, record_property: Callable) -> None:
    write, options = CORPORA[corpus]
    root = write(tmp_path / "corpus")
    # The limits must exclude some utterances, so that the list of them is tested as well.
    formatting = ["--speed_factors", "0.9", "1.0", "--max_seconds", "0.52", "--nj", "1"]
    if corpus == "tedlium2":
        formatting = ["--max_seconds", "1.2"]
    commands: List[List[str]] = [
        [corpus, "--out", "data", f"--{corpus}", str(root), *options],
        ["format", "--src", "data/train", "--dst", "dump/train", *formatting],
        ["format", "--src", "data/valid", "--dst", "dump/valid", "--fs", "8000"],
        ["combine", "--transcribed", "dump/train", "--untranscribed", "dump/valid", "--dst", "dump/both"],
        ["tokens", "--text", "dump/train/text", "--out", "tokens"],
    ]
    (tmp_path / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "kill_points.py"), "0", "5"], cwd=tmp_path / "runs",
        input=json.dumps(commands), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "5 times each" in done.stdout
    record_property("faults", int(re.search(r"(\d+) kills", done.stdout)[1]))
    assert (tmp_path / "runs/0/dump/train/out_of_range").exists()


@pytest.mark.faults("kill -9 of data preparation")
def test_workers_end_with_their_parent() -> None:
    code = (
        "import time; from espnet_kd.data.parallel import map_with_bar\n"
        "if __name__ == '__main__':\n"
        "    for _ in map_with_bar(time.sleep, [0.1] * 10000, nj=2, desc='x'):\n"
        "        print('working', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"working\n"
    children = psutil.Process(process.pid).children()
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not psutil.wait_procs(children, timeout=60)[1]
