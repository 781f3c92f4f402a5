"""LibriSpeech (read English, 16 kHz): original layout → data dirs ``train``, ``valid``, and one for each test part.

The corpus has ``<part>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac``, and
``<speaker>-<chapter>.trans.txt`` beside these files. A speaker of the data dirs is a reader, not a chapter as in
Kaldi, so that sets which are split by speaker share no voice.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data.corpora import (
    LeftOut,
    directories,
    download,
    files_by_stem,
    find_root,
    parts_of,
    pick_speakers,
    refuse_overlap,
    unpack_archive,
    write_corpus_dir,
)
from espnet_kd.data.datadir import Spool, Utterance, iter_lines, os_errors_as_user_errors, split_line
from espnet_kd.files import PathLike

TRAIN = "train-clean-100 train-clean-360 train-other-500"
VALID = "dev-clean dev-other"
TEST = "test-clean test-other"
MIRROR = "https://www.openslr.org/resources"
URL = "{mirror}/{set}/{part}.tar.gz"
# {part: (number of OpenSLR's set, md5 from that set's md5sum.txt)}.
ARCHIVES = {
    "dev-clean": (12, "42e2234ba48799c1f50f24a7926300a1"),
    "dev-other": (12, "c8d0bcc9cca99d4f8b62fcc847357931"),
    "test-clean": (12, "32fa31d27d2e1cad72775fee3f4849a9"),
    "test-other": (12, "fb5a50374b501bb3bac4815ee91d3135"),
    "train-clean-100": (12, "2a93770f6d5c6c964bc36631d331a522"),
    "train-clean-360": (12, "c0e676e450a7ff2f54aeade5171606fa"),
    "train-other-500": (12, "d1a0fd59409feb2c614ce4d30c387708"),
    "train-clean-5": (31, "5df7d4e78065366204ca6845bb08f490"),
    "dev-clean-2": (31, "6d7ab67ac6a1d2c993d050e16d61080d"),
}
# {part: (speakers, utterances)}, counted in the corpus's own list and files; None if the number is not known.
SIZES = {
    "dev-clean": (40, 2703),
    "dev-other": (33, 2864),
    "test-clean": (40, 2620),
    "test-other": (33, 2939),
    "train-clean-100": (251, 28539),
    "train-clean-360": (921, 104014),
    "train-other-500": (1166, 148688),
    "train-clean-5": (28, 1519),
    "dev-clean-2": (None, 1089),
}
Source = Tuple[Path, Optional[Set[str]]]  # directory of a part, and its speakers to use (None: all)


def prepare_librispeech(
    out: PathLike,
    librispeech: Optional[PathLike] = None,
    *,
    train_parts: Optional[Sequence[str]] = None,
    valid_parts: Optional[Sequence[str]] = None,
    test_parts: Optional[Sequence[str]] = None,
    split_by_speaker: Sequence[str] = (),
    speakers_valid: int = 0,
    speakers_test: int = 0,
    seed: int = 0,
    downloads: PathLike = "downloads",
    mirror: str = MIRROR,
    remove_archives: bool = False,
    skip_faulty: bool = False,
    nj: int = 1,
) -> Dict[str, int]:
    """Write ``out/train``, ``out/valid`` and ``out/test_clean`` … and return their numbers of utterances.

    Args:
        librispeech: the directory with the parts (or the one above it); None downloads the parts that are needed.
        train_parts, valid_parts, test_parts: None: the 960 h, dev-* and test-*, but no part with ``split_by_speaker``.
        split_by_speaker: parts whose speakers are divided among ``train``, ``valid`` and ``test``.
        speakers_valid, speakers_test: how many of these speakers go to ``valid`` and ``test``, chosen by a hash of
            their names and ``seed``.
        mirror: an address to use instead of openslr.org/resources; its archives must have the md5 of the originals.
        remove_archives: remove a downloaded archive when it is unpacked.
        skip_faulty: leave faulty utterances out, counted and named, instead of stopping.
        nj: processes that read the audio files.

    Raises:
        UserError: a part is missing or cannot be downloaded, or one of its utterances has a fault.
    """
    out = Path(out)
    divided = parts_of(split_by_speaker, "")
    train = parts_of(train_parts, "" if divided else TRAIN)
    valid = parts_of(valid_parts, "" if divided else VALID)
    test = parts_of(test_parts, "" if divided else TEST)
    if (speakers_valid or speakers_test) and not divided:
        raise UserError("--speakers_valid and --speakers_test: give the part with --split_by_speaker")
    others = {"--valid_parts": valid, "--test_parts": test}
    refuse_overlap("--train_parts", train, others)
    refuse_overlap("--split_by_speaker", divided, {"--train_parts": train, **others})
    with os_errors_as_user_errors(out):
        where = _find_parts(divided + train + valid + test, librispeech, downloads, mirror, remove_archives)
        sources: Dict[str, List[Source]] = {"train": [], "valid": [], "test": []}
        if divided:
            _divide([where[part] for part in divided], speakers_valid, speakers_test, seed, sources)
        sources["train"] += [(where[part], None) for part in train]
        sources["valid"] += [(where[part], None) for part in valid]
        for part in test:
            sources[part.replace("-", "_")] = [(where[part], None)]
        # All parts are listed before any audio is read, so that faults of the last part show in minutes, not hours.
        listed: Dict[str, Tuple[Spool, LeftOut]] = {}
        found: Counter[str] = Counter()
        for name, these in sources.items():
            if these:
                left_out = LeftOut(skip_faulty)
                listed[name] = Spool(out, _list(these, left_out, found)), left_out
        for name, (_, left_out) in listed.items():
            for directory in dict.fromkeys(directory for directory, _ in sources[name]):
                if directory.name not in divided or name == "train":  # a divided part is logged only once
                    _expect(directory, found[directory.name], left_out)
        return {name: write_corpus_dir(out / name, spool, gone, nj=nj) for name, (spool, gone) in listed.items()}


def _find_parts(
    parts: Iterable[str], librispeech: Optional[PathLike], downloads: PathLike, mirror: str, remove_archives: bool
) -> Dict[str, Path]:
    """Map each part to its directory; download those that are missing where no directory was given."""
    parts = list(dict.fromkeys(parts))
    if not parts:
        raise UserError("no part at all: give --train_parts, --valid_parts, --test_parts or --split_by_speaker")
    if librispeech is not None:
        root = find_root(librispeech, "--librispeech", "LibriSpeech", parts, "openslr.org/12")
        for part in parts:
            if not (root / part).is_dir():
                raise UserError(f"{root / part}: this part is missing; fetch {part}.tar.gz from openslr.org/12, or "
                                "give other --train_parts, --valid_parts, --test_parts")  # fmt: skip
        return {part: root / part for part in parts}
    for part in parts:
        if part not in ARCHIVES:
            raise UserError(f"'{part}' is no part of LibriSpeech that can be downloaded; known: {' '.join(ARCHIVES)}")
    root, downloads = Path(downloads) / "LibriSpeech", Path(downloads)
    for part in parts:
        if (root / part).is_dir():
            continue
        number, md5 = ARCHIVES[part]
        url = URL.format(mirror=mirror.rstrip("/"), set=number, part=part)
        archive = download(url, downloads / f"{part}.tar.gz", md5, "--librispeech")
        root.mkdir(parents=True, exist_ok=True)
        logging.info("unpacking %s", archive)
        unpack_archive(archive, root / part, f"LibriSpeech/{part}")
        if remove_archives:
            archive.unlink()
    return {part: root / part for part in parts}


def _divide(parts: Sequence[Path], valid: int, test: int, seed: int, sources: Dict[str, List[Source]]) -> None:
    """Divide the parts' speakers among ``train``, ``valid`` and ``test`` of ``sources``."""
    speakers = sorted({path.name for part in parts for path in directories(part)})
    if valid < 0 or test < 0 or not 0 < valid + test < len(speakers):
        raise UserError(f"--speakers_valid {valid} --speakers_test {test}: {' '.join(map(str, parts))} has "
                        f"{len(speakers)} speakers; take 1 to {len(speakers) - 1} of them together")  # fmt: skip
    order = pick_speakers(speakers, valid + test, seed)
    chosen = {"valid": set(order[:valid]), "test": set(order[valid:]), "train": set(speakers) - set(order)}
    for name, those in chosen.items():
        if those:
            sources[name] += [(part, those) for part in parts]


def _expect(part: Path, utterances: int, left_out: LeftOut) -> None:
    """Note the speakers (by SPEAKERS.TXT, or else by number) and the number of utterances that a part lacks."""
    there = {path.name for path in directories(part)}
    listed = part.parent / "SPEAKERS.TXT"
    meant: Set[str] = set()
    if listed.is_file():
        for _, line in iter_lines(listed, errors="replace"):
            fields = [field.strip() for field in line.split("|")]
            if len(fields) > 2 and not line.startswith(";") and fields[2] == part.name:
                meant.add(fields[0])
    speakers, number = SIZES.get(part.name, (None, None))
    left_out.expect(f"speakers of {part.name}", len(there), speakers, meant - there, str(listed))
    left_out.expect(f"utterances of {part.name}", utterances, number)


def _list(sources: Sequence[Source], left_out: LeftOut, found: Counter[str]) -> Iterator[List[Utterance]]:
    """Yield each utterance of some parts as a list, in the order of the directories; count them in ``found``."""
    for part, speakers in sources:
        empty = True
        for speaker in directories(part):
            if speakers is not None and speaker.name not in speakers:
                continue
            for chapter in directories(speaker):
                for utt in _read_chapter(chapter, speaker.name, left_out):
                    empty = False
                    found[part.name] += 1
                    yield [utt]
        if empty:
            raise UserError(f"{part}: no utterance below it; expected <speaker>/<chapter>/<speaker>-<chapter>.trans.txt"
                            " with FLAC files beside")  # fmt: skip


def _read_chapter(chapter: Path, speaker: str, left_out: LeftOut) -> Iterator[Utterance]:
    """Yield the utterances of one directory ``<speaker>/<chapter>``."""
    audio = files_by_stem(chapter, (".flac", ".wav"))
    path = chapter / f"{speaker}-{chapter.name}.trans.txt"
    again = "unpack its part again"
    if not path.exists():
        for name in audio:
            left_out.fault("audio without transcript", name, chapter, f"{path.name} is missing: {again}")
        return
    seen: Set[str] = set()
    for number, line in iter_lines(path):
        utt_id, text = split_line(line)
        where = f"{path}:{number}"
        if not utt_id:
            continue
        if not utt_id.startswith(f"{speaker}-{chapter.name}-"):
            raise UserError(f"{where}: '{utt_id}' does not begin with {speaker}-{chapter.name}-; {again}")
        if utt_id in seen:
            raise UserError(f"{where}: utterance '{utt_id}' stands twice in this file; keep one of the lines")
        seen.add(utt_id)
        text = text.strip()
        if utt_id not in audio:
            left_out.fault("transcript without audio", utt_id, where, again)
        elif not text:
            left_out.fault("empty transcript", utt_id, where, "fill it in")
        else:
            yield Utterance(utt_id, speaker, os.path.join(chapter, audio[utt_id]), text)
    for name in audio:
        if name not in seen:
            left_out.fault("audio without transcript", name, path, again)
