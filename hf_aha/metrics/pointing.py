"""The grid pointing game: asked about one photograph's class, does the map point into that photograph's cell?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from .calls import Explain, check_images, explain_in_batches, finite_rows, only_where
from .localization import mass_share
from .rank_maps import top_share


MIN_PROBABILITY = 0.9
"""Default of what counts as confidently classified."""

LAYOUTS = ("shrink", "enlarge")


@dataclass(frozen=True)
class GridPointing:
    """The game on M mosaics of C = grid * grid photographs; float32 on the CPU, NaN where there is no value.

    Attributes:
        groups: (M, C) int64, which photograph is in which cell, cells in row order.
        rank_share: (M, C) share of the top 1/C of the pixels that lie inside the asked photograph's cell, the mean
            over all orders of equal scores.
        mass_share: (M, C) share of the sum of scores inside that cell; NaN also where a score is negative.
        chance: 1/C, what a map that does not know the class gets on average.
    """

    name: ClassVar[str] = "grid_pointing"
    higher_is_better: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    groups: torch.Tensor
    rank_share: torch.Tensor
    mass_share: torch.Tensor
    chance: float

    def per_image(self, values: torch.Tensor, images: int) -> torch.Tensor:
        """(M, C) values -> (images,), one a photograph, NaN for those that are in no mosaic."""
        result = torch.full((images,), torch.nan)
        result[self.groups.flatten()] = values.flatten()
        return result


def choose_groups(
    predicted: torch.Tensor,
    probability: torch.Tensor,
    target: torch.Tensor | None = None,
    *,
    grid: int = 2,
    min_probability: float = MIN_PROBABILITY,
    seed: int = 0,
) -> torch.Tensor:
    """Which photographs share a mosaic: confidently classified ones of distinct classes, each used once at most.

    The classes with most photographs left are drawn on first, which makes as many mosaics as can be. Photographs and
    their cells are shuffled by the seed.

    Args:
        predicted: (B,) predicted classes.
        probability: (B,) their probabilities.
        target: (B,) classes that should have been predicted, where known; others are left out.
        grid: cells a side.
        min_probability: smallest probability that counts as confident.
        seed: of the shuffle.

    Returns:
        (M, grid * grid) int64 indices into the batch; M is 0 where there are too few photographs or classes.

    Raises:
        ValueError: shapes differ, or the grid is smaller than 2.

    Example:
        >>> choose_groups(torch.tensor([4, 1, 2, 3, 3]), torch.ones(5)).shape
        torch.Size([1, 4])
    """
    if (
        predicted.ndim != 1
        or predicted.shape != probability.shape
        or (target is not None and target.shape != predicted.shape)
    ):
        raise ValueError(
            f"predicted has shape {tuple(predicted.shape)} and probability {tuple(probability.shape)}, but they and "
            "the target must be (batch,)."
        )
    cells = _cells(grid)
    fit = probability.cpu() >= min_probability
    if target is not None:
        fit &= predicted.cpu() == target.cpu()
    generator = torch.Generator().manual_seed(seed)
    left: dict[int, list[int]] = {}
    for index in torch.randperm(len(fit), generator=generator).tolist():
        if fit[index]:
            left.setdefault(int(predicted[index]), []).append(index)
    groups = []
    while len(left) >= cells:
        # Sorting is stable: equally common classes keep the shuffled order.
        fullest = sorted(left, key=lambda label: -len(left[label]))[:cells]
        group = [left[label].pop() for label in fullest]
        groups.append([group[place] for place in torch.randperm(cells, generator=generator).tolist()])
        left = {label: indices for label, indices in left.items() if indices}
    return torch.tensor(groups, dtype=torch.int64).view(-1, cells)


def make_mosaics(
    pixel_values: torch.Tensor, groups: torch.Tensor, *, grid: int = 2, layout: str = "shrink"
) -> torch.Tensor:
    """Put photographs side by side.

    Args:
        pixel_values: (B, 3, H, W) normalised photographs.
        groups: (M, grid * grid) indices, cells in row order.
        grid: cells a side.
        layout: `"shrink"` scales each photograph to a cell, so that a mosaic is (H, W) and suits every classifier;
            `"enlarge"` keeps the photographs, so that a mosaic is (grid * H, grid * W) and the classifier and the
            method must take that size (by interpolating positions).

    Returns:
        (M, 3, H, W) or (M, 3, grid * H, grid * W), dtype of the photographs.

    Raises:
        ValueError: the groups do not fit the grid or the batch, the layout is unknown, or the sides do not divide.
    """
    cells = _cells(grid)
    height, width = pixel_values.shape[-2:]
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, but must be one of {', '.join(map(repr, LAYOUTS))}.")
    if groups.ndim != 2 or groups.shape[1] != cells or bool(((groups < 0) | (groups >= len(pixel_values))).any()):
        raise ValueError(
            f"groups have shape {tuple(groups.shape)}, but must be (mosaics, {cells}) indices of {len(pixel_values)} "
            "photographs."
        )
    tiles = pixel_values
    if layout == "shrink":
        if height % grid or width % grid:
            raise ValueError(f"Images of {height} x {width} pixels cannot be cut into {grid} x {grid} equal cells.")
        # Scaling is linear, hence the same before and after normalising.
        tiles = F.interpolate(
            pixel_values.float(), size=(height // grid, width // grid), mode="bilinear", antialias=True
        ).to(pixel_values.dtype)
    tiles = tiles[groups.to(tiles.device)].unflatten(1, (grid, grid))
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def grid_pointing_shares(
    explain: Explain,
    pixel_values: torch.Tensor,
    target: torch.Tensor,
    groups: torch.Tensor,
    *,
    grid: int = 2,
    layout: str = "shrink",
    batch_size: int = 32,
) -> GridPointing:
    """Ask about each photograph's class in its mosaic and see whether the map points into its cell.

    It tests that a map depends on the class asked about, which deletion and insertion of the predicted class do not.
    The rank form is the headline, since only the order of our scores means something. The published game sums the
    positive part of signed attributions; here maps with negative scores have no mass form.

    Args:
        explain: the method; called once for every photograph of every mosaic.
        pixel_values: (B, 3, H, W) normalised photographs.
        target: (B,) class of each.
        groups: (M, grid * grid) from `choose_groups`; the classes of a mosaic must differ.
        grid: cells a side; the published game has 3, ours 2.
        layout: as in `make_mosaics`.
        batch_size: mosaics a call of the method.

    Returns:
        one value for every cell of every mosaic.

    Raises:
        ValueError: as in `make_mosaics`, or two photographs of a mosaic have one class.

    Reference: Rao et al. (https://arxiv.org/abs/2205.10435); Boehle et al. (https://arxiv.org/abs/2104.00032).
    """
    check_images(pixel_values, target, batch_size)
    cells = _cells(grid)
    mosaics = make_mosaics(pixel_values, groups, grid=grid, layout=layout)
    asked = target[groups.to(target.device)]
    for row, classes in enumerate(asked.tolist()):
        if len(set(classes)) < cells:
            raise ValueError(f"Mosaic {row} shows the classes {classes}, but they must differ; see choose_groups.")
    rank, mass = torch.empty(len(groups), cells), torch.empty(len(groups), cells)
    where = _cell_of_pixels(mosaics.shape[-2:], grid).flatten()
    jobs = torch.cartesian_prod(torch.arange(len(groups)), torch.arange(cells))
    for job in jobs.split(batch_size) if len(groups) else ():
        row, cell = job.unbind(1)
        images, classes = mosaics[row.to(mosaics.device)], asked[row.to(asked.device), cell.to(asked.device)]
        scores = explain_in_batches(explain, images, classes, batch_size).flatten(1)
        finite = finite_rows(scores)
        scores = torch.where(finite[:, None], scores, 0.0)
        inside = (where == cell[:, None]).to(scores.device)
        rank[row, cell] = only_where(finite, top_share(scores, inside, inside.sum(1)))
        mass[row, cell] = only_where(finite, mass_share(scores, inside))
    return GridPointing(groups=groups.cpu(), rank_share=rank, mass_share=mass, chance=1 / cells)


def _cells(grid: int) -> int:
    if grid < 2:
        raise ValueError(f"grid is {grid}, but a mosaic needs at least 2 cells a side.")
    return grid * grid


def _cell_of_pixels(size: tuple[int, int], grid: int) -> torch.Tensor:
    """(H, W) int64, the cell of each pixel in row order."""
    rows, columns = (torch.arange(side) // (side // grid) for side in size)
    return grid * rows[:, None] + columns
