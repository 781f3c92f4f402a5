"""MP3 files of which libsndfile reads too little or too much: without their length, cut, or joined of several files."""

from __future__ import annotations

import io
from typing import Optional

#: Marks of a first frame that states the number of frames. Streams, and the files of some encoders, have none, and then
#: libsndfile estimates the length by the first bit rate.
MARKS = (b"Xing", b"Info", b"VBRI")
#: Samples that the frames may have more than the file: those of the first frame, and what the encoder adds at the ends.
MOST_ADDED = 10_000


def decode_if_unmeasured(content: bytes, frames: int) -> Optional[bytes]:
    """Return the audio of an MP3 file without a length as a W64 file, or None if ``frames`` is its length.

    Args:
        content: the file.
        frames: samples per channel, as libsndfile reads or estimates them.

    Raises:
        ValueError: the file has another length than its first frame states.
    """
    import miniaudio
    import numpy as np
    import soundfile

    try:
        stated = miniaudio.mp3_get_info(content).num_frames
        unmarked = content
        for mark in MARKS:
            unmarked = unmarked.replace(mark, bytes(len(mark)))
        counted = miniaudio.mp3_get_info(unmarked).num_frames
    except miniaudio.DecodeError:
        return None  # another layer of MPEG audio
    if counted != stated and not 0 <= counted - frames <= MOST_ADDED:
        raise ValueError("is cut, or was joined of several files: its first frame states another length; convert it "
                         "with ffmpeg, to FLAC for example, or make one file of each part")  # fmt: skip
    if counted != stated or counted == frames:
        return None
    decoded = miniaudio.mp3_read_s16(content)
    file = io.BytesIO()
    samples = np.asarray(decoded.samples).reshape(-1, decoded.nchannels)
    soundfile.write(file, samples, decoded.sample_rate, format="W64", subtype="PCM_16")
    return file.getvalue()
