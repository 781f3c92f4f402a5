"""From a directory of audio files without transcripts to the data dirs ``train``, ``valid`` and ``test``."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from tqdm import tqdm

from espnet_kd.cli import UserError
from espnet_kd.data.audio import check_name, read_audio_info
from espnet_kd.data.characters import MAX_ID, id_fault
from espnet_kd.data.datadir import MAX_SHOWN, Utterance, write_data_dir
from espnet_kd.files import PathLike

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".sph", ".aiff", ".aif")
#: Suffixes of audio and video that is not read here.
UNREAD = (
    *(".m4a", ".m4b", ".mp4", ".aac", ".wma", ".webm", ".amr", ".3gp", ".mka", ".mkv", ".mov"),
    *(".oga", ".au", ".caf", ".w64", ".raw", ".pcm"),
)
NAMES = ("train", "valid", "test")


def prepare_audio_folder(
    out: PathLike, audio: PathLike, *, valid: int = 100, test: int = 100, longest: float = 15.0
) -> Dict[str, int]:
    """Write ``out/{train,valid,test}`` and return their numbers of utterances.

    Files and directories that cannot be read, and files of other formats, are left out and logged. Hidden ones are
    skipped.

    An utterance is named after its file and the directories between ``audio`` and the file. Which files are for
    validation and testing depends on a hash of their names: once these sets have their full sizes, audio that is added
    later moves no file out of training.

    Args:
        audio: directory that is searched for audio files, with all below it.
        valid: files for validation; at most a tenth of all are taken.
        test: likewise, for testing.
        longest: seconds; a longer file becomes several utterances of equal length.

    Raises:
        UserError: a number out of range, no such directory, fewer than 10 files in it, two files that would have
            one name, or a name that is not UTF-8.
    """
    for name, number in (("valid", valid), ("test", test)):
        if number < 1:
            raise UserError(f"--{name} is {number}; it must be 1 or more")
    if not 0 < longest < math.inf:
        raise UserError(f"--longest is {longest:g}; it must be a number of seconds above 0")
    root = Path(audio)
    if not root.is_dir():
        raise UserError(f"--audio {audio}: there is no such directory")
    found: Dict[str, Path] = {}
    left_out: List[str] = []
    files = sorted(p for p in _files_below(root, left_out) if p.suffix.lower() in (*SUFFIXES, *UNREAD) and p.is_file())
    unread = Counter(p.suffix.lower() for p in files if p.suffix.lower() in UNREAD)
    for path in (p for p in files if p.suffix.lower() in SUFFIXES):
        name = _name(path, root)
        if name in found:
            raise UserError(f"--audio {audio}: {found[name]} and {path} would both be named {name}; rename one")
        found[name] = path
    if len(found) < 10:
        others = f", and {unread.total()} of other formats" if unread else ""
        raise UserError(
            f"--audio {audio}: {len(found)} audio files ({' '.join(SUFFIXES)}){others}; at least 10 are needed"
        )
    if unread:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in unread.most_common())
        logging.warning(
            "--audio %s: left out for their format: %s; convert them (ffmpeg -i FILE FILE.flac)", audio, kinds
        )
    order = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    most = len(order) // 10
    valid, test = min(valid, most), min(test, most)
    parts = {"valid": order[:valid], "test": order[valid : valid + test], "train": order[valid + test :]}
    counts: Dict[str, int] = {}
    for part in NAMES:
        whole = [(name, *_length(found[name], left_out)) for name in tqdm(parts[part], desc=part, unit="file")]
        segments = any(seconds > longest for _, _, seconds in whole)  # a data dir has segments or whole files, not both
        utterances = [
            u for name, frames, seconds in whole if frames
            for u in _utterances(name, found[name], frames, seconds, longest if segments else None)
        ]  # fmt: skip
        if not utterances:
            raise UserError(
                f"--audio {audio}: none of the {len(parts[part])} files for {part} can be used: "
                f"{'; '.join(left_out[-len(parts[part]) :][:MAX_SHOWN])}; convert or remove such files"
            )
        counts[part] = write_data_dir(Path(out) / part, utterances)
        logging.info("%s: %d utterances of %d files", part, counts[part], len(parts[part]))
    logging.info("left out: %d%s", len(left_out), "".join(f"\n  {item}" for item in left_out[:10]))
    return counts


def _files_below(root: Path, left_out: List[str]) -> Iterator[Path]:
    """Yield all files below a directory; links to directories are followed, each directory once.

    Hidden files and directories are skipped: they hold second copies (.git/annex, a trash) or no audio (._x.wav).
    Directories that cannot be read are added to ``left_out``.
    """
    known = set()
    for place, inner, names in os.walk(root, followlinks=True, onerror=lambda e: left_out.append(str(e))):
        # Sorted, so that the order, and with it the name of a directory with two names, is always the same.
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        real = os.path.realpath(place)
        if real in known:
            inner.clear()
            continue
        known.add(real)
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _name(path: Path, root: Path) -> str:
    """Make an utterance id from a file's path below ``root``."""
    check_name(str(path))
    name = re.sub(r"\s+", "_", "-".join(path.relative_to(root).with_suffix("").parts))
    if len(name.encode()) > MAX_ID - 10:  # the number of a segment is appended later
        name = hashlib.sha256(name.encode()).hexdigest()
    if fault := id_fault(name):
        raise UserError(f"{path}: {fault}")
    return name


def _length(path: Path, left_out: List[str]) -> Tuple[int, float]:
    """Samples and seconds of a file; 0 if it cannot be read, is cut or is empty, which is added to ``left_out``."""
    try:
        frames, rate, _ = read_audio_info(str(path), whole=True)
    except UserError as e:
        left_out.append(f"{path}: {e}")
        return 0, 0.0
    if not frames:
        left_out.append(f"{path}: no audio in it")
    return frames, frames / rate


def _utterances(
    name: str, path: Path, frames: int, seconds: float, longest: Optional[float]
) -> Iterator[Utterance]:
    """The utterances of one file: itself, or segments no longer than ``longest``."""
    if longest is None:
        yield Utterance(name, name, str(path), num_samples=frames)
        return
    for number, (start, end) in enumerate(_cut(seconds, longest)):
        yield Utterance(f"{name}-{number:05d}", name, str(path), recording=name, start=start, end=end)


def _cut(seconds: float, longest: float) -> Iterator[Tuple[float, float]]:
    """Parts of equal length, none longer than ``longest``."""
    number = math.ceil(seconds / longest)
    for i in range(number):
        yield round(seconds * i / number, 3), round(seconds * (i + 1) / number, 3)
