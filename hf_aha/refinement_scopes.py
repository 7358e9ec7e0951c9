"""What refinement starts from, and what it may move: the map, the decoder's tokens, or a copy of its last layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from .contrast_aha import contrast_scores
from .decoder_aha import AttributionDecoder, DecoderFeatures
from .modeling_aha import AhaExplainer, _check_finite
from .perturbation import Normalization, reference_image


DECODER_LAYERS = ("grid_score", "quarter_block", "quarter_to_half", "half_block", "pixel_score")
"""What the scope `"decoder"` moves: the decoder's layers after its patch grid, and the patch grid's own score."""


@dataclass(frozen=True)
class Start:
    """What does not change while maps are refined; one row an image.

    Where the target is compared with another class, `class_vectors` (B, 2, D) and `gradients` (B, 2, maps, H, W) hold
    both classes.
    """

    pixel_values: torch.Tensor
    references: torch.Tensor
    features: DecoderFeatures
    class_vectors: torch.Tensor
    gradients: torch.Tensor | None
    logits: torch.Tensor
    target: torch.Tensor
    against: torch.Tensor | None
    scores: torch.Tensor


# Offsets (b, ...) of the images of these rows -> their scores (b, H, W), float32.
Render = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


def make_start(
    explainer: AhaExplainer,
    pixel_values: torch.Tensor,
    target: torch.Tensor | int | None,
    against: torch.Tensor | int | None,
    reference: str,
    seed: int,
) -> Start:
    """The plain explanation, in the steps of `AhaExplainer.forward`, because its features are needed as well."""
    classifier = explainer._require_classifier()
    _check_finite(pixel_values)
    tokens, logits = explainer.features(pixel_values)
    if against is not None:
        target, against = explainer._check_contrast(logits, pixel_values, target, against)
    else:
        target = logits.argmax(dim=-1) if target is None else explainer._check_target(target, pixel_values)
    if target.ndim == 2:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, but refinement takes one class an image; repeat the images for "
            "several."
        )
    features = explainer.decoder.encode(tokens, pixel_values)
    if against is None:
        class_vectors = classifier.class_vectors(target)
        gradients = explainer.gradients(pixel_values, target)
    else:
        class_vectors = classifier.class_vectors(torch.stack([target, against], dim=1))
        gradients = [explainer.gradients(pixel_values, classes) for classes in (target, against)]
        gradients = None if gradients[0] is None else torch.stack(gradients, dim=1)
    scores = _decoded(explainer.decoder.decode, features, class_vectors, gradients)
    references = _references(explainer, pixel_values, reference, seed)
    return Start(pixel_values, references, features, class_vectors, gradients, logits, target, against, scores)


def _decoded(
    decode: Callable[..., torch.Tensor],
    features: DecoderFeatures,
    class_vectors: torch.Tensor,
    gradients: torch.Tensor | None,
) -> torch.Tensor:
    """Scores (b, H, W) float32 of one class an image, or of the first of two rather than the second."""
    if class_vectors.ndim == 2:
        return decode(features, class_vectors, gradients).float()
    of_both = (
        decode(features, class_vectors[:, place], None if gradients is None else gradients[:, place])
        for place in (0, 1)
    )
    return contrast_scores(*of_both)


def plain_cost(explainer: AhaExplainer, contrast: bool) -> int:
    """Passes of a plain explanation; both classes of a contrast share the first."""
    each = explainer.config.passes_per_explanation - 1
    return 1 + (2 * each if contrast else each)


def _references(explainer: AhaExplainer, pixel_values: torch.Tensor, kind: str, seed: int) -> torch.Tensor:
    """Normalised references (B, 3, H, W), dtype of the pixels."""
    normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
    with torch.autocast(pixel_values.device.type, enabled=False):
        rgb = normalization.denormalize(pixel_values.float())
        if kind == "noise":
            # Drawn once and not once an image, so that it does not depend on an image's place in the batch.
            noise = reference_image(rgb[:1], kind, generator=torch.Generator().manual_seed(seed))
            reference = noise.expand_as(rgb)
        else:
            reference = reference_image(rgb, kind)
        return normalization.normalize(reference).to(pixel_values.dtype)


# ---------------------------------------------------------------------------------------------------- what moves


def _scores_scope(explainer: AhaExplainer, start: Start) -> tuple[list[torch.Tensor], Render]:
    batch, height, width = start.scores.shape
    grid = explainer.classifier.grid(height, width)
    deviation = start.scores.flatten(1).std(dim=1, correction=0)
    # A flat map has no unit of its own.
    unit = torch.where(deviation > 0, deviation, torch.ones_like(deviation))[:, None, None]

    def render(offsets: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        correction = sum(
            F.interpolate(offset, size=(height, width), mode="bilinear", align_corners=False) for offset in offsets
        )
        return start.scores[rows] + unit[rows] * correction[:, 0]

    return [start.scores.new_zeros(batch, 1, finer * grid[0], finer * grid[1]) for finer in (1, 2)], render


def _latent_scope(explainer: AhaExplainer, start: Start) -> tuple[list[torch.Tensor], Render]:
    grid = start.features.grid.float()
    unit = _root_mean_square(grid)

    def render(offsets: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        features = start.features.rows(rows)
        moved = grid[rows] + unit[rows][:, None, None, None] * offsets[0]
        features = replace(features, grid=moved.to(features.grid.dtype))
        gradients = None if start.gradients is None else start.gradients[rows]
        return _decoded(explainer.decoder.decode, features, start.class_vectors[rows], gradients)

    return [torch.zeros_like(grid)], render


class _Decode(nn.Module):
    """`AttributionDecoder.decode` as a forward, which is what `functional_call` can call."""

    def __init__(self, decoder: AttributionDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, features: DecoderFeatures, class_vectors: torch.Tensor, gradients: torch.Tensor | None
    ) -> torch.Tensor:
        return self.decoder.decode(features, class_vectors, gradients)


def _decoder_scope(explainer: AhaExplainer, start: Start) -> tuple[list[torch.Tensor], Render]:
    decode = _Decode(explainer.decoder)
    weights = {name: weight.detach() for name, weight in decode.named_parameters()}
    moving = [name for name in weights if name.split(".")[1] in DECODER_LAYERS]
    # Biases begin at zero and would never move in units of themselves.
    units = [max(float(weights[name].float().square().mean().sqrt()), 0.01) for name in moving]

    def render(offsets: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        maps = []
        for place, row in enumerate(rows.tolist()):
            # Weights that do not move are passed on detached, or the graph would reach the stored ones.
            own = dict(weights)
            for name, unit, offset in zip(moving, units, offsets, strict=True):
                own[name] = (weights[name].float() + unit * offset[place]).to(weights[name].dtype)
            one = slice(row, row + 1)
            gradients = None if start.gradients is None else start.gradients[one]
            maps.append(
                _decoded(
                    lambda *inputs, own=own: torch.func.functional_call(decode, own, inputs),
                    start.features.rows(one),
                    start.class_vectors[one],
                    gradients,
                )
            )
        return torch.cat(maps)

    batch = len(start.scores)
    return [weights[name].new_zeros(batch, *weights[name].shape, dtype=torch.float32) for name in moving], render


MAKE_SCOPE = {"scores": _scores_scope, "latent": _latent_scope, "decoder": _decoder_scope}


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B,), 1 where all is zero."""
    size = x.square().flatten(1).mean(dim=1).sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))
