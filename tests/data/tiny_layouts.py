"""Miniature corpora in their original layouts, with noise for speech; each test writes its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict

import numpy as np
import pytest
import soundfile

from espnet_kd.data.datadir import read_data_dir

FS = 16000
SHARED = Path(os.environ.get("ESPNET_KD_TEST_CORPORA", Path(__file__).parents[3] / "shared"))
LAYOUTS = SHARED / "layouts"
PARTS = {"train-clean-100": "19 26 118", "dev-clean": "84", "test-clean": "61 1089", "test-other": "367"}


def needs_layout(name: str):
    """Skip a test if the real utterances are not available."""
    return pytest.mark.skipif(not (LAYOUTS / name).is_dir(), reason=f"no {name} in {LAYOUTS} (ESPNET_KD_TEST_CORPORA)")


def write_noise(path: Path, seconds: float = 0.5, fs: int = FS) -> Path:
    """Write noise; the same name gives the same samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = 0.1 * np.random.default_rng(sum(path.name.encode())).standard_normal(int(seconds * fs))
    form = {".sph": "NIST", ".wav": "WAV", ".flac": "FLAC"}[path.suffix]
    soundfile.write(path, x, fs, format=form, subtype="PCM_16")
    return path


def write_librispeech(root: Path, parts: Dict[str, str] = PARTS) -> Path:
    """Each speaker has chapters 7 and 12 with two utterances each."""
    for part, speakers in parts.items():
        for speaker in speakers.split():
            for chapter in ("7", "12"):
                folder = root / part / speaker / chapter
                names = [f"{speaker}-{chapter}-{i:04d}" for i in range(2)]
                for name in names:
                    write_noise(folder / f"{name}.flac")
                lines = "".join(f"{name} WORDS OF {name[-1]}\n" for name in names)
                (folder / f"{speaker}-{chapter}.trans.txt").write_text(lines)
    return root


def write_aishell(root: Path) -> Path:
    """Two training speakers, and one each for dev and test; three utterances each."""
    lines = []
    for split, speakers in (("train", "S0002 S0003"), ("dev", "S0724"), ("test", "S0764")):
        for speaker in speakers.split():
            for i in range(3):
                name = f"BAC009{speaker}W{i:04d}"
                write_noise(root / "wav" / split / speaker / f"{name}.wav")
                lines.append(f"{name} 你好 世界 {'一二三'[i]}\n")
    (root / "transcript").mkdir()
    (root / "transcript" / "aishell_transcript_v0.8.txt").write_text("".join(lines), encoding="utf-8")
    return root


def write_tedlium2(root: Path) -> Path:
    """Two training talks, and one each for dev and test; each has two segments, and a gap in dev and test."""
    for split, talks in (("train", "AB_2010 CD_2011"), ("dev", "EF_2012X"), ("test", "GH_2013")):
        for talk in talks.split():
            write_noise(root / split / "sph" / f"{talk}.sph", 4.0)
            lines = [
                f"{talk} 1 {talk} 0.50 1.75 <o,f0,male> it 's one {{BREATH}} word\n",
                f"{talk} 1 {talk} 2.00 3.25 <o,f0,male> <unk> and two(2) <sil> words\n",
            ]
            if split != "train":
                lines.insert(1, f"{talk} 1 inter_segment_gap 1.75 2.00 <o,,unknown> ignore_time_segment_in_scoring\n")
            (root / split / "stm").mkdir(parents=True, exist_ok=True)
            (root / split / "stm" / f"{talk}.stm").write_text("".join(lines))
    return root


def seconds_of(data_dir: Path) -> float:
    """Total duration by the audio files' own headers, or by the segments."""
    total = 0.0
    for u in read_data_dir(data_dir):
        info = soundfile.info(u.audio)
        total += info.frames / info.samplerate if u.end is None else u.end - u.start
    return total


def snapshot(root: Path) -> Dict[str, bytes]:
    """Every file below ``root``, hidden ones too, with its content."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
