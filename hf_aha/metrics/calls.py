"""What the metrics ask of an explanation method and of a classifier, and how they call them."""

from __future__ import annotations

from collections.abc import Callable

import torch


Explain = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""pixel_values (B, 3, H, W), target (B,) int64 -> scores (B, H, W), higher = more important."""

LogitsOf = Callable[[torch.Tensor], torch.Tensor]
"""pixel_values (N, 3, H, W) -> logits (N, C), in any dtype."""


def explain_in_batches(
    explain: Explain, pixel_values: torch.Tensor, target: torch.Tensor, batch_size: int = 32
) -> torch.Tensor:
    """Maps of all images, a few at a time.

    Gradients are neither switched off nor kept: a method that needs them finds them as the caller left them, and the
    maps come detached.

    Args:
        explain: the method.
        pixel_values: (B, 3, H, W) normalised images.
        target: (B,) classes.
        batch_size: images a call.

    Returns:
        (B, H, W), float32 (float64 stays), on the device of the maps. They may hold NaN.

    Raises:
        ValueError: the images, the classes or the maps have another shape.
    """
    check_images(pixel_values, target, batch_size)
    parts = []
    for images, classes in zip(pixel_values.split(batch_size), target.split(batch_size), strict=True):
        maps = explain(images, classes)
        check_scores(maps, images)
        parts.append(real_scores(maps.detach()))
    return torch.cat(parts)


@torch.no_grad()
def logits_in_batches(logits_of: LogitsOf, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """(N, C) float32 logits on the CPU, a few images a call."""
    return torch.cat([logits_of(chunk).float().cpu() for chunk in images.split(batch_size)])


def check_images(pixel_values: torch.Tensor, target: torch.Tensor, batch_size: int = 1) -> None:
    """Refuse anything but (B, 3, H, W) floating images, B > 0, with (B,) integer classes.

    Raises:
        ValueError: saying which of them does not fit.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not len(pixel_values):
        raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}, but must be (batch, 3, height, width).")
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values has dtype {pixel_values.dtype}, but must be floating and normalised.")
    if target.shape != pixel_values.shape[:1] or target.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"target has shape {tuple(target.shape)} and dtype {target.dtype}, but must be ({len(pixel_values)},) "
            "integers."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be positive.")


def check_scores(scores: torch.Tensor, pixel_values: torch.Tensor) -> None:
    """Refuse maps that are not one (H, W) an image.

    Raises:
        ValueError: naming both shapes.
    """
    expected = (len(pixel_values), *pixel_values.shape[-2:])
    if tuple(scores.shape) != expected:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, but images of shape {tuple(pixel_values.shape)} need "
            f"{expected}: resize the maps to the pixels of the input."
        )


def check_classes(target: torch.Tensor, count: int) -> None:
    """Refuse a class that the classifier does not have.

    Raises:
        ValueError: naming the class and the number of classes.
    """
    wrong = target[(target < 0) | (target >= count)]
    if len(wrong):
        raise ValueError(
            f"target holds the class {int(wrong[0])}, but the classifier has the classes 0 to {count - 1}."
        )


def real_scores(scores: torch.Tensor) -> torch.Tensor:
    """Scores in float32, or in float64 where they came so or as integers, whose order float32 might lose."""
    if scores.dtype == torch.float64 or not scores.is_floating_point():
        return scores.double()
    return scores.float()


def finite_rows(*values: torch.Tensor) -> torch.Tensor:
    """(B,) bool, true where the row of every tensor (B, ...) is finite."""
    return torch.stack([torch.isfinite(value).flatten(1).all(1).to(values[0].device) for value in values]).all(0)


def only_where(kept: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Float32 values (B, ...) on the CPU, NaN in the rows that are not kept (B,) bool."""
    kept = kept.cpu().view(-1, *[1] * (values.ndim - 1))
    return torch.where(kept, values.detach().float().cpu(), torch.nan)
