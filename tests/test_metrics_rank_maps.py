"""Rank forms against scipy, and their rules for ties and constant maps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from hf_aha.metrics import average_ranks, rank_correlation, rank_map, top_share
from hf_aha.metrics.rank_maps import top_membership


def test_average_ranks_equal_scipy():
    scores = torch.randint(0, 9, (4, 50)).float()
    scores[0] = torch.randn(50)
    scores[1] = 2.0
    expected = np.stack([rankdata(row) - 1 for row in scores.numpy()])
    assert np.array_equal(average_ranks(scores).numpy(), expected)


def test_integer_scores_keep_their_order_beyond_float32():
    scores = torch.tensor([[2**40, 2**40 + 1, 2**40 + 2]])
    assert average_ranks(scores).tolist() == [[0.0, 1.0, 2.0]]


def test_rank_map_is_unchanged_by_increasing_transforms():
    scores = torch.randn(2, 6, 7)
    ranks = rank_map(scores)
    assert ranks.shape == scores.shape and ranks.min() == 0 and ranks.max() == 1
    assert torch.equal(ranks, rank_map(scores.double().exp() * 1e6))
    assert torch.equal(rank_map(torch.ones(1, 3, 3)), torch.full((1, 3, 3), 0.5))


def test_rank_correlation_equals_scipy():
    first = torch.randint(0, 6, (5, 8, 9)).float()
    second = torch.randn(5, 8, 9)
    second[4] = -first[4]
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second, strict=True)]
    assert rank_correlation(first, second).tolist() == pytest.approx(expected, abs=1e-6)
    assert rank_correlation(first, second)[4].item() == -1


def test_rank_correlation_of_a_constant_map_is_undefined():
    assert torch.isnan(rank_correlation(torch.ones(1, 9), torch.randn(1, 9))).all()


def test_rank_correlation_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"shapes \(1, 4\) and \(1, 5\)"):
        rank_correlation(torch.ones(1, 4), torch.ones(1, 5))


def test_top_share_is_the_mean_over_all_orders_of_ties():
    scores, region = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]), torch.tensor([False, True, False, True, True])
    for count in range(1, 6):
        shares = []
        for order in itertools.permutations(range(5)):
            ranked = sorted(order, key=lambda place: -scores[place])[:count]
            shares.append(np.mean([bool(region[place]) for place in ranked]))
        found = top_share(scores[None], region[None], torch.tensor([count]))
        assert found.item() == pytest.approx(np.mean(shares), abs=1e-6)
        assert top_membership(scores[None], torch.tensor([count])).sum().item() == pytest.approx(count)
    assert torch.isnan(top_share(scores[None], region[None], torch.tensor([0]))).all()
