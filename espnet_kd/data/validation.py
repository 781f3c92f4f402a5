"""Checking a data dir (see `espnet_kd.data.datadir`) before hours of training."""

from __future__ import annotations

import functools
import re
import tempfile
from operator import itemgetter
from pathlib import Path
from typing import Callable, Iterator, List, Mapping, Optional, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data.audio import is_pipe, read_audio_info
from espnet_kd.data.datadir import (
    MAX_SHOWN,
    Entry,
    PathLike,
    iter_lines,
    join_sorted,
    os_errors_told,
    parse_segment,
    read_sorted,
    sort_externally,
    split_line,
)
from espnet_kd.data.parallel import map_with_bar
from espnet_kd.data.tokens import SPACE


class Faults:
    """Counts faults and keeps the first MAX_SHOWN of them; :meth:`raise_if_any` tells."""

    def __init__(self, where: PathLike) -> None:
        self.where = where
        self.number = 0
        self.shown: List[str] = []

    def add(self, message: str) -> None:
        """Note one fault."""
        self.number += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(message)

    def raise_if_any(self) -> None:
        """Raise UserError with the first faults and the count of all."""
        if self.number:
            more = self.number - len(self.shown)
            tail = f"\n  … and {more} more" if more else ""
            raise UserError(f"{self.where}: {self.number} fault(s) found\n  " + "\n  ".join(self.shown) + tail)


def validate(
    data_dir: PathLike,
    *,
    need_text: bool = True,
    allow_empty: bool = False,
    token_list: Optional[PathLike] = None,
    token_type: str = "char",
    min_seconds: float = 0.1,
    max_seconds: float = 30.0,
    check_audio: bool = True,
    fs: Optional[int] = 16000,
    nj: int = 1,
) -> int:
    """Check a data dir and return its number of utterances; only the recordings of ``segments`` are held in memory.

    Args:
        need_text: whether ``text`` has to exist; where it exists it is checked in any case.
        allow_empty: whether an id alone in ``text`` is no fault: untranscribed audio beside transcribed.
        token_list: a ``tokens.txt``; with ``token_type`` "char" or "word" every symbol of the texts must be in it
            (a BPE model covers by construction what its own list covers, so only characters are compared then).
        min_seconds, max_seconds: limits of an utterance's duration.
        check_audio: whether to read the headers of the audio files.
        fs: sampling rate in Hz that every file must have; None to accept any.
        nj: processes that read them.

    Raises:
        UserError: with the first faults, each with file, line and utterance, and their count.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such data directory")
    faults = Faults(data_dir)
    segmented = (data_dir / "segments").exists()
    names = ["segments" if segmented else "wav.scp", "utt2spk"]
    names += ["text"] if need_text or (data_dir / "text").exists() else []
    names += ["utt2num_samples"] if (data_dir / "utt2num_samples").exists() else []
    kinds = {**dict.fromkeys(names, "utterance"), "spk2utt": "speaker"}
    kinds.setdefault("wav.scp", "recording")
    with os_errors_told(data_dir):
        sizes = {name: _check_lines(data_dir / name, faults, what) for name, what in kinds.items()}
        _check_entries(data_dir, names, allow_empty, token_list, token_type, faults)
        lengths = _check_audio(data_dir / "wav.scp", sizes["wav.scp"], check_audio, fs, nj, faults)
        spans = _check_segments(data_dir, {key: s for key, _, s in lengths}, faults) if segmented else lengths
        for utt_id, number, seconds in spans:
            if seconds and not min_seconds <= seconds <= max_seconds:  # of zero length it is said already
                limit = f"shorter than {min_seconds}" if seconds < min_seconds else f"longer than {max_seconds}"
                faults.add(f"{data_dir / names[0]}:{number}: utterance '{utt_id}': {seconds:.2f} s, {limit} s")
    faults.raise_if_any()
    return sizes["utt2spk"]


def _look_up(token_list: Optional[PathLike], token_type: str) -> Callable[[str], List[str]]:
    """Return a function that lists the symbols of a text that ``token_list`` lacks."""
    if token_list is None:
        return lambda text: []
    known = {line for _, line in iter_lines(token_list)}
    if token_type == "word":
        return lambda text: sorted(set(text.split()) - known)
    if token_type == "bpe":  # the blank is a part of pieces
        known = {char for token in known for char in token} | {SPACE}
    return lambda text: sorted({SPACE if char == " " else char for char in text} - known)


def _check_lines(path: Path, faults: Faults, what: str) -> int:
    """Note bad UTF-8, empty lines, order and double ids; return the number of ids."""
    if not path.exists():
        faults.add(f"{path}: no such file")
        return 0
    previous = ""
    with open(path, "rb") as f:
        for number, raw in enumerate(f, 1):
            key, _ = split_line(raw.rstrip(b"\r\n").decode("utf-8", "replace"))
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as e:
                faults.add(f"{path}:{number}: {what} '{key}': not UTF-8 ({e.reason} at byte {e.start + 1})")
            if not key:
                faults.add(f"{path}:{number}: an empty line; remove it")
            elif key < previous:
                faults.add(f"{path}:{number}: {what} '{key}' is not sorted; sort the file with LC_ALL=C sort")
            previous = key or previous
    size = 0
    for key, found in join_sorted({"": read_sorted(path, "replace")}):
        size += 1
        (_, first, _), *more = found[""]
        for _, number, _ in more:
            faults.add(f"{path}:{number}: {what} '{key}' stands already in line {first}; remove one")
    return size


def _check_entries(
    data_dir: Path,
    names: Sequence[str],
    allow_empty: bool,
    token_list: Optional[PathLike],
    token_type: str,
    faults: Faults,
) -> None:
    """Note ids that one file has and another lacks, speakers that differ, and what is wrong with a text."""
    unknown_in = _look_up(token_list, token_type)
    names = [name for name in names if (data_dir / name).exists()]
    streams = {name: read_sorted(data_dir / name, "replace") for name in names}
    told = (data_dir / "spk2utt").exists()
    if told:
        streams["spk2utt"] = _invert(data_dir / "spk2utt")
    for utt_id, found in join_sorted(streams):
        for _, number, speaker in found.get("spk2utt", ()) if "utt2spk" not in found else ():
            where = f"{data_dir / 'spk2utt'}:{number}: utterance '{utt_id}'"
            faults.add(f"{where} of speaker '{speaker}' is missing in utt2spk")
        for name in (name for name in names if name in found):
            _, number, value = found[name][0]
            where = f"{data_dir / name}:{number}: utterance '{utt_id}'"
            for other in names:
                if other not in found:
                    faults.add(f"{where} is missing in {other}")
            if name == "utt2spk":
                speakers = {speaker for _, _, speaker in found.get("spk2utt", ())}
                if not value or " " in value:
                    faults.add(f"{where}: expected one speaker, found '{value}'")
                elif told and speakers != {value}:
                    listed = " and ".join(sorted(speakers)) or "no speaker"
                    faults.add(f"{where}: speaker {value} here, {listed} in spk2utt")
            elif name == "text":
                unknown = unknown_in(value)
                if not value and not allow_empty:
                    faults.add(f"{where}: the text is empty")
                if unknown:
                    listed = " ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
                    faults.add(f"{where}: not in {token_list}: {listed}")


def _invert(spk2utt: Path) -> Iterator[Entry]:
    """Stream (utterance, line number, speaker) sorted by utterance."""
    pairs = (
        (match[0], number, speaker)
        for speaker, number, utts in read_sorted(spk2utt, "replace")
        for match in re.finditer(r"\S+", utts)
    )
    return sort_externally(pairs, itemgetter(0), tempfile.gettempdir())


def _check_audio(
    path: Path, total: int, check: bool, fs: Optional[int], nj: int, faults: Faults
) -> Iterator[Tuple[str, int, Optional[float]]]:
    """Note unreadable, empty and wrongly sampled files; yield (id, line number, seconds where they are known)."""
    if not path.exists():
        return
    work = functools.partial(_read_info, check=check)
    entries = read_sorted(path, "replace")
    # Nothing is worth a process where nothing is opened.
    for (key, number, audio), info, fault in map_with_bar(
        work, entries, nj=nj if check else 1, desc=f"checking {path.parent}", unit="file", total=total
    ):
        where = f"{path}:{number}: '{key}'"
        seconds = None
        if fault:
            faults.add(f"{where}{fault}")
        if info:
            frames, rate, channels = info
            seconds = frames / rate
            if frames == 0:
                faults.add(f"{where}: the audio has zero length: {audio}")
            if fs is not None and rate != fs:
                faults.add(f"{where}: sampling rate {rate} Hz, expected {fs}: {audio}; resample it (stage 2 does)")
            if channels != 1:
                faults.add(f"{where}: {channels} channels, expected 1: {audio}")
        yield key, number, seconds


def _read_info(entry: Entry, check: bool) -> Tuple[Entry, Optional[Tuple[int, int, int]], str]:
    """Return a line of wav.scp with what the file's header says, and what is wrong with it."""
    audio = entry[2]
    if not audio:
        return entry, None, " names no audio file"
    if is_pipe(audio):
        return entry, None, " has a shell pipe, which is not run here: convert to a file"
    try:
        return entry, read_audio_info(audio) if check else None, ""
    except UserError as e:
        return entry, None, f": {e}"


def _check_segments(
    data_dir: Path, lengths: Mapping[str, Optional[float]], faults: Faults
) -> Iterator[Tuple[str, int, float]]:
    """Note segments that do not fit their recording; yield (utterance, line number, seconds) of the others."""
    path = data_dir / "segments"
    for utt_id, number, value in read_sorted(path, "replace"):
        where = f"{path}:{number}: utterance '{utt_id}'"
        try:
            recording, start, end = parse_segment(value, where)
        except UserError as e:
            faults.add(str(e))
            continue
        seconds = lengths.get(recording)
        if recording not in lengths:
            faults.add(f"{where}: recording '{recording}' is not in wav.scp")
        elif seconds is not None and end > seconds + 0.05:
            faults.add(f"{where}: ends at {end} s, the recording '{recording}' at {seconds:.2f} s")
        else:
            yield utt_id, number, end - start
