"""Measuring score maps by a protocol, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..perturbation import Normalization, pool_to_cells
from ..ranking import hard_ranks
from .protocols import ADAPTIVE_BLUR, Protocol
from .references import adaptive_blur, make_references, no_blur_reason
from .results import ProtocolResult, ResultContext, library_versions


_MDA_CONFIDENCE = 0.6

LogitsOf = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def evaluate_maps(
    classifier_logits_fn: LogitsOf,
    pixel_values: torch.Tensor,
    scores: torch.Tensor,
    target: torch.Tensor,
    protocol: Protocol,
    *,
    normalization: Normalization,
    labels: torch.Tensor | None = None,
    max_batch: int = 40,
    image_ids: Sequence[str] | None = None,
    context: ResultContext | None = None,
) -> ProtocolResult:
    """Measure one map an image by one protocol; measure a data set batch by batch and join with `merge_results`.

    The classifier is only called: its dtype, device and mode stay. Images without a number (a map, logits or a curve
    that are not finite, an image the protocol's filter leaves out, a `target` that is not the predicted class where
    the protocol scores that one) are listed in `dropped` with the reason.

    Args:
        classifier_logits_fn: (N, 3, H, W) -> logits (N, C).
        pixel_values: (B, 3, H, W) normalised images.
        scores: (B, H, W), higher = more important, any real dtype.
        target: (B,) class each map was asked about.
        protocol: one of `get_protocol(..)` or your own.
        normalization: mean and std of the image processor.
        labels: (B,) ground truth; needed by accuracy, by class_source "label" and by the filter "mda".
        max_batch: images a forward pass.
        image_ids: unique name of each image, for pairing and for the list of dropped ones; default "0", "1", ...
        context: what was measured; needed to tell later which results may be compared.

    Returns:
        values, curves and ends of every measured image, float32.

    Raises:
        ValueError: shapes do not fit, labels are missing, a class does not exist, or the protocol was made for another
            image size.

    Example:
        `evaluate_maps(model_logits, pixel_values, output.scores, target, get_protocol("aha/deletion")[0],
        normalization=Normalization(processor.image_mean, processor.image_std))`
    """
    ids = _check(pixel_values, scores, target, protocol, labels, max_batch, image_ids)
    target, labels = target.cpu(), None if labels is None else labels.cpu()
    reasons: dict[int, str] = {}

    def drop(rows: torch.Tensor, reason: str) -> None:
        for row in torch.nonzero(rows.cpu())[:, 0].tolist():
            reasons.setdefault(row, reason)

    def left() -> torch.Tensor:
        return torch.tensor([row for row in range(len(ids)) if row not in reasons], dtype=torch.int64)

    clean, dtype = _logits(classifier_logits_fn, pixel_values, max_batch)
    _check_classes(clean.shape[1], target, labels)
    scored = {"predicted": clean.argmax(1), "label": labels, "given": target}[protocol.class_source]

    def probability_of(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits, _ = _logits(classifier_logits_fn, images.to(pixel_values.dtype), max_batch)
        return logits.softmax(1)[torch.arange(len(rows)), scored[rows]]

    maps = _units(scores, protocol)
    drop(~torch.isfinite(scores).flatten(1).all(1), "the map holds NaN or infinite values")
    drop(~torch.isfinite(clean).all(1), "the classifier gave logits that are not finite")
    if protocol.class_source == "predicted":
        drop(target != scored, "the map explains another class than the predicted one, which this protocol scores")
    if protocol.image_filter == "mda" or protocol.score == "magnitude_aligned":
        drop((maps == 0).flatten(1).all(1), "the map is zero everywhere")
    if protocol.image_filter == "mda":
        confidence = clean.softmax(1).amax(1)
        drop(scored != labels, "the prediction is not the label")
        drop(confidence < _MDA_CONFIDENCE, f"the predicted class has a probability under {_MDA_CONFIDENCE}")
        if ("recipe", "gkern_adaptive") not in protocol.reference_args:
            # The blur decides on deletion too, which does not show it, so that all curves of MDA see the same images;
            # where it is the reference itself, making the references finds the images that have none.
            rows = left()
            _, kernels = adaptive_blur(
                pixel_values[rows.to(pixel_values.device)].float(),
                lambda blurred, positions: probability_of(blurred, rows[positions]),
                **ADAPTIVE_BLUR,
            )
            reasons.update({row: no_blur_reason(**ADAPTIVE_BLUR) for row in rows[kernels == 0].tolist()})

    rows = left()
    images = pixel_values[rows.to(pixel_values.device)]
    references, failed = make_references(
        protocol, images, normalization, lambda blurred, positions: probability_of(blurred, rows[positions])
    )
    reasons.update({int(rows[position]): reason for position, reason in failed.items()})
    maps, scored = maps[rows.to(maps.device)].to(pixel_values.device), scored[rows]
    full = _raw(clean[rows], scored, protocol)
    empty = (
        full.clone()
        if not len(rows)
        else _raw(_logits(classifier_logits_fn, references, max_batch)[0], scored, protocol)
    )
    draws = [
        _raw_curves(classifier_logits_fn, images, references, ranks, scored, full, empty, protocol, max_batch)
        for ranks in _rank_draws(maps.flatten(1), protocol)
    ]
    finite = torch.isfinite(torch.stack(draws)).all(2).all(0) & torch.isfinite(empty)
    for row in rows[~finite].tolist():
        reasons.setdefault(row, "the classifier gave logits that are not finite on a perturbed image")
    responses = [_response(curve, full, empty, maps, protocol) for curve in draws]
    start = full if protocol.start == "image" else empty

    kept = torch.isin(rows, left())
    rows = rows[kept]
    return ProtocolResult(
        protocol=protocol,
        context=ResultContext() if context is None else context,
        image_size=(pixel_values.shape[-2], pixel_values.shape[-1]),
        dtype=dtype,
        versions=library_versions(),
        image_ids=tuple(ids[row] for row in rows.tolist()),
        target=target[rows].numpy().astype(np.int64),
        labels=None if labels is None else labels[rows].numpy().astype(np.int64),
        values=torch.stack([_area(response, start, protocol) for response in responses]).mean(0)[kept].numpy(),
        curves=torch.stack(responses).mean(0)[kept].numpy(),
        clean=full[kept].numpy(),
        reference=empty[kept].numpy(),
        tie_fraction=_tie_fraction(maps.flatten(1)).cpu()[kept].numpy(),
        dropped=tuple((ids[row], reasons[row]) for row in sorted(reasons)),
    )


def _check(
    pixel_values: torch.Tensor,
    scores: torch.Tensor,
    target: torch.Tensor,
    protocol: Protocol,
    labels: torch.Tensor | None,
    max_batch: int,
    image_ids: Sequence[str] | None,
) -> tuple[str, ...]:
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not len(pixel_values):
        raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}, but must be (batch, 3, height, width).")
    batch, _, height, width = pixel_values.shape
    if scores.shape != (batch, height, width):
        raise ValueError(f"scores have shape {tuple(scores.shape)}, but these images need {(batch, height, width)}.")
    for name, classes in (("target", target), ("labels", labels)):
        if classes is not None and (classes.shape != (batch,) or classes.dtype not in (torch.int64, torch.int32)):
            raise ValueError(
                f"{name} has shape {tuple(classes.shape)} and dtype {classes.dtype}, but must be ({batch},) integers."
            )
    if labels is None and (protocol.class_source == "label" or protocol.image_filter == "mda"):
        raise ValueError(f"Protocol {protocol.name!r} needs the ground truth: pass labels=.")
    if height % protocol.cell[0] or width % protocol.cell[1]:
        raise ValueError(
            f"Protocol {protocol.name!r} ranks cells of {protocol.cell[0]} x {protocol.cell[1]} pixels, which do not "
            f"divide images of {height} x {width}."
        )
    if max_batch < 1:
        raise ValueError(f"max_batch is {max_batch}, but must be positive.")
    protocol.counts(height * width // (protocol.cell[0] * protocol.cell[1]))
    ids = tuple(str(row) for row in range(batch)) if image_ids is None else tuple(map(str, image_ids))
    if len(ids) != batch or len(set(ids)) != batch:
        raise ValueError(f"image_ids must be {batch} different names, one an image, but {len(set(ids))} were given.")
    return ids


def _check_classes(count: int, target: torch.Tensor, labels: torch.Tensor | None) -> None:
    for name, classes in (("target", target), ("labels", labels)):
        if classes is not None and not bool(((classes >= 0) & (classes < count)).all()):
            raise ValueError(f"{name} holds {classes.tolist()}, but the classifier has the classes 0 to {count - 1}.")


def _logits(logits_of: LogitsOf, images: torch.Tensor, max_batch: int) -> tuple[torch.Tensor, str]:
    """(N, C) float32 logits on the CPU, and the dtype they came in."""
    chunks = [logits_of(chunk) for chunk in images.split(max_batch)]
    return torch.cat([chunk.float().cpu() for chunk in chunks]), str(chunks[0].dtype).removeprefix("torch.")


def _units(scores: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """(B, rows, columns) score of every pixel or cell, float32 or float64."""
    maps = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    if not scores.is_floating_point():
        maps = scores.double()
    if protocol.map_values == "absolute":
        maps = maps.abs()
    if protocol.unit == "pixel":
        return maps
    return pool_to_cells(maps, (maps.shape[-2] // protocol.cell[0], maps.shape[-1] // protocol.cell[1]))


def _tie_fraction(maps: torch.Tensor) -> torch.Tensor:
    """(B,) share of units whose score another unit of the same image has too."""
    ordered = maps.sort(1).values
    same = ordered[:, 1:] == ordered[:, :-1]
    none = torch.zeros(len(maps), 1, dtype=torch.bool, device=maps.device)
    return (torch.cat([same, none], 1) | torch.cat([none, same], 1)).float().mean(1)


def _rank_draws(maps: torch.Tensor, protocol: Protocol) -> list[torch.Tensor]:
    """Ranks (B, units), 0 = perturbed first, of every order of the ties: one, or `tie_orders` random ones."""
    if not len(maps):
        return [torch.zeros(maps.shape, dtype=torch.int64, device=maps.device)]
    signed = maps if protocol.order == "most_relevant_first" else -maps
    if protocol.ties == "stable_index":
        return [hard_ranks(signed)]
    generator = torch.Generator().manual_seed(protocol.tie_seed)
    orders = [torch.randperm(maps.shape[1], generator=generator) for _ in range(protocol.tie_orders)]
    return [hard_ranks(signed[:, order.to(maps.device)])[:, order.argsort().to(maps.device)] for order in orders]


def _raw(logits: torch.Tensor, scored: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """(N,) float32 score of the scored class; NaN where the logits are not finite."""
    rows = torch.arange(len(logits))
    if protocol.score == "accuracy":
        value = (logits.argmax(1) == scored).float()
    elif protocol.score == "logit":
        value = logits[rows, scored]
    else:
        value = logits.softmax(1)[rows, scored]
    return torch.where(torch.isfinite(logits).all(1), value, torch.nan)


def _raw_curves(
    logits_of: LogitsOf,
    images: torch.Tensor,
    references: torch.Tensor,
    ranks: torch.Tensor,
    scored: torch.Tensor,
    full: torch.Tensor,
    empty: torch.Tensor,
    protocol: Protocol,
    max_batch: int,
) -> torch.Tensor:
    """(K, P) score at every fraction; the untouched ends are not computed again."""
    counts = protocol.counts(ranks.shape[1])
    begin, end = (full, empty) if protocol.start == "image" else (empty, full)
    columns = [column for column, count in enumerate(counts) if 0 < count < ranks.shape[1]]
    curves = torch.stack([begin if count == 0 else end for count in counts], 1).clone()
    shown, hidden = (images, references) if protocol.start == "image" else (references, images)
    height, width = protocol.cell
    grid = (images.shape[-2] // height, images.shape[-1] // width)
    pairs = torch.cartesian_prod(torch.arange(len(images)), torch.tensor(columns, dtype=torch.int64)).view(-1, 2)
    for pair in pairs.split(max_batch) if len(pairs) else ():
        rows, cut = pair[:, 0].to(ranks.device), torch.tensor(counts)[pair[:, 1]].to(ranks.device)
        mask = (ranks[rows] < cut[:, None]).unflatten(1, grid)
        mask = mask.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None]
        # With masks of zeros and ones, blending in RGB and normalising afterwards is this same selection; images
        # that were not perturbed stay exactly what the classifier saw.
        logits, _ = _logits(logits_of, torch.where(mask, hidden[rows], shown[rows]), max_batch)
        curves[pair[:, 0], pair[:, 1]] = _raw(logits, scored[pair[:, 0]], protocol)
    return curves


def _response(
    curve: torch.Tensor, full: torch.Tensor, empty: torch.Tensor, maps: torch.Tensor, protocol: Protocol
) -> torch.Tensor:
    """(K, P) the measured curve: the scores themselves, or MDA's normalised and monotone ones."""
    if protocol.score not in ("normalised_monotone", "magnitude_aligned"):
        return curve
    falling = protocol.start == "image"
    share = ((curve - empty[:, None]) / (full - empty).abs()[:, None]).clamp(0, 1)
    # 0 / 0, where the reference scores what the image scores, leaves the running extreme as it was.
    share = share.nan_to_num(nan=1.0 if falling else 0.0)
    monotone = share.cummin(1).values if falling else share.cummax(1).values
    if protocol.score == "normalised_monotone":
        return monotone
    ordered = maps.flatten(1).cpu().double().sort(1, descending=protocol.order == "most_relevant_first").values
    cumulative = torch.cat([torch.zeros(len(ordered), 1, dtype=torch.float64), ordered.cumsum(1)], 1)
    counts = torch.tensor(protocol.counts(ordered.shape[1]))
    moved = (cumulative[:, counts] / cumulative[:, -1:]).float()
    density = 1 - moved if falling else moved
    penalty = (monotone - density).abs()
    aligned = (monotone + penalty if falling else monotone - penalty).clamp(0, 1)
    low, high = aligned.amin(1, keepdim=True), aligned.amax(1, keepdim=True)
    ramp = torch.linspace(0, 1, len(counts))
    return torch.where(low == high, ramp.flip(0) if falling else ramp, (aligned - low) / (high - low))


def _area(curve: torch.Tensor, start: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """(K,) the protocol's area under (K, P)."""
    if protocol.auc == "mean_interval":
        return (curve.sum(1) - curve[:, 0] / 2 - curve[:, -1] / 2) / (curve.shape[1] - 1)
    fractions = torch.tensor(protocol.fractions)
    if protocol.auc == "trapezoid_unit":
        return torch.trapezoid(curve, fractions, dim=1)
    if protocol.fractions[0] > 0:
        curve, fractions = torch.cat([start[:, None], curve], 1), torch.cat([torch.zeros(1), fractions])
    return 100 * torch.trapezoid(curve, fractions, dim=1)
