"""The utterances with the most errors, and with the largest change against the plain student."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_map
from espnet_kd.report.audio import Audio
from espnet_kd.report.compare import Kind, find_plain, main_unit, read_counts
from espnet_kd.report.labels import Row
from espnet_kd.report.matching import Piece, mark
from espnet_kd.report.results import Gathered, find_data

SHOWN = 5  #: utterances in each group


@dataclass
class Chosen:
    """The student that a test set's examples show, the first in the table, with its plain student and teacher."""

    student: Row
    label: str
    plain: Optional[Row]
    teacher: Optional[Row]
    errors: Dict[str, int] = field(default_factory=dict)  #: {utterance: errors}
    change: Dict[str, int] = field(default_factory=dict)  #: {utterance: errors minus those of the plain student}


@dataclass
class Example:
    """One utterance: the marked output of each model by its label, and the audio as a data URI, if any."""

    utt_id: str
    why: str
    reference: str
    texts: List[Tuple[str, List[Piece]]]
    audio: Optional[str] = None


def choose_student(gathered: Gathered, kinds: Sequence[Kind], testset: str) -> Optional[Chosen]:
    """The first distilled student of a test set in the table's order, None where none is scored."""
    mine = [kind for kind in kinds if kind.rows[0]["testset"] == testset]
    kind = next((k for k in mine if k.rows[0]["role"] == "student"), None)
    if kind is None:
        return None
    student = next((r for r in kind.rows if not isinstance(find_plain(r, gathered.rows), str)), kind.rows[0])
    plain = find_plain(student, gathered.rows)
    teacher = kind.teacher.rows[0] if kind.teacher else None
    chosen = Chosen(student, kind.label, None if isinstance(plain, str) else plain, teacher)
    chosen.errors = _errors(gathered, student)
    before = _errors(gathered, chosen.plain) if chosen.plain else {}
    chosen.change = {u: e - before[u] for u, e in chosen.errors.items() if u in before}
    return chosen


def _errors(gathered: Gathered, row: Row) -> Dict[str, int]:
    """{utterance: errors in the main unit, words or characters}; {} if they cannot be read."""
    counts = read_counts(gathered, row, "wer")
    if counts and main_unit(counts.lengths) == "cer":
        counts = read_counts(gathered, row, "cer")
    return dict(zip(counts.utt_ids, map(int, counts.errors))) if counts else {}


def choose_examples(chosen: Chosen, num: int) -> List[Tuple[str, str]]:
    """Up to ``num`` (utterance, why): those that distillation improved most and worsened most, and typical ones."""
    picked: Dict[str, str] = {}
    if chosen.change:
        ranked = sorted(chosen.change, key=lambda u: (chosen.change[u], u))
        for what, u in (("most improved", ranked[0]), ("most worsened", ranked[-1])):
            picked.setdefault(u, f"{what}, errors against the plain student {chosen.change[u]:+d}")
    ranked = sorted(chosen.errors, key=lambda u: (chosen.errors[u], u))
    for i in sorted(range(len(ranked)), key=lambda i: abs(i - len(ranked) // 2))[: num + 2]:  # nearest to the median
        u = ranked[i]
        picked.setdefault(u, f"typical, errors: {chosen.errors[u]}")
    return list(picked.items())[:num]


def collect_worst(gathered: Gathered, chosen: Chosen, notes: List[str], audio: Audio) -> Dict[str, List[Example]]:
    """{property of a group: its examples with their texts}; files that cannot be read are listed in ``notes``.

    ``audio`` embeds the audio of the first examples, up to its limit.
    """
    errors, change = chosen.errors, chosen.change
    worst = sorted((u for u in errors if errors[u]), key=lambda u: (-errors[u], u))
    better = sorted((u for u in change if change[u] < 0), key=lambda u: (change[u], u))
    worse = sorted((u for u in change if change[u] > 0), key=lambda u: (-change[u], u))
    if not worst:
        return {}
    place = find_data(gathered.decoding(chosen.student))
    if place is None:
        notes.append(f"{chosen.student['testset']}: its data dir is not there, and so no references")
        return {}
    reference = _read(place[0] / place[1] / "text", notes)
    if reference is None:
        return {}
    texts = {}
    for label, row in (("teacher", chosen.teacher), ("plain", chosen.plain), (chosen.label, chosen.student)):
        found = row and _read(gathered.decoding(row) / "1best_recog" / "text", notes)
        if found:
            texts[label] = found
    unit = "word" if any(" " in reference.get(u, "") for u in errors) else "char"
    groups: Dict[str, List[Example]] = {}
    for what, ids in (("most errors", worst), ("most improved", better), ("most worsened", worse)):
        for u in [u for u in ids if u in reference][:SHOWN]:
            shown = [(name, mark(reference[u], text[u], unit)) for name, text in texts.items() if u in text]
            why = f"errors: {errors[u]}" + (f", against the plain student {change[u]:+d}" if u in change else "")
            groups.setdefault(what, []).append(Example(u, why, reference[u], shown, audio.embed(*place, u)))
    return groups


def _read(path: Path, notes: List[str]) -> Optional[Dict[str, str]]:
    try:
        return read_map(path)
    except UserError as e:
        notes.append(str(e))
        return None
