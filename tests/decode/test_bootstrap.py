"""Bootstrap intervals over utterances, and over seeds and utterances."""

import numpy as np
import pytest
import scipy.stats

from espnet_kd.decode.bootstrap import bootstrap_interval, bootstrap_seeds, paired_bootstrap

LENGTHS = np.full(40, 10)


def test_a_single_seed_is_the_bootstrap_over_utterances():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40), rng.integers(0, 5, 40)
    assert bootstrap_seeds((a - b)[None], LENGTHS) == pytest.approx(paired_bootstrap(a, b, LENGTHS))


def test_the_spread_of_seeds_counts():
    """Within each seed all utterances are alike, so that an interval over utterances alone would have no width."""
    value, low, high, p = bootstrap_seeds(np.repeat([[0], [2]], 40, axis=1), LENGTHS)
    assert (value, low, high) == (10.0, 0.0, 20.0) and p == pytest.approx(1.0, abs=0.1)


def test_the_spread_of_utterances_counts_as_often_as_there_are_utterances():
    """Two seeds with equal counts are no more evidence than one, because they err on the same utterances."""
    errors = np.random.default_rng(0).integers(0, 5, 40)
    one, two = bootstrap_seeds(errors[None], LENGTHS), bootstrap_seeds(np.stack([errors, errors]), LENGTHS)
    assert two == pytest.approx(one)


def test_the_intervals_over_utterances_are_those_of_scipy():
    rng = np.random.default_rng(3)
    words, a = rng.integers(5, 30, 200), rng.integers(0, 5, 200)
    b = np.maximum(a - (rng.random(200) < 0.2), 0)

    def rate(errors, words, axis):
        return 100 * errors.sum(axis) / words.sum(axis)

    for errors, ours in ((a, bootstrap_interval(a, words)), (a - b, paired_bootstrap(a, b, words)[1:3])):
        draw = {"paired": True, "vectorized": True, "method": "percentile", "n_resamples": 20000, "batch": 1000}
        theirs = scipy.stats.bootstrap((errors, words), rate, random_state=0, **draw).confidence_interval
        assert ours == pytest.approx(tuple(theirs), abs=0.06 * (theirs.high - theirs.low))


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_the_variance_of_a_mean_over_few_seeds_is_not_too_small(num_seeds):
    rng = np.random.default_rng(0)
    seeds = rng.normal(0.0, 1.0, num_seeds)
    _, low, high, _ = bootstrap_seeds(np.repeat(seeds[:, None], 40, axis=1), LENGTHS, resamples=20000, level=0.68)
    error = 10 * seeds.std(ddof=1) / np.sqrt(num_seeds)  # standard error of the mean; 1 error in 10 words is 10 %
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


def test_interval_agrees_with_the_binomial_one():
    rng = np.random.default_rng(1)
    errors = (rng.random(1000) < 0.2).astype(int)
    low, high = bootstrap_interval(errors, np.ones(1000, int))
    half = 196 * np.sqrt(errors.mean() * (1 - errors.mean()) / 1000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    assert (low + high) / 2 == pytest.approx(100 * errors.mean(), abs=0.3)
    assert (low, high) == bootstrap_interval(errors, np.ones(1000, int))  # the seed is fixed
    assert (low, high) != bootstrap_interval(errors, np.ones(1000, int), seed=1)


def test_paired_bootstrap_sees_a_steady_gain_that_single_intervals_hide():
    rng = np.random.default_rng(2)
    words = rng.integers(5, 30, 300)
    b = rng.binomial(words, rng.beta(1, 3, 300))
    a = np.maximum(b - (rng.random(300) < 0.3), 0)
    difference, low, high, p = paired_bootstrap(a, b, words)
    assert difference == pytest.approx(100 * (a.sum() - b.sum()) / words.sum())
    assert low < difference < high < 0
    assert p < 0.01
    assert bootstrap_interval(a, words)[1] > bootstrap_interval(b, words)[0]


def test_paired_bootstrap_of_equal_systems():
    words = np.full(50, 10)
    same = np.arange(50) % 4
    assert paired_bootstrap(same, same, words) == (0.0, 0.0, 0.0, 1.0)
    shuffled = np.random.default_rng(0).permutation(same)
    _, low, high, p = paired_bootstrap(same, shuffled, words)
    assert low < 0 < high and p > 0.1
    with pytest.raises(ValueError, match="arrays"):
        paired_bootstrap(same, same[:3], words)
