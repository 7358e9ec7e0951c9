"""Mean curves with the interval of every point."""

from __future__ import annotations

import numpy as np

from .results import ProtocolResult


_BLOCK = 20_000_000  # counts held in memory at a time


def curve_band(
    result: ProtocolResult, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Mean of the curves over images, with a percentile bootstrap interval of every point.

    Args:
        result: of at least one image.
        resamples, seed, confidence: of the bootstrap over images.

    Returns:
        the fractions (P,), the mean (P,), and the lower and upper ends (P,), both None with one image.

    Raises:
        ValueError: no image was measured.
    """
    count = len(result)
    if not count:
        raise ValueError(f"No image has a curve of {result.protocol.name}: all {len(result.dropped)} were left out.")
    curves = result.curves.astype(np.float64)
    fractions, mean = np.array(result.protocol.fractions), curves.mean(0)
    if count == 1:
        return fractions, mean, None, None
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // count)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    # How often each image is drawn; a product with the curves is then the sum over a resample.
    means = [generator.multinomial(count, np.full(count, 1 / count), block) @ curves / count for block in blocks]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    return fractions, mean, low, high
