"""The embedded corpus: the same settings give the same bytes, and test has voices of its own."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict

import numpy as np
import pytest

from espnet_kd.cli import UserError
from espnet_kd.data import espeak, mini
from espnet_kd.data.datadir import read_data_dir, read_map
from espnet_kd.data.sentences import make_sentence
from espnet_kd.data.validation import validate

ROOT = Path(__file__).parents[2]
SIZES = {"train": 12, "valid": 4, "test": 8}


@pytest.fixture
def engine() -> None:
    pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed (extra 'mini')")


def digests(out: Path) -> Dict[str, str]:
    return {str(p.relative_to(out)): hashlib.md5(p.read_bytes()).hexdigest() for p in sorted(out.rglob("*.wav"))}


@pytest.mark.trains
def test_same_bytes_whatever_nj(tmp_path: Path, engine: None) -> None:
    one = mini.prepare_mini(tmp_path / "a", sizes=SIZES, nj=1, seed=3)
    mini.prepare_mini(tmp_path / "b", sizes=SIZES, nj=2, seed=3)
    assert one == SIZES and len(digests(tmp_path / "a")) == sum(SIZES.values())
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    for split in SIZES:
        assert (tmp_path / "a" / split / "text").read_bytes() == (tmp_path / "b" / split / "text").read_bytes()
        assert validate(tmp_path / "a" / split, min_seconds=0.5, max_seconds=8) == SIZES[split]
        for text in read_map(tmp_path / "a" / split / "text").values():
            assert re.fullmatch(r"[A-Z]+( [A-Z]+)+", text)
        for utt in read_data_dir(tmp_path / "a" / split):
            assert utt.utt_id.startswith(f"{utt.speaker}-")
    mini.prepare_mini(tmp_path / "c", sizes=SIZES, nj=1, seed=4)
    assert not set(digests(tmp_path / "a").values()) & set(digests(tmp_path / "c").values())


def test_order_and_size_do_not_matter(engine: None) -> None:
    """A test utterance does not depend on the utterances spoken before it, nor on the size of train."""
    settings = mini.Settings(0, "en", 5, 20, 0.5)
    small = mini.plan(settings, {"train": 5, "valid": 3, "test": 6}, Path("x"))
    large = mini.plan(settings, {"train": 50, "valid": 3, "test": 6}, Path("x"))
    assert small[:9] == large[:9]
    with espeak.data_path() as data:
        forward = [mini.render_utterance(job, settings, data).tobytes() for job in small]
        backward = [mini.render_utterance(job, settings, data).tobytes() for job in reversed(small)]
    assert forward == backward[::-1]


def test_voices_and_sentences_are_disjoint(engine: None) -> None:
    mini._check_voices()
    names = {split: {v.split("+")[1].lower() for v in mini.voices_of(split)} for split in mini.VARIANTS}
    assert not names["train"] & names["valid"] and not names["test"] & (names["train"] | names["valid"])
    assert len(names["train"]) >= 50 and len(names["test"]) >= 10
    jobs = mini.plan(mini.Settings(0, "en", 5, 20, 0.3), mini.DEFAULT_SIZES, Path("x"))
    assert len({job.text for job in jobs}) == len(jobs) == sum(mini.DEFAULT_SIZES.values())
    assert {job.speaker for job in jobs if job.split == "test"} <= {n.replace(" ", "_") for n in names["test"]}
    words = {word for job in jobs for word in job.text.split()}
    assert 40 <= len(words) <= 60


def test_finished_is_kept_and_unfinished_made_anew(tmp_path: Path, engine: None) -> None:
    sizes = {"train": 2, "valid": 1, "test": 1}
    mini.prepare_mini(tmp_path, sizes=sizes)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    mini.prepare_mini(tmp_path, sizes=sizes)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    want = digests(tmp_path)
    (tmp_path / "mini.json").unlink()
    next(tmp_path.rglob("*.wav")).write_bytes(b"half a file")
    mini.prepare_mini(tmp_path, sizes=sizes)
    assert digests(tmp_path) == want
    shutil.rmtree(tmp_path / "train")  # the error of stage 2 then says that stage 1 makes it
    mini.prepare_mini(tmp_path, sizes=sizes)
    assert len(read_map(tmp_path / "train/text")) == 2 and digests(tmp_path) == want
    (tmp_path / "mini.json").write_text("{")
    mini.prepare_mini(tmp_path, sizes={**sizes, "train": 1}, snr_low=0, snr_high=0)
    assert len(digests(tmp_path)) == 3 and json.loads((tmp_path / "mini.json").read_text())["snr_low"] == 0


@pytest.mark.faults("a full disk")
def test_a_disk_that_is_full(tmp_path: Path, engine: None) -> None:
    mini.prepare_mini(tmp_path / "data", sizes={"train": 1, "valid": 1, "test": 1})
    options = ["mini", "--out", str(tmp_path / "data"), "--train", "2", "--valid", "1", "--test", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "espnet_kd.bin.asr_kd_data", *options], cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY)),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {tmp_path / 'data'}: File too large, and give the same command again" in done.stderr
    # The audio of the old data dirs is gone, so the wav.scp files that name it must be gone as well.
    assert not list(tmp_path.glob("data/*/wav.scp")) and not list(tmp_path.rglob("*.wav"))


def test_noise_has_the_asked_level(engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    job = mini.plan(mini.Settings(0, "en", 5, 20, 0), {"train": 1, "valid": 1, "test": 1}, Path("x"))[0]

    def snr_of(snr: float) -> float:
        settings = mini.Settings(0, "en", snr, snr, 0)
        with espeak.data_path() as data:
            noisy = mini.render_utterance(job, settings, data).astype(float)
            monkeypatch.setattr(mini, "_noise", lambda n, *_: np.zeros(n))
            clean = mini.render_utterance(job, settings, data).astype(float)
            monkeypatch.undo()
        noise = noisy - clean * (noisy @ clean) / (clean @ clean)
        return 10 * np.log10((clean @ clean) / (noise @ noise) * (noisy @ clean) ** 2 / (clean @ clean) ** 2)

    # The level of speech is measured before silence is added around it, so the result is a little below the given SNR.
    assert snr_of(20) == pytest.approx(20, abs=2.5) and snr_of(5) == pytest.approx(5, abs=2.5)


def test_mandarin(tmp_path: Path, engine: None) -> None:
    mini.prepare_mini(tmp_path, sizes={"train": 8, "valid": 2, "test": 2}, language="cmn")
    for split in ("train", "valid", "test"):
        validate(tmp_path / split)
        for text in read_map(tmp_path / split / "text").values():
            assert re.fullmatch(r"[\u4e00-\u9fff]+", text)


def test_digits_of_a_template_differ() -> None:
    texts = [make_sentence(np.random.default_rng(i))[1] for i in range(100)]
    called = [text.split()[3:] for text in texts if text.startswith("CALL ")]
    assert called and any(len(set(digits)) == 4 for digits in called)


def test_mistakes_are_named(tmp_path: Path, engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="snr_low 9 is above"):
        mini.prepare_mini(tmp_path, snr_low=9, snr_high=3)
    for low, high in ((float("inf"), float("inf")), (float("nan"), 9.0)):
        with pytest.raises(UserError, match="--snr_low .*: give numbers"):
            mini.prepare_mini(tmp_path, snr_low=low, snr_high=high)
    with pytest.raises(UserError, match="--language xx"):
        mini.prepare_mini(tmp_path, language="xx")
    with pytest.raises(UserError, match="--test is 0; it must be 1 or more"):
        mini.prepare_mini(tmp_path, sizes={"test": 0})
    with espeak.data_path() as data, pytest.raises(UserError, match="no voice 'nn-zz'"):
        espeak.synthesise("a", "nn-zz", rate=150, pitch=50, pitch_range=50, data=data)
    with monkeypatch.context() as m, pytest.raises(UserError, match="no more new sentences"):
        m.setattr(mini, "make_sentence", lambda *_: ("go", "GO"))
        mini.plan(mini.Settings(0, "en", 5, 20, 0), {"train": 1, "valid": 1, "test": 1}, tmp_path)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"espnet_kd\[mini\]"):
        mini.prepare_mini(tmp_path)


def test_a_long_path_to_the_engine_is_shortened(tmp_path: Path, engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    library, real = espeak._find()
    link = tmp_path / ("d" * 150) / "espeak-ng-data"
    link.parent.mkdir()
    link.symlink_to(real)
    want = espeak.synthesise("hello", "en-us", rate=150, pitch=50, pitch_range=50, data=str(real).encode())
    monkeypatch.setattr(espeak, "_find", lambda: (library, link))
    with espeak.data_path() as data:
        assert len(data) < 140
        assert espeak.synthesise("hello", "en-us", rate=150, pitch=50, pitch_range=50, data=data) == want
