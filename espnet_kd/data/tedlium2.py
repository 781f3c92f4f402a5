"""TED-LIUM release 2 (talks, 16 kHz): original layout → data dirs ``train``, ``valid`` (its dev), ``test``.

The corpus has ``{train,dev,test}/sph/<talk>.sph``, and ``stm/<talk>.stm`` beside ``sph``. The data dirs have
``segments``; stage 2 cuts the audio. Texts (:func:`clean`) and ids (``<talk>-<start>-<end>`` in 1/100 s) are the same
as in ESPnet's tedlium2 recipe. Each talk counts as a speaker.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data.corpora import LeftOut, files_by_stem, find_root, write_corpus_dir
from espnet_kd.data.datadir import Spool, Utterance, iter_lines, os_errors_as_user_errors
from espnet_kd.files import PathLike

SETS = {"train": "train", "dev": "valid", "test": "test"}  # {name in the corpus: name of the data dir}
TALKS = {"train": 1495, "dev": 8, "test": 11}
IGNORED = "ignore_time_segment_in_scoring"
# Matches the labels <o,f0,male> or, in older files, <F0_M>, but not <unk>, <sil> or <s>, which may begin a text.
_LABELS = re.compile(r"<[^<>]*,[^<>]*>|<[A-Z]\d_[A-Z]>")
_NAME_AT_END = re.compile(r"\([^ ]*\)$")
_VARIANT = re.compile(r"\([0-9]\)")
_MARKER = re.compile(r"<sil>|</?s>")
_FILLER = re.compile(r"\[[^\]\s]*\]|<unk>")


def prepare_tedlium2(
    out: PathLike,
    tedlium2: PathLike,
    *,
    drop_fillers: bool = False,
    padding: Sequence[float] = (0.0, 0.0),
    skip_faulty: bool = False,
    nj: int = 1,
) -> Dict[str, int]:
    """Write ``out/{train,valid,test}`` and return their numbers of utterances.

    Lines with ``ignore_time_segment_in_scoring``, repeated lines and lines without words are counted and left out.

    Args:
        tedlium2: the directory that holds train/, dev/, test/, or the one above it.
        drop_fillers: also remove ``[NOISE]`` and ``<unk>`` from the text, where ESPnet keeps them.
        padding: seconds added before and after each training segment, as far as its neighbours leave room; ESPnet's
            recipe has 0.15 and 0.1.
        skip_faulty: leave faulty segments or talks out, counted and named, instead of stopping.
        nj: processes that read the audio files' headers.

    Raises:
        UserError: a set is missing, or a talk or line has a fault.
    """
    out = Path(out)
    if len(padding) != 2 or not all(seconds >= 0 for seconds in padding):  # NaN is refused too
        raise UserError(f"--padding {' '.join(map(str, padding))}: give the seconds before and after, 0 or more")
    root = find_root(tedlium2, "--tedlium2", "TEDLIUM_release2", SETS, "openslr.org/19")
    with os_errors_as_user_errors(out):
        listed: Dict[str, Tuple[Spool, LeftOut]] = {}
        for theirs, ours in SETS.items():
            left_out = LeftOut(skip_faulty)
            room = tuple(padding) if ours == "train" else (0.0, 0.0)
            talks = _list(root / theirs, left_out, drop_fillers)
            listed[ours] = Spool(out, (pad_segments(talk, *room) for talk in talks)), left_out
            left_out.expect("talks", len(listed[ours][0]), TALKS[theirs])
        return {name: write_corpus_dir(out / name, spool, gone, nj=nj) for name, (spool, gone) in listed.items()}


def clean(text: str, drop_fillers: bool = False) -> str:
    """Return the words of a STM line as ESPnet's tedlium2 recipe has them.

    ``<sil>``, ``<s>``, ``</s>``, pronunciation variants ``(2)`` and a name in brackets at the end are removed;
    ``{BREATH}`` and other fillers become ``[BREATH]``; ``it 's`` becomes ``it's``; ``<unk>`` is kept.
    """
    text = _NAME_AT_END.sub("", text.strip())
    text = _MARKER.sub(" ", _VARIANT.sub("", text)).translate(str.maketrans("{}", "[]"))
    if drop_fillers:
        text = _FILLER.sub(" ", text)
    words: List[str] = []
    joined = False
    for word in text.split():
        # As in ESPnet, a joined word takes no second suffix.
        if word.startswith("'") and words and not joined:
            words[-1] += word
            joined = True
        else:
            words.append(word)
            joined = False
    return " ".join(words)


def pad_segments(talk: List[Utterance], before: float, after: float) -> List[Utterance]:
    """Widen the segments of one talk, sorted by time, by these seconds, but at most by half the gap to a neighbour."""
    if not before and not after:
        return talk
    out = []
    for i, u in enumerate(talk):
        start, end = u.start or 0.0, u.end or 0.0
        left = max(start - (talk[i - 1].end or 0.0), 0.0) / 2 if i else start
        right = max((talk[i + 1].start or 0.0) - end, 0.0) / 2 if i + 1 < len(talk) else after
        out.append(replace(u, start=start - min(before, left), end=end + min(after, right)))
    return out


def parse_stm(path: Path, left_out: LeftOut, drop_fillers: bool = False) -> Iterator[Tuple[float, float, str]]:
    """Yield (start, end, words) of each line with an utterance; times in seconds.

    Raises:
        UserError: a line is no STM line, of another talk, not UTF-8, or ends before it starts.
    """
    previous = None
    for number, line in iter_lines(path):
        where = f"{path}:{number}"
        if not line.strip() or line.startswith(";;"):
            continue
        fields = line.split(maxsplit=5)
        try:
            talk, start, end = fields[0], float(fields[3]), float(fields[4])
        except (IndexError, ValueError) as e:
            raise UserError(f"{where}: expected 'talk channel speaker start end <labels> words', found '{line}'") from e
        if talk != path.stem:
            raise UserError(f"{where}: this line is of the talk '{talk}'; move it to the file of that talk")
        text = fields[5] if len(fields) > 5 else ""
        labels = _LABELS.match(text)
        text = clean(text[labels.end() :] if labels else text, drop_fillers)
        good = 0 <= start < end < math.inf
        name = utterance_id(talk, start, end) if good else talk
        if IGNORED in line:
            left_out.add(IGNORED, name)
        elif not good:
            left_out.fault(f"start {start:g} and end {end:g} make no segment", name, where, "correct the line")
        elif line == previous:
            left_out.add("line repeated", name)
        elif not text:
            left_out.add("line without words", name)
        else:
            yield start, end, text
        previous = line


def utterance_id(talk: str, start: float, end: float) -> str:
    """Return ``talk-start-end`` with times in 1/100 s, of seven digits each, so that sorting ids sorts by time."""
    return f"{talk}-{round(start * 100):07d}-{round(end * 100):07d}"


def _list(part: Path, left_out: LeftOut, drop_fillers: bool) -> Iterator[List[Utterance]]:
    """Yield the utterances of each talk, sorted by time."""
    again = "unpack TEDLIUM_release2 of openslr.org/19 again"
    for name in ("stm", "sph"):
        if not (part / name).is_dir():
            raise UserError(f"{part / name}: this directory is missing; {again}")
    audio = files_by_stem(part / "sph", (".sph", ".wav", ".flac"))
    talks = files_by_stem(part / "stm", (".stm",))
    if not talks:
        raise UserError(f"{part / 'stm'}: no STM file in it; {again}")
    for talk, name in talks.items():
        stm = part / "stm" / name
        utts: Dict[str, Utterance] = {}
        if talk not in audio:
            left_out.fault("transcript without audio", talk, stm, f"sph/{talk}.sph is missing: {again}")
            continue
        path = str(part / "sph" / audio[talk])
        for start, end, text in parse_stm(stm, left_out, drop_fillers):
            utt_id = utterance_id(talk, start, end)
            if utt_id in utts:
                raise UserError(f"{stm}: utterance '{utt_id}' ({start:g} to {end:g} s) comes twice; remove a line")
            utts[utt_id] = Utterance(utt_id, talk, path, text, recording=talk, start=start, end=end)
        if utts:
            yield [utts[utt_id] for utt_id in sorted(utts)]
        else:
            left_out.fault("empty transcript", talk, stm, again)
    for talk in audio:
        if talk not in talks:
            left_out.fault("audio without transcript", talk, part / "sph" / audio[talk], f"stm/{talk}.stm: {again}")
