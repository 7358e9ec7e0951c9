"""Resized copies of large photographs, made once, so that an epoch decodes small ones."""

from __future__ import annotations

import hashlib
import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock
from PIL import Image

from .images import ImageReadError, read_image


JPEG_QUALITY = 95
_JPEG_START = b"\xff\xd8"


def resized_copies(dataset: datasets.Dataset, image_column: str, size: int, processes: int = 1) -> datasets.Dataset:
    """The same rows, with every photograph whose shorter side is longer than `size` pixels resized to that.

    JPEG files become JPEG of quality 95, all others PNG. Photographs that are small enough, and those that cannot be
    read, stay as they are. The copies lie in the cache of `datasets` beside the dataset's own files, where the next
    run with the same data and size finds them; of several processes that ask at once, one makes them.

    Args:
        dataset: rows with an undecoded image column.
        image_column: its name.
        size: pixels of the shorter side, at least 1.
        processes: that make the copies.

    Raises:
        ValueError: `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"cache_size must be at least 1 pixel, but it is {size}.")
    lock = nullcontext()
    if dataset.cache_files:
        stored = Path(dataset.cache_files[0]["filename"])
        name = hashlib.sha256(f"{stored.name} {dataset.split} {size}".encode()).hexdigest()[:16]
        lock = FileLock(stored.parent / f"copies-{name}.lock")
    with lock:
        return dataset.map(
            _resized,
            fn_kwargs={"image_column": image_column, "size": size},
            features=dataset.features,
            num_proc=processes if processes > 1 else None,
            desc=f"Copies of {size} pixels",
        )


def _resized(row: dict[str, Any], image_column: str, size: int) -> dict[str, Any]:
    cell = row[image_column]
    content = None if cell is None else cell["bytes"]
    try:
        if content is None and cell is not None and cell["path"]:
            content = Path(cell["path"]).read_bytes()
        image = None if content is None else read_image(content)
    except (ImageReadError, OSError):
        return {image_column: cell}  # kept, so that training lists it with the reason
    if image is None or min(image.size) <= size:
        return {image_column: cell}
    scale = size / min(image.size)
    small = image.resize(tuple(max(size, round(scale * side)) for side in image.size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    if content.startswith(_JPEG_START):
        small.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        small.save(buffer, "PNG")
    return {image_column: {"bytes": buffer.getvalue(), "path": None}}
