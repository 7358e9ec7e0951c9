"""The metrics that no explainer here was trained for, by name and with one call shape.

    metric = get_unoptimised("road")
    metric.not_applicable(subject)                        # None, or a sentence that says why
    metric.compute(subject, pixel_values, target, seed=0) # {"road": (B,), "road/morf": (B,), ...}

A metric whose `images_together` is above 1 puts images of one call together (mosaics), so that it wants as many images
a call as there are; all others give an image the same values in any batch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .calls import check_classes, check_images, check_scores, explain_in_batches, logits_in_batches
from .discrimination import Discrimination, class_discrimination, runner_up
from .legibility import edge_alignment, total_variation
from .localization import Localization, localization_shares
from .pointing import MIN_PROBABILITY, GridPointing, choose_groups, grid_pointing_shares
from .randomization import EXTERNAL_ENCODER, Randomization, cascading_randomization
from .road import Road, road_with_control
from .sensitivity import MaxSensitivity, max_sensitivity
from .subject import Subject


@dataclass(frozen=True)
class Query:
    """One call: `scores` (B, H, W) are the subject's maps of `target` (B,); `masks` (B, H, W) bool or None."""

    subject: Subject
    pixel_values: torch.Tensor
    target: torch.Tensor
    seed: int
    scores: torch.Tensor
    masks: torch.Tensor | None
    batch_size: int


@dataclass(frozen=True)
class UnoptimisedMetric:
    """A metric as a command line or a table needs it.

    Attributes:
        name: key in `UNOPTIMISED`, and the first key of what `compute` returns.
        unit: of the value.
        range: smallest and largest value; infinite where there is none.
        higher_is_better: direction, for the arrow in tables.
        description: one sentence on what the value says.
        undefined: when an image has no value (NaN), besides maps, pixels or logits that are not finite; "" for never.
        source: paper or code of the definition.
        measure: the computation; use `compute`, which checks its input.
        chance: value of a map that knows nothing, where there is one.
        images_together: images that are put together; they are taken from one call.
        needs_masks: `compute` must be given masks of the objects.
        needs_copies: the subject must have a `classifier` and `explain_with`.
        cost: maps asked of the method per image, besides the one of its target, in words.
    """

    name: str
    unit: str
    range: tuple[float, float]
    higher_is_better: bool
    description: str
    undefined: str
    source: str
    measure: Callable[[Query], dict[str, torch.Tensor]]
    cost: str
    chance: float | None = None
    images_together: int = 1
    needs_masks: bool = False
    needs_copies: bool = False

    def not_applicable(self, subject: Subject) -> str | None:
        """Why this metric says nothing about the subject, or None; such a subject has neither passed nor failed it."""
        if not self.needs_copies:
            return None
        if subject.external_encoder:
            return EXTERNAL_ENCODER
        if subject.classifier is None or subject.explain_with is None:
            return "it is not known how the method explains another classifier (classifier and explain_with)"
        return None

    def compute(
        self,
        subject: Subject,
        pixel_values: torch.Tensor,
        target: torch.Tensor,
        seed: int = 0,
        *,
        scores: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        batch_size: int = 32,
    ) -> dict[str, torch.Tensor]:
        """Measure some images.

        Args:
            subject: method and classifier.
            pixel_values: (B, 3, H, W) normalised images.
            target: (B,) classes the maps are asked about, usually the predicted ones.
            seed: of everything random.
            scores: (B, H, W) the subject's maps of `target`, where they are known already.
            masks: (B, H, W) bool, true on the object; only with `needs_masks`.
            batch_size: images a call of the method and of the classifier.

        Returns:
            (B,) float32 values on the CPU: first under `name`, then parts of them under `name/part`. NaN where an
            image has none; count these (`undefined` says when) and report them beside the mean.

        Raises:
            ValueError: an input does not fit, or the metric is not applicable to the subject.
        """
        reason = self.not_applicable(subject)
        if reason:
            raise ValueError(f"{self.name} is not applicable: {reason}.")
        check_images(pixel_values, target, batch_size)
        if self.needs_masks != (masks is not None):
            raise ValueError(f"{self.name} {'needs masks=' if self.needs_masks else 'takes no masks'}.")
        if scores is None:
            scores = explain_in_batches(subject.explain, pixel_values, target, batch_size)
        check_scores(scores, pixel_values)
        return self.measure(Query(subject, pixel_values, target, seed, scores, masks, batch_size))


def get_unoptimised(name: str) -> UnoptimisedMetric:
    """The metric of this name.

    Raises:
        ValueError: no metric has it; near names are suggested and all listed.

    Example:
        >>> get_unoptimised("road").higher_is_better
        True
    """
    if name not in UNOPTIMISED:
        near = difflib.get_close_matches(str(name), UNOPTIMISED, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"There is no metric {name!r}: {hint}The metrics are {', '.join(UNOPTIMISED)}.")
    return UNOPTIMISED[name]


def _road(query: Query) -> dict[str, torch.Tensor]:
    found = road_with_control(
        query.subject.logits_of,
        query.pixel_values,
        query.scores,
        query.target,
        query.subject.normalization,
        seed=query.seed,
        batch_size=query.batch_size,
    )
    return {
        "road": found.map.value,
        "road/morf": found.map.morf.mean(1),
        "road/lerf": found.map.lerf.mean(1),
        "road/blurred_copy": found.blurred.value,
        "road/gain_by_blur": found.gain_by_blur,
    }


def _grid_pointing(query: Query) -> dict[str, torch.Tensor]:
    logits = logits_in_batches(query.subject.logits_of, query.pixel_values, query.batch_size)
    check_classes(query.target, logits.shape[1])
    probability, predicted = logits.softmax(1).max(1)
    groups = choose_groups(predicted, probability, query.target, seed=query.seed)
    images = len(query.pixel_values)
    found = grid_pointing_shares(
        query.subject.explain, query.pixel_values, query.target, groups, batch_size=query.batch_size
    )
    return {
        "grid_pointing": found.per_image(found.rank_share, images),
        "grid_pointing/mass_share": found.per_image(found.mass_share, images),
    }


def _localization(query: Query) -> dict[str, torch.Tensor]:
    found = localization_shares(query.scores, query.masks)
    return {
        "localization": found.rank_share,
        "localization/hit": found.hit,
        "localization/mass_share": found.mass_share,
        "localization/chance": found.chance,
    }


def _randomization(query: Query) -> dict[str, torch.Tensor]:
    found = cascading_randomization(
        query.subject.classifier,
        query.subject.explain_with,
        query.pixel_values,
        query.target,
        seed=query.seed,
        scores=query.scores,
        batch_size=query.batch_size,
    )
    columns = zip(found.stages, found.correlation.unbind(1), strict=True)
    return {"randomization": found.value, **{f"randomization/{stage}": values for stage, values in columns}}


def _sensitivity(query: Query) -> dict[str, torch.Tensor]:
    found = max_sensitivity(
        query.subject.explain,
        query.pixel_values,
        query.target,
        query.subject.normalization,
        seed=query.seed,
        scores=query.scores,
        batch_size=query.batch_size,
    )
    return {
        "sensitivity": found.rank,
        "sensitivity/standardized": found.standardized,
        "sensitivity/raw": found.raw,
    }


def _class_discrimination(query: Query) -> dict[str, torch.Tensor]:
    logits = logits_in_batches(query.subject.logits_of, query.pixel_values, query.batch_size)
    found = class_discrimination(
        query.subject.explain,
        query.subject.logits_of,
        query.pixel_values,
        query.target,
        runner_up(logits, query.target.cpu()).to(query.target),
        query.subject.normalization,
        seed=query.seed,
        scores=query.scores,
        batch_size=query.batch_size,
    )
    return {
        "class_discrimination": found.contrast,
        "class_discrimination/own_effect": found.own_effect,
        "class_discrimination/rank_correlation": found.rank_correlation,
        "class_discrimination/top_overlap": found.top_overlap,
    }


def _total_variation(query: Query) -> dict[str, torch.Tensor]:
    return {"total_variation": total_variation(query.scores)}


def _edge_alignment(query: Query) -> dict[str, torch.Tensor]:
    return {"edge_alignment": edge_alignment(query.pixel_values, query.scores, query.subject.normalization)}


_METRICS = (
    UnoptimisedMetric(
        name=Road.name,
        unit="probability",
        range=Road.range,
        higher_is_better=Road.higher_is_better,
        description="Removing pixels by noisy linear imputation, half the mean gap between least and most important "
        "first; compare methods by it only beside the blurred copy.",
        undefined="",
        source="https://arxiv.org/abs/2202.00449, control after https://arxiv.org/abs/2304.13836",
        measure=_road,
        cost="none",
        chance=0.0,
    ),
    UnoptimisedMetric(
        name=GridPointing.name,
        unit="share of pixels",
        range=GridPointing.range,
        higher_is_better=GridPointing.higher_is_better,
        description="In a mosaic of four photographs shrunk to cells, the share of the top quarter of the pixels that "
        "lies in the asked photograph's cell.",
        undefined=f"photographs not predicted as their target with probability {MIN_PROBABILITY} or more, and those "
        "left over when mosaics of distinct classes are made",
        source="https://arxiv.org/abs/2205.10435, rank form ours",
        measure=_grid_pointing,
        cost="1 on a mosaic",
        chance=0.25,
        images_together=4,
    ),
    UnoptimisedMetric(
        name=Localization.name,
        unit="share of pixels",
        range=Localization.range,
        higher_is_better=Localization.higher_is_better,
        description="Share of the top pixels, as many as the object's mask has, that lie inside the mask.",
        undefined="empty masks",
        source="https://arxiv.org/abs/2003.07258 (share), https://arxiv.org/abs/1608.00507 (hit)",
        measure=_localization,
        cost="none",
        needs_masks=True,
    ),
    UnoptimisedMetric(
        name=Randomization.name,
        unit="rank correlation",
        range=Randomization.range,
        higher_is_better=Randomization.higher_is_better,
        description="Magnitude of the rank correlation of the map with those after the classifier was made random "
        "from the head down, mean over depths; 1 is a map that does not look at the weights.",
        undefined="constant maps",
        source="https://arxiv.org/abs/1810.03292",
        measure=_randomization,
        cost="1 a depth: the number of blocks and 2",
        chance=0.0,
        needs_copies=True,
    ),
    UnoptimisedMetric(
        name=MaxSensitivity.name,
        unit="relative distance of rank maps",
        range=MaxSensitivity.range,
        higher_is_better=MaxSensitivity.higher_is_better,
        description="Largest relative change of the rank map when every channel of every pixel moves by up to 0.02.",
        undefined="constant maps",
        source="https://arxiv.org/abs/1901.09392, captum's sensitivity_max",
        measure=_sensitivity,
        cost="10",
    ),
    UnoptimisedMetric(
        name=Discrimination.name,
        unit="nats",
        range=Discrimination.range,
        higher_is_better=Discrimination.higher_is_better,
        description="How much more deleting by a class's own map hurts it against the runner-up than deleting by the "
        "runner-up's map; 0 for maps that do not depend on the class.",
        undefined="",
        source="hf_aha.metrics.discrimination",
        measure=_class_discrimination,
        cost="1",
        chance=0.0,
    ),
    UnoptimisedMetric(
        name="total_variation",
        unit="share of that of a random order",
        range=(0.0, 1.5),
        higher_is_better=False,
        description="Mean difference of the ranks of neighbouring pixels: 1 is noise, near 0 a smooth map.",
        undefined="constant maps",
        source="hf_aha.metrics.legibility",
        measure=_total_variation,
        cost="none",
        chance=1.0,
    ),
    UnoptimisedMetric(
        name="edge_alignment",
        unit="share of variation",
        range=(0.0, 1.0),
        higher_is_better=True,
        description="Share of the rank map's variation that lies on the strongest fifth of the image's edges.",
        undefined="constant maps",
        source="hf_aha.metrics.legibility",
        measure=_edge_alignment,
        cost="none",
        chance=0.2,
    ),
)

UNOPTIMISED: dict[str, UnoptimisedMetric] = {metric.name: metric for metric in _METRICS}
"""Every metric by its name."""
