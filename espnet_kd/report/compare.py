"""Which method helped: means over seeds, and each student against the plain student of the same seed and size."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from espnet_kd.decode.score import bootstrap_interval, paired_bootstrap
from espnet_kd.report.labels import Row, label_rows
from espnet_kd.report.results import Gathered

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
    other_epochs: bool = False  #: whether one of them was trained for more epochs than its plain student, or fewer


@dataclass
class Kind:
    """All seeds of one kind of experiment on one test set; ``against`` says why where there is no difference."""

    label: str
    rows: List[Row]
    rates: Dict[str, Rate]
    against: Union[Difference, str, None] = None  #: None: nothing to be compared with (a teacher, a plain student)
    cost: Optional[float] = None  #: training time as a multiple of the plain students', where nothing ran beside

    def mean(self, key: str) -> Optional[float]:
        """Mean of one number over the rows that have it."""
        values = [row[key] for row in self.rows if row[key] is not None]
        return sum(values) / len(values) if values else None


def find_plain(row: Row, rows: Sequence[Row]) -> Union[Row, str]:
    """The plain student that a student is fairly compared with, or why there is none.

    It has the same test set, seed and number of parameters; of several the one with as many epochs, then by name.
    """
    plain = [r for r in rows if r["role"] == "plain" and r["testset"] == row["testset"] and r["wer"] is not None]
    equal = [r for r in plain if r["params"] == row["params"] is not None]
    if not equal:
        return "no plain student of this size"
    equal = [r for r in equal if r["seed"] == row["seed"]]
    if not equal:
        return "no plain student of this seed"
    return min(equal, key=lambda r: (r["epochs"] != row["epochs"], r["experiment"]))


def compare(gathered: Gathered) -> List[Kind]:
    """One entry for each kind of scored experiment, by test set: teachers, plain students, then what helped most.

    The intervals are bootstraps over utterances; the errors of an utterance are summed over the seeds first, so that
    it stays one observation. They say nothing of other seeds.
    """
    rows, label = gathered.rows, label_rows(gathered.rows)
    groups: Dict[Tuple, List[Row]] = {}
    for row in rows:
        if all(row[unit] is not None for unit in UNITS):
            groups.setdefault((row["testset"], label(row), row["params"]), []).append(row)
    kinds = []
    for (_, name, _), members in groups.items():
        if len({r["seed"] for r in members}) < len(members):  # told apart by their tags alone
            parts = [(f"{name} ({r['experiment']})", [r]) for r in members]
        else:
            parts = [(name, members)]
        for title, part in parts:
            kind = Kind(title, part, {unit: _mean(part, gathered, unit) for unit in UNITS})
            if part[0]["role"] == "student":
                found = [(row, find_plain(row, rows)) for row in part]
                pairs = [(row, plain) for row, plain in found if not isinstance(plain, str)]
                kind.against = _against(pairs, gathered) if pairs else str(found[0][1])
                kind.cost = _cost([p for p in pairs if all(map(gathered.ran_alone, p))])
            kinds.append(kind)
    return sorted(kinds, key=_order)


def _order(kind: Kind) -> Tuple:
    row, known = kind.rows[0], isinstance(kind.against, Difference)
    role = {"teacher": 0, "plain": 1, "student": 2}.get(row["role"], 3)
    gain = kind.against.rates["wer"].value if known else 0.0
    return row["testset"] or "", role, not known, gain, row["params"] or 0, kind.label


def _mean(rows: Sequence[Row], gathered: Gathered, unit: str) -> Rate:
    """Mean over the seeds; its interval needs the counts of the same utterances from each."""
    mean = sum(r[unit] for r in rows) / len(rows)
    if len(rows) == 1:
        return Rate(mean, rows[0][f"{unit}_low"], rows[0][f"{unit}_high"])
    tables = [count_table(gathered, r, unit) for r in rows]
    if None in tables or any(t.keys() != tables[0].keys() for t in tables):
        return Rate(mean)
    errors, lengths = sum(_column(t, 0) for t in tables), sum(_column(t, 1) for t in tables)
    return Rate(mean, *bootstrap_interval(errors, lengths))


def _cost(pairs: Sequence[Tuple[Row, Row]]) -> Optional[float]:
    times = [(row["train_seconds"], plain["train_seconds"]) for row, plain in pairs]
    times = [(ours, theirs) for ours, theirs in times if ours and theirs]
    return sum(t[0] for t in times) / sum(t[1] for t in times) if times else None


def _against(pairs: Sequence[Tuple[Row, Row]], gathered: Gathered) -> Union[Difference, str]:
    rates = {}
    for unit in UNITS:
        a, b, lengths = 0, 0, 0
        ids = None
        for pair in pairs:
            ours, theirs = (count_table(gathered, row, unit) for row in pair)
            if ours is None or theirs is None:
                return "no per_utt.tsv: score again"
            ids = ours.keys() if ids is None else ids
            if not ours.keys() == theirs.keys() == ids:
                return "scored on other utterances"
            a, b, lengths = a + _column(ours, 0), b + _column(theirs, 0), lengths + _column(ours, 1)
        if not np.sum(lengths):
            return "the references are empty"
        rates[unit] = Rate(*paired_bootstrap(a, b, lengths))
    other_epochs = any(row["epochs"] != plain["epochs"] for row, plain in pairs)
    return Difference([row["seed"] for row, _ in pairs], rates, other_epochs)


def count_table(gathered: Gathered, row: Row, unit: str) -> Optional[Dict[str, Tuple[int, int]]]:
    """{utterance: (errors, reference length)}, None where the file is missing or damaged."""
    path = gathered.decoding(row) / "per_utt.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as f:
            return {
                r["utt_id"]: (
                    sum(int(r[f"{unit}_{k}"]) for k in ("sub", "del", "ins")),
                    sum(int(r[f"{unit}_{k}"]) for k in ("corr", "sub", "del")),
                )
                for r in csv.DictReader(f, delimiter="\t")
            }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _column(table: Dict[str, Tuple[int, int]], index: int) -> np.ndarray:
    """(U,) errors (0) or lengths (1), by utterance id."""
    return np.array([table[u][index] for u in sorted(table)])
