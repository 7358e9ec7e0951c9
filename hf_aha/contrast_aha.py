"""Contrast: "why a rather than b", from the maps of the two classes.

This file travels to the Hub as custom code, so it imports torch only.
"""

from __future__ import annotations

import torch


def contrast_scores(scores: torch.Tensor, against: torch.Tensor) -> torch.Tensor:
    """The map of one class minus the map of another, each standardised over its own pixels.

    High scores speak for the first class rather than the second, low ones for the second rather than the first, and
    what both classes use alike lies between: exchanging the two negates the map. Without standardising, the class
    whose scores happen to spread wider would decide the order alone. A flat map counts as zero.

    Args:
        scores: (..., H, W) of the class asked about, higher = more important.
        against: (..., H, W) of the class it is compared with, on the same images.

    Returns:
        (..., H, W) float32, unbounded; only the order counts.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[10.0, -10.0], [0.0, 0.0]])
        >>> contrast_scores(a, b).flatten().argsort(descending=True).tolist()
        [1, 0, 2, 3]

    Reference: our own; `benchmarks/contrast.py` compares it with differences of ranks and of class vectors.
    """
    return _standardised(scores) - _standardised(against)


def _standardised(scores: torch.Tensor) -> torch.Tensor:
    scores = scores.float()
    deviation = scores.std(dim=(-2, -1), correction=0, keepdim=True)
    centred = scores - scores.mean(dim=(-2, -1), keepdim=True)
    return centred / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def contrast_classes(
    logits: torch.Tensor, target: torch.Tensor | None, against: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both classes of every question, of one shape.

    Args:
        logits: (B, C) of the images.
        target: (B,) or (B, M) classes asked about. Left out, the most probable class other than `against`: the
            predicted one, unless that is what it is compared with.
        against: (B,), or (B, M) like the target.

    Returns:
        target and against, both (B,) or both (B, M) int64.

    Raises:
        ValueError: the shapes differ, or a class is compared with itself.

    Example:
        >>> target, against = contrast_classes(torch.tensor([[1.0, 3.0, 2.0]] * 2), None, torch.tensor([0, 1]))
        >>> target.tolist(), against.tolist()
        ([1, 2], [0, 1])
    """
    if target is None and against.ndim == 1:
        target = logits.scatter(1, against[:, None], float("-inf")).argmax(dim=-1)
    shape = tuple(against.shape[:1] if target is None else target.shape)
    if against.ndim == 1 and len(shape) == 2:
        against = against[:, None].expand(shape)
    if against.shape != shape:
        raise ValueError(
            f"against has shape {tuple(against.shape)}, but the classes asked about have {shape}: give one class to "
            "compare with, one an image, or as many as the target names."
        )
    if not torch.compiler.is_compiling():
        same = (target == against).nonzero()
        if len(same):
            row = int(same[0, 0])
            raise ValueError(
                f"Class {int(against[tuple(same[0])])} of image {row} is compared with itself: target and against "
                "must be two classes."
            )
    return target, against


__all__ = ["contrast_classes", "contrast_scores"]
