"""CMU AN4 (census recordings, 16 kHz): original layout → data dirs ``train``, ``valid``, ``test``.

All forms in which the corpus is distributed are accepted: ``etc/an4_{train,test}.transcription`` with
``etc/*.fileids`` and the audio under ``wav/`` as NIST SPHERE, WAV, FLAC or Opus, or as headerless 16-bit ``.raw``
of either byte order. All audio but ``.raw`` is referenced where it is.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Set, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data import corpora
from espnet_kd.data.audio import read_audio_info, write_audio
from espnet_kd.data.datadir import MAX_SHOWN, Utterance, iter_lines, write_data_dir
from espnet_kd.files import PathLike

MIRROR = "http://www.speech.cs.cmu.edu/databases/an4"
ARCHIVE = "an4_sphere.tar.gz"
FS = 16000
SUFFIXES = (".sph", ".wav", ".flac", ".opus", ".ogg", ".raw")
_LINE = re.compile(r"^(?P<text>.*)\((?P<id>[^()\s]+)\)\s*$")
_MARKER = re.compile(r"<[^<>]*>|\+\+[^+]*\+\+")  # <s> </s> <sil>, and Sphinx's ++NOISE++


def prepare_an4(
    out: PathLike,
    an4: Optional[PathLike] = None,
    *,
    downloads: PathLike = "downloads",
    mirror: str = MIRROR,
    raw_endian: str = "auto",
    valid_speakers: int = 8,
    seed: int = 0,
) -> Dict[str, int]:
    """Write ``out/{train,valid,test}`` and return their numbers of utterances.

    Args:
        an4: the corpus (the directory that holds ``etc``, or one above it); None downloads the original.
        downloads: the directory for downloads; a corpus that is already there is not fetched again.
        mirror: where the archive is fetched from.
        raw_endian: byte order of ``.raw`` files: "big", "little" or "auto" (measured).
        valid_speakers: training speakers that become ``valid``, chosen by a hash of name and ``seed``.

    Raises:
        UserError: the corpus is not there, cannot be downloaded, or a listed recording is missing.
    """
    out = Path(out)
    root = find_an4(download_an4(downloads, f"{mirror.rstrip('/')}/{ARCHIVE}") if an4 is None else Path(an4))
    audio = find_audio(root)
    left_out: List[str] = []
    train = list(_read_split(root, "train", audio, left_out))
    test = list(_read_split(root, "test", audio, left_out))
    speakers = sorted({speaker for _, speaker, _, _ in train})
    if not 0 < valid_speakers < len(speakers):
        raise UserError(f"--valid_speakers {valid_speakers}: {root} has {len(speakers)} training speakers; take 1 to "
                        f"{len(speakers) - 1}")  # fmt: skip
    chosen = set(corpora.pick_speakers(speakers, valid_speakers, seed))
    splits = {
        "train": [x for x in train if x[1] not in chosen],
        "valid": [x for x in train if x[1] in chosen],
        "test": test,
    }
    raw_files = [path for rows in splits.values() for _, _, path, _ in rows if path.suffix.lower() == ".raw"]
    endian = detect_endian(raw_files) if raw_files and raw_endian == "auto" else raw_endian
    if raw_files:
        logging.info("AN4: %d raw files, %s-endian, are written as WAV to %s", len(raw_files), endian, out / "wav")
    counts = {}
    for name, rows in splits.items():
        utts = []
        for utt_id, speaker, path, text in rows:
            if path.suffix.lower() == ".raw":
                path = _raw_to_wav(path, out / "wav" / name / f"{utt_id}.wav", endian)
            frames, rate, _ = read_audio_info(str(path))
            if frames == 0:
                left_out.append(f"{utt_id} (no audio in {path})")
                continue
            if rate != FS:
                raise UserError(f"{path}: sampling rate {rate} Hz; AN4 is {FS} Hz: is this AN4?")
            utts.append(Utterance(utt_id, speaker, str(path), text, frames))
        if not utts:
            raise UserError(f"{out / name}: no utterance is left; left out are {', '.join(left_out[:MAX_SHOWN])}")
        counts[name] = write_data_dir(out / name, utts)
        hours = sum(u.num_samples or 0 for u in utts) / FS / 3600
        logging.info("%s %d utterances, %d speakers, %.2f h", name, len(utts), len({u.speaker for u in utts}), hours)
    logging.info("left out: %d%s", len(left_out), "".join(f"\n  {item}" for item in left_out))
    return counts


def find_an4(path: Path) -> Path:
    """Return the directory that holds ``etc/an4_train.transcription``: ``path`` or one below it."""
    if not path.is_dir():
        raise UserError(f"--an4 {path}: no such directory; give the one that holds etc/ and wav/")
    for candidate in (path, path / "an4", *sorted(p for p in path.iterdir() if p.is_dir())):
        if (candidate / "etc" / "an4_train.transcription").is_file():
            return candidate
    raise UserError(f"--an4 {path}: etc/an4_train.transcription is not there; give the directory that holds etc/, wav/")


def find_audio(root: Path) -> Dict[str, Path]:
    """Map each recording's name (``an251-fash-b``) to its file; of several, the first by SUFFIXES is taken."""
    found: Dict[str, Path] = {}
    for path in sorted(_walk(root)):
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            continue
        old = found.get(path.stem)
        if old is None or SUFFIXES.index(suffix) < SUFFIXES.index(old.suffix.lower()):
            found[path.stem] = path
    if not found:
        raise UserError(f"{root}: no audio below it (looked for {', '.join(SUFFIXES)})")
    return found


def _walk(root: Path) -> Iterator[Path]:
    """Yield every file below ``root``, each directory once; links are followed, because corpora often have them."""
    seen: Set[str] = set()
    for directory, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # a link may lead back to a directory above it
            below.clear()
            continue
        seen.add(real)
        below.sort()
        yield from (Path(directory) / name for name in names)


def parse_transcription(path: Path) -> Iterator[Tuple[int, str, str]]:
    """Yield (line number, recording name, text in capitals without markers) of a ``.transcription`` file."""
    for number, line in iter_lines(path):
        if not line.strip():
            continue
        match = _LINE.match(line)
        if match is None:
            raise UserError(f"{path}:{number}: expected 'WORDS (recording)', found '{line}'")
        yield number, match["id"], " ".join(_MARKER.sub(" ", match["text"]).upper().split())


def _read_split(
    root: Path, split: str, audio: Dict[str, Path], left_out: List[str]
) -> Iterator[Tuple[str, str, Path, str]]:
    """Yield (utterance id, speaker, file, text); add recordings without words to ``left_out``."""
    path = root / "etc" / f"an4_{split}.transcription"
    for number, name, text in parse_transcription(path):
        fields = name.split("-")
        if len(fields) < 2:
            raise UserError(f"{path}:{number}: '{name}' is no AN4 recording name (expected like an251-fash-b)")
        if name not in audio:
            raise UserError(f"{path}:{number}: recording '{name}' has no audio file below {root}")
        if not text:
            left_out.append(f"{name} ({path}:{number}: no words)")
            continue
        # With the speaker first, utt2spk is sorted by both columns, as Kaldi's tools require.
        yield f"{fields[1]}-{name}", fields[1], audio[name], text


def detect_endian(paths: Sequence[Path], limit: int = 20) -> str:
    """Measure the byte order of raw 16-bit speech: in the wrong order, neighbouring samples differ as in noise."""
    import numpy as np

    votes = {"big": 0.0, "little": 0.0}
    for path in list(paths)[:limit]:
        data = path.read_bytes()
        data = data[: len(data) // 2 * 2]
        for name, dtype in (("big", ">i2"), ("little", "<i2")):
            x = np.frombuffer(data, dtype).astype(np.float64)
            if len(x) > 1:
                votes[name] += float(np.abs(np.diff(x)).mean())
    if votes["big"] == votes["little"]:
        raise UserError(f"{paths[0]}: its byte order cannot be measured; give --raw_endian big or little")
    return min(votes, key=votes.__getitem__)


def _raw_to_wav(src: Path, dst: Path, endian: str) -> Path:
    import numpy as np

    samples = np.frombuffer(src.read_bytes()[: src.stat().st_size // 2 * 2], ">i2" if endian == "big" else "<i2")
    write_audio(dst, samples.astype(np.int16), FS)
    return dst


def download_an4(downloads: PathLike, url: str = f"{MIRROR}/{ARCHIVE}") -> Path:
    """Fetch and unpack the original corpus under ``downloads`` (about 64 MB) unless it is there; return its root.

    Raises:
        UserError: no network, or the archive is broken.
    """
    downloads = Path(downloads)
    done = downloads / "an4_sphere"
    if done.is_dir():
        return done
    # CMU publishes no checksum; gzip's own checksum reveals a cut or damaged archive when it is unpacked.
    archive = corpora.download(url, downloads / url.rsplit("/", 1)[-1], option="--an4")
    return corpora.unpack_archive(archive, done)
