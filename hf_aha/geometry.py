"""Where each pixel of a photograph lands in the model input, and where each score belongs in the photograph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor
from transformers.image_processing_utils import get_size_dict
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio


# Classes of transformers whose `_preprocess` is "resize, then centre crop"; any other override may do something else.
_KNOWN_DEFINERS = {
    "resize": {"PilBackend", "TorchvisionBackend"},
    "center_crop": {"PilBackend", "TorchvisionBackend"},
    "_preprocess": {
        "PilBackend",
        "TorchvisionBackend",
        "BeitImageProcessor",
        "BeitImageProcessorPil",
        "DINOv3ViTImageProcessor",
        "MobileNetV2ImageProcessor",
        "MobileNetV2ImageProcessorPil",
    },
}


@dataclass(frozen=True)
class InputGeometry:
    """How an image processor turns a photograph into model input: a resize, then a crop of whole pixels.

    Pixels are squares with half-integer centres: pixel j of W covers [j, j + 1), and its centre j + 0.5 lies at
    (j + 0.5) w / W after a resize from W to w. Sizes are (height, width); boxes are (left, top, right, bottom).

    Attributes:
        original_size: (H, W) of the photograph, upright, as `read_image` returns it.
        resized_size: (h, w) after the processor's resize; equal to `original_size` without one.
        crop_box: what the processor cuts out of the resized photograph, in its pixels. The parts of a box that reach
            beyond the photograph are filled with zeros by the processor.

    Example:
        >>> geometry = InputGeometry(original_size=(100, 300), resized_size=(8, 24), crop_box=(8, 0, 16, 8))
        >>> geometry.input_size, geometry.covered_box
        ((8, 8), (100.0, 0.0, 200.0, 100.0))
        >>> geometry.to_original(torch.ones(8, 8)).nansum().item()  # the middle third is scored
        10000.0
    """

    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    crop_box: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        for name in ("original_size", "resized_size"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; height and width must be at least 1.")
        left, top, right, bottom = self.crop_box
        if right <= left or bottom <= top:
            raise ValueError(f"crop_box is {self.crop_box}; left < right and top < bottom must hold.")
        if right <= 0 or bottom <= 0 or left >= self.resized_size[1] or top >= self.resized_size[0]:
            raise ValueError(f"crop_box {self.crop_box} lies outside the resized photograph {self.resized_size}.")

    @classmethod
    def from_processor(cls, image_processor: BaseImageProcessor, original_size: tuple[int, int]) -> InputGeometry:
        """Derive the geometry of one photograph from the settings of its image processor.

        Args:
            image_processor: a processor that resizes to a height and width or by the shortest edge (with or without a
                limit on the longest), or does not resize, and takes a centre crop or none: those of ViT, DeiT, BEiT,
                BiT (DINOv2), CLIP and SigLIP, with either backend of transformers.
            original_size: (H, W) of the photograph given to it.

        Raises:
            ValueError: the processor does anything else to the shape of an image, such as padding or NaFlex patches.
        """
        name = type(image_processor).__name__
        for method, known in _KNOWN_DEFINERS.items():
            if _definer(image_processor, method) not in known:
                raise _unsupported(name, f"has its own {method}")
        if getattr(image_processor, "do_pad", None):
            raise _unsupported(name, "pads images (do_pad)")

        original_size = (int(original_size[0]), int(original_size[1]))
        if min(original_size) < 1:
            raise ValueError(f"original_size is {original_size}; height and width must be at least 1.")
        resized_size = original_size
        if getattr(image_processor, "do_resize", None):
            resized_size = _resized_size(name, _size_setting(image_processor, "size"), original_size)
        crop_box = (0, 0, resized_size[1], resized_size[0])
        if getattr(image_processor, "do_center_crop", None):
            crop_size = _size_setting(image_processor, "crop_size")
            if set(crop_size) != {"height", "width"}:
                raise _unsupported(name, f"has the crop_size {crop_size}")
            torchvision = any(base.__name__ == "TorchvisionBackend" for base in type(image_processor).__mro__)
            left = _crop_start(resized_size[1], crop_size["width"], torchvision)
            top = _crop_start(resized_size[0], crop_size["height"], torchvision)
            crop_box = (left, top, left + crop_size["width"], top + crop_size["height"])
        return cls(original_size=original_size, resized_size=resized_size, crop_box=crop_box)

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) of the model input."""
        left, top, right, bottom = self.crop_box
        return bottom - top, right - left

    @property
    def content_box(self) -> tuple[int, int, int, int]:
        """The part of the model input that shows the photograph, in input pixels; the rest is zero padding."""
        (top, bottom), (left, right) = (axis.content for axis in self._axes)
        return left, top, right, bottom

    @property
    def covered_box(self) -> tuple[float, float, float, float]:
        """The part of the photograph that the model sees, in original pixels, with fractions."""
        (top, bottom), (left, right) = (axis.covered_interval for axis in self._axes)
        return left, top, right, bottom

    @property
    def covered(self) -> Tensor:
        """(H, W) bool: the original pixels whose centre lies inside the crop."""
        rows, columns = (torch.from_numpy(axis.covered) for axis in self._axes)
        return rows[:, None] & columns

    def to_original(self, scores: Tensor) -> Tensor:
        """Bring scores of the model input to the pixels of the photograph.

        Bilinear in the covered box, with the border repeated; along an axis where the original is smaller than the
        input, a triangle filter as wide as an original pixel (antialiasing). A constant map stays exactly constant.
        Scores of zero padding are left out.

        Args:
            scores: (..., h, w), the input size.

        Returns:
            (..., H, W) float32; NaN where the model does not see the photograph (`covered` is False).
        """
        self._check(scores, "scores", self.input_size, "the input size")
        vertical, horizontal = self._axes
        rows, columns = np.flatnonzero(vertical.covered), np.flatnonzero(horizontal.covered)
        # Rows last: they are what grows to the photograph's size, and whole rows are quick to copy.
        inside = _resample(scores.float(), horizontal.triangle_taps(columns), dim=-1)
        inside = _resample(inside, vertical.triangle_taps(rows), dim=-2)
        if (len(rows), len(columns)) == self.original_size:
            return inside
        result = inside.new_full((*scores.shape[:-2], *self.original_size), torch.nan)
        if len(rows) and len(columns):
            result[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = inside
        return result

    def to_input(self, mask: Tensor, nearest: bool = False) -> Tensor:
        """Bring a mask of the photograph, such as a bounding box, to the pixels of the model input.

        Each input pixel gets the mean of the mask over the part of the photograph it shows; zero padding gets 0.

        Args:
            mask: (..., H, W), the original size; boolean, or numbers.
            nearest: take the photograph's pixel under the centre of each input pixel instead of a mean.

        Returns:
            (..., h, w) float32; of a boolean mask, boolean: True where at least half of the pixel, or with `nearest`
            its centre, is inside the mask.
        """
        self._check(mask, "mask", self.original_size, "the original size")
        vertical, horizontal = self._axes
        left, top, right, bottom = self.content_box
        down, across = (
            axis.nearest_taps(pixels) if nearest else axis.area_taps(pixels)
            for axis, pixels in ((vertical, np.arange(top, bottom)), (horizontal, np.arange(left, right)))
        )
        shares = _resample(_resample(mask.float(), down, dim=-2), across, dim=-1)
        result = shares.new_zeros((*mask.shape[:-2], *self.input_size))
        result[..., top:bottom, left:right] = shares
        return result >= 0.5 if mask.dtype == torch.bool else result

    @property
    def _axes(self) -> tuple[_Axis, _Axis]:
        left, top, right, bottom = self.crop_box
        return (
            _Axis(self.original_size[0], self.resized_size[0], top, bottom),
            _Axis(self.original_size[1], self.resized_size[1], left, right),
        )

    @staticmethod
    def _check(values: Tensor, name: str, size: tuple[int, int], meaning: str) -> None:
        if values.ndim < 2 or tuple(values.shape[-2:]) != size:
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}; its last two dimensions must be {meaning} {size}."
            )


@dataclass(frozen=True)
class _Taps:
    """Each output value as a weighted mean of a few inputs: indices and weights, both (outputs, taps)."""

    indices: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class _Axis:
    """One axis of the geometry: `original` pixels become `resized` ones, of which start..stop are the input."""

    original: int
    resized: int
    start: int
    stop: int

    @property
    def content(self) -> tuple[int, int]:
        return max(self.start, 0) - self.start, min(self.stop, self.resized) - self.start

    @property
    def covered_interval(self) -> tuple[float, float]:
        return (
            max(self.start, 0) * self.original / self.resized,
            min(self.stop, self.resized) * self.original / self.resized,
        )

    @property
    def covered(self) -> np.ndarray:
        # (j + 0.5) * resized / original in [start, stop), in integers because a centre may lie right on the edge.
        centres = (2 * np.arange(self.original, dtype=np.int64) + 1) * self.resized
        return (centres >= 2 * self.original * self.start) & (centres < 2 * self.original * self.stop)

    def triangle_taps(self, pixels: np.ndarray) -> _Taps:
        """Input pixels that make up the given original ones."""
        scale = self.resized / self.original
        width = max(scale, 1.0)
        centres = (pixels + 0.5) * scale - self.start
        indices = _neighbours(centres - width + 0.5, int(np.ceil(2 * width)))
        weights = np.maximum(1 - np.abs(indices + 0.5 - centres[:, None]) / width, 0)
        return _normalised(indices, weights, *self.content)

    def area_taps(self, pixels: np.ndarray) -> _Taps:
        """Original pixels that make up the given input ones."""
        scale = self.original / self.resized
        lows, highs = (pixels + self.start) * scale, (pixels + self.start + 1) * scale
        indices = _neighbours(lows, int(np.ceil(scale)) + 1)
        overlap = np.minimum(indices + 1, highs[:, None]) - np.maximum(indices, lows[:, None])
        return _normalised(indices, np.maximum(overlap, 0), 0, self.original)

    def nearest_taps(self, pixels: np.ndarray) -> _Taps:
        """The original pixel under the centre of each of the given input ones, in integers as in `covered`."""
        indices = (2 * (pixels + self.start) + 1) * self.original // (2 * self.resized)
        return _Taps(indices[:, None], np.ones((len(pixels), 1), np.float32))


def _neighbours(lows: np.ndarray, count: int) -> np.ndarray:
    return np.floor(lows).astype(np.int64)[:, None] + np.arange(count)


def _normalised(indices: np.ndarray, weights: np.ndarray, start: int, stop: int) -> _Taps:
    weights = np.where((indices >= start) & (indices < stop), weights, 0)
    return _Taps(indices.clip(start, stop - 1), (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def _resample(values: Tensor, taps: _Taps, dim: int) -> Tensor:
    def column(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(values.device)

    nearest = np.take_along_axis(taps.indices, taps.weights.argmax(axis=1)[:, None], axis=1)[:, 0]
    base = values.index_select(dim, column(nearest))
    # Differences from the nearest value, so that equal values give exactly that value whatever the weights' rounding.
    result = base.clone()
    for indices, weights in zip(taps.indices.T, taps.weights.T, strict=True):
        share = column(weights)
        difference = values.index_select(dim, column(indices)).sub_(base)
        result.addcmul_(difference, share if dim == -1 else share[:, None])
    return result


def _definer(image_processor: BaseImageProcessor, method: str) -> str | None:
    return next((base.__name__ for base in type(image_processor).__mro__ if method in vars(base)), None)


def _size_setting(image_processor: BaseImageProcessor, name: str) -> dict[str, int]:
    value = getattr(image_processor, name, None)
    square = name == "crop_size" or getattr(image_processor, "default_to_square", True)
    try:
        return get_size_dict(value, default_to_square=square, param_name=name)
    except ValueError as error:
        raise _unsupported(type(image_processor).__name__, f"has the {name} {value}") from error


def _resized_size(name: str, size: dict[str, int], original_size: tuple[int, int]) -> tuple[int, int]:
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if set(size) == {"shortest_edge", "longest_edge"}:
        resized = get_size_with_aspect_ratio(original_size, size["shortest_edge"], size["longest_edge"])
        if min(resized) < 1:
            raise ValueError(
                f"The image processor {name} cannot resize a photograph of {original_size[0]} x {original_size[1]} "
                f"pixels to {size}; crop the photograph to a less extreme shape."
            )
        return resized
    if set(size) == {"shortest_edge"}:
        image = np.broadcast_to(np.uint8(0), (1, *original_size))
        return get_resize_output_image_size(
            image, size["shortest_edge"], default_to_square=False, input_data_format="channels_first"
        )
    raise _unsupported(name, f"has the size {size}")


def _crop_start(length: int, crop: int, torchvision: bool) -> int:
    # With an odd number of pixels to pad, the PIL backend puts the extra one before the image, torchvision after it.
    if torchvision and crop > length:
        return -((crop - length) // 2)
    return (length - crop) // 2


def _unsupported(name: str, reason: str) -> ValueError:
    return ValueError(
        f"The image processor {name} {reason}, so its scores cannot be mapped to the photograph; supported are "
        "processors that resize by height and width or by the shortest edge and then take a centre crop or none."
    )
