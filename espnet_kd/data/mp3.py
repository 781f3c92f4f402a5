"""MP3 files without their length, or with a wrong one, for which libsndfile reads too little or too much audio.

Encoders write the number of frames into a first frame without audio ("Xing", "Info" or "VBRI"). Streams and the files
of some encoders have none, so that libsndfile estimates the length by the first bit rate; in files that were joined,
the number is that of the first part.
"""

from __future__ import annotations

import re
from typing import List, Optional, Tuple

# By the version in a frame's header (3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5): sampling rates in Hz, bit rates in kbit/s.
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_MPEG_1 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_LATER = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
# The number of frames is there if the first of these flags is set.
_STATED = re.compile(rb"(?:Xing|Info)...[\x01\x03\x05\x07\x09\x0b\x0d\x0f]|VBRI", re.DOTALL)
#: Samples that the frames may have more than the file: those of the first frame, and what the encoder adds at the ends.
MOST_ADDED = 10_000


def with_length(content: bytes, frames: int) -> Optional[bytes]:
    """Return an MP3 file with its length in a new first frame, or None if ``frames`` is its length.

    Args:
        content: the file.
        frames: samples per channel, as libsndfile states or estimates them.

    Raises:
        ValueError: the file is shorter than its first frame states, or was joined of files of different kinds.
    """
    parts: List[bytes] = []  # the frames, without the tags between them
    begin = at = number = 0
    first: Optional[int] = None  # header of the first frame
    stated = False
    while at < len(content):
        frame = _frame(content, at)
        if frame and (first is None or _kind(frame[0]) != _kind(first)):
            following = _frame(content, at + frame[1])
            if following is None or _kind(following[0]) != _kind(frame[0]):
                frame = None  # the bytes of a tag, which look like one header
            elif first is not None:
                raise ValueError("was joined of files with different sampling rates or channels; decode each of them")
            else:
                first, begin = frame[0], at
                stated = _STATED.search(content, at, at + frame[1]) is not None
        if frame:
            number, at = number + 1, at + frame[1]
            continue
        if first is not None and begin < at:
            parts.append(content[begin:at])
        at = begin = _next(content, at)
    if first is None:
        return None
    parts.append(content[begin:at])
    samples = number * _samples(first)
    if stated and samples < frames:
        raise ValueError("is cut: it is shorter than its first frame states")
    if samples == frames or (stated and samples - frames <= MOST_ADDED):
        return None
    return _length_frame(first, number) + b"".join(parts)


def _next(content: bytes, at: int) -> int:
    """The next place after ``at`` where a frame may begin; tags (ID3), which may hold pictures, are skipped."""
    if content.startswith(b"ID3", at) and at + 10 <= len(content):
        a, b, c, d = content[at + 6 : at + 10]
        return min(at + 10 + (a << 21 | b << 14 | c << 7 | d), len(content))
    places = [place for sign in (b"\xff", b"ID3") if (place := content.find(sign, at + 1)) >= 0]
    return min(places, default=len(content))


def _frame(content: bytes, at: int) -> Optional[Tuple[int, int]]:
    """The (header, bytes) of the whole frame that begins at ``at``; None if none begins there, or it is cut."""
    header = int.from_bytes(content[at : at + 4], "big")
    size = _size(header)
    return (header, size) if size and at + size <= len(content) else None


def _kind(header: int) -> Tuple[int, bool]:
    """What is the same in all frames of a file: version, layer and sampling rate, and whether there is one channel."""
    return header & 0xFFFE0C00, header >> 6 & 3 == 3


def _size(header: int) -> int:
    """The bytes of a frame of layer III; 0 if this is no header of one."""
    version, layer, bit_rate, rate = header >> 19 & 3, header >> 17 & 3, header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer != 1 or bit_rate in (0, 15) or rate == 3:
        return 0
    thousands = (_MPEG_1 if version == 3 else _LATER)[bit_rate - 1]
    return _samples(header) * thousands * 125 // _RATES[version][rate] + (header >> 9 & 1)


def _samples(header: int) -> int:
    return 1152 if header >> 19 & 3 == 3 else 576


def _length_frame(header: int, number: int) -> bytes:
    """A first frame that states the number of frames, in the form of the frame with this header."""
    mono = header >> 6 & 3 == 3
    empty = (17 if mono else 32) if header >> 19 & 3 == 3 else (9 if mono else 17)
    header = header & ~0xF200 | 0x1A000  # no checksum, the tenth bit rate, not padded
    start = header.to_bytes(4, "big") + bytes(empty) + b"Xing" + (1).to_bytes(4, "big") + number.to_bytes(4, "big")
    return start.ljust(_size(header), b"\0")
