"""Sample values: audio with NaN, of another scale, damaged or cut is refused by name wherever it is read; whole audio
is kept bit by bit."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Callable, Dict, Tuple

import kaldiio
import numpy as np
import pytest
import soundfile

from espnet_kd.bin import asr_kd_data
from espnet_kd.cli import UserError
from espnet_kd.data.datadir import Utterance, read_data_dir, write_data_dir
from espnet_kd.data.formatting import format_data

FS = 16000
NOISE = 0.1 * np.random.default_rng(0).standard_normal(FS)
WHOLE = np.round(NOISE * 32768).astype("<i2")
WHOLE[FS // 2 : FS // 2 + 5] = [32767, -32768, 32766, -32767, 20001]  # values where a scale of 32767 would show


def with_value(value: float) -> np.ndarray:
    x = NOISE.astype(np.float32)
    x[8000:8010] = value
    return x


def as_bytes(samples: np.ndarray, form: str = "WAV", subtype: str = "FLOAT") -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, FS, format=form, subtype=subtype)
    return content.getvalue()


def damaged_flac() -> bytes:
    content = bytearray(as_bytes(NOISE, "FLAC", "PCM_16"))
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    return bytes(content)


def riff(size: int, content: bytes) -> bytes:
    form = struct.pack("<IHHIIHH", 16, 1, 1, FS, 2 * FS, 2, 16)
    sizes = [struct.pack("<I", n) for n in (min(size + 36, 0xFFFFFFFF), size)]
    return b"RIFF" + sizes[0] + b"WAVEfmt " + form + b"data" + sizes[1] + content


# The suffix, the content of the file, and the message about it.
FAULTY: Dict[str, Tuple[str, bytes, str]] = {
    "NaN": ("wav", as_bytes(with_value(np.nan)), r"sample 8000 \(0.500 s\) is no number"),
    "infinite": ("wav", as_bytes(with_value(-np.inf)), r"sample 8000 .* is no number"),
    "NaN in double": ("wav", as_bytes(with_value(np.nan), subtype="DOUBLE"), "sample 8000 .* is no number"),
    "NaN in AIFF": ("aiff", as_bytes(with_value(np.nan), "AIFF"), "sample 8000 .* is no number"),
    "16-bit scale": ("wav", as_bytes(with_value(12345.0)), "sample 8000 is 12345, and .* full scale of 1"),
    "damaged FLAC": ("flac", damaged_flac(), "is damaged: it cannot be decoded beyond"),
    "cut": ("wav", riff(2 * FS, WHOLE.tobytes()[:-9000]), "is cut"),
    "cut AIFF": ("aiff", as_bytes(NOISE, "AIFF", "PCM_16")[:-9000], "is cut"),
    "cut AU": ("au", as_bytes(NOISE, "AU", "PCM_16")[:-9000], "is cut"),
    "cut FLAC": ("flac", as_bytes(NOISE, "FLAC", "PCM_16")[:-2000], "is cut"),
}  # fmt: skip


def take_file(content: bytes, suffix: str, root: Path, *options: str) -> Path:
    (root / f"u.{suffix}").write_bytes(content)
    write_data_dir(root / "src", [Utterance("s-u", "s", str(root / f"u.{suffix}"), "A")])
    asr_kd_data.main(["format", "--src", str(root / "src"), "--dst", str(root / "out"), *options])
    return root / "out"


def take_segment(content: bytes, suffix: str, root: Path) -> Path:
    (root / f"u.{suffix}").write_bytes(content)
    utt = Utterance("s-u", "s", str(root / f"u.{suffix}"), "A", recording="r", start=0.25, end=0.75)
    write_data_dir(root / "src", [utt])
    asr_kd_data.main(["format", "--src", str(root / "src"), "--dst", str(root / "out")])
    return root / "out"


def check_file(content: bytes, suffix: str, root: Path) -> Path:
    (root / f"u.{suffix}").write_bytes(content)
    write_data_dir(root / "src", [Utterance("s-u", "s", str(root / f"u.{suffix}"), "A")])
    asr_kd_data.main(["validate", str(root / "src")])
    return root / "src"


def take_from_espnet(entry: str, root: Path) -> Path:
    (root / "dump/raw/test").mkdir(parents=True)
    for name, line in (("wav.scp", entry), ("text", "A"), ("utt2spk", "s")):
        (root / "dump/raw/test" / name).write_text(f"s-u {line}\n")
    asr_kd_data.main(["espnet", "--espnet_data", str(root), "--sets", "test", "--out", str(root / "out")])
    return root / "out/test"


def take_ark(content: bytes, suffix: str, root: Path) -> Path:
    if suffix == "aiff" or suffix == "au":
        content = b"AUDIO" + b"\x04" + struct.pack("<I", len(content)) + content
    (root / "a.ark").write_bytes(b"s-u " + content)
    return take_from_espnet("a.ark:4", root)


def take_pipe(content: bytes, suffix: str, root: Path) -> Path:
    (root / "u").write_bytes(content)
    return take_from_espnet("cat u |", root)


TAKERS: Dict[str, Callable[[bytes, str, Path], Path]] = {
    "format": take_file,
    "speed": lambda *x: take_file(*x, "--speed_factors", "0.9"),
    "segment": take_segment,
    "validate": check_file,
    "ark": take_ark,
    "pipe": take_pipe,
}


@pytest.mark.faults("faulty data dirs")
@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("kind", FAULTY)
def test_faulty_samples_are_refused_by_name(taker: str, kind: str, tmp_path: Path) -> None:
    suffix, content, message = FAULTY[kind]
    if taker == "segment" and kind == "cut FLAC":
        message = "is cut|is damaged"
    with pytest.raises(UserError, match=f"(?s)s-u'.*({message})"):
        TAKERS[taker](content, suffix, tmp_path)
    assert not (tmp_path / "out/wav.scp").exists() and not (tmp_path / "out/test/wav.scp").exists()


@pytest.mark.parametrize("taker", [name for name in TAKERS if name not in ("speed", "validate")])
@pytest.mark.parametrize(
    "content",
    [
        riff(2 * FS, WHOLE.tobytes()),
        riff(0x7FFFF000, WHOLE.tobytes()),  # as SoX writes to a pipe
        riff(0xFFFFFFFF, WHOLE.tobytes()),  # as ffmpeg writes to a pipe
        as_bytes(WHOLE, "FLAC", "PCM_16"),
    ],
    ids=["WAV", "SoX's", "ffmpeg's", "FLAC"],
)
def test_16_bit_samples_stay_as_they_are(taker: str, content: bytes, tmp_path: Path) -> None:
    (utt,) = read_data_dir(TAKERS[taker](content, "flac" if content[:4] == b"fLaC" else "wav", tmp_path))
    x, _ = soundfile.read(utt.audio, dtype="int16")
    np.testing.assert_array_equal(x, WHOLE[FS // 4 : 3 * FS // 4] if taker == "segment" else WHOLE)


def test_an_utterance_in_the_middle_of_an_ark(tmp_path: Path) -> None:
    """The utterance ends where its own header says, not where the file ends."""
    for form in ("wav", "flac"):
        write = {"write_function": "soundfile", "write_kwargs": {"format": form, "subtype": None}}
        root = tmp_path / form
        root.mkdir()
        with open(root / "a.ark", "wb") as f:
            for key in ("s-t", "s-u", "s-v"):
                kaldiio.save_ark(f, {key: (FS, WHOLE)}, append=True, **write)
        at = (root / "a.ark").read_bytes().index(b"s-u ") + 4
        (utt,) = read_data_dir(take_from_espnet(f"a.ark:{at}", root))
        np.testing.assert_array_equal(soundfile.read(utt.audio, dtype="int16")[0], WHOLE)


def test_a_little_beyond_full_scale_is_clipped_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The copy at speed 1.0 is clipped as well, and the utterances are counted."""
    out = take_file(as_bytes(with_value(1.5)), "wav", tmp_path, "--speed_factors", "0.9", "1.0")
    assert "1 of 1 utterances have samples beyond full scale, and are clipped" in caplog.text
    for utt in read_data_dir(out):
        assert np.abs(soundfile.read(utt.audio)[0]).max() <= 1 and str(out) in utt.audio


@pytest.mark.parametrize("line", ["0", "1", "2"])
def test_the_channel_of_a_segment(line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "call.wav", np.stack([WHOLE, WHOLE[::-1]], 1), FS)
    utt = Utterance("A-1", "A", f"{tmp_path}/call.wav", "HI", None, "call", 0.0, 1.0, int(line))
    write_data_dir(tmp_path / "src", [utt])
    assert list(read_data_dir(tmp_path / "src")) == [utt]
    src, out = str(tmp_path / "src"), str(tmp_path / "out")
    commands = (["format", "--src", src, "--dst", out], ["validate", src])
    if line == "2":
        for command in commands:
            with pytest.raises(UserError, match="(?s)A-1'.*channel 2, counted from 0"):
                asr_kd_data.main(command)
        return
    for command in commands:
        asr_kd_data.main(command)
    (u,) = read_data_dir(tmp_path / "out")
    np.testing.assert_array_equal(soundfile.read(u.audio, dtype="int16")[0], WHOLE if line == "0" else WHOLE[::-1])
    assert "channels" not in caplog.text


def test_a_mean_of_channels_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "call.wav", np.stack([WHOLE, WHOLE], 1), FS)
    write_data_dir(tmp_path / "src", [Utterance("A-1", "A", f"{tmp_path}/call.wav", "HI")])
    format_data(tmp_path / "src", tmp_path / "out")
    assert "1 of 1 utterances have several channels, and are their mean" in caplog.text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"sum": [np.nan, 1.0]}, "1 of 2 features have a sum that is no number"),
        ({"sum_square": [np.inf, np.nan]}, "2 of 2 features"),
        ({"count": 0}, "statistics of 0 frames"),
        ({"sum_square": [-5.0, 1.0]}, "a variance is negative"),
        (None, "no statistics of features"),
        ("gone", "no such file"),
    ],
)
def test_statistics_have_to_be_numbers(value, message: str, tmp_path: Path) -> None:
    path = tmp_path / "feats_stats.npz"
    good = {"count": 10, "sum": [1.0, 2.0], "sum_square": [10.0, 20.0]}
    if isinstance(value, dict):
        np.savez(path, **{**good, **value})
    elif value is None:
        path.write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=f"feats_stats.npz: .*{message}"):
        asr_kd_data.main(["statistics", str(path)])
    np.savez(path, **good)
    asr_kd_data.main(["statistics", str(path)])


def test_audio_without_seeking_becomes_flac(tmp_path: Path) -> None:
    """GSM 6.10 in WAV, as telephone systems record it: ESPnet's reader would seek, and end the training."""
    (tmp_path / "call.wav").write_bytes(as_bytes(NOISE, "WAV", "GSM610"))
    whole, _ = soundfile.read(tmp_path / "call.wav")
    write_data_dir(tmp_path / "src", [Utterance("u1", "s", str(tmp_path / "call.wav"), "A")])
    format_data(tmp_path / "src", tmp_path / "dst", speed_factors=(0.9, 1.0))
    found = {u.utt_id: u for u in read_data_dir(tmp_path / "dst")}
    assert found["u1"].audio.endswith("/u1.flac") and np.array_equal(soundfile.read(found["u1"].audio)[0], whole)
    assert found["sp0.9-u1"].num_samples == round(FS / 0.9)
    part = Utterance("u1", "s", str(tmp_path / "call.wav"), "A", recording="r", start=0.25, end=0.5)
    write_data_dir(tmp_path / "cut", [part])
    format_data(tmp_path / "cut", tmp_path / "segment")
    [cut] = read_data_dir(tmp_path / "segment")
    assert np.array_equal(soundfile.read(cut.audio)[0], whole[FS // 4 : FS // 2])
