"""AN4 in every form in which it is distributed."""

from __future__ import annotations

import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Dict, List

import numpy as np
import pytest
import soundfile

from espnet_kd.cli import UserError
from espnet_kd.data import an4
from espnet_kd.data.corpora import pick_speakers
from espnet_kd.data.datadir import read_data_dir, read_map
from espnet_kd.data.validation import validate

SHARED = Path(os.environ.get("ESPNET_KD_TEST_CORPORA", Path(__file__).parents[3] / "shared"))
FS = 16000


def voice(seed: int) -> np.ndarray:
    """A loud, smooth sound with little noise, int16; in the wrong byte order it would be noise."""
    t = np.arange(FS // 2) / FS
    x = 8000 * np.sin(2 * np.pi * (150 + 10 * seed) * t) + 50 * np.random.default_rng(seed).standard_normal(len(t))
    return x.astype(np.int16)


def make_tree(root: Path, form: str) -> Dict[str, np.ndarray]:
    """A tiny AN4: 4 training speakers with 2 recordings each, and 1 test speaker."""
    signals: Dict[str, np.ndarray] = {}
    for split, speakers in (("train", ["fash", "fbbh", "mabc", "mxyz"]), ("test", ["fcaw"])):
        lines: List[str] = []
        for speaker in speakers:
            for i in range(2):
                name = f"an{i}-{speaker}-b"
                folder = root / "wav" / ("an4_clstk" if split == "train" else "an4test_clstk") / speaker
                folder.mkdir(parents=True, exist_ok=True)
                signals[name] = x = voice(len(signals))
                if form.startswith("raw"):
                    (folder / f"{name}.raw").write_bytes(x.astype(">i2" if form == "raw_big" else "<i2").tobytes())
                elif form == "sph":
                    soundfile.write(folder / f"{name}.sph", x, FS, format="NIST", subtype="PCM_16")
                elif form == "opus":
                    soundfile.write(folder / f"{name}.opus", x, FS, format="OGG", subtype="OPUS")
                else:
                    soundfile.write(folder / f"{name}.{form}", x, FS)
                words = "yes Q" if i else "<s> FIFTY ++COUGH++ <sil> SEVEN"
                lines.append(f"{words} </s> ({name})" if split == "train" else f"GO {i} ({name})")
        (root / "etc").mkdir(exist_ok=True)
        (root / "etc" / f"an4_{split}.transcription").write_text("\n".join(lines) + "\n")
    return signals


@pytest.mark.parametrize("form", ["sph", "wav", "flac", "opus", "raw_big", "raw_little"])
def test_every_form(tmp_path: Path, form: str) -> None:
    signals = make_tree(tmp_path / "an4", form)
    counts = an4.prepare_an4(tmp_path / "data", tmp_path / "an4", valid_speakers=1)
    assert counts == {"train": 6, "valid": 2, "test": 2}
    for split in counts:
        assert validate(tmp_path / "data" / split, fs=FS) == counts[split]
        for utt in read_data_dir(tmp_path / "data" / split):
            name = utt.utt_id.split("-", 1)[1]
            samples, _ = soundfile.read(utt.audio, dtype="int16")
            assert len(samples) == utt.num_samples == len(signals[name])
            if form != "opus":
                np.testing.assert_array_equal(samples, signals[name])
            # Only headerless files are copied.
            assert (str(tmp_path / "data") in utt.audio) == form.startswith("raw")
    texts = {**read_map(tmp_path / "data/train/text"), **read_map(tmp_path / "data/valid/text")}
    assert texts["fash-an0-fash-b"] == "FIFTY SEVEN" and texts["fash-an1-fash-b"] == "YES Q"
    assert read_map(tmp_path / "data/test/text")["fcaw-an1-fcaw-b"] == "GO 1"


def test_the_byte_order_can_be_given(tmp_path: Path) -> None:
    signals = make_tree(tmp_path / "an4", "raw_big")
    for path in (tmp_path / "an4").rglob("*.raw"):
        path.rename(path.with_suffix(".RAW"))  # names as on a disc
    an4.prepare_an4(tmp_path / "data", tmp_path / "an4", valid_speakers=1, raw_endian="little")
    utt = next(iter(read_data_dir(tmp_path / "data/test")))
    np.testing.assert_array_equal(soundfile.read(utt.audio, dtype="int16")[0], signals["an0-fcaw-b"].byteswap())


def test_the_speakers_are_disjoint_and_test_is_whole(tmp_path: Path) -> None:
    make_tree(tmp_path / "an4", "wav")
    split_of = []
    for seed in range(8):
        an4.prepare_an4(tmp_path / "data", tmp_path / "an4", valid_speakers=2, seed=seed)
        names = {s: set(read_map(tmp_path / "data" / s / "spk2utt")) for s in ("train", "valid", "test")}
        assert names["train"] | names["valid"] == {"fash", "fbbh", "mabc", "mxyz"}
        assert not names["train"] & names["valid"] and names["test"] == {"fcaw"}
        split_of.append(frozenset(names["valid"]))
    assert len(set(split_of)) > 1
    assert pick_speakers(["b", "a", "c"], 2, 0) == pick_speakers(["c", "b", "a"], 2, 0)


def test_an_empty_transcription_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tree(tmp_path / "an4", "wav")
    path = tmp_path / "an4/etc/an4_train.transcription"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["<s> </s> (an0-fash-b)", *lines[1:]]))
    with caplog.at_level("INFO"):
        counts = an4.prepare_an4(tmp_path / "data", tmp_path / "an4", valid_speakers=1)
    assert counts["train"] + counts["valid"] == 7
    assert "left out: 1" in caplog.text and "an0-fash-b" in caplog.text and "transcription:1" in caplog.text


def test_a_set_of_which_nothing_is_left_is_explained(tmp_path: Path) -> None:
    make_tree(tmp_path / "an4", "wav")
    for path in (tmp_path / "an4/wav/an4test_clstk").rglob("*.wav"):
        soundfile.write(path, np.zeros(0), FS)
    with pytest.raises(UserError, match=r"test: no utterance is left; .*an1-fcaw-b \(no audio in .*an1-fcaw-b.wav\)"):
        an4.prepare_an4(tmp_path / "data", tmp_path / "an4", valid_speakers=1)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        an4.prepare_an4(tmp_path / "data", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="an4_train.transcription is not there"):
        an4.prepare_an4(tmp_path / "data", tmp_path / "empty")
    make_tree(tmp_path / "an4", "wav")
    with pytest.raises(UserError, match="--valid_speakers 4"):
        an4.prepare_an4(tmp_path / "data", tmp_path / "an4", valid_speakers=4)
    (tmp_path / "an4/wav/an4_clstk/fash/an1-fash-b.wav").unlink()
    with pytest.raises(UserError, match="transcription:2: recording 'an1-fash-b' has no audio"):
        an4.prepare_an4(tmp_path / "data", tmp_path / "an4")
    (tmp_path / "an4/etc/an4_train.transcription").write_text("YES\n")
    with pytest.raises(UserError, match="transcription:1: expected"):
        an4.prepare_an4(tmp_path / "data", tmp_path / "an4")


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(UserError, match="no route to host.*\n.*--an4 DIR"):
        an4.prepare_an4(tmp_path / "data", downloads=tmp_path / "downloads")
    assert not list(tmp_path.glob("downloads/*"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot download www.example.org/an4/.*\n.*--an4 DIR"):
        an4.prepare_an4(tmp_path / "data", downloads=tmp_path / "downloads", mirror="www.example.org/an4")

    make_tree(tmp_path / "src/an4", "sph")
    with tarfile.open(tmp_path / "an4_sphere.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "src/an4", "an4")
    url = (tmp_path / "an4_sphere.tar.gz").as_uri()
    root = an4.find_an4(an4.download_an4(tmp_path / "downloads", url))
    assert root == tmp_path / "downloads/an4_sphere/an4" and len(an4.find_audio(root)) == 10
    # The second time, the corpus is there, and no network is needed.
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    assert an4.prepare_an4(tmp_path / "data", downloads=tmp_path / "downloads", valid_speakers=1)["test"] == 2


def test_an_archive_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    (tmp_path / "downloads").mkdir()
    with tarfile.open(tmp_path / "downloads/an4_sphere.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "x", "../../evil")
    with pytest.raises(UserError, match="cannot be unpacked"):
        an4.download_an4(tmp_path / "downloads")
    assert not (tmp_path / "evil").exists() and not (tmp_path.parent / "evil").exists()


def test_a_python_that_cannot_unpack_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path / "src/an4", "sph")
    (tmp_path / "downloads").mkdir()
    with tarfile.open(tmp_path / "downloads/an4_sphere.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "src/an4", "an4")
    monkeypatch.delattr(tarfile, "data_filter")  # as in Python before 3.10.12 and 3.11.4
    with pytest.raises(UserError, match="an4_sphere.tar.gz: Python .* cannot unpack it safely.*by hand"):
        an4.prepare_an4(tmp_path / "data", downloads=tmp_path / "downloads")


@pytest.mark.trains
@pytest.mark.skipif(not (SHARED / "an4").is_dir(), reason=f"no AN4 in {SHARED} (ESPNET_KD_TEST_CORPORA)")
def test_the_real_corpus(tmp_path: Path) -> None:
    counts = an4.prepare_an4(tmp_path / "data", SHARED / "an4")
    assert counts["train"] + counts["valid"] == 948 and counts["test"] == 130
    assert 80 <= counts["valid"] <= 120
    speakers = {s: set(read_map(tmp_path / "data" / s / "spk2utt")) for s in counts}
    assert len(speakers["train"]) == 66 and len(speakers["valid"]) == 8 and len(speakers["test"]) == 10
    assert not speakers["train"] & speakers["valid"] and not speakers["test"] & (speakers["train"] | speakers["valid"])
    for split in counts:
        validate(tmp_path / "data" / split)
    assert read_map(tmp_path / "data/test/text")["fcaw-an406-fcaw-b"] == "RUBOUT G M E F THREE NINE"
