"""What an audio file says of itself, and how one is written."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Tuple, Union

from espnet_kd.cli import UserError
from espnet_kd.files import replacing


def is_pipe(entry: str) -> bool:
    """Whether an entry of a wav.scp is a shell command whose output is the audio, as Kaldi has it."""
    return entry.rstrip().endswith("|")


def read_audio_info(path: str, whole: bool = False) -> Tuple[int, int, int]:
    """Return (samples per channel, sampling rate in Hz, channels) from the file's header.

    Args:
        whole: whether to refuse a FLAC, WAV or SPHERE file that ends before its header says. Nothing is decoded for
            this but FLAC's last block.

    Raises:
        UserError: the entry is a shell pipe, or the file is missing, unreadable or cut.
    """
    import soundfile  # not needed to read text files

    if is_pipe(path):
        raise UserError(f"'{path}' is a shell pipe, which is not run here: convert the audio to a file (flac, wav)")
    if not os.path.isfile(path):
        raise UserError(f"no such audio file: {path} (relative paths count from the working directory)")
    if path.lower().endswith(".raw"):
        raise UserError(f"{path} has no header that says its sampling rate: convert it to a file that has (flac, wav)")
    try:
        with soundfile.SoundFile(path) as f:
            if f.frames > 1 << 62:  # libsndfile's greatest number
                raise UserError(f"{path} does not say how long it is, as a stream: decode it, and write it to a file")
            if whole and not _is_whole(f, path):
                raise UserError(f"{path} is cut: it ends before its header says")
            return f.frames, f.samplerate, f.channels
    except (soundfile.LibsndfileError, RuntimeError) as e:
        if "embedded-shorten" in _read_head(path):
            raise UserError(
                f"{path} is SPHERE compressed with shorten, which is not read here: convert it, with "
                f"'sph2pipe -f wav {path} {Path(path).with_suffix('.wav')}', and remove it"
            ) from e
        raise UserError(f"unreadable audio {path}: {e}") from e


def write_audio(path: Union[str, Path], samples, rate: int, sync: bool = True) -> None:
    """Write int16 samples, (N,) or (N, channels), at ``rate`` Hz, whole or not at all.

    The suffix of ``path`` says the form: 16-bit FLAC (``.flac``) or WAV (``.wav``).
    """
    import soundfile

    content = io.BytesIO()  # libsndfile would not say why it cannot write to a full disk
    soundfile.write(content, samples, rate, format=Path(path).suffix[1:].upper(), subtype="PCM_16")
    with replacing(path, "wb", sync=sync) as f:
        f.write(content.getbuffer())


def _read_head(path: str) -> str:
    with open(path, "rb") as f:
        return f.read(1024).decode("latin-1")


def _is_whole(f, path: str) -> bool:
    """Whether an open soundfile has all that its header says; libsndfile itself takes what is there."""
    import soundfile

    if f.format == "FLAC" and f.frames:
        try:
            f.seek(f.frames - 1)
            return len(f.read(1)) == 1
        except (soundfile.LibsndfileError, RuntimeError):
            return False
    if f.format == "NIST":
        fields = dict(re.findall(r"^(\w+) -i (\d+)", _read_head(path), re.MULTILINE))
        return f.frames >= int(fields.get("sample_count", 0))
    # Of RIFF it says so in its log only. A size of 2 GB or more is of a stream that did not know its own.
    match = re.search(r"^data : (\d+) \(should be (\d+)\)", f.extra_info, re.MULTILINE)
    return match is None or not int(match[2]) < int(match[1]) < 1 << 31
