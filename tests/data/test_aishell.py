"""AISHELL-1: the official transcript, packed and unpacked speakers, and audio or transcripts without their partner."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import soundfile
from tiny_layouts import LAYOUTS, needs_layout, seconds_of, snapshot, write_aishell

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data import datadir
from espnet_kd.data.aishell import prepare_aishell
from espnet_kd.data.datadir import read_data_dir, read_map
from espnet_kd.data.validation import validate


def pack(root: Path, remove: bool = True) -> None:
    """Pack each speaker as in the original: ``wav/S0002.tar.gz`` holds ``train/S0002/*.wav``."""
    for speaker in list((root / "wav").glob("*/S*")):
        with tarfile.open(root / "wav" / f"{speaker.name}.tar.gz", "w:gz") as tar:
            tar.add(speaker, f"{speaker.parent.name}/{speaker.name}")
        if remove:
            shutil.rmtree(speaker)


def test_the_sets(tmp_path: Path) -> None:
    root = write_aishell(tmp_path / "data_aishell")
    assert prepare_aishell(tmp_path / "data", tmp_path, nj=2) == {"train": 6, "valid": 3, "test": 3}
    assert read_map(tmp_path / "data/train/text")["BAC009S0003W0001"] == "你好世界二"
    assert list(read_map(tmp_path / "data/valid/spk2utt")) == ["S0724"]
    for u in read_data_dir(tmp_path / "data/train"):
        assert u.num_samples == 8000 and u.audio == str(root / "wav/train" / u.speaker / f"{u.utt_id}.wav")
    assert all(validate(tmp_path / "data" / name) for name in ("train", "valid", "test"))


def test_packed_speakers(tmp_path: Path) -> None:
    root = write_aishell(tmp_path / "data_aishell")
    prepare_aishell(tmp_path / "plain", root)
    pack(root)
    # A kill during unpacking leaves such a file.
    half = tmp_path / "unpacked/.S0002.partial/train/S0002/BAC009S0002W0009.wav"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"RIFF")
    asr_kd_data.main(["aishell", "--out", f"{tmp_path}/data", "--aishell", str(root), "--unpacked",
                      f"{tmp_path}/unpacked"])  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "unpacked").iterdir()) == ["dev", "test", "train"]
    for name in ("train", "valid", "test"):
        for file in ("text", "utt2spk", "utt2num_samples"):
            assert (tmp_path / "data" / name / file).read_text() == (tmp_path / "plain" / name / file).read_text()
        assert validate(tmp_path / "data" / name)
    assert not (tmp_path / "unpacked/train/S0002" / half.name).exists()
    first = snapshot(tmp_path)
    prepare_aishell(tmp_path / "data", root, unpacked=tmp_path / "unpacked")
    assert snapshot(tmp_path) == first


def test_archives_beside_unpacked_speakers_are_not_unpacked_again(tmp_path: Path) -> None:
    root = write_aishell(tmp_path / "data_aishell")
    pack(root, remove=False)
    assert prepare_aishell(tmp_path / "data", root, unpacked=tmp_path / "unpacked")["train"] == 6
    assert not (tmp_path / "unpacked").exists()


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    root = write_aishell(tmp_path / "data_aishell")
    pack(root)
    archive = root / "wav/S0724.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(UserError, match=f"{archive}: cannot be unpacked"):
        prepare_aishell(tmp_path / "data", root, unpacked=tmp_path / "unpacked")
    assert not (tmp_path / "data").exists() and not (tmp_path / "unpacked/dev").exists()
    assert not list((tmp_path / "unpacked").glob(".*"))


@pytest.mark.parametrize("run", [20_000, 2])
def test_what_has_no_partner_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, run: int
) -> None:
    monkeypatch.setattr(datadir, "RUN", run)  # with runs of 2, sorting goes through files
    root = write_aishell(tmp_path / "data_aishell")
    path = root / "transcript/aishell_transcript_v0.8.txt"
    lines = [x for x in path.read_text("utf-8").splitlines() if "S0002W0000" not in x and "S0764W0002" not in x]
    path.write_text("\n".join(["BAC009S0999W0001 没有", *reversed(lines), "BAC009S0001W0001 没有"]), encoding="utf-8")
    with caplog.at_level("INFO"):
        assert prepare_aishell(tmp_path / "data", root) == {"train": 5, "valid": 3, "test": 2}
    assert "train: left out: 1: 1 audio without transcript (BAC009S0002W0000)" in caplog.text
    assert "valid: left out: 0" in caplog.text
    assert "left out: 2: 2 transcript without audio (BAC009S0001W0001, BAC009S0999W0001)" in caplog.text
    left_out = (tmp_path / "data/test/left_out").read_text()
    assert left_out == "BAC009S0764W0002 audio without transcript\n"
    assert "BAC009S0002W0000" not in read_map(tmp_path / "data/train/wav.scp")


@needs_layout("data_aishell")
def test_the_real_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, out = LAYOUTS / "data_aishell", tmp_path / "data"
    with caplog.at_level("INFO"):
        assert prepare_aishell(out, root) == {"train": 12, "valid": 1, "test": 8}
    assert caplog.text.count("left out: 0") == 4
    lines = (root / "transcript/aishell_transcript_v0.8.txt").read_text("utf-8").splitlines()
    told = dict(x.split(" ", 1) for x in lines)
    for name, theirs in {"train": "train", "valid": "dev", "test": "test"}.items():
        audio = sorted((root / "wav" / theirs).glob("*/*.wav"))
        assert (out / name / "wav.scp").read_text() == "".join(f"{p.stem} {p}\n" for p in audio)
        assert (out / name / "utt2spk").read_text() == "".join(f"{p.stem} {p.parent.name}\n" for p in audio)
        texts = "".join(f"{p.stem} {told[p.stem].replace(' ', '')}\n" for p in audio)
        assert (out / name / "text").read_text("utf-8") == texts
        assert validate(out / name) == len(audio)
        seconds = sum(soundfile.info(str(p)).duration for p in audio)
        assert seconds_of(out / name) == pytest.approx(seconds)
    assert read_map(out / "train/text")["BAC009S0150W0011"] == "尚街Loft时尚生活园区"
    assert sum(map(int, read_map(out / "train/utt2num_samples").values())) == 493_152
