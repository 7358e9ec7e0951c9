"""Legibility: can a person read the map? Roughness of the rank map, and whether its edges are those of the image.

Neither says anything about faithfulness; they tell apart maps that are equally faithful.
"""

from __future__ import annotations

import torch

from ..perturbation import Normalization, gaussian_blur
from .calls import check_scores, finite_rows, only_where, real_scores
from .rank_maps import constant_rows, rank_map, top_membership


EDGE_SHARE = 0.2
"""Share of an image's pixels that count as its edges."""

_EDGE_BLUR = 0.01  # of the shorter side: 2 pixels at 224, how far an edge of the map may miss that of the image
_LUMINANCE = (0.299, 0.587, 0.114)  # Rec. 601


def total_variation(scores: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the ranks of direct neighbours, divided by its expectation over random orders.

    Low is smooth, and better among equally faithful maps.

    Args:
        scores: (B, H, W), at least two pixels.

    Returns:
        (B,) float32, 0..1.5: 1 is expected of pixel noise, 1.5 is a chessboard of the upper and the lower half; NaN
        where the map is constant (it would be the smoothest of all and says nothing) or not finite.

    Raises:
        ValueError: the maps are not (B, H, W), or have one pixel only.

    Example:
        >>> round(total_variation(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])).item(), 6)
        0.9

    Reference: total variation as a measure of smoothness, https://arxiv.org/abs/1412.0035; ranks and scale are ours.
    """
    ranks, usable = _ranks(scores)
    pixels = ranks[0].numel()
    across, down = ranks.diff(dim=2).abs(), ranks.diff(dim=1).abs()
    neighbours = across[0].numel() + down[0].numel()
    mean = (across.double().sum((1, 2)) + down.double().sum((1, 2))) / neighbours
    # Two different ranks of 0..n-1 lie (n + 1) / 3 apart on average; the rank map divides by n - 1.
    expected = (pixels + 1) / 3 / (pixels - 1)
    return only_where(usable, mean / expected)


def edge_alignment(
    pixel_values: torch.Tensor,
    scores: torch.Tensor,
    normalization: Normalization,
    *,
    edge_share: float = EDGE_SHARE,
) -> torch.Tensor:
    """Share of the rank map's variation that lies on the strongest edges of the image.

    Edges are gradient magnitudes of the luminance, blurred by 1% of the side so that a line of the map may miss them
    by a pixel or two. Among equally strong ones the mean over all orders counts, so that a flat image gives chance.

    Args:
        pixel_values: (B, 3, H, W) normalised images.
        scores: (B, H, W), at least two pixels.
        normalization: the image processor's.
        edge_share: share of the pixels that count as edges, within 0..1; it is also the value expected by chance.

    Returns:
        (B,) float32, 0..1; NaN where the map is constant or not finite, or the pixels are not finite.

    Raises:
        ValueError: the shapes do not fit, or the share is out of range.
    """
    check_scores(scores, pixel_values)
    if not 0 < edge_share < 1:
        raise ValueError(f"edge_share is {edge_share}, but must lie within 0..1.")
    ranks, usable = _ranks(scores)
    finite = finite_rows(pixel_values).to(usable.device)
    pixels = torch.where(finite[:, None, None, None], pixel_values.to(ranks.device).float(), 0.0)
    weights = torch.tensor(_LUMINANCE, device=ranks.device)[:, None, None]
    luminance = (normalization.denormalize(pixels) * weights).sum(1)
    edges = gaussian_blur(_gradient(luminance)[:, None], _EDGE_BLUR * min(scores.shape[-2:]))[:, 0].flatten(1)
    variation = _gradient(ranks).double().flatten(1)
    counts = torch.full((len(edges),), max(1, round(edge_share * edges.shape[1])))
    on_edges = (variation * top_membership(edges, counts)).sum(1)
    return only_where(usable & finite, on_edges / variation.sum(1))


def _ranks(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank maps (B, H, W), and which of them can be read (B,)."""
    if scores.ndim != 3 or scores[0].numel() < 2:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, but must be (batch, height, width) of 2 pixels or more."
        )
    scores = real_scores(scores.detach())
    finite = finite_rows(scores)
    scores = torch.where(finite[:, None, None], scores, 0.0)
    return rank_map(scores), finite & ~constant_rows(scores)


def _gradient(values: torch.Tensor) -> torch.Tensor:
    """Magnitude of the forward differences, the last row and column repeated: (B, H, W) -> (B, H, W)."""
    across = values.diff(dim=2, append=values[:, :, -1:])
    down = values.diff(dim=1, append=values[:, -1:])
    return (across.square() + down.square()).sqrt()
