"""What a removed pixel becomes: reference images, in RGB and as a classifier's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


REFERENCES = ("black", "mean", "blur", "noise")
"""What a removed pixel may become; [`reference_image`] says what each of them is."""

IMAGENET_MEAN_RGB = (0.485, 0.456, 0.406)
"""Mean colour of ImageNet, RGB in [0, 1]: the reference `"mean"`."""


@dataclass(frozen=True)
class Normalization:
    """The image processor's affine map between RGB in [0, 1] and the classifier's input.

    Args:
        mean: per-channel mean of RGB in [0, 1].
        std: per-channel standard deviation.

    Example:
        >>> norm = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        >>> norm.normalize(torch.ones(1, 3, 2, 2)).max().item()
        1.0
    """

    mean: Sequence[float]
    std: Sequence[float]

    def normalize(self, rgb: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) RGB in [0, 1] -> classifier input."""
        return (rgb - self._column(self.mean, rgb)) / self._column(self.std, rgb)

    def denormalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(..., 3, H, W) classifier input -> RGB in [0, 1]."""
        return pixel_values * self._column(self.std, pixel_values) + self._column(self.mean, pixel_values)

    @staticmethod
    def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def reference_image(
    rgb: torch.Tensor,
    kind: str,
    *,
    blur_sigma: float = 0.05,
    mean_rgb: Sequence[float] = IMAGENET_MEAN_RGB,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """What a removed pixel becomes.

    Args:
        rgb: (B, 3, H, W) images in RGB, [0, 1].
        kind: `"black"`; `"mean"`, one colour, the ImageNet mean as in the paper; `"blur"`, a Gaussian blur of the
            image with reflected borders; `"noise"`, uniform RGB noise, independent per pixel and channel.
        blur_sigma: standard deviation of the blur as a share of the shorter side.
        mean_rgb: colour of `"mean"`.
        generator: of the noise; lives on the CPU so that every device draws the same.

    Returns:
        (B, 3, H, W), RGB in [0, 1], dtype of `rgb`.

    Raises:
        ValueError: unknown kind.

    Reference: AHA (https://arxiv.org/abs/2604.05819) trains on black, mean and blur; its blur is sigma 37 px at 224.
    """
    if kind == "black":
        return torch.zeros_like(rgb)
    if kind == "mean":
        colour = torch.tensor(mean_rgb, dtype=rgb.dtype, device=rgb.device)
        return colour[None, :, None, None].expand_as(rgb)
    if kind == "blur":
        return gaussian_blur(rgb, blur_sigma * min(rgb.shape[-2:]))
    if kind == "noise":
        return torch.rand(rgb.shape, generator=generator, dtype=torch.float32).to(rgb)
    raise ValueError(f"Unknown reference {kind!r}; choose among {', '.join(REFERENCES)}.")


def gaussian_blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Separable Gaussian blur of (B, C, H, W), cut at three sigma, borders reflected; sigma in pixels."""
    if sigma <= 0:
        return x
    for axis in (-2, -1):
        # Reflection cannot reach further than the image itself, so the kernel of a tiny image is cut shorter.
        radius = min(max(1, round(3 * sigma)), x.shape[axis] - 1)
        if radius == 0:
            continue
        offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = kernel / kernel.sum()
        shape = (1, 1, -1, 1) if axis == -2 else (1, 1, 1, -1)
        padding = (0, 0, radius, radius) if axis == -2 else (radius, radius, 0, 0)
        channels = x.shape[1]
        x = F.conv2d(F.pad(x, padding, mode="reflect"), kernel.view(shape).repeat(channels, 1, 1, 1), groups=channels)
    return x


def spread_cells(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Every pixel takes its cell's mask, (B, S, rows, columns) -> (B, S, H, W); borders as in a nearest resize."""
    return F.interpolate(masks, size=size, mode="nearest-exact")


__all__ = ["IMAGENET_MEAN_RGB", "REFERENCES", "Normalization", "gaussian_blur", "reference_image", "spread_cells"]
