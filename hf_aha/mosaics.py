"""Training images pasted together from several photographs, so that the classes in one image compete."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .draws import Generators, uniform


MOSAICS = {"halves": 2, "quarters": 4}
"""Ways to paste, and how many photographs that follow each other in a batch are mixed."""


@dataclass(frozen=True)
class PastedImages:
    """A batch some images of which are pasted together from several of its photographs.

    Attributes:
        pixel_values: (B, 3, H, W).
        source: (B, H, W) int64, row of the photograph that each pixel comes from; its own row where nothing is pasted.
    """

    pixel_values: torch.Tensor
    source: torch.Tensor


def paste(pixel_values: torch.Tensor, share: float, generator: Generators, layout: str = "halves") -> PastedImages:
    """Replace a share of the images by mosaics of themselves and their neighbours in the batch.

    Several objects in one image make the classes compete, so that the explainer learns to tell their evidence apart.

    Args:
        pixel_values: (B, 3, H, W); not changed.
        share: of the images to change, drawn independently.
        generator: on the CPU: one for the batch, or one an image.
        layout: `"halves"` puts one side of the neighbour over the same side of the image, 30 to 70 % of it;
            `"quarters"` shrinks the image and its three neighbours to 2 x 2 cells, as the grid pointing game does,
            the image itself in any of the four.

    Returns:
        the images and where each pixel comes from. Neighbours are the first and second image, the third and fourth,
        and so on (for quarters: the first four, the next four): a batch can be cut into batches of a multiple of 2 (4)
        and stays the same. Where the last neighbours are fewer, halves take from the image before, and quarters show
        some photographs twice.

    Raises:
        ValueError: unknown layout.

    Example:
        >>> images = torch.zeros(4, 3, 8, 8)
        >>> paste(images, 1.0, torch.Generator().manual_seed(0), "quarters").source[0].unique().tolist()
        [0, 1, 2, 3]
    """
    if layout not in MOSAICS:
        raise ValueError(f"The mosaic layout is {layout!r}, but must be one of {', '.join(map(repr, MOSAICS))}.")
    count, size = len(pixel_values), pixel_values.shape[-2:]
    source = torch.arange(count).view(-1, 1, 1).expand(-1, *size)
    if share == 0 or count < 2:
        return PastedImages(pixel_values, source)
    mixed, source = pixel_values.clone(), source.clone()
    for row, (drawn, first, second) in enumerate(uniform((count, 3), generator).tolist()):
        if drawn < share and layout == "halves":
            source[row] = _halves(row, count, size, first, second)
            mixed[row] = torch.where(source[row] == row, pixel_values[row], pixel_values[_partner(row, count)])
        elif drawn < share:
            cells = _quarters(row, count, first, second)
            mixed[row] = _in_cells([pixel_values[index] for index in cells], size)
            source[row] = _in_cells([torch.full((1, *size), float(index)) for index in cells], size)[0].round()
    return PastedImages(mixed, source)


def _partner(row: int, count: int) -> int:
    return row ^ 1 if row ^ 1 < count else row - 1


def _halves(row: int, count: int, size: torch.Size, axis: float, where: float) -> torch.Tensor:
    """(H, W) rows of the photographs."""
    (height, width), where = size, 0.3 + 0.4 * where
    source = torch.full(size, row)
    if axis < 0.5:
        source[: round(where * height)] = _partner(row, count)
    else:
        source[:, : round(where * width)] = _partner(row, count)
    return source


def _quarters(row: int, count: int, cell: float, order: float) -> list[int]:
    """Rows of the photographs in the four cells, in row order."""
    first = row - row % 4
    others = [index for index in range(first, min(first + 4, count)) if index != row] or [row]
    shift = int(order * len(others))
    shown = [others[(shift + k) % len(others)] for k in range(3)]
    shown.insert(int(cell * 4), row)
    return shown


def _in_cells(tiles: list[torch.Tensor], size: torch.Size) -> torch.Tensor:
    """Four images (C, H, W), shrunk to 2 x 2 cells of one; an odd side leaves the left and upper ones a pixel less."""
    height, width = size
    cells = [(h, w) for h in (height // 2, height - height // 2) for w in (width // 2, width - width // 2)]
    small = [
        F.interpolate(tile[None].float(), size=cell, mode="bilinear", antialias=True)[0]
        for tile, cell in zip(tiles, cells, strict=True)
    ]
    rows = [torch.cat(small[:2], dim=-1), torch.cat(small[2:], dim=-1)]
    return torch.cat(rows, dim=-2).to(tiles[0].dtype)


__all__ = ["MOSAICS", "PastedImages", "paste"]
