"""An ESPnet recipe's data dirs → ours (stage 1 of run.sh with ``--espnet_data``).

``asr.sh`` leaves ``dump/raw/<set>``, whose ``wav.scp`` names a file per utterance or an offset in a Kaldi ark, with
paths that count from *its* recipe directory. Files are referenced where they are, by absolute paths. Our data dirs
cannot name arks (``wav.ark``, ``flac.ark``) and commands (``… |``, in ``dump/raw_copy`` or ``data``): their audio is
written once as 16-bit FLAC to ``<out>/<set>/audio``. A ``segments`` file is kept; formatting cuts the audio by it.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import shutil
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path
from typing import IO, Iterator, Optional, Sequence, Tuple, Union, cast

from espnet_kd.cli import UserError
from espnet_kd.data.audio import ARK, is_in_ark, is_pipe, read_samples, to_int16, write_audio
from espnet_kd.data.datadir import (
    PathLike,
    Spool,
    Utterance,
    os_errors_as_user_errors,
    read_data_dir,
    read_pairs,
    refuse_same,
    write_data_dir,
)
from espnet_kd.data.parallel import map_with_bar
from espnet_kd.files import replacing

PLACES = ("dump/raw", "dump/raw_copy", "raw", "raw_copy", ".", "data")


def take_espnet_data(espnet_data: PathLike, sets: Sequence[str], out: PathLike, nj: int = 1) -> None:
    """Make ``out/<set>`` of an ESPnet recipe's data for each of ``sets``.

    Args:
        espnet_data: the ESPnet recipe's directory (egs2/…/asr1), or its dump directory.
        sets: names of data dirs in it, such as train_nodev.
        out: directory that gets them.
        nj: processes that convert audio.

    Raises:
        UserError: no such set, features instead of audio, audio that is not found or cannot be read, an utterance
            without a line in ``text``, or the system refuses to write.
    """
    sources = {name: find_set(Path(espnet_data), name) for name in sets}  # a wrong name is found before any work
    for name, source in sources.items():
        refuse_same([source], Path(out) / name, "--out")
        _check_text(source)
    with os_errors_as_user_errors(out):
        for name, source in sources.items():
            _take(source, Path(espnet_data), Path(out) / name, nj)


def find_set(espnet_data: Path, name: str) -> Path:
    """Return the directory of a set: as ``asr.sh`` formatted it, else as the recipe's own data preparation left it.

    Raises:
        UserError: there is no such set, or its audio is in a form that is not supported.
    """
    found = [espnet_data / place / name for place in PLACES if (espnet_data / place / name / "wav.scp").is_file()]
    if not found:
        raise UserError(
            f"{espnet_data} has no data dir '{name}' (looked in {', '.join(PLACES)}); give the ESPnet recipe's "
            "directory to --espnet_data, and the names of its sets to --train_set, --valid_set and --test_sets"
        )
    source = found[0]
    kind, audio_format = (_read(source / name) for name in ("feats_type", "audio_format"))
    if kind not in ("", "raw", "raw_copy"):
        raise UserError(f"{source}/feats_type is {kind}; audio is needed (asr.sh --feats_type raw)")
    if audio_format.startswith("multi"):
        raise UserError(f"{source}/audio_format is {audio_format}; one audio file per utterance is needed")
    return source


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _check_text(source: Path) -> None:
    """Refuse a ``text`` that lacks an utterance (a data dir has all texts or none); log its lines without audio."""
    if not (source / "text").exists():
        return
    number = 0
    for u in read_data_dir(source):
        number += 1
        if u.text is None:
            raise UserError(
                f"{source / 'text'} has no line for '{u.utt_id}'; add it, or take such utterances out "
                f"(in the ESPnet recipe: utils/fix_data_dir.sh {source})"
            )
    extra = sum(1 for _ in read_pairs(source / "text")) - number
    if extra:
        logging.warning("%s: %d lines without audio are left out", source / "text", extra)


def _take(source: Path, espnet_data: Path, dst: Path, nj: int) -> None:
    wav_scp = source / "wav.scp"
    root = _find_root(wav_scp, espnet_data)
    stamp, audio_dir = dst / "audio/.source", dst / "audio"
    # Audio of an earlier run is kept if it was made from the same wav.scp.
    facts = wav_scp.stat()
    inputs = f"{wav_scp.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    if _read(stamp) != inputs:
        shutil.rmtree(audio_dir, ignore_errors=True)
    for path in audio_dir.rglob(".*.flac.*"):
        path.unlink()  # an incomplete file of a run that was killed
    todo = Spool(dst, (entry for entry in _entries(source) if _needs_conversion(entry[1])))
    if len(todo):
        with replacing(stamp) as f:
            f.write(inputs)
        convert = functools.partial(_convert, root=root, audio_dir=audio_dir)
        size = sum(map_with_bar(convert, todo, nj=nj, desc=str(audio_dir)))
        what = f"{len(todo)} entries of {wav_scp} (arks, commands)"
        logging.info("%s: %s as FLAC, %.1f MB", audio_dir, what, size / 1e6)

    def with_own_paths() -> Iterator[Utterance]:
        for u in read_data_dir(source):
            if _needs_conversion(u.audio):
                yield replace(u, audio=str(_flac(audio_dir, u.recording or u.utt_id)))
            else:
                yield replace(u, audio=str((root / u.audio).absolute()))

    number = write_data_dir(dst, with_own_paths())
    logging.info("%s: %d utterances of %s%s", dst, number, source, "" if len(todo) else ", whose audio stays there")


def _entries(source: Path) -> Iterator[Tuple[str, str, Optional[int]]]:
    """Yield (id, audio, its number of samples if utt2num_samples has it) for each entry of a wav.scp."""
    if (source / "segments").exists():
        for recording, audio in read_pairs(source / "wav.scp"):
            yield recording, audio, None
    else:
        for u in read_data_dir(source, read_text=False):
            yield u.utt_id, u.audio, u.num_samples


def _needs_conversion(audio: str) -> bool:
    return is_pipe(audio) or is_in_ark(audio)


def _find_root(wav_scp: Path, espnet_data: Path) -> Path:
    """Return the directory to which the paths of a wav.scp are relative: the one from which its first file is found."""
    for _, audio in read_pairs(wav_scp):
        if not is_pipe(audio):
            ark = ARK.fullmatch(audio)
            first = ark[1] if ark else audio
            break
    else:
        return espnet_data.resolve()
    for root in (espnet_data.resolve(), *wav_scp.resolve().parents):
        if (root / first).is_file():
            return root
    raise UserError(
        f"{wav_scp}: {first} is found neither from {espnet_data} nor from a directory above wav.scp; was it moved?"
    )


def _flac(audio_dir: Path, key: str) -> Path:
    if "/" in key:
        raise UserError(f"'{key}' has a '/': it cannot name a file; rename the utterance or recording")
    # 256 directories: some file systems and tools are slow with 300,000 files in one.
    return audio_dir / f"{zlib.crc32(key.encode()) & 255:02x}" / f"{key}.flac"


def _convert(entry: Tuple[str, str, Optional[int]], root: Path, audio_dir: Path) -> int:
    """Write one entry of a wav.scp as FLAC unless it is there; return its size in bytes."""
    key, audio, expected = entry
    path = _flac(audio_dir, key)
    if not path.exists():
        content = _run(key, audio, root) if is_pipe(audio) else _open_ark(key, audio, root)
        with content:
            # soundfile accepts any object that has the methods read and seek.
            samples, rate = read_samples(cast(IO[bytes], content), f"'{key}': {audio}", channels="all")
        if not len(samples):
            raise UserError(f"'{key}': the audio has zero length: {audio}")
        if expected not in (None, len(samples)):
            raise UserError(f"'{key}': {len(samples)} samples in {audio}, {expected} in utt2num_samples; is it cut?")
        write_audio(path, to_int16(samples), rate)
    return path.stat().st_size


def _open_ark(key: str, audio: str, root: Path) -> Union[io.BytesIO, _Tail]:
    """Return the audio at an ark's offset, as a file."""
    match = ARK.fullmatch(audio)
    assert match is not None
    try:
        f = open(root / match[1], "rb")  # noqa: SIM115 (closed by who reads it)
        f.seek(int(match[2]))
        # The first bytes are checked, because an ark may also hold features, or a pickle that kaldiio would execute.
        kind = f.read(5)
        if kind == b"AUDIO":  # kaldiio's own format: width of the size in bytes, size of the content, content
            size = int.from_bytes(f.read(int.from_bytes(f.read(1), "little")), "little")
            with f:
                content = f.read(size)
            if len(content) < size:
                raise UserError(f"'{key}': {audio} is cut: {len(content)} of {size} bytes")
            return io.BytesIO(content)
        if not kind.startswith((b"RIFF", b"fLaC")):
            f.close()
            raise UserError(f"'{key}': no audio at {audio} (features?); asr.sh --feats_type raw leaves audio")
        return _Tail(f, int(match[2]))
    except (OSError, OverflowError) as e:
        raise UserError(f"'{key}': cannot read {audio}: {e}") from e


class _Tail(io.RawIOBase):
    """An ark as a file that begins at an offset, where one of the audio files in the ark begins."""

    def __init__(self, file: io.BufferedReader, start: int) -> None:
        self._file, self._start = file, start
        self.seek(0)

    def seekable(self) -> bool:
        """Whether it can be read from another place."""
        return True

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, counted from the offset."""
        return self._file.seek(offset + (self._start if whence == os.SEEK_SET else 0), whence) - self._start

    def readinto(self, buffer) -> int:
        """Read the next bytes into ``buffer``."""
        return self._file.readinto(buffer)

    def close(self) -> None:
        """Close the ark."""
        self._file.close()
        super().close()


def _run(key: str, audio: str, root: Path) -> IO[bytes]:
    """Return the output of a command of wav.scp as a file; as in ESPnet, it runs in the recipe's directory."""
    command = audio.rstrip("| ")
    done = subprocess.run(command, shell=True, cwd=root, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        output = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UserError(
            f"'{key}': '{command}' failed in {root} with {done.returncode}{': ' + output[-1] if output else ''}; "
            "are the programs of ESPnet's path.sh on the path?"
        )
    return io.BytesIO(done.stdout)
