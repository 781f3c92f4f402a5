"""Odd data dirs in stages 2 and 3 end in one of the ways that fuzzing.py allows."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from fuzzing import contents, damage_file, examples, survives
from hypothesis import given
from hypothesis import strategies as st

from espnet_kd.bin import asr_kd_data

pytestmark = pytest.mark.usefixtures("elsewhere")

AUDIO = {"a": (16000, 1, 0.5), "b": (8000, 1, 0.4), "c": (16000, 2, 0.3), "d": (16000, 1, 0.02), "e": (16000, 1, 0.6)}
FIELDS = [
    "",
    "nan",
    "inf",
    "-1",
    "1e308",
    "0.1",
    "x",
    "..",
    "a/b",
    "../a",
    "\0",
    "x" * 300,
    "x" * 5000,
    "é",
    "a\u3000b",
]
FIELDS += [
    "\u2028",
    "\x85",
    "-",
    "cat a.wav |",
    "/dev/null",
    "absent.wav",
    ".",
    "{src}",
    "{src}/pipe",
    "{src}/loop",
    "{src}/text",
]
OPTIONS = [["--text", "optional"], ["--text", "none"], ["--speed_factors", "0.9", "1.0"], ["--drop_out_of_range"]]
OPTIONS += [["--min_seconds", "0"], ["--fs", "8000"], ["--fs", "-1"], ["--fs", "x"], ["--speed_factors", "nan"]]
OPTIONS += [["--max_seconds", "inf"], ["--max_seconds", "nan"], ["--min_seconds", "-inf"], ["--nj", "0"]]


def write_data_dir(directory: Path, segmented: bool) -> None:
    directory.mkdir()
    rng = np.random.default_rng(0)
    for name, (rate, channels, seconds) in AUDIO.items():
        suffix = "flac" if name == "e" else "wav"
        samples = 0.1 * rng.standard_normal((int(rate * seconds), channels))
        soundfile.write(directory / f"{name}.{suffix}", samples, rate, subtype="PCM_16")
    audio = {name: f"{directory}/{name}.{'flac' if name == 'e' else 'wav'}" for name in AUDIO}
    utts = {f"s-{name}{i}": name for name in AUDIO for i in range(1 + segmented)}
    files = {"wav.scp": audio if segmented else {utt: audio[name] for utt, name in utts.items()}}
    files["text"] = {utt: f"word {utt} é" for utt in utts}
    files["utt2spk"] = dict.fromkeys(utts, "s")
    files["spk2utt"] = {"s": " ".join(sorted(utts))}
    if segmented:
        files["segments"] = {utt: f"{name} 0.0 {AUDIO[name][2] / 2}" for utt, name in utts.items()}
    for name, lines in files.items():
        (directory / name).write_text("".join(f"{k} {v}\n" for k, v in sorted(lines.items())))
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "pipe")


@pytest.mark.trains
@pytest.mark.faults("odd data dirs (fuzz)")
@pytest.mark.parametrize("segmented", [False, True], ids=["files", "segments"])
def test_data_dirs(segmented, tmp_path, record_property):
    base = tmp_path / "base"
    src = tmp_path / "data"  # always at this place, because wav.scp has absolute paths
    write_data_dir(src, segmented)
    src.rename(base)
    texts = ["wav.scp", "text", "utt2spk", "spk2utt", *(["segments"] if segmented else [])]
    odd = [x.format(src=src).encode() for x in FIELDS] + [b"\xff", b"\xef\xbb\xbf"]
    counts = [0, 0]

    def restore() -> None:
        shutil.rmtree(src, ignore_errors=True)
        shutil.copytree(base, src, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
        os.mkfifo(src / "pipe")

    def check(*options: str) -> None:
        before = contents(src)
        survives(lambda: asr_kd_data.main(["validate", str(src), "--fs", "0", "--min_seconds", "0"]))
        with tempfile.TemporaryDirectory(dir=tmp_path) as out:
            dst = Path(out) / "dump"
            done = survives(lambda: asr_kd_data.main(["format", "--src", str(src), "--dst", str(dst), *options]))
            assert done == (dst / "wav.scp").exists() and {p.name for p in Path(out).iterdir()} <= {"dump"}
            if done:  # the written data dir must be valid
                wide = ["--no_text", "--allow_empty", "--fs", "0", "--min_seconds", "0", "--max_seconds", "inf"]
                asr_kd_data.main(["validate", str(dst), *wide])
        assert contents(src) == before
        counts[done] += 1

    @examples(100)
    @given(st.data())
    def damaged(data):
        restore()
        for _ in range(data.draw(st.integers(1, 2))):
            name = data.draw(st.sampled_from([*texts, *texts, *(p.name for p in sorted(base.glob("*.*")))]))
            if (src / name).is_file():
                damage_file(data.draw, src / name, odd, name in texts)
        check(*sum(data.draw(st.lists(st.sampled_from(OPTIONS), max_size=2)), []))

    damaged()
    for name in texts if segmented else []:  # put each odd word into each field of the first line
        first, rest = (base / name).read_bytes().split(b"\n", 1)
        for i, word in itertools.product(range(min(4, len(first.split()))), odd):
            fields = first.split(b" ")
            fields[i] = word
            restore()
            (src / name).write_bytes(b" ".join(fields) + b"\n" + rest)
            check()
    record_property("faults", sum(counts))
    assert min(counts) > 10, counts
