"""Stage 2: a data dir → ``dump/raw/<name>``: one mono file per utterance, one sampling rate, speed-perturbed copies.

Files that need no change (right rate, mono, complete, factor 1.0, quick to decode, of a format that allows seeking) are
referenced where they are; all others are written as 16-bit FLAC to ``<dst>/audio/<speaker>/<utterance>.flac``.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import itertools
import logging
import math
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from tqdm import tqdm

from espnet_kd.cli import UserError
from espnet_kd.data.audio import (
    can_seek,
    check_samples,
    is_in_ark,
    is_pipe,
    read_audio_info,
    read_samples,
    to_int16,
    write_audio,
)
from espnet_kd.data.characters import id_fault, name_character, odd_blank, with_plain_blanks
from espnet_kd.data.datadir import (
    MAX_OVERSHOOT,
    MAX_SHOWN,
    Spool,
    Utterance,
    os_errors_as_user_errors,
    read_data_dir,
    read_pairs,
    refuse_same,
    write_data_dir,
)
from espnet_kd.data.parallel import map_with_bar
from espnet_kd.experiments.record import Record
from espnet_kd.files import PathLike, remove_leftovers, replacing

# Decoding these again every epoch took a quarter of a small student's training step.
SLOW_TO_DECODE = (".opus", ".ogg", ".mp3")
MAX_FS = 655_350  # Hz; the limit of FLAC
PERTURBED = re.compile(r"sp[0-2]\.\d+-")  # the beginning of the ids that speed_id makes, as ESPnet's
VERSION = 3  # part of the settings: raise it when the same settings give other files


@dataclass(frozen=True)
class _Plan:
    """The settings that a worker needs."""

    audio_dir: str
    fs: int
    speed_factors: Tuple[float, ...]


def speed_id(name: str, factor: float) -> str:
    """Return the id of a speed-perturbed copy of an utterance or speaker: ``sp0.9-name``; factor 1 keeps the name."""
    return name if factor == 1.0 else f"sp{factor:g}-{name}"


def format_data(
    src: Union[PathLike, Sequence[PathLike]],
    dst: PathLike,
    *,
    text: str = "required",
    fs: int = 16000,
    speed_factors: Sequence[float] = (1.0,),
    max_seconds: float = 30.0,
    min_seconds: float = 0.1,
    drop_out_of_range: bool = False,
    nj: int = 1,
) -> int:
    """Format ``src`` (one data dir, or several into one) into ``dst`` and return the number of utterances written.

    Args:
        text: "required"; "optional": used if the data dir has one; "none": not opened, and ``dst`` gets none.
        fs: sampling rate of the result in Hz; audio of another rate is resampled.
        speed_factors: 1.0 stands for the unchanged utterance; 0.9 is slower and lower, as Kaldi's ``speed``.
        min_seconds, max_seconds: limits of an utterance (each copy by its own duration).
        drop_out_of_range: leave out utterances outside the limits (for training and validation data). Otherwise they
            are kept and only counted, so that a test set stays complete.
        nj: processes.

    A finished ``dst`` with the same settings and source is not changed; an interrupted run is resumed. Memory does not
    grow with the number of utterances.

    Raises:
        UserError: a fault in the source (named), a bad option, nothing left after dropping, or the system refuses to
            write.
    """
    sources = {Path(s): text != "none" for s in ([src] if isinstance(src, (str, Path)) else src)}
    factors = _check(speed_factors, fs, min_seconds, max_seconds, nj)
    names, dst = ", ".join(map(str, sources)), Path(dst)
    refuse_same(sources, dst, "--dst")
    with os_errors_as_user_errors(dst):
        total, fingerprint = _survey(sources, text, names, dst, factors)
        settings = {
            "version": VERSION, "fs": fs, "speed_factors": list(factors), "min_seconds": min_seconds,
            "max_seconds": max_seconds, "drop_out_of_range": drop_out_of_range, "source": fingerprint,
        }  # fmt: skip
        record = Record(dst / ".done", dst / ".begun")
        if record.is_of(settings) and (dst / "wav.scp").exists():
            logging.info("%s: formatted already with these settings", dst)
            return sum(1 for _ in read_pairs(dst / "utt2spk"))
        _begin(dst, record, settings)
        rates: Counter[int] = Counter()
        odd: Counter[str] = Counter()

        def made() -> Iterator[Utterance]:
            utts = (replace(u, text=with_plain_blanks(u.text)) if u.text else u for _, u in merge(sources))
            work = functools.partial(_format_one, plan=_Plan(str(dst / "audio"), fs, factors))
            for one in map_with_bar(work, utts, nj=nj, desc=str(dst), total=total):
                rates[one.rate] += 1
                odd.update({"have several channels, and are their mean": one.mixed,
                            "have samples beyond full scale, and are clipped": one.clipped})  # fmt: skip
                yield from one.copies
            for rate, number in sorted(rates.items()):
                if rate != fs:
                    logging.info("%s: %d of %d utterances resampled from %d to %d Hz", names, number, total, rate, fs)
            for what, number in odd.items():
                if number:
                    logging.warning("%s: %d of %d utterances %s", names, number, total, what)
            if (dst / "audio").exists():
                os.sync()  # once, before wav.scp marks the files as complete

        number = write_data_dir(dst, _within_limits(made(), fs, min_seconds, max_seconds, drop_out_of_range, dst))
        record.finish(settings)
        hours = sum(int(samples) for _, samples in read_pairs(dst / "utt2num_samples")) / fs / 3600
    no_text = "" if (dst / "text").exists() else ", no text"
    logging.info("%s: %d utterances, %.2f h%s", dst, number, hours, no_text)
    return number


def merge(sources: Mapping[Path, bool]) -> Iterator[Tuple[Path, Utterance]]:
    """Stream (data dir, utterance) of all data dirs, sorted by id; ``sources`` is {data dir: whether to open its text}.

    Raises:
        UserError: an id is in two data dirs, so that one utterance would replace the other.
    """

    def tagged(source: Path) -> Iterator[Tuple[Path, Utterance]]:
        for u in read_data_dir(source, sources[source]):
            yield source, u

    streams = map(tagged, sources)
    previous: Optional[Tuple[Path, Utterance]] = None
    for source, u in heapq.merge(*streams, key=lambda pair: pair[1].utt_id):
        if previous is not None and previous[1].utt_id == u.utt_id:
            raise UserError(
                f"utterance '{u.utt_id}' is in {previous[0]} and in {source}; rename one, or leave a data dir "
                "out if both hold the same audio"
            )
        previous = source, u
        yield source, u


def _survey(
    sources: Mapping[Path, bool], text: str, names: str, dst: Path, factors: Sequence[float]
) -> Tuple[int, str]:
    """Return the number of utterances and a hash of what is to be formatted.

    The hash includes the size and time of each audio file, so that a corpus that was made again is formatted again.

    Raises:
        UserError: an audio file is missing, or is in the audio directory of ``dst``; an id has the prefix of a speed
            factor already, or with one is too long for a file name; or some utterances lack a text: a data dir must
            have a text for each utterance, or, if ``text`` is not "required", for none.
    """
    digest = hashlib.sha256()
    total: Counter[Path] = Counter()
    silent: Counter[Path] = Counter()
    shown: Dict[Path, List[str]] = {source: [] for source in sources}
    odd: Dict[str, List] = {}  # {unusual white space: [first utterance with it, number of utterances]}
    previous, own = None, os.path.abspath(dst / "audio") + os.sep
    for source, u in tqdm(merge(sources), desc=f"reading {names}", unit="utt", mininterval=1.0):
        total[source] += 1
        if PERTURBED.match(u.utt_id) and tuple(factors) != (1.0,):
            raise UserError(f"{source}: utterance '{u.utt_id}': its id is that of a speed-perturbed copy, as in "
                            "ESPnet, whose speed would be changed again; leave out --speed_factors (of run.sh: give "
                            "--speed_perturb_factors \"\"), or such utterances")  # fmt: skip
        for name in (speed_id(name, factor) for name in (u.utt_id, u.speaker) for factor in factors):
            if fault := id_fault(name):
                raise UserError(f"{source / 'utt2spk'}: utterance '{u.utt_id}': {fault}")
        if char := odd_blank(u.text or ""):
            odd.setdefault(char, [u.utt_id, 0])[1] += 1
        if u.text is None:
            if text == "required" and not (source / "text").exists():
                why = "no such file; untranscribed audio needs --text optional or none"
                raise UserError(f"{source / 'text'}: {why}")
            silent[source] += 1
            shown[source] += [u.utt_id] if silent[source] <= 5 else []
        # The result does not depend on utt2num_samples, so the hash must not depend on it either.
        digest.update(repr(replace(u, num_samples=None)).encode("utf-8"))
        if u.audio != previous:
            digest.update(_stamp(u, source).encode())
            if os.path.abspath(u.audio).startswith(own):
                raise UserError(f"{source / 'wav.scp'}: utterance '{u.utt_id}': {u.audio} is {dst}'s own, and would be "
                                "removed; choose another --dst")  # fmt: skip
        previous = u.audio
    if not total.total():
        raise UserError(f"{names}: there is no utterance in it (an empty wav.scp or segments)")
    for char, (first, number) in odd.items():
        logging.warning("%s: %s becomes a plain blank in the texts of %d utterances, such as %s",
                        names, name_character(char), number, first)  # fmt: skip
    for source in sources:
        if silent[source] and (text == "required" or silent[source] < total[source]):
            more = f" and {silent[source] - 5} more" if silent[source] > 5 else ""
            raise UserError(f"{source / 'text'} has no line for {', '.join(shown[source])}{more}; add them, or take "
                            "them out of wav.scp")  # fmt: skip
        lines = sum(1 for _ in read_pairs(source / "text")) if sources[source] and (source / "text").exists() else 0
        if lines > total[source]:
            logging.warning("%s: %d of %d lines left out: no audio", source / "text", lines - total[source], lines)
    if 0 < silent.total() < total.total():
        raise UserError(f"{names}: some of them have a text and some have none; format them apart")
    return total.total(), digest.hexdigest()


def _stamp(u: Utterance, source: Path) -> str:
    """Return size and time of an utterance's audio file."""
    try:
        stat = os.stat(u.audio)
    except (OSError, ValueError) as e:  # ValueError: a path with a NUL in it
        why = f"{u.audio!r}: {e}" if isinstance(e, ValueError) else f"{u.audio}: {e.strerror}"
        if is_pipe(u.audio):
            why = f"'{u.audio}' is a shell pipe, which is not run here: convert the audio to a file (flac, wav)"
        elif is_in_ark(u.audio):
            why = f"{u.audio} is a place in an ark: make a data dir with files of it (asr_kd_data espnet --help)"
        elif not os.path.isabs(u.audio):
            why += f" (a relative path counts from here, {os.getcwd()})"
        raise UserError(f"{source / 'wav.scp'}: utterance '{u.utt_id}': {why}") from e
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _begin(dst: Path, record: Record, settings: Dict) -> None:
    """Prepare ``dst`` for a run with these settings; keep the audio of an interrupted run with the same settings."""
    (dst / "out_of_range").unlink(missing_ok=True)
    remove_leftovers(dst / "out_of_range")
    goes_on = record.inputs_of_begun() == settings
    record.path.unlink(missing_ok=True)
    if goes_on:
        for path in (dst / "audio").rglob(".*.flac.*"):
            path.unlink()  # an incomplete file of a run that was killed
        return
    (dst / "wav.scp").unlink(missing_ok=True)  # it names audio files that are removed next
    shutil.rmtree(dst / "audio", ignore_errors=True)
    record.begin(settings)


def _check(
    speed_factors: Sequence[float], fs: int, min_seconds: float, max_seconds: float, nj: int
) -> Tuple[float, ...]:
    factors = tuple(float(x) for x in speed_factors)
    if not factors or len(set(factors)) != len(factors):
        given = " ".join(map(str, speed_factors))
        raise UserError(f"--speed_factors {given}: give at least one factor, and no factor twice")
    for factor in factors:
        if not 0.5 <= factor <= 2.0:
            raise UserError(f"--speed_factors: {factor} is not between 0.5 and 2 (usual: 0.9 1.0 1.1)")
    if not 1000 <= fs <= MAX_FS:
        raise UserError(f"--fs is {fs}; it must be between 1000 and {MAX_FS} Hz")
    if nj < 1:
        raise UserError(f"--nj is {nj}; it must be 1 or more")
    if not 0 <= min_seconds < max_seconds:
        raise UserError(
            f"--min_seconds is {min_seconds} and --max_seconds is {max_seconds}; the first must be 0 or more, and the "
            "second larger than the first"
        )
    return factors


def _within_limits(
    utts: Iterable[Utterance], fs: int, min_seconds: float, max_seconds: float, drop: bool, dst: Path
) -> Iterator[Utterance]:
    """Yield the utterances; log those outside the limits, and leave them out if ``drop``."""
    outside = Spool(dst)
    for u in utts:
        seconds = (u.num_samples or 0) / fs
        inside = min_seconds <= seconds <= max_seconds
        if not inside:
            outside.append((u.utt_id, seconds))
        if inside or not drop:
            yield u
    if not len(outside):
        return
    shown = ", ".join(f"{utt_id} ({seconds:.2f} s)" for utt_id, seconds in itertools.islice(outside, MAX_SHOWN))
    more = f" and {len(outside) - MAX_SHOWN} more (all in {dst / 'out_of_range'})" if len(outside) > MAX_SHOWN else ""
    with replacing(dst / "out_of_range") as f:
        f.writelines(f"{utt_id} {seconds:.3f}\n" for utt_id, seconds in outside)
    logging.warning(
        "%s: %d utterances outside %g to %g s %s: %s%s",
        dst, len(outside), min_seconds, max_seconds, "dropped" if drop else "kept", shown, more,
    )  # fmt: skip


@dataclass(frozen=True)
class _Made:
    """The result of one utterance."""

    copies: List[Utterance]
    rate: int  # sampling rate of the source, Hz
    mixed: bool  # several channels became their mean
    clipped: bool  # some samples lie beyond full scale


def _format_one(utt: Utterance, plan: _Plan) -> _Made:
    """Make all copies of one utterance."""
    import numpy as np

    try:
        frames, rate, channels = read_audio_info(utt.audio, whole=True)
        quick = os.path.splitext(utt.audio)[1].lower() not in SLOW_TO_DECODE
        as_it_is = utt.recording is None and rate == plan.fs and channels == 1 and quick and 1.0 in plan.speed_factors
        if frames == 0:
            raise UserError(f"the audio has zero length: {utt.audio}")
        as_it_is = as_it_is and can_seek(utt.audio)
        # A file that is only referenced is decoded too, because a fault in it would stop a training later. If it has
        # clipped samples, it is written as a new file, like the other copies.
        clipped = as_it_is and check_samples(utt.audio)
        copies: List[Utterance] = []
        signal = None
        for factor in plan.speed_factors:
            new = _copy_of(utt, factor)
            if factor == 1.0 and as_it_is and not clipped:
                copies.append(replace(new, num_samples=frames))
                continue
            path = _audio_path(plan.audio_dir, new)
            number = _samples_of(path)
            if number is None:
                if signal is None:
                    signal = _read(utt, rate, frames)
                    clipped = clipped or bool(np.abs(signal).max() > 1)
                y = _resample(signal, rate * factor, plan.fs)
                number = len(y)
                write_audio(path, to_int16(y), plan.fs, sync=False)
            copies.append(replace(new, audio=str(path), num_samples=number))
    except UserError as e:
        raise UserError(f"utterance '{utt.utt_id}': {e}") from e
    return _Made(copies, rate, channels > 1 and utt.channel is None, clipped)


def _copy_of(utt: Utterance, factor: float) -> Utterance:
    """Return a copy's ids; each copy is a file of its own."""
    new = replace(utt, recording=None, start=None, end=None, channel=None)
    return replace(new, utt_id=speed_id(utt.utt_id, factor), speaker=speed_id(utt.speaker, factor))


def _audio_path(audio_dir: str, utt: Utterance) -> Path:
    return Path(audio_dir) / utt.speaker / f"{utt.utt_id}.flac"


def _samples_of(path: Path) -> Optional[int]:
    """Return the number of samples of a complete file from an interrupted run, or None."""
    try:
        return read_audio_info(str(path), whole=True)[0] if path.exists() else None
    except UserError:  # the file was renamed, but the machine stopped before all of it was on the disk
        return None


def _read(utt: Utterance, rate: int, frames: int):
    """Read an utterance (or its segment) as float64, (N,): its channel, or the mean of all."""
    start, stop = 0, frames
    if utt.start is not None and utt.end is not None:
        # Times are limited to the file's length first: for a time such as 1e308 the product below would be infinite.
        begin, end = (min(seconds, frames / rate) for seconds in (utt.start, utt.end))
        start, stop = int(round(begin * rate)), min(int(math.ceil(end * rate)), frames)
    if start >= stop or (utt.end or 0) > frames / rate + MAX_OVERSHOOT:
        what = "no audio" if start >= stop else "not all of its audio"
        span = "" if utt.end is None else f", segment {utt.start} to {utt.end} s of {frames / rate:.2f} s"
        raise UserError(f"{what} in {utt.audio}{span}")
    return read_samples(utt.audio, utt.audio, start, stop, "mean" if utt.channel is None else utt.channel)[0]


def _resample(x, rate: float, fs: int):
    import soxr

    return x if rate == fs else soxr.resample(x, rate, fs)
