"""The two baselines that never look at the image: a random order, and the middle of the picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..classifier_aha import FrozenClassifier
from .base import Method, Passes, check_share


RANDOM_SEEDS = (0, 1, 2, 3, 4)
"""Seeds of the five orders that stand for "random" in a table."""


@dataclass(frozen=True, kw_only=True)
class RandomOrder(Method):
    """Independent uniform scores, the same for every image of one size.

    One order is a lottery ticket: `repeats()` gives five of them, whose values a benchmark averages for each image.

    Args:
        seed: of the scores.
    """

    title: ClassVar[str] = "Random order"
    source: ClassVar[str] = "none"
    signed: ClassVar[bool] = False
    class_specific: ClassVar[bool] = False
    name = "random"

    seed: int = 0

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(0, 0)

    def repeats(self) -> tuple[Method, ...]:
        return tuple(dataclasses.replace(self, seed=self.seed + offset) for offset in RANDOM_SEEDS)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(pixel_values.shape[-2:], generator=generator)
        return scores.to(pixel_values.device).expand(len(pixel_values), -1, -1)


@dataclass(frozen=True, kw_only=True)
class CentreGaussian(Method):
    """A Gaussian on the middle of the image: what a photographer's habit alone explains.

    Args:
        sigma: standard deviation as a share of each side; only the ratio of the sides changes the order.
    """

    title: ClassVar[str] = "Centre Gaussian"
    source: ClassVar[str] = "none"
    signed: ClassVar[bool] = False
    class_specific: ClassVar[bool] = False
    name = "centre"

    sigma: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("sigma", self.sigma)

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(0, 0)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        y, x = (((torch.arange(side) + 0.5) / side - 0.5) / self.sigma for side in pixel_values.shape[-2:])
        scores = torch.exp(-(y[:, None] ** 2 + x[None] ** 2) / 2)
        return scores.to(pixel_values.device).expand(len(pixel_values), -1, -1)
