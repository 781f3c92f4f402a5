"""Greedy CTC search, compared with answers made by hand."""

import math

import pytest
import torch

from espnet_kd.inference.greedy import ctc_collapse, ctc_greedy


@pytest.mark.parametrize(
    "frames, expected",
    [
        ([], []),
        ([0, 0, 0], []),
        ([3], [3]),
        ([3, 3, 3], [3]),
        ([3, 0, 3], [3, 3]),
        ([0, 1, 1, 0, 0, 2, 1, 1, 0], [1, 2, 1]),
    ],
)
def test_collapse(frames, expected):
    assert ctc_collapse(torch.tensor(frames, dtype=torch.long)) == expected


def test_collapse_with_another_blank():
    assert ctc_collapse(torch.tensor([0, 0, 4, 0, 1, 4, 4]), blank_id=4) == [0, 0, 1]


def test_collapse_refuses_a_batch():
    with pytest.raises(ValueError, match="must be"):
        ctc_collapse(torch.zeros(2, 3, dtype=torch.long))


def test_greedy_ignores_padding_and_scores_the_path():
    probabilities = torch.full((2, 4, 3), 0.1)
    for i, path in enumerate([[1, 1, 0, 2], [2, 1, 1, 1]]):
        for t, token in enumerate(path):
            probabilities[i, t, token] = 0.8
    (a, score_a), (b, score_b), *rest = ctc_greedy(7 + probabilities.log(), torch.tensor([4, 1]))
    assert (a, b, rest) == ([1, 2], [2], [])
    assert score_a == pytest.approx(4 * math.log(0.8), abs=1e-5)
    assert score_b == pytest.approx(math.log(0.8), abs=1e-5)


def test_greedy_drops_labels_after_collapsing():
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 3, 1, 2]]), 4).float()
    assert ctc_greedy(logits, torch.tensor([4]), drop=[3])[0][0] == [1, 1, 2]


def test_greedy_of_nothing():
    assert ctc_greedy(torch.zeros(1, 0, 5), torch.tensor([0])) == [([], 0.0)]
    assert ctc_greedy(torch.randn(1, 3, 5), torch.tensor([0])) == [([], 0.0)]
