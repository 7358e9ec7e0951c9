"""What a model card may state: measured means with their intervals, and the file in which the card cites them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import write_atomically
from .metrics.results import Summary


FORMAT = {"format": "hf_aha.card_results", "format_version": 1}
DIGITS = 6  # kept in the file; the last ones of a float32 mean differ from machine to machine


@dataclass(frozen=True)
class MeasuredValue:
    """One mean over photographs.

    Attributes:
        method: as its file calls it.
        explainer: whether the method is the explainer of the card.
        metric: its name, such as `"deletion"`.
        higher_is_better: direction of the metric.
        mean, low, high: the mean and its interval; no interval with a single photograph.
        images: photographs in the mean.
        left_out: photographs tried, but without a number, or not measured by every method compared.
        paired: the explainer minus this method on the same photographs, as (mean, low, high).
    """

    method: str
    explainer: bool
    metric: str
    higher_is_better: bool
    mean: float
    low: float | None
    high: float | None
    images: int
    left_out: int
    paired: tuple[float, float | None, float | None] | None = None

    @classmethod
    def of(cls, method: str, explainer: bool, metric: str, higher_is_better: bool, summary: Summary) -> MeasuredValue:
        """The value that a summary holds."""
        s = summary
        return cls(method, explainer, metric, higher_is_better, s.mean, s.low, s.high, s.images, s.left_out)

    def __post_init__(self) -> None:
        if self.paired is not None:
            object.__setattr__(self, "paired", tuple(self.paired))
        for value in (self.mean, self.low, self.high, *(self.paired or ())):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"A result of {self.method!r} is {value!r}, but it must be a number.")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"A result of {self.method!r} is {value}, but it must be finite; measure again.")


@dataclass(frozen=True)
class Measurement:
    """One protocol on one set of photographs, for one or several methods.

    Attributes:
        protocol: what was done, such as `"pixels, blur reference, 21 points"` or `"hf_aha/pixel/blur"`.
        version: of a named protocol.
        trained_on: whether training optimised such a curve with this reference; None when that is not known.
        classifier, dataset, dataset_revision, split: what was measured.
        selection: which photographs of the split, in words.
        image_size: height and width in pixels.
        seed, resamples, confidence: of the bootstrap.
        versions: of the libraries.
        sources: names of the result files.
        values: the numbers.
    """

    protocol: str
    version: int | None
    trained_on: bool | None
    classifier: str | None
    dataset: str | None
    dataset_revision: str | None
    split: str | None
    selection: str | None
    image_size: tuple[int, int]
    seed: int
    resamples: int
    confidence: float
    versions: Mapping[str, str]
    sources: tuple[str, ...]
    values: tuple[MeasuredValue, ...]

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Measurement:
        """The measurement that `dataclasses.asdict` gave."""
        values = tuple(MeasuredValue(**value) for value in facts["values"])
        pairs = {"image_size": tuple(facts["image_size"]), "sources": tuple(facts["sources"])}
        return cls(**{**facts, **pairs, "values": values})


@dataclass(frozen=True)
class MeasuredCost:
    """Median seconds of one map."""

    method: str
    explainer: bool
    median_seconds: float
    images: int
    machine: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Validation:
    """The last validation of a training log: means without intervals.

    Attributes:
        step: of the run.
        values: by name, such as `"validation/blur/deletion"`.
        source: name of the log.
    """

    step: int
    values: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class CardResults:
    """Everything measured that a card states; `save` writes the file that the card cites.

    Example:
        >>> results = CardResults(validation=Validation(10, {"validation/blur/deletion": 0.25}, "log.jsonl"))
        >>> CardResults.from_dict(results.to_dict()) == results
        True
    """

    measurements: tuple[Measurement, ...] = ()
    costs: tuple[MeasuredCost, ...] = ()
    validation: Validation | None = None

    def __bool__(self) -> bool:
        return bool(self.measurements or self.costs or self.validation)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with means and intervals to six digits."""
        return {**FORMAT, **_rounded(asdict(self))}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> CardResults:
        """The results that `to_dict` gave.

        Raises:
            ValueError: these are no such results.
        """
        if any(facts.get(key) != value for key, value in FORMAT.items()):
            raise ValueError("These are no card results of this version of hf_aha.")
        try:
            return cls(
                tuple(Measurement.from_dict(measurement) for measurement in facts["measurements"]),
                tuple(MeasuredCost(**cost) for cost in facts["costs"]),
                None if facts["validation"] is None else Validation(**facts["validation"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"These card results are damaged: {error}.") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path`, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        return write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


__all__ = ["CardResults", "MeasuredCost", "MeasuredValue", "Measurement", "Validation"]
