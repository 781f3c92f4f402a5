"""Kaldi-style data directories: reading, writing and checking.

A data dir holds ``wav.scp`` (utterance, or recording where ``segments`` exists, → audio file), ``text``, ``utt2spk``,
``spk2utt``, and optionally ``segments`` (utterance, recording, start, end in seconds) and ``utt2num_samples``. Every
file is UTF-8, one entry a line, id first, sorted as ``LC_ALL=C sort`` does. Relative audio paths count from the
working directory (the recipe), as in ESPnet. Untranscribed audio has no ``text``; beside transcribed audio, in one data
dir, its lines in ``text`` hold the id alone.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import os
import pickle
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple, TypeVar, Union

from espnet_kd.cli import UserError
from espnet_kd.files import replacing

PathLike = Union[str, Path]
Item = TypeVar("Item")
MAX_SHOWN = 10
RUN = 20_000  # items sorted in memory at a time, some 20 MB of utterances
# Blanks as C's isspace sees them. str.split() would also cut at U+3000 and U+00A0, which may stand inside a text.
_BLANK = re.compile(r"[ \t]+")


@dataclass(frozen=True)
class Utterance:
    """One utterance; ``start`` and ``end`` (seconds) only where it is a part of the file ``audio``."""

    utt_id: str
    speaker: str
    audio: str
    text: Optional[str] = None
    num_samples: Optional[int] = None
    recording: Optional[str] = None
    start: Optional[float] = None
    end: Optional[float] = None


def iter_lines(path: PathLike) -> Iterator[Tuple[int, str]]:
    """Yield (line number from 1, line without its end).

    Raises:
        UserError: the file is missing, or a line is not UTF-8.
    """
    try:
        with open(path, "rb") as f:
            for number, raw in enumerate(f, 1):
                try:
                    yield number, raw.rstrip(b"\r\n").decode("utf-8")
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}:{number}: not UTF-8 ({e.reason} at byte {e.start + 1})") from e
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e


def split_line(line: str) -> Tuple[str, str]:
    """Cut a line into its id and the rest (empty where there is none)."""
    parts = _BLANK.split(line.strip(" \t"), maxsplit=1)
    return parts[0], parts[1] if len(parts) > 1 else ""


def read_pairs(path: PathLike) -> Iterator[Tuple[str, str]]:
    """Stream (id, rest of the line) from a Kaldi-style file; blank lines are passed over."""
    for _, line in iter_lines(path):
        key, value = split_line(line)
        if key:
            yield key, value


def read_map(path: PathLike) -> Dict[str, str]:
    """Read a whole Kaldi-style file; an id that stands twice is an error naming its line."""
    out: Dict[str, str] = {}
    for number, line in iter_lines(path):
        key, value = split_line(line)
        if key in out:
            raise UserError(f"{path}:{number}: utterance '{key}' stands twice in this file; keep one of the lines")
        if key:
            out[key] = value
    return out


def read_segments(path: PathLike) -> Iterator[Tuple[str, str, float, float]]:
    """Stream (utterance, recording, start, end) with times in seconds."""
    for number, line in iter_lines(path):
        fields = line.split()
        if not fields:
            continue
        try:
            utt_id, recording, start, end = fields[0], fields[1], float(fields[2]), float(fields[3])
        except (IndexError, ValueError) as e:
            raise UserError(f"{path}:{number}: expected 'utterance recording start end', found '{line}'") from e
        if not 0 <= start < end:
            raise UserError(f"{path}:{number}: utterance '{utt_id}': start {start} and end {end} make no segment")
        yield utt_id, recording, start, end


def read_data_dir(data_dir: PathLike, read_text: bool = True) -> Iterator[Utterance]:
    """Stream the utterances of a data dir, in the order of ``segments`` or ``wav.scp``.

    ``text`` and ``utt2num_samples`` may be missing; the corresponding fields are then None. The audio is not opened,
    nor, without ``read_text``, a ``text``.

    Raises:
        UserError: a file is missing or malformed, or an utterance lacks its speaker or recording.
    """
    data_dir = Path(data_dir)
    speakers = read_map(data_dir / "utt2spk")
    texts = read_map(data_dir / "text") if read_text and (data_dir / "text").exists() else {}
    samples = read_map(data_dir / "utt2num_samples") if (data_dir / "utt2num_samples").exists() else {}

    def make(utt_id: str, audio: str, **extra) -> Utterance:
        if utt_id not in speakers:
            raise UserError(f"{data_dir / 'utt2spk'}: utterance '{utt_id}' is missing; add its speaker")
        num = samples.get(utt_id)
        return Utterance(
            utt_id, speakers[utt_id], audio, texts.get(utt_id), int(num) if num and num.isdigit() else None, **extra
        )

    if (data_dir / "segments").exists():
        audio_of = read_map(data_dir / "wav.scp")
        for utt_id, recording, start, end in read_segments(data_dir / "segments"):
            if recording not in audio_of:
                raise UserError(f"{data_dir / 'segments'}: recording '{recording}' of '{utt_id}' is not in wav.scp")
            yield make(utt_id, audio_of[recording], recording=recording, start=start, end=end)
    else:
        for utt_id, audio in read_pairs(data_dir / "wav.scp"):
            yield make(utt_id, audio)


def write_pairs(path: PathLike, pairs: Iterable[Tuple[str, str]]) -> None:
    """Write (id, value) lines sorted in C-locale order, whole or not at all."""
    # Code-point order is UTF-8 byte order, so Python's own comparison is `LC_ALL=C sort`.
    with replacing(path) as f:
        for key, value in sorted(pairs):
            f.write(f"{key} {value}\n" if value else f"{key}\n")


def sort_externally(items: Iterable[Item], key: Callable[[Item], Any], directory: PathLike) -> Iterator[Item]:
    """Yield ``items`` sorted by ``key`` in memory that does not grow with their number.

    All of them are read before the first is yielded. More than RUN of them wait, pickled, in nameless files of
    ``directory``, of which a kill leaves nothing.
    """
    items, runs = iter(items), []
    while chunk := sorted(itertools.islice(items, RUN), key=key):
        if not runs and len(chunk) < RUN:
            yield from chunk
            return
        runs.append(Spool(directory, chunk))
        del chunk  # or two of them would be held at a time
    yield from heapq.merge(*runs, key=key)


class Spool:
    """Items kept on disk in a nameless file, to be read again in the same order, any number of times."""

    def __init__(self, directory: PathLike, items: Iterable[Any] = ()) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (closed with the object)
        self._number = 0
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return self._number

    def append(self, item: Any) -> None:
        """Add one item at the end."""
        pickle.dump(item, self._file, pickle.HIGHEST_PROTOCOL)
        self._number += 1

    def __iter__(self) -> Iterator[Any]:
        self._file.seek(0)
        for _ in range(self._number):
            yield pickle.load(self._file)


@contextlib.contextmanager
def os_errors_told(where: PathLike) -> Iterator[None]:
    """Turn what the system refuses (no permission, no space) into one line of UserError."""
    try:
        yield
    except OSError as e:
        hints = {errno.ENOSPC: "; free some space", errno.EDQUOT: "; free some space",
                 errno.EACCES: "; see who owns it", errno.EPERM: "; see who owns it"}  # fmt: skip
        hint = hints.get(e.errno or 0, "")
        raise UserError(f"{e.filename or where}: {e.strerror or e}{hint}, and give the same command again") from e


def write_data_dir(data_dir: PathLike, utterances: Iterable[Utterance]) -> int:
    """Write a data dir and return its number of utterances; memory does not grow with it.

    ``segments`` is written where the utterances have a ``recording``; ``utt2num_samples`` where every one has its
    number; ``text`` where every one has a text. ``wav.scp`` is put there last: a directory that has it is whole. What
    goes wrong before that leaves the old files, or none.

    Raises:
        UserError: no utterance at all, an id twice, a blank inside an id, a line break inside a text, a recording that
            is two files, or the system refuses to write.
    """
    data_dir = Path(data_dir)
    kinds: Set[str] = set()
    with os_errors_told(data_dir):
        checked = _check_fields(data_dir, utterances, kinds)
        ordered = sort_externally(checked, lambda u: u.utt_id, data_dir.parent)
        first = next(ordered, None)  # by now every utterance was seen, and ``kinds`` is complete
        if first is None:
            raise UserError(f"{data_dir}: no utterance is left to write; look at the messages above for what was left "
                            "out")  # fmt: skip
        partial = data_dir / ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        try:
            partial.mkdir(parents=True)
            number = _write_files(data_dir, partial, itertools.chain([first], ordered), kinds)
            # Whatever an earlier run left there must not be read together with the new files.
            for name in ("wav.scp", "text", "segments", "utt2num_samples"):
                (data_dir / name).unlink(missing_ok=True)
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "wav.scp"):
                os.replace(path, data_dir / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                data_dir.rmdir()  # only where nothing is in it
    return number


def _check_fields(data_dir: Path, utterances: Iterable[Utterance], kinds: Set[str]) -> Iterator[Utterance]:
    """Pass the utterances on; note in ``kinds`` what some of them have or lack."""
    for u in utterances:
        for name in (u.utt_id, u.speaker):
            if not name or re.search(r"\s", name):
                raise UserError(f"{data_dir}: '{name}' cannot be an utterance or speaker id: empty or with blanks")
        if u.text is not None and re.search(r"[\r\n]", u.text):
            raise UserError(f"{data_dir}: utterance '{u.utt_id}': a line break inside the text")
        if u.text is None:
            kinds.add("no text")
        if u.num_samples is None:
            kinds.add("no num_samples")
        kinds.add("whole file" if u.recording is None else "segment")
        yield u


def _write_files(data_dir: Path, partial: Path, ordered: Iterable[Utterance], kinds: Set[str]) -> int:
    """Write the files of ``data_dir`` to ``partial``; return the number of utterances."""
    if {"whole file", "segment"} <= kinds:
        raise UserError(f"{data_dir}: some utterances are segments of a recording and some whole files; one or other")
    names = ["utt2spk", "segments" if "segment" in kinds else "wav.scp"]
    names += ["text"] if "no text" not in kinds else []
    names += ["utt2num_samples"] if "no num_samples" not in kinds else []
    recordings: Dict[str, str] = {}
    number, previous = 0, None
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(partial / name, "w", encoding="utf-8")) for name in names}
        for u in ordered:
            if previous is not None and u.utt_id == previous.utt_id:
                raise UserError(f"{data_dir}: utterance id '{u.utt_id}' comes twice ({previous.audio}, {u.audio}); "
                                "ids have to be unique")  # fmt: skip
            lines = {"utt2spk": u.speaker, "text": u.text, "utt2num_samples": str(u.num_samples), "wav.scp": u.audio}
            if u.recording is not None:
                if recordings.setdefault(u.recording, u.audio) != u.audio:
                    raise UserError(f"{data_dir}: recording '{u.recording}' is {recordings[u.recording]} and {u.audio}")
                lines["segments"] = f"{u.recording} {u.start or 0:.3f} {u.end:.3f}"
            for name, f in files.items():
                f.write(f"{u.utt_id} {lines[name]}\n" if lines[name] else f"{u.utt_id}\n")
            number, previous = number + 1, u
        if recordings:
            files["wav.scp"] = stack.enter_context(open(partial / "wav.scp", "w", encoding="utf-8"))
            files["wav.scp"].writelines(f"{name} {audio}\n" for name, audio in sorted(recordings.items()))
        files["utt2spk"].flush()
        pairs = sort_externally(((s, u) for u, s in read_pairs(partial / "utt2spk")), lambda pair: pair, data_dir)
        files["spk2utt"] = stack.enter_context(open(partial / "spk2utt", "w", encoding="utf-8"))
        for speaker, group in itertools.groupby(pairs, lambda pair: pair[0]):
            files["spk2utt"].write(speaker)
            files["spk2utt"].writelines(f" {utt_id}" for _, utt_id in group)
            files["spk2utt"].write("\n")
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
    return number


class Faults:
    """Collects faults; :meth:`raise_if_any` tells the first ones and how many there are."""

    def __init__(self, where: PathLike) -> None:
        self.where = where
        self.messages: List[str] = []

    def add(self, message: str) -> None:
        """Note one fault."""
        self.messages.append(message)

    def raise_if_any(self) -> None:
        """Raise UserError with the first MAX_SHOWN faults and the count of all."""
        if not self.messages:
            return
        shown = self.messages[:MAX_SHOWN]
        more = len(self.messages) - len(shown)
        tail = f"\n  … and {more} more" if more else ""
        raise UserError(f"{self.where}: {len(self.messages)} fault(s) found\n  " + "\n  ".join(shown) + tail)


def _read_checked(path: Path, faults: Faults, what: str = "utterance") -> Dict[str, Tuple[int, str]]:
    """Read a file as {id: (line number, rest)}, noting bad UTF-8, order and double ids instead of stopping."""
    out: Dict[str, Tuple[int, str]] = {}
    previous = ""
    if not path.exists():
        faults.add(f"{path}: no such file")
        return out
    with open(path, "rb") as f:
        for number, raw in enumerate(f, 1):
            try:
                line = raw.rstrip(b"\r\n").decode("utf-8")
            except UnicodeDecodeError as e:
                key = raw.split(maxsplit=1)[0].decode("utf-8", "replace") if raw.split() else "?"
                faults.add(f"{path}:{number}: {what} '{key}': not UTF-8 ({e.reason} at byte {e.start + 1})")
                out.setdefault(key, (number, "?"))
                continue
            key, value = split_line(line)
            if not key:
                faults.add(f"{path}:{number}: an empty line; remove it")
                continue
            if key in out:
                faults.add(f"{path}:{number}: {what} '{key}' stands already in line {out[key][0]}; remove one")
                continue
            if key < previous:
                faults.add(f"{path}:{number}: {what} '{key}' is not sorted; sort the file with LC_ALL=C sort")
            previous = key
            out[key] = (number, value)
    return out


def read_audio_info(path: str, whole: bool = False) -> Tuple[int, int, int]:
    """Return (samples per channel, sampling rate in Hz, channels) from the file's header.

    Args:
        whole: whether to refuse a FLAC, WAV or SPHERE file that ends before its header says. Nothing is decoded for
            this but FLAC's last block.

    Raises:
        UserError: the entry is a shell pipe, or the file is missing, unreadable or cut.
    """
    import soundfile  # not needed to read text files

    if "|" in path:
        raise UserError(f"'{path}' is a shell pipe, which is not run here: convert the audio to a file (flac, wav)")
    if not Path(path).is_file():
        raise UserError(f"no such audio file: {path} (relative paths count from the working directory)")
    try:
        with soundfile.SoundFile(path) as f:
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
) -> int:
    """Check a data dir and return its number of utterances.

    Args:
        need_text: whether ``text`` has to exist; where it exists it is checked in any case.
        allow_empty: whether an id alone in ``text`` is no fault: untranscribed audio beside transcribed.
        token_list: a ``tokens.txt``; with ``token_type`` "char" or "word" every symbol of the texts must be in it
            (a BPE model covers by construction what its own list covers, so only characters are compared then).
        min_seconds, max_seconds: limits of an utterance's duration.
        check_audio: whether to read the headers of the audio files.
        fs: sampling rate in Hz that every file must have; None to accept any.

    Raises:
        UserError: with the first faults, each with file, line and utterance, and their count.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such data directory")
    faults = Faults(data_dir)
    segmented = (data_dir / "segments").exists()
    wavs = _read_checked(data_dir / "wav.scp", faults, "recording" if segmented else "utterance")
    files = {"utt2spk": _read_checked(data_dir / "utt2spk", faults)}
    if segmented:
        files["segments"] = _read_checked(data_dir / "segments", faults)
    else:
        files["wav.scp"] = wavs
    if need_text or (data_dir / "text").exists():
        files["text"] = _read_checked(data_dir / "text", faults)
    if (data_dir / "utt2num_samples").exists():
        files["utt2num_samples"] = _read_checked(data_dir / "utt2num_samples", faults)
    _check_ids(data_dir, files, faults)
    _check_speakers(data_dir, files["utt2spk"], faults)
    if "text" in files:
        _check_texts(data_dir / "text", files["text"], allow_empty, token_list, token_type, faults)
    lengths = _check_audio(data_dir / "wav.scp", wavs, check_audio, fs, faults)
    spans = _check_segments(data_dir, files, lengths, faults) if segmented else lengths
    where = "segments" if segmented else "wav.scp"
    for utt_id, seconds in spans.items():
        if not segmented and seconds == 0:
            continue  # already said
        if not min_seconds <= seconds <= max_seconds:
            limit = f"shorter than {min_seconds}" if seconds < min_seconds else f"longer than {max_seconds}"
            number = files[where][utt_id][0]
            faults.add(f"{data_dir / where}:{number}: utterance '{utt_id}': {seconds:.2f} s, {limit} s")
    faults.raise_if_any()
    return len(files["utt2spk"])


def _check_ids(data_dir: Path, files: Dict[str, Dict[str, Tuple[int, str]]], faults: Faults) -> None:
    """Every id of one file has to be in all others."""
    for name, entries in files.items():
        for other, others in files.items():
            if name == other or not (data_dir / other).exists():
                continue
            for utt_id, (number, _) in entries.items():
                if utt_id not in others:
                    faults.add(f"{data_dir / name}:{number}: utterance '{utt_id}' is missing in {other}")


def _check_speakers(data_dir: Path, utt2spk: Dict[str, Tuple[int, str]], faults: Faults) -> None:
    path = data_dir / "spk2utt"
    told = {utt: spk for spk, (_, utts) in _read_checked(path, faults, "speaker").items() for utt in utts.split()}
    for utt_id, (number, speaker) in utt2spk.items():
        where = f"{data_dir / 'utt2spk'}:{number}: utterance '{utt_id}'"
        if not speaker or " " in speaker:
            faults.add(f"{where}: expected one speaker, found '{speaker}'")
        elif path.exists() and told.get(utt_id) != speaker:
            found = told.get(utt_id, "no speaker")
            faults.add(f"{where}: speaker {speaker} here, {found} in spk2utt")


def _check_texts(
    path: Path,
    texts: Dict[str, Tuple[int, str]],
    allow_empty: bool,
    token_list: Optional[PathLike],
    token_type: str,
    faults: Faults,
) -> None:
    symbols: Callable[[str], Iterable[str]] = str.split if token_type == "word" else (lambda text: set(text) - {" "})
    known = None
    if token_list is not None:
        known = {line for _, line in iter_lines(token_list)}
        if token_type == "bpe":
            known = {char for token in known for char in token}
    for utt_id, (number, text) in texts.items():
        if not text:
            if not allow_empty:
                faults.add(f"{path}:{number}: utterance '{utt_id}': the text is empty")
        elif known is not None:
            unknown: Sequence[str] = sorted(set(symbols(text)) - known)
            if unknown:
                listed = " ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
                faults.add(f"{path}:{number}: utterance '{utt_id}': not in {token_list}: {listed}")


def _check_audio(
    path: Path, wavs: Dict[str, Tuple[int, str]], check: bool, fs: Optional[int], faults: Faults
) -> Dict[str, float]:
    """Note unreadable, empty and wrongly sampled files; return {id: seconds} of the others."""
    lengths: Dict[str, float] = {}
    for key, (number, audio) in wavs.items():
        where = f"{path}:{number}: '{key}'"
        if "|" in audio or not audio:
            why = "has a shell pipe, which is not run here: convert to a file" if audio else "names no audio file"
            faults.add(f"{where} {why}")
        elif check:
            try:
                frames, rate, channels = read_audio_info(audio)
            except UserError as e:
                faults.add(f"{where}: {e}")
                continue
            if frames == 0:
                faults.add(f"{where}: the audio has zero length: {audio}")
            if fs is not None and rate != fs:
                faults.add(f"{where}: sampling rate {rate} Hz, expected {fs}: {audio}; resample it (stage 2 does)")
            if channels != 1:
                faults.add(f"{where}: {channels} channels, expected 1: {audio}")
            lengths[key] = frames / rate
    return lengths


def _check_segments(
    data_dir: Path, files: Dict[str, Dict[str, Tuple[int, str]]], lengths: Dict[str, float], faults: Faults
) -> Dict[str, float]:
    """Note segments that do not fit their recording; return {utterance: seconds}."""
    spans: Dict[str, float] = {}
    for utt_id, (number, value) in files["segments"].items():
        where = f"{data_dir / 'segments'}:{number}: utterance '{utt_id}'"
        fields = value.split()
        try:
            recording, start, end = fields[0], float(fields[1]), float(fields[2])
        except (IndexError, ValueError):
            faults.add(f"{where}: expected 'recording start end', found '{value}'")
            continue
        if not 0 <= start < end:
            faults.add(f"{where}: start {start} and end {end} make no segment")
        elif recording in lengths and end > lengths[recording] + 0.05:
            faults.add(f"{where}: ends at {end} s, the recording '{recording}' at {lengths[recording]:.2f} s")
        else:
            spans[utt_id] = end - start
    return spans
