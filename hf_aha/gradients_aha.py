"""Gradient features: what one or a few backward passes say of every pixel, for the gradient-informed explainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .classifier_aha import FrozenClassifier
from .references_aha import Normalization, reference_image


def gradient_maps(
    classifier: FrozenClassifier,
    pixel_values: torch.Tensor,
    target: torch.Tensor,
    normalization: Normalization,
    *,
    references: Sequence[str] = ("blur",),
    points: int = 1,
) -> torch.Tensor:
    """Two maps for each reference: the gradient times (image - reference), and the gradient's length.

    The gradient is that of log p(target), averaged over the midpoints of `points` equal parts of the straight line
    from the reference to the image: integrated gradients with few steps. Each point costs a forward and a backward
    pass of the classifier.

    Args:
        classifier: its weights are only read.
        pixel_values: (B, 3, H, W) normalised pixels.
        target: (B,) int64 class of each image.
        normalization: of the classifier's image processor.
        references: kinds of reference, see `reference_image`.
        points: for each reference, at least 1.

    Returns:
        (B, 2 * len(references), H, W) float32, without gradient, in units of log p: a product's sum over the pixels
        estimates log p(image) - log p(reference). Callers may have gradients switched off, or be in inference mode.

    Example:
        >>> maps = gradient_maps(classifier, pixel_values, target, normalization)  # doctest: +SKIP
        >>> maps.shape  # doctest: +SKIP
        torch.Size([1, 2, 224, 224])

    Reference: integrated gradients (https://arxiv.org/abs/1703.01365) by the midpoint rule.
    """
    maps = []
    # Tensors made in inference mode cannot take part in a backward pass.
    with torch.inference_mode(False):
        image = pixel_values.clone() if pixel_values.is_inference() else pixel_values.detach()
        target = target.clone()
        rgb = normalization.denormalize(image.float())
        for kind in references:
            generator = torch.Generator().manual_seed(0)
            reference = normalization.normalize(reference_image(rgb, kind, generator=generator)).to(image.dtype)
            gradient = torch.zeros_like(image, dtype=torch.float32)
            for point in range(points):
                gradient += _gradient(classifier, torch.lerp(reference, image, (point + 0.5) / points), target)
            gradient /= points
            maps.append((gradient * (image - reference).float()).sum(dim=1))
            maps.append(gradient.square().sum(dim=1).sqrt())
    return torch.stack(maps, dim=1)


def _gradient(classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        leaf = pixel_values.requires_grad_()
        log_probability = classifier(leaf).logits.float().log_softmax(dim=-1)
        return torch.autograd.grad(log_probability.gather(1, target[:, None]).sum(), leaf)[0].float()


__all__ = ["gradient_maps"]
