"""Differentiable ranking: per-pixel scores to the masks of a deletion or insertion curve.

Every ranker maps scores ``(B, n)`` to masks ``(B, S, n)``: the mask of step ``k`` out of ``num_bins`` holds the share
``k / num_bins`` of the elements, the most important first. Three relaxations share this interface:

* [`TransportRanker`][]: entropic transport of n pixels to K bins, at pixel resolution (the default);
* [`QuantileRanker`][]: a sigmoid around each quantile, the cheapest;
* [`SinkhornRanker`][]: the square Gumbel-Sinkhorn operator of the AHA paper, for pooled grids.

``tau -> 0`` turns each of them into the hard ranking that the metrics use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .draws import Generators, draw_rows
from .ranking_solvers import QuantileMasks, TransportMasks, masks_from_ranks, straight_through_masks


__all__ = [
    "RANKERS",
    "QuantileRanker",
    "SinkhornRanker",
    "TransportRanker",
    "hard_masks",
    "hard_ranks",
    "make_ranker",
    "standardize",
]

_SINKHORN_LIMIT = 4096


# ------------------------------------------------------------------------------------------------ hard ranking


def hard_ranks(scores: Tensor) -> Tensor:
    """Rank every element, 0 for the most important one; equal scores are ranked in index order.

    Args:
        scores: ``(B, n)``, any real dtype, finite; higher means more important.

    Returns:
        ``(B, n)`` int64 ranks in ``0..n-1``.

    Raises:
        ValueError: If the scores are not two-dimensional or not finite.

    Example:
        >>> hard_ranks(torch.tensor([[0.2, 0.9, 0.2]])).tolist()
        [[1, 0, 2]]
    """
    _check_scores(scores)
    return _invert(torch.sort(scores.detach(), dim=1, descending=True, stable=True).indices)


def hard_masks(scores: Tensor, counts: Tensor) -> Tensor:
    """Masks that hold exactly ``counts[s]`` of the most important elements (ties as in [`hard_ranks`][]).

    Args:
        scores: ``(B, n)``, finite; higher means more important.
        counts: ``(S,)`` or ``(B, S)`` integers in ``0..n``, in any order.

    Returns:
        ``(B, S, n)`` float32 of zeros and ones; no gradient.

    Raises:
        ValueError: If the scores are unusable or a count is not an integer in ``0..n``.

    Example:
        >>> hard_masks(torch.tensor([[0.2, 0.9, 0.5]]), torch.tensor([1, 2])).tolist()
        [[[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]]]
    """
    ranks = hard_ranks(scores)
    return masks_from_ranks(ranks, _as_steps(counts, ranks.shape[0], 0, ranks.shape[1], "counts", ranks.device))


def standardize(scores: Tensor) -> Tensor:
    """Shift and scale each row to zero mean and unit (population) standard deviation.

    A temperature then means the same for every image. The scale is found after division by the largest deviation, so
    that neither huge nor tiny scores overflow or underflow. A constant row becomes zeros and keeps the gradient of the
    centring alone, so that training can leave it.

    Args:
        scores: ``(B, n)`` floating point.

    Returns:
        ``(B, n)`` float32 (float64 stays float64), differentiable.

    Example:
        >>> standardize(torch.tensor([[1.0, 3.0], [5.0, 5.0]])).tolist()
        [[-1.0, 1.0], [0.0, 0.0]]
    """
    x = scores if scores.dtype == torch.float64 else scores.float()
    with torch.no_grad():
        low, high = x.aminmax(dim=1, keepdim=True)
        constant = low == high
        shift = torch.where(constant, low, x.mean(dim=1, keepdim=True))
        spread = torch.where(constant, torch.ones_like(low), torch.maximum(high - shift, shift - low))
    x = (x - shift) / spread
    # The first shift is only as exact as a sum of large numbers; the second mean is taken of numbers up to 1.
    x = x - x.mean(dim=1, keepdim=True)
    variance = x.square().mean(dim=1, keepdim=True)
    return x / torch.where(constant, torch.ones_like(variance), variance).sqrt()


# ------------------------------------------------------------------------------------------------ rankers


@dataclass(frozen=True)
class TransportRanker:
    """Entropic transport of n elements of mass 1 to K bins of mass n / K, the most important bin first.

    The plan is ``P[i, j] = softmax_j((s_i a_j + noise_ij) / tau + g_j)`` with anchors ``a`` from 1 to -1; the K
    potentials ``g`` are found by a damped Newton method and differentiated by the implicit function theorem, so that
    one plan is kept in memory and nothing is unrolled. Masks are cumulative bins. Neighbouring bins blend over about
    ``tau * (K - 1) / 2`` standard deviations of the scores.

    Attributes:
        straight_through: Return the hard masks of ``round(k n / K)`` elements with the gradient of the soft ones.
        noise: Scale of the Gumbel noise added to ``s_i a_j`` (0: none). Hard masks do not see it.

    Example:
        >>> masks = TransportRanker()(torch.randn(2, 64), 4, tau=0.1)
        >>> masks.shape, round(float(masks[:, 0].mean()), 3)
        (torch.Size([2, 4, 64]), 0.25)

    Source: Cuturi et al. 2019 (arXiv 1905.11885) for ranking as transport to a few targets.
    """

    straight_through: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        _check_noise(self.noise)

    def __call__(
        self,
        scores: Tensor,
        num_bins: int,
        steps: Tensor | None = None,
        *,
        tau: float,
        generator: Generators = None,
    ) -> Tensor:
        """Rank.

        Args:
            scores: ``(B, n)`` floating point, finite; standardised inside.
            num_bins: K, the number of steps of the curve.
            steps: ``(S,)`` or ``(B, S)`` integers in ``1..K``; all of them if None.
            tau: Temperature, positive.
            generator: Source of the noise: one for the batch, or one an image.

        Returns:
            ``(B, S, n)`` masks in [0, 1], float32 (float64 for float64 scores), also under autocast.

        Raises:
            ValueError: If an argument is unusable.
            RuntimeError: If the bin masses cannot be met.
        """
        steps = _check_call(scores, num_bins, steps, tau)
        with torch.autocast(scores.device.type, enabled=False):
            ranks, sorted_scores, standard = _sort(scores, self.straight_through)
            if ranks is not None and not (torch.is_grad_enabled() and scores.requires_grad):
                return straight_through_masks(ranks, steps, num_bins, standard.dtype)
            noise = None
            if self.noise:
                shape = (standard.shape[0], num_bins, standard.shape[1])
                noise = _gumbel(shape, standard, generator).mul_(self.noise / tau)
            return TransportMasks.apply(standard, sorted_scores, ranks, noise, steps, num_bins, float(tau))


@dataclass(frozen=True)
class QuantileRanker:
    """A sigmoid around each quantile: ``m_k = sigmoid((s - q_k) / tau)`` with ``q_k`` such that ``mean(m_k) = k / K``.

    Equal to entropic transport to two bins for each step on its own. Costs O(n S) and keeps no mask for the backward
    pass, which differentiates ``q_k`` implicitly. The mask of step K is all ones.

    Attributes:
        straight_through: Return the hard masks of ``round(k n / K)`` elements with the gradient of the soft ones.
        noise: Scale of the Gumbel noise added to the standardised scores (0: none). Hard masks do not see it.

    Example:
        >>> QuantileRanker()(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2, torch.tensor([1]), tau=0.01).round().tolist()
        [[[1.0, 0.0, 1.0, 0.0]]]
    """

    straight_through: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        _check_noise(self.noise)

    def __call__(
        self,
        scores: Tensor,
        num_bins: int,
        steps: Tensor | None = None,
        *,
        tau: float,
        generator: Generators = None,
    ) -> Tensor:
        """Rank; arguments, result and errors as in [`TransportRanker`][]."""
        steps = _check_call(scores, num_bins, steps, tau)
        with torch.autocast(scores.device.type, enabled=False):
            ranks, sorted_scores, standard = _sort(scores, self.straight_through)
            if ranks is not None and not (torch.is_grad_enabled() and scores.requires_grad):
                return straight_through_masks(ranks, steps, num_bins, standard.dtype)
            if self.noise:
                standard = standard + _gumbel(standard.shape, standard, generator).mul_(self.noise)
                sorted_scores = standard.detach().sort(dim=1, descending=True).values
            return QuantileMasks.apply(standard, sorted_scores, ranks, steps, num_bins, float(tau))


@dataclass(frozen=True)
class SinkhornRanker:
    """The square Gumbel-Sinkhorn operator of the AHA paper, for pooled grids (n = 49 to 784).

    ``log_alpha[r, j] = -(score_j - anchor_r)^2`` with one anchor per rank from 1 to 0; Gumbel noise is added, the sum
    divided by tau and normalised in turn over ranks and over elements, the last time so that every rank holds one
    element. Masks are cumulative sums over ranks, linearly interpolated at shares between two ranks and clamped to
    [0, 1]. With few iterations an element may be counted more or less than once, so that clamping loses a little mass.

    Attributes:
        straight_through: Return the hard masks of ``round(k n / K)`` elements with the gradient of the soft ones.
        noise: Scale of the Gumbel noise (the paper: 1). Hard masks do not see it.
        iterations: Pairs of normalisations.
        standardize_scores: Standardise the scores first (the paper ranks raw scores).

    Example:
        >>> SinkhornRanker(noise=0.0)(torch.rand(1, 49), 7, tau=0.3).shape
        torch.Size([1, 7, 49])

    Source: AHA, training code; Mena et al. 2018 (arXiv 1802.08665).
    """

    straight_through: bool = False
    noise: float = 1.0
    iterations: int = 30
    standardize_scores: bool = False

    def __post_init__(self) -> None:
        _check_noise(self.noise)
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; give at least 1.")

    def __call__(
        self,
        scores: Tensor,
        num_bins: int,
        steps: Tensor | None = None,
        *,
        tau: float,
        generator: Generators = None,
    ) -> Tensor:
        """Rank; arguments and result as in [`TransportRanker`][].

        Raises:
            ValueError: If an argument is unusable or n is larger than 4096.
        """
        steps = _check_call(scores, num_bins, steps, tau)
        n = scores.shape[1]
        if n > _SINKHORN_LIMIT:
            raise ValueError(
                f"SinkhornRanker needs an n x n plan and got n = {n} > {_SINKHORN_LIMIT}; "
                "pool the scores to a grid or use TransportRanker."
            )
        with torch.autocast(scores.device.type, enabled=False):
            x = scores if scores.dtype == torch.float64 else scores.float()
            ranks = hard_ranks(scores) if self.straight_through else None
            if ranks is not None and not (torch.is_grad_enabled() and scores.requires_grad):
                return straight_through_masks(ranks, steps, num_bins, x.dtype)
            if self.standardize_scores:
                x = standardize(x)
            anchors = torch.linspace(1, 0, n, dtype=x.dtype, device=x.device)
            log_plan = -(x[:, None, :] - anchors[:, None]).square()
            if self.noise:
                log_plan = log_plan + _gumbel(log_plan.shape, x, generator).mul_(self.noise)
            log_plan = log_plan / tau
            for _ in range(self.iterations):
                log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True)
                log_plan = log_plan - log_plan.logsumexp(dim=2, keepdim=True)
            # Step k ends inside rank `row`: all the ranks above it count, and this one by the part of it covered. (No
            # matrix product: its gradient would be rounded by an autocast that is on during the backward pass.)
            plan = log_plan.exp()
            row = (steps * n // num_bins).clamp(max=n - 1)
            covered = (steps.to(x.dtype) * n / num_bins - row)[:, :, None]
            image = torch.arange(x.shape[0], device=x.device)[:, None]
            last = plan[image, row]
            masks = (plan.cumsum(dim=1)[image, row] - (1 - covered) * last).clamp(0, 1)
            if ranks is None:
                return masks
            return straight_through_masks(ranks, steps, num_bins, x.dtype) + (masks - masks.detach())


RANKERS = {"transport": TransportRanker, "sinkhorn": SinkhornRanker, "quantile": QuantileRanker}
"""Every ranker by the name that `make_ranker` and the setting `ranker` of a training take."""


def make_ranker(
    name: str, *, straight_through: bool = False, noise: float = 0.0
) -> TransportRanker | SinkhornRanker | QuantileRanker:
    """Build a ranker by name.

    Args:
        name: A key of ``RANKERS``.
        straight_through: Hard masks forward, gradient of the soft masks backward.
        noise: Scale of the Gumbel noise; the paper's ``sinkhorn`` uses 1.

    Raises:
        ValueError: If the name is unknown or the noise unusable.

    Example:
        >>> make_ranker("quantile", straight_through=True)
        QuantileRanker(straight_through=True, noise=0.0)
    """
    if name not in RANKERS:
        raise ValueError(f"There is no ranker {name!r}; choose one of {', '.join(sorted(RANKERS))}.")
    return RANKERS[name](straight_through=straight_through, noise=noise)


# ------------------------------------------------------------------------------------------------ shared pieces


def _check_scores(scores: Tensor) -> None:
    if scores.ndim != 2 or scores.numel() == 0:
        raise ValueError(f"The scores have shape {tuple(scores.shape)}; give (B, n) with at least one element.")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("The scores hold NaN or infinite values; find the layer that produced them before ranking.")


def _check_call(scores: Tensor, num_bins: int, steps: Tensor | None, tau: float) -> Tensor:
    """Validate a ranker's arguments and return the steps as ``(B, S)``."""
    if not scores.is_floating_point():
        raise ValueError(f"The scores are {scores.dtype}; give a floating-point tensor.")
    _check_scores(scores)
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; give at least 1.")
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau is {tau}; give a positive number.")
    if steps is None:
        steps = torch.arange(1, num_bins + 1, device=scores.device)
        return steps.expand(scores.shape[0], -1)
    return _as_steps(steps, scores.shape[0], 1, num_bins, "steps", scores.device)


def _as_steps(values: Tensor, batch: int, low: int, high: int, name: str, device: torch.device) -> Tensor:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"The {name} are {values.dtype}; give integers.")
    if values.ndim not in (1, 2) or values.numel() == 0 or (values.ndim == 2 and values.shape[0] != batch):
        raise ValueError(f"The {name} have shape {tuple(values.shape)}; give (S,) or ({batch}, S).")
    if int(values.min()) < low or int(values.max()) > high:
        raise ValueError(f"The {name} reach from {int(values.min())} to {int(values.max())}; keep to {low}..{high}.")
    values = values.to(device=device, dtype=torch.int64)
    return values.expand(batch, -1) if values.ndim == 1 else values


def _check_noise(noise: float) -> None:
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise is {noise}; give 0 or a positive scale.")


def _sort(scores: Tensor, with_ranks: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Ranks (if asked for), standardised scores in falling order without gradient, and standardised scores."""
    standard = standardize(scores)
    if not with_ranks:
        return None, standard.detach().sort(dim=1, descending=True).values, standard
    # Sorted before standardising, which may round two different scores to the same value.
    order = torch.sort(scores.detach(), dim=1, descending=True, stable=True).indices
    return _invert(order), standard.detach().gather(1, order), standard


def _invert(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


def _gumbel(shape: torch.Size | tuple[int, ...], like: Tensor, generator: Generators) -> Tensor:
    def draw(shape: Sequence[int], own: torch.Generator | None) -> Tensor:
        # Drawn where the generator lives, so that a CPU generator gives the same noise on every device.
        device = like.device if own is None else own.device
        return torch.empty(tuple(shape), dtype=like.dtype, device=device).exponential_(generator=own)

    draws = draw_rows(draw, shape, generator).to(like.device)
    return draws.clamp_(min=torch.finfo(like.dtype).tiny).log_().neg_()
