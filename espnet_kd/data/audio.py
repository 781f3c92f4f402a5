"""Reading the headers and samples of audio files, and writing them."""

from __future__ import annotations

import functools
import io
import os
import re
from pathlib import Path
from typing import IO, Any, Iterator, Optional, Tuple, Union

from espnet_kd.cli import UserError
from espnet_kd.data import mp3
from espnet_kd.files import replacing

# If the size in a header is at least this number of bytes, the file was written as a stream, before its length was
# known: SoX writes 0x7FFFF000, ffmpeg 0xFFFFFFFF. The length of such a file is not checked.
STREAM = 0x7FFF0000
# Floating-point samples have a full scale of 1. Mixers and codecs exceed it a little, which is clipped; samples beyond
# this limit (18 dB) have another scale, such as that of 16-bit integers.
LOUDEST = 8.0
ARK = re.compile(r"(.+):(\d+)")
BLOCK = 1 << 18  # samples per channel that are read at a time


def is_in_ark(entry: str) -> bool:
    """Whether an entry of a wav.scp is a place in a Kaldi ark, ``FILE:OFFSET``."""
    return ARK.fullmatch(entry) is not None and not os.path.exists(entry)


def is_pipe(entry: str) -> bool:
    """Whether an entry of a wav.scp is a shell command whose output is the audio, as in Kaldi."""
    return entry.rstrip().endswith("|")


def check_name(path: str) -> None:
    """Refuse a file name that is not UTF-8 (:class:`UserError`): Linux allows it, soundfile and data dirs do not."""
    try:
        path.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"the file name {path!a} is not UTF-8; rename it (convmv does so)") from e


def read_audio_info(path: str, whole: bool = False) -> Tuple[int, int, int]:
    """Return (samples per channel, sampling rate in Hz, channels) from the file's header.

    Args:
        whole: whether to refuse a FLAC, WAV or SPHERE file that is shorter than its header states. Only FLAC's last
            block is decoded for this.

    Raises:
        UserError: the entry is a shell pipe, or the file is missing, unreadable or cut.
    """
    import soundfile  # imported here, because the readers of text files do not need it

    if is_pipe(path):
        raise UserError(f"'{path}' is a shell pipe, which is not run here: convert the audio to a file (flac, wav)")
    if is_in_ark(path):
        raise UserError(f"{path} is a place in an ark: make a data dir with files of it (asr_kd_data espnet --help)")
    check_name(path)
    if not os.path.isfile(path):
        raise UserError(f"no such audio file: {path} (relative paths count from the working directory)")
    if path.lower().endswith(".raw"):
        raise UserError(f"{path} has no header with its sampling rate: convert it to a file with a header (flac, wav)")
    try:
        with soundfile.SoundFile(path) as f:
            if f.frames > 1 << 62:  # libsndfile gives its greatest number if the length is unknown
                raise UserError(f"{path} has no length in its header, as a stream: decode it, and write it to a file")
            if whole and not _is_whole(f, _read_head(path)):
                raise UserError(f"{path} is cut: it is shorter than its header states")
            with _with_length(f, path, path) as measured:
                return measured.frames, f.samplerate, f.channels
    except (soundfile.LibsndfileError, RuntimeError) as e:
        if "embedded-shorten" in _read_head(path):
            raise UserError(
                f"{path} is SPHERE compressed with shorten, which is not read here: convert it, with "
                f"'sph2pipe -f wav {path} {Path(path).with_suffix('.wav')}', and remove it"
            ) from e
        raise UserError(f"unreadable audio {path}: {e}") from e


def read_samples(
    source: Union[str, IO[bytes]],
    name: str,
    start: int = 0,
    stop: Optional[int] = None,
    channels: Union[int, str] = "mean",
) -> Tuple[Any, int]:
    """Return samples as float64, (N,) or (N, channels), full scale 1, and the sampling rate in Hz.

    Args:
        source: a file, or its name.
        name: its name in messages.
        start, stop: the part to read, in samples; None reads to the end.
        channels: "mean", "all", or the number of one channel, counted from 0.

    Raises:
        UserError: the file is not audio, is cut or damaged, lacks this channel, or has samples that are not finite or
            have another scale.
    """
    import numpy as np

    with _opened(source, name) as f:
        if isinstance(channels, int) and channels >= f.channels:
            raise UserError(f"{name} has {f.channels} channel(s), and channel {channels}, counted from 0, is asked for")
        _go_to(f, name, start)
        blocks = list(_blocks(f, name, start, f.frames if stop is None else stop))
        rate, number = f.samplerate, f.channels
    x = np.concatenate(blocks) if blocks else np.zeros((0, number))
    if isinstance(channels, int) or number == 1:
        return x[:, channels if isinstance(channels, int) else 0], rate
    return (x if channels == "all" else x.mean(axis=1)), rate


def iterate_samples(source: Union[str, IO[bytes]], name: str) -> Iterator[Tuple[Any, int]]:
    """Yield blocks of samples (N, channels), float64 of full scale 1, each with the sampling rate in Hz.

    Args:
        source: a file, or its name.
        name: its name in messages.

    Raises:
        UserError: the causes of :func:`read_samples`.
    """
    with _opened(source, name) as f:
        for block in _blocks(f, name, 0, f.frames):
            yield block, f.samplerate


def check_samples(path: str) -> bool:
    """Decode a file if that can reveal a fault, and return whether samples are beyond full scale.

    Integers in a WAV file are always valid samples. A FLAC file may be damaged in the middle, and floating-point
    samples may be NaN. Memory does not grow with the file, except with MP3, which is read whole.

    Raises:
        UserError: the causes of :func:`read_samples`.
    """
    import numpy as np

    with _opened(path, path) as f:
        if f.subtype.startswith("PCM_") and f.format != "FLAC":
            return False
        return any([bool(np.abs(block).max() > 1) for block in _blocks(f, path, 0, f.frames)])


def can_seek(path: str) -> bool:
    """Whether a file that can be read allows seeking, as ESPnet's reader needs it; GSM 6.10 in WAV does not."""
    with _opened(path, path) as f:
        return bool(f.seekable())


def to_int16(samples):
    """Return float samples as 16-bit integers; samples that were read from 16-bit audio are restored exactly."""
    import numpy as np

    return np.round(samples * 32768).clip(-32768, 32767).astype(np.int16)


def write_audio(path: Union[str, Path], samples, rate: int, sync: bool = True) -> None:
    """Write int16 samples, (N,) or (N, channels), at ``rate`` Hz, whole or not at all.

    The suffix of ``path`` decides the format: 16-bit FLAC (``.flac``) or WAV (``.wav``).
    """
    import soundfile

    content = io.BytesIO()  # not a file, because libsndfile does not report that a disk is full
    soundfile.write(content, samples, rate, format=Path(path).suffix[1:].upper(), subtype="PCM_16")
    with replacing(path, "wb", sync=sync) as f:
        f.write(content.getbuffer())


def _read_head(path: str) -> str:
    """The beginning of a file (:class:`UserError`: the system refuses to read it)."""
    try:
        with open(path, "rb") as f:
            return f.read(1024).decode("latin-1")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e


def _opened(source: Union[str, IO[bytes]], name: str):
    """Open a file with soundfile, and refuse one that is cut."""
    import soundfile

    try:
        f = soundfile.SoundFile(source)
    except (soundfile.LibsndfileError, RuntimeError) as e:
        raise UserError(f"{name} is no audio that can be read here: {getattr(e, 'error_string', e)}") from e
    if f.frames > 1 << 62:
        raise UserError(f"{name} has no length in its header, as a stream: decode it, and write it to a file")
    # The header is needed only for NIST files. An open stream is part of an ark, which never holds NIST.
    if not _is_whole(f, _read_head(source) if isinstance(source, str) else ""):
        raise UserError(f"{name} is cut: it is shorter than its header states")
    return _with_length(f, source, name)


def _with_length(f, source: Union[str, IO[bytes]], name: str):
    """Return an open soundfile with its true length, which libsndfile may not find in MP3."""
    import soundfile

    if f.format != "MP3":
        return f
    try:
        if isinstance(source, str):
            stat = os.stat(source)
            content = _decoded(source, f.frames, stat.st_size, stat.st_mtime_ns)
        else:
            place = source.tell()  # libsndfile continues there
            source.seek(0)
            content = mp3.decode_if_unmeasured(source.read(), f.frames)
            source.seek(place)
    except ValueError as e:
        raise UserError(f"{name} {e}") from e
    except OSError as e:
        raise UserError(f"cannot read {name}: {e.strerror}") from e
    return f if content is None else soundfile.SoundFile(io.BytesIO(content))


@functools.lru_cache(maxsize=1)  # the segments of a file are read one after the other
def _decoded(path: str, frames: int, size: int, time: int) -> Optional[bytes]:
    return mp3.decode_if_unmeasured(Path(path).read_bytes(), frames)


def _go_to(f, name: str, start: int) -> None:
    """Move an open soundfile to a sample; if its format does not allow seeking, it is decoded up to there."""
    if f.seekable():
        f.seek(start)
        return
    for _ in _blocks(f, name, 0, start):
        pass


def _blocks(f, name: str, start: int, stop: int):
    """Yield the samples from ``start``, the position of ``f``, to ``stop`` in blocks (N, channels) of float64."""
    import numpy as np
    import soundfile

    at = start
    while at < stop:
        try:
            x = f.read(min(BLOCK, stop - at), dtype="float64", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as e:
            raise UserError(f"{name} is damaged: it cannot be decoded beyond {at / f.samplerate:.1f} s "
                            f"({getattr(e, 'error_string', e)})") from e
        if not len(x):
            raise UserError(f"{name} is cut: {at - start} of {stop - start} samples")
        peak = np.abs(x).max()  # NaN if any sample is NaN
        if not peak <= LOUDEST:
            number = at + int(np.argmin(np.abs(x).max(axis=1) <= LOUDEST))
            if np.isfinite(peak):
                raise UserError(f"{name}: sample {number} is {np.abs(x[number - at]).max():g}, and floating-point "
                                "samples have a full scale of 1: divide by 32768 what was 16-bit")  # fmt: skip
            raise UserError(f"{name}: sample {number} ({number / f.samplerate:.3f} s) is no number (NaN or infinite); "
                            "make this file again")  # fmt: skip
        yield x
        at += len(x)


def _is_whole(f, head: str) -> bool:
    """Whether an open soundfile is as long as its header states; libsndfile itself accepts a shorter file."""
    import soundfile

    if f.format == "FLAC" and f.frames:
        try:
            f.seek(f.frames - 1)
            last = len(f.read(1))
            f.seek(0)
            return last == 1
        except (soundfile.LibsndfileError, RuntimeError):
            return False
    if f.format == "NIST":
        fields = dict(re.findall(r"^(\w+) -i (\d+)", head, re.MULTILINE))
        return f.frames >= int(fields.get("sample_count", 0))
    # For RIFF, AIFF, AU, W64 and RF64, only libsndfile's log shows that the file is shorter than its header states.
    sizes = re.findall(r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)", f.extra_info, re.M)
    return not any(int(there) < int(size) < STREAM for size, there in sizes)
