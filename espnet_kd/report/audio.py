"""Audio for the utterances of a report, if the files are small and exist."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Dict, Optional

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_map

LIMIT = 300_000  #: bytes of audio in a report
LARGEST = 100_000  #: bytes of one file
#: First bytes of the files that every browser plays → media type.
TYPES = {b"RIFF": "audio/wav", b"fLaC": "audio/flac"}


class Audio:
    """Embeds files up to a total size. An utterance that is shown twice has its audio at the first place only."""

    def __init__(self, limit: int = LIMIT):
        self.left = limit
        self._recordings: Dict[Path, Dict[str, str]] = {}
        self._shown: set = set()

    def embed(self, recipe: Path, data_dir: str, utt_id: str) -> Optional[str]:
        """A data URI of an utterance's file; None where it is a part of a recording, a pipe, too large, or not there.

        Args:
            recipe: the directory that relative paths of wav.scp count from.
            data_dir: path of the data dir, relative to ``recipe``.
            utt_id: an utterance of the data dir.
        """
        place = recipe / data_dir
        if place not in self._recordings:
            self._recordings[place] = _read_recordings(place)
        path = recipe / self._recordings[place].get(utt_id, "")
        if (place, utt_id) in self._shown or path.suffix not in (".wav", ".flac"):
            return None
        try:
            size = path.stat().st_size
            content = path.read_bytes() if size <= min(self.left, LARGEST) else b""
        except OSError:
            return None
        if content[:4] not in TYPES:
            return None
        self.left -= size
        self._shown.add((place, utt_id))
        return f"data:{TYPES[content[:4]]};base64,{base64.b64encode(content).decode('ascii')}"


def _read_recordings(place: Path) -> Dict[str, str]:
    """{utterance: file}; {} if utterances are parts of recordings, or wav.scp cannot be read."""
    if (place / "segments").exists():
        return {}
    try:
        return read_map(place / "wav.scp")
    except (UserError, OSError):
        return {}
