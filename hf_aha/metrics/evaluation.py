"""Measuring score maps by protocols, image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch.nn import functional as F

from ..perturbation import Normalization, perturbed_batch_size, pool_to_cells
from ..ranking import hard_ranks
from .protocols import ADAPTIVE_BLUR, Protocol
from .reduction import class_scores, curve_areas, protocol_response
from .references import make_references
from .results import ProtocolResult, ResultContext, library_versions


_MDA_CONFIDENCE = 0.6

# Protocols that agree in everything else perturb the same pixels of the same images.
_NOT_PERTURBATION = ("name", "version", "score", "auc", "image_filter", "higher_is_better")

LogitsOf = Callable[[torch.Tensor], torch.Tensor]


def evaluate_maps(
    classifier_logits_fn: LogitsOf,
    pixel_values: torch.Tensor,
    scores: torch.Tensor,
    target: torch.Tensor,
    protocol: Protocol,
    *,
    normalization: Normalization,
    labels: torch.Tensor | None = None,
    max_batch: int | None = None,
    image_ids: Sequence[str] | None = None,
    context: ResultContext | None = None,
) -> ProtocolResult:
    """Measure one map an image by one protocol; measure a data set batch by batch and join with `merge_results`.

    The classifier is only called: its dtype, device and mode stay. Images without a number (a map, logits or a curve
    that are not finite, an image the protocol's filter leaves out, a `target` that is not the predicted class where
    the protocol scores that one, an unknown label where the protocol needs it) are listed in `dropped` with the
    reason.
    Several maps or protocols on the same images are cheaper through one `MeasuredImages`.

    Args:
        classifier_logits_fn: (N, 3, H, W) -> logits (N, C).
        pixel_values: (B, 3, H, W) normalised images.
        scores: (B, H, W), higher = more important, any real dtype.
        target: (B,) class each map was asked about.
        protocol: one of `get_protocol(..)` or your own.
        normalization: mean and std of the image processor.
        labels: (B,) ground truth, -1 where unknown; needed by accuracy, by class_source "label" and by the filter
            "mda".
        max_batch: perturbed images a forward pass; `perturbed_batch_size` of the device when left out.
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
    images = MeasuredImages(
        classifier_logits_fn,
        pixel_values,
        normalization=normalization,
        labels=labels,
        max_batch=max_batch,
        image_ids=image_ids,
    )
    return images.measure(scores, target, [protocol], context=context)[0]


@dataclass
class _References:
    """The references of a batch under one rule, made row by row when first asked for."""

    images: torch.Tensor
    logits: torch.Tensor
    made: torch.Tensor
    failed: dict[int, str] = field(default_factory=dict)


class MeasuredImages:
    """A batch of images with what all maps and protocols on them share.

    The logits of the clean images, the references and the logits of these are computed once, when first needed, and
    serve every later `measure`; within one `measure`, protocols that perturb the same pixels share the perturbed
    passes (both numbers of MDA; `aha/deletion` and `hf_aha/pixel/mean/deletion`).

    Args:
        logits_of: the classifier, (N, 3, H, W) -> (N, C); only called.
        pixel_values, normalization, labels, max_batch, image_ids: as in `evaluate_maps`.

    Attributes:
        ids: (B,) names of the images.

    Raises:
        ValueError: as `evaluate_maps`.

    Example:
        >>> images = MeasuredImages(
        ...     lambda pixels: pixels.mean((2, 3)),
        ...     torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        ...     normalization=Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ... )
        >>> from hf_aha.metrics import get_protocol
        >>> results = images.measure(torch.rand(2, 8, 8), images.predicted, get_protocol("aha"))
        >>> [result.protocol.name for result in results], len(results[0])
        (['aha/deletion', 'aha/insertion'], 2)
    """

    def __init__(
        self,
        logits_of: LogitsOf,
        pixel_values: torch.Tensor,
        *,
        normalization: Normalization,
        labels: torch.Tensor | None = None,
        max_batch: int | None = None,
        image_ids: Sequence[str] | None = None,
    ) -> None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not len(pixel_values):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but must be (batch, 3, height, width)."
            )
        if max_batch is None:
            max_batch = perturbed_batch_size(pixel_values.device)
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}, but must be positive.")
        batch = len(pixel_values)
        self.ids = tuple(str(row) for row in range(batch)) if image_ids is None else tuple(map(str, image_ids))
        if len(self.ids) != batch or len(set(self.ids)) != batch:
            raise ValueError(
                f"image_ids must be {batch} different names, one an image, but {len(set(self.ids))} were given."
            )
        self.pixel_values, self.normalization, self.max_batch = pixel_values, normalization, max_batch
        self._logits_of = logits_of
        self.clean, self.dtype = self._run(pixel_values)
        self.labels = None if labels is None else self._classes("labels", labels, lowest=-1)
        self._references: dict[tuple, _References] = {}

    @property
    def predicted(self) -> torch.Tensor:
        """(B,) int64 on the CPU: the class of the largest logit of each clean image."""
        return self.clean.argmax(1)

    @torch.no_grad()
    def measure(
        self,
        scores: torch.Tensor,
        target: torch.Tensor,
        protocols: Sequence[Protocol],
        *,
        context: ResultContext | None = None,
    ) -> list[ProtocolResult]:
        """Measure one map an image by each of the protocols; arguments, results and errors as in `evaluate_maps`."""
        shape = (len(self.ids), *self.pixel_values.shape[-2:])
        if scores.shape != shape:
            raise ValueError(f"scores have shape {tuple(scores.shape)}, but these images need {shape}.")
        target = self._classes("target", target, lowest=0)
        for protocol in protocols:
            self._check_protocol(protocol)
        memo: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        context = ResultContext() if context is None else context
        return [self._measure_one(scores, target, protocol, context, memo) for protocol in protocols]

    def _measure_one(
        self,
        scores: torch.Tensor,
        target: torch.Tensor,
        protocol: Protocol,
        context: ResultContext,
        memo: dict[tuple, tuple[torch.Tensor, torch.Tensor]],
    ) -> ProtocolResult:
        scored = {"predicted": self.predicted, "label": self.labels, "given": target}[protocol.class_source]
        maps = _units(scores, protocol)
        reasons = self._unmeasurable(scores, maps, target, scored, protocol)
        references, failed = self._references_of(protocol, scored, self._left(reasons))
        reasons = {**failed, **reasons}
        rows = self._left(reasons)
        maps, scored = maps[rows.to(maps.device)].to(self.pixel_values.device), scored[rows]
        full = class_scores(self.clean[rows], scored, protocol.score)
        empty = class_scores(references.logits[rows], scored, protocol.score)
        draws = self._raw_draws(maps, scored, references, rows, protocol, memo)
        finite = torch.isfinite(draws).all(2).all(0) & torch.isfinite(empty)
        for row in rows[~finite].tolist():
            reasons[row] = "the classifier gave logits that are not finite on a perturbed image"
        responses = [protocol_response(curve, full, empty, maps, protocol) for curve in draws]
        start = full if protocol.start == "image" else empty
        values = torch.stack([curve_areas(response, protocol, start) for response in responses]).mean(0)
        return ProtocolResult(
            protocol=protocol,
            context=context,
            image_size=tuple(self.pixel_values.shape[-2:]),
            dtype=self.dtype,
            versions=library_versions(),
            image_ids=tuple(self.ids[row] for row in rows[finite].tolist()),
            target=target[rows][finite].numpy().astype(np.int64),
            labels=None if self.labels is None else self.labels[rows][finite].numpy().astype(np.int64),
            values=values[finite].numpy(),
            curves=torch.stack(responses).mean(0)[finite].numpy(),
            clean=full[finite].numpy(),
            reference=empty[finite].numpy(),
            tie_fraction=_tie_fraction(maps.flatten(1)).cpu()[finite].numpy(),
            dropped=tuple((self.ids[row], reasons[row]) for row in sorted(reasons)),
        )

    def _unmeasurable(
        self,
        scores: torch.Tensor,
        maps: torch.Tensor,
        target: torch.Tensor,
        scored: torch.Tensor,
        protocol: Protocol,
    ) -> dict[int, str]:
        """Rows without a number, before anything is perturbed, each with the first reason that holds."""
        reasons: dict[int, str] = {}

        def drop(rows: torch.Tensor, reason: str) -> None:
            for row in torch.nonzero(rows.cpu())[:, 0].tolist():
                reasons.setdefault(row, reason)

        drop(~torch.isfinite(scores).flatten(1).all(1), "the map holds NaN or infinite values")
        drop(~torch.isfinite(self.clean).all(1), "the classifier gave logits that are not finite")
        if protocol.class_source == "label" or protocol.image_filter == "mda":
            drop(self.labels < 0, "the label of the image is not known")
        if protocol.class_source == "predicted":
            drop(target != scored, "the map explains another class than the predicted one, which this protocol scores")
        if protocol.image_filter == "mda" or protocol.score == "magnitude_aligned":
            drop((maps == 0).flatten(1).all(1), "the map is zero everywhere")
        if protocol.image_filter == "mda":
            drop(scored != self.labels, "the prediction is not the label")
            drop(
                self.clean.softmax(1).amax(1) < _MDA_CONFIDENCE,
                f"the predicted class has a probability under {_MDA_CONFIDENCE}",
            )
            # The blur decides on deletion too, which does not show it, so that all curves of MDA see the same images.
            blur = {"recipe": "gkern_adaptive", **ADAPTIVE_BLUR, "padding": "zeros"}
            blurred = replace(protocol, reference="blur", reference_args=blur, space="normalised")
            reasons = {**self._references_of(blurred, scored, self._left(reasons))[1], **reasons}
        return reasons

    def _left(self, reasons: dict[int, str]) -> torch.Tensor:
        return torch.tensor([row for row in range(len(self.ids)) if row not in reasons], dtype=torch.int64)

    def _references_of(
        self, protocol: Protocol, scored: torch.Tensor, rows: torch.Tensor
    ) -> tuple[_References, dict[int, str]]:
        """The references, made at least for `rows`, and why some of these rows have none."""
        adaptive = ("recipe", "gkern_adaptive") in protocol.reference_args
        key = (protocol.reference, protocol.reference_args, protocol.space, tuple(scored.tolist()) if adaptive else ())
        if key not in self._references:
            self._references[key] = _References(
                torch.zeros_like(self.pixel_values),
                torch.full_like(self.clean, torch.nan),
                torch.zeros(len(self.ids), dtype=torch.bool),
            )
        known = self._references[key]
        new = rows[~known.made[rows]]
        if len(new):
            places = new.to(self.pixel_values.device)

            def probability_of(blurred: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
                logits = self._run(blurred.to(self.pixel_values.dtype))[0]
                return logits.softmax(1)[torch.arange(len(positions)), scored[new[positions]]]

            made, failed = make_references(protocol, self.pixel_values[places], self.normalization, probability_of)
            known.images[places], known.logits[new], known.made[new] = made, self._run(made)[0], True
            known.failed.update({int(new[position]): reason for position, reason in failed.items()})
        return known, {row: known.failed[row] for row in rows.tolist() if row in known.failed}

    def _raw_draws(
        self,
        maps: torch.Tensor,
        scored: torch.Tensor,
        references: _References,
        rows: torch.Tensor,
        protocol: Protocol,
        memo: dict[tuple, tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """(draws, K, P) score at every fraction in every order of the ties; rows measured before are not repeated."""
        kind = protocol.score if protocol.score in ("accuracy", "logit") else "probability"
        perturbation = [field.name for field in fields(Protocol) if field.name not in _NOT_PERTURBATION]
        key = (kind, *(getattr(protocol, name) for name in perturbation))
        if key not in memo:
            shape = (protocol.tie_orders, len(self.ids), len(protocol.fractions))
            memo[key] = torch.full(shape, torch.nan), torch.zeros(len(self.ids), dtype=torch.bool)
        measured, done = memo[key]
        missing = ~done[rows]
        if bool(missing.any()):
            new = rows[missing]
            pending = maps[missing.to(maps.device)].flatten(1)
            for draw, ranks in enumerate(_rank_draws(pending, protocol)):
                measured[draw, new] = self._raw_curves(ranks, scored[missing], references, new, protocol)
            done[new] = True
        return measured[:, rows]

    def _raw_curves(
        self,
        ranks: torch.Tensor,
        scored: torch.Tensor,
        references: _References,
        rows: torch.Tensor,
        protocol: Protocol,
    ) -> torch.Tensor:
        """(K, P) score at every fraction; the untouched ends are not computed again."""
        counts = protocol.counts(ranks.shape[1])
        places = rows.to(self.pixel_values.device)
        images, blanks = self.pixel_values[places], references.images[places]
        full = class_scores(self.clean[rows], scored, protocol.score)
        empty = class_scores(references.logits[rows], scored, protocol.score)
        begin, end = (full, empty) if protocol.start == "image" else (empty, full)
        columns = [column for column, count in enumerate(counts) if 0 < count < ranks.shape[1]]
        curves = torch.stack([begin if count == 0 else end for count in counts], 1).clone()
        shown, hidden = (images, blanks) if protocol.start == "image" else (blanks, images)
        height, width = images.shape[-2:]
        grid = _grid((height, width), protocol.cell)
        pairs = torch.cartesian_prod(torch.arange(len(images)), torch.tensor(columns, dtype=torch.int64)).view(-1, 2)
        for pair in pairs.split(self.max_batch) if len(pairs) else ():
            chosen, cut = pair[:, 0].to(ranks.device), torch.tensor(counts)[pair[:, 1]].to(ranks.device)
            mask = (ranks[chosen] < cut[:, None]).unflatten(1, grid)
            mask = mask.repeat_interleave(protocol.cell[0], 1).repeat_interleave(protocol.cell[1], 2)
            mask = mask[:, None, :height, :width]
            # With masks of zeros and ones, blending in RGB and normalising afterwards is this same selection; images
            # that were not perturbed stay exactly what the classifier saw.
            logits, _ = self._run(torch.where(mask, hidden[chosen], shown[chosen]))
            curves[pair[:, 0], pair[:, 1]] = class_scores(logits, scored[pair[:, 0]], protocol.score)
        return curves

    @torch.no_grad()
    def _run(self, images: torch.Tensor) -> tuple[torch.Tensor, str]:
        """(N, C) float32 logits on the CPU, and the dtype they came in."""
        chunks = [self._logits_of(chunk) for chunk in images.split(self.max_batch)]
        return torch.cat([chunk.float().cpu() for chunk in chunks]), str(chunks[0].dtype).removeprefix("torch.")

    def _check_protocol(self, protocol: Protocol) -> None:
        if self.labels is None and (protocol.class_source == "label" or protocol.image_filter == "mda"):
            raise ValueError(f"Protocol {protocol.name!r} needs the ground truth: pass labels=.")
        height, width = self.pixel_values.shape[-2:]
        if protocol.cell[0] > height or protocol.cell[1] > width:
            raise ValueError(
                f"Protocol {protocol.name!r} ranks cells of {protocol.cell[0]} x {protocol.cell[1]} pixels, which do "
                f"not fit into images of {height} x {width}."
            )
        rows, columns = _grid((height, width), protocol.cell)
        protocol.counts(rows * columns)

    def _classes(self, name: str, classes: torch.Tensor, lowest: int) -> torch.Tensor:
        batch, count = self.clean.shape
        if classes.shape != (batch,) or classes.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name} has shape {tuple(classes.shape)} and dtype {classes.dtype}, but must be ({batch},) integers."
            )
        classes = classes.cpu().long()
        if not bool(((classes >= lowest) & (classes < count)).all()):
            raise ValueError(f"{name} holds {classes.tolist()}, but the classifier has the classes 0 to {count - 1}.")
        return classes


def _grid(size: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of cells; the last of each may be smaller than the others."""
    return -(-size[0] // cell[0]), -(-size[1] // cell[1])


def _units(scores: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """(B, rows, columns) score of every pixel or cell, float32 or float64."""
    maps = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
    if not scores.is_floating_point():
        maps = scores.double()
    if protocol.map_values == "absolute":
        maps = maps.abs()
    if protocol.unit == "pixel":
        return maps
    height, width = maps.shape[-2:]
    if height % protocol.cell[0] or width % protocol.cell[1]:
        return F.avg_pool2d(maps[:, None], protocol.cell, ceil_mode=True, count_include_pad=False)[:, 0]
    return pool_to_cells(maps, _grid((height, width), protocol.cell))


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
