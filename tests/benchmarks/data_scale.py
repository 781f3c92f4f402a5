"""Prepare corpora of 100,000 and 300,000 utterances (stages 1 to 3); print peak memory and time of each command.

    python tests/benchmarks/data_scale.py --lines 100000 300000 --dir /tmp/data_scale --nj 2

The listing has LibriSpeech's layout, 33 words a line; all utterances share one tiny FLAC. The peak is the sum of the
peaks (VmHWM) of the command's processes, so memory that they share is counted several times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np
import soundfile

ROOT = Path(__file__).parents[2]
PART = "train-clean-100"


def write_listing(root: Path, lines: int, seconds: float = 0.2, words: int = 33) -> Path:
    """A LibriSpeech of one part: 100 utterances a chapter, 1,000 a speaker; return the directory that holds it."""
    rng = random.Random(0)
    syllables = [a + b for a in "BCDFGLMNPRST" for b in "AEIOU"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(5000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, 5001)))  # Zipf's law
    root.mkdir(parents=True, exist_ok=True)
    shared = (root / "shared.flac").resolve()
    soundfile.write(shared, 0.1 * np.random.default_rng(0).standard_normal(int(seconds * 16000)), 16000)
    for first in range(0, lines, 100):
        speaker, chapter = 1000 + first // 1000, 1 + first // 100
        folder = root / PART / str(speaker) / str(chapter)
        folder.mkdir(parents=True)
        names = [f"{speaker}-{chapter}-{i:04d}" for i in range(min(100, lines - first))]
        for name in names:
            os.symlink(shared, folder / f"{name}.flac")
        texts = (" ".join(rng.choices(vocabulary, cum_weights=weights, k=words)) for _ in names)
        content = "".join(f"{name} {text}\n" for name, text in zip(names, texts))
        (folder / f"{speaker}-{chapter}.trans.txt").write_text(content)
    return root


def _peaks(pid: int, peaks: Dict[int, int]) -> None:
    """Update the peak RSS in kB of a process and of all processes below it."""
    try:
        with open(f"/proc/{pid}/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        peaks[pid] = max(peaks.get(pid, 0), int(fields.get("VmHWM", "0 kB").split()[0]))
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            children = f.read().split()
    except OSError:
        return  # the process has ended
    for child in children:
        _peaks(int(child), peaks)


def measure(command: Sequence[str], cwd: Path) -> Dict[str, float]:
    """Run a subcommand of asr_kd_data; return seconds by the clock, seconds of CPU, and peak MB, children included."""
    peaks: Dict[int, int] = {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start, before = time.monotonic(), os.times()
    with open(cwd / "log", "ab") as log:
        full = [sys.executable, "-m", "espnet_kd.bin.asr_kd_data", *command]
        process = subprocess.Popen(full, cwd=cwd, stdout=log, stderr=log, env=environment)
        while process.poll() is None:
            _peaks(process.pid, peaks)
            time.sleep(0.05)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)}: exit {process.returncode}; see {cwd / 'log'}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": time.monotonic() - start, "cpu": cpu, "mb": sum(peaks.values()) / 1024, "processes": len(peaks)}


def prepare(lines: int, args: argparse.Namespace) -> List[Dict]:
    """Run stages 1 to 3 on a listing of ``lines`` utterances; return a row for each command."""
    work = Path(args.dir) / str(lines)
    shutil.rmtree(work, ignore_errors=True)
    write_listing(work / "LibriSpeech", lines)
    nj, factors = str(args.nj), [str(x) for x in args.speed_factors]
    raw = "dump/raw/train_sp"
    commands = {
        "librispeech": ["--out", "data", "--librispeech", "LibriSpeech", "--train_parts", PART, "--valid_parts", "",
                        "--test_parts", "", "--nj", nj],
        "format": ["--src", "data/train", "--dst", raw, "--speed_factors", *factors, "--drop_out_of_range",
                   "--nj", nj],
        "tokens": ["--text", f"{raw}/text", "--out", "data/token_list/bpe", "--token_type", "bpe",
                   "--nbpe", str(args.nbpe)],
        "validate": [raw, "--token_type", "bpe", "--token_list", "data/token_list/bpe/tokens.txt", "--nj", nj],
    }  # fmt: skip
    rows = []
    for name, options in commands.items():
        row = {"command": name, "lines": lines, **measure([name, *options], work)}
        with open(work / ("data/train" if name == "librispeech" else raw) / "utt2spk") as f:
            row["utterances"] = sum(1 for _ in f)
        rows.append(row)
        scale = 1e5 / row["utterances"]
        print(f"{name:12s} {lines:8,d} lines {row['utterances']:9,d} utterances {row['mb']:6.0f} MB "
              f"{row['seconds']:7.1f} s, {row['cpu']:7.1f} s of CPU; per 100,000 utterances "
              f"{row['seconds'] * scale:6.1f} s, {row['cpu'] * scale:6.1f} s", flush=True)  # fmt: skip
    if not args.keep:
        shutil.rmtree(work)
    return rows


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--dir", default="data_scale", help="where it works; about 6 kB for each copy of an utterance")
    parser.add_argument("--nj", type=int, default=2)
    parser.add_argument("--speed_factors", type=float, nargs="+", default=[0.9, 1.0, 1.1])
    parser.add_argument("--nbpe", type=int, default=500)
    parser.add_argument("--keep", action="store_true", help="leave what was made")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args(argv)
    rows = [row for lines in args.lines for row in prepare(lines, args)]
    for name in dict.fromkeys(row["command"] for row in rows):
        peaks = [row["mb"] for row in rows if row["command"] == name]
        print(f"{name}: highest / first peak {max(peaks) / peaks[0]:.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
