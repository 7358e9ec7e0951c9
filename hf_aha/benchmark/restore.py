"""Going on with a folder of which only the results are left, as in a repository: its parts, made from them again."""

from __future__ import annotations

from typing import Any

import numpy as np

from .results import NOT_FINITE, BenchmarkResults, MethodRecord
from .store import BenchmarkError, Store, pack, protocol_key


PER_IMAGE_FILE = "per_image.parquet"


def restore_parts(store: Store, batch_size: int) -> int:
    """Write the parts that `results.json` and `per_image.parquet` were collected from.

    Batches of which a method saw only some images, and those it failed on, are left out, so that they are measured
    again; so are the metrics that saw only some images of a batch. Example maps are not in the results and do not come
    back.

    Args:
        store: of a folder without parts; nothing happens where it holds some, or no results.
        batch_size: images of a batch, as measured.

    Returns:
        number of parts written.

    Raises:
        BenchmarkError: the results are of another version of hf_aha, or `per_image.parquet` is missing.
        OSError: the folder cannot be written.
    """
    if (store.folder / "parts").exists() or not (store.folder / "results.json").is_file():
        return 0
    if not (store.folder / PER_IMAGE_FILE).is_file():
        raise BenchmarkError(
            f"the folder {store.folder} holds a results.json without its {PER_IMAGE_FILE}, so its numbers cannot be "
            "gone on with; bring that file back, or give another --output."
        )
    results, written = BenchmarkResults.load(store.folder), 0
    for record in results.methods:
        failed = {image for image, why in record.failed if why != NOT_FINITE}
        batches = range(-(-record.images // batch_size))
        for batch in batches:
            images = results.images[batch * batch_size : (batch + 1) * batch_size]
            if record.images < batch * batch_size + len(images) or failed & set(images):
                continue
            part = _part(results, record, images)
            if len(record.seconds) == len(batches):
                part["seconds"] = record.seconds[batch]
            if len(record.peak_mib) == len(batches):
                part["peak_mib"] = record.peak_mib[batch]
            store.write(record.name, batch, part)
            written += 1
    return written


def _part(results: BenchmarkResults, record: MethodRecord, images: tuple[str, ...]) -> dict[str, Any]:
    """All numbers of one method on one batch, as `_Batch.part` of the runner writes them, without the cost."""
    readable = [image for image in images if image not in results.unreadable]
    metrics: dict[str, dict[str, list[float | None]]] = {
        name: {}
        for name, direction in results.directions.items()
        if direction is not None and set(readable) <= set(results.readable(record, name))
    }
    for column, by_method in results.metrics.items():
        name = column.split("/")[0]
        if record.name in by_method and name in metrics:
            numbers = dict(zip(results.readable(record, name), by_method[record.name].tolist(), strict=True))
            values = [numbers[image] for image in readable]
            metrics[name][column] = [value if np.isfinite(value) else None for value in values]
    return {
        "images": list(images),
        "unreadable": {image: results.unreadable[image] for image in images if image in results.unreadable},
        "readable": readable,
        "predicted": [results.predicted[image] for image in readable],
        "labels": None if results.labels is None else [results.labels[image] for image in readable],
        "constant": [image for image in record.constant if image in readable],
        "not_finite": [image for image, why in record.failed if why == NOT_FINITE and image in readable],
        "failed": None,
        "seconds": None,
        "peak_mib": None,
        "results": {
            protocol_key(by_method[record.name].protocol): pack(by_method[record.name].select(images))
            for by_method in results.protocols.values()
            if record.name in by_method
        },
        "metrics": metrics,
        "unmeasured": dict(record.unmeasured),
        "no_mask": {image: results.no_mask[image] for image in readable if image in results.no_mask},
    }
