"""Several sheets as one picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def grid(sheets: Sequence[Image.Image], side: int, columns: int = 2) -> Image.Image:
    """The sheets row by row on white, shrunk to at most `side` pixels a side."""
    width, height = max(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets)
    rows = -(-len(sheets) // columns)
    picture = Image.new("RGB", (columns * width, rows * height), "white")
    for place, sheet in enumerate(sheets):
        picture.paste(sheet, (place % columns * width, place // columns * height))
    picture.thumbnail((side, side))
    return picture
