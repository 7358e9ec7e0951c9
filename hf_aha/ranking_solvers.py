"""Solvers behind the rankers: bin potentials of an entropic transport plan, and quantiles of sigmoid masks.

Both start from the hard quantiles, work on a summary of the sorted scores first and then on every pixel, hold each
image to its share on its own, and are differentiated by the implicit function theorem instead of being unrolled.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


# Sorted scores are summarised by at most this many weighted nodes while a solver looks for its starting point.
_NODES = 1024
# A CPU sweep works on tiles of about this many bytes, so that one tile stays in the core's own cache.
_TILE_BYTES = 1 << 20
# Relative mass error at which a solver stops, and the largest one it may ever return.
_TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-12}
_ACCEPTED_ERROR = 2e-4
_MAX_SWEEPS = 40
_MAX_NODE_SWEEPS = 120
# A Newton step moves the edge between two neighbouring bins by at most this many logits.
_MAX_EDGE_STEP = 16.0


# ------------------------------------------------------------------------------------------------ transport


class TransportMasks(torch.autograd.Function):
    """Masks of the transport plan of standardised scores, with the implicit gradient."""

    @staticmethod
    def forward(ctx, scores, sorted_scores, ranks, noise, steps, num_bins, tau):
        anchors = torch.linspace(1, -1, num_bins, dtype=scores.dtype, device=scores.device)
        plan, laplacian = _transport_plan(scores, sorted_scores, noise, anchors, tau)
        selector = (torch.arange(num_bins, device=scores.device) < steps[:, :, None]).to(scores.dtype)
        ctx.save_for_backward(plan, laplacian, selector, anchors)
        ctx.tau = tau
        if ranks is not None:
            return straight_through_masks(ranks, steps, num_bins, scores.dtype)
        masks = torch.bmm(selector, plan).clamp_(max=1)
        return masks.masked_fill_((steps == num_bins)[:, :, None], 1) if (steps == num_bins).any() else masks

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_masks):
        plan, laplacian, selector, anchors = ctx.saved_tensors
        with torch.autocast(plan.device.type, enabled=False):
            batch, _, n = plan.shape
            kept = selector.shape[1]
            # With G = dLoss/dP = selector^T grad_masks, the loss sees a score through the covariance of G and the
            # anchors over the bins of that pixel, less the same with the potentials' own response u. All of these are
            # products of the plan with a few vectors, so that neither G nor a second plan is ever formed.
            mean_grad = plan.new_empty(batch, 1, n)
            cross = plan.new_zeros(batch, plan.shape[1], kept + 1, dtype=torch.float64)
            tiles = _tiles(plan.shape, plan)
            for tile in tiles:
                part, grad = plan[:, :, tile], grad_masks[:, :, tile]
                mean_grad[:, :, tile] = (torch.bmm(selector, part) * grad).sum(dim=1, keepdim=True)
                cross[:, :, :kept] += torch.bmm(part, grad.transpose(1, 2))
                cross[:, :, kept:] += torch.bmm(part, mean_grad[:, :, tile].transpose(1, 2))
            pull = (cross[:, :, :kept] * selector.transpose(1, 2)).sum(dim=2) - cross[:, :, kept]
            response = _solve_laplacian(laplacian, pull, n / plan.shape[1]).to(plan.dtype)[:, None, :]
            weights = torch.cat([selector * anchors, anchors.expand_as(response), response * anchors, response], dim=1)
            grad_scores = plan.new_empty(batch, n)
            for tile in tiles:
                grad = grad_masks[:, :, tile]
                moments = torch.bmm(weights, plan[:, :, tile])
                anchor, both, own = moments[:, kept], moments[:, kept + 1], moments[:, kept + 2]
                covariance = (moments[:, :kept] * grad).sum(dim=1) - mean_grad[:, 0, tile] * anchor
                grad_scores[:, tile] = covariance - both + own * anchor
        return grad_scores.div_(ctx.tau), None, None, None, None, None, None


def _transport_plan(
    scores: Tensor, sorted_scores: Tensor, noise: Tensor | None, anchors: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """Solve for the plan ``(B, K, n)`` and the Laplacian ``(B, K, K)`` float64, minus the Hessian of the dual."""
    batch, n = scores.shape
    num_bins = len(anchors)
    target = n / num_bins
    slopes = anchors.double() / tau
    # The scores enter the column masses only through their distribution: a summary of the sorted scores gives
    # potentials that need at most a step or two on the pixels themselves (and are exact for few pixels).
    nodes, weights = _nodes(sorted_scores)
    edges = _edges(sorted_scores.double(), torch.arange(1, num_bins, device=scores.device).expand(batch, -1), num_bins)
    start = torch.cat([edges.new_zeros(batch, 1), ((slopes[:-1] - slopes[1:]) * edges).cumsum(dim=1)], dim=1)
    start = start - start.mean(dim=1, keepdim=True)

    def sweep_nodes(index: Tensor, potentials: Tensor) -> tuple[Tensor, Tensor]:
        part = torch.softmax(nodes[index, None, :] * slopes[:, None] + potentials[:, :, None], dim=1)
        weighted = part * weights
        return weighted.sum(dim=2), torch.bmm(weighted, part.transpose(1, 2))

    potentials, _, _ = _newton(sweep_nodes, start, target, _TOLERANCE[torch.float64], _MAX_NODE_SWEEPS)

    plan = scores.new_empty(batch, num_bins, n)

    def sweep_in(dtype: torch.dtype, sharpness: float = 1.0) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        rates = (slopes * sharpness).to(dtype)[:, None]

        def sweep(index: Tensor, potentials: Tensor) -> tuple[Tensor, Tensor]:
            everything = len(index) == batch
            shift = potentials.to(dtype)[:, :, None]
            mass = potentials.new_zeros(potentials.shape)
            gram = potentials.new_zeros(*potentials.shape, num_bins)
            for tile in _tiles((len(index), num_bins, n), plan):
                pixels = (scores[:, tile] if everything else scores[index, tile]).to(dtype)[:, None, :]
                logits = torch.addcmul(shift, rates, pixels)
                if noise is not None:
                    logits.add_(noise[:, :, tile] if everything else noise[index, :, tile], alpha=sharpness)
                part = torch.softmax(logits, dim=1)
                mass += part.sum(dim=2)
                gram += torch.bmm(part, part.transpose(1, 2))
                if everything:
                    plan[:, :, tile] = part
                else:
                    plan[index, :, tile] = part.to(plan.dtype)
            return mass, gram

        return sweep

    tolerance = _TOLERANCE[scores.dtype]
    potentials, laplacian, error = _newton(sweep_in(scores.dtype), potentials, target, tolerance, _MAX_SWEEPS)
    stuck = (error > _ACCEPTED_ERROR).nonzero()[:, 0]
    if len(stuck):
        # Two rare causes, both of very sharp logits: float32 is too coarse for them, or noise has moved the solution
        # far from the hard quantiles. In float64, the logits of the images concerned are sharpened step by step.
        halvings = 0 if noise is None else max(0, math.ceil(math.log2(float(noise.abs().amax()) / 8)))
        found = start[stuck] if noise is not None else potentials[stuck]
        found = found / 2**halvings
        for remaining in range(halvings, -1, -1):
            sharpened = sweep_in(torch.float64, 0.5**remaining)
            found, laplacian[stuck], error[stuck] = _newton(
                lambda index, g, sweep=sharpened: sweep(stuck[index], g),
                found,
                target,
                1e-2 if remaining else tolerance,
                _MAX_SWEEPS if remaining else 3 * _MAX_SWEEPS,
            )
            found = 2 * found
    if bool((error > _ACCEPTED_ERROR).any()):
        raise RuntimeError(
            f"The bins of image {int(error.argmax())} miss their mass by {float(error.max()):.1e} at tau = {tau}; "
            "raise tau or lower the noise."
        )
    return plan, laplacian


def _newton(
    sweep: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    target: float,
    tolerance: float,
    max_sweeps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximise the concave dual of the transport for each image on its own until its bin masses are met.

    ``sweep(index, potentials[index])`` returns the bin masses ``(A, K)`` and the Gram matrix ``(A, K, K)`` of the plan
    for the images in ``index``. A step is shortened while the derivative of the dual along it is negative and more
    than half the derivative at its start: for a concave function this bounds the overshoot without evaluating the
    dual, whose differences drown in rounding near the solution.

    Returns:
        Potentials ``(B, K)``, Laplacians ``(B, K, K)`` and largest relative mass errors ``(B,)``, all float64. The
        last sweep of every image that converged was at its returned potentials.
    """
    batch, num_bins = start.shape
    base, trial, step = start.clone(), start.clone(), torch.zeros_like(start)
    slope, length, error = start.new_zeros(batch), start.new_ones(batch), start.new_zeros(batch)
    laplacian = start.new_zeros(batch, num_bins, num_bins)
    active = torch.arange(batch, device=start.device)
    for _ in range(max_sweeps):
        mass, gram = sweep(active, trial[active])
        gram.diagonal(dim1=1, dim2=2).zero_()
        # diag(P 1) - P P^T, its diagonal from the rows' sums: no cancellation when the plan is nearly hard.
        current = torch.diag_embed(gram.sum(dim=2)) - gram
        residual = target - mass
        laplacian[active] = current
        error[active] = residual.abs().amax(dim=1) / target
        open_ = error[active] > tolerance
        if not bool(open_.any()):
            break
        active, residual, current = active[open_], residual[open_], current[open_]
        along = (residual * step[active]).sum(dim=1)
        accept = along >= -0.5 * slope[active]
        fresh = _solve_laplacian(current, residual, target)
        if num_bins > 1:
            fresh = fresh * (_MAX_EDGE_STEP / fresh.diff(dim=1).abs().amax(dim=1, keepdim=True)).clamp(max=1)
        shrunk = length[active] * (slope[active] / (slope[active] - along)).clamp(0.1, 0.5)
        take = accept[:, None]
        base[active] = torch.where(take, trial[active], base[active])
        step[active] = torch.where(take, fresh, step[active])
        slope[active] = torch.where(accept, (residual * fresh).sum(dim=1), slope[active])
        length[active] = torch.where(accept, torch.ones_like(shrunk), shrunk)
        trial[active] = base[active] + length[active, None] * step[active]
    return trial, laplacian, error


def _solve_laplacian(laplacian: Tensor, right: Tensor, target: float) -> Tensor:
    """Solve ``laplacian @ u = right`` with ``sum(u) = 0`` in float64.

    The rank-one term removes the null vector of ones; the tiny ridge that of bins that share no element at all.
    """
    num_bins = right.shape[1]
    ridge = 1e-12 * target * torch.eye(num_bins, dtype=torch.float64, device=right.device)
    right = right.double()
    right = right - right.mean(dim=1, keepdim=True)
    return torch.linalg.solve(laplacian + target / num_bins + ridge, right[:, :, None])[:, :, 0]


# ------------------------------------------------------------------------------------------------ quantiles


class QuantileMasks(torch.autograd.Function):
    """Sigmoid masks of standardised scores around solved quantiles, with the implicit gradient."""

    @staticmethod
    def forward(ctx, scores, sorted_scores, ranks, steps, num_bins, tau):
        centers, offsets = _quantile_offsets(scores, sorted_scores, steps, num_bins, tau)
        full = steps == num_bins
        ctx.save_for_backward(scores, centers, offsets, full)
        ctx.tau = tau
        if ranks is not None:
            return straight_through_masks(ranks, steps, num_bins, scores.dtype)
        masks = scores.new_empty(*steps.shape, scores.shape[1])
        for tile in _tiles(masks.shape, scores):
            masks[:, :, tile] = _sigmoid_masks(scores[:, tile], centers, offsets, tau)
        return masks.masked_fill_(full[:, :, None], 1) if bool(full.any()) else masks

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_masks):
        scores, centers, offsets, full = ctx.saved_tensors
        with torch.autocast(scores.device.type, enabled=False):
            tiles = _tiles(grad_masks.shape, scores)
            slopes = []
            total = torch.zeros(grad_masks.shape[:2], dtype=torch.float64, device=scores.device)
            weighted = total.clone()
            for tile in tiles:
                part = _sigmoid_masks(scores[:, tile], centers, offsets, ctx.tau)
                part = torch.addcmul(part, part, part, value=-1).masked_fill_(full[:, :, None], 0)
                total += part.sum(dim=2)
                weighted += (part * grad_masks[:, :, tile]).sum(dim=2)
                slopes.append(part)
            # A fixed mean subtracts the mean incoming gradient, weighted by how much each element can still move.
            mean = (weighted / total.clamp_min(torch.finfo(scores.dtype).tiny)).to(scores.dtype)[:, :, None]
            grad_scores = torch.empty_like(scores)
            for tile, part in zip(tiles, slopes, strict=True):
                grad_scores[:, tile] = (part * (grad_masks[:, :, tile] - mean)).sum(dim=1)
        return grad_scores.div_(ctx.tau), None, None, None, None, None


def _sigmoid_masks(scores: Tensor, centers: Tensor, offsets: Tensor, tau: float) -> Tensor:
    """``(B, S, n)`` masks. The difference to a nearby score is exact, so that a tiny tau loses no digits."""
    logits = (scores[:, None, :] - centers[:, :, None].to(scores.dtype)).div_(tau)
    return logits.sub_(offsets[:, :, None].to(scores.dtype)).sigmoid_()


def _quantile_offsets(
    scores: Tensor, sorted_scores: Tensor, steps: Tensor, num_bins: int, tau: float
) -> tuple[Tensor, Tensor]:
    """Centres ``(B, S)`` (hard quantiles) and offsets ``(B, S)`` float64 with ``q = center + tau * offset``."""
    nodes, weights = _nodes(sorted_scores)
    # The last step needs no quantile (its mask is all ones); solving the step before it instead keeps shapes regular.
    bins = max(num_bins, 2)
    inner = steps.clamp(max=bins - 1)
    centers = _edges(sorted_scores, inner, bins)
    share = inner.double() / bins
    odds = torch.logit(share)
    ends = sorted_scores.double()[:, [-1, 0]]
    low, high = ((end[:, None] - centers.double()) / tau - odds for end in (ends[:, 0], ends[:, 1]))
    weights = weights / scores.shape[1]

    def sweep_nodes(offsets: Tensor) -> tuple[Tensor, Tensor]:
        part = _sigmoid_masks(nodes, centers.double(), offsets, tau)
        return (part * weights).sum(dim=2), ((part - part.square()) * weights).sum(dim=2)

    def sweep(offsets: Tensor) -> tuple[Tensor, Tensor]:
        mean, slope = torch.zeros_like(offsets), torch.zeros_like(offsets)
        for tile in _tiles((*offsets.shape, scores.shape[1]), scores):
            part = _sigmoid_masks(scores[:, tile], centers, offsets, tau)
            mean += part.sum(dim=2)
            slope += torch.addcmul(part, part, part, value=-1).sum(dim=2)
        return mean / scores.shape[1], slope / scores.shape[1]

    offsets, _ = _bracketed_newton(
        sweep_nodes, torch.zeros_like(share), low, high, share, 1 / bins, _TOLERANCE[torch.float64]
    )
    offsets, error = _bracketed_newton(sweep, offsets, low, high, share, 1 / bins, _TOLERANCE[scores.dtype])
    if bool((error > _ACCEPTED_ERROR).any()):
        raise RuntimeError(f"A mask misses its share by {float(error.max()):.1e} of a bin at tau = {tau}; raise tau.")
    return centers, offsets


def _bracketed_newton(
    sweep: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    low: Tensor,
    high: Tensor,
    share: Tensor,
    unit: float,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Solve ``mean(offset) = share`` for a mean that falls with the offset; ``sweep`` returns the mean and -slope.

    Errors are counted in ``unit``, the share of one bin, so that differences of two masks are exact too.
    """
    offsets, low, high = start.clone(), low.clone(), high.clone()
    # Rounding must not push the root of a constant map, where both ends coincide, out of the bracket.
    margin = 1e-6 * (1 + low.abs() + high.abs())
    low, high = low - margin, high + margin
    error = torch.full_like(share, torch.inf)
    best = offsets
    for count in range(_MAX_NODE_SWEEPS):
        mean, slope = sweep(offsets)
        excess = mean - share
        current = excess.abs() / unit
        best = torch.where(current < error, offsets, best)
        error = torch.minimum(current, error)
        if bool((error <= tolerance).all()):
            break
        low = torch.where(excess > 0, offsets, low)
        high = torch.where(excess < 0, offsets, high)
        newton = offsets + excess / slope
        middle = (low + high) / 2
        # Every fourth step halves the bracket, so that Newton steps cannot creep along one side of it.
        inside = (newton > low) & (newton < high) & (count % 4 != 3)
        offsets = torch.where(error <= tolerance, best, torch.where(inside, newton, middle))
    return best, error


# ------------------------------------------------------------------------------------------------ shared pieces


def masks_from_ranks(ranks: Tensor, counts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (ranks[:, None, :].int() < counts[:, :, None].int()).to(dtype)


def straight_through_masks(ranks: Tensor, steps: Tensor, num_bins: int, dtype: torch.dtype) -> Tensor:
    counts = (steps.double() * ranks.shape[1] / num_bins).round().long()
    return masks_from_ranks(ranks, counts, dtype)


def _nodes(sorted_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Summarise falling scores by the means ``(B, M)`` of groups of neighbours and the group sizes ``(M,)``."""
    batch, n = sorted_scores.shape
    size = -(-n // _NODES)
    groups = -(-n // size)
    nodes = sorted_scores.new_zeros(batch, groups * size, dtype=torch.float64)
    nodes[:, :n] = sorted_scores
    weights = nodes.new_full((groups,), size)
    weights[-1] = n - (groups - 1) * size
    return nodes.view(batch, groups, size).sum(dim=2) / weights, weights


def _edges(sorted_scores: Tensor, steps: Tensor, num_bins: int) -> Tensor:
    """Scores ``(B, S)`` at the share ``step / num_bins`` of falling scores: the midpoint if it lies between two."""
    n = sorted_scores.shape[1]
    below = (steps * n // num_bins).clamp(max=n - 1)
    above = torch.where(steps * n % num_bins == 0, below - 1, below).clamp(min=0)
    return (sorted_scores.gather(1, above) + sorted_scores.gather(1, below)) / 2


def _tiles(shape: tuple[int, ...] | torch.Size, like: Tensor) -> list[slice]:
    """Slices of the last axis: small enough for a core's cache on a CPU, a single one elsewhere."""
    rows, n = shape[0] * shape[1], shape[2]
    width = n if like.device.type != "cpu" else max(_TILE_BYTES // (rows * like.element_size()), 256)
    return [slice(first, min(first + width, n)) for first in range(0, n, width)]
