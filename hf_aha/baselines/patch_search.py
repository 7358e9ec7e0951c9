"""A greedy search for the order of the patches, in the manner of MDA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..classifier_aha import FrozenClassifier
from .base import (
    BASELINE_IMAGES,
    Method,
    Passes,
    baseline_image,
    check_choice,
    check_positive,
    check_share,
    class_probabilities,
    patch_numbers,
)


@dataclass(frozen=True, kw_only=True)
class PatchSearch(Method):
    """Order the patches by trying them on the classifier itself, the most important first, then the least important.

    1. Prior: every patch is replaced by the deletion baseline alone; the drop of p(c) orders the patches.
    2. Insertion: from the insertion baseline, the patch that raises p(c) most among the first `beam` of the remaining
       ones is revealed, until p(c) has covered `cutoff` of the way from the baseline's to the image's. These patches
       come first.
    3. Deletion: from the deletion baseline, the patch that leaves p(c) lowest among the last `beam` of the remaining
       ones is shown, until none is left. These come last, the first shown at the very end.

    The score of a patch is its place in that order, the same for all its pixels, so that curves see whole patches.
    This follows the released code of MDA (beam 28 at 14 x 14 patches, cutoff 0.9, blurred and zero baseline, the first
    patches of the insertion kept out of the deletion). It differs in the prior, which there is another attribution, in
    the blur, which there is chosen for each image, and in the scores, which there are the steps of a smoothed response
    curve; and patches are never segments. It searches the very curves that are measured afterwards: read it as what an
    order of patches can reach, not as an explanation found by other means.

    Args:
        beam: patches tried a step; the number of patches or more makes the search exhaustive at every step.
        cutoff: share of the probability at which insertion stops.
        insertion_baseline, deletion_baseline: see `baseline_image`.
    """

    title: ClassVar[str] = "Greedy patch search (MDA-style)"
    source: ClassVar[str] = "https://openreview.net/forum?id=rGP2jbWt0l"
    signed: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = True
    name = "patch-search"

    beam: int = 28
    cutoff: float = 0.9
    insertion_baseline: str = "blur"
    deletion_baseline: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beam", self.beam)
        check_share("cutoff", self.cutoff)
        check_choice("insertion_baseline", self.insertion_baseline, BASELINE_IMAGES)
        check_choice("deletion_baseline", self.deletion_baseline, BASELINE_IMAGES)

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        patches = grid[0] * grid[1]
        # The image, the insertion baseline and the prior; then a step for every patch, whichever search takes it.
        return Passes(2 + patches + sum(min(self.beam, left) for left in range(1, patches + 1)), 0)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        size = tuple(pixel_values.shape[-2:])
        numbers = patch_numbers(classifier.grid(*size), size).to(pixel_values.device)
        count = int(numbers.max()) + 1
        shown, hidden = (baseline_image(pixel_values, kind) for kind in self._baselines)

        def trials(canvas: torch.Tensor, patches: list[int], source: torch.Tensor) -> Iterator[torch.Tensor]:
            """Copies of the canvas, each with another patch taken from the source, in batches."""
            for start in range(0, len(patches), self.max_batch):
                tried = torch.tensor(patches[start : start + self.max_batch], device=numbers.device)
                yield torch.where((numbers == tried[:, None, None])[:, None], source, canvas)

        def probability(batches: torch.Tensor | Iterator[torch.Tensor]) -> torch.Tensor:
            return class_probabilities(classifier, batches, target[0])

        full, empty = probability(pixel_values), probability(shown)
        without = probability(trials(pixel_values, list(range(count)), hidden))
        remaining = torch.argsort(without, stable=True).tolist()

        first: list[int] = []
        reached = empty
        while remaining and bool(reached - empty < self.cutoff * (full - empty)):
            candidates = remaining[: self.beam]
            values = probability(trials(shown, candidates, pixel_values))
            best = candidates[int(values.argmax())]
            reached = values.max()
            first.append(best)
            remaining.remove(best)
            shown = torch.where(numbers == best, pixel_values, shown)

        last: list[int] = []
        while remaining:
            candidates = remaining[-self.beam :]
            values = probability(trials(hidden, candidates, pixel_values))
            best = candidates[int(values.argmin())]
            last.append(best)
            remaining.remove(best)
            hidden = torch.where(numbers == best, pixel_values, hidden)

        order = torch.tensor(first + last[::-1], device=numbers.device)
        places = torch.empty(count, device=numbers.device)
        places[order] = torch.arange(count, 0, -1, dtype=places.dtype, device=numbers.device)
        return places[numbers][None]

    @property
    def _baselines(self) -> tuple[str, str]:
        return self.insertion_baseline, self.deletion_baseline
