"""MP3 files without their length are read as a whole; those with a wrong one are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Callable, Dict

import numpy as np
import pytest
import soundfile

from espnet_kd.cli import UserError
from espnet_kd.data.audio import iterate_samples, read_audio_info, read_samples
from espnet_kd.data.datadir import Utterance, read_data_dir, write_data_dir
from espnet_kd.data.formatting import format_data

SECONDS = 4
PICTURE = b"\xff\xfb\x90\x00" * 1000  # looks like the header of a frame
ID3 = b"ID3\x03\x00\x00" + bytes([0, 0, len(PICTURE) >> 7, len(PICTURE) & 127]) + PICTURE


def sound(rate: int, channels: int = 1) -> np.ndarray:
    """Quiet at first, so that a variable bit rate begins low."""
    t = np.arange(SECONDS * rate) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    return np.stack([0.2 * np.sin(1000 * t) * (t > 0.3) + 0.1 * noise * (t > 1)] * channels, axis=1)


def encode(rate: int, mode: str = "VARIABLE", channels: int = 1) -> bytes:
    content = io.BytesIO()
    options = {"compression_level": 0.5, "bitrate_mode": mode}
    soundfile.write(content, sound(rate, channels), rate, format="MP3", subtype="MPEG_LAYER_III", **options)
    return content.getvalue()


def bare(content: bytes) -> bytes:
    """Without the first frame, which states the length."""
    begin = content.index(content[content.index(b"\xff") :][:2], content.index(b"\xff") + 100)
    assert b"Xing" not in content[begin:] and b"Info" not in content[begin:]
    return content[begin:]


FORMS: Dict[str, Callable[[bytes], bytes]] = {
    "whole": lambda x: x,
    "no length": bare,
    "a picture, and no length": lambda x: ID3 + bare(x),
    "a picture and a tag at the end, and no length": lambda x: ID3 + bare(x) + b"TAG" + bytes(125),
    "two parts without length": lambda x: ID3 + bare(x) + ID3 + bare(x),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("rate, channels", [(44100, 1), (44100, 2), (16000, 1), (22050, 2)])
def test_all_of_it_is_read(rate: int, channels: int, mode: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(FORMS[form](encode(rate, mode, channels)))
    frames, found, number = read_audio_info(str(path))
    parts = 2 if "two" in form else 1
    assert (found, number) == (rate, channels) and abs(frames / rate - parts * SECONDS) < parts * 0.2
    samples, _ = read_samples(str(path), "a.mp3")
    assert len(samples) == frames and abs(np.abs(samples[-rate:]).mean() - np.abs(sound(rate)[-rate:]).mean()) < 0.02
    assert sum(len(x) for x, _ in iterate_samples(io.BytesIO(path.read_bytes()), "standard input")) == frames


def test_parts_of_a_file_without_length(tmp_path: Path) -> None:
    """The segments of a file are at the same places as in the file with its length."""
    for name, content in (("whole", encode(44100)), ("bare", bare(encode(44100)))):
        (tmp_path / f"{name}.mp3").write_bytes(content)
    whole, part = (str(tmp_path / f"{name}.mp3") for name in ("whole", "bare"))
    delay = 576 + 529  # samples that encoder and decoder add, which are known from the first frame only
    got = read_samples(part, part, 3 * 44100 + delay, 3 * 44100 + delay + 9999)[0]
    np.testing.assert_allclose(got, read_samples(whole, whole, 3 * 44100, 3 * 44100 + 9999)[0], atol=1e-3)


def test_formatting(tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_bytes(ID3 + bare(encode(44100)))
    write_data_dir(tmp_path / "src", [Utterance("u", "s", str(tmp_path / "a.mp3"), "A")])
    format_data(tmp_path / "src", tmp_path / "dst")
    assert abs(next(iter(read_data_dir(tmp_path / "dst"))).num_samples / 16000 - SECONDS) < 0.2


@pytest.mark.parametrize(
    "make, fault",
    [
        (lambda: encode(44100)[:-3000], "is cut"),
        (lambda: encode(44100) + encode(44100), "joined"),
        (lambda: ID3 + encode(44100) + ID3 + encode(44100), "joined"),
        (lambda: encode(44100) + encode(16000), "joined"),
        (lambda: encode(44100) + encode(44100, channels=2), "joined"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_whole_is_named(make: Callable[[], bytes], fault: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_bytes(make())
    for read in (lambda path: read_audio_info(path, whole=True), lambda path: read_samples(path, path)):
        with pytest.raises(UserError, match=f"a.mp3 .*{fault}"):
            read(str(tmp_path / "a.mp3"))
