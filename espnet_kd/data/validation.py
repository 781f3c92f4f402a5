"""Checks of a data dir (see `espnet_kd.data.datadir`) before a training."""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data.audio import check_samples, is_pipe, read_audio_info
from espnet_kd.data.characters import MARK, encoding_fault, id_fault, name_character, odd_blank, text_fault
from espnet_kd.data.datadir import (
    MAX_OVERSHOOT,
    MAX_SHOWN,
    NumberedLine,
    PathLike,
    join_sorted,
    os_errors_as_user_errors,
    parse_segment,
    read_sorted,
    sort_externally,
    split_line,
)
from espnet_kd.data.parallel import map_with_bar
from espnet_kd.data.tokenizing import TokenList

Span = Tuple[str, int, Optional[float], Optional[int]]  # id, line number, seconds, channels


class Faults:
    """Counts faults and keeps the first MAX_SHOWN of them; :meth:`raise_if_any` raises them."""

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
    allow_unknown: bool = False,
    min_seconds: float = 0.1,
    max_seconds: float = 30.0,
    check_audio: bool = True,
    decode: bool = True,
    fs: Optional[int] = 16000,
    nj: int = 1,
) -> int:
    """Check a data dir and return its number of utterances; only the recordings of ``segments`` are held in memory.

    Args:
        need_text: whether ``text`` has to exist; where it exists it is checked in any case.
        allow_empty: whether a line of ``text`` may hold only an id, for untranscribed audio beside transcribed audio.
        token_list: a ``tokens.txt``, with its BPE model, symbols and text cleaner beside it; every token of the texts
            must be in it.
        allow_unknown: only count the utterances with other tokens, as in validation data.
        min_seconds, max_seconds: limits of an utterance's duration.
        check_audio: whether to open the audio files.
        decode: whether to decode the files in which this can reveal a fault (see
            :func:`~espnet_kd.data.audio.check_samples`), as formatting does; otherwise only headers are read.
        fs: sampling rate in Hz that every file must have; None to accept any.
        nj: processes that read the audio files.

    Raises:
        UserError: there are faults; the message has their number, and the first ones with file, line and utterance.
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
    for name in kinds:
        path = data_dir / name
        head = _head(path) if path.is_file() else b""
        if fault := encoding_fault(head):
            faults.add(f"{path}: {fault.replace('FILE', str(path))}")
        elif head.startswith(MARK):
            faults.add(f"{path}:1: a byte order mark (U+FEFF), which ESPnet would take for a part of the first id; "
                       f"remove it (stage 2 does): sed -i '1s/^.//' {path}")  # fmt: skip
    faults.raise_if_any()  # such files cannot be checked any further
    with os_errors_as_user_errors(data_dir):
        sizes = {name: _check_lines(data_dir / name, faults, what) for name, what in kinds.items()}
        if not sizes[names[0]] and not faults.number:
            faults.add(f"{data_dir / names[0]}: it is empty; a data dir needs an utterance")
        texts = _Texts(token_list, token_type, allow_empty, allow_unknown)
        _check_entries(data_dir, names, texts, faults)
        texts.report(data_dir / "text")
        work = functools.partial(_read_info, check=check_audio, decode=decode)
        nj = nj if check_audio else 1  # without opening files, further processes do not pay off
        spans: Iterable[Span] = _check_audio(data_dir / "wav.scp", work, sizes["wav.scp"], fs, nj, faults)
        if segmented:
            spans = _check_segments(data_dir, {key: (seconds, channels) for key, _, seconds, channels in spans}, faults)
        for utt_id, number, seconds, channels in spans:
            if channels not in (1, None):
                where = f"{data_dir / names[0]}:{number}: utterance '{utt_id}'"
                faults.add(f"{where}: {channels} channels, expected 1 (stage 2 takes their mean, or the channel that a "
                           "line of segments names)")  # fmt: skip
            if seconds and not min_seconds <= seconds <= max_seconds:  # zero length is reported already
                limit = f"shorter than {min_seconds}" if seconds < min_seconds else f"longer than {max_seconds}"
                faults.add(f"{data_dir / names[0]}:{number}: utterance '{utt_id}': {seconds:.2f} s, {limit} s")
    faults.raise_if_any()
    return sizes["utt2spk"]


def _head(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.readline(1000)


def _check_lines(path: Path, faults: Faults, what: str) -> int:
    """Note bad UTF-8, empty lines, wrong order and duplicate ids; return the number of ids."""
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
            if fault := id_fault(key) if key and what != "recording" else None:
                faults.add(f"{path}:{number}: {what} '{key}': {fault}")
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


class _Texts:
    """Checks texts for faults; with ``allow_unknown``, tokens that the token list lacks are only counted."""

    def __init__(
        self, token_list: Optional[PathLike], token_type: str, allow_empty: bool, allow_unknown: bool
    ) -> None:
        self._path, self._allow_empty, self._allow_unknown = token_list, allow_empty, allow_unknown
        self._tokens = None if token_list is None else TokenList(token_list, token_type)
        self._takes_any_blank = token_type == "bpe"
        self._unknown: Counter[str] = Counter()
        self._number = 0

    def faults(self, text: str) -> Iterator[str]:
        """Yield the faults of one text."""
        if not text.strip():
            if not self._allow_empty:
                yield "the text is empty"
            return
        special = self._tokens.special_fault(text) if self._tokens else None
        if fault := text_fault(text) or special:
            yield fault
        if (char := odd_blank(text)) and not self._takes_any_blank:
            yield f"the text has {name_character(char)}, which is no plain blank; make it one (stage 2 does)"
        elif unknown := self._tokens.unknown(text) if self._tokens and not special else []:
            self._unknown.update(unknown)
            self._number += 1
            if not self._allow_unknown:
                listed = " ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
                yield f"not in {self._path}: {listed}"

    def report(self, path: Path) -> None:
        """Log the tokens that the token list lacks, if these are allowed."""
        if self._allow_unknown and self._number:
            listed = " ".join(f"{token} ({number})" for token, number in self._unknown.most_common(5))
            more = f" and {len(self._unknown) - 5} more" if len(self._unknown) > 5 else ""
            logging.warning("%s: %d utterances have tokens that are not in %s, each of which becomes <unk>: %s%s",
                            path, self._number, self._path, listed, more)  # fmt: skip


def _check_entries(data_dir: Path, names: Sequence[str], texts: _Texts, faults: Faults) -> None:
    """Note ids that one file has and another lacks, speakers that differ, and faults of texts."""
    names = [name for name in names if (data_dir / name).exists()]
    streams = {name: read_sorted(data_dir / name, "replace") for name in names}
    has_spk2utt = (data_dir / "spk2utt").exists()
    if has_spk2utt:
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
                if id_fault(value):
                    faults.add(f"{where}: expected one speaker, found '{value}': {id_fault(value)}")
                elif has_spk2utt and speakers != {value}:
                    listed = " and ".join(sorted(speakers)) or "no speaker"
                    faults.add(f"{where}: speaker {value} here, {listed} in spk2utt")
            elif name == "text":
                for fault in texts.faults(value):
                    faults.add(f"{where}: {fault}")


def _invert(spk2utt: Path) -> Iterator[NumberedLine]:
    """Stream (utterance, line number, speaker) sorted by utterance."""
    pairs = (
        (match[0], number, speaker)
        for speaker, number, utts in read_sorted(spk2utt, "replace")
        for match in re.finditer(r"\S+", utts)
    )
    return sort_externally(pairs, itemgetter(0), tempfile.gettempdir())


def _check_audio(
    path: Path, work: Callable, total: int, fs: Optional[int], nj: int, faults: Faults
) -> Iterator[Span]:
    """Note unreadable, empty and wrongly sampled files; yield (id, line number, seconds and channels where known)."""
    if not path.exists():
        return
    entries = read_sorted(path, "replace")
    for (key, number, audio), info, fault in map_with_bar(
        work, entries, nj=nj, desc=f"checking {path.parent}", unit="file", total=total
    ):
        where = f"{path}:{number}: '{key}'"
        seconds = channels = None
        if fault:
            faults.add(f"{where}{fault}")
        if info:
            frames, rate, channels = info
            seconds = frames / rate
            if frames == 0:
                faults.add(f"{where}: the audio has zero length: {audio}")
            if fs is not None and rate != fs:
                faults.add(f"{where}: sampling rate {rate} Hz, expected {fs}: {audio}; resample it (stage 2 does)")
        yield key, number, seconds, channels


def _read_info(
    entry: NumberedLine, check: bool, decode: bool
) -> Tuple[NumberedLine, Optional[Tuple[int, int, int]], str]:
    """Return the entry of wav.scp, the (frames, rate, channels) of its file's header, and its fault or ""."""
    audio = entry[2]
    if not audio:
        return entry, None, " names no audio file"
    if is_pipe(audio):
        return entry, None, " has a shell pipe, which is not run here: convert to a file"
    try:
        info = read_audio_info(audio, whole=True) if check else None
        if info and decode and check_samples(audio):
            return entry, info, f": {audio} has samples beyond full scale; scale it to 1 at most (stage 2 clips)"
        return entry, info, ""
    except UserError as e:
        return entry, None, f": {e}"


def _check_segments(
    data_dir: Path, recordings: Mapping[str, Tuple[Optional[float], Optional[int]]], faults: Faults
) -> Iterator[Span]:
    """Note segments that do not fit their recording; for the others, yield the same as :func:`_check_audio`."""
    path = data_dir / "segments"
    for utt_id, number, value in read_sorted(path, "replace"):
        where = f"{path}:{number}: utterance '{utt_id}'"
        try:
            recording, start, end, channel = parse_segment(value, where)
        except UserError as e:
            faults.add(str(e))
            continue
        if recording not in recordings:
            faults.add(f"{where}: recording '{recording}' is not in wav.scp")
            continue
        seconds, channels = recordings[recording]
        if seconds is not None and (end > seconds + MAX_OVERSHOOT or start >= seconds):
            faults.add(f"{where}: goes from {start} to {end} s, the recording '{recording}' to {seconds:.2f} s")
        elif channel is not None and channels is not None and channel >= channels:
            faults.add(f"{where}: channel {channel}, counted from 0, and '{recording}' has {channels}")
        else:
            end = end if seconds is None else min(end, seconds)
            yield utt_id, number, end - start, channels if channel is None else 1
