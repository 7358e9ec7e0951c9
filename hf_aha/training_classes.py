"""Which classes of an image a training step explains."""

from __future__ import annotations

import torch

from .draws import Generators, uniform
from .metrics.discrimination import runner_up


FIRST_CLASSES = ("predicted", "label", "sampled", "alone")
"""What the setting `target_classes` of a training takes."""

SECOND_CLASSES = ("none", "rival", "label")
"""What the setting `second_class` of a training takes."""


def first_classes(
    kind: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    generator: Generators,
    alone: torch.Tensor | None = None,
) -> torch.Tensor:
    """The class explained on each image, whatever else is.

    Args:
        kind: `"predicted"`, `"label"`, `"sampled"` from the predicted probabilities, or `"alone"`, predicted for the
            photograph alone, without what is pasted beside it.
        logits: (B, C) float32 of the classifier.
        labels: (B,) int64; read for `"label"` only.
        generator: of the sampling.
        alone: (B,) int64, class predicted for each photograph alone; read for `"alone"` only.

    Returns:
        (B,) int64.

    Example:
        >>> logits, labels = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0])
        >>> [first_classes(kind, logits, labels, None).item() for kind in ("predicted", "label")]
        [1, 0]
    """
    if kind == "label":
        return labels
    if kind == "alone":
        return alone
    if kind == "sampled":
        below = logits.softmax(-1).cumsum(-1)
        drawn = uniform((len(logits), 1), generator).to(below) * below[:, -1:]
        return torch.searchsorted(below, drawn, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return logits.argmax(-1)


def second_classes(kind: str, logits: torch.Tensor, labels: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Another class of each image, never the first.

    Args:
        kind: `"rival"`, the most probable class other than the first; `"label"`, the rival where the label is the
            first class.
        logits: (B, C) float32 of the classifier, at least two classes.
        labels: (B,) int64; read for `"label"` only.
        first: (B,) int64 of `first_classes`.

    Returns:
        (B,) int64.

    Raises:
        ValueError: the classifier has one class only.

    Example:
        >>> logits, first = torch.tensor([[0.0, 2.0, 1.0]] * 2), torch.tensor([1, 1])
        >>> [second_classes(kind, logits, torch.tensor([0, 1]), first).tolist() for kind in ("rival", "label")]
        [[2, 2], [0, 2]]
    """
    rival = runner_up(logits, first)
    return torch.where(labels == first, rival, labels) if kind == "label" else rival


__all__ = ["FIRST_CLASSES", "SECOND_CLASSES", "first_classes", "second_classes"]
