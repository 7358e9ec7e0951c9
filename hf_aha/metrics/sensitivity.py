"""Max sensitivity: how far a map moves when the image changes less than an eye can see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..perturbation import Normalization
from ..ranking import standardize
from .calls import Explain, check_images, check_scores, explain_in_batches, finite_rows, only_where, real_scores
from .rank_maps import average_ranks, constant_rows


RADIUS = 0.02
"""Largest change of a channel, in RGB of [0, 1]: 5 of 255 grey levels."""


@dataclass(frozen=True)
class MaxSensitivity:
    """Largest relative change of each map, |E(x + d) - E(x)| / |E(x)| in the Frobenius norm; float32 on the CPU.

    NaN where a map is not finite, or where the map of the untouched image is constant (raw: zero).

    Attributes:
        standardized: (B,) of maps shifted and scaled to mean 0 and standard deviation 1: sqrt(2 - 2 r) at the
            smallest correlation r, in 0..2.
        rank: (B,) of centred rank maps (ties at their mean rank): the same with Spearman's r, in 0..2 up to ties. The
            headline, since only the order of scores means something.
        raw: (B,) of the scores as they are, from 0; this is captum's number, and shifting all scores changes it.
    """

    name: ClassVar[str] = "sensitivity"
    higher_is_better: ClassVar[bool] = False
    range: ClassVar[tuple[float, float]] = (0.0, 2.0)

    standardized: torch.Tensor
    rank: torch.Tensor
    raw: torch.Tensor


def max_sensitivity(
    explain: Explain,
    pixel_values: torch.Tensor,
    target: torch.Tensor,
    normalization: Normalization,
    *,
    radius: float = RADIUS,
    samples: int = 10,
    seed: int = 0,
    scores: torch.Tensor | None = None,
    batch_size: int = 32,
) -> MaxSensitivity:
    """Add uniform noise to the pixels a few times and take the largest change of the map.

    The noise is uniform in -radius..radius in every pixel and channel of RGB in [0, 1], whatever the image processor's
    std; captum's radius is in units of the normalised input. Pixels are not clipped. Every image meets the same draws,
    so that a value does not depend on its batch. The class asked about stays the same. A map that ignores the image
    has the best value, 0: read it beside a faithfulness metric.

    Args:
        explain: the method; called `samples` times, and once more where `scores` is not given.
        pixel_values: (B, 3, H, W) normalised images.
        target: (B,) classes.
        normalization: the image processor's.
        radius: positive, RGB units.
        samples: number of draws; the value grows with it.
        seed: of the draws.
        scores: (B, H, W) maps of the untouched images, where they are known already.
        batch_size: images a call of the method.

    Raises:
        ValueError: shapes do not fit, or radius or samples are not positive.

    Reference: Yeh et al. (https://arxiv.org/abs/1901.09392); captum's `sensitivity_max` with norm_ord "fro".
    """
    check_images(pixel_values, target, batch_size)
    if not radius > 0 or samples < 1:
        raise ValueError(f"radius is {radius} and samples {samples}, but both must be positive.")
    if scores is None:
        scores = explain_in_batches(explain, pixel_values, target, batch_size)
    check_scores(scores, pixel_values)
    scores = real_scores(scores.detach())
    usable = finite_rows(scores)
    scores = torch.where(usable[:, None, None], scores, 0.0)
    forms = {"standardized": standardize, "rank": _centred_ranks, "raw": torch.Tensor.double}
    first = {name: form(scores.flatten(1)) for name, form in forms.items()}
    largest = {name: torch.zeros(len(scores), dtype=torch.float64, device=scores.device) for name in forms}
    generator = torch.Generator().manual_seed(seed)
    std = torch.tensor(normalization.std)[:, None, None]
    for _ in range(samples):
        noise = (2 * torch.rand(pixel_values.shape[1:], generator=generator) - 1) * radius / std
        moved = pixel_values + noise.to(pixel_values)
        maps = explain_in_batches(explain, moved, target, batch_size).to(scores)
        finite = finite_rows(maps)
        usable &= finite
        maps = torch.where(finite[:, None, None], maps, 0.0).flatten(1)
        for name, form in forms.items():
            largest[name] = torch.maximum(largest[name], _relative(first[name], form(maps)))
    varied = usable & ~constant_rows(scores)
    return MaxSensitivity(
        standardized=only_where(varied, largest["standardized"]),
        rank=only_where(varied, largest["rank"]),
        raw=only_where(usable & (scores != 0).flatten(1).any(1), largest["raw"]),
    )


def _centred_ranks(scores: torch.Tensor) -> torch.Tensor:
    ranks = average_ranks(scores)
    return ranks - ranks.mean(1, keepdim=True)


def _relative(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(B,) |second - first| / |first|; not finite where the first is zero."""
    first, second = first.double(), second.double()
    return (second - first).norm(dim=1) / first.norm(dim=1)
