"""Where the objects of a dataset are, from a column of masks or of boxes, on the pixels of the model input."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..data import encoded_image
from ..geometry import InputGeometry
from ..images import _DECODER_ERRORS, ImageReadError
from ..metrics.localization import boxes_to_masks


BOX_FORMATS = ("xyxy", "xywh")

# Annotators round, and count the first pixel as 0 or 1; anything further out is in other pixels or another format.
_BOX_TOLERANCE = 1.0


class NoMaskError(ValueError):
    """A photograph has no usable mask; the message is the reason, to stand after "because"."""


@dataclass(frozen=True)
class ObjectColumn:
    """The column of a dataset that says where its objects are.

    Args:
        name: of the column. Masks are a column of images of their photographs' size, the object being every pixel that
            is not 0 (of a palette, the index; alpha is not looked at). Boxes are a list of four numbers each, a
            single one, or objects with a `bbox`, in pixels of the upright photograph; all boxes of a photograph
            together are its mask, whatever their category.
        box_format: None for masks; of boxes "xyxy" (left, top, right, bottom) or "xywh" (left, top, width, height).

    Raises:
        ValueError: there is no such format.

    Example:
        >>> ObjectColumn("objects", "xywh").facts()
        {'box_column': 'objects', 'box_format': 'xywh'}
    """

    name: str
    box_format: str | None = None

    def __post_init__(self) -> None:
        if self.box_format not in (None, *BOX_FORMATS):
            raise ValueError(f"box_format is {self.box_format!r}, but must be one of {', '.join(BOX_FORMATS)}.")

    def facts(self) -> dict[str, str]:
        """What the record of a measurement says of it, JSON values."""
        if self.box_format is None:
            return {"mask_column": self.name}
        return {"box_column": self.name, "box_format": self.box_format}

    def rows(self, dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
        """This column alone, with masks as encoded bytes.

        Args:
            dataset: with any columns.
            image_column: of the photographs.

        Raises:
            ValueError: there is no such column, it holds something else, or it is that of the photographs.
        """
        if self.name not in dataset.features:
            raise ValueError(
                f"The dataset has no column {self.name!r}; its columns are {', '.join(dataset.column_names)}."
            )
        feature = dataset.features[self.name]
        if self.name == image_column:
            raise ValueError(f"The column {self.name!r} holds the photographs; name the one of their objects.")
        if self.box_format is None:
            if not isinstance(feature, datasets.Image):
                raise ValueError(f"The column {self.name!r} holds no masks, which are images, but {feature}.")
            dataset = dataset.cast_column(self.name, datasets.Image(decode=False))
        elif not _holds_boxes(feature):
            raise ValueError(
                f"The column {self.name!r} holds no boxes, which are lists of four numbers or objects with a 'bbox', "
                f"but {feature}."
            )
        return dataset.select_columns([self.name])

    def mask(self, cell: Any, geometry: InputGeometry) -> torch.Tensor:
        """The mask of one photograph on the model input.

        A pixel of the input is the object's where the photograph's pixel under its centre is (`InputGeometry.to_input`
        with `nearest`): the resize and crop of the photograph, without new values.

        Args:
            cell: of this column.
            geometry: of the photograph.

        Returns:
            (h, w) bool, true somewhere.

        Raises:
            NoMaskError: there is none, it is empty or does not fit the photograph.
        """
        if self.box_format is None:
            pixels = _mask_pixels(cell, geometry.original_size)
        else:
            pixels = _box_pixels(cell, self.box_format, geometry.original_size)
        if not pixels.any():
            raise NoMaskError("its mask is empty" if self.box_format is None else "its boxes hold no pixel")
        mask = geometry.to_input(torch.from_numpy(pixels), nearest=True)
        if not bool(mask.any()):
            raise NoMaskError("its object lies outside what the classifier sees, or is smaller than a pixel of that")
        return mask


def _mask_pixels(cell: Mapping[str, Any] | None, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels of a stored mask that are not 0."""
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        raise NoMaskError("it has no mask")
    try:
        source = encoded_image(cell)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            levels = np.asarray(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise NoMaskError("its mask is not in a format that Pillow can read") from error
    except ImageReadError as error:
        raise NoMaskError(f"its mask cannot be read: {error}") from error
    except (Image.DecompressionBombError, *_DECODER_ERRORS) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise NoMaskError(f"its mask cannot be read: {reason}") from error
    if levels.shape[:2] != size:
        raise NoMaskError(
            f"its mask has {levels.shape[1]} x {levels.shape[0]} pixels, but the photograph {size[1]} x {size[0]}"
        )
    if levels.ndim == 3:
        colours = levels.shape[2] - (levels.shape[2] in (2, 4))
        return (levels[..., :colours] != 0).any(-1)
    return levels != 0


def _box_pixels(cell: Any, box_format: str, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels whose centre lies in a box."""
    stored = _boxes_in(cell)
    boxes = stored.copy()
    if box_format == "xywh":
        boxes[:, 2:] += boxes[:, :2]
    low, high = -_BOX_TOLERANCE, np.array(size[::-1]) + _BOX_TOLERANCE
    for number, (box, said) in enumerate(zip(boxes, stored, strict=True)):
        shown = f"its box {number + 1} [{', '.join(f'{value:g}' for value in said)}] ({box_format})"
        if not np.isfinite(box).all():
            raise NoMaskError(f"{shown} is not finite")
        if (box[2:] <= box[:2]).any():
            raise NoMaskError(f"{shown} has no area")
        if (box[:2] < low).any() or (box[2:] > high).any():
            raise NoMaskError(f"{shown} reaches beyond the photograph of {size[1]} x {size[0]} pixels")
    return boxes_to_masks([torch.from_numpy(boxes)], size)[0].numpy()


def _boxes_in(cell: Any) -> np.ndarray:
    """(K, 4) float64, K at least 1, of a cell as `datasets` gives it."""
    if isinstance(cell, Mapping):
        cell = cell["bbox"]
    elif cell is not None and len(cell) and isinstance(cell[0], Mapping):
        cell = [one["bbox"] for one in cell]
    if cell is None or not len(cell):
        raise NoMaskError("it has no box")
    boxes = [cell] if np.ndim(cell[0]) == 0 else cell
    for number, box in enumerate(boxes):
        if box is None or len(box) != 4 or any(value is None for value in box):
            raise NoMaskError(f"its box {number + 1} has not four numbers")
    return np.array(boxes, dtype=np.float64)


def _holds_boxes(feature: Any) -> bool:
    """A struct with a `bbox`, a list of these, or numbers in one or two lists."""
    if isinstance(feature, Mapping):
        return "bbox" in feature and _list_depth(feature["bbox"]) in (1, 2)
    inner = _items(feature)
    if isinstance(inner, Mapping):
        return "bbox" in inner and _list_depth(inner["bbox"]) == 1
    return _list_depth(feature) in (1, 2)


def _list_depth(feature: Any) -> int | None:
    """How many lists lie around numbers; None around anything else."""
    if isinstance(feature, datasets.Array2D):
        return 2
    if isinstance(feature, datasets.Value):
        return 0 if feature.dtype.startswith(("int", "uint", "float")) else None
    inner = _items(feature)
    depth = None if inner is None else _list_depth(inner)
    return None if depth is None else depth + 1


def _items(feature: Any) -> Any:
    """What a list holds; None of anything else."""
    return feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else None


__all__ = ["BOX_FORMATS", "NoMaskError", "ObjectColumn"]
