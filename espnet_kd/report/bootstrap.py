"""Bootstrap intervals of a mean over seeds, with resampled seeds and utterances."""

from __future__ import annotations

from typing import Tuple

import numpy as np

from espnet_kd.decode.score import RESAMPLES, resample_sums


def bootstrap_seeds(
    errors: np.ndarray, lengths: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Tuple[float, float, float, float]:
    """Error rate in percent, its interval and p, when seeds and utterances are drawn again with replacement.

    Seeds and utterances are crossed: every seed decodes the same utterances, so that a draw takes the same utterances
    of each seed drawn (McCarthy 1969; Owen 2007). Of S seeds S − 1 are drawn (Rao and Wu 1988): S of them would make
    the variance of a mean of S seeds too small, with two seeds by half. With a single seed this is the
    usual bootstrap over utterances.

    Args:
        errors: (S, U) errors of each seed in every utterance, or differences of errors, paired by seed and utterance.
        lengths: (U,) units of the references.

    Returns:
        (100 · errors / units over all seeds, its interval low, high, two-sided p against 0). p is
        2 · min(P(≤ 0), P(≥ 0)) over the draws, never below 2 / (resamples + 1). NaN where the references hold nothing.

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
    known = sums[:, -1] > 0  # else nothing but empty references was drawn
    draws = 100.0 * (times * sums[:, :-1]).sum(axis=1)[known] / (drawn * sums[known, -1])
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2.0 * (tail + 1) / (len(draws) + 1))
    return 100.0 * float(errors.sum() / (num_seeds * lengths.sum())), float(low), float(high), float(p)
