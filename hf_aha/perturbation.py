"""Removing and revealing pixels: random references, granularity, deletion and insertion images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .draws import Generators, draw_rows
from .references_aha import (
    IMAGENET_MEAN_RGB,
    REFERENCES,
    Normalization,
    gaussian_blur,
    reference_image,
    spread_cells,
)


def random_references(
    rgb: torch.Tensor, kinds: Sequence[str], generator: Generators, *, blur_sigma: float = 0.05
) -> torch.Tensor:
    """One reference an image, its kind drawn uniformly from `kinds`: (B, 3, H, W), RGB in [0, 1]."""

    def draw(shape: Sequence[int], own: torch.Generator | None) -> torch.Tensor:
        return torch.randint(len(kinds), tuple(shape), generator=own)

    drawn = draw_rows(draw, (len(rgb),), generator).tolist()
    references = torch.empty_like(rgb)
    one = None if isinstance(generator, Sequence) else generator
    for index, kind in enumerate(kinds):
        rows = [row for row, choice in enumerate(drawn) if choice == index]
        if kind == "noise" and isinstance(generator, Sequence):
            for row in rows:
                references[row] = reference_image(rgb[row : row + 1], kind, generator=generator[row])[0]
        elif rows:
            references[rows] = reference_image(rgb[rows], kind, blur_sigma=blur_sigma, generator=one)
    return references


def pool_to_cells(scores: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    """Mean score of each cell of a rows x columns grid: (B, H, W) -> (B, rows, columns)."""
    return F.adaptive_avg_pool2d(scores[:, None], cells)[:, 0]


def deletion_images(image: torch.Tensor, reference: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Remove the masked pixels: (B, 3, H, W), (B, 3, H, W), masks (B, S, H, W) in [0, 1] -> (B, S, 3, H, W).

    The blend is linear, hence the same in RGB and in normalised space.
    """
    return torch.lerp(image[:, None], reference[:, None], masks[:, :, None])


def perturbed_batch_size(device: torch.device) -> int:
    """Perturbed images in a pass of the classifier, where the caller names no number: 10 on a CPU, 128 elsewhere.

    On CPUs the activations of a few images stay in the caches;
    `benchmarks/deletion_insertion.py --max-batch` compares.

    Example:
        >>> perturbed_batch_size(torch.device("cpu"))
        10
    """
    return 10 if device.type == "cpu" else 128


def insertion_images(image: torch.Tensor, reference: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Reveal the masked pixels on the reference; shapes as `deletion_images`."""
    return torch.lerp(reference[:, None], image[:, None], masks[:, :, None])


__all__ = [
    "IMAGENET_MEAN_RGB",
    "REFERENCES",
    "Normalization",
    "deletion_images",
    "gaussian_blur",
    "insertion_images",
    "perturbed_batch_size",
    "pool_to_cells",
    "random_references",
    "reference_image",
    "spread_cells",
]
