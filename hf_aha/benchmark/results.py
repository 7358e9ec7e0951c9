"""What a measurement found: stored as JSON and parquet, and read back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from ..metrics.protocols import Protocol
from ..metrics.results import ProtocolResult, ResultContext, Summary, bootstrap
from .store import FORMAT, BenchmarkError, unpack
from .tables import PER_IMAGE, Group, read_groups, write_groups


NOT_FINITE = "the map holds NaN or infinite values"
"""Why a map is among those that failed, of a method that did give maps."""


@dataclass(frozen=True)
class MethodRecord:
    """What is known of a method besides its numbers.

    Attributes:
        name, title: as in `hf_aha.baselines`.
        passes: images through the classifier and back for one map, for this classifier and image size.
        images: on how many images it was tried, readable or not.
        seconds: (batches,) wall time for one map, the mean of each batch.
        peak_mib: (batches,) peak memory of each batch, empty where it cannot be measured.
        constant: images whose map has one value only; their pixels went by lowest index first.
        failed: images without a map, or with one of the wrong size or with values that are not finite, each with the
            reason.
        unmeasured: metrics that say nothing about this method, or failed on it, each with the reason.
    """

    name: str
    title: str
    passes: tuple[int, int]
    images: int
    seconds: tuple[float, ...]
    peak_mib: tuple[float, ...]
    constant: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    unmeasured: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkResults:
    """All numbers of one measurement.

    Attributes:
        run: what was measured on what, JSON values (`run_identity`, notes, the command).
        images: ids in the order of measurement.
        unreadable: images that could not be read, with the reason.
        predicted, labels: the classifier's class of each readable image, and the ground truth (-1 where unknown) or
            None, by id.
        methods: in the order of tables.
        protocols: results of each method by protocol name, `protocols[protocol][method]`.
        metrics: values of each method by metric, `metrics["road/morf"][method]`, NaN where an image has none, one an
            image of `readable(method, metric)`.
        directions: of each metric, whether higher is better; None for the parts of one.
        metric_images: metrics that were measured on the first of the images only, and on how many.
        no_mask: readable images without a usable mask of their object, where masks were asked for, with the reason.
    """

    run: dict[str, Any]
    images: tuple[str, ...]
    unreadable: dict[str, str]
    predicted: dict[str, int]
    labels: dict[str, int] | None
    methods: tuple[MethodRecord, ...]
    protocols: dict[str, dict[str, ProtocolResult]]
    metrics: dict[str, dict[str, np.ndarray]]
    directions: dict[str, bool | None]
    metric_images: dict[str, int] = field(default_factory=dict)
    no_mask: dict[str, str] = field(default_factory=dict)

    def readable(self, method: MethodRecord, metric: str | None = None) -> list[str]:
        """Ids of the readable images that a method was tried on, or measured on by a metric (or a part of one)."""
        tried = self.images[: method.images]
        if metric is not None:
            tried = tried[: self.metric_images.get(metric.split("/")[0])]
        return [image for image in tried if image not in self.unreadable]

    def accuracy(self) -> float | None:
        """Share of the labelled images that are classified rightly; None without any."""
        if self.labels is None:
            return None
        hits = [self.predicted[image] == label for image, label in self.labels.items() if label >= 0]
        return float(np.mean(hits)) if hits else None

    def never_predicted(self, num_labels: int) -> list[int]:
        """Classes that no image was put into; no number here says anything about their maps."""
        return sorted(set(range(num_labels)) - set(self.predicted.values()))

    def save(self, folder: Path) -> None:
        """Write `results.json` (all but the numbers of single images, with the summaries) and `per_image.parquet`.

        Raises:
            OSError: the folder cannot be written.
        """
        header = json.dumps(self.to_dict(), indent=1)
        write_groups(folder / "per_image.parquet", self._groups(), self.run)
        write_atomically(folder / "results.json", lambda file: file.write_text(header + "\n", encoding="utf-8"))

    def _groups(self) -> Iterator[Group]:
        for measure, by_method in self.protocols.items():
            for method, result in by_method.items():
                yield measure, method, list(result.image_ids), {name: getattr(result, name) for name in PER_IMAGE}
        for measure, by_method in self.metrics.items():
            for record in self.methods:
                if record.name in by_method:
                    yield measure, record.name, self.readable(record, measure), {"values": by_method[record.name]}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the numbers of single images, JSON values, with the summary of every number."""
        return {
            **FORMAT,
            "run": self.run,
            "images": list(self.images),
            "unreadable": self.unreadable,
            "no_mask": self.no_mask,
            "metric_images": self.metric_images,
            "predicted": self.predicted,
            "labels": self.labels,
            "accuracy": self.accuracy(),
            "methods": [
                {
                    "name": one.name,
                    "title": one.title,
                    "passes": list(one.passes),
                    "images": one.images,
                    "seconds": list(one.seconds),
                    "peak_mib": list(one.peak_mib),
                    "constant": list(one.constant),
                    "failed": [list(pair) for pair in one.failed],
                    "unmeasured": dict(one.unmeasured),
                }
                for one in self.methods
            ],
            "protocols": {
                name: {
                    "definition": next(iter(by_method.values())).protocol.to_dict(),
                    "methods": {method: self._describe(result) for method, result in by_method.items()},
                }
                for name, by_method in self.protocols.items()
            },
            "metrics": {
                name: {
                    "higher_is_better": self.directions[name],
                    "methods": {
                        method: _summary_dict(metric_summary(values, name)) for method, values in by_method.items()
                    },
                }
                for name, by_method in self.metrics.items()
            },
        }

    def _describe(self, result: ProtocolResult) -> dict[str, Any]:
        summary = bootstrap(result.values, len(result.dropped), result.protocol.name) if len(result) else None
        return {
            "summary": _summary_dict(summary),
            "dtype": result.dtype,
            "dropped": [list(pair) for pair in result.dropped],
        }

    @classmethod
    def load(cls, folder: Path) -> BenchmarkResults:
        """The results that `save` wrote.

        Raises:
            BenchmarkError: the folder holds no results, or those of another version.
        """
        folder = Path(folder)
        if not (folder / "results.json").is_file():
            raise BenchmarkError(f"the folder {folder} holds no results.json.")
        header = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if any(header.get(key) != value for key, value in FORMAT.items()):
            raise BenchmarkError(f"{folder / 'results.json'} is not of this version of hf_aha.")
        groups = {
            (measure, method): (image_ids, arrays)
            for measure, method, image_ids, arrays in read_groups(folder / "per_image.parquet")
        }
        run = header["run"]
        methods = tuple(
            MethodRecord(
                **{key: [tuple(pair) for pair in value] if key == "failed" else value for key, value in one.items()}
            )
            for one in header["methods"]
        )
        titles = {one.name: one.title for one in methods}

        def read(measure: str, method: str, stored: Mapping[str, Any], protocol: Protocol) -> ProtocolResult:
            nothing = {name: [] for name in PER_IMAGE}
            image_ids, arrays = groups.get((measure, method), ([], nothing))
            labels = None if header["labels"] is None else arrays["labels"]
            packed = {**arrays, **stored, "labels": labels, "image_ids": image_ids}
            context = ResultContext(method=titles[method], **run["context"])
            return unpack(packed, protocol, context, tuple(run["image_size"]), run["versions"])

        return cls(
            run=run,
            images=tuple(header["images"]),
            unreadable=header["unreadable"],
            predicted=header["predicted"],
            labels=header["labels"],
            methods=tuple(replace(one, **{name: tuple(getattr(one, name)) for name in _TUPLES}) for one in methods),
            protocols={
                name: {
                    method: read(name, method, stored, Protocol.from_dict(entry["definition"]))
                    for method, stored in entry["methods"].items()
                }
                for name, entry in header["protocols"].items()
            },
            metrics={
                name: {
                    method: groups[name, method][1]["values"] if (name, method) in groups else np.zeros(0, np.float32)
                    for method in entry["methods"]
                }
                for name, entry in header["metrics"].items()
            },
            directions={name: entry["higher_is_better"] for name, entry in header["metrics"].items()},
            metric_images=header.get("metric_images", {}),
            no_mask=header.get("no_mask", {}),
        )


_TUPLES = ("passes", "seconds", "peak_mib", "constant", "failed")


def metric_summary(values: np.ndarray, name: str) -> Summary | None:
    """Mean and interval of the images that have a value; None where none has."""
    finite = values[np.isfinite(values)]
    return bootstrap(finite, len(values) - len(finite), name) if len(finite) else None


def _summary_dict(summary: Summary | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    return {name: getattr(summary, name) for name in Summary.__dataclass_fields__}
