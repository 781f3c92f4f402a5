"""Data dirs of an ESPnet recipe: every kind of wav.scp that asr.sh writes gives the same audio and text."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_espnet
from tiny_layouts import snapshot

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_data_dir
from espnet_kd.data.formatting import format_data

SECONDS = [0.5, 0.75, 1.0]


@pytest.fixture
def espnet(tmp_path: Path) -> Path:
    return tmp_path / "espnet/egs2/some/asr1"


def take(espnet: Path, out: Path, name: str = "train_nodev", *more: str) -> Path:
    asr_kd_data.main(["espnet", "--espnet_data", str(espnet), "--sets", name, "--out", str(out), *more])
    return out / name


@pytest.mark.parametrize("kind", tiny_espnet.KINDS)
def test_every_kind_of_audio(espnet: Path, tmp_path: Path, monkeypatch, kind: str) -> None:
    waves = tiny_espnet.add_set(espnet, "train_nodev", kind, SECONDS)
    monkeypatch.chdir(tmp_path)  # not the ESPnet recipe, where its relative paths start
    taken = take(espnet, tmp_path / "data", "train_nodev", *(["--nj", "2"] if kind == "flac.ark" else []))
    format_data(taken, tmp_path / "dump")  # as in stage 2
    utts = {u.utt_id: u for u in read_data_dir(tmp_path / "dump")}
    assert list(utts) == sorted(waves)
    for i, (utt_id, expected) in enumerate(waves.items()):
        u = utts[utt_id]
        found, rate = soundfile.read(u.audio, dtype="int16")
        assert rate == 16000 and u.speaker == "train_nodev-spk" and u.text == ("abc def" if i % 2 else "abc")
        # Stage 2 cuts segments and writes new files, which changes samples by up to 1.
        np.testing.assert_allclose(found, expected, atol=1 if kind == "segments" else 0)
    # Only audio with a file per utterance stays where it is.
    assert all(u.audio.startswith(str(espnet)) for u in utts.values()) == (kind == "flac")
    assert (taken / "audio").exists() == (kind != "flac")


def test_the_formatted_set_comes_before_the_raw_one_and_a_dump_elsewhere_is_found(espnet: Path, tmp_path: Path) -> None:
    tiny_espnet.add_set(espnet, "train", "pipe", SECONDS)
    tiny_espnet.add_set(espnet, "train", "flac", SECONDS[:1])
    for place in (espnet, espnet / "dump", espnet / "dump/raw"):
        assert len(list(read_data_dir(take(place, tmp_path / "data", "train")))) == 1


def test_again_converts_nothing_unless_the_list_is_new(espnet: Path, tmp_path: Path) -> None:
    tiny_espnet.add_set(espnet, "train_nodev", "pipe", SECONDS)
    scp = espnet / "data/train_nodev/wav.scp"
    # Each run of a pipe's command leaves a mark.
    scp.write_text(scp.read_text().replace("cat ", "echo x >>ran; cat "))
    for times in (1, 1):
        taken = take(espnet, tmp_path / "data")
        assert (espnet / "ran").read_text().count("x") == 3 * times
    some = next(taken.glob("audio/*/*.flac"))
    some.rename(some.with_name(f".{some.name}.a1b2c3d4"))  # a kill leaves such a file
    take(espnet, tmp_path / "data")
    assert not list(taken.rglob(".*.flac.*")) and some.is_file() and (espnet / "ran").read_text().count("x") == 4
    scp.write_text("".join(scp.read_text().splitlines(keepends=True)[:2]))
    for name in ("utt2spk", "text"):
        path = scp.with_name(name)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    take(espnet, tmp_path / "data")
    assert (espnet / "ran").read_text().count("x") == 6 and len(list(taken.glob("audio/*/*.flac"))) == 2


def test_mistakes_are_named(espnet: Path, tmp_path: Path) -> None:
    tiny_espnet.add_set(espnet, "train", "flac", SECONDS)
    data_dir, out = espnet / "dump/raw/train", tmp_path / "data"

    def refused(words: str, name: str = "train") -> None:
        with pytest.raises(UserError, match=words):
            take(espnet, out, name)
        assert not (out / name / "wav.scp").exists()

    refused("no data dir 'dev'.*--valid_set", "dev")
    (data_dir / "feats_type").write_text("fbank_pitch\n")
    refused("feats_type is fbank_pitch")
    (data_dir / "feats_type").write_text("raw\n")
    (data_dir / "audio_format").write_text("multi_flac\n")
    refused("audio_format is multi_flac")
    (data_dir / "audio_format").unlink()
    ids = [line.split()[0] for line in (data_dir / "utt2spk").read_text().splitlines()]
    for entry, words in {
        "gone/x.flac": "gone/x.flac is found neither from",
        "gone/x.ark:12": "gone/x.ark is found neither from",
        "no_such_program -f wav x |": "'no_such_program -f wav x' failed .* with 127.*path.sh",
        "echo silence |": "echo silence . is no audio",
    }.items():
        tiny_espnet.write(data_dir, "wav.scp", {u: entry for u in ids})
        refused(words)


def test_a_recipes_own_data_dir_is_not_written(espnet: Path) -> None:
    tiny_espnet.add_set(espnet, "train", "pipe", SECONDS)
    (espnet / "data/train/audio").mkdir()
    before = snapshot(espnet)
    with pytest.raises(UserError, match="data/train is to be read, and cannot be written .*; choose another --out"):
        take(espnet, espnet / "data", "train")
    assert snapshot(espnet) == before and (espnet / "data/train/audio").is_dir()


def test_a_text_has_all_lines_or_is_refused(espnet: Path, tmp_path: Path, caplog) -> None:
    tiny_espnet.add_set(espnet, "train", "flac", SECONDS)
    text = espnet / "dump/raw/train/text"
    lines = text.read_text().splitlines(keepends=True)
    text.write_text("".join(lines[1:]))
    # A data dir without text counts as untranscribed, so the other transcripts would be lost without a message.
    with pytest.raises(UserError, match="text has no line for 'train-0'"):
        take(espnet, tmp_path / "data", "train")
    assert not (tmp_path / "data").exists()
    text.write_text("".join([*lines, "train-9 abc\n"]))
    with caplog.at_level("WARNING"):
        taken = take(espnet, tmp_path / "data", "train")
    assert "1 lines without audio are left out" in caplog.text
    assert (taken / "text").read_text() == "".join(lines)


@pytest.mark.faults("a full disk")
def test_a_disk_that_is_full_while_audio_is_written(espnet: Path, tmp_path: Path) -> None:
    tiny_espnet.add_set(espnet, "train", "pipe", SECONDS)
    command = [sys.executable, "-m", "espnet_kd.bin.asr_kd_data", "espnet", "--espnet_data", str(espnet)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))

    command += ["--sets", "train", "--out", str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large, and give the same command again" in done.stderr
    assert not list(tmp_path.glob("data/**/*flac*")) and not (tmp_path / "data/train/wav.scp").exists()


class Mark:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def test_an_ark_is_audio_or_refused(espnet: Path, tmp_path: Path, monkeypatch) -> None:
    import kaldiio

    monkeypatch.chdir(tmp_path)
    tiny_espnet.add_set(espnet, "train", "kaldi_ark", SECONDS[:1])
    ark = espnet / "dump/raw/train/data/format.1/data_wav.ark"
    at = (espnet / "dump/raw/train/wav.scp").read_text().rsplit(":", 1)[1]
    whole = ark.read_bytes()
    ark.write_bytes(whole[:200])
    with pytest.raises(UserError, match="'train-0': .*data_wav.ark:8 is cut"):
        take(espnet, tmp_path / "data", "train")
    kaldiio.save_ark(str(ark), {"train-0": np.zeros((5, 3), np.float32)})
    with pytest.raises(UserError, match=f"no audio at .*data_wav.ark:{at.strip()}"):
        take(espnet, tmp_path / "data", "train")
    ark.write_bytes(whole[: int(at)] + b"PKL" + pickle.dumps(Mark()))
    with pytest.raises(UserError, match="no audio at"):
        take(espnet, tmp_path / "data", "train")
    assert not Path("unpickled").exists()
