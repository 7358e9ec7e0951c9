"""Joining the parts of a finished measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..metrics.results import ProtocolResult, ResultContext, merge_results
from .results import NOT_FINITE, BenchmarkResults, MethodRecord
from .runner import BenchmarkSettings
from .store import BenchmarkError, Store, protocol_key, unpack


def collect(
    store: Store,
    settings: BenchmarkSettings,
    count: int,
    passes: Mapping[str, tuple[int, int]],
    run: Mapping[str, Any],
    image_size: tuple[int, int],
) -> BenchmarkResults:
    """Join the parts of a finished measurement.

    Args:
        store: the folder, complete.
        settings: as measured.
        count: number of images.
        passes: of each method, forward and backward.
        run: what else the results should say of the run, JSON values.
        image_size: height and width of the classifier's input.

    Raises:
        BenchmarkError: a part is missing, as after an interruption.
    """
    batches = range(-(-count // settings.batch_size))
    images: list[str] = []
    unreadable: dict[str, str] = {}
    no_mask: dict[str, str] = {}
    predicted: dict[str, int] = {}
    labels: dict[str, int] | None = None
    parts_of: dict[str, list[dict[str, Any]]] = {}
    for entry in settings.entries:
        tried = count if entry.images is None else min(entry.images, count)
        wanted = [batch for batch in batches if batch * settings.batch_size < tried]
        context = replace(settings.context, method=entry.method.title)
        parts = [_read(store, entry.name, batch, settings, context, image_size, run["versions"]) for batch in wanted]
        parts_of[entry.name] = parts
        if len(parts) > -(-len(images) // settings.batch_size):
            images = [image for part in parts for image in part["images"]]
        for part in parts:
            unreadable |= part["unreadable"]
            no_mask |= part.get("no_mask", {})
            predicted |= dict(zip(part["readable"], part["predicted"], strict=True))
            if part["labels"] is not None:
                labels = {} if labels is None else labels
                labels.update(zip(part["readable"], part["labels"], strict=True))
    images = images[: max(count if entry.images is None else entry.images for entry in settings.entries)]
    protocols: dict[str, dict[str, ProtocolResult]] = {protocol.name: {} for protocol in settings.protocols}
    metrics: dict[str, dict[str, np.ndarray]] = {}
    directions: dict[str, bool | None] = {}
    records = []
    for entry in settings.entries:
        parts = parts_of[entry.name]
        tried = images[: count if entry.images is None else entry.images]
        for protocol in settings.protocols:
            found = [part["results"][protocol.name] for part in parts]
            joined = _joined(found, labelled=labels is not None)
            protocols[protocol.name][entry.name] = joined.select(tried)
        for name in settings.metrics:
            readable = [image for image in tried[: settings.metric_images.get(name)] if image not in unreadable]
            asked = [part for part in parts if name in part["metrics"]]
            for column in dict.fromkeys(column for part in asked for column in part["metrics"][name]):
                by_image: dict[str, float | None] = {}
                for part in asked:
                    values = part["metrics"][name].get(column, [None] * len(part["readable"]))
                    by_image |= dict(zip(part["readable"], values, strict=True))
                found = [by_image[image] for image in readable]
                metrics.setdefault(column, {})[entry.name] = np.array(
                    [np.nan if value is None else value for value in found], np.float32
                )
                directions[column] = settings.metrics[name].higher_is_better if column == name else None
        records.append(_record(entry.name, entry.method.title, passes[entry.name], parts, tried, unreadable))
    return BenchmarkResults(
        run={**run, "image_size": list(image_size)},
        images=tuple(images),
        unreadable=unreadable,
        predicted=predicted,
        labels=labels,
        methods=tuple(records),
        protocols=protocols,
        metrics=metrics,
        directions=directions,
        metric_images={name: images for name, images in settings.metric_images.items() if name in settings.metrics},
        no_mask={image: no_mask[image] for image in images if image in no_mask},
    )


def _record(
    name: str,
    title: str,
    passes: tuple[int, int],
    parts: Sequence[Mapping[str, Any]],
    tried: Sequence[str],
    unreadable: Mapping[str, str],
) -> MethodRecord:
    wanted = set(tried)
    failed = {image: part["failed"] for part in parts if part["failed"] for image in part["readable"]}
    failed |= {image: NOT_FINITE for part in parts for image in part["not_finite"]}
    return MethodRecord(
        name=name,
        title=title,
        passes=tuple(passes),
        images=len(tried),
        seconds=tuple(part["seconds"] for part in parts if part["seconds"] is not None),
        peak_mib=tuple(part["peak_mib"] for part in parts if part["peak_mib"] is not None),
        constant=tuple(image for part in parts for image in part["constant"] if image in wanted),
        unmeasured={name: reason for part in parts for name, reason in part["unmeasured"].items()},
        failed=tuple((image, why) for image, why in failed.items() if image in wanted and image not in unreadable),
    )


def _read(
    store: Store,
    name: str,
    batch: int,
    settings: BenchmarkSettings,
    context: ResultContext,
    image_size: tuple[int, int],
    versions: dict[str, str],
) -> dict[str, Any]:
    """A part with its curves as arrays, which take a tenth of the memory of the lists that JSON gives."""
    part = store.read(name, batch)
    missing = part is None or any(protocol_key(protocol) not in part["results"] for protocol in settings.protocols)
    metrics = settings.metrics_from(batch * settings.batch_size)
    if missing or any(metric not in part["metrics"] for metric in metrics):
        raise BenchmarkError(f"batch {batch} of {name!r} was not measured; go on with --resume.")
    packed = part.pop("results")
    part["results"] = {
        protocol.name: unpack(packed[protocol_key(protocol)], protocol, context, image_size, versions)
        for protocol in settings.protocols
    }
    return part


def _joined(results: Sequence[ProtocolResult], *, labelled: bool) -> ProtocolResult:
    """One result from those of the batches, some of which may have no image, and then no dtype either."""
    dropped = tuple(pair for result in results for pair in result.dropped)
    measured = [replace(result, dropped=()) for result in results if len(result)]
    nothing = replace(results[0], dtype="none", labels=np.zeros(0, np.int64) if labelled else None)
    return replace(merge_results(measured) if measured else nothing, dropped=dropped)
