"""Validation during training: hard deletion and insertion areas of a few photographs, shared by all processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from .data import Photographs, collate
from .metrics.curves import deletion_insertion_curves
from .modeling_aha import AhaExplainer
from .perturbation import Normalization, reference_image
from .training_args import AhaTrainingArguments


_BATCH = 8
_FRACTIONS = tuple(step / 10 for step in range(11))


class _Stopped(Exception):
    """This process leaves the measuring, for the reduction that all of them share."""


@torch.no_grad()
def validation_areas(
    explainer: AhaExplainer,
    decoder: nn.Module,
    photographs: Photographs,
    args: AhaTrainingArguments,
    accelerator: Accelerator,
    *,
    stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """Mean areas under the curves of the first `eval_images` rows, for the predicted class, at pixels and patch cells.

    Every process measures its own rows; the means are over all of them, and the same on every process.

    Args:
        explainer: with its classifier attached.
        decoder: whose maps are measured, whole and in evaluation mode.
        photographs: rows as the image processor makes them.
        args: `eval_images`, `eval_references`, `blur_sigma` and `seed` are used.
        accelerator: of the run.
        stopped: asked before every pass whether the run is to end.

    Returns:
        `validation/REFERENCE/deletion`, `validation/REFERENCE/cells/deletion` and the same of insertion, in [0, 1];
        empty where a process was stopped, None where no row can be read.
    """
    normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
    blur_sigma = args.objective().blur_sigma
    rows = list(range(min(args.eval_images, len(photographs))))
    rows = rows[accelerator.process_index :: accelerator.num_processes]
    sums = {
        f"validation/{kind}{suffix}/{name}": 0.0
        for kind in args.eval_references
        for suffix in ("", "/cells")
        for name in ("deletion", "insertion")
    }

    def logits_of(pixel_values: torch.Tensor) -> torch.Tensor:
        if stopped():
            raise _Stopped
        with accelerator.autocast():
            return explainer.classifier(pixel_values).logits

    count = 0
    with contextlib.suppress(_Stopped):
        for start in range(0, len(rows), _BATCH):
            batch = collate([photographs[row] for row in rows[start : start + _BATCH]])
            if batch.pixel_values is None:
                continue
            pixel_values = batch.pixel_values.to(accelerator.device)
            with accelerator.autocast():
                tokens, logits = explainer.features(pixel_values)
                target = logits.argmax(-1)
                gradients = explainer.gradients(pixel_values, target)
                scores = decoder(tokens, pixel_values, explainer.classifier.class_vectors(target), gradients).float()
            rgb = normalization.denormalize(pixel_values)
            generator = torch.Generator().manual_seed(args.seed)
            for kind in args.eval_references:
                reference = reference_image(rgb, kind, blur_sigma=blur_sigma, generator=generator)
                reference = normalization.normalize(reference)
                for suffix, cells in (("", None), ("/cells", explainer.classifier.grid(*pixel_values.shape[-2:]))):
                    curves = deletion_insertion_curves(
                        logits_of, pixel_values, reference, scores, target, fractions=_FRACTIONS, cells=cells
                    )
                    for name, area in (("deletion", curves.deletion_auc), ("insertion", curves.insertion_auc)):
                        sums[f"validation/{kind}{suffix}/{name}"] += float(area.sum())
            count += len(pixel_values)
    names = sorted(sums)
    totals = torch.tensor([float(stopped()), count, *(sums[name] for name in names)], device=accelerator.device)
    any_stopped, count, *totals = accelerator.reduce(totals, "sum").tolist()
    if any_stopped:
        return {}
    return {name: round(total / count, 4) for name, total in zip(names, totals, strict=True)} if count else None


__all__ = ["validation_areas"]
