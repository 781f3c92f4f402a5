"""Character and word error rates with bootstrap intervals over utterances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple, Union

import jiwer
import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_map
from espnet_kd.decode.bootstrap import RESAMPLES, bootstrap_interval

#: Columns of `Counts.table`.
COUNTS = ("corr", "sub", "del", "ins")


@dataclass
class Counts:
    """Alignment counts of every utterance: ``table`` (U, 4) int64 with the columns `COUNTS`."""

    utt_ids: List[str]
    table: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """(U,) substitutions + deletions + insertions."""
        return self.table[:, 1:].sum(axis=1)

    @property
    def lengths(self) -> np.ndarray:
        """(U,) units of the reference: correct + substitutions + deletions."""
        return self.table[:, :3].sum(axis=1)


def pair_texts(hyp: Union[str, Path], ref: Union[str, Path]) -> Dict[str, Tuple[str, str]]:
    """Read two Kaldi text files into {utterance id: (hypothesis, reference)}, in the reference's order.

    Several blanks in a row count as one. Texts may be empty.

    Raises:
        UserError: utterances of one file are missing in the other (names them), or no utterance at all.
    """
    hyps, refs = read_map(hyp), read_map(ref)
    missing, extra = refs.keys() - hyps.keys(), hyps.keys() - refs.keys()
    if missing:
        raise UserError(f"{hyp} lacks utterances of {ref}: {name_some(missing)}; decode the same data dir again")
    if extra:
        raise UserError(f"{hyp} has utterances that {ref} lacks: {name_some(extra)}; is it another test set?")
    if not refs:
        raise UserError(f"{ref} holds no utterance")
    return {u: (" ".join(hyps[u].split()), " ".join(refs[u].split())) for u in refs}


def count_errors(pairs: Dict[str, Tuple[str, str]], unit: str) -> Counts:
    """Align {utterance id: (hypothesis, reference)} by ``unit``: ``word``, or ``char`` (blanks count as characters).

    An utterance with an empty reference has only insertions.
    """
    process: Callable[[str, str], Any] = {"word": jiwer.process_words, "char": jiwer.process_characters}[unit]
    table = np.zeros((len(pairs), len(COUNTS)), dtype=np.int64)
    for row, (hyp, ref) in zip(table, pairs.values()):
        if not ref:  # jiwer's versions differ for empty references
            row[3] = len(hyp.split() if unit == "word" else hyp)
            continue
        out = process(ref, hyp)
        row[:] = out.hits, out.substitutions, out.deletions, out.insertions
    return Counts(list(pairs), table)


def summarise(counts: Counts, *, resamples: int = RESAMPLES, seed: int = 0) -> Dict:
    """Rates in percent of the reference's units, with the 95 % interval of ``err``.

    Returns:
        {err, corr, sub, del, ins, n, low, high, s_err}: ``n`` units in the references, ``s_err`` the percentage of
        utterances with any error. Rates are None if all references are empty.
    """
    total, n = counts.table.sum(axis=0), int(counts.lengths.sum())
    low, high = bootstrap_interval(counts.errors, counts.lengths, resamples=resamples, seed=seed)
    percent = {k: 100.0 * int(v) / n if n else None for k, v in zip(COUNTS, total)}
    return {
        "err": 100.0 * int(counts.errors.sum()) / n if n else None,
        **percent,
        "n": n,
        "low": low if n else None,
        "high": high if n else None,
        "s_err": 100.0 * float((counts.errors > 0).mean()),
    }


def format_table(dataset: str, utterances: int, rows: Sequence[Tuple[str, Dict]]) -> str:
    """Readable tables in ESPnet's layout, one for each (title, summary) of ``rows``."""
    lines = []
    for title, s in rows:
        rates = [s["corr"], s["sub"], s["del"], s["ins"], s["err"], s["s_err"]]
        cells = [dataset, str(utterances), str(s["n"]), *("–" if r is None else f"{r:.1f}" for r in rates)]
        interval = ""
        if s["err"] is not None:
            interval = f"\n\nErr {s['err']:.2f} %, 95 % interval {s['low']:.2f} to {s['high']:.2f}"
        lines += [f"### {title}", "", "|dataset|Snt|Wrd|Corr|Sub|Del|Ins|Err|S.Err|", "|---" * 9 + "|"]
        lines += [f"|{'|'.join(cells)}|{interval}", ""]
    return "\n".join(lines)


def name_some(ids: Iterable[str], limit: int = 5) -> str:
    """List a few ids for a message: ``a, b, … (12 in all)``."""
    ids = sorted(ids)
    return ", ".join(ids) if len(ids) <= limit else f"{', '.join(ids[:limit])}, … ({len(ids)} in all)"
