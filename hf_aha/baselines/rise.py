"""RISE: the class probability of randomly masked images, averaged over the masks that show a pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..classifier_aha import FrozenClassifier
from .base import Method, Passes, check_positive, check_share, class_probabilities


@dataclass(frozen=True, kw_only=True)
class RISE(Method):
    """S = sum_i p(c | x * M_i) M_i / (masks * keep) over random smooth masks M_i.

    A mask is a `cells` x `cells` grid of independent zeros and ones (one with probability `keep`), enlarged bilinearly
    by one cell more than the image and cut out at a random offset. A hidden pixel shows zero in normalised space, the
    mean colour. Every image gets the same masks.

    Args:
        masks: number of masks; the paper takes 4,000 for VGG-16 and 8,000 for ResNet-50. With few, the map is noise.
        cells: cells a side.
        keep: probability that a cell is shown.
        seed: of the masks.
    """

    title: ClassVar[str] = "RISE"
    source: ClassVar[str] = "https://arxiv.org/abs/1806.07421"
    signed: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = True
    name = "rise"

    masks: int = 4000
    cells: int = 7
    keep: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("masks", self.masks)
        check_positive("cells", self.cells)
        check_share("keep", self.keep)

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(self.masks, 0)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros(pixel_values.shape[-2:], device=pixel_values.device)
        for start in range(0, self.masks, self.max_batch):
            count = min(self.max_batch, self.masks - start)
            masks = self.draw_masks(count, tuple(pixel_values.shape[-2:]), generator).to(pixel_values.device)
            probability = class_probabilities(
                classifier, pixel_values * masks[:, None].to(pixel_values.dtype), target[0]
            )
            total += torch.einsum("n,nhw->hw", probability, masks)
        return total[None] / (self.masks * self.keep)

    def draw_masks(self, count: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        """Masks (count, H, W), float32 in [0, 1]; the generator lives on the CPU, so every device draws the same.

        Example:
            >>> masks = RISE(cells=2).draw_masks(3, (8, 8), torch.Generator().manual_seed(0))
            >>> tuple(masks.shape), bool(((masks >= 0) & (masks <= 1)).all())
            ((3, 8, 8), True)
        """
        height, width = size
        cell = (-(-height // self.cells), -(-width // self.cells))
        shown = (torch.rand(count, 1, self.cells, self.cells, generator=generator) < self.keep).float()
        offsets = [torch.randint(length, (count,), generator=generator).tolist() for length in cell]
        side = tuple((self.cells + 1) * length for length in cell)
        # Weights of a blend may sum to a little more than one.
        enlarged = F.interpolate(shown, size=side, mode="bilinear")[:, 0].clamp(0, 1)
        return torch.stack(
            [enlarged[i, y : y + height, x : x + width] for i, (y, x) in enumerate(zip(*offsets, strict=True))]
        )
