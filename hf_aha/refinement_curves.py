"""What refinement climbs: the deletion and insertion curves of single maps at a few points, and their gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .modeling_aha import AhaExplainer
from .perturbation import insertion_images
from .ranking import make_ranker
from .refinement_scopes import Start


# How wide the gradient of hard masks reaches, and how soft the soft ones are; near where training ends.
_TAU = 0.3
INSERTION, DELETION = 0, 1


@dataclass(frozen=True)
class Measurement:
    """What hard masks found out about the maps of b images; P points on each of the two curves.

    Attributes:
        values: (b,) float32, insertion minus deletion area.
        sensitivity: (b, 2, P), how much each perturbed image's answer reacts to its logits (norm of the derivative),
            0..sqrt(2); near 0 where the classifier is sure, so that no gradient comes back.
        gradient: (b, H, W), the straight-through one of the values by the scores, or None where not asked for.
    """

    values: torch.Tensor
    sensitivity: torch.Tensor
    gradient: torch.Tensor | None


@dataclass(frozen=True)
class MeasuredCurves:
    """Insertion minus deletion area of maps at shares `k / (points + 1)` of both curves, and its gradient."""

    explainer: AhaExplainer
    start: Start
    points: int
    max_batch: int

    def measure(self, scores: torch.Tensor, rows: torch.Tensor, *, with_gradient: bool) -> Measurement:
        """The value of scores (b, H, W), of any float dtype, of the images `rows` (b,), from hard masks."""
        every = torch.ones(len(rows), 2, self.points, dtype=torch.bool, device=scores.device)
        found, gradient = self._differentiate(scores, rows, every, with_gradient, straight_through=True)
        # The trapezoid rule weighs inner points alike, and both curves share both ends.
        values = (found.leads[:, INSERTION] - found.leads[:, DELETION]).sum(dim=1) / (self.points + 1)
        return Measurement(values, found.sensitivity, gradient)

    def soft_gradient(self, scores: torch.Tensor, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """(b, H, W), the gradient by the scores through soft masks at the points `chosen` (b, 2, P) bool alone."""
        return self._differentiate(scores, rows, chosen, True, straight_through=False)[1]

    def _differentiate(
        self,
        scores: torch.Tensor,
        rows: torch.Tensor,
        chosen: torch.Tensor,
        with_gradient: bool,
        *,
        straight_through: bool,
    ) -> tuple[_Found, torch.Tensor | None]:
        ranker = make_ranker("quantile", straight_through=straight_through)
        leaf = scores.detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            masks = ranker(leaf.flatten(1), self.points + 1, torch.arange(1, self.points + 1), tau=_TAU)
            masks = masks.unflatten(-1, tuple(scores.shape[-2:]))
        found = _Found.empty(masks)
        # The graph of the classifier is kept for one chunk at a time.
        for chunk in chosen.nonzero().split(self.max_batch):
            self._pass(masks.detach(), rows, chunk, found, with_gradient=with_gradient)
        if not with_gradient:
            return found, None
        return found, torch.autograd.grad(masks, leaf, found.masks_gradient / (self.points + 1))[0]

    def _pass(
        self, masks: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, found: _Found, *, with_gradient: bool
    ) -> None:
        """One pass of the classifier over the perturbed images at `places` (n, 3): image, curve, point."""
        image, curve, point = places.unbind(dim=1)
        start, mask = self.start, masks[image, point].requires_grad_(with_gradient)
        images = rows[image]
        pixels, references = start.pixel_values[images], start.references[images]
        with torch.set_grad_enabled(with_gradient):
            # What deletion removes is what insertion would not show.
            shown = torch.where((curve == INSERTION)[:, None, None], mask, 1 - mask).to(pixels.dtype)
            perturbed = insertion_images(pixels, references, shown[:, None])[:, 0]
            probability = self.explainer.classifier(perturbed).logits.float().softmax(-1)
            lead = probability.gather(1, start.target[images][:, None])[:, 0]
            if start.against is not None:
                lead = lead - probability.gather(1, start.against[images][:, None])[:, 0]
        found.leads[image, curve, point] = lead.detach()
        found.sensitivity[image, curve, point] = self._sensitivity(probability.detach(), images)
        if with_gradient:
            sign = torch.where(curve == INSERTION, 1.0, -1.0)
            gradient = torch.autograd.grad((sign * lead).sum(), mask)[0]
            found.masks_gradient.index_put_((image, point), gradient, accumulate=True)

    def _sensitivity(self, probability: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """(n,) norm of the derivative of the target's probability, or of its lead, by the logits; (n, C) in."""

        def derivative(classes: torch.Tensor) -> torch.Tensor:
            own = probability.gather(1, classes[:, None])
            return own * (F.one_hot(classes, probability.shape[1]) - probability)

        total = derivative(self.start.target[images])
        if self.start.against is not None:
            total = total - derivative(self.start.against[images])
        return total.norm(dim=1)


@dataclass(frozen=True)
class _Found:
    """What passes write into: leads and sensitivity (b, 2, P), gradient of the masks (b, P, H, W)."""

    leads: torch.Tensor
    sensitivity: torch.Tensor
    masks_gradient: torch.Tensor

    @classmethod
    def empty(cls, masks: torch.Tensor) -> _Found:
        batch, points = masks.shape[:2]
        leads = torch.zeros(batch, 2, points, device=masks.device)
        return cls(leads, leads.clone(), torch.zeros_like(masks.detach()))


def most_sensitive(sensitivity: torch.Tensor, count: int) -> torch.Tensor:
    """(b, 2, P) bool: the `count` points of each image that reacted most.

    Example:
        >>> most_sensitive(torch.tensor([[[0.3, 0.1], [0.0, 0.2]]]), 2)
        tensor([[[ True, False],
                 [False,  True]]])
    """
    flat = sensitivity.flatten(1)
    chosen = flat.topk(count, dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True).view_as(sensitivity)
