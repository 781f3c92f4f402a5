"""Stage 2: a data dir → ``dump/raw/<name>``: one mono file per utterance, one sampling rate, speed-perturbed copies.

Files that are right already (rate, mono, whole, factor 1.0, quick to decode) are referenced where they lie; all others
are written as 16-bit FLAC to ``<dst>/audio/<speaker>/<utterance>.flac``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple, Union

from espnet_kd.cli import UserError
from espnet_kd.data.audio import read_audio_info
from espnet_kd.data.datadir import Utterance, read_data_dir, write_data_dir
from espnet_kd.data.parallel import map_with_bar
from espnet_kd.files import replacing

PathLike = Union[str, Path]
# Decoding these anew every epoch took a quarter of a small student's training step.
SLOW_TO_DECODE = (".opus", ".ogg", ".mp3")
VERSION = 2  # part of the settings: raise it when the same settings give other files


@dataclass(frozen=True)
class _Plan:
    """What a worker needs to know besides the utterance."""

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
        text: "required"; "optional": taken where the data dir has one; "none": not opened, ``dst`` gets none.
        fs: sampling rate of the result in Hz; what has another one is resampled.
        speed_factors: 1.0 stands for the unchanged utterance; 0.9 is slower and lower, as Kaldi's ``speed``.
        min_seconds, max_seconds: limits of an utterance (each copy by its own duration).
        drop_out_of_range: leave out what is outside the limits (training and validation); otherwise it stays (a
            test set is never thinned out), and is only counted.
        nj: processes.

    A finished ``dst`` with the same settings and source is left alone; an interrupted one goes on.

    Raises:
        UserError: a fault in the source (named), a bad option, or nothing left after dropping.
    """
    sources, dst = [Path(s) for s in ([src] if isinstance(src, (str, Path)) else src)], Path(dst)
    factors = _check(speed_factors, fs, min_seconds, max_seconds, nj)
    parts = {source: list(read_data_dir(source, read_text=text != "none")) for source in sources}
    _check_unique(parts)
    fingerprint = hashlib.sha256()
    for source, part in parts.items():
        _check_text(source, part, text)
        _fingerprint(source, part, fingerprint)
    utts = [u for part in parts.values() for u in part]
    names = ", ".join(map(str, sources))
    if 0 < sum(u.text is None for u in utts) < len(utts):
        raise UserError(f"{names}: some of them have a text and some have none; format them apart")
    settings = {
        "version": VERSION, "fs": fs, "speed_factors": list(factors), "min_seconds": min_seconds,
        "max_seconds": max_seconds, "drop_out_of_range": drop_out_of_range, "source": fingerprint.hexdigest(),
    }  # fmt: skip
    done, begun = dst / ".done", dst / ".begun"
    if _read_json(done) == settings and (dst / "wav.scp").exists():
        logging.info("%s: formatted already with these settings", dst)
        return len({u.utt_id for u in read_data_dir(dst)})
    done.unlink(missing_ok=True)
    (dst / "out_of_range").unlink(missing_ok=True)
    if _read_json(begun) != settings:
        shutil.rmtree(dst / "audio", ignore_errors=True)
        with replacing(begun) as f:
            json.dump(settings, f)
    plan = _Plan(str(dst / "audio"), fs, factors)
    made: List[Utterance] = []
    rates: Dict[int, int] = {}
    for copies, rate in map_with_bar(functools.partial(_format_one, plan=plan), utts, nj=nj, desc=str(dst)):
        made.extend(copies)
        rates[rate] = rates.get(rate, 0) + 1
    for rate, number in sorted(rates.items()):
        if rate != fs:
            logging.info("%s: %d of %d utterances resampled from %d to %d Hz", names, number, len(utts), rate, fs)
    kept = _within_limits(made, fs, min_seconds, max_seconds, drop_out_of_range, dst)
    number = write_data_dir(dst, kept)
    with replacing(done) as f:
        json.dump(settings, f)
    begun.unlink()
    hours = sum(u.num_samples or 0 for u in kept) / fs / 3600
    logging.info("%s: %d utterances, %.2f h%s", dst, number, hours, ", no text" if kept[0].text is None else "")
    return number


def combine(transcribed: PathLike, untranscribed: PathLike, dst: PathLike) -> int:
    """Write the utterances of two formatted data dirs into ``dst`` and return their number; the audio stays in place.

    ``dst/text`` has the transcripts of ``transcribed``, and the id alone for each utterance of ``untranscribed``, whose
    ``text`` is not opened. Where ``transcribed`` has no text, ``dst`` has none. A ``dst`` that is so already stays.

    Raises:
        UserError: an utterance id is in both, or a transcript is empty.
    """
    known = list(read_data_dir(transcribed))
    extra = list(read_data_dir(untranscribed, read_text=False))
    _check_unique({Path(transcribed): known, Path(untranscribed): extra})
    for u in known:
        if u.text == "":
            raise UserError(
                f"{Path(transcribed) / 'text'}: utterance '{u.utt_id}': the text is empty; "
                "move untranscribed audio to the other data dir"
            )
    if known and known[0].text is not None:
        extra = [replace(u, text="") for u in extra]
    utts = sorted(known + extra, key=lambda u: u.utt_id)
    logging.info("%s: %d utterances, %d of them without text", dst, len(utts), sum(not u.text for u in utts))
    if (Path(dst) / "wav.scp").exists() and list(read_data_dir(dst)) == utts:
        return len(utts)
    return write_data_dir(dst, utts)


def _check_text(source: Path, utts: List[Utterance], text: str) -> None:
    """Every utterance has its text, or none has one and none is ``required``."""
    silent = [u.utt_id for u in utts if u.text is None]
    if text == "required" and utts and len(silent) == len(utts) and not (source / "text").exists():
        raise UserError(f"{source / 'text'}: no such file; untranscribed audio needs --text optional or none")
    if silent and (text == "required" or len(silent) < len(utts)):
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        raise UserError(f"{source / 'text'} has no line for {shown}; add them, or take them out of wav.scp")


def _check_unique(parts: Dict[Path, List[Utterance]]) -> None:
    """Refuse ids that stand in two data dirs: one of the utterances would take the other's place."""
    where: Dict[str, Path] = {}
    for source, utts in parts.items():
        for u in utts:
            if where.setdefault(u.utt_id, source) != source:
                raise UserError(
                    f"utterance '{u.utt_id}' is in {where[u.utt_id]} and in {source}; rename one, or leave a data dir "
                    "out if both hold the same audio"
                )


def _check(
    speed_factors: Sequence[float], fs: int, min_seconds: float, max_seconds: float, nj: int
) -> Tuple[float, ...]:
    factors = tuple(float(x) for x in speed_factors)
    if not factors or len(set(factors)) != len(factors):
        raise UserError(f"--speed_factors {speed_factors}: give at least one, none of them twice")
    for factor in factors:
        if not 0.5 <= factor <= 2.0:
            raise UserError(f"--speed_factors: {factor} is not between 0.5 and 2 (usual: 0.9 1.0 1.1)")
    if fs < 1000 or nj < 1 or not 0 <= min_seconds < max_seconds:
        raise UserError(f"bad options: fs {fs} Hz, nj {nj}, durations {min_seconds} to {max_seconds} s")
    return factors


def _fingerprint(src: Path, utts: Iterable[Utterance], digest) -> None:
    """Hash what is to be formatted, with size and time of each audio file: a corpus made anew is formatted anew."""
    seen: Set[str] = set()
    for u in utts:
        # utt2num_samples is not used here, and an entry more or less in it changes nothing.
        digest.update(repr(replace(u, num_samples=None)).encode("utf-8"))
        if u.audio not in seen:
            seen.add(u.audio)
            try:
                stat = os.stat(u.audio)
            except OSError as e:
                why = f"{u.audio}: {e.strerror}"
                if "|" in u.audio:
                    why = f"'{u.audio}' is a shell pipe, which is not run here: convert the audio to a file (flac, wav)"
                raise UserError(f"{src / 'wav.scp'}: utterance '{u.utt_id}': {why}") from e
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())


def _read_json(path: Path) -> Dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _within_limits(
    utts: List[Utterance], fs: int, min_seconds: float, max_seconds: float, drop: bool, dst: Path
) -> List[Utterance]:
    """Name what is outside the limits, and leave it out if ``drop``."""
    outside = [u for u in utts if not min_seconds <= (u.num_samples or 0) / fs <= max_seconds]
    if not outside:
        return utts
    shown = ", ".join(f"{u.utt_id} ({(u.num_samples or 0) / fs:.2f} s)" for u in outside[:10])
    more = f" and {len(outside) - 10} more (all in {dst / 'out_of_range'})" if len(outside) > 10 else ""
    with replacing(dst / "out_of_range") as f:
        f.writelines(f"{u.utt_id} {(u.num_samples or 0) / fs:.3f}\n" for u in outside)
    logging.warning(
        "%s: %d utterances outside %g to %g s %s: %s%s",
        dst, len(outside), min_seconds, max_seconds, "dropped" if drop else "kept", shown, more,
    )  # fmt: skip
    if not drop:
        return utts
    gone = {u.utt_id for u in outside}
    return [u for u in utts if u.utt_id not in gone]


def _format_one(utt: Utterance, plan: _Plan) -> Tuple[List[Utterance], int]:
    """Make all copies of one utterance; return them with the source's sampling rate in Hz."""
    import numpy as np

    try:
        frames, rate, channels = read_audio_info(utt.audio)
    except UserError as e:
        raise UserError(f"utterance '{utt.utt_id}': {e}") from e
    copies: List[Utterance] = []
    signal = None
    for factor in plan.speed_factors:
        new = replace(
            utt,
            utt_id=speed_id(utt.utt_id, factor),
            speaker=speed_id(utt.speaker, factor),
            recording=None,
            start=None,
            end=None,
        )
        quick = Path(utt.audio).suffix.lower() not in SLOW_TO_DECODE
        if factor == 1.0 and utt.recording is None and rate == plan.fs and channels == 1 and quick:
            if frames == 0:
                raise UserError(f"utterance '{utt.utt_id}': the audio has zero length: {utt.audio}")
            copies.append(replace(new, num_samples=frames))
            continue
        path = _audio_path(plan.audio_dir, new)
        number = _samples_of(path)
        if number is None:
            if signal is None:
                signal = _read(utt, rate, frames)
            y = _resample(signal, rate * factor, plan.fs)
            number = len(y)
            with replacing(path, "wb") as f:
                _soundfile().write(
                    f, np.round(np.clip(y, -1, 1) * 32767).astype(np.int16), plan.fs, format="FLAC", subtype="PCM_16"
                )
        copies.append(replace(new, audio=str(path), num_samples=number))
    return copies, rate


def _soundfile():
    import soundfile  # a slow import, only where audio is touched

    return soundfile


def _audio_path(audio_dir: str, utt: Utterance) -> Path:
    for name in (utt.utt_id, utt.speaker):
        if "/" in name or name in (".", ".."):
            raise UserError(f"'{name}' has a '/': it cannot name a file; rename the utterance or speaker")
    return Path(audio_dir) / utt.speaker / f"{utt.utt_id}.flac"


def _samples_of(path: Path) -> Optional[int]:
    """Return the samples of a file that an interrupted run left whole (files are renamed into place), or None."""
    return read_audio_info(str(path))[0] if path.exists() else None


def _read(utt: Utterance, rate: int, frames: int):
    """Read an utterance (or its segment) as float64, channels averaged."""
    start, stop = 0, frames
    if utt.start is not None and utt.end is not None:
        start, stop = int(round(utt.start * rate)), min(int(math.ceil(utt.end * rate)), frames)
    if start >= stop:
        span = "" if utt.end is None else f", segment {utt.start} to {utt.end} s of {frames / rate:.2f} s"
        raise UserError(f"utterance '{utt.utt_id}': no audio in {utt.audio}{span}")
    try:
        x, _ = _soundfile().read(utt.audio, start=start, stop=stop, dtype="float64", always_2d=True)
    except (_soundfile().LibsndfileError, RuntimeError) as e:
        raise UserError(f"utterance '{utt.utt_id}': unreadable audio {utt.audio}: {e}") from e
    if len(x) < stop - start:
        raise UserError(f"utterance '{utt.utt_id}': {utt.audio} is cut: {len(x)} of {stop - start} samples")
    return x.mean(axis=1)


def _resample(x, rate: float, fs: int):
    import soxr

    return x if rate == fs else soxr.resample(x, rate, fs)
