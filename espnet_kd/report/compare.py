"""Each kind of student against the plain one, over the seeds that both have."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from espnet_kd.decode.score import paired_bootstrap


def compare_with_plain(rows: Sequence[Dict[str, Any]], expdir: Path, describe: Any) -> List[List[str]]:
    """Table lines: kind, test set, difference of each seed, mean difference with its 95 % interval and p (WER, CER).

    The interval is a paired bootstrap over utterances; the errors of an utterance are summed over the seeds first, so
    that it stays one observation. It says nothing of other seeds: hence each seed's difference beside it.
    """
    plain = {(r["testset"], r["seed"]): r for r in rows if r["role"] == "plain"}
    groups: Dict[Tuple[str, str], List[Tuple[Dict, Dict]]] = {}
    for row in rows:
        other = plain.get((row["testset"], row["seed"]))
        if row["role"] == "student" and other is not None:
            groups.setdefault((describe(row), row["testset"]), []).append((row, other))
    lines = []
    for (kind, testset), pairs in groups.items():
        cells = []
        for unit in ("wer", "cer"):
            errors: List[np.ndarray] = []
            lengths: List[np.ndarray] = []
            for row, other in pairs:
                files = [expdir / r["experiment"] / f"decode_{testset}" / "per_utt.tsv" for r in (row, other)]
                tables = [_counts(f, unit) for f in files]
                if None in tables or tables[0].keys() != tables[1].keys():
                    break
                ids = sorted(tables[0])
                errors.append(np.array([[t[u][0] for u in ids] for t in tables]))
                lengths.append(np.array([tables[0][u][1] for u in ids]))
            else:
                each = [100.0 * (e[0] - e[1]).sum() / n.sum() for e, n in zip(errors, lengths)]
                a, b = sum(errors)
                mean, low, high, p = paired_bootstrap(a, b, sum(lengths))
                cells += [" ".join(f"{d:+.2f}" for d in each), f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", f"{p:.3f}"]
        if len(cells) == 6:
            lines.append([kind, testset or "–", *cells])
    return lines


def _counts(path: Path, unit: str) -> Any:
    """{utterance: (errors, reference length)}, None where the file is missing."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as f:
        return {
            r["utt_id"]: (
                sum(int(r[f"{unit}_{k}"]) for k in ("sub", "del", "ins")),
                sum(int(r[f"{unit}_{k}"]) for k in ("corr", "sub", "del")),
            )
            for r in csv.DictReader(f, delimiter="\t")
        }
