"""Uncertainty of error rates: bootstrap intervals over utterances, and over seeds and utterances together.

``scipy.stats.bootstrap`` draws along one axis only. Here seeds and utterances are crossed, S − 1 of S seeds are drawn,
and draws without any reference are left out. For a single seed both give the same intervals, which a test checks.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np

RESAMPLES = 2000


def bootstrap_seeds(
    errors: np.ndarray, lengths: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Tuple[float, float, float, float]:
    """Error rate in percent, its interval and p, when seeds and utterances are drawn again with replacement.

    Seeds and utterances are crossed: every seed decodes the same utterances, so that a draw takes the same utterances
    of each seed drawn (McCarthy 1969; Owen 2007). S − 1 of S seeds are drawn (Rao and Wu 1988): drawing S would make
    the variance of a mean of S seeds too small, by half with two seeds. With a single seed this is the usual bootstrap
    over utterances.

    Args:
        errors: (S, U) errors of each seed in every utterance, or differences of errors, paired by seed and utterance.
        lengths: (U,) units of the references.

    Returns:
        (100 · errors / units over all seeds, its interval low, high, two-sided p against 0). p is
        2 · min(P(≤ 0), P(≥ 0)) over the draws, never below 2 / (resamples + 1). NaN if all references are empty.

    Raises:
        ValueError: arrays of other shapes.
    """
    errors, lengths = np.asarray(errors), np.asarray(lengths)
    if errors.ndim != 2 or lengths.shape != errors.shape[1:] or not errors.size:
        raise ValueError(f"want errors (S, U) and lengths (U,), got {errors.shape} and {lengths.shape}")
    if not lengths.sum():
        return (float("nan"),) * 4
    num_seeds = len(errors)
    sums = resample_sums(np.concatenate([errors, lengths[None]]).T, resamples, seed)  # (R, S + 1)
    rng = np.random.default_rng([seed, num_seeds])
    drawn = max(1, num_seeds - 1)
    times = rng.multinomial(drawn, np.full(num_seeds, 1.0 / num_seeds), size=len(sums))  # (R, S)
    known = sums[:, -1] > 0  # False for draws with empty references only
    draws = 100.0 * (times * sums[:, :-1]).sum(axis=1)[known] / (drawn * sums[known, -1])
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2.0 * (tail + 1) / (len(draws) + 1))
    return 100.0 * float(errors.sum() / (num_seeds * lengths.sum())), float(low), float(high), float(p)


def bootstrap_interval(
    errors: np.ndarray, lengths: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Tuple[float, float]:
    """95 % interval (low, high), in percent, of an error rate over utterances; NaN if all references are empty.

    Args:
        errors, lengths: (U,) errors of every utterance, and units of its reference.
    """
    _, low, high, _ = bootstrap_seeds(np.asarray(errors)[None], lengths, resamples=resamples, seed=seed)
    return low, high


def paired_bootstrap(
    errors_a: np.ndarray, errors_b: np.ndarray, words: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Tuple[float, float, float, float]:
    """Compare two systems on the same utterances.

    Args:
        errors_a, errors_b: (U,) errors of systems a and b in every utterance.
        words: (U,) reference words (or characters).

    Returns:
        (difference of the error rates a − b in percentage points, negative where a is better; its 95 % interval low,
        high; two-sided p), as from :func:`bootstrap_seeds`.

    Raises:
        ValueError: arrays of different shapes, or no reference word.
    """
    errors_a, errors_b, words = map(np.asarray, (errors_a, errors_b, words))
    if not errors_a.shape == errors_b.shape == words.shape or words.ndim != 1:
        raise ValueError(f"want three arrays (U,), got {errors_a.shape}, {errors_b.shape}, {words.shape}")
    if words.sum() <= 0:
        raise ValueError("the references hold nothing")
    return bootstrap_seeds((errors_a - errors_b)[None], words, resamples=resamples, seed=seed)


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
