"""Noisy linear imputation, ROAD's reference: removed pixels continue their neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch


TOLERANCE = 1e-5
"""Largest allowed difference, in RGB of [0, 1], between a removed pixel and the weighted mean of its neighbours."""

NOISE = 0.01
"""Standard deviation of the noise on removed pixels, in RGB of [0, 1]."""

_MAX_ITERATIONS = 100
_COARSEST = 3  # rows or columns at which a grid is small enough to be solved directly
# Share of a Jacobi step. The largest eigenvalue of the scaled stencil is 4/3 on the image, where full steps damp every
# fast error to a third, and about 3/2 on the coarser grids.
_FINE_STEP, _COARSE_STEP = 1.0, 0.85
_SAFE_STEP = 1.9
_CPU_PIXELS = 2 * 224 * 224


def noisy_linear_imputation(
    rgb: torch.Tensor,
    removed: torch.Tensor,
    *,
    noise: float = NOISE,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> torch.Tensor:
    """Replace removed pixels by `linear_imputation`, then add Gaussian noise to them.

    The noise is one field drawn from `seed` for an image size. It serves every image and every mask, so that a value
    depends neither on the batch an image was in nor on the device, and curves do not jump with fresh noise.

    Args:
        rgb: (B, 3, H, W) images in RGB, [0, 1].
        removed: (B, S, H, W) bool, S masks an image; at least one pixel of each stays.
        noise: standard deviation in RGB units; 0 for none.
        seed: of the noise.
        tolerance: as in `linear_imputation`.

    Returns:
        (B, S, 3, H, W) float32. Untouched pixels are the image's own; noise may leave [0, 1] by a little.

    Raises:
        ValueError: as in `linear_imputation`, or the noise is negative.

    Example:
        >>> grey = torch.full((1, 3, 4, 4), 0.5)
        >>> removed = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        >>> removed[..., 1:3, 1:3] = True
        >>> filled = noisy_linear_imputation(grey, removed, noise=0.0)
        >>> bool((filled - 0.5).abs().max() < 1e-4)
        True

    Reference: ROAD (https://arxiv.org/abs/2202.00449), section 4.
    """
    if not noise >= 0:
        raise ValueError(f"noise is {noise}, but must be 0 or a positive standard deviation.")
    filled = linear_imputation(rgb, removed, tolerance=tolerance).images
    if not noise:
        return filled
    field = torch.randn(rgb.shape[1:], generator=torch.Generator().manual_seed(seed)).to(filled)
    return filled + noise * field * removed[:, :, None]


@dataclass(frozen=True)
class Imputation:
    """Filled images and how well the equations hold.

    Attributes:
        images: (B, S, 3, H, W) float32, RGB.
        residual: (B, S) float32, largest difference over removed pixels and channels between a pixel and the weighted
            mean of its neighbours, in RGB units; 0 where nothing was removed.
    """

    images: torch.Tensor
    residual: torch.Tensor


@torch.no_grad()
def linear_imputation(rgb: torch.Tensor, removed: torch.Tensor, *, tolerance: float = TOLERANCE) -> Imputation:
    """Solve for the removed pixels: each is the weighted mean of its up to eight neighbours.

    Direct neighbours weigh 1/6 and diagonal ones 1/12, divided by their sum at the border of the image. All systems of
    all channels are solved together in float32 by conjugate gradients preconditioned with one multigrid cycle, which
    needs about ten iterations whatever the shape and size of the holes. Stopping at the default tolerance leaves the
    pixels within about 1e-4 of the exact solution.

    Args:
        rgb: (B, 3, H, W) floating images, any affine range; the tolerance is meant for [0, 1].
        removed: (B, S, H, W) bool, S masks an image; at least one pixel of each stays.
        tolerance: largest residual, from 1e-6 on (float32 does not reach further).

    Returns:
        the filled images; untouched pixels are the image's own.

    Raises:
        ValueError: shapes or dtypes do not fit, pixels are not finite, a mask removes every pixel, or the tolerance
            is below 1e-6.
        RuntimeError: the tolerance was not reached.

    Reference: ROAD (https://arxiv.org/abs/2202.00449), whose code solves each system by itself with a sparse direct
    method.
    """
    _check(rgb, removed, tolerance)
    size = rgb.shape[-2:]
    systems = removed.flatten(0, 1)
    rows = torch.arange(len(rgb), device=rgb.device).repeat_interleave(removed.shape[1])
    # On a CPU so few systems at a time that their vectors stay in the cache.
    step = max(1, _CPU_PIXELS // (size[0] * size[1])) if rgb.device.type == "cpu" else len(systems)
    parts = [
        _solve(rgb[rows[start : start + step]].float(), systems[start : start + step, None], tolerance)
        for start in range(0, len(systems), step)
    ]
    images = torch.cat([part[0] for part in parts])
    residual = torch.cat([part[1] for part in parts])
    return Imputation(images.view(*removed.shape[:2], 3, *size), residual.view(removed.shape[:2]))


def _check(rgb: torch.Tensor, removed: torch.Tensor, tolerance: float) -> None:
    if rgb.ndim != 4 or rgb.shape[1] != 3 or not rgb.is_floating_point():
        raise ValueError(f"rgb is {rgb.dtype} of shape {tuple(rgb.shape)}, but must be floating (B, 3, H, W).")
    expected = removed.ndim == 4 and removed.shape[0] == rgb.shape[0] and removed.shape[2:] == rgb.shape[2:]
    if not expected or removed.dtype != torch.bool or not removed.numel():
        raise ValueError(
            f"removed is {removed.dtype} of shape {tuple(removed.shape)}, but must be bool "
            f"({rgb.shape[0]}, masks, {rgb.shape[2]}, {rgb.shape[3]})."
        )
    if not bool(torch.isfinite(rgb).all()):
        raise ValueError("rgb holds NaN or infinite pixels, which would spread over the filled ones.")
    full = removed.flatten(2).all(2).nonzero()
    if len(full):
        raise ValueError(
            f"Mask {int(full[0, 1])} of image {int(full[0, 0])} removes every pixel, so nothing is left to continue; "
            "keep at least one."
        )
    if not tolerance >= 1e-6:
        raise ValueError(f"tolerance is {tolerance}, but float32 needs 1e-6 or more.")


# ------------------------------------------------------------------------------------------------ the linear systems
#
# Times 12, the equations of the removed pixels x (zero elsewhere) read u (s x - S x) = u S k. S sums the 3 x 3
# neighbourhood with weights (1, 2, 1) in rows and in columns, s is S applied to ones, u the mask of removed pixels and
# k the image with zeros for them. S counts the middle too, with weight 4, which cancels in s x - S x.


@dataclass(frozen=True)
class _Finest:
    """The equations on the image: masks (n, 1, h, w), with an odd number of rows and of columns."""

    mask: torch.Tensor
    total: torch.Tensor
    step: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return (self.total * x).sub_(_neighbourhood(x)).mul_(self.mask)

    def prolong(self, x: torch.Tensor) -> torch.Tensor:
        return _prolong(x, self.step.shape[-2:]) * self.mask


@dataclass(frozen=True)
class _Coarse:
    """The equations on a coarser grid: a 9-point stencil (n, 9, h, w) of every grid point."""

    stencil: torch.Tensor
    step: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
        result = self.stencil[:, 4:5] * x
        for index in (0, 1, 2, 3, 5, 6, 7, 8):
            row, column = divmod(index, 3)
            neighbour = padded[..., row : row + height, column : column + width]
            result.addcmul_(self.stencil[:, index : index + 1], neighbour)
        return result

    def prolong(self, x: torch.Tensor) -> torch.Tensor:
        return _prolong(x, self.step.shape[-2:])


_Level = _Finest | _Coarse


def _solve(rgb: torch.Tensor, removed: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 3, H, W) and masks (n, 1, H, W) -> filled images and residuals (n,)."""
    height, width = rgb.shape[-2:]
    weights = [torch.full((side,), 4.0, device=rgb.device) for side in (height, width)]
    for weight in weights:
        weight[0] -= 1
        weight[-1] -= 1
    total = weights[0][:, None] * weights[1]
    # An even side gets one more row or column, which is never removed and holds zeros: it changes nothing.
    padding = (0, 1 - width % 2, 0, 1 - height % 2)
    mask = torch.nn.functional.pad(removed.float(), padding)
    total = torch.nn.functional.pad(total, padding, value=16.0)
    known = torch.nn.functional.pad(rgb * ~removed, padding)
    inverse = torch.where(mask > 0, 1 / (total - 4), 0.0)
    levels: list[_Level] = [_Finest(mask, total, _FINE_STEP * inverse)]
    while max(levels[-1].step.shape[-2:]) > _COARSEST:
        levels.append(_coarsen(levels[-1]))
    bottom = _pseudo_inverse(levels[-1])

    right = _neighbourhood(known).mul_(mask)
    x = torch.zeros_like(right)
    remainder, direction, product = right.clone(), None, None
    for _ in range(_MAX_ITERATIONS):
        if bool((remainder * inverse).abs().max() <= tolerance):
            # Updated remainders drift from the true one by rounding, so the true one has the last word.
            remainder, direction = right - levels[0].apply(x), None
            if bool((remainder * inverse).abs().max() <= tolerance):
                break
        correction = _cycle(levels, bottom, remainder)
        previous, product = product, _dot(remainder, correction)
        if direction is None:
            direction = correction
        else:
            direction = correction.add_(direction * _ratio(product, previous))
        image = levels[0].apply(direction)
        length = _ratio(product, _dot(direction, image))
        x.addcmul_(direction, length)
        remainder.addcmul_(image, length, value=-1)
    residual = ((right - levels[0].apply(x)) * inverse).abs().flatten(1).amax(1)
    if not bool((residual <= tolerance).all()):
        raise RuntimeError(
            f"The imputation reached a residual of {float(residual.max()):.1e} in {_MAX_ITERATIONS} iterations, but "
            f"{tolerance:.1e} was asked: raise the tolerance."
        )
    filled = torch.where(removed, x[..., :height, :width], rgb)
    return filled, residual


def _cycle(levels: list[_Level], bottom: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Approximate solution for a right-hand side: smooth, correct on the coarser grids, smooth."""
    level, *coarser = levels
    if not coarser:
        return torch.einsum("nij,ncj->nci", bottom, remainder.flatten(2)).view_as(remainder)
    x = level.step * remainder
    rest = remainder - level.apply(x)
    x.add_(level.prolong(_cycle(coarser, bottom, _restrict(rest))))
    rest = remainder - level.apply(x)
    return x.addcmul_(level.step, rest)


def _coarsen(level: _Level) -> _Coarse:
    """The equations for the corrections of every second row and column (Galerkin), found by probing.

    Coarse points three apart do not share an equation, so nine probes, each of ones at such points, show all weights.
    """
    height, width = ((side + 1) // 2 for side in level.step.shape[-2:])
    rows = torch.arange(height, device=level.step.device)[:, None] % 3
    columns = torch.arange(width, device=level.step.device)[None] % 3
    colour = 3 * rows + columns
    probes = (colour == torch.arange(9, device=colour.device)[:, None, None]).float()[None]
    seen = _restrict(level.apply(level.prolong(probes)))[..., :height, :width]
    shifts = [3 * ((rows + row) % 3) + (columns + column) % 3 for row in (-1, 0, 1) for column in (-1, 0, 1)]
    stencil = seen.gather(1, torch.stack(shifts)[None].expand_as(seen))
    # An even side gets a row or column without equations, as on the image.
    stencil = torch.nn.functional.pad(stencil, (0, 1 - width % 2, 0, 1 - height % 2))
    middle, row_sum = stencil[:, 4:5], stencil.abs().sum(1, keepdim=True)
    # A step below 2 / (sum of a row's magnitudes) shrinks every error, which conjugate gradients rely on.
    step = torch.minimum(_COARSE_STEP / middle, _SAFE_STEP / row_sum)
    return _Coarse(stencil, torch.where(middle > 0, step, 0.0))


def _pseudo_inverse(level: _Level) -> torch.Tensor:
    """(n, points, points) of the coarsest equations, some of which may be empty or equal."""
    height, width = level.step.shape[-2:]
    points = height * width
    basis = torch.eye(points, device=level.step.device).view(1, points, height, width)
    matrix = level.apply(basis.expand(len(level.step), -1, -1, -1).contiguous()).flatten(2).double()
    return torch.linalg.pinv(matrix, rtol=1e-6, hermitian=True).float()


def _neighbourhood(x: torch.Tensor) -> torch.Tensor:
    """Sum over 3 x 3 with weights (1, 2, 1) in rows and columns, zeros beyond the border."""
    across = 2 * x
    across[..., 1:] += x[..., :-1]
    across[..., :-1] += x[..., 1:]
    both = 2 * across
    both[..., 1:, :] += across[..., :-1, :]
    both[..., :-1, :] += across[..., 1:, :]
    return both


def _prolong(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Values of every second row and column of a grid of `size`, between them the mean."""
    x = x[..., : (size[0] + 1) // 2, : (size[1] + 1) // 2]
    wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1] - 1)
    wide[..., ::2] = x
    torch.add(x[..., :-1], x[..., 1:], out=wide[..., 1::2]).mul_(0.5)
    both = x.new_empty(*x.shape[:-2], 2 * x.shape[-2] - 1, wide.shape[-1])
    both[..., ::2, :] = wide
    torch.add(wide[..., :-1, :], wide[..., 1:, :], out=both[..., 1::2, :]).mul_(0.5)
    return both


def _restrict(x: torch.Tensor) -> torch.Tensor:
    """The transpose of `_prolong`, with a row or column of zeros added where a side would be even."""
    tall = x[..., ::2, :].clone()
    tall[..., :-1, :].add_(x[..., 1::2, :], alpha=0.5)
    tall[..., 1:, :].add_(x[..., 1::2, :], alpha=0.5)
    both = tall[..., ::2].clone()
    both[..., :-1].add_(tall[..., 1::2], alpha=0.5)
    both[..., 1:].add_(tall[..., 1::2], alpha=0.5)
    return torch.nn.functional.pad(both, (0, 1 - both.shape[-1] % 2, 0, 1 - both.shape[-2] % 2))


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum((-2, -1), keepdim=True)


def _ratio(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    # A channel that is solved exactly has nothing left to divide.
    return torch.where(below > 0, above / below, 0.0)
