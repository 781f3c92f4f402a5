"""Character and word error rates with bootstrap intervals over utterances."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple, Union

import jiwer
import numpy as np

from espnet_kd.cli import UserError
from espnet_kd.data.datadir import read_map

#: Columns of `Counts.table`.
COUNTS = ("corr", "sub", "del", "ins")
RESAMPLES = 2000


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
        if not ref:  # jiwer versions differ on these
            row[3] = len(hyp.split() if unit == "word" else hyp)
            continue
        out = process(ref, hyp)
        row[:] = out.hits, out.substitutions, out.deletions, out.insertions
    return Counts(list(pairs), table)


def bootstrap_interval(
    errors: np.ndarray, lengths: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Tuple[float, float]:
    """Percentile interval, in percent, of an error rate when utterances are drawn again with replacement.

    Args:
        errors: (U,) errors of every utterance.
        lengths: (U,) units of its reference.

    Returns:
        (low, high); NaN where the references hold nothing.
    """
    sums = resample_sums(np.stack([errors, lengths], axis=1), resamples, seed)
    sums = sums[sums[:, 1] > 0]  # only empty references were drawn
    if not len(sums):
        return float("nan"), float("nan")
    low, high = np.quantile(100.0 * sums[:, 0] / sums[:, 1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    errors_a: np.ndarray, errors_b: np.ndarray, words: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Tuple[float, float, float, float]:
    """Compare two systems on the same utterances.

    Args:
        errors_a: (U,) errors of system a in every utterance; negative differences mean that a is better.
        errors_b: (U,) errors of system b.
        words: (U,) reference words (or characters).

    Returns:
        (difference of the error rates a − b in percentage points, its 95 % interval low, high, two-sided p).
        p is 2 · min(P(≤ 0), P(≥ 0)) over the resamples, never below 2 / (resamples + 1).

    Raises:
        ValueError: arrays of different shapes, or no reference word.
    """
    errors_a, errors_b, words = map(np.asarray, (errors_a, errors_b, words))
    if not errors_a.shape == errors_b.shape == words.shape or words.ndim != 1:
        raise ValueError(f"want three arrays (U,), got {errors_a.shape}, {errors_b.shape}, {words.shape}")
    if words.sum() <= 0:
        raise ValueError("the references hold nothing")
    sums = resample_sums(np.stack([errors_a - errors_b, words], axis=1), resamples, seed)
    sums = sums[sums[:, 1] > 0]
    draws = 100.0 * sums[:, 0] / sums[:, 1]
    low, high = np.quantile(draws, [0.025, 0.975])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2.0 * (tail + 1) / (len(draws) + 1))
    return 100.0 * float((errors_a - errors_b).sum() / words.sum()), float(low), float(high), float(p)


def summarise(counts: Counts, *, resamples: int = RESAMPLES, seed: int = 0) -> Dict:
    """Rates in percent of the reference's units, with the 95 % interval of ``err``.

    Returns:
        {err, corr, sub, del, ins, n, low, high, s_err}: ``n`` units in the references, ``s_err`` the percentage of
        utterances with any error. Rates are None where the references hold nothing.
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
    """Readable table in ESPnet's layout, one for each (title, summary) of ``rows``."""
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


def resample_sums(rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums (resamples, C) of the rows of (U, C), drawn U at a time with replacement."""
    rng = np.random.default_rng(seed)
    u = len(rows)
    step = max(1, 20_000_000 // u)  # bounds the memory of the drawn counts to 160 MB
    chunks = []
    for start in range(0, resamples, step):
        times_drawn = rng.multinomial(u, np.full(u, 1.0 / u), size=min(step, resamples - start))
        chunks.append(times_drawn.astype(np.float64) @ rows)  # float64 is exact here, and has a fast product
    return np.concatenate(chunks)


def name_some(ids: Iterable[str], limit: int = 5) -> str:
    """List a few ids for a message: ``a, b, … (12 in all)``."""
    ids = sorted(ids)
    return ", ".join(ids) if len(ids) <= limit else f"{', '.join(ids[:limit])}, … ({len(ids)} in all)"
