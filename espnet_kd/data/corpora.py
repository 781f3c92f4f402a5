"""Functions for all corpora: download, unpacking, parallel probing of the audio, and the list of omitted utterances."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import platform
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Collection, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple, Union

from espnet_kd.cli import UserError
from espnet_kd.data.audio import read_audio_info
from espnet_kd.data.datadir import MAX_SHOWN, Spool, Utterance, os_errors_as_user_errors, write_data_dir
from espnet_kd.data.parallel import map_with_bar
from espnet_kd.files import PathLike, remove_leftovers, replacing

BLOCK = 1 << 16


class LeftOut:
    """Counts and names the utterances that are left out of a data dir."""

    def __init__(self, skip_faulty: bool = False) -> None:
        self.skip_faulty = skip_faulty
        self.names: Dict[str, List[str]] = {}
        self.lacking: List[str] = []

    def add(self, reason: str, name: str) -> None:
        """Note one omitted utterance or file."""
        self.names.setdefault(reason, []).append(name)

    def fault(self, reason: str, name: str, where: PathLike, mend: str) -> None:
        """Note a fault of the corpus if ``skip_faulty`` is set; otherwise stop.

        Raises:
            UserError: ``skip_faulty`` is not set.
        """
        if not self.skip_faulty:
            raise UserError(f"{where}: {reason}: {name}; {mend}, or leave such ones out with --skip_faulty")
        self.add(reason, name)

    def expect(
        self, what: str, found: int, expected: Optional[int], names: Collection[str] = (), where: str = ""
    ) -> None:
        """Note that a corpus is incomplete, if it has less than the original.

        Args:
            what: the things that are counted, such as "speakers of train-clean-100".
            expected: their number in the original; None if it is not known.
            names: those that the list ``where`` names and the corpus lacks.
        """
        if names or found < (expected or 0):
            number = found + len(names) if expected is None else expected
            shown = ", ".join(sorted(names)[:MAX_SHOWN]) + (" …" if len(names) > MAX_SHOWN else "")
            which = f" (missing of {where}: {shown})" if names else ""
            self.lacking.append(f"{found} of {number} {what}{which}")

    def report(self, what: str, path: PathLike) -> None:
        """Log what is missing, and how many utterances are left out and why; write their names, if any, to ``path``."""
        if self.lacking:
            logging.warning("%s: the corpus is incomplete: %s; add the rest, unless this is intended",
                            what, "; ".join(self.lacking))  # fmt: skip
        remove_leftovers(path)
        total = sum(map(len, self.names.values()))
        if not total:
            Path(path).unlink(missing_ok=True)
            logging.info("%s: left out: 0", what)
            return
        with replacing(path) as f:
            f.writelines(f"{name} {reason}\n" for reason, names in self.names.items() for name in names)
        logging.warning("%s: left out: %d: %s; all in %s", what, total, self.in_words(), path)

    def in_words(self) -> str:
        """How many utterances are left out for each reason, with the first names."""
        shown = []
        for reason, names in self.names.items():
            more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
            shown.append(f"{len(names)} {reason} ({', '.join(names[:MAX_SHOWN])}{more})")
        return "; ".join(shown)


def write_corpus_dir(
    data_dir: PathLike,
    groups: Union[Spool, Collection[Sequence[Utterance]]],
    left_out: LeftOut,
    *,
    nj: int,
    fs: int = 16000,
) -> int:
    """Probe the audio of ``groups`` with ``nj`` processes, write the data dir and return its number of utterances.

    Args:
        groups: utterances without ``num_samples``, a group for each audio file. They are read once.
        fs: the corpus's own sampling rate in Hz; files of another rate are logged, and stage 2 resamples them.

    Raises:
        UserError: audio that is missing, cut, unreadable or empty (unless ``left_out`` skips faults), and the causes
            of :func:`~espnet_kd.data.datadir.write_data_dir`.
    """
    data_dir = Path(data_dir)
    seconds = 0.0
    speakers: Set[str] = set()
    rates: Dict[int, int] = {}

    def probed() -> Iterator[Utterance]:
        nonlocal seconds
        for utts, rate, fault in map_with_bar(_probe, groups, nj=nj, desc=data_dir.name, unit="file"):
            if fault:
                reason, name, where = fault
                left_out.fault(reason, name, where, "fetch or convert it again")
                continue
            rates[rate] = rates.get(rate, 0) + 1
            for u in utts:
                if u.start is not None and u.end is not None and u.start >= u.end:
                    left_out.fault("segment behind the end of the recording", u.utt_id, u.audio, "fetch it again")
                    continue
                seconds += (u.num_samples or 0) / rate if u.end is None else u.end - (u.start or 0)
                speakers.add(u.speaker)
                yield u
        if not speakers and left_out.names:
            raise UserError(f"{data_dir}: no utterance is left; left out are {left_out.in_words()}")

    number = write_data_dir(data_dir, probed())
    for rate, files in sorted(rates.items()):
        if rate != fs:
            logging.warning("%s: %d of %d audio files have %d Hz, not %d; stage 2 (asr_kd_data format) resamples",
                            data_dir, files, sum(rates.values()), rate, fs)  # fmt: skip
    logging.info("%s: %d utterances, %d speakers, %.2f h", data_dir, number, len(speakers), seconds / 3600)
    left_out.report(str(data_dir), data_dir / "left_out")
    return number


def _probe(utts: Sequence[Utterance]) -> Tuple[List[Utterance], int, Optional[Tuple[str, str, str]]]:
    """Return the utterances of one file with ``num_samples`` or a corrected ``end``, the file's rate, and its fault."""
    audio = utts[0].audio
    name = utts[0].recording or utts[0].utt_id
    if os.path.isfile(audio) and not os.path.getsize(audio):
        return [], 0, ("audio of zero length", name, audio)  # libsndfile would report an unknown format
    try:
        frames, rate, _ = read_audio_info(audio, whole=True)
    except UserError as e:
        return [], 0, ("unusable audio", name, str(e))
    if frames == 0:
        return [], 0, ("audio of zero length", name, audio)
    if utts[0].end is None:
        return [replace(u, num_samples=frames) for u in utts], rate, None
    # The last segment of some talks ends a little after the recording.
    return [replace(u, end=min(u.end or 0, frames / rate)) for u in utts], rate, None


def directories(path: Path) -> List[Path]:
    """Return the directories in ``path`` that are not hidden, links to directories included, sorted by name."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def files_by_stem(path: Path, suffixes: Sequence[str]) -> Dict[str, str]:
    """Map each name without its suffix to the file name, for the files in ``path`` with one of ``suffixes``.

    Raises:
        UserError: two files differ in their suffix alone.
    """
    found: Dict[str, str] = {}
    for name in sorted(os.listdir(path)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in suffixes or name.startswith("."):
            continue
        if stem in found:
            raise UserError(f"{path}: '{stem}' is there twice ({found[stem]}, {name}); remove one")
        found[stem] = name
    return found


def find_root(path: PathLike, option: str, name: str, inside: Iterable[str], source: str) -> Path:
    """Return ``path`` or ``path/name``, whichever holds one of ``inside``.

    Raises:
        UserError: neither does; the message names ``option`` and ``source``.
    """
    path = Path(path)
    for candidate in (path, path / name):
        if any((candidate / entry).exists() for entry in inside):
            return candidate
    why = "nothing of it is there" if path.is_dir() else "no such directory"
    raise UserError(f"{option} {path}: {why}; give the directory that holds {' or '.join(inside)} (from {source})")


def download(url: str, path: PathLike, md5: Optional[str] = None, option: str = "") -> Path:
    """Download ``url`` to ``path`` unless it exists; an interrupted download is resumed.

    Args:
        md5: checksum of the whole file, compared before the file gets its name.
        option: the command's option for a corpus that was downloaded elsewhere, for error messages.

    Raises:
        UserError: no network, the connection broke, or the checksum differs.
    """
    from tqdm import tqdm

    path = Path(path)
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    logging.info("downloading %s to %s%s", url, path, f", from byte {have} on" if have else "")
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as response:
            if getattr(response, "status", None) != http.client.PARTIAL_CONTENT:
                have = 0  # the server does not support ranges, and sends the whole file
            length = response.headers.get("Content-Length")
            size = have + int(length) if length else None
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                open(part, "ab" if have else "wb") as f,
                tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while block := response.read(BLOCK):
                    f.write(block)
                    bar.update(len(block))
        if size is not None and part.stat().st_size != size:
            raise OSError(f"the connection broke after {part.stat().st_size} of {size} bytes")
    except urllib.error.HTTPError as e:
        if e.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise UserError(_no_download(url, str(e), option)) from e
        # The partial file already has all bytes; the checksum decides whether it is right.
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as e:
        # ValueError: the address has no 'https://'.
        raise UserError(_no_download(url, str(getattr(e, "reason", None) or e), option)) from e
    if md5 is not None and _md5(part) != md5:
        part.unlink()
        raise UserError(f"{url}: the file has another md5 than {md5}; it was removed: give the same command again")
    os.replace(part, path)
    return path


def _no_download(url: str, why: str, option: str) -> str:
    return (f"cannot download {url}: {why}\n  The same command goes on from there; or fetch it on a machine with a "
            f"network, unpack it, and give the directory: {option} DIR")  # fmt: skip


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack_archive(archive: PathLike, dst: PathLike, inner: str = ".") -> Path:
    """Unpack a tar file and rename its directory ``inner`` to ``dst``; an existing ``dst`` is kept.

    Raises:
        UserError: the archive is broken or cut, has paths that lead out of its directory, or has no ``inner``.
    """
    dst = Path(dst)
    if not dst.exists():
        with unpacked_beside(archive, dst) as partial:
            if not (partial / inner).is_dir():
                raise UserError(f"{archive}: no {inner} in it; is it the right archive?")
            os.replace(partial / inner, dst)
    return dst


@contextlib.contextmanager
def unpacked_beside(archive: PathLike, dst: Path) -> Iterator[Path]:
    """Unpack a tar file to a hidden directory beside ``dst``; files that are not moved out of it are removed."""
    if not hasattr(tarfile, "data_filter"):  # Python has it since 3.10.12 and 3.11.4
        raise UserError(f"{archive}: Python {platform.python_version()} cannot unpack it safely, 3.10.12 or 3.11.4 and "
                        "later can: take one of those, or unpack it by hand and give the directory")  # fmt: skip
    partial = dst.with_name(f".{dst.name}.partial")
    with os_errors_as_user_errors(partial):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            try:
                with tarfile.open(archive) as tar:
                    tar.extractall(partial, filter="data")  # refuses paths and links that lead out of the directory
            except (tarfile.TarError, EOFError, zlib.error, OSError) as e:
                if isinstance(e, OSError) and e.errno:
                    raise  # an error of the operating system, not of the archive
                raise UserError(f"{archive}: cannot be unpacked ({e}); remove it and run again") from e
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def parts_of(option: Optional[Sequence[str]], default: str) -> List[str]:
    """Return the names in a list option, each once, in order; a single word may hold several names."""
    words = default.split() if option is None else " ".join(option).split()
    return list(dict.fromkeys(words))


def pick_speakers(speakers: Sequence[str], number: int, seed: int) -> List[str]:
    """Choose ``number`` speakers by a hash, so that the choice depends only on names and seed."""
    return sorted(speakers, key=lambda s: hashlib.sha256(f"{seed} {s}".encode()).hexdigest())[:number]


def refuse_overlap(option: str, parts: Sequence[str], others: Mapping[str, Sequence[str]]) -> None:
    """Refuse parts of a corpus that one option names, and another of ``others`` too (:class:`UserError`)."""
    for other, named in others.items():
        both = sorted(set(parts) & set(named))
        if both:
            raise UserError(f"{' '.join(both)}: named by {option} and by {other}; leave it out of one")
