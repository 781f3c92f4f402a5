"""Checking a data dir (see `espnet_kd.data.datadir`) before hours of training."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data.audio import read_audio_info
from espnet_kd.data.datadir import MAX_SHOWN, PathLike, iter_lines, split_line


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
