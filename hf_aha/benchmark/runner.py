"""Measuring methods by protocols and metrics, batch by batch, in one process or several."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..baselines import Method, MissingLibraryError
from ..classifier_aha import FrozenClassifier
from ..metrics.calls import Explain
from ..metrics.evaluation import MeasuredImages
from ..metrics.passes import TargetPasses, passes_in
from ..metrics.protocols import Protocol
from ..metrics.results import ResultContext, library_versions
from ..metrics.subject import Subject
from ..metrics.unoptimised import UnoptimisedMetric
from ..perturbation import Normalization
from .cost import measured_cost
from .images import EvaluationImages, collate_images, collate_masks
from .masks import ObjectColumn
from .methods import Entry
from .restore import restore_parts
from .store import MASKS, BenchmarkError, Store, average, pack, protocol_key


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured, and how.

    Args:
        entries: the methods; the first is the one that others are compared with.
        protocols: of deletion, insertion and their relatives.
        metrics: that nothing was trained on, by name (`hf_aha.metrics.unoptimised`).
        context: target model, data set and order of the images.
        normalization: mean and std of the image processor.
        batch_size: images explained together.
        max_batch: perturbed images in a pass of the classifier.
        precision: of these passes, see `TargetPasses`.
        compiled: likewise.
        method_precision: of the passes that the methods themselves make, forward and backward; as `precision`.
        seed: of the metrics that draw something.
        examples: keep the maps of this many images for the sheet.
        metric_images: metrics, by name, that are measured on the first of the images only, and on how many.

    Raises:
        ValueError: there is no method, nothing to measure, two methods of one name, or a number is out of range.
    """

    entries: Sequence[Entry]
    protocols: Sequence[Protocol]
    metrics: Mapping[str, UnoptimisedMetric]
    context: ResultContext
    normalization: Normalization
    batch_size: int = 8
    max_batch: int = 10
    precision: str = "auto"
    compiled: bool = False
    method_precision: str = "float32"
    seed: int = 0
    examples: int = 4
    metric_images: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if not names:
            raise ValueError("There is no method to measure; name an explainer or a baseline.")
        if len(set(names)) != len(names):
            raise ValueError(f"Two methods have one name among {', '.join(names)}; measure them in two folders.")
        if not self.protocols and not self.metrics:
            raise ValueError("There is nothing to measure; name a protocol or a metric.")
        for name in ("batch_size", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be positive.")

    def metrics_from(self, first: int) -> dict[str, UnoptimisedMetric]:
        """The metrics of a batch whose first image has this number."""
        return {
            name: metric
            for name, metric in self.metrics.items()
            if name not in self.metric_images or first < self.metric_images[name]
        }


def measure(
    classifier: FrozenClassifier,
    images: EvaluationImages,
    settings: BenchmarkSettings,
    output: Path,
    *,
    resume: bool = False,
    progress: bool | None = None,
) -> Store:
    """Measure every method on every image, and keep the numbers in `output`.

    What the folder holds already is not measured again, so a run that was killed loses at most one batch of one
    method, and a finished one can be asked for more methods, protocols, metrics or images, also where of its folder
    only `run.json` and the results were kept. Started in several
    processes (with `accelerate launch` or `torchrun`), each takes every n-th batch; they share the folder.

    Args:
        classifier: the target model, on its device.
        images: in the order in which they are measured.
        settings: what is measured.
        output: folder; created if it is missing.
        resume: go on where the folder holds something already.
        progress: show a bar; None for on a terminal only.

    Returns:
        the folder, complete in the main process.

    Raises:
        BenchmarkError: the folder holds another measurement, a library is missing, or memory ran out.
        ValueError: a metric needs masks of the objects, and the images have none.
        OSError: the folder cannot be written.
    """
    masked = [name for name, metric in settings.metrics.items() if metric.needs_masks]
    if masked and images.objects is None:
        raise ValueError(f"The metric {masked[0]!r} needs masks of the objects: give the images objects=.")
    state = processes(next(classifier.parameters()).device.type)
    passes = TargetPasses(classifier, settings.precision, settings.compiled)
    store = Store(output)
    if state.is_main_process:
        store.open(
            run_identity(settings, passes, images.objects),
            {entry.name: {"title": entry.method.title, **entry.identity()} for entry in settings.entries},
            resume,
        )
        restore_parts(store, settings.batch_size)
    state.wait_for_everyone()
    batches = range(state.process_index, -(-len(images) // settings.batch_size), state.num_processes)
    hidden = True if progress is False or not state.is_main_process else None if progress is None else False
    sizes = {batch: len(rows_of(batch, images, settings)) for batch in batches}
    with tqdm(total=sum(sizes.values()) * len(settings.entries), unit="map", disable=hidden) as bar:
        for batch in batches:
            _measure_batch(batch, classifier, passes, images, settings, store)
            bar.update(sizes[batch] * len(settings.entries))
    state.wait_for_everyone()
    return store


def processes(device_type: str) -> PartialState | _OneProcess:
    """The processes that share the work, as Accelerate knows them; call it before anything is put on a GPU.

    A slow process is waited for however long it takes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _OneProcess()
    return PartialState(cpu=device_type == "cpu", timeout=timedelta(days=7))


@dataclass(frozen=True)
class _OneProcess:
    process_index: int = 0
    num_processes: int = 1
    is_main_process: bool = True

    def wait_for_everyone(self) -> None:
        pass


def run_identity(
    settings: BenchmarkSettings, passes: TargetPasses, objects: ObjectColumn | None = None
) -> dict[str, Any]:
    """What all numbers in a folder share, JSON values."""
    context = asdict(settings.context)
    del context["method"]
    in_methods = passes_in(settings.method_precision, passes.classifier)
    return {
        "context": context,
        "normalization": {"mean": list(settings.normalization.mean), "std": list(settings.normalization.std)},
        "batch_size": settings.batch_size,
        "precision": f"{passes.precision}, compiled" if passes.compiled else passes.precision,
        **({} if in_methods == "float32" else {"method_precision": in_methods}),
        "device": passes.device.type,
        "seed": settings.seed,
        "versions": library_versions(),
        **({} if objects is None else {MASKS: objects.facts()}),
    }


def rows_of(batch: int, images: EvaluationImages, settings: BenchmarkSettings) -> range:
    """Numbers of the images of one batch."""
    return range(batch * settings.batch_size, min((batch + 1) * settings.batch_size, len(images)))


def _measure_batch(
    batch: int,
    classifier: FrozenClassifier,
    passes: TargetPasses,
    images: EvaluationImages,
    settings: BenchmarkSettings,
    store: Store,
) -> None:
    """Measure what is missing of one batch; the images are read, and seen by the classifier, at most once."""
    rows = rows_of(batch, images, settings)
    loaded: _Batch | None = None
    for entry in settings.entries:
        if entry.images is not None and rows.start >= entry.images:
            continue
        part = store.read(entry.name, batch)
        if part is not None and (part["failed"] or len(part["images"]) != len(rows)):
            part = None
        keys = {protocol_key(protocol): protocol for protocol in settings.protocols}
        protocols = {key: one for key, one in keys.items() if part is None or key not in part["results"]}
        metrics = {
            name: metric
            for name, metric in settings.metrics_from(rows.start).items()
            if part is None or name not in part["metrics"]
        }
        if part is not None and not protocols and not metrics:
            continue
        if loaded is None:
            loaded = _load(batch, rows, classifier, passes, images, settings, store)
        fresh = loaded.part(entry, protocols, metrics)
        if part is not None:
            fresh = {
                **part,
                "failed": fresh["failed"],
                "results": {**part["results"], **fresh["results"]},
                "metrics": {**part["metrics"], **fresh["metrics"]},
                "unmeasured": {**part["unmeasured"], **fresh["unmeasured"]},
                "no_mask": {**part.get("no_mask", {}), **fresh["no_mask"]},
            }
        store.write(entry.name, batch, fresh)


def _load(
    batch: int,
    rows: range,
    classifier: FrozenClassifier,
    passes: TargetPasses,
    images: EvaluationImages,
    settings: BenchmarkSettings,
    store: Store,
) -> _Batch:
    loaded = [images[row] for row in rows]
    ids, pixel_values, labels, errors = collate_images(loaded)
    shared, masks, no_mask = None, None, {}
    if pixel_values is not None:
        shared = MeasuredImages(
            passes,
            pixel_values.to(passes.device),
            normalization=settings.normalization,
            labels=labels if images.has_labels else None,
            max_batch=settings.max_batch,
            image_ids=ids,
        )
        masks, no_mask = collate_masks(loaded, ids)
    names = [row["id"] for row in loaded]
    return _Batch(batch, names, errors, classifier, passes, shared, masks, no_mask, settings, store)


@dataclass(frozen=True)
class _Batch:
    number: int
    ids: list[str]
    errors: dict[str, str]
    classifier: FrozenClassifier
    passes: TargetPasses
    images: MeasuredImages | None
    masks: torch.Tensor | None
    no_mask: dict[str, str]
    settings: BenchmarkSettings
    store: Store

    def part(
        self, entry: Entry, protocols: Mapping[str, Protocol], metrics: Mapping[str, UnoptimisedMetric]
    ) -> dict[str, Any]:
        """All numbers of one method on this batch, JSON values."""
        unreadable = {image: f"the image cannot be read: {reason}" for image, reason in self.errors.items()}
        part: dict[str, Any] = {
            "images": self.ids,
            "unreadable": unreadable,
            "readable": [] if self.images is None else list(self.images.ids),
            "predicted": [] if self.images is None else self.images.predicted.tolist(),
            "labels": None if self.images is None or self.images.labels is None else self.images.labels.tolist(),
            "constant": [],
            "not_finite": [],
            "failed": None,
            "seconds": None,
            "peak_mib": None,
            "results": {},
            "metrics": {},
            "unmeasured": {},
            "no_mask": self.no_mask,
        }
        if self.images is None:
            part["results"] = {key: _nothing(unreadable, protocol) for key, protocol in protocols.items()}
            part["metrics"] = {name: {} for name in metrics}
            return part
        runs = [self._explain(method, part) for method in entry.method.repeats()]
        if part["failed"]:
            everything = {**unreadable, **dict.fromkeys(self.images.ids, part["failed"])}
            part["results"] = {key: _nothing(everything, protocol) for key, protocol in protocols.items()}
            part["metrics"] = {name: {} for name in metrics}
            return part
        constant = torch.stack([scores.flatten(1).amax(1) == scores.flatten(1).amin(1) for scores in runs]).any(0)
        broken = ~torch.stack([torch.isfinite(scores).flatten(1).all(1) for scores in runs]).all(0)
        for name, rows in (("constant", constant & ~broken), ("not_finite", broken)):
            part[name] = [image for image, found in zip(self.images.ids, rows.tolist(), strict=True) if found]
        context = replace(self.settings.context, method=entry.method.title)
        measured = [
            self.images.measure(scores, self.images.predicted, list(protocols.values()), context=context)
            for scores in runs
        ]
        for key, results in zip(protocols, zip(*measured, strict=True), strict=True):
            result = results[0] if len(results) == 1 else average(results)
            part["results"][key] = pack(replace(result, dropped=(*result.dropped, *unreadable.items())))
        for name, metric in metrics.items():
            part["metrics"][name] = self._metric(metric, entry, runs, part)
        self._keep_examples(entry, runs[0])
        return part

    def _explain(self, method: Method, part: dict[str, Any]) -> torch.Tensor | None:
        """Scores (B, H, W), or None with the reason in `part`; the cost of the first of several repeats is kept."""
        shape = (len(self.images.ids), *self.images.pixel_values.shape[-2:])
        try:
            with measured_cost(self.passes.device) as cost:
                scores = self._scores(method)
        except MissingLibraryError as error:
            raise BenchmarkError(str(error)) from error
        except (RuntimeError, ValueError) as error:
            # Listed image by image in the results, and tried again by --resume.
            part["failed"] = f"the method failed: {type(error).__name__}: {' '.join(str(error).split())}"
            return None
        if part["seconds"] is None:
            part["seconds"], part["peak_mib"] = cost.seconds / shape[0], cost.peak_mib
        if tuple(scores.shape) != shape:
            found, wanted = (" x ".join(map(str, one)) for one in (tuple(scores.shape), shape))
            part["failed"] = f"the method gave scores of {found} where {wanted} are needed"
            return None
        return scores.float()

    def _scores(self, method: Method) -> torch.Tensor:
        pixel_values, target = self.images.pixel_values, self.images.predicted.to(self.passes.device)
        explain = self._explain_with(method, self.classifier)
        try:
            return explain(pixel_values, target)
        except torch.OutOfMemoryError:
            if len(pixel_values) == 1:
                raise
        rows = range(len(pixel_values))
        return torch.cat([explain(pixel_values[row : row + 1], target[row : row + 1]) for row in rows])

    def _explain_with(self, method: Method, classifier: FrozenClassifier) -> Explain:
        """The method's calls on a classifier, in the precision of the methods."""
        fast = passes_in(self.settings.method_precision, classifier) == "bfloat16"

        def explain(pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.passes.device.type, torch.bfloat16, enabled=fast):
                return method(classifier, pixel_values, target)

        return explain

    def _metric(
        self, metric: UnoptimisedMetric, entry: Entry, runs: Sequence[torch.Tensor], part: dict[str, Any]
    ) -> dict[str, list[float | None]]:
        """The columns of one metric, a value an image or None; no column, with the reason in `part`, if it fails."""
        target = self.images.predicted.to(self.passes.device)
        found = []
        for method, scores in zip(entry.method.repeats(), runs, strict=True):
            explain_with = partial(self._explain_with, method)
            subject = Subject(
                explain=explain_with(self.classifier),
                logits_of=self.passes,
                normalization=self.settings.normalization,
                classifier=self.classifier,
                explain_with=explain_with,
                external_encoder=getattr(getattr(method, "explainer", None), "encoder", None) is not None,
            )
            reason = metric.not_applicable(subject)
            if reason is None:
                try:
                    found.append(
                        metric.compute(
                            subject,
                            self.images.pixel_values,
                            target,
                            self.settings.seed,
                            scores=scores,
                            masks=self.masks if metric.needs_masks else None,
                            batch_size=self.settings.max_batch,
                        )
                    )
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError) as error:
                    reason = f"it failed: {type(error).__name__}: {' '.join(str(error).split())}"
            if reason is not None:
                part["unmeasured"][metric.name] = reason
                return {}
        columns = {name: torch.stack([one[name].detach().float().cpu() for one in found]).mean(0) for name in found[0]}
        return {
            name: [value if np.isfinite(value) else None for value in column.tolist()]
            for name, column in columns.items()
        }

    def _keep_examples(self, entry: Entry, scores: torch.Tensor) -> None:
        first = self.number * self.settings.batch_size
        count = min(self.settings.examples - first, len(scores))
        if count > 0:
            maps = dict(zip(self.images.ids[:count], scores[:count].cpu().numpy(), strict=True))
            self.store.write_maps(entry.name, self.number, maps)


def _nothing(reasons: Mapping[str, str], protocol: Protocol) -> dict[str, Any]:
    """A packed result without any image."""
    empty = {
        "target": [],
        "labels": None,
        "values": [],
        "curves": [],
        "clean": [],
        "reference": [],
        "tie_fraction": [],
    }
    return {"image_ids": [], "dtype": None, "dropped": [list(pair) for pair in reasons.items()], **empty}
