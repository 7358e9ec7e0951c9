"""What every baseline has in common: its call shape, its cost, and that it leaves the classifier as it was."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from ..classifier_aha import FrozenClassifier
from ..perturbation import gaussian_blur


BASELINE_IMAGES = ("zero", "blur")

OUTPUTS = ("probability", "logit")

_BLUR_SHARE = 0.05


class MissingLibraryError(ImportError):
    """A method needs a library that is not installed; the message says how to install it."""


class Passes(NamedTuple):
    """Images that go through the classifier for one map: `forward`, and back through it: `backward`."""

    forward: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One attribution method with its settings: `method(classifier, pixel_values, target) -> scores`.

    A call leaves the classifier as it found it: weights, hooks, mode, attention implementation and gradient flags, and
    also the caller's pixels, gradient mode and random states. The scores of an image do not depend on the images
    beside it in the batch, and the same call gives the same scores again.

    A subclass must define `title`, `source`, `name`, `passes` and `_scores`. It may override `signed`,
    `class_specific`, `library`, `one_by_one` and `repeats`. Its dataclass fields are its settings.

    Class attributes:
        title: the name in tables.
        source: the paper.
        signed: negative scores speak against the class; otherwise scores are zero or more.
        class_specific: the map depends on the class asked about.
        library: the package that computes it; None where this package does.
        one_by_one: images are explained one at a time, because one of them already makes full batches.

    Args:
        max_batch: images (or perturbed copies) in one forward pass.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    signed: ClassVar[bool] = True
    class_specific: ClassVar[bool] = True
    library: ClassVar[str | None] = None
    one_by_one: ClassVar[bool] = False

    max_batch: int = 16

    def __post_init__(self) -> None:
        check_positive("max_batch", self.max_batch)

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in `METHODS`."""

    @abstractmethod
    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        """Cost of one map of an image of `grid` patches for a classifier whose tokens are `width` wide.

        The defaults are those of a ViT-B/16 at 224 pixels; most methods depend on neither.
        """

    @abstractmethod
    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The scores (b, H, W) of checked images: at most `max_batch`, or one where `one_by_one`; no gradient mode."""

    @property
    def forward_passes(self) -> int:
        """Images through the classifier for one map, for a ViT-B/16 at 224 pixels."""
        return self.passes().forward

    @property
    def backward_passes(self) -> int:
        """Images back through the classifier for one map, for a ViT-B/16 at 224 pixels."""
        return self.passes().backward

    def repeats(self) -> tuple[Method, ...]:
        """What to measure in its place, the values of each image averaged: itself, but five orders for `random`."""
        return (self,)

    def __call__(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Explain every image for its class.

        Args:
            classifier: the model asked.
            pixel_values: (B, 3, H, W), floating, finite, normalised, on the classifier's device.
            target: (B,) integers, the class each image is asked about.

        Returns:
            (B, H, W) float32 on the device of the pixels; higher = more important, no gradient.

        Raises:
            ValueError: the images or the classes do not fit.
            MissingLibraryError: the library of the method is not installed.
            UnsupportedClassifierError: the classifier does not show what the method reads.
        """
        check_images(classifier, pixel_values, target)
        size = 1 if self.one_by_one else self.max_batch
        # Outside inference mode, since a gradient cannot be had of what was made inside.
        with torch.inference_mode(False), torch.no_grad():
            images, classes = pixel_values.detach().clone(), target.detach().clone().long().to(pixel_values.device)
            found = [
                self._scores(classifier, images[start : start + size], classes[start : start + size]).detach().float()
                for start in range(0, len(images), size)
            ]
            return torch.cat([*found, images.new_zeros(0, *images.shape[-2:], dtype=torch.float32)])


def check_images(classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> None:
    """Refuse what no method can explain.

    Raises:
        TypeError: `classifier` is not a `FrozenClassifier`.
        ValueError: the images have another shape, dtype or device, are not finite or do not fit the patches, or the
            classes have another shape or dtype or do not exist.
    """
    if not isinstance(classifier, FrozenClassifier):
        raise TypeError(f"classifier is a {type(classifier).__name__}; wrap the model: FrozenClassifier(model).")
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)} and dtype {pixel_values.dtype}, but must be floating "
            "and (batch, 3, height, width)."
        )
    classifier.grid(*pixel_values.shape[-2:])
    if not bool(torch.isfinite(pixel_values).all()):
        raise ValueError("pixel_values holds NaN or infinite values; look at the image and its processor.")
    if target.shape != pixel_values.shape[:1] or target.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"target has shape {tuple(target.shape)} and dtype {target.dtype}, but must be "
            f"({len(pixel_values)},) integers, one class an image."
        )
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classifier.num_labels:
        raise ValueError(
            f"target asks about classes {int(target.min())} to {int(target.max())}, but this classifier has the "
            f"classes 0 to {classifier.num_labels - 1}."
        )


def check_positive(name: str, value: object) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, but must be a positive integer.")


def check_share(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a number above 0 and below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{name} is {value!r}, but must be a number between 0 and 1.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(choices)}.")


def import_library(module: str, package: str, method: str) -> ModuleType:
    """Import `module`, or say in one sentence how to install its `package`.

    Raises:
        MissingLibraryError: a module is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            f"The method {method!r} needs {package} (no module {error.name!r} here): pip install hf-aha[bench]",
            name=error.name,
        ) from error


def baseline_image(pixel_values: torch.Tensor, kind: str) -> torch.Tensor:
    """What an absent pixel looks like, (B, 3, H, W) in normalised space.

    Args:
        pixel_values: (B, 3, H, W) normalised images.
        kind: `"zero"`, the mean colour of the classifier's training images; `"blur"`, a Gaussian blur with a standard
            deviation of 5% of the shorter side, borders reflected. Its weights sum to one, so it is the same in RGB.

    Raises:
        ValueError: another kind.

    Example:
        >>> baseline_image(torch.ones(1, 3, 4, 4), "zero").abs().max().item()
        0.0
    """
    check_choice("baseline", kind, BASELINE_IMAGES)
    if kind == "zero":
        return torch.zeros_like(pixel_values)
    return gaussian_blur(pixel_values, _BLUR_SHARE * min(pixel_values.shape[-2:]))


class ClassifierOutput(nn.Module):
    """The classifier as libraries want it: pixels (N, 3, H, W) -> (N, C) float32, differentiable.

    Args:
        classifier: the model asked.
        output: `"logit"`, or `"probability"`, the softmax of the logits.

    Raises:
        ValueError: another output.
    """

    def __init__(self, classifier: FrozenClassifier, output: str = "logit") -> None:
        super().__init__()
        check_choice("output", output, OUTPUTS)
        self.classifier, self.output = classifier, output

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits = self.classifier(pixel_values).logits.float()
        return logits if self.output == "logit" else logits.softmax(-1)


def class_probabilities(
    classifier: FrozenClassifier, images: Iterator[torch.Tensor] | torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Probability (N,), float32, of one class for all images, given as batches (n, 3, H, W) or as one batch."""
    batches = (images,) if isinstance(images, torch.Tensor) else images
    return torch.cat([classifier(batch).logits.float().softmax(-1)[:, target] for batch in batches])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Fix the random numbers of torch and numpy inside, and put the caller's states back at the end."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(state)


def patch_numbers(grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """The patch every pixel belongs to, row by row: (H, W) int64.

    Example:
        >>> patch_numbers((1, 2), (1, 4)).tolist()
        [[0, 0, 1, 1]]
    """
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    return numbers.repeat_interleave(size[0] // grid[0], 0).repeat_interleave(size[1] // grid[1], 1)


def upsample(patch_scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scores of patches (B, gh, gw) at the pixels (B, H, W), bilinear, so that the order within a patch is no tie."""
    return nn.functional.interpolate(patch_scores[:, None].float(), size=size, mode="bilinear")[:, 0]
