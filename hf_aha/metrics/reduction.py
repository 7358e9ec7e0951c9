"""From measured scores to a protocol's curve, and from the curve to its number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .protocols import Protocol


def curve_areas(
    curves: torch.Tensor | np.ndarray | Sequence[Sequence[float]],
    protocol: Protocol,
    clean: torch.Tensor | np.ndarray | Sequence[float] | None = None,
) -> torch.Tensor:
    """The number that a protocol makes of each curve.

    Args:
        curves: (K, P), the protocol's score at each of its P fractions.
        protocol: names the rule and the fractions.
        clean: (K,) score of the untouched start; needed by `"trapezoid_x100"` where the fractions do not begin at 0,
            which puts it before them.

    Returns:
        (K,) float32.

    Raises:
        ValueError: the curves do not have one value a fraction, or `clean` is missing or of another length.

    Example:
        >>> from hf_aha.metrics import get_protocol
        >>> curve_areas([[1.0] * 9], get_protocol("chefer/positive")[0], clean=[1.0]).item()
        90.0
    """
    curve = torch.as_tensor(curves, dtype=torch.float32)
    points = len(protocol.fractions)
    if curve.ndim != 2 or curve.shape[1] != points:
        raise ValueError(
            f"The curves have shape {tuple(curve.shape)}, but protocol {protocol.name!r} has {points} points an image."
        )
    if protocol.auc == "mean_interval":
        return (curve.sum(1) - curve[:, 0] / 2 - curve[:, -1] / 2) / (points - 1)
    fractions = torch.tensor(protocol.fractions)
    if protocol.auc == "trapezoid_unit":
        return torch.trapezoid(curve, fractions, dim=1)
    if protocol.fractions[0] > 0:
        start = None if clean is None else torch.as_tensor(clean, dtype=torch.float32)
        if start is None or start.shape != curve.shape[:1]:
            raise ValueError(
                f"Protocol {protocol.name!r} begins its area at the untouched image, so {len(curve)} curves need as "
                "many scores in `clean`."
            )
        curve, fractions = torch.cat([start[:, None], curve], 1), torch.cat([torch.zeros(1), fractions])
    return 100 * torch.trapezoid(curve, fractions, dim=1)


def class_scores(logits: torch.Tensor, scored: torch.Tensor, kind: str) -> torch.Tensor:
    """(N,) float32 score of the scored class from (N, C) logits; NaN where the logits are not finite.

    Args:
        kind: `"accuracy"`, `"logit"`, or anything else for the softmax probability.
    """
    rows = torch.arange(len(logits))
    if kind == "accuracy":
        value = (logits.argmax(1) == scored).float()
    elif kind == "logit":
        value = logits[rows, scored]
    else:
        value = logits.softmax(1)[rows, scored]
    return torch.where(torch.isfinite(logits).all(1), value, torch.nan)


def protocol_response(
    curve: torch.Tensor, full: torch.Tensor, empty: torch.Tensor, maps: torch.Tensor, protocol: Protocol
) -> torch.Tensor:
    """(K, P) the protocol's curve: the scores themselves, or MDA's normalised and monotone ones.

    Args:
        curve: (K, P) measured scores.
        full, empty: (K,) scores of the untouched image and of the pure reference.
        maps: (K, rows, columns) scores of the ranked units; their values count for `"magnitude_aligned"` alone.
    """
    if protocol.score not in ("normalised_monotone", "magnitude_aligned"):
        return curve
    falling = protocol.start == "image"
    share = ((curve - empty[:, None]) / (full - empty).abs()[:, None]).clamp(0, 1)
    # 0 / 0, where the reference scores what the image scores, leaves the running extreme as it was.
    share = share.nan_to_num(nan=1.0 if falling else 0.0)
    monotone = share.cummin(1).values if falling else share.cummax(1).values
    if protocol.score == "normalised_monotone":
        return monotone
    ordered = maps.flatten(1).cpu().double().sort(1, descending=protocol.order == "most_relevant_first").values
    cumulative = torch.cat([torch.zeros(len(ordered), 1, dtype=torch.float64), ordered.cumsum(1)], 1)
    counts = torch.tensor(protocol.counts(ordered.shape[1]))
    moved = (cumulative[:, counts] / cumulative[:, -1:]).float()
    density = 1 - moved if falling else moved
    penalty = (monotone - density).abs()
    aligned = (monotone + penalty if falling else monotone - penalty).clamp(0, 1)
    low, high = aligned.amin(1, keepdim=True), aligned.amax(1, keepdim=True)
    ramp = torch.linspace(0, 1, len(counts))
    return torch.where(low == high, ramp.flip(0) if falling else ramp, (aligned - low) / (high - low))
