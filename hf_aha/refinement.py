"""Test-time refinement: a few gradient steps on one image's own deletion and insertion curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .modeling_aha import AhaExplainer
from .perturbation import REFERENCES
from .refinement_curves import MeasuredCurves, most_sensitive
from .refinement_scopes import DECODER_LAYERS, MAKE_SCOPE, Render, Start, make_start, plain_cost


SCOPES = ("scores", "latent", "decoder")
"""What refinement may move: the map, the decoder's tokens on the patch grid, or a copy of its last layers."""

LEARNING_RATES: Mapping[str, float] = {"scores": 0.4, "latent": 0.05, "decoder": 0.02}
"""Default step of each scope: root mean square of the first update, in units of what the scope moves."""

ADAPTIVE_TOLERANCE = 4e-4
"""Gain in `value` per pass under which an adaptive refinement leaves an image: 0.03 for five updates."""

_MOMENTUM, _SECOND_MOMENTUM, _EPSILON = 0.8, 0.9, 1e-8
_MEASURED_EVERY = 5  # updates of an adaptive run


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
        best_values (`torch.FloatTensor` of shape `(batch, measurements)`): `value` as it rose, from `initial_value`
            on; once an image is finished it stays.
        best_passes (`torch.LongTensor` of shape `(batch, measurements)`): passes of a run that ends with this
            measurement; of an image that is finished, those spent on it.
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
    best_values: torch.FloatTensor | None = None
    best_passes: torch.LongTensor | None = None


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
    adaptive: bool = False,
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
        adaptive: spend passes where they bring most. Every fifth map is measured; the gradient is that of soft masks,
            which leads further, at the third of the perturbed images that reacted most when they were last measured;
            and images that gain little are finished early (`tolerance`).
        tolerance: an image is finished when its gain in `value` per pass over the last three steps (five when
            `adaptive`) falls under this; it then costs no more passes. Left out, never, or `ADAPTIVE_TOLERANCE` when
            `adaptive`.
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
    _check_arguments(steps, reference, scope, learning_rate, curve_points, adaptive, tolerance, max_passes, max_batch)
    plan, plain = _Plan(curve_points, adaptive), plain_cost(explainer, against is not None)
    if max_passes is not None:
        if max_passes < plain + plan.cost(0):
            raise ValueError(
                f"max_passes is {max_passes}, but measuring the plain map alone takes {plain + plan.cost(0)}; "
                "give at least that many, or fewer curve_points."
            )
        # A step costs at least one pass.
        steps = min(steps, max_passes)
        while plain + plan.cost(steps) > max_passes:
            steps -= 1
    if tolerance is None and adaptive:
        tolerance = ADAPTIVE_TOLERANCE
    rate = LEARNING_RATES[scope] if learning_rate is None else learning_rate
    # Tensors made in inference mode cannot take part in a backward pass, so everything is made outside of it.
    with torch.inference_mode(False):
        pixel_values = pixel_values.clone() if pixel_values.is_inference() else pixel_values.detach()
        target, against = (
            classes.clone() if isinstance(classes, torch.Tensor) else classes for classes in (target, against)
        )
        with torch.no_grad():
            start = make_start(explainer, pixel_values, target, against, reference, seed)
            offsets, render = MAKE_SCOPE[scope](explainer, start)
        curves = MeasuredCurves(explainer, start, curve_points, max_batch)
        return _search(start, curves, _Descent(offsets, rate), render, plan, steps, tolerance)


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


@dataclass(frozen=True)
class _Plan:
    """What a step measures, and at how many perturbed images its gradient is taken.

    Without `adaptive`, every map is measured at all points of both curves, and the same passes give the gradient of
    all of them. With it, every fifth map is measured, and each gradient is that of soft masks at the third of the
    perturbed images that reacted most when they were last measured: where the classifier is sure, none comes back.
    """

    points: int
    adaptive: bool

    @property
    def window(self) -> int:
        """Measurements over which the gain per pass is taken: one step may well lose what the next two win."""
        return 1 if self.adaptive else 3

    def is_measured(self, step: int, last: bool) -> bool:
        """Whether the map before this update has a value."""
        return last or not self.adaptive or step % _MEASURED_EVERY == 0

    @property
    def followed(self) -> int:
        """Perturbed images that an update's gradient is taken of."""
        return math.ceil(2 * self.points / 3) if self.adaptive else 2 * self.points

    @property
    def update_cost(self) -> int:
        """Passes of an update, besides measuring: soft masks take a forward pass of their own."""
        return 2 * self.followed if self.adaptive else self.followed

    def cost(self, steps: int) -> int:
        """Passes of a run of this many updates, besides those of the plain explanation."""
        measured = sum(self.is_measured(step, step == steps) for step in range(steps + 1))
        return 2 * self.points * measured + self.update_cost * steps


def _search(
    start: Start,
    curves: MeasuredCurves,
    descent: _Descent,
    render: Render,
    plan: _Plan,
    steps: int,
    tolerance: float | None,
) -> RefinementOutput:
    batch, device = len(start.scores), start.scores.device
    scores = start.scores.clone()
    steps_taken = torch.zeros(batch, dtype=torch.long, device=device)
    passes = torch.full(
        (batch,), plain_cost(curves.explainer, start.against is not None), dtype=torch.long, device=device
    )
    # One entry a measurement: the best values of all images, and the passes until then.
    values: list[torch.Tensor] = []
    known_at: list[torch.Tensor] = []
    sensitivity = torch.zeros(batch, 2, plan.points, device=device)
    rows = torch.arange(batch, device=device)
    for step in range(steps + 1):
        last = step == steps
        # The first map is the plain one to the last bit, also where the scope computes it in another order.
        with torch.no_grad():
            tried = start.scores[rows] if step == 0 else render(descent.offsets, rows)
        steps_taken[rows] = step
        gradient = None
        if plan.is_measured(step, last):
            found = curves.measure(tried, rows, with_gradient=not last and not plan.adaptive)
            passes[rows] += 2 * plan.points
            best = values[-1].clone() if values else found.values.clone()
            better = found.values > best[rows]
            best[rows[better]] = found.values[better]
            scores[rows[better]] = tried[better]
            values.append(best)
            known_at.append(passes.clone())
            sensitivity[rows], gradient = found.sensitivity, found.gradient
            if gradient is not None:
                passes[rows] += plan.update_cost
            if not last and tolerance is not None and len(values) > plan.window:
                gained, paid = (entries[-1][rows] - entries[-1 - plan.window][rows] for entries in (values, known_at))
                going = gained >= tolerance * paid
                rows, tried, gradient = rows[going], tried[going], None if gradient is None else gradient[going]
                descent.keep(going)
        if last or not len(rows):
            break
        if gradient is None:
            gradient = curves.soft_gradient(tried, rows, most_sensitive(sensitivity[rows], plan.followed))
            passes[rows] += plan.update_cost
        with torch.enable_grad():
            drawn = render(descent.leaves(), rows)
        descent.update(torch.autograd.grad(drawn, descent.offsets, gradient))
    return RefinementOutput(
        scores=scores,
        initial_scores=start.scores,
        logits=start.logits,
        target=start.target,
        against=start.against,
        value=values[-1],
        initial_value=values[0],
        gain=values[-1] - values[0],
        steps_taken=steps_taken,
        passes=passes,
        best_values=torch.stack(values, dim=1),
        best_passes=torch.stack(known_at, dim=1),
    )


def _check_arguments(
    steps: int,
    reference: str,
    scope: str,
    learning_rate: float | None,
    curve_points: int,
    adaptive: bool,
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
    if not isinstance(adaptive, bool):
        raise ValueError(f"adaptive must be True or False, but it is {adaptive!r}.")
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, but it is {reference!r}.")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, but it is {scope!r}.")
    for name, value in (("learning_rate", learning_rate), ("tolerance", tolerance)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, or None, but it is {value!r}.")


__all__ = ["ADAPTIVE_TOLERANCE", "DECODER_LAYERS", "LEARNING_RATES", "SCOPES", "RefinementOutput", "refine"]
