"""Reading audio files and standard input in blocks at a model's rate, and cutting long audio at pauses."""

from __future__ import annotations

import io
import sys
from typing import Iterable, Iterator, Tuple, Union, cast

import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.data import audio

STANDARD_INPUT = "-"
#: Seconds of the window in which the level is measured to find a pause.
WINDOW = 0.2


def read_blocks(path: str, rate: int) -> Iterator[np.ndarray]:
    """Yield the samples of a file, or of standard input (``-``), as (n,) float32 in [-1, 1] at ``rate`` Hz.

    Several channels are averaged. Memory does not grow with the file, except with MP3, which is read whole.

    Raises:
        UserError: the file is missing, cut or damaged, or is no audio; the message names it.
    """
    if path == STANDARD_INPUT:
        source: Union[str, io.BytesIO] = io.BytesIO(sys.stdin.buffer.read())
        name = "standard input"
    else:
        audio.read_audio_info(path)  # raises a clear error for a missing file
        source = name = path
    yield from resampled(audio.iterate_samples(source, name), rate)


def resampled(blocks: Iterable[Tuple[np.ndarray, int]], rate: int) -> Iterator[np.ndarray]:
    """Average the channels of blocks (n, channels), each given with its sampling rate, and resample to ``rate``."""
    resampler = None
    for block, found in blocks:
        mono = block.mean(axis=1)
        if found != rate:
            import soxr

            resampler = resampler or soxr.ResampleStream(found, rate, 1, dtype="float64", quality="HQ")
            mono = resampler.resample_chunk(mono.astype(np.float64))
        if len(mono):
            yield mono.astype(np.float32)
    if resampler is not None:
        rest = resampler.resample_chunk(np.zeros(0), last=True)
        if len(rest):
            yield rest.astype(np.float32)


def read_live(rate: int, seconds: float = 0.1) -> Iterator[np.ndarray]:
    """Yield audio from standard input as it arrives.

    It must have 16-bit little-endian samples of one channel at ``rate`` Hz, raw or as WAV.

    Raises:
        UserError: the WAV header does not fit the data.
    """
    stream = cast(io.BufferedReader, sys.stdin.buffer)  # Python opens standard input with a buffer
    head = stream.read(12)
    rest = b"" if head[:4] == b"RIFF" else head
    while head[:4] == b"RIFF":
        chunk = stream.read(8)
        if len(chunk) < 8:
            raise UserError("standard input is cut: a WAV header without samples")
        if chunk[:4] == b"data":
            break
        size = int.from_bytes(chunk[4:], "little")
        body = stream.read(size + size % 2)  # a chunk of an odd size is followed by a byte of padding
        if chunk[:4] == b"fmt ":
            kind, channels, found = (int.from_bytes(body[a:b], "little") for a, b in ((0, 2), (2, 4), (4, 8)))
            if (channels, found, body[14:16]) != (1, rate, b"\x10\x00") or kind not in (1, 0xFFFE):
                raise UserError(f"standard input: a stream must be one channel of 16 bits at {rate} Hz; convert it")
    size = 2 * int(seconds * rate)
    while block := stream.read1(size):
        rest += block
        whole = len(rest) // 2 * 2
        yield np.frombuffer(rest[:whole], "<i2").astype(np.float32) / 32768
        rest = rest[whole:]


def cut_at_pauses(blocks: Iterable[np.ndarray], rate: int, longest: float) -> Iterator[Tuple[float, np.ndarray]]:
    """Yield pieces of at most ``longest`` seconds, each as (its start in seconds, its samples).

    Longer audio is cut where the level is lowest in the second half of these seconds.

    Raises:
        UserError: ``longest`` is too short to find a pause in.
    """
    most = int(longest * rate)
    if longest < 4 * WINDOW:
        raise UserError(f"pieces of {longest:g} s are too short to cut audio into; give {4 * WINDOW:g} or more")
    held, start = np.zeros(0, dtype=np.float32), 0
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > most:
            end = _quietest(held[:most], int(WINDOW * rate))
            yield start / rate, held[:end]
            held, start = held[end:], start + end
    if len(held):
        yield start / rate, held


def _quietest(samples: np.ndarray, window: int) -> int:
    """Middle of the window of lowest energy in the second half of (N,) samples."""
    half = len(samples) // 2
    energy = np.concatenate([[0.0], np.cumsum(samples[half:].astype(np.float64) ** 2)])
    level = energy[window:] - energy[:-window]
    return half + int(level.argmin()) + window // 2
