"""Training images pasted together from several photographs, so that the classes in one image compete."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .draws import Generators, uniform


MOSAICS = {"halves": 2, "quarters": 4}
"""Ways to paste, and how many photographs that follow each other in a batch are mixed."""


def mosaic(pixel_values: torch.Tensor, share: float, generator: Generators, layout: str = "halves") -> torch.Tensor:
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
        (B, 3, H, W). Neighbours are the first and second image, the third and fourth, and so on (for quarters: the
        first four, the next four): a batch can be cut into batches of a multiple of 2 (4) and stays the same. Where
        the last neighbours are fewer, halves take from the image before, and quarters show some photographs twice.

    Raises:
        ValueError: unknown layout.

    Example:
        >>> images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
        >>> mosaic(images, 1.0, torch.Generator().manual_seed(0), "quarters")[0].round().unique().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    if layout not in MOSAICS:
        raise ValueError(f"The mosaic layout is {layout!r}, but must be one of {', '.join(map(repr, MOSAICS))}.")
    if share == 0 or len(pixel_values) < 2:
        return pixel_values
    paste = _halves if layout == "halves" else _quarters
    mixed = pixel_values.clone()
    for row, (drawn, first, second) in enumerate(uniform((len(mixed), 3), generator).tolist()):
        if drawn < share:
            mixed[row] = paste(pixel_values, row, first, second)
    return mixed


def _halves(pixel_values: torch.Tensor, row: int, axis: float, where: float) -> torch.Tensor:
    partner = row ^ 1 if row ^ 1 < len(pixel_values) else row - 1
    image, (height, width), where = pixel_values[row].clone(), pixel_values.shape[-2:], 0.3 + 0.4 * where
    if axis < 0.5:
        image[:, : round(where * height)] = pixel_values[partner, :, : round(where * height)]
    else:
        image[:, :, : round(where * width)] = pixel_values[partner, :, :, : round(where * width)]
    return image


def _quarters(pixel_values: torch.Tensor, row: int, cell: float, order: float) -> torch.Tensor:
    height, width = pixel_values.shape[-2:]
    first = row - row % 4
    others = [first + k for k in range(4) if first + k != row and first + k < len(pixel_values)]
    shift = int(order * len(others))
    shown = [others[(shift + k) % len(others)] for k in range(3)]
    shown.insert(int(cell * 4), row)
    # An odd side leaves the left and upper cells a pixel less.
    sizes = [(h, w) for h in (height // 2, height - height // 2) for w in (width // 2, width - width // 2)]
    cells = [
        F.interpolate(pixel_values[index, None].float(), size=size, mode="bilinear", antialias=True)[0]
        for index, size in zip(shown, sizes, strict=True)
    ]
    rows = [torch.cat(cells[:2], dim=-1), torch.cat(cells[2:], dim=-1)]
    return torch.cat(rows, dim=-2).to(pixel_values.dtype)


__all__ = ["MOSAICS", "mosaic"]
