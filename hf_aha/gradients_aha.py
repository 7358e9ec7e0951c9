"""Gradient features: what one or a few backward passes say of every pixel, for the gradient-informed explainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .classifier_aha import FrozenClassifier
from .references_aha import Normalization, reference_image, spread_cells


def gradient_maps(
    classifier: FrozenClassifier,
    pixel_values: torch.Tensor,
    target: torch.Tensor,
    normalization: Normalization,
    *,
    references: Sequence[str] = ("blur",),
    points: int = 1,
    layers: Sequence[int] = (),
) -> torch.Tensor:
    """For each point between a reference and the image, the gradient times (image - reference), and its length.

    The gradient is that of log p(target) at the midpoints of `points` equal parts of the straight line from the
    reference to the image: the products' mean over the points is integrated gradients with few steps. Each point
    costs a forward and a backward pass of the classifier. They are given one by one, for the decoder to weigh.

    The same passes attribute to the tokens of any layer: their gradient times their change from point to point,
    summed over the channels and along the path.

    Args:
        classifier: its weights are only read.
        pixel_values: (B, 3, H, W) normalised pixels.
        target: (B,) int64 class of each image.
        normalization: of the classifier's image processor.
        references: kinds of reference, see `reference_image`.
        points: for each reference, at least 1.
        layers: whose tokens to attribute to, from 1; two points at least.

    Returns:
        (B, (2 * points + len(layers)) * len(references), H, W) float32, without gradient. First the products of every
        reference and point, whose sum over the pixels, averaged over the points, estimates log p(image) -
        log p(reference); then the gradients' lengths in the same order; then for every reference and layer a map
        that is constant over each patch. Callers may have gradients switched off, or be in inference mode.

    Example:
        >>> maps = gradient_maps(classifier, pixel_values, target, normalization)  # doctest: +SKIP
        >>> maps.shape  # doctest: +SKIP
        torch.Size([1, 2, 224, 224])

    Raises:
        ValueError: layers with fewer than two points, or a layer that does not exist.

    Reference: integrated gradients (https://arxiv.org/abs/1703.01365) by the midpoint rule; of hidden units, as in
    https://arxiv.org/abs/1805.12233.
    """
    if layers and points < 2:
        raise ValueError(f"Attributions of layers {list(layers)} need two points at least, but points is {points}.")
    products, lengths, token_maps = [], [], []
    # Tensors made in inference mode cannot take part in a backward pass.
    with torch.inference_mode(False):
        image = pixel_values.clone() if pixel_values.is_inference() else pixel_values.detach()
        target = target.clone()
        rgb = normalization.denormalize(image.float())
        for kind in references:
            generator = torch.Generator().manual_seed(0)
            reference = normalization.normalize(reference_image(rgb, kind, generator=generator)).to(image.dtype)
            found = [
                _gradients(classifier, torch.lerp(reference, image, (point + 0.5) / points), target, layers)
                for point in range(points)
            ]
            products += [(gradient * (image - reference).float()).sum(dim=1) for gradient, _, _ in found]
            lengths += [gradient.square().sum(dim=1).sqrt() for gradient, _, _ in found]
            for place in range(len(layers)):
                tokens, gradients = (torch.stack([one[part][place] for one in found]) for part in (1, 2))
                # By how much the tokens change over each point's own part of the path.
                changes = torch.gradient(tokens, dim=0)[0]
                token_maps.append((gradients * changes).sum(dim=(0, -1)))
    maps = torch.stack(products + lengths, dim=1)
    if not token_maps:
        return maps
    return torch.cat([maps, spread_cells(torch.stack(token_maps, dim=1), maps.shape[-2:])], dim=1)


def _gradients(
    classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor, layers: Sequence[int]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Gradient of log p with respect to the pixels; the layers' patch tokens (B, gh, gw, D); their gradients."""
    with torch.enable_grad():
        leaf = pixel_values.requires_grad_()
        logits, states = classifier.states(leaf, layers)
        log_probability = logits.float().log_softmax(dim=-1).gather(1, target[:, None]).sum()
        # A layer's other tokens may have no influence.
        gradients = torch.autograd.grad(log_probability, [leaf, *states], materialize_grads=True)
    grid = classifier.grid(*leaf.shape[-2:])
    tokens, token_gradients = (
        [classifier.patch_tokens(state.detach(), grid).float() for state in group] for group in (states, gradients[1:])
    )
    return gradients[0].float(), tokens, token_gradients


__all__ = ["gradient_maps"]
