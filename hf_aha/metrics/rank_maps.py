"""Maps as ranks: forms of a score map that no increasing transform of the scores changes."""

from __future__ import annotations

import torch

from .calls import real_scores


def average_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank from 0 for the least important element; equal scores share the mean of their ranks.

    Unlike `hf_aha.ranking.hard_ranks`, which must cut ties to remove an exact number of pixels, this gives a constant
    map a constant rank.

    Args:
        scores: (B, n), finite.

    Returns:
        (B, n) float64, exact, 0 .. n - 1; equal to `scipy.stats.rankdata` minus 1.

    Example:
        >>> average_ranks(torch.tensor([[0.2, 0.9, 0.2]])).tolist()
        [[0.5, 2.0, 0.5]]
    """
    scores = real_scores(scores.detach()).contiguous()
    ordered = scores.sort(dim=1).values
    below = torch.searchsorted(ordered, scores)
    not_above = torch.searchsorted(ordered, scores, right=True)
    return (below + not_above - 1).double() / 2


def rank_map(scores: torch.Tensor) -> torch.Tensor:
    """Share of the other pixels that each pixel outranks, ties counted half: (B, H, W) -> float32 (B, H, W) in [0, 1].

    A constant map becomes 0.5 everywhere.

    Example:
        >>> rank_map(torch.tensor([[[3.0, 100.0, -1.0]]])).tolist()
        [[[0.5, 1.0, 0.0]]]
    """
    flat = scores.flatten(1)
    return (average_ranks(flat) / max(flat.shape[1] - 1, 1)).float().view(scores.shape)


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation of two maps of each image, ties at their mean rank.

    Args:
        first, second: (B, ...) scores of one shape, finite.

    Returns:
        (B,) float32 in [-1, 1]; NaN where a map is constant, which has no order to compare. Equal to
        `scipy.stats.spearmanr`.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 10.0, 11.0]])).tolist()
        [1.0]
    """
    if first.shape != second.shape:
        raise ValueError(f"Maps of shapes {tuple(first.shape)} and {tuple(second.shape)} cannot be correlated.")
    a, b = (average_ranks(scores.flatten(1)) for scores in (first, second))
    a, b = (ranks - ranks.mean(1, keepdim=True) for ranks in (a, b))
    # 0 / 0, a map without an order, is NaN.
    return ((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).float().clamp(-1, 1)


def top_membership(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Chance of each element to be among the most important ones when equal scores are put in random order.

    Args:
        scores: (B, n), finite.
        counts: (B,) integers in 0 .. n, how many elements count as most important.

    Returns:
        (B, n) float64 in [0, 1]; each row sums to its count.

    Example:
        >>> top_membership(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), torch.tensor([2])).tolist()
        [[1.0, 0.5, 0.5, 0.0]]
    """
    scores = real_scores(scores.detach())
    counts = counts.to(scores.device)[:, None]
    last = scores.sort(dim=1, descending=True).values.gather(1, (counts - 1).clamp(min=0))
    above, tied = scores > last, scores == last
    taken = (counts - above.sum(1, keepdim=True)).double() / tied.sum(1, keepdim=True)
    return above.double() + tied * taken


def top_share(scores: torch.Tensor, region: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Share of each map's most important pixels that lie in a region, as a mean over all orders of equal scores.

    A constant map gets exactly the share that the region has of the image, which is chance.

    Args:
        scores: (B, n), finite.
        region: (B, n) bool.
        counts: (B,) integers in 0 .. n, how many pixels count as most important.

    Returns:
        (B,) float32 in [0, 1]; NaN where the count is 0.

    Example:
        >>> region = torch.tensor([[True, False, False, False]])
        >>> top_share(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), region, torch.tensor([1])).tolist()
        [0.5]
    """
    # 0 / 0, the share of nothing, is NaN.
    return ((top_membership(scores, counts) * region).sum(1) / counts.to(scores.device)).float()


def constant_rows(scores: torch.Tensor) -> torch.Tensor:
    """(B,) bool, true where all scores of an image (B, ...) are equal."""
    low, high = scores.flatten(1).aminmax(dim=1)
    return low == high
