"""Measured results: what they hold, how they are stored, joined, summarised and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..classifier_aha import FINGERPRINT_TOLERANCE, fingerprint_distance
from ..files import write_atomically
from .protocols import Protocol


_FORMAT = {"format": "hf_aha.protocol_result", "format_version": 1}
_PER_IMAGE = ("target", "labels", "values", "curves", "clean", "reference", "tie_fraction")
_INTEGERS = ("target", "labels")
_BOOTSTRAP_BLOCK = 2_000_000  # drawn indices held in memory at a time


@dataclass(frozen=True)
class ResultContext:
    """What was measured. Two results are compared only if all but `method` are equal.

    Attributes:
        method: the attribution method, as tables should call it.
        classifier, classifier_revision: id and commit of the target model.
        classifier_fingerprint: its behaviour (`FrozenClassifier.fingerprint`). Where both results have one, it decides
            whether the target model is the same, since one model lies under several names (a folder, an id).
        dataset, dataset_revision, split: id, commit and split of the images.
        seed: of the order in which the images were drawn from the split.
        processor: settings of the image processor, JSON values.
    """

    method: str = "unnamed"
    classifier: str | None = None
    classifier_revision: str | None = None
    classifier_fingerprint: tuple[float, ...] | None = None
    dataset: str | None = None
    dataset_revision: str | None = None
    split: str | None = None
    seed: int | None = None
    processor: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.classifier_fingerprint is not None:
            object.__setattr__(self, "classifier_fingerprint", tuple(map(float, self.classifier_fingerprint)))
        # As it will be read from a file, so that a stored result equals the measured one.
        object.__setattr__(self, "processor", json.loads(json.dumps(self.processor)))


@dataclass(frozen=True, eq=False)
class ProtocolResult:
    """One protocol on some images; row i of every array is the image `image_ids[i]`.

    Attributes:
        protocol: the definition of the numbers.
        context: what was measured.
        image_size: height and width in pixels.
        dtype: of the classifier's logits; scores are computed in float32 from them.
        versions: of the libraries.
        image_ids: (n,) names of the measured images.
        target: (n,) int64, classes the maps were asked about.
        labels: (n,) int64 ground truth, or None.
        values: (n,) float32, the metric.
        curves: (n, P) float32, the protocol's score at every fraction.
        clean, reference: (n,) float32, score of the untouched image and of the pure reference: probability, logit or
            accuracy, also where the curve is normalised.
        tie_fraction: (n,) float32, share of units whose score another unit of the same image has too.
        dropped: images without a number, each with the reason.
    """

    protocol: Protocol
    context: ResultContext
    image_size: tuple[int, int]
    dtype: str
    versions: dict[str, str]
    image_ids: tuple[str, ...]
    target: np.ndarray
    labels: np.ndarray | None
    values: np.ndarray
    curves: np.ndarray
    clean: np.ndarray
    reference: np.ndarray
    tie_fraction: np.ndarray
    dropped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ProtocolResult):
            return NotImplemented
        return self._header() == other._header() and all(
            _same(getattr(self, name), getattr(other, name)) for name in ("image_ids", *_PER_IMAGE)
        )

    __hash__ = None

    def select(self, image_ids: Sequence[str]) -> ProtocolResult:
        """The same result on some of its images, measured or dropped, in the order in which they were measured.

        Raises:
            ValueError: an image is neither among the measured nor among the dropped ones.
        """
        wanted = set(image_ids)
        unknown = wanted - {*self.image_ids, *(image for image, _ in self.dropped)}
        if unknown:
            raise ValueError(f"The image {min(unknown)!r} is not in this result, nor {len(unknown) - 1} others.")
        rows = [row for row, image in enumerate(self.image_ids) if image in wanted]
        arrays = {name: getattr(self, name) for name in _PER_IMAGE}
        return replace(
            self,
            image_ids=tuple(self.image_ids[row] for row in rows),
            dropped=tuple(pair for pair in self.dropped if pair[0] in wanted),
            **{name: None if array is None else array[rows] for name, array in arrays.items()},
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path`.parquet, a row an image, and `path`.json, everything else; returns the path of the JSON file.

        The JSON text is also in the metadata of the parquet file, so neither file alone loses the protocol.
        """
        import pyarrow as pa
        from pyarrow import parquet

        header = json.dumps(self._header(), indent=2)
        columns = {"image_id": pa.array(self.image_ids, pa.string())}
        for name in _PER_IMAGE:
            array = getattr(self, name)
            if array is not None:
                kind = pa.int64() if name in _INTEGERS else pa.float32()
                kind = pa.list_(kind) if array.ndim == 2 else kind
                columns[name] = pa.array(list(array), kind)
        table = pa.table(columns).replace_schema_metadata({"hf_aha": header})
        write_atomically(_beside(path, ".parquet"), lambda file: parquet.write_table(table, file))
        return write_atomically(_beside(path, ".json"), lambda file: file.write_text(header + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProtocolResult:
        """The result that `save` wrote; `path` as given there, or that of the JSON file.

        Raises:
            ValueError: the files are not a stored result, or do not belong together.
        """
        from pyarrow import parquet

        stem = str(path).removesuffix(".json")
        header = json.loads(_beside(stem, ".json").read_text(encoding="utf-8"))
        if not isinstance(header, dict) or any(header.get(key) != value for key, value in _FORMAT.items()):
            raise ValueError(f"{stem}.json is not a stored result of this version of hf_aha.")
        # Not through read_table, which would import the dataset reader for one local file.
        table = parquet.ParquetFile(_beside(stem, ".parquet")).read()
        stored = (table.schema.metadata or {}).get(b"hf_aha")
        if stored is None or json.loads(stored) != header:
            raise ValueError(f"{stem}.parquet and {stem}.json are of two different results; measure again.")
        columns = {name: table[name].to_pylist() for name in table.column_names}
        points = len(header["protocol"]["fractions"])
        arrays = {
            name: np.array(columns[name], np.int64 if name in _INTEGERS else np.float32) if name in columns else None
            for name in _PER_IMAGE
        }
        return cls(
            protocol=Protocol.from_dict(header["protocol"]),
            context=ResultContext(**header["context"]),
            image_size=tuple(header["image_size"]),
            dtype=header["dtype"],
            versions=header["versions"],
            image_ids=tuple(columns["image_id"]),
            dropped=tuple((image, reason) for image, reason in header["dropped"]),
            **{**arrays, "curves": arrays["curves"].reshape(-1, points)},
        )

    def _header(self) -> dict[str, Any]:
        return {
            **_FORMAT,
            "protocol": self.protocol.to_dict(),
            "context": asdict(self.context),
            "image_size": list(self.image_size),
            "dtype": self.dtype,
            "versions": self.versions,
            "images": len(self),
            "dropped": [list(pair) for pair in self.dropped],
        }


def merge_results(results: Sequence[ProtocolResult]) -> ProtocolResult:
    """One result from those of several batches of the same data set and method.

    Raises:
        ValueError: there is none, they were measured differently, or an image occurs twice.
    """
    if not results:
        raise ValueError("There is no result to merge.")
    first = results[0]
    for other in results[1:]:
        _check_comparable(first, other)
        if (first.context, first.dtype, first.versions) != (other.context, other.dtype, other.versions):
            raise ValueError("Results of different methods, dtypes or library versions cannot be merged.")
        if (first.labels is None) != (other.labels is None):
            raise ValueError("Results with labels and results without cannot be merged.")
    seen = [image for result in results for image in (*result.image_ids, *(image for image, _ in result.dropped))]
    if len(set(seen)) != len(seen):
        twice = next(image for image in seen if seen.count(image) > 1)
        raise ValueError(
            f"The image {twice!r} occurs twice in the results to merge; give every image its own image_ids."
        )
    parts = {name: [getattr(result, name) for result in results] for name in _PER_IMAGE}
    arrays = {name: None if part[0] is None else np.concatenate(part) for name, part in parts.items()}
    same = {name: getattr(first, name) for name in ("protocol", "context", "image_size", "dtype", "versions")}
    return ProtocolResult(
        **same,
        **arrays,
        image_ids=tuple(image for result in results for image in result.image_ids),
        dropped=tuple(pair for result in results for pair in result.dropped),
    )


@dataclass(frozen=True)
class Summary:
    """A mean over images with its percentile bootstrap interval.

    Attributes:
        mean: over images.
        low, high: ends of the interval; None with one image, of which no interval can be computed.
        images: number of images in the mean.
        left_out: images tried but without a number (in either result, for a difference).
        confidence, resamples, seed: of the bootstrap.
    """

    mean: float
    low: float | None
    high: float | None
    images: int
    left_out: int
    confidence: float
    resamples: int
    seed: int

    def __str__(self) -> str:
        interval = "(one image, no interval)" if self.low is None else f"[{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f} {interval}"


def summarise(result: ProtocolResult, *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95) -> Summary:
    """Mean of the per-image values with a percentile bootstrap interval over images.

    It is also the protocol's area under the mean of `curves`, since areas are linear.

    Raises:
        ValueError: no image was measured, or resamples or confidence are out of range.

    Example:
        `print(summarise(result))` prints `0.412 [0.398, 0.427]`.
    """
    return bootstrap(result.values, len(result.dropped), result.protocol.name, resamples, seed, confidence)


def paired_difference(
    first: ProtocolResult,
    second: ProtocolResult,
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Summary:
    """Mean of first minus second over the images measured in both, resampled in pairs.

    Both must have been tried on the same images; those dropped by either are counted in `left_out`.

    Raises:
        ValueError: the protocols, classifiers, data sets, images or explained classes differ, or no image is left.
    """
    _check_comparable(first, second)
    tried = [{*result.image_ids, *(image for image, _ in result.dropped)} for result in (first, second)]
    if tried[0] != tried[1]:
        raise ValueError(
            f"Results on different images cannot be paired: {len(tried[0] - tried[1])} images are only in the first, "
            f"{len(tried[1] - tried[0])} only in the second."
        )
    rows = {image: row for row, image in enumerate(second.image_ids)}
    pairs = [(row, rows[image]) for row, image in enumerate(first.image_ids) if image in rows]
    left, right = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    other_class = np.flatnonzero(first.target[left] != second.target[right])
    if len(other_class):
        row = left[other_class[0]]
        raise ValueError(
            f"Results for different classes cannot be paired: image {first.image_ids[row]!r} was explained for class "
            f"{first.target[row]} in the first and {second.target[right[other_class[0]]]} in the second."
        )
    difference = first.values[left].astype(np.float64) - second.values[right]
    return bootstrap(difference, len(tried[0]) - len(pairs), first.protocol.name, resamples, seed, confidence)


def results_table(
    results: Sequence[ProtocolResult], *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> str:
    """Markdown table of one protocol, a method a row, each compared image by image with the first.

    Raises:
        ValueError: there is no result, or they may not be compared (see `paired_difference`).
    """
    if not results:
        raise ValueError("There is no result to tabulate.")
    options = {"resamples": resamples, "seed": seed, "confidence": confidence}
    protocol = results[0].protocol
    arrow = "↑" if protocol.higher_is_better else "↓"
    lines = [
        f"| method | {protocol.name} {arrow} | minus {results[0].context.method}, paired | clean | reference "
        "| ties | images | dropped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for index, result in enumerate(results):
        paired = str(paired_difference(result, results[0], **options)) if index else "-"
        means = " | ".join(f"{array.mean():.3f}" for array in (result.clean, result.reference, result.tie_fraction))
        lines.append(
            f"| {result.context.method} | {summarise(result, **options)} | {paired} | {means} | {len(result)} "
            f"| {len(result.dropped)} |"
        )
    direction = "higher is better" if protocol.higher_is_better else "lower is better"
    lines += [
        "",
        f"Protocol {protocol.name}, version {protocol.version}; {arrow} {direction}. Brackets: {100 * confidence:g} % "
        f"percentile bootstrap over images, {resamples} resamples, seed {seed}.",
    ]
    return "\n".join(lines)


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that can change a number."""
    found = {}
    for name in ("hf-aha", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout on the path is not installed
            found[name] = "not installed"
    return found


def bootstrap(
    values: np.ndarray, left_out: int, name: str, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Summary:
    """Mean of per-image values with its percentile interval; `name` and `left_out` are for the record and the error.

    Raises:
        ValueError: there is no value, or resamples or confidence are out of range.

    Example:
        >>> print(bootstrap(np.array([0.5]), 0, "aha/deletion"))
        0.500 (one image, no interval)
    """
    if not len(values):
        raise ValueError(
            f"No image has a value of {name}: all {left_out} were left out, see `dropped` for the reasons."
        )
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"resamples is {resamples} and confidence {confidence}, but they must be from 1 and within 0..1."
        )
    values = values.astype(np.float64)
    low = high = None
    if len(values) > 1:
        generator = np.random.default_rng(seed)
        rows = max(1, _BOOTSTRAP_BLOCK // len(values))
        blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
        means = [values[generator.integers(0, len(values), (block, len(values)))].mean(1) for block in blocks]
        tail = 50 * (1 - confidence)
        low, high = (float(end) for end in np.percentile(np.concatenate(means), [tail, 100 - tail]))
    return Summary(float(values.mean()), low, high, len(values), left_out, confidence, resamples, seed)


def _check_comparable(first: ProtocolResult, second: ProtocolResult) -> None:
    if first.protocol != second.protocol:
        names = [field.name for field in fields(Protocol)]
        differing = [name for name in names if getattr(first.protocol, name) != getattr(second.protocol, name)]
        raise ValueError(
            f"Results of different protocols cannot be compared: {first.protocol.name!r} and {second.protocol.name!r} "
            f"differ in {', '.join(differing)}."
        )
    same_by_name = {"method"}
    prints = first.context.classifier_fingerprint, second.context.classifier_fingerprint
    if None not in prints:
        distance = fingerprint_distance(*prints) if len(prints[0]) == len(prints[1]) else 2.0
        if distance > FINGERPRINT_TOLERANCE:
            raise ValueError(
                f"Results for different target models cannot be compared: the fingerprints of "
                f"{first.context.classifier!r} and {second.context.classifier!r} lie {distance:.3f} apart."
            )
        same_by_name |= {"classifier", "classifier_revision"}
    for field in fields(ResultContext):
        ours, theirs = getattr(first.context, field.name), getattr(second.context, field.name)
        if field.name not in {*same_by_name, "classifier_fingerprint"} and ours != theirs:
            raise ValueError(
                f"Results with a different {field.name.replace('_', ' ')} cannot be compared: {ours!r} and {theirs!r}."
            )
    if first.image_size != second.image_size:
        raise ValueError(f"Results on images of {first.image_size} and {second.image_size} pixels cannot be compared.")


def _same(first: Any, second: Any) -> bool:
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second)


def _beside(path: str | os.PathLike[str], suffix: str) -> Path:
    # Not with_suffix, which would cut the end off a name such as "vit-b16.v2".
    return Path(f"{os.fspath(path)}{suffix}")
