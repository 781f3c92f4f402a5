"""Intervals over seeds and utterances."""

import numpy as np
import pytest

from espnet_kd.decode.score import paired_bootstrap
from espnet_kd.report.bootstrap import bootstrap_seeds

LENGTHS = np.full(40, 10)


def test_a_single_seed_is_the_bootstrap_over_utterances():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40), rng.integers(0, 5, 40)
    assert bootstrap_seeds((a - b)[None], LENGTHS) == pytest.approx(paired_bootstrap(a, b, LENGTHS))


def test_the_spread_of_seeds_counts():
    """Two seeds whose utterances are all alike: an interval over utterances would have no width."""
    value, low, high, p = bootstrap_seeds(np.repeat([[0], [2]], 40, axis=1), LENGTHS)
    assert (value, low, high) == (10.0, 0.0, 20.0) and p == pytest.approx(1.0, abs=0.1)


def test_the_spread_of_utterances_counts_as_often_as_there_are_utterances():
    """Two seeds with equal counts are no more evidence than one, as they err on the same utterances."""
    errors = np.random.default_rng(0).integers(0, 5, 40)
    one, two = bootstrap_seeds(errors[None], LENGTHS), bootstrap_seeds(np.stack([errors, errors]), LENGTHS)
    assert two == pytest.approx(one)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_variance_of_a_mean_over_few_seeds_is_not_too_small(num_seeds):
    rng = np.random.default_rng(0)
    seeds = rng.normal(0.0, 1.0, num_seeds)
    _, low, high, _ = bootstrap_seeds(np.repeat(seeds[:, None], 40, axis=1), LENGTHS, resamples=20000, level=0.68)
    error = 10 * seeds.std(ddof=1) / np.sqrt(num_seeds)  # of the mean; an error in ten units is 10 %
    assert 1.5 * error < high - low < 3.2 * error


@pytest.mark.parametrize("spread, least", [(0.0, 0.93), (0.1, 0.93), (0.3, 0.8)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(spread, least):
    rng, held, tries, truth = np.random.default_rng(0), 0, 200, -0.2
    for _ in range(tries):
        errors = truth + rng.normal(0, 0.5, 60) + rng.normal(0, spread, (3, 1)) + rng.normal(0, 1, (3, 60))
        _, low, high, _ = bootstrap_seeds(errors, np.full(60, 10), resamples=400)
        held += low <= 10 * truth <= high
    assert held / tries >= least


def test_other_shapes_and_empty_references():
    with pytest.raises(ValueError, match=r"\(S, U\)"):
        bootstrap_seeds(np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match=r"\(S, U\)"):
        bootstrap_seeds(np.zeros((2, 3)), np.ones(4))
    assert np.isnan(bootstrap_seeds(np.zeros((2, 3)), np.zeros(3))).all()
