"""The references of the protocols: what a removed pixel shows, in the classifier's normalised space."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from ..perturbation import Normalization, reference_image
from .protocols import Protocol


def gkern(kernel: int, sigma: float) -> torch.Tensor:
    """RISE's blurring kernel: a dirac in a kernel x kernel box, smoothed by a Gaussian with reflected borders.

    It is not a cut Gaussian: the reflected tails flatten it, so that gkern(11, 5) lies within 0.936..1.069 of the box
    filter and gkern(31, 31) is one to 3e-4.

    Args:
        kernel: side of the box, odd.
        sigma: standard deviation in pixels.

    Returns:
        (kernel, kernel), float32, sum 1; equal to `scipy.ndimage.gaussian_filter` of the dirac.

    Raises:
        ValueError: the side is not odd and positive, or sigma not positive.

    Example:
        >>> flat = gkern(11, 5) * 11**2
        >>> round(flat.min().item(), 3), round(flat.max().item(), 3)
        (0.936, 1.069)

    Reference: RISE, https://github.com/eclique/RISE/blob/master/evaluation.py
    """
    profile = _gkern_profile(kernel, sigma)
    return torch.from_numpy(np.outer(profile, profile).astype(np.float32))


def _gkern_profile(kernel: int, sigma: float) -> np.ndarray:
    """(kernel,) float64: one axis of `gkern`, which is the outer product of two."""
    if kernel < 1 or kernel % 2 == 0 or not sigma > 0:
        raise ValueError(f"gkern needs an odd positive side and a positive sigma, not {kernel} and {sigma}.")
    radius = int(4 * sigma + 0.5)  # where scipy cuts a Gaussian
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    # Reflection about the outer edge of the border pixels has the period of two boxes.
    landing = (kernel // 2 + offsets) % (2 * kernel)
    landing = np.where(landing < kernel, landing, 2 * kernel - 1 - landing)
    return np.bincount(landing, weights / weights.sum(), minlength=kernel)


def gkern_blur(images: torch.Tensor, kernel: int, sigma: float) -> torch.Tensor:
    """Convolve (B, 3, H, W) with `gkern`, zeros beyond the border: in normalised space, borders fade to the mean."""
    profile = torch.from_numpy(_gkern_profile(kernel, sigma)).to(images)
    channels = images.shape[1]
    for shape, padding in (((1, 1, -1, 1), (kernel // 2, 0)), ((1, 1, 1, -1), (0, kernel // 2))):
        images = F.conv2d(images, profile.view(shape).repeat(channels, 1, 1, 1), padding=padding, groups=channels)
    return images


def adaptive_blur(
    images: torch.Tensor,
    probability_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    first: int,
    stride: int,
    last: int,
    probability: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blur each image by gkern(k, k) with the first k that brings its class probability to `probability` or less.

    Args:
        images: (B, 3, H, W) in the space where they are blurred.
        probability_of: blurred images and their rows in the batch -> class probabilities, one an image.
        first, stride, last: k = first, first + stride, .., up to `last`.
        probability: of the scored class, at most.

    Returns:
        the blurred images, and the k of each (0 where none was enough; such an image is left sharp).

    Reference: MDA (https://openreview.net/forum?id=rGP2jbWt0l), `MDATest.py` of its released code.
    """
    blurred, kernels = images.clone(), torch.zeros(len(images), dtype=torch.int64)
    open_rows = torch.arange(len(images))
    for kernel in range(first, last + 1, stride):
        if not len(open_rows):
            break
        candidates = gkern_blur(images[open_rows.to(images.device)], kernel, kernel)
        enough = probability_of(candidates, open_rows).cpu() <= probability
        blurred[open_rows[enough].to(images.device)] = candidates[enough.to(images.device)]
        kernels[open_rows[enough]] = kernel
        open_rows = open_rows[~enough]
    return blurred, kernels


def make_references(
    protocol: Protocol,
    pixel_values: torch.Tensor,
    normalization: Normalization,
    probability_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, dict[int, str]]:
    """The protocol's reference of every image, with the rows that have none and why.

    Args:
        protocol: names the reference, its options and its space.
        pixel_values: (B, 3, H, W) normalised images.
        normalization: the image processor's.
        probability_of: normalised images and their rows in the batch -> probability of the scored class; only the
            adaptive blur asks it.

    Returns:
        (B, 3, H, W) normalised references, dtype of `pixel_values`, and the reasons by row.
    """
    options = dict(protocol.reference_args)
    in_rgb = protocol.space == "rgb"
    images = normalization.denormalize(pixel_values.float()) if in_rgb else pixel_values.float()
    to_input = normalization.normalize if in_rgb else (lambda values: values)
    failed: dict[int, str] = {}
    if protocol.reference == "zero":
        made = torch.zeros_like(images)
    elif protocol.reference == "black":
        made = reference_image(images, "black")
    elif protocol.reference == "mean_rgb":
        made = reference_image(images, "mean", mean_rgb=options["rgb"])
    elif options["recipe"] == "gaussian":
        made = reference_image(images, "blur", blur_sigma=options["sigma_of_side"])
    elif options["recipe"] == "gkern":
        made = gkern_blur(images, options["kernel"], options["sigma"])
    else:
        search = {name: options[name] for name in ("first", "stride", "last", "probability")}
        made, kernels = adaptive_blur(images, lambda blurred, rows: probability_of(to_input(blurred), rows), **search)
        failed = {row: no_blur_reason(**search) for row in torch.nonzero(kernels == 0)[:, 0].tolist()}
    return to_input(made).to(pixel_values.dtype), failed


def no_blur_reason(first: int, stride: int, last: int, probability: float) -> str:
    """Why an image is left out for which `adaptive_blur` found none."""
    sizes = f"{first}, {first + stride}, .., {last}"
    return f"no blur of {sizes} pixels brings the probability of its class to {probability:g}"
