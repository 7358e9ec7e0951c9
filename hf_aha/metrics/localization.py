"""Do the scores lie where the object is: pointing game and shares against masks or boxes of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .calls import finite_rows, only_where, real_scores
from .rank_maps import top_share


@dataclass(frozen=True)
class Localization:
    """Agreement of one map an image with the mask of its object; float32 on the CPU.

    NaN marks an image without a value: an empty mask or a map that is not finite, in every field.

    Attributes:
        hit: (B,) share of the pixels with the largest score that lie inside the mask; 0 or 1 without ties.
        rank_share: (B,) share of the top |mask| pixels that lie inside, the mean over all orders of equal scores.
        mass_share: (B,) share of the sum of scores that lies inside; NaN also where a score is negative or all are 0.
        chance: (B,) share of the image that the mask covers: what a random or a constant map gets in `rank_share`.
        empty: (B,) bool, true where the mask is empty, so that such images can be counted and named.
    """

    name: ClassVar[str] = "localization"
    higher_is_better: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    hit: torch.Tensor
    rank_share: torch.Tensor
    mass_share: torch.Tensor
    chance: torch.Tensor
    empty: torch.Tensor


def localization_shares(scores: torch.Tensor, masks: torch.Tensor) -> Localization:
    """Compare maps with object masks.

    It measures agreement with a person's outline, not faithfulness: a classifier that looks at the water makes a
    faithful map of a fish score badly.

    Args:
        scores: (B, H, W), higher = more important.
        masks: (B, H, W) bool, true on the object. Boxes: see `boxes_to_masks`.

    Raises:
        ValueError: the shapes differ or the masks are not bool.

    Example:
        >>> mask = torch.zeros(1, 2, 2, dtype=torch.bool)
        >>> mask[0, 0, 0] = True
        >>> found = localization_shares(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), mask)
        >>> found.hit.item(), found.rank_share.item(), found.mass_share.item()
        (1.0, 1.0, 0.75)

    Reference: pointing game https://arxiv.org/abs/1608.00507 (its 15 pixels of tolerance are not applied);
    `mass_share` is the energy-based pointing game of https://arxiv.org/abs/1910.01279, `rank_share` the relevance rank
    accuracy of https://arxiv.org/abs/2003.07258.
    """
    if scores.ndim != 3 or scores.shape != masks.shape or masks.dtype != torch.bool:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)} and masks are {masks.dtype} of shape {tuple(masks.shape)}, but "
            "both must be (batch, height, width) and the masks bool."
        )
    scores, inside = real_scores(scores.detach()).flatten(1), masks.to(scores.device).flatten(1)
    sizes = inside.sum(1)
    usable = finite_rows(scores) & (sizes > 0)
    scores = torch.where(usable[:, None], scores, 0.0)
    best = scores == scores.amax(1, keepdim=True)
    return Localization(
        hit=only_where(usable, (best & inside).sum(1) / best.sum(1)),
        rank_share=only_where(usable, top_share(scores, inside, sizes)),
        mass_share=only_where(usable, mass_share(scores, inside)),
        chance=only_where(usable, sizes / inside.shape[1]),
        empty=(sizes == 0).cpu(),
    )


def mass_share(scores: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Share of the sum of non-negative scores that lies in a region.

    Args:
        scores: (B, n).
        region: (B, n) bool.

    Returns:
        (B,) float32 in [0, 1]; NaN where a score is negative or all are 0, as a share of a signed sum means nothing.
    """
    # Scaled first, so that the sum of large scores stays finite.
    scaled = scores.double() / scores.amax(1, keepdim=True)
    share = torch.where(region, scaled, 0.0).sum(1) / scaled.sum(1)
    return torch.where((scores >= 0).all(1), share, torch.nan).float()


def boxes_to_masks(boxes: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Masks that cover every box of an image.

    Args:
        boxes: one (K, 4) tensor an image, K from 0: left, top, right, bottom in pixels of the map, from the upper left
            corner of the image (transform the boxes of a photograph as its pixels were resized and cropped).
        size: height and width of the maps.

    Returns:
        (B, H, W) bool: pixels whose centre lies in a box. An image without boxes has an empty mask.

    Raises:
        ValueError: a tensor is not (K, 4), not finite, or a box ends before it starts.

    Example:
        >>> boxes_to_masks([torch.tensor([[0.0, 0.0, 2.0, 1.0]])], (2, 3)).int().tolist()
        [[[1, 1, 0], [0, 0, 0]]]
    """
    height, width = size
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    for row, found in enumerate(boxes):
        if found.ndim != 2 or found.shape[1] != 4:
            raise ValueError(f"The boxes of image {row} have shape {tuple(found.shape)}, but must be (boxes, 4).")
        left, top, right, bottom = found.detach().cpu().double().unbind(1)
        if not bool((torch.isfinite(found.cpu()).all(1) & (left <= right) & (top <= bottom)).all()):
            raise ValueError(
                f"A box of image {row} is not finite or ends before it starts; give left, top, right, bottom."
            )
        across = (x >= left[:, None]) & (x < right[:, None])
        down = (y >= top[:, None]) & (y < bottom[:, None])
        masks[row] = (down[:, :, None] & across[:, None, :]).any(0)
    return masks
