"""Comparison of methods: means over seeds, and each student against the plain student of the same seed and size."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from espnet_kd.decode.bootstrap import bootstrap_seeds
from espnet_kd.decode.score import COUNTS, Counts
from espnet_kd.report.labels import Row, divide_by_tag, label_rows
from espnet_kd.report.results import Gathered, find_teacher, had_no_teacher, model_homes

UNITS = ("cer", "wer")


@dataclass
class Rate:
    """An error rate, or a difference of two, in percent, with its 95 % interval and p where there are any."""

    value: float
    low: Optional[float] = None
    high: Optional[float] = None
    p: Optional[float] = None


@dataclass
class Difference:
    """A kind of student against the plain one: ``seeds`` that both have, one `Rate` for each of `UNITS`."""

    seeds: List[Any]
    rates: Dict[str, Rate]
    plain: Dict[str, float]  #: the plain students' error rates over these seeds, in percent
    utterances: int
    other_epochs: bool = False  #: whether a student and its plain student were trained for different numbers of epochs


@dataclass
class Kind:
    """All seeds of one kind of experiment on one test set. ``against`` is the reason if there is no difference."""

    label: str
    rows: List[Row]
    rates: Dict[str, Rate]
    against: Union[Difference, str, None] = None  #: None for a teacher or a plain student, which are not compared
    cost: Optional[float] = None  #: training time as a multiple of the plain students', if nothing else ran
    #: Deleted, inserted and substituted words in percent of the reference, if they were counted
    split: Optional[Dict[str, float]] = None
    alone: bool = True  #: whether nothing else was trained at the same time as any of these, as far as it is known
    rtf: Optional[float] = None  #: real-time factor, a mean over all models of this size on the test set
    teacher: Optional[Kind] = None  #: the teacher of a distilled student, if it is in the table and decoded alike
    unit: str = "wer"  #: the main one of `UNITS` on this test set (`main_unit`)

    def mean(self, key: str) -> Optional[float]:
        """Mean of one number over the rows that have it."""
        values = [row[key] for row in self.rows if row[key] is not None]
        return sum(values) / len(values) if values else None


def find_plain(row: Row, rows: Sequence[Row]) -> Union[Row, str]:
    """The plain student that a student is compared with, or the reason why there is none.

    It has the same test set, seed and number of parameters, and was decoded with the same search. Of several, one with
    the same number of epochs is taken, then the one with the same tag in its name, then the first by name.
    """
    plain = [r for r in rows if r["role"] == "plain" and r["testset"] == row["testset"] and r["wer"] is not None]
    equal = [r for r in plain if r["params"] == row["params"] is not None]
    if not equal:
        return "no plain student of this size"
    equal = [r for r in equal if r["seed"] == row["seed"]]
    if not equal:
        return "no plain student of this seed"
    equal = [r for r in equal if _same_search(r, row)]
    if not equal:
        return "the plain student was decoded with another search"
    return min(equal, key=lambda r: (r["epochs"] != row["epochs"], -_common_tag(r, row), r["experiment"]))


def _same_search(one: Row, other: Row) -> bool:
    """Whether two rows were decoded alike, as far as it is known."""
    return one["search"] == other["search"] or None in (one["search"], other["search"])


def _common_tag(plain: Row, student: Row) -> int:
    """Length of what follows ``student_plain`` in a plain student's name, if a student's name ends with it; else -1.

    run.sh adds the same to both names: ``--tag`` or the seed, and ``pseudo`` for a training set with pseudo-labels.
    """
    tag = plain["experiment"].removeprefix("student_plain")
    return len(tag) if student["experiment"].replace("_untranscribed", "").endswith(tag) else -1


def compare(gathered: Gathered) -> List[Kind]:
    """One entry for each kind of scored experiment, by test set: teachers, plain, then distilled students, best first.

    The intervals are bootstraps over seeds and utterances (`bootstrap_seeds`). With a single seed they are over
    utterances only, and do not cover other seeds.
    """
    rows, label = gathered.rows, label_rows(gathered.rows)
    groups: Dict[Tuple, List[Row]] = {}
    for row in rows:
        if all(row[unit] is not None for unit in UNITS):
            groups.setdefault((row["testset"], label(row), row["params"]), []).append(row)
    kinds = []
    for (_, name, _), members in groups.items():
        for tag, part in divide_by_tag(members):
            kind = Kind(f"{name}{tag}", part, {unit: _mean(part, gathered, unit) for unit in UNITS})
            kind.split = _split(part, gathered)
            counts = read_counts(gathered, part[0], "wer")
            kind.unit = main_unit(counts.lengths) if counts else "wer"
            kind.alone = all(gathered.ran_alone(row) for row in part if row["train_seconds"])
            kind.rtf = _speed(part[0], rows)
            if part[0]["role"] == "student":
                found = [(row, find_plain(row, rows)) for row in part]
                pairs = [(row, plain) for row, plain in found if not isinstance(plain, str)]
                kind.against = _against(pairs, gathered) if pairs else str(found[0][1])
                kind.cost = _cost([p for p in pairs if all(map(gathered.ran_alone, p))])
            kinds.append(kind)
    for kind in kinds:
        if kind.rows[0]["role"] == "student":
            kind.teacher = _teacher_of(kind, kinds, gathered)
    return sorted(kinds, key=_order)


def _teacher_of(kind: Kind, kinds: Sequence[Kind], gathered: Gathered) -> Optional[Kind]:
    """The teacher of a student; None if it had none, if it is not in the table, or if it is not known which it was."""
    row = kind.rows[0]
    experiment = gathered.paths[row["experiment"]]
    if had_no_teacher(experiment):
        return None
    there = [k for k in kinds if (k.rows[0]["role"], k.rows[0]["testset"]) == ("teacher", row["testset"])]
    there = [k for k in there if _same_search(k.rows[0], row)]
    own = find_teacher(experiment)
    if own is None:
        return there[0] if len(there) == 1 else None
    return next((k for k in there for r in k.rows if own in model_homes(gathered.paths[r["experiment"]])), None)


def _order(kind: Kind) -> Tuple:
    row = kind.rows[0]
    role = {"teacher": 0, "plain": 1, "student": 2}.get(row["role"], 3)
    gain = kind.against.rates[kind.unit].value if isinstance(kind.against, Difference) else None
    return row["testset"] or "", role, gain is None, gain or 0.0, row["params"] or 0, kind.label


def _mean(rows: Sequence[Row], gathered: Gathered, unit: str) -> Rate:
    """Mean over the seeds; its interval needs the counts of the same utterances for each seed."""
    mean = sum(r[unit] for r in rows) / len(rows)
    if len(rows) == 1:
        return Rate(mean, rows[0][f"{unit}_low"], rows[0][f"{unit}_high"])
    tables = _all_counts(gathered, rows, unit)
    if not tables or _unlike(tables) or not tables[0].lengths.sum():
        return Rate(mean)
    _, low, high, _ = bootstrap_seeds(np.stack([t.errors for t in tables]), tables[0].lengths)
    return Rate(mean, low, high)


def _split(rows: Sequence[Row], gathered: Gathered) -> Optional[Dict[str, float]]:
    """Kinds of word errors, over all seeds."""
    tables = [read_counts(gathered, row, "wer") for row in rows]
    words = sum(int(t.lengths.sum()) for t in tables if t)
    if not words:
        return None
    total = sum(t.table.sum(axis=0) for t in tables if t)
    return {name: 100.0 * int(n) / words for name, n in zip(COUNTS, total) if name != "corr"}


def _speed(row: Row, rows: Sequence[Row]) -> Optional[float]:
    """Mean real-time factor of the models of one size: they do the same work, so that their differences are noise."""
    like = [r for r in rows if r["testset"] == row["testset"] and r["params"] == row["params"]]
    like = [r for r in like if _same_search(r, row)]
    if row["params"] is None:
        like = [row]
    values = [r["rtf"] for r in like if r["rtf"] is not None]
    return sum(values) / len(values) if values else None


def _cost(pairs: Sequence[Tuple[Row, Row]]) -> Optional[float]:
    times = [(row["train_seconds"], plain["train_seconds"]) for row, plain in pairs]
    times = [(ours, theirs) for ours, theirs in times if ours and theirs]
    return sum(t[0] for t in times) / sum(t[1] for t in times) if times else None


def _against(pairs: Sequence[Tuple[Row, Row]], gathered: Gathered) -> Union[Difference, str]:
    rates: Dict[str, Rate] = {}
    plain: Dict[str, float] = {}
    for unit in UNITS:
        ours, theirs = (_all_counts(gathered, [pair[i] for pair in pairs], unit) for i in (0, 1))
        if not ours or not theirs:
            return "no per_utt.tsv: score again"
        if reason := _unlike([*ours, *theirs]):
            return reason
        ids, lengths = ours[0].utt_ids, ours[0].lengths
        if not lengths.sum():
            return "the references are empty"
        rates[unit] = Rate(*bootstrap_seeds(np.stack([a.errors - b.errors for a, b in zip(ours, theirs)]), lengths))
        plain[unit] = 100.0 * sum(int(b.errors.sum()) for b in theirs) / (len(theirs) * int(lengths.sum()))
    other_epochs = any(row["epochs"] != other["epochs"] for row, other in pairs)
    return Difference([row["seed"] for row, _ in pairs], rates, plain, len(ids), other_epochs)


def _unlike(tables: Sequence[Counts]) -> str:
    """The reason why counts cannot be compared utterance by utterance; empty if they can."""
    if any(table.utt_ids != tables[0].utt_ids for table in tables):
        return "scored on other utterances"
    if any(not np.array_equal(table.lengths, tables[0].lengths) for table in tables):
        return "scored against other references"
    return ""


def main_unit(words: np.ndarray) -> str:
    """The main one of `UNITS`: CER if no reference has a second word, as in languages without blanks between words.

    Args:
        words: (U,) number of words of each reference.
    """
    return "wer" if words.max(initial=0) > 1 else "cer"


def _all_counts(gathered: Gathered, rows: Sequence[Row], unit: str) -> List[Counts]:
    """The counts of all rows; an empty list if those of one cannot be read."""
    found = [counts for row in rows if (counts := read_counts(gathered, row, unit)) is not None]
    return found if len(found) == len(rows) else []


def read_counts(gathered: Gathered, row: Row, unit: str) -> Optional[Counts]:
    """The error counts of each utterance of a scored row; None if per_utt.tsv cannot be read."""
    path = gathered.decoding(row) / "per_utt.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as f:
            # A quotation mark is a part of an id, not a mark of the file format.
            table = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
            lines = {r["utt_id"]: [int(r[f"{unit}_{k}"]) for k in COUNTS] for r in table}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ids = sorted(lines)
    return Counts(ids, np.array([lines[u] for u in ids], dtype=np.int64).reshape(len(ids), len(COUNTS)))
