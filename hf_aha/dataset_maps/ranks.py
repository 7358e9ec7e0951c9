"""Score maps as small lossless pictures of their ranks: 8 or 16 bits a pixel, with a stated error."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from ..ranking import hard_ranks


# Fast settings of zlib: on maps of a real explainer the usual ones took several times as long for files 7% smaller.
# Runs of equal bytes (Z_RLE) are all the repetition that a map has once PNG's filters have taken differences.
_PNG_SETTINGS = {"compress_level": 1, "compress_type": 3}


@dataclass(frozen=True)
class Quantisation:
    """Ranks in [0, 1] as whole numbers 0 .. `levels`.

    Attributes:
        name: "uint8" or "uint16".
        levels: the largest number, 255 or 65,535, which stands for rank 1, the most important pixel.
        png_mode: mode of the PNG that holds them.

    Example:
        >>> QUANTISATIONS["uint8"].error_bound
        0.00196078431372549
    """

    name: str
    levels: int
    png_mode: str

    @property
    def dtype(self) -> np.dtype:
        """Of the stored numbers."""
        return np.dtype(self.name)

    @property
    def error_bound(self) -> float:
        """Largest difference between a rank in [0, 1] and what is read back: half a step."""
        return 0.5 / self.levels

    def keeps_order(self, pixels: int) -> bool:
        """Whether a map of so many pixels keeps its whole order, no two ranks becoming one.

        Example:
            >>> QUANTISATIONS["uint16"].keeps_order(224 * 224), QUANTISATIONS["uint8"].keeps_order(224 * 224)
            (True, False)
        """
        return pixels - 1 <= self.levels


QUANTISATIONS: dict[str, Quantisation] = {
    one.name: one for one in (Quantisation("uint8", 255, "L"), Quantisation("uint16", 65535, "I;16"))
}
"""By name: what `MapSettings(quantisation=...)` and `--quantisation` accept."""
"""Both ways to store ranks, by name."""


def quantised_ranks(scores: torch.Tensor, quantisation: Quantisation) -> np.ndarray:
    """Rank the pixels of each map among its own and round the ranks to the levels of `quantisation`.

    A pixel of hard rank k out of N (0 = most important; equal scores in index order, see [`hf_aha.hard_ranks`][]) has
    the rank r = (N - 1 - k) / (N - 1), and becomes the level nearest to r * levels.

    Args:
        scores: (B, h, w), finite; higher = more important.
        quantisation: one of `QUANTISATIONS`.

    Returns:
        (B, h, w) of the quantisation's dtype; the most important pixel has its largest level, the least important 0.

    Raises:
        ValueError: a score is NaN or infinite.

    Example:
        >>> quantised_ranks(torch.tensor([[[0.2, 0.9, -3.0]]]), QUANTISATIONS["uint8"]).tolist()
        [[[128, 255, 0]]]
    """
    flat = scores.detach().flatten(1)
    levels = _level_of_rank(flat.shape[1], quantisation)
    if flat.device.type == "cpu" and flat.dtype == torch.float32:
        found = np.empty(flat.shape, quantisation.dtype)
        np.put_along_axis(found, _descending_order(flat.contiguous().numpy()), levels[None], axis=1)
    else:
        found = levels[hard_ranks(flat).int().cpu().numpy()]
    return found.reshape(tuple(scores.shape))


def ranks_to_png(levels: np.ndarray) -> bytes:
    """A map (h, w) of uint8 or uint16 as a grey PNG, which loses nothing.

    Example:
        >>> ranks_from_png(ranks_to_png(np.array([[0, 65535]], np.uint16))).tolist()
        [[0.0, 1.0]]
    """
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG", **_PNG_SETTINGS)
    return file.getvalue()


def ranks_from_png(png: bytes | Image.Image) -> np.ndarray:
    """Ranks (h, w) float32 in [0, 1], 1 = most important, of a PNG that `ranks_to_png` wrote.

    Args:
        png: its bytes, or the picture that `datasets` decoded from them.

    Raises:
        ValueError: it is no grey picture of 8 or 16 bits.
    """
    image = png if isinstance(png, Image.Image) else Image.open(io.BytesIO(png))
    found = next((one for one in QUANTISATIONS.values() if one.png_mode == image.mode), None)
    if found is None:
        raise ValueError(f"A stored map is a grey PNG of 8 or 16 bits, but this one has the mode {image.mode!r}.")
    return np.asarray(image, dtype=np.float32) / np.float32(found.levels)


@lru_cache(maxsize=64)
def _level_of_rank(pixels: int, quantisation: Quantisation) -> np.ndarray:
    """(pixels,) the level of each hard rank, 0 = most important."""
    shares = np.arange(pixels - 1, -1, -1, dtype=np.float64) / max(pixels - 1, 1)
    return np.floor(shares * quantisation.levels + 0.5).astype(quantisation.dtype)


def _descending_order(scores: np.ndarray) -> np.ndarray:
    """(B, n) float32 -> (B, n) int64: indices from the highest score to the lowest, equal scores in index order.

    One sort of 64-bit keys, the score's bits over the index. Such keys are all different, so the fast unstable sort
    will do, which takes a fraction of the time of `torch.sort(stable=True)`.
    """
    if not np.isfinite(scores).all():
        raise ValueError("The scores hold NaN or infinity, so they have no order; check the explainer's weights.")
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0, its equal
    # The bits of negative floats sort in the order that is wanted, highest first, and so do those of the others once
    # all but the sign is inverted; as unsigned numbers the negative ones come last.
    bits ^= ~(bits >> 31) & np.int32(0x7FFFFFFF)
    keys = bits.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(scores.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    keys &= np.uint64(0xFFFFFFFF)
    return keys.view(np.int64)
