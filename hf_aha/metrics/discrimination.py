"""Class discrimination: the map of one class against the map of another on the same image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..perturbation import Normalization, deletion_images, reference_image
from ..ranking import hard_masks
from .calls import (
    Explain,
    LogitsOf,
    check_classes,
    check_images,
    check_scores,
    explain_in_batches,
    finite_rows,
    logits_in_batches,
    only_where,
    real_scores,
)
from .rank_maps import rank_correlation


EFFECT_FRACTIONS = (0.1, 0.3, 0.5)
"""Shares of removed pixels over which the effects are averaged."""

TOP_FRACTION = 0.1


@dataclass(frozen=True)
class Discrimination:
    """How the maps of two classes a and b differ, in looks and in effect; float32 on the CPU, NaN without a value.

    With m(x) = log p_a(x) - log p_b(x), the margin of a over b (the difference of their logits), and x\\a the image
    without the most important pixels of map a, mean over `fractions`:

    Attributes:
        contrast: (B,) (m(x\\b) - m(x\\a)) / 2 in nats, higher is better: deleting by map a hurts a rather than b, and
            deleting by map b hurts b rather than a. Exactly 0 for a map that does not depend on the class.
        own_effect: (B,) m(x) - m(x\\a) in nats, higher is better: deleting by map a lowers a more than b. A map
            without regard to the class may have a high one where a is the predicted class.
        rank_correlation: (B,) Spearman's, -1..1, of the two maps; 1 for a map that does not depend on the class. Low
            is better only together with a high contrast: random maps have 0.
        top_overlap: (B,) share of the top pixels of one map among those of the other, 0..1; ties by lowest index.
        margin: (B,) m(x) in nats.
    """

    name: ClassVar[str] = "class_discrimination"
    higher_is_better: ClassVar[bool] = True
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))

    contrast: torch.Tensor
    own_effect: torch.Tensor
    rank_correlation: torch.Tensor
    top_overlap: torch.Tensor
    margin: torch.Tensor


def class_discrimination(
    explain: Explain,
    logits_of: LogitsOf,
    pixel_values: torch.Tensor,
    class_a: torch.Tensor,
    class_b: torch.Tensor,
    normalization: Normalization,
    *,
    fractions: Sequence[float] = EFFECT_FRACTIONS,
    top_fraction: float = TOP_FRACTION,
    reference: str = "blur",
    seed: int = 0,
    scores: torch.Tensor | None = None,
    batch_size: int = 32,
) -> Discrimination:
    """Explain two classes and delete by both maps.

    Args:
        explain: the method; called for both classes.
        logits_of: the classifier, (N, 3, H, W) -> (N, C).
        pixel_values: (B, 3, H, W) normalised images.
        class_a: (B,) first classes, usually the predicted ones.
        class_b: (B,) other classes; `runner_up` gives the most probable ones.
        normalization: the image processor's.
        fractions: shares of removed pixels within 0..1, `round(share * H * W)` pixels each, ties by lowest index.
        top_fraction: share of the pixels that count as top in `top_overlap`.
        reference: what a removed pixel becomes, as in `hf_aha.perturbation.reference_image`.
        seed: of the reference `"noise"`.
        scores: (B, H, W) maps of class a, where they are known already.
        batch_size: images a call.

    Raises:
        ValueError: shapes do not fit, a class does not exist or is asked against itself, or a share is out of range.

    Reference: our own; the similarity of maps across classes is the question of https://arxiv.org/abs/1810.03292 and
    of Rao et al. (https://arxiv.org/abs/2205.10435).
    """
    check_images(pixel_values, class_a, batch_size)
    check_images(pixel_values, class_b)
    if bool((class_a.cpu() == class_b.cpu()).any()):
        row = int((class_a.cpu() == class_b.cpu()).nonzero()[0])
        raise ValueError(f"class_a and class_b of image {row} are both {int(class_a[row])}; give two classes.")
    shares = (*fractions, top_fraction)
    if not len(fractions) or not all(0 < share < 1 for share in shares):
        raise ValueError(f"fractions and top_fraction must lie within 0..1, but they are {shares}.")
    logits = logits_in_batches(logits_of, pixel_values, batch_size)
    for classes in (class_a, class_b):
        check_classes(classes, logits.shape[1])
    pair = torch.stack([class_a.cpu().long(), class_b.cpu().long()], 1)
    clean = _margin(logits, pair)
    if scores is None:
        scores = explain_in_batches(explain, pixel_values, class_a, batch_size)
    check_scores(scores, pixel_values)
    maps = [real_scores(scores.detach()), explain_in_batches(explain, pixel_values, class_b, batch_size)]
    maps = [scores.to(pixel_values.device) for scores in maps]
    usable = finite_rows(pixel_values, *maps)
    maps = [torch.where(usable[:, None, None], scores, 0.0) for scores in maps]
    images = torch.where(usable[:, None, None, None], pixel_values, 0.0)
    rgb = normalization.denormalize(images.float())
    generator = torch.Generator().manual_seed(seed)
    # One draw for all images, so that a value does not depend on its batch.
    blank = rgb[:1] if reference == "noise" else rgb
    blank = reference_image(blank, reference, generator=generator).expand_as(rgb)
    blank = normalization.normalize(blank).to(images.dtype)
    pixels = maps[0][0].numel()
    counts = torch.tensor([max(1, round(share * pixels)) for share in shares])
    deleted, tops = [], []
    for scores in maps:
        means = []
        for rows in torch.arange(len(images)).split(max(1, batch_size // len(fractions))):
            there = rows.to(images.device)
            masks = hard_masks(scores[there].flatten(1), counts[:-1]).view(len(rows), -1, *images.shape[-2:])
            shown = deletion_images(images[there], blank[there], masks.to(images.dtype)).flatten(0, 1)
            logits = logits_in_batches(logits_of, shown, batch_size)
            margins = _margin(logits, pair[rows].repeat_interleave(len(fractions), 0))
            means.append(margins.view(len(rows), -1).mean(1))
        deleted.append(torch.cat(means))
        tops.append(hard_masks(scores.flatten(1), counts[-1:])[:, 0])
    return Discrimination(
        contrast=only_where(usable, (deleted[1] - deleted[0]) / 2),
        own_effect=only_where(usable, clean - deleted[0]),
        rank_correlation=only_where(usable, rank_correlation(*maps)),
        top_overlap=only_where(usable, (tops[0] * tops[1]).sum(1) / counts[-1].to(tops[0].device)),
        margin=only_where(usable, clean),
    )


def _margin(logits: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """(N,) logit of the first class minus that of the second; NaN where a logit is not finite."""
    a, b = logits.gather(1, pair).unbind(1)
    return torch.where(torch.isfinite(logits).all(1), a - b, torch.nan)


def runner_up(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The most probable class other than the target: (B, C), (B,) -> (B,) int64.

    Raises:
        ValueError: there is only one class, or a class does not exist.

    Example:
        >>> runner_up(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1])).tolist()
        [2]
    """
    if logits.shape[1] < 2:
        raise ValueError("The classifier has one class only, so there is no other to compare with.")
    check_classes(target, logits.shape[1])
    others = logits.scatter(1, target.to(logits.device).long()[:, None], float("-inf"))
    return others.argmax(1)
