"""Kaldi-style data directories: reading and writing.

A data dir holds ``wav.scp`` (utterance, or recording where ``segments`` exists, → audio file), ``text``, ``utt2spk``,
``spk2utt``, and optionally ``segments`` (utterance, recording, start, end in seconds, and a channel, counted from 0,
where it is one of several) and ``utt2num_samples``. Every file is UTF-8, one entry a line, id first, sorted as
``LC_ALL=C sort`` does. Relative audio paths count from the working directory (the recipe), as in ESPnet. A data dir of
untranscribed audio has no ``text``. If it holds both, the line of an untranscribed utterance in ``text`` is its id.
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
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Set, Tuple, TypeVar

from espnet_kd.cli import UserError
from espnet_kd.data.characters import MARK, encoding_fault, id_fault, text_fault
from espnet_kd.files import PathLike

Item = TypeVar("Item")
NumberedLine = Tuple[str, int, str]  # id, line number from 1, rest of the line
#: The file with the texts from before their conversion to a teacher's characters (`espnet_kd.data.text_fit`).
OWN_TEXT = "text.before_fit"
MAX_SHOWN = 10  # faults that a message names; more are only counted
MAX_OVERSHOOT = 0.5  # seconds by which a segment may end after its recording, as in Kaldi's extract-segments
RUN = 20_000  # items sorted in memory at a time, some 20 MB of utterances
# Separator of the fields of a line. ESPnet splits at other white space too, which espnet_kd.data.characters finds.
_BLANK = re.compile(r"[ \t]+")


@dataclass(frozen=True)
class Utterance:
    """One utterance; it has ``start`` and ``end`` (seconds) only if it is a part of the file ``audio``.

    ``channel``, counted from 0, is the channel to read, if the line of ``segments`` names one.
    """

    utt_id: str
    speaker: str
    audio: str
    text: Optional[str] = None
    num_samples: Optional[int] = None
    recording: Optional[str] = None
    start: Optional[float] = None
    end: Optional[float] = None
    channel: Optional[int] = None


def refuse_same(sources: Iterable[PathLike], dst: PathLike, option: str) -> None:
    """Refuse to overwrite a data dir that is also read (:class:`UserError`)."""
    for source in sources:
        if os.path.realpath(source) == os.path.realpath(dst):
            raise UserError(f"{dst} is to be read, and cannot be written at the same time; choose another {option}")


def iter_lines(path: PathLike, errors: str = "strict") -> Iterator[Tuple[int, str]]:
    """Yield (line number from 1, line without its end); a byte order mark before the first line is skipped.

    Args:
        errors: "strict", or "replace" to continue after bytes that are not UTF-8.

    Raises:
        UserError: the file is missing, or a line is not UTF-8.
    """
    try:
        with open(path, "rb") as f:
            for number, raw in enumerate(f, 1):
                fault = encoding_fault(raw) if number == 1 and errors == "strict" else None
                if fault:
                    raise UserError(f"{path}: {fault.replace('FILE', str(path))}")
                raw = raw.removeprefix(MARK) if number == 1 else raw
                try:
                    yield number, raw.rstrip(b"\r\n").decode("utf-8", errors)
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}:{number}: not UTF-8 ({e.reason} at byte {e.start + 1})") from e
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e


def split_line(line: str) -> Tuple[str, str]:
    """Cut a line into its id and the rest (empty where there is none)."""
    parts = _BLANK.split(line.strip(" \t"), maxsplit=1)
    return parts[0], parts[1] if len(parts) > 1 else ""


def read_pairs(path: PathLike) -> Iterator[Tuple[str, str]]:
    """Stream (id, rest of the line) from a Kaldi-style file; blank lines are skipped."""
    for _, line in iter_lines(path):
        key, value = split_line(line)
        if key:
            yield key, value


def read_map(path: PathLike) -> Dict[str, str]:
    """Read a whole Kaldi-style file; a duplicate id is an error that names its line."""
    out: Dict[str, str] = {}
    for number, line in iter_lines(path):
        key, value = split_line(line)
        if key in out:
            raise UserError(f"{path}:{number}: utterance '{key}' stands twice in this file; keep one of the lines")
        if key:
            out[key] = value
    return out


def read_sorted(path: PathLike, errors: str = "strict") -> Iterator[NumberedLine]:
    """Stream (id, line number, rest of the line) sorted by id, in memory that does not grow with the file.

    A file that is already sorted, as data dirs require, is read directly. Blank lines are skipped.
    """

    def entries() -> Iterator[NumberedLine]:
        for number, line in iter_lines(path, errors):
            key, value = split_line(line)
            if key:
                yield key, number, value

    if all(a[0] <= b[0] for a, b in itertools.pairwise(entries())):
        yield from entries()
    else:
        yield from sort_externally(entries(), itemgetter(0), tempfile.gettempdir())


def join_sorted(streams: Mapping[str, Iterable[Tuple]]) -> Iterator[Tuple[str, Dict[str, List[Any]]]]:
    """Join streams of tuples sorted by their first item: yield (id, {name of a stream: its tuples with this id}).

    The dict has no key for a stream without the id; a list with more than one tuple means a duplicate id.
    """

    def tagged(name: str, items: Iterable[Tuple]) -> Iterator[Tuple[str, str, Tuple]]:
        for item in items:
            yield item[0], name, item

    merged = heapq.merge(*(tagged(name, items) for name, items in streams.items()), key=itemgetter(0))
    for key, group in itertools.groupby(merged, itemgetter(0)):
        found: Dict[str, List[Any]] = {}
        for _, name, item in group:
            found.setdefault(name, []).append(item)
        yield key, found


def parse_segment(value: str, where: str) -> Tuple[str, float, float, Optional[int]]:
    """Return (recording, start, end, channel) of a line of ``segments`` without its id; times in seconds.

    The line may end with a channel, counted from 0, as in Kaldi; otherwise the channel is None.

    Raises:
        UserError: the line is malformed, or the segment is empty; the message begins with ``where``.
    """
    fields = value.split()
    try:
        recording, start, end = fields[0], float(fields[1]), float(fields[2])
        channel = int(fields[3]) if len(fields) > 3 else None
    except (IndexError, ValueError) as e:
        raise UserError(f"{where}: expected 'recording start end [channel]', found '{value}'") from e
    if len(fields) > 4 or not 0 <= (channel or 0) < 1000:
        raise UserError(f"{where}: expected 'recording start end [channel]', found '{value}'")
    if not 0 <= start < end:
        raise UserError(f"{where}: start {start} and end {end} make no segment")
    return recording, start, end, channel


def read_data_dir(data_dir: PathLike, read_text: bool = True) -> Iterator[Utterance]:
    """Stream the utterances of a data dir, sorted by id; only the recordings of ``segments`` are held in memory.

    ``text`` and ``utt2num_samples`` may be missing; the corresponding fields are then None. The audio is not opened;
    ``text`` is opened only with ``read_text``.

    Raises:
        UserError: a file is missing or malformed, an id stands twice in it, or an utterance lacks its speaker or
            recording.
    """
    data_dir = Path(data_dir)
    segmented = (data_dir / "segments").exists()
    audio_of = read_map(data_dir / "wav.scp") if segmented else {}
    main = "segments" if segmented else "wav.scp"
    optional = [name for name in ("text", "utt2num_samples") if (data_dir / name).exists()]
    names = [main, "utt2spk", *(name for name in optional if read_text or name != "text")]
    for utt_id, found in join_sorted({name: read_sorted(data_dir / name) for name in names}):
        for name, entries in found.items():
            if len(entries) > 1:
                raise UserError(f"{data_dir / name}:{entries[1][1]}: utterance '{utt_id}' stands twice in this file; "
                                "keep one of the lines")  # fmt: skip
        values = {name: entries[0][2] for name, entries in found.items()}
        if main not in values:
            continue
        for name, fault in ((main, id_fault(utt_id)), ("utt2spk", id_fault(values.get("utt2spk", "-"))),
                            ("text", text_fault(values.get("text", "")))):  # fmt: skip
            if fault:
                raise UserError(f"{data_dir / name}:{found[name][0][1]}: utterance '{utt_id}': {fault}")
        if "utt2spk" not in values:
            raise UserError(f"{data_dir / 'utt2spk'}: utterance '{utt_id}' is missing; add its speaker")
        number = values.get("utt2num_samples", "")
        utt = Utterance(utt_id, values["utt2spk"], values[main], values.get("text"),
                        int(number) if number.isdecimal() else None)  # fmt: skip
        if segmented:
            where = f"{data_dir / 'segments'}:{found[main][0][1]}: utterance '{utt_id}'"
            recording, start, end, channel = parse_segment(values[main], where)
            if recording not in audio_of:
                raise UserError(f"{data_dir / 'segments'}: recording '{recording}' of '{utt_id}' is not in wav.scp")
            utt = replace(utt, audio=audio_of[recording], recording=recording, start=start, end=end, channel=channel)
        yield utt


def sort_externally(items: Iterable[Item], key: Callable[[Item], Any], directory: PathLike) -> Iterator[Item]:
    """Yield ``items`` sorted by ``key`` in memory that does not grow with their number.

    All items are read before the first is yielded; the sort is stable. If there are more than RUN, they are pickled
    into unnamed files in ``directory``, which the system removes even if the process is killed.
    """
    rest = iter(items)
    runs: List[Spool] = []
    while chunk := sorted(itertools.islice(rest, RUN), key=key):
        if not runs and len(chunk) < RUN:
            yield from chunk
            return
        runs.append(Spool(directory, chunk))
        del chunk  # otherwise two chunks would be in memory at a time
    yield from heapq.merge(*runs, key=key)


class Spool:
    """Items kept on disk in an unnamed file, which can be read again in the same order, any number of times."""

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
def os_errors_as_user_errors(where: PathLike) -> Iterator[None]:
    """Turn the operating system's errors (permission, space) into a UserError of one line."""
    try:
        yield
    except OSError as e:
        hints = {errno.ENOSPC: "; free some space", errno.EDQUOT: "; free some space",
                 errno.EACCES: "; see who owns it", errno.EPERM: "; see who owns it"}  # fmt: skip
        hint = hints.get(e.errno or 0, "")
        raise UserError(f"{e.filename or where}: {e.strerror or e}{hint}, and give the same command again") from e


def write_data_dir(data_dir: PathLike, utterances: Iterable[Utterance]) -> int:
    """Write a data dir and return its number of utterances; memory does not grow with it.

    ``segments`` is written if the utterances have a ``recording``, ``utt2num_samples`` if each of them has its number
    of samples, and ``text`` if each of them has a text. ``wav.scp`` is written last: a directory that has it is
    complete. An error before that leaves the old files, or no ``wav.scp``.

    Raises:
        UserError: no utterance at all, an id twice, a blank inside an id, a line break inside a text, a recording with
            two files, or the system refuses to write.
    """
    data_dir = Path(data_dir)
    kinds: Set[str] = set()
    with os_errors_as_user_errors(data_dir):
        checked = _check_fields(data_dir, utterances, kinds)
        ordered = sort_externally(checked, lambda u: u.utt_id, data_dir.parent)
        first = next(ordered, None)  # this reads all utterances, and so completes ``kinds``
        if first is None:
            raise UserError(f"{data_dir}: no utterance is left to write; look at the messages above for what was left "
                            "out")  # fmt: skip
        partial = data_dir / ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        try:
            partial.mkdir(parents=True)
            number = _write_files(data_dir, partial, itertools.chain([first], ordered), kinds)
            # Files of an earlier run must not be read together with the new ones.
            for name in ("wav.scp", "text", OWN_TEXT, "segments", "utt2num_samples"):
                (data_dir / name).unlink(missing_ok=True)
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "wav.scp"):
                os.replace(path, data_dir / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                data_dir.rmdir()  # removes the directory only if it is empty
    return number


def _check_fields(data_dir: Path, utterances: Iterable[Utterance], kinds: Set[str]) -> Iterator[Utterance]:
    """Yield the utterances after checking them; add to ``kinds`` what some of them have or lack."""
    for u in utterances:
        for name in (u.utt_id, u.speaker):
            if fault := id_fault(name):
                raise UserError(f"{data_dir}: utterance '{u.utt_id}', speaker '{u.speaker}': {fault}")
        if fault := text_fault(u.text or ""):
            raise UserError(f"{data_dir}: utterance '{u.utt_id}': {fault}")
        # ESPnet strips white space from the ends of a file name, and ends the line at a CR.
        if u.audio != u.audio.strip() or re.search(r"[\r\n]", u.audio):
            raise UserError(f"{data_dir}: utterance '{u.utt_id}': the file name {u.audio!r} has white space at an end, "
                            "or a line break in it; rename the file")  # fmt: skip
        if u.text is None:
            kinds.add("no text")
        if u.num_samples is None:
            kinds.add("no num_samples")
        kinds.add("whole file" if u.recording is None else "segment")
        yield u


def _write_files(data_dir: Path, partial: Path, ordered: Iterable[Utterance], kinds: Set[str]) -> int:
    """Write the files of ``data_dir`` to ``partial``; return the number of utterances."""
    if {"whole file", "segment"} <= kinds:
        raise UserError(f"{data_dir}: some utterances are segments of a recording, others whole files; give one kind")
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
                    both = f"{recordings[u.recording]}, {u.audio}"
                    raise UserError(f"{data_dir}: recording '{u.recording}' has two files: {both}")
                channel = "" if u.channel is None else f" {u.channel}"
                lines["segments"] = f"{u.recording} {u.start or 0:.3f} {u.end:.3f}{channel}"
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
