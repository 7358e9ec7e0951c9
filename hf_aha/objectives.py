"""The training and refinement objective: what deletion and insertion measure, made differentiable by soft ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from .draws import Generators, StepDraws, uniform
from .perturbation import (
    REFERENCES,
    Normalization,
    deletion_images,
    gaussian_blur,
    insertion_images,
    pool_to_cells,
    random_references,
    spread_cells,
)
from .ranking import RANKERS, make_ranker, standardize


@dataclass(frozen=True)
class ObjectiveOutput:
    """One evaluation of the objective.

    Attributes:
        loss: scalar to descend.
        deletion: mean class probability with the most important pixels removed, detached; lower is better.
        insertion: mean class probability with only the most important pixels shown, detached; higher is better.
        peak_penalty: unweighted penalty on isolated peaks, detached.
    """

    loss: torch.Tensor
    deletion: torch.Tensor
    insertion: torch.Tensor
    peak_penalty: torch.Tensor


@dataclass(frozen=True)
class FaithfulnessObjective:
    """Deletion plus insertion area of the class probability, estimated at random points of both curves.

    loss = deletion_weight * mean_k p(image without its top k/K) - mean_k p(only its top k/K)
        + peak_weight * peak penalty + tv_weight * total variation

    The first mean estimates the deletion area, the second the insertion area, so with a weight of 1 and no penalties
    the loss lies in [-1, 1] and equals the paper's "deletion + (1 - area of the least important first)" minus one.

    Args:
        ranker: `"transport"`, `"sinkhorn"` or `"quantile"`.
        num_bins: K, equal steps of the curves.
        curve_points: random points per curve and image; 0 takes all of 1..K-1 (both ends have no gradient).
        straight_through: perturb with hard masks and differentiate the soft ones; soft masks in both when off.
        noise: scale of the ranker's Gumbel noise.
        pixel_share: share of steps that rank pixels; the others rank the cells of a random grid.
        grid_range: least and most cells a side of a random grid, drawn uniformly.
        references: kinds of reference, drawn per image.
        blur_sigma: of the blurred reference, as a share of the shorter side.
        mask_smoothing: sigma in pixels of a Gaussian on the masks; 0 for none.
        peak_weight: weight of the peak penalty.
        tv_weight: weight of the total variation of the standardised scores.
        deletion_weight: of deletion against insertion. One map has one order: above 1 it gives up some insertion area
            for deletion area.
        score: `"probability"` (softmax) or `"log_odds"` of the class.

    Raises:
        ValueError: a value is unknown or out of its range.

    Example:
        >>> FaithfulnessObjective.preset("paper").num_bins
        15

    Reference: AHA (https://arxiv.org/abs/2604.05819) and its released defaults; preset `"paper"` holds them.
    """

    ranker: str = "quantile"
    num_bins: int = 20
    curve_points: int = 4
    straight_through: bool = False
    noise: float = 0.0
    pixel_share: float = 0.5
    grid_range: tuple[int, int] = (7, 28)
    references: Sequence[str] = field(default_factory=lambda: ("blur", "mean"))
    blur_sigma: float = 0.05
    mask_smoothing: float = 0.0
    peak_weight: float = 0.0
    tv_weight: float = 0.0
    deletion_weight: float = 1.0
    score: str = "probability"

    @classmethod
    def preset(cls, name: str) -> FaithfulnessObjective:
        """`"default"` (ours) or `"paper"` (the released settings: square Sinkhorn on 7..28 cells, 16 points, noise).

        Raises:
            ValueError: unknown preset.
        """
        if name == "default":
            return cls()
        if name == "paper":
            # 16 fractions from 0 to 1 are 15 steps; fraction 0 is the clean image and carries no gradient.
            # The blur of the released code is sigma 37 px at 224 px.
            return cls(
                ranker="sinkhorn",
                num_bins=15,
                curve_points=0,
                straight_through=False,
                noise=1.0,
                pixel_share=0.0,
                references=("black", "mean", "blur"),
                blur_sigma=37 / 224,
                mask_smoothing=1.0,
                peak_weight=0.0025,
            )
        raise ValueError(f"Unknown objective preset {name!r}; choose 'default' or 'paper'.")

    def __post_init__(self):
        if self.score not in ("probability", "log_odds"):
            raise ValueError(f"score must be 'probability' or 'log_odds', but it is {self.score!r}.")
        if self.ranker not in RANKERS:
            raise ValueError(f"ranker must be one of {', '.join(sorted(RANKERS))}, but it is {self.ranker!r}.")
        unknown = [kind for kind in self.references if kind not in REFERENCES]
        if unknown or not self.references:
            raise ValueError(f"references must be some of {', '.join(REFERENCES)}, but they are {self.references}.")
        if len(self.grid_range) != 2 or not 1 <= self.grid_range[0] <= self.grid_range[1]:
            raise ValueError(f"grid_range must be two rising numbers from 1 on, but it is {self.grid_range}.")
        for name in ("noise", "blur_sigma", "mask_smoothing", "peak_weight", "tv_weight", "deletion_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, but it is {getattr(self, name)}.")
        if self.num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, but it is {self.num_bins}.")
        if not 0 <= self.curve_points < self.num_bins:
            raise ValueError(f"curve_points must lie in 0..num_bins-1, but it is {self.curve_points}.")
        if not 0 <= self.pixel_share <= 1:
            raise ValueError(f"pixel_share must lie in [0, 1], but it is {self.pixel_share}.")

    def extremes(self) -> tuple[FaithfulnessObjective, ...]:
        """The same objective at pixels alone and at its finest grid alone: one of them needs the most memory."""
        finest = replace(self, pixel_share=0.0, grid_range=(self.grid_range[1], self.grid_range[1]))
        pixels = replace(self, pixel_share=1.0)
        return (pixels,) * (self.pixel_share > 0) + (finest,) * (self.pixel_share < 1)

    def without_noise(self) -> FaithfulnessObjective:
        """The same objective with a deterministic ranking, as refinement uses it."""
        return replace(self, noise=0.0)

    def __call__(
        self,
        scores: torch.Tensor,
        pixel_values: torch.Tensor,
        target: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        normalization: Normalization,
        *,
        tau: float,
        generator: torch.Generator | StepDraws,
    ) -> ObjectiveOutput:
        """Evaluate the objective for one map an image.

        Args:
            scores: (B, H, W) float32, with gradient.
            pixel_values: (B, 3, H, W) normalised images.
            target: (B,) int64 classes asked about.
            logits_of: the frozen classifier, (N, 3, H, W) -> (N, C); weights frozen, gradient to the input.
            normalization: of the classifier's image processor.
            tau: temperature of the ranking.
            generator: CPU generator of grid, points, references and noise; or those of a training step, of which one
                image's draws do not depend on the others'.
        """
        draws = generator if isinstance(generator, StepDraws) else StepDraws(generator, generator)
        size = tuple(scores.shape[-2:])
        references = normalization.normalize(
            random_references(
                normalization.denormalize(pixel_values), self.references, draws.images, blur_sigma=self.blur_sigma
            )
        )
        cells = self._draw_cells(size, draws.shared)
        deletion_steps = self._draw_steps(len(scores), draws.images)
        insertion_steps = self._draw_steps(len(scores), draws.images)
        steps = torch.cat([deletion_steps, insertion_steps], dim=1).to(scores.device)
        masks = self._masks(scores, cells, steps, tau, draws.images).to(pixel_values.dtype)
        deletion_masks, insertion_masks = masks.split([deletion_steps.shape[1], insertion_steps.shape[1]], dim=1)

        deleted = deletion_images(pixel_values, references, deletion_masks)
        inserted = insertion_images(pixel_values, references, insertion_masks)
        perturbed = torch.cat([deleted, inserted], dim=1)
        logits = logits_of(perturbed.flatten(0, 1)).float().unflatten(0, perturbed.shape[:2])
        index = target[:, None, None].expand(-1, logits.shape[1], 1)
        log_probability = F.log_softmax(logits, dim=-1).gather(-1, index)[..., 0]
        probability = log_probability.exp()
        deletion, insertion = probability.split([deleted.shape[1], inserted.shape[1]], dim=1)
        value = probability if self.score == "probability" else _log_odds(log_probability)
        value_deletion, value_insertion = value.split([deleted.shape[1], inserted.shape[1]], dim=1)

        penalty = peak_penalty(scores)
        loss = self.deletion_weight * value_deletion.mean() - value_insertion.mean()
        if self.peak_weight > 0:
            loss = loss + self.peak_weight * penalty
        if self.tv_weight > 0:
            loss = loss + self.tv_weight * score_variation(scores)
        return ObjectiveOutput(loss, deletion.detach().mean(), insertion.detach().mean(), penalty.detach())

    def _draw_cells(self, size: tuple[int, int], generator: torch.Generator) -> tuple[int, int] | None:
        if torch.rand((), generator=generator).item() < self.pixel_share:
            return None
        low, high = self.grid_range
        side = int(torch.randint(low, high + 1, (), generator=generator))
        return min(side, size[0]), min(side, size[1])

    def _draw_steps(self, batch: int, generator: Generators) -> torch.Tensor:
        """(B, points) steps in 1..K-1: one in each of `curve_points` equal parts of the curve, or all of them."""
        if self.curve_points == 0:
            return torch.arange(1, self.num_bins).expand(batch, -1)
        position = uniform((batch, self.curve_points), generator) + torch.arange(self.curve_points)
        return 1 + (position / self.curve_points * (self.num_bins - 1)).long().clamp_(max=self.num_bins - 2)

    def _masks(
        self,
        scores: torch.Tensor,
        cells: tuple[int, int] | None,
        steps: torch.Tensor,
        tau: float,
        generator: Generators,
    ) -> torch.Tensor:
        size = tuple(scores.shape[-2:])
        ranked = scores if cells is None else pool_to_cells(scores, cells)
        ranker = make_ranker(self.ranker, straight_through=self.straight_through, noise=self.noise)
        masks = ranker(ranked.flatten(1), self.num_bins, steps, tau=tau, generator=generator)
        masks = masks.unflatten(-1, ranked.shape[-2:])
        if cells is not None:
            masks = spread_cells(masks, size)
        return gaussian_blur(masks, self.mask_smoothing)


def peak_penalty(scores: torch.Tensor, window: int = 15) -> torch.Tensor:
    """Mean squared excess of scores (B, H, W) over their local mean: discourages isolated peaks.

    mean(relu(h - avgpool_window(h))^2), as in the released code of AHA (window 15 px at 224).
    """
    window = min(window, *scores.shape[-2:])
    window -= 1 - window % 2
    local = F.avg_pool2d(scores[:, None], window, stride=1, padding=window // 2, count_include_pad=False)[:, 0]
    return F.relu(scores - local).square().mean()


def score_variation(scores: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the standardised scores (B, H, W) of direct neighbours: discourages speckle.

    Standardised for each image, as the rankers do, so that it cannot be lowered by shrinking the scores. Normal noise
    of single pixels has 1.13, a ramp along one side of n pixels about 1.7 / n.

    Raises:
        ValueError: the maps are not (B, H, W), or have one pixel only.

    Example:
        >>> score_variation(torch.tensor([[[1.0, 3.0], [1.0, 3.0]]])).item()
        1.0
    """
    if scores.ndim != 3 or scores[0].numel() < 2:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, but must be (batch, height, width) of 2 pixels or more."
        )
    scores = standardize(scores.flatten(1)).view_as(scores)
    across, down = scores.diff(dim=2).abs(), scores.diff(dim=1).abs()
    return (across.sum() + down.sum()) / (across.numel() + down.numel())


def _log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    # log(1 - p) from log p; the clamp keeps a saturated p = 1 finite (odds of about 1e6 to 1).
    log_probability = log_probability.clamp(max=-1e-6)
    return log_probability - torch.log(-torch.expm1(log_probability))
