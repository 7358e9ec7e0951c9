"""ROAD: how the classifier's answer changes when pixels are removed by noisy linear imputation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..perturbation import Normalization, gaussian_blur
from ..ranking import hard_ranks
from .calls import (
    LogitsOf,
    check_classes,
    check_images,
    check_scores,
    finite_rows,
    logits_in_batches,
    only_where,
    real_scores,
)
from .imputation import NOISE, noisy_linear_imputation
from .rank_maps import rank_map


ROAD_FRACTIONS = tuple(tenth / 10 for tenth in range(1, 10))
"""0.1, 0.2, ..., 0.9 of the pixels removed."""

BLUR_OF_SIDE = 0.05
"""Standard deviation of the control's blur as a share of the shorter side: 11 pixels at 224."""

SCORES = ("probability", "logit")


@dataclass(frozen=True)
class Road:
    """Score changes of one map an image; float32 on the CPU, NaN for images without a value.

    Attributes:
        fractions: (F,) shares of removed pixels.
        morf: (B, F) score with the most important share removed minus the clean score; low is faithful.
        lerf: (B, F) score with the least important share removed minus the clean score; high is faithful.
        clean: (B,) score of the untouched image.
    """

    name: ClassVar[str] = "road"
    higher_is_better: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (-0.5, 0.5)

    fractions: torch.Tensor
    morf: torch.Tensor
    lerf: torch.Tensor
    clean: torch.Tensor

    @property
    def value(self) -> torch.Tensor:
        """(B,) mean over fractions of (lerf - morf) / 2; for probabilities in -0.5..0.5, 0 for a random order."""
        return (self.lerf - self.morf).mean(1) / 2


@dataclass(frozen=True)
class RoadWithControl:
    """ROAD of the maps and of their blurred copies, measured in the same way.

    Attributes:
        map: of the maps as they are.
        blurred: of `blurred_copy` of them.
    """

    map: Road
    blurred: Road

    @property
    def gain_by_blur(self) -> torch.Tensor:
        """(B,) what blurring alone adds to the value.

        A lead over another method that is no larger than that method's gain says only that the maps are blurrier.
        """
        return self.blurred.value - self.map.value


@torch.no_grad()
def road_curves(
    logits_of: LogitsOf,
    pixel_values: torch.Tensor,
    scores: torch.Tensor,
    target: torch.Tensor,
    normalization: Normalization,
    *,
    fractions: Sequence[float] = ROAD_FRACTIONS,
    noise: float = NOISE,
    seed: int = 0,
    score: str = "probability",
    batch_size: int = 32,
) -> Road:
    """Remove pixels most and least important first, let them continue their neighbours, and watch the class.

    Exactly `round(share * H * W)` pixels go; among equal scores the lowest index first, in both orders. Imputing is
    done in RGB of [0, 1]. ROAD was made so that the shape of the hole tells the classifier little; it does not measure
    whether the shown pixels suffice, and blurry maps have an advantage in it: see `road_with_control`.

    Args:
        logits_of: the classifier, (N, 3, H, W) -> (N, C).
        pixel_values: (B, 3, H, W) normalised images.
        scores: (B, H, W), higher = more important.
        target: (B,) class whose score is watched.
        normalization: the image processor's.
        fractions: shares in 0..1, each leaving at least one pixel and removing at least one.
        noise: standard deviation of the noise on removed pixels, RGB units.
        seed: of the noise; one field for all images and fractions.
        score: `"probability"` (softmax) or `"logit"`.
        batch_size: images a forward pass, and imputed at a time.

    Returns:
        the score changes; rows whose map, pixels or logits are not finite hold NaN.

    Raises:
        ValueError: shapes do not fit, a fraction or a class is out of range, or the score is unknown.

    Reference: Rong et al., ROAD (https://arxiv.org/abs/2202.00449); the value is that of `ROADCombined` in
    pytorch-grad-cam, which however removes every pixel that ties with the last one.
    """
    check_images(pixel_values, target, batch_size)
    check_scores(scores, pixel_values)
    if score not in SCORES:
        raise ValueError(f"score is {score!r}, but must be one of {', '.join(map(repr, SCORES))}.")
    counts = _counts(fractions, scores[0].numel())
    target = target.cpu().long()
    scores = real_scores(scores.detach()).to(pixel_values.device)
    usable = finite_rows(pixel_values, scores)
    # Rows without a value go through as zeros; they cost their passes, and their results are not kept.
    scores = torch.where(usable[:, None, None], scores, 0.0).flatten(1)
    images = torch.where(usable[:, None, None, None], pixel_values, 0.0)
    ranks = torch.stack([hard_ranks(scores), hard_ranks(-scores)])
    clean = logits_in_batches(logits_of, images, batch_size)
    check_classes(target, clean.shape[1])
    clean = _score(clean, target, score)
    rgb = normalization.denormalize(images.float())

    changed = torch.empty(2, len(images), len(counts))
    jobs = torch.cartesian_prod(torch.arange(2), torch.arange(len(images)), torch.arange(len(counts)))
    for job in jobs.split(batch_size):
        order, row, column = job.unbind(1)
        there = row.to(ranks.device)
        removed = ranks[order.to(ranks.device), there] < counts[column].to(ranks.device)[:, None]
        removed = removed.view(-1, 1, *images.shape[-2:])
        filled = noisy_linear_imputation(rgb[there], removed, noise=noise, seed=seed)[:, 0]
        logits = logits_in_batches(logits_of, normalization.normalize(filled).to(pixel_values.dtype), batch_size)
        changed[order, row, column] = _score(logits, target[row], score) - clean[row]
    return Road(
        fractions=torch.tensor(tuple(fractions)),
        morf=only_where(usable, changed[0]),
        lerf=only_where(usable, changed[1]),
        clean=only_where(usable, clean),
    )


def road_with_control(
    logits_of: LogitsOf,
    pixel_values: torch.Tensor,
    scores: torch.Tensor,
    target: torch.Tensor,
    normalization: Normalization,
    *,
    fractions: Sequence[float] = ROAD_FRACTIONS,
    noise: float = NOISE,
    seed: int = 0,
    score: str = "probability",
    batch_size: int = 32,
    blur_of_side: float = BLUR_OF_SIDE,
) -> RoadWithControl:
    """`road_curves` of the maps and of their blurred copies; twice the cost.

    Removal metrics with imputed pixels prefer blurry maps whether or not they are more faithful, so that ROAD alone
    cannot tell a better method from a blurrier one.

    Args:
        logits_of, pixel_values, scores, target, normalization: as `road_curves`.
        fractions, noise, seed, score, batch_size: as `road_curves`.
        blur_of_side: as `blurred_copy`.

    Raises:
        ValueError: as `road_curves` and `blurred_copy`.

    Reference: https://arxiv.org/abs/2304.13836 describes the preference.
    """
    check_images(pixel_values, target, batch_size)
    check_scores(scores, pixel_values)
    measured = [
        road_curves(
            logits_of,
            pixel_values,
            maps,
            target,
            normalization,
            fractions=fractions,
            noise=noise,
            seed=seed,
            score=score,
            batch_size=batch_size,
        )
        for maps in (scores, blurred_copy(scores, blur_of_side))
    ]
    return RoadWithControl(*measured)


def blurred_copy(scores: torch.Tensor, blur_of_side: float = BLUR_OF_SIDE) -> torch.Tensor:
    """The rank map of each image after a Gaussian blur, borders reflected.

    Ranks are blurred and not the scores, so that an increasing transform of the scores changes nothing.

    Args:
        scores: (B, H, W).
        blur_of_side: standard deviation as a share of the shorter side, positive.

    Returns:
        (B, H, W) float32 in [0, 1]; rows of maps that are not finite are NaN.

    Raises:
        ValueError: the share is not positive.
    """
    if not blur_of_side > 0:
        raise ValueError(f"blur_of_side is {blur_of_side}, but must be positive.")
    scores = real_scores(scores.detach())
    finite = finite_rows(scores)[:, None, None]
    ranks = rank_map(torch.where(finite, scores, 0.0))
    blurred = gaussian_blur(ranks[:, None], blur_of_side * min(scores.shape[-2:]))[:, 0]
    return torch.where(finite, blurred, torch.nan)


def _counts(fractions: Sequence[float], pixels: int) -> torch.Tensor:
    counts = [round(share * pixels) if 0 < share < 1 else 0 for share in fractions]
    if not counts or not all(0 < count < pixels for count in counts):
        raise ValueError(
            f"fractions are {tuple(fractions)}, but each must lie within 0..1 and remove 1 to {pixels - 1} of the "
            f"{pixels} pixels."
        )
    return torch.tensor(counts)


def _score(logits: torch.Tensor, target: torch.Tensor, score: str) -> torch.Tensor:
    """(N,) of the class; NaN where a logit is not finite."""
    values = logits.softmax(1) if score == "probability" else logits
    values = values.gather(1, target[:, None])[:, 0]
    return torch.where(torch.isfinite(logits).all(1), values, torch.nan)
