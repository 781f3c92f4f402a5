"""AISHELL-1 (read Mandarin, 16 kHz): original layout → data dirs ``train``, ``valid`` (its dev), ``test``.

The corpus has ``transcript/aishell_transcript_v0.8.txt`` and ``wav/{train,dev,test}/S????/BAC….wav``, or
``wav/S????.tar.gz`` as in the archive of openslr.org/33. The blanks between the words of the transcript are removed,
as in ESPnet's recipe, because tokens are characters.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Set, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data.corpora import LeftOut, directories, files_by_stem, find_root, unpacked_beside, write_corpus_dir
from espnet_kd.data.datadir import Spool, Utterance, join_sorted, os_errors_as_user_errors, read_sorted, sort_externally
from espnet_kd.data.parallel import map_with_bar
from espnet_kd.files import PathLike

TRANSCRIPT = "transcript/aishell_transcript_v0.8.txt"
SETS = {"train": "train", "dev": "valid", "test": "test"}  # {name in the corpus: name of the data dir}
SIZES = {"train": (340, 120098), "valid": (40, 14326), "test": (20, 7176)}  # speakers, and utterances with a transcript
Recording = Tuple[str, str, str, str]  # utterance id, set, speaker, file


def prepare_aishell(
    out: PathLike,
    aishell: PathLike,
    *,
    unpacked: PathLike = "downloads/aishell_wav",
    skip_faulty: bool = False,
    nj: int = 1,
) -> Dict[str, int]:
    """Write ``out/{train,valid,test}`` and return their numbers of utterances.

    Audio without a transcript (some hundred in the original) and transcripts without audio are counted, named and left
    out.

    Args:
        aishell: the directory that holds ``transcript`` and ``wav``, or the one above it.
        unpacked: where speakers still packed (``wav/S0002.tar.gz``) are unpacked to.
        skip_faulty: leave other faulty utterances out as well, instead of stopping.
        nj: processes that unpack and read the audio files.

    Raises:
        UserError: a set or the transcript file is missing, or an utterance has a fault.
    """
    out = Path(out)
    root = find_root(aishell, "--aishell", "data_aishell", ["transcript", "wav"], "openslr.org/33")
    transcript = root / TRANSCRIPT
    if not transcript.is_file():
        raise UserError(f"{transcript}: no such file; unpack data_aishell.tgz of openslr.org/33 again")
    with os_errors_as_user_errors(out):
        roots = [root / "wav", *_unpack_speakers(root / "wav", Path(unpacked), nj)]
        left_out = {name: LeftOut(skip_faulty) for name in SETS.values()}
        silent = LeftOut(skip_faulty)
        spools = {name: Spool(out) for name in SETS.values()}
        speakers: Dict[str, Set[str]] = {name: set() for name in SETS.values()}
        recordings = sort_externally(_list(roots), lambda r: r[0], out)
        for utt_id, found in join_sorted({"audio": recordings, "text": read_sorted(transcript)}):
            files, texts = found.get("audio", []), found.get("text", [])
            if len(files) > 1:
                raise UserError(f"utterance id '{utt_id}' is two files ({files[0][3]}, {files[1][3]}); remove one")
            if len(texts) > 1:
                raise UserError(f"{transcript}: utterance '{utt_id}' stands in lines {texts[0][1]} and {texts[1][1]}; "
                                "keep one of them")  # fmt: skip
            if not files:
                silent.add("transcript without audio", utt_id)
                continue
            _, name, speaker, path = files[0]
            speakers[name].add(speaker)
            text = "".join(texts[0][2].split()) if texts else ""
            if not texts:
                left_out[name].add("audio without transcript", utt_id)
            elif not text:
                left_out[name].fault("empty transcript", utt_id, f"{transcript}:{texts[0][1]}", "fill it in")
            else:
                spools[name].append([Utterance(utt_id, speaker, path, text)])
        for name, (number, utterances) in SIZES.items():
            left_out[name].expect("speakers", len(speakers[name]), number)
            left_out[name].expect("utterances", len(spools[name]), utterances)
        counts = {name: write_corpus_dir(out / name, spools[name], left_out[name], nj=nj) for name in spools}
        silent.report(str(transcript), out / "left_out")
    return counts


def _unpack_speakers(wav: Path, unpacked: Path, nj: int) -> List[Path]:
    """Unpack the speakers that exist only as an archive; return the directory of the unpacked sets, if there is one."""
    if not wav.is_dir():
        raise UserError(f"{wav}: no such directory; unpack data_aishell.tgz of openslr.org/33 again")
    there = {path.name for name in SETS if (wav / name).is_dir() for path in directories(wav / name)}
    packed = sorted([*wav.glob("*.tar.gz"), *wav.glob("*/*.tar.gz")])
    archives = [str(path) for path in packed if path.name.split(".")[0] not in there]
    if not archives:
        return []
    logging.info("AISHELL-1: %d packed speakers, unpacked to %s", len(archives), unpacked)
    for _ in map_with_bar(partial(_unpack_speaker, unpacked=str(unpacked)), archives, nj=nj, desc="unpack", unit="spk"):
        pass
    return [unpacked]


def _unpack_speaker(archive: str, unpacked: str) -> None:
    """Unpack ``S0002.tar.gz`` to ``unpacked/<set>/S0002``, whole or not at all."""
    root, speaker = Path(unpacked), Path(archive).name.split(".")[0]
    if any((root / name / speaker).is_dir() for name in SETS):
        return
    with unpacked_beside(archive, root / speaker) as beside:
        found = [name for name in SETS if (beside / name / speaker).is_dir()]
        if len(found) != 1:
            raise UserError(f"{archive}: expected one of {', '.join(f'{name}/{speaker}' for name in SETS)} in it")
        (root / found[0]).mkdir(exist_ok=True)
        os.replace(beside / found[0] / speaker, root / found[0] / speaker)


def _list(roots: Sequence[Path]) -> Iterator[Recording]:
    """Yield every audio file of the three sets.

    Raises:
        UserError: a set is missing or has no audio.
    """
    for name, ours in SETS.items():
        found = False
        for speaker in (s for root in roots if (root / name).is_dir() for s in directories(root / name)):
            for utt_id, file in files_by_stem(speaker, (".wav", ".flac")).items():
                found = True
                yield utt_id, ours, speaker.name, os.path.join(speaker, file)
        if not found:
            raise UserError(f"{roots[0] / name}: this set is missing or has no audio; expected {name}/S????/*.wav or "
                            "S????.tar.gz")  # fmt: skip
