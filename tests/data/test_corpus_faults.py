"""Faults of a corpus or a disk in stage 1: one clear message, no half-written data dir, and after a repair the same
command succeeds."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Callable, Dict

import numpy as np
import pytest
import soundfile
from tiny_layouts import FS, LAYOUTS, snapshot, write_aishell, write_librispeech, write_noise, write_tedlium2

from espnet_kd.cli import UserError
from espnet_kd.data import datadir
from espnet_kd.data.aishell import prepare_aishell
from espnet_kd.data.datadir import read_data_dir
from espnet_kd.data.formatting import format_data
from espnet_kd.data.librispeech import prepare_librispeech
from espnet_kd.data.tedlium2 import prepare_tedlium2
from espnet_kd.data.validation import validate

ROOT = Path(__file__).parents[2]
CORPORA: Dict[str, Callable] = {
    "librispeech": partial(prepare_librispeech, train_parts=["train-clean-100"], valid_parts=["dev-clean"]),
    "aishell": prepare_aishell,
    "tedlium2": prepare_tedlium2,
}
WRITE = {"librispeech": write_librispeech, "aishell": write_aishell, "tedlium2": write_tedlium2}
TRANSCRIPT = {
    "librispeech": "train-clean-100/26/7/26-7.trans.txt",
    "aishell": "transcript/aishell_transcript_v0.8.txt",
    "tedlium2": "train/stm/CD_2011.stm",
}
AUDIO = {
    "librispeech": "train-clean-100/26/7/26-7-0001.flac",
    "aishell": "wav/train/S0003/BAC009S0003W0001.wav",
    "tedlium2": "train/sph/CD_2011.sph",
}
LIBRI, AI, TED = TRANSCRIPT["librispeech"], TRANSCRIPT["aishell"], TRANSCRIPT["tedlium2"]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def bad_bytes(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"\n", b" caf\xe9\n") + b"".join(lines[2:]))


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def empty_audio(path: Path) -> None:
    form = {".sph": "NIST", ".wav": "WAV", ".flac": "FLAC"}[path.suffix]
    soundfile.write(path, np.zeros(0), FS, format=form, subtype="PCM_16")


def shorten(path: Path) -> None:
    head = path.read_bytes()[:1024]
    head = head.replace(b"sample_coding -s3 pcm", b"sample_coding -s26 pcm,embedded-shorten-v2.00")[:1024]
    path.write_bytes(head + b"ajkg\x02" + bytes(1000))


# For each fault: the damage to the corpus, the message, and whether --skip_faulty can go on.
FAULTS = {
    "librispeech": {
        "missing part": (lambda r: shutil.rmtree(r / "dev-clean"), "dev-clean: this part is missing; fetch", False),
        "part without speakers": (
            lambda r: [shutil.rmtree(r / "dev-clean"), (r / "dev-clean").mkdir()],
            "dev-clean: no utterance below", False,
        ),
        "empty transcript": (
            lambda r: edit(r / LIBRI, "26-7-0001 WORDS OF 1", "26-7-0001"),
            f"{LIBRI}:2: empty transcript: 26-7-0001; fill it in", True,
        ),
        "transcript without audio": (
            lambda r: (r / AUDIO["librispeech"]).unlink(),
            f"{LIBRI}:2: transcript without audio: 26-7-0001; unpack its part again", True,
        ),
        "audio without transcript": (
            lambda r: edit(r / LIBRI, "26-7-0001 WORDS OF 1\n", ""),
            f"{LIBRI}: audio without transcript: 26-7-0001", True,
        ),
        "no transcript file": (
            lambda r: (r / LIBRI).unlink(), "26/7: audio without transcript: 26-7-0000; .*missing", True,
        ),
        "foreign id": (
            lambda r: edit(r / LIBRI, "26-7-0001", "27-7-0001"), f"{LIBRI}:2: '27-7-0001' does not begin", False,
        ),
        "duplicate id": (
            lambda r: edit(r / LIBRI, "26-7-0000 WORDS OF 0\n", "26-7-0001 MORE\n26-7-0000 WORDS OF 0\n"),
            f"{LIBRI}:3: utterance '26-7-0001' stands twice", False,
        ),
        "duplicate file": (
            lambda r: write_noise((r / LIBRI).parent / "26-7-0001.wav"), "'26-7-0001' is there twice", False,
        ),
    },
    "aishell": {
        "missing part": (lambda r: shutil.rmtree(r / "wav/dev"), "wav/dev: this set is missing", False),
        "missing transcript file": (lambda r: (r / AI).unlink(), f"{AI}: no such file; unpack", False),
        "empty transcript": (
            lambda r: edit(r / AI, "BAC009S0003W0001 你好 世界 二", "BAC009S0003W0001 "),
            f"{AI}:5: empty transcript: BAC009S0003W0001", True,
        ),
        "duplicate line": (
            lambda r: edit(r / AI, "BAC009S0003W0002", "BAC009S0003W0001"),
            f"{AI}: utterance 'BAC009S0003W0001' stands in lines 5 and 6", False,
        ),
        "duplicate id": (
            lambda r: write_noise(r / "wav/dev/S0003/BAC009S0003W0001.wav"),
            "'BAC009S0003W0001' is two files .*wav/train/S0003.*wav/dev/S0003.*; remove one", False,
        ),
    },
    "tedlium2": {
        "missing part": (lambda r: shutil.rmtree(r / "dev"), "dev/stm: this directory is missing", False),
        "empty transcript": (
            lambda r: (r / TED).write_text(""), f"{TED}: empty transcript: CD_2011; unpack", True,
        ),
        "transcript without audio": (
            lambda r: (r / AUDIO["tedlium2"]).unlink(),
            f"{TED}: transcript without audio: CD_2011; sph/CD_2011.sph", True,
        ),
        "audio without transcript": (
            lambda r: (r / TED).unlink(), "CD_2011.sph: audio without transcript: CD_2011; stm/CD_2011.stm", True,
        ),
        "end before start": (
            lambda r: edit(r / TED, "2.00 3.25", "3.25 2.00"), f"{TED}:2: start 3.25 and end 2 make no segment", True,
        ),
        "end without end": (
            lambda r: edit(r / TED, "2.00 3.25", "2.00 inf"), f"{TED}:2: start 2 and end inf make no segment", True,
        ),
        "no number": (lambda r: edit(r / TED, "2.00", "two"), f"{TED}:2: expected 'talk channel", False),
        "another talk": (lambda r: edit(r / TED, "CD_2011 1", "XY_2011 1"), f"{TED}:1: this line is of", False),
        "behind the end": (
            lambda r: edit(r / TED, "2.00 3.25", "4.50 5.25"),
            "segment behind the end of the recording: CD_2011-0000450", True,
        ),
        "duplicate id": (
            lambda r: (r / TED).write_text((r / TED).read_text() + "CD_2011 1 CD_2011 2 3.25 <o,f0,male> other\n"),
            "CD_2011-0000200-0000325' .2 to 3.25 s. comes twice", False,
        ),
        "shorten": (
            lambda r: shorten(r / AUDIO["tedlium2"]), "compressed with shorten.*sph2pipe -f wav .*CD_2011.wav", True,
        ),
    },
}  # fmt: skip
for corpus in CORPORA:
    audio = AUDIO[corpus]
    FAULTS[corpus].update({
        "truncated audio": (lambda r, a=audio: cut(r / a), f"{audio} is cut: .*; fetch or convert it again", True),
        "truncated header": (
            lambda r, a=audio: (r / a).write_bytes((r / a).read_bytes()[:30]), f"{audio}.*: unusable audio: ", True,
        ),
        "zero-length audio": (lambda r, a=audio: empty_audio(r / a), f"{audio}: audio of zero length", True),
        "bad UTF-8": (
            lambda r, t=TRANSCRIPT[corpus]: bad_bytes(r / t), f"{TRANSCRIPT[corpus]}:2: not UTF-8 .*at byte", False,
        ),
        "nothing there": (lambda r: [shutil.rmtree(r), r.mkdir()], "nothing of it is there; give the directory", False),
    })  # fmt: skip


@pytest.mark.faults("faulty corpora")
@pytest.mark.parametrize(("corpus", "fault"), [(c, f) for c in CORPORA for f in FAULTS[c]])
def test_a_fault_of_the_corpus(corpus: str, fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, out = WRITE[corpus](tmp_path / "corpus"), tmp_path / "data"
    damage, message, skippable = FAULTS[corpus][fault]
    CORPORA[corpus](out, root)
    want = snapshot(out)
    shutil.rmtree(out)
    damage(root)
    with pytest.raises(UserError, match=message) as e:
        CORPORA[corpus](out, root)
    assert "\n" not in str(e.value)
    # Each data dir is whole or absent, and no other file is left.
    assert not (out / "train").exists()
    assert not out.exists() or not list(out.iterdir())
    if skippable:
        with caplog.at_level("INFO"):
            counts = CORPORA[corpus](out, root, skip_faulty=True)
        assert counts["train"] < {"librispeech": 12, "aishell": 6, "tedlium2": 4}[corpus]
        assert re.search(r"train: left out: [12]: [12] ", caplog.text)
        assert (out / "train/left_out").exists() and validate(out / "train") == counts["train"]
    shutil.rmtree(root)
    WRITE[corpus](root)
    CORPORA[corpus](out, root)
    assert snapshot(out) == want


@pytest.mark.faults("faulty corpora")
@pytest.mark.parametrize("corpus", list(CORPORA))
def test_a_set_of_which_nothing_is_left_is_explained(corpus: str, tmp_path: Path) -> None:
    root = WRITE[corpus](tmp_path / "corpus")
    part = root / {"librispeech": "dev-clean", "aishell": "wav/dev", "tedlium2": "dev/sph"}[corpus]
    files = sorted(p for p in part.rglob("*.*") if p.suffix in (".flac", ".wav", ".sph"))
    for path in files:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=f"valid: no utterance is left; .*{len(files)} audio of .*{files[0].stem}"):
        CORPORA[corpus](tmp_path / "data", root, skip_faulty=True)
    assert not (tmp_path / "data/valid").exists()


@pytest.mark.faults("faulty corpora")
@pytest.mark.parametrize("corpus", list(CORPORA))
def test_another_sampling_rate_is_said_once_and_resampled(
    corpus: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, out = WRITE[corpus](tmp_path / "corpus"), tmp_path / "data"
    seconds = 4.0 if corpus == "tedlium2" else 0.5
    for path in [root / AUDIO[corpus], *(root / AUDIO[corpus]).parent.glob("26-7-0000.flac")]:
        write_noise(path, seconds, fs=8000)
    with caplog.at_level("WARNING"):
        CORPORA[corpus](out, root)
    told = [r.getMessage() for r in caplog.records if "8000 Hz" in r.getMessage()]
    files = {"librispeech": "2 of 12", "aishell": "1 of 6", "tedlium2": "1 of 2"}[corpus]
    assert len(told) == 1 and f"{files} audio files have 8000 Hz, not 16000" in told[0]
    format_data(out / "train", tmp_path / "dump", min_seconds=0)
    validate(tmp_path / "dump", fs=FS)
    total = sum(u.num_samples for u in read_data_dir(tmp_path / "dump"))
    assert total / FS == pytest.approx({"librispeech": 6, "aishell": 3, "tedlium2": 5}[corpus], abs=0.01)


@pytest.mark.faults("a full disk")
@pytest.mark.parametrize("corpus", list(CORPORA))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_system_that_refuses_leaves_the_old_or_nothing(
    corpus: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = WRITE[corpus](tmp_path / "corpus"), tmp_path / "data"

    def refuse(*_) -> None:
        raise OSError(code, os.strerror(code))

    # The system refuses first at the end of writing, then at the first temporary file.
    for where, name in ((os, "fsync"), (datadir.tempfile, "TemporaryFile")):
        with monkeypatch.context() as m:
            m.setattr(where, name, lambda *_, **__: refuse())
            with pytest.raises(UserError, match=f"{os.strerror(code)}; .*, and give the same command again"):
                CORPORA[corpus](out, root)
        assert not out.exists() or not snapshot(out)
    CORPORA[corpus](out, root)
    first = snapshot(out)
    words = {"librispeech": ("WORDS", "W"), "aishell": ("世界", "是"), "tedlium2": ("one", "1")}[corpus]
    edit(root / TRANSCRIPT[corpus], *words)
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match=os.strerror(code)):
            CORPORA[corpus](out, root)
    assert snapshot(out) == first
    CORPORA[corpus](out, root)
    assert snapshot(out) != first


@pytest.mark.faults("a place that cannot be written")
def test_no_write_permission(tmp_path: Path) -> None:
    root = write_aishell(tmp_path / "corpus")
    (tmp_path / "data").write_text("a file in the directory's place")
    with pytest.raises(UserError, match=f"{tmp_path / 'data'}.*: (Not a directory|File exists)"):
        prepare_aishell(tmp_path / "data", root)


@pytest.mark.faults("a place that cannot be written")
def test_a_directory_that_may_not_be_written() -> None:
    # The test cannot use pytest's own directory, because only its owner may enter it.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root, out = write_aishell(Path(folder) / "corpus"), Path(folder) / "out"
        out.mkdir(mode=0o555)
        code = (
            "import os, sys; from espnet_kd.bin import asr_kd_data; from espnet_kd.cli import run\n"
            "from espnet_kd.data import aishell\n"
            "os.geteuid() == 0 and os.seteuid(65534)\n"  # root may write anywhere
            "run(lambda _: asr_kd_data.main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, "aishell", "--out", f"{out}/data", "--aishell", str(root)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"error: {out}/data: Permission denied; see who owns it" in done.stderr
        assert not list(out.iterdir())


@pytest.mark.faults("faulty corpora")
@pytest.mark.parametrize("corpus", list(CORPORA))
def test_a_cut_file_of_the_real_layouts(corpus: str, tmp_path: Path) -> None:
    """The faults above are in files written here; this test cuts files of real encoders as well."""
    name = {"librispeech": "LibriSpeech", "aishell": "data_aishell", "tedlium2": "TEDLIUM_release2"}[corpus]
    if not (LAYOUTS / name).is_dir():
        pytest.skip(f"no {name} in {LAYOUTS} (ESPNET_KD_TEST_CORPORA)")
    shutil.copytree(LAYOUTS / name, tmp_path / "corpus")
    path = sorted(p for p in (tmp_path / "corpus").rglob("*") if p.suffix in (".flac", ".wav", ".sph"))[-1]
    options = {"valid_parts": ["test-clean"]} if corpus == "librispeech" else {}
    CORPORA[corpus](tmp_path / "whole", tmp_path / "corpus", **options)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path} is cut"):
        CORPORA[corpus](tmp_path / "data", tmp_path / "corpus", **options)
