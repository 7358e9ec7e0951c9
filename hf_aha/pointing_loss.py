"""A penalty on maps that look for a class in a photograph pasted beside the one that shows it."""

from __future__ import annotations

import torch

from .ranking import standardize


def pointing_loss(scores: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """How improbable it is that a map points into the photographs of the class it was asked about.

    A pixel is pointed at with a probability that grows exponentially with its standardised score; the loss of a map is
    the negative logarithm of the probability inside. Deletion and insertion hardly depend on where the many pixels
    without evidence stand in the order; this puts those around the object before those of the other photographs.

    Args:
        scores: (B, H, W) float32.
        inside: (B, H, W) bool, true on pixels of photographs of the asked class. Maps for which it is true everywhere
            or nowhere count as zero: there is nothing to tell apart.

    Returns:
        scalar, the mean over the batch; at least 0, and log 4 for a map that knows nothing of four equal cells.

    Example:
        >>> scores, inside = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> inside[:, :2, :2] = True
        >>> round(pointing_loss(scores, inside).exp().item(), 4)
        4.0
    """
    logits, inside = standardize(scores.flatten(1)), inside.flatten(1)
    apart = inside.any(1) & ~inside.all(1)
    # Rows that do not count are given a finite logarithm, so that their gradient is zero and not NaN.
    kept = torch.where(apart[:, None], inside, True)
    lost = logits.logsumexp(1) - logits.masked_fill(~kept, -torch.inf).logsumexp(1)
    return torch.where(apart, lost, 0.0).mean()


__all__ = ["pointing_loss"]
