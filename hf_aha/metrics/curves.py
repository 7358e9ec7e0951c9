"""Hard deletion and insertion curves of the class probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..perturbation import deletion_images, insertion_images, perturbed_batch_size, pool_to_cells, spread_cells
from ..ranking import hard_masks


FRACTIONS_21 = tuple(step / 20 for step in range(21))
"""0, 0.05, ..., 1: the 21 points of the protocol `aha`."""


@dataclass(frozen=True)
class Curves:
    """Class probability along both curves, one row an image, float32 on the CPU.

    With a class to compare with, everything is about the difference of the two probabilities, in -1..1 like the areas.

    Attributes:
        fractions: (P,) shares of perturbed pixels, ascending from 0 to 1.
        deletion: (B, P) probability with the most important share removed; low is faithful.
        insertion: (B, P) probability with only the most important share shown; high is faithful.
    """

    fractions: torch.Tensor
    deletion: torch.Tensor
    insertion: torch.Tensor

    @property
    def deletion_auc(self) -> torch.Tensor:
        """(B,) area under the deletion curve, trapezoid rule on [0, 1]; lower is better, range 0..1."""
        return torch.trapezoid(self.deletion, self.fractions, dim=1)

    @property
    def insertion_auc(self) -> torch.Tensor:
        """(B,) area under the insertion curve, trapezoid rule on [0, 1]; higher is better, range 0..1."""
        return torch.trapezoid(self.insertion, self.fractions, dim=1)


@torch.no_grad()
def deletion_insertion_curves(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    reference: torch.Tensor,
    scores: torch.Tensor,
    target: torch.Tensor,
    *,
    against: torch.Tensor | None = None,
    fractions: Sequence[float] = FRACTIONS_21,
    cells: tuple[int, int] | None = None,
    max_batch: int | None = None,
) -> Curves:
    """Measure both curves with hard masks; both ends are shared by the two curves and computed once.

    Args:
        logits_of: classifier, (N, 3, H, W) -> (N, C).
        pixel_values: (B, 3, H, W) normalised images.
        reference: (B, 3, H, W) normalised references.
        scores: (B, H, W), higher = more important; equal scores go by lowest index first.
        target: (B,) classes.
        against: (B,) classes to compare with: the curves are p(target) - p(against), which asks of a map to put first
            what speaks for the target, then what says nothing on the choice, and last what speaks for the other class.
        fractions: ascending shares from 0 to 1, both included; `round(share * units)` units are perturbed.
        cells: rank and perturb the cells of this rows x columns grid instead of pixels; scores are averaged in each.
        max_batch: perturbed images a forward pass; `perturbed_batch_size` of the device when left out.

    Returns:
        the curves, per image.

    Raises:
        ValueError: the shapes do not fit, the scores are not finite, or the fractions do not run from 0 to 1.

    Reference: RISE (https://arxiv.org/abs/1806.07421) defines the metrics; the 21 points and the rounding are those of
    AHA's released evaluation.
    """
    if scores.shape != (len(pixel_values), *pixel_values.shape[-2:]):
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, but images of shape {tuple(pixel_values.shape)} need "
            f"{(len(pixel_values), *pixel_values.shape[-2:])}."
        )
    if reference.shape != pixel_values.shape or target.shape != scores.shape[:1]:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)} and target {tuple(target.shape)}, but images of shape "
            f"{tuple(pixel_values.shape)} need {tuple(pixel_values.shape)} and {tuple(scores.shape[:1])}."
        )
    if against is not None and against.shape != target.shape:
        raise ValueError(
            f"against has shape {tuple(against.shape)}, but must name one class for each of {len(target)} images."
        )
    if len(fractions) < 3 or list(fractions) != sorted(fractions) or fractions[0] != 0 or fractions[-1] != 1:
        raise ValueError(
            f"fractions must ascend from 0 to 1 with at least one between, but they are {tuple(fractions)}."
        )
    size = tuple(scores.shape[-2:])
    ranked = scores if cells is None else pool_to_cells(scores, cells)
    units = ranked[0].numel()
    inner = torch.tensor([round(share * units) for share in fractions[1:-1]], device=scores.device)
    max_batch = perturbed_batch_size(pixel_values.device) if max_batch is None else max_batch
    deletion, insertion = [], []
    for row in range(len(scores)):
        masks = hard_masks(ranked[row : row + 1].flatten(1), inner).unflatten(-1, ranked.shape[-2:])
        masks = spread_cells(masks, size) if cells is not None else masks
        image, blank = pixel_values[row : row + 1], reference[row : row + 1]
        masks = masks.to(image.dtype)
        perturbed = torch.cat(
            [image, deletion_images(image, blank, masks)[0], insertion_images(image, blank, masks)[0], blank]
        )
        logits = torch.cat([logits_of(chunk).float() for chunk in perturbed.split(max_batch)])
        probability = logits.softmax(-1)[:, target[row]].cpu()
        if against is not None:
            probability = probability - logits.softmax(-1)[:, against[row]].cpu()
        clean, deleted, inserted, empty = probability.split([1, len(inner), len(inner), 1])
        deletion.append(torch.cat([clean, deleted, empty]))
        insertion.append(torch.cat([empty, inserted, clean]))
    return Curves(torch.tensor(fractions), torch.stack(deletion), torch.stack(insertion))
