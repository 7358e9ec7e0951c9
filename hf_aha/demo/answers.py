"""What the demo's engine is asked about and what it answers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..explanation import Explanation
from ..geometry import InputGeometry


Mode = Literal["deletion", "insertion"]
MODES = ("deletion", "insertion")


@dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph as the demo keeps it: one to draw, and exactly what the classifier gets of it.

    Attributes:
        digest: names the classifier's input and the size of the original; the key of the caches.
        shown: the photograph, upright, RGB, of a size to draw (`engine.SHOWN_SIDE`).
        pixel_values: (1, 3, h, w) on the explainer's device, made from the original by the image processor.
        geometry: where the input's pixels lie in the original.
    """

    digest: str
    shown: Image.Image
    pixel_values: torch.Tensor
    geometry: InputGeometry

    def to_size(self, scores: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        """Scores (h, w) of the input, in the pixels of a copy of `size` (H, W): float32, NaN outside the crop."""
        return replace(self.geometry, original_size=size).to_original(scores).numpy()

    def to_shown(self, scores: torch.Tensor) -> np.ndarray:
        """Bring scores (h, w) of the input to the pixels of `shown`."""
        return self.to_size(scores, (self.shown.height, self.shown.width))


class ClassProbability(NamedTuple):
    """One class of the classifier and its softmax probability."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True, eq=False)
class Answer:
    """The map of one photograph for one question.

    Attributes:
        photograph: what was asked about.
        explanation: classes, probabilities, and the map in the pixels of `photograph.shown`.
        scores: (h, w) float32 on the CPU, the map on the classifier's input, from which everything else is made.
        ranks: (h * w,) int64 on the explainer's device: 0 for the most important pixel, ties by index.
        key: of the question, for caches.
    """

    photograph: Photograph
    explanation: Explanation
    scores: torch.Tensor
    ranks: torch.Tensor
    key: Hashable


class Perturbed(NamedTuple):
    """A perturbed input and what the classifier says of it.

    `picture` is the classifier's input as an RGB image. `probability` is that of the class asked about,
    `against_probability` that of the class it is compared with, and `value` what the curves show: the first, or the
    first minus the second.
    """

    picture: Image.Image
    probability: float
    against_probability: float | None

    @property
    def value(self) -> float:
        """The height of the curve at this share."""
        return self.probability - (self.against_probability or 0.0)


class OtherMap(NamedTuple):
    """The map (H, W) of another method in the pixels of the shown photograph, and what it cost."""

    name: str
    title: str
    scores: np.ndarray
    forward_passes: int
    backward_passes: int
    seconds: float


class Comparison(NamedTuple):
    """The maps of other methods, and one sentence for each that cannot be computed here."""

    maps: tuple[OtherMap, ...]
    missing: tuple[str, ...]


__all__ = [
    "MODES",
    "Answer",
    "ClassProbability",
    "Comparison",
    "Mode",
    "OtherMap",
    "Perturbed",
    "Photograph",
]
