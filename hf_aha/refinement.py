"""Test-time refinement: a few gradient steps on one image's own deletion and insertion curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .contrast_aha import contrast_scores
from .decoder_aha import AttributionDecoder, DecoderFeatures
from .modeling_aha import AhaExplainer, _check_finite
from .perturbation import REFERENCES, Normalization, deletion_images, insertion_images, reference_image
from .ranking import make_ranker


SCOPES = ("scores", "latent", "decoder")
"""What refinement may move: the map, the decoder's tokens on the patch grid, or a copy of its last layers."""

LEARNING_RATES: Mapping[str, float] = {"scores": 0.2, "latent": 0.05, "decoder": 0.02}
"""Default step of each scope: root mean square of the first update, in units of what the scope moves."""

DECODER_LAYERS = ("grid_score", "quarter_block", "quarter_to_half", "half_block", "pixel_score")
"""What the scope `"decoder"` moves: the decoder's layers after its patch grid, and the patch grid's own score."""

# Where training ends by default. Hard masks go forward, so the temperature only sets how wide the gradient reaches.
_TAU = 0.3
# Steps over which the gain per pass is taken: one step may well lose what the next two win.
_WINDOW = 3
_MOMENTUM, _SECOND_MOMENTUM, _EPSILON = 0.8, 0.9, 1e-8


@dataclass
class RefinementOutput(ModelOutput):
    """Output of [`refine`].

    Args:
        scores (`torch.FloatTensor` of shape `(batch, height, width)`): the best map found, float32, unbounded; higher
            is more important; only the order counts.
        initial_scores (`torch.FloatTensor` of shape `(batch, height, width)`): the explainer's own map.
        logits (`torch.FloatTensor` of shape `(batch, num_labels)`): the classifier's.
        target (`torch.LongTensor` of shape `(batch,)`): the classes explained.
        against (`torch.LongTensor` of shape `(batch,)`, *optional*): the classes they were compared with.
        value (`torch.FloatTensor` of shape `(batch,)`): insertion area minus deletion area of `scores`, -1..1; of the
            difference of the two classes' probabilities, hence -2..2, where `against` was given.
        initial_value (`torch.FloatTensor` of shape `(batch,)`): the same of `initial_scores`.
        gain (`torch.FloatTensor` of shape `(batch,)`): `value - initial_value`, never negative.
        steps_taken (`torch.LongTensor` of shape `(batch,)`): updates made.
        passes (`torch.LongTensor` of shape `(batch,)`): classifier passes spent on the image, the plain explanation
            included; a forward pass of one image counts one and a backward pass to its pixels one more.
    """

    scores: torch.FloatTensor | None = None
    initial_scores: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    target: torch.LongTensor | None = None
    against: torch.LongTensor | None = None
    value: torch.FloatTensor | None = None
    initial_value: torch.FloatTensor | None = None
    gain: torch.FloatTensor | None = None
    steps_taken: torch.LongTensor | None = None
    passes: torch.LongTensor | None = None


def refine(
    explainer: AhaExplainer,
    pixel_values: torch.Tensor,
    target: torch.Tensor | int | None = None,
    *,
    against: torch.Tensor | int | None = None,
    steps: int = 10,
    reference: str = "blur",
    scope: str = "scores",
    learning_rate: float | None = None,
    curve_points: int = 9,
    tolerance: float | None = None,
    max_passes: int | None = None,
    seed: int = 0,
    max_batch: int = 40,
) -> RefinementOutput:
    """Improve the maps of single images on the metric itself, and return the best map met, the plain one included.

    Every step measures the curves at shares `k / (curve_points + 1)` with hard masks at pixel level and follows the
    straight-through gradient of deletion minus insertion. The areas by the trapezoid rule differ by just that sum,
    since both curves share both ends, so a step's forward passes are the measurement of its map as well: `value` is
    exact at these points and in the caller's precision (autocast included), and keeping the best cannot lower it.

    Nothing is drawn at random but the reference `"noise"`, one picture of noise per `seed`, the same for every image;
    step sizes and stops are per image too. So an image's map does not depend on its batch, up to rounding. Weights
    are only read, and the caller may have gradients switched off.

    Args:
        explainer: with a classifier attached.
        pixel_values: (B, 3, H, W) pixels as the classifier's image processor makes them.
        target: class index for all images or (B,) one an image; the predicted class when left out.
        against: class for all images or (B,) one an image, as in [`AhaExplainer.forward`]: the curves are then those
            of the target's probability minus this class's.
        steps: most updates an image; 0 only measures the plain map.
        reference: what a removed pixel becomes: `"black"`, `"mean"`, `"blur"` or `"noise"`.
        scope: what moves. `"scores"`: a correction of the map with one value a patch and one a quarter of a patch,
            smoothly enlarged, which cannot scatter single pixels; in standard deviations of the map. `"latent"`: the
            decoder's tokens on the patch grid, in units of their root mean square. `"decoder"`: a copy for each image
            of the weights of `DECODER_LAYERS`, in units of each tensor's root mean square.
        learning_rate: root mean square of an update in these units; `LEARNING_RATES` when left out.
        curve_points: points of each curve between its ends.
        tolerance: an image is finished when its gain in `value` per pass over the last three steps falls under this;
            it then costs no more passes. Never when left out.
        max_passes: most passes an image, counted as in `RefinementOutput.passes`.
        seed: of the reference `"noise"`.
        max_batch: perturbed images a pass of the classifier; bounds memory.

    Returns:
        the maps before and after, what they are worth, and what they cost.

    Raises:
        ValueError: an argument is unknown or out of range, or unusable as in [`AhaExplainer.forward`].
        RuntimeError: no classifier is attached.

    Example:
        >>> refined = refine(explainer, pixel_values, steps=5)  # doctest: +SKIP
        >>> bool((refined.value >= refined.initial_value).all())  # doctest: +SKIP
        True

    Reference: the paper (https://arxiv.org/abs/2604.05819) refines maps at test time without public details; the
    scopes, the keeping of the best map and the stop are ours. NovoGrad (https://arxiv.org/abs/1905.11286) for step
    sizes by the norm of a whole gradient instead of Adam's for each element.
    """
    _check_arguments(steps, reference, scope, learning_rate, curve_points, tolerance, max_passes, max_batch)
    plain_cost, forward_cost = _plain_cost(explainer, against is not None), 2 * curve_points
    if max_passes is not None:
        if max_passes < plain_cost + forward_cost:
            raise ValueError(
                f"max_passes is {max_passes}, but measuring the plain map alone takes {plain_cost + forward_cost}; "
                "give at least that many, or fewer curve_points."
            )
        # A step is a backward pass through the last measurement and the measurement of the new map.
        steps = min(steps, (max_passes - plain_cost - forward_cost) // (2 * forward_cost))
    rate = LEARNING_RATES[scope] if learning_rate is None else learning_rate
    # Tensors made in inference mode cannot take part in a backward pass, so everything is made outside of it.
    with torch.inference_mode(False):
        pixel_values = pixel_values.clone() if pixel_values.is_inference() else pixel_values.detach()
        target, against = (
            classes.clone() if isinstance(classes, torch.Tensor) else classes for classes in (target, against)
        )
        with torch.no_grad():
            start = _start(explainer, pixel_values, target, against, reference, seed)
            offsets, render = _SCOPES[scope](explainer, start)
        curves = _Curves(explainer, start, curve_points, max_batch)
        return _search(start, curves, _Descent(offsets, rate), render, steps, tolerance)


@dataclass(frozen=True)
class _Start:
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
_Render = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


def _start(
    explainer: AhaExplainer,
    pixel_values: torch.Tensor,
    target: torch.Tensor | int | None,
    against: torch.Tensor | int | None,
    reference: str,
    seed: int,
) -> _Start:
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
    return _Start(pixel_values, references, features, class_vectors, gradients, logits, target, against, scores)


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


def _plain_cost(explainer: AhaExplainer, contrast: bool) -> int:
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


def _scores_scope(explainer: AhaExplainer, start: _Start) -> tuple[list[torch.Tensor], _Render]:
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


def _latent_scope(explainer: AhaExplainer, start: _Start) -> tuple[list[torch.Tensor], _Render]:
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


def _decoder_scope(explainer: AhaExplainer, start: _Start) -> tuple[list[torch.Tensor], _Render]:
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


_SCOPES = {"scores": _scores_scope, "latent": _latent_scope, "decoder": _decoder_scope}


# ---------------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class _Curves:
    """Insertion minus deletion area of maps at `points` shares of both curves, and its gradient."""

    explainer: AhaExplainer
    start: _Start
    points: int
    max_batch: int

    def __call__(
        self, scores: torch.Tensor, rows: torch.Tensor, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values (b,) float32 of scores (b, H, W), and d sum(values) / d scores where asked for."""
        size = tuple(scores.shape[-2:])
        ranker = make_ranker("quantile", straight_through=True)
        leaf = scores.detach().requires_grad_(with_gradient)
        masks = ranker(leaf.flatten(1), self.points + 1, torch.arange(1, self.points + 1), tau=_TAU)
        masks = masks.unflatten(-1, size)
        flat = masks.detach().flatten(0, 1)
        images = rows.repeat_interleave(self.points)
        differences, gradients = [], []
        # The graph of the classifier is kept for one chunk at a time.
        for chunk in torch.arange(len(flat), device=flat.device).split(max(1, self.max_batch // 2)):
            mask = flat[chunk].requires_grad_(with_gradient)
            difference = self._difference(mask, images[chunk])
            differences.append(difference.detach())
            if with_gradient:
                gradients += torch.autograd.grad(difference.sum(), mask)
        # The trapezoid rule weighs inner points alike, and both curves share both ends.
        values = torch.cat(differences).unflatten(0, (len(rows), self.points)).sum(dim=1) / (self.points + 1)
        if not with_gradient:
            return values, None
        masks_gradient = torch.cat(gradients).view_as(masks) / (self.points + 1)
        return values, torch.autograd.grad(masks, leaf, masks_gradient)[0]

    def _difference(self, mask: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """(n,) probability with only the masked pixels shown, minus that with them removed; or its lead on another."""
        start = self.start
        image, reference = start.pixel_values[images], start.references[images]
        mask = mask.to(image.dtype)[:, None]
        perturbed = torch.cat([insertion_images(image, reference, mask), deletion_images(image, reference, mask)])
        probability = self.explainer.classifier(perturbed[:, 0]).logits.float().softmax(-1)
        lead = probability.gather(1, start.target[images].repeat(2)[:, None])
        if start.against is not None:
            lead = lead - probability.gather(1, start.against[images].repeat(2)[:, None])
        inserted, deleted = lead[:, 0].chunk(2)
        return inserted - deleted


# ---------------------------------------------------------------------------------------------------- search


class _Descent:
    """Momentum ascent with one step size for each image and tensor, which the norms of its gradients set.

    Element by element, as in Adam, a value that hardly matters would move as far as one that does, and rounding would
    steer it.
    """

    def __init__(self, offsets: list[torch.Tensor], rate: float) -> None:
        self.offsets = offsets
        self.rate = rate
        self.updates = 0
        self.momenta = [torch.zeros_like(offset) for offset in offsets]
        self.squares = [offset.new_zeros(len(offset), *[1] * (offset.ndim - 1)) for offset in offsets]

    def leaves(self) -> list[torch.Tensor]:
        """The offsets as new leaves of a graph."""
        self.offsets = [offset.detach().requires_grad_() for offset in self.offsets]
        return self.offsets

    @torch.no_grad()
    def update(self, gradients: tuple[torch.Tensor, ...]) -> None:
        """Follow the gradients uphill."""
        self.updates += 1
        for place, gradient in enumerate(gradients):
            square = gradient.square().flatten(1).mean(dim=1).view_as(self.squares[place])
            self.momenta[place] = torch.lerp(gradient, self.momenta[place], _MOMENTUM)
            self.squares[place] = torch.lerp(square, self.squares[place], _SECOND_MOMENTUM)
            # Both averages begin at zero; these quotients take that out, as in Adam.
            momentum = self.momenta[place] / (1 - _MOMENTUM**self.updates)
            length = (self.squares[place] / (1 - _SECOND_MOMENTUM**self.updates)).sqrt()
            self.offsets[place] = self.offsets[place] + self.rate * momentum / (length + _EPSILON)

    def keep(self, going: torch.Tensor) -> None:
        """Forget the images that are finished."""
        self.offsets, self.momenta, self.squares = (
            [tensor.detach()[going] for tensor in tensors] for tensors in (self.offsets, self.momenta, self.squares)
        )


def _search(
    start: _Start, curves: _Curves, descent: _Descent, render: _Render, steps: int, tolerance: float | None
) -> RefinementOutput:
    batch, device = len(start.scores), start.scores.device
    forward_cost = 2 * curves.points
    scores = start.scores.clone()
    values = torch.zeros(batch, device=device)
    initial_values = values.clone()
    steps_taken = torch.zeros(batch, dtype=torch.long, device=device)
    plain_cost = _plain_cost(curves.explainer, start.against is not None)
    passes = torch.full((batch,), plain_cost, dtype=torch.long, device=device)
    # The best values of all images before each step, for the stop.
    history: list[torch.Tensor] = []
    rows = torch.arange(batch, device=device)
    for step in range(steps + 1):
        last = step == steps
        with torch.enable_grad():
            drawn = render(descent.leaves(), rows)
            # The first map is the plain one to the last bit, also where the scope computes it in another order.
            tried = start.scores[rows] if step == 0 else drawn.detach()
            value, gradient = curves(tried, rows, with_gradient=not last)
        passes[rows] += forward_cost if last else 2 * forward_cost
        steps_taken[rows] = step
        if step == 0:
            initial_values = value.clone()
            values = value.clone()
        better = value > values[rows]
        values[rows[better]] = value[better]
        scores[rows[better]] = tried[better]
        if last:
            break
        history.append(values.clone())
        gradients = torch.autograd.grad(drawn, descent.offsets, gradient)
        descent.update(gradients)
        if tolerance is not None and len(history) > _WINDOW:
            gained = values[rows] - history[-1 - _WINDOW][rows]
            going = gained >= tolerance * _WINDOW * 2 * forward_cost
            if not bool(going.all()):
                rows = rows[going]
                descent.keep(going)
                if not len(rows):
                    break
    return RefinementOutput(
        scores=scores,
        initial_scores=start.scores,
        logits=start.logits,
        target=start.target,
        against=start.against,
        value=values,
        initial_value=initial_values,
        gain=values - initial_values,
        steps_taken=steps_taken,
        passes=passes,
    )


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B,), 1 where all is zero."""
    size = x.square().flatten(1).mean(dim=1).sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))


def _check_arguments(
    steps: int,
    reference: str,
    scope: str,
    learning_rate: float | None,
    curve_points: int,
    tolerance: float | None,
    max_passes: int | None,
    max_batch: int,
) -> None:
    for name, value, least in (
        ("steps", steps, 0),
        ("curve_points", curve_points, 1),
        ("max_passes", max_passes, 1),
        ("max_batch", max_batch, 1),
    ):
        if value is None and name == "max_passes":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, but it is {value!r}.")
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, but it is {reference!r}.")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, but it is {scope!r}.")
    for name, value in (("learning_rate", learning_rate), ("tolerance", tolerance)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, or None, but it is {value!r}.")


__all__ = ["DECODER_LAYERS", "LEARNING_RATES", "SCOPES", "RefinementOutput", "refine"]
