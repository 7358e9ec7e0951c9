"""Result files of the benchmarks and of the trainer, read into what a model card may state."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .card_results import FORMAT, CardResults, MeasuredCost, MeasuredValue, Measurement, Validation
from .faithfulness_runs import CONFIDENCE, RESAMPLES, read_run, same_runs
from .metrics.results import ProtocolResult, bootstrap, paired_difference, summarise


if TYPE_CHECKING:
    from .benchmark.results import BenchmarkResults

# The reference of a protocol, as the settings of a training run call it.
_TRAINED_REFERENCE = {"mean_rgb": "mean", "zero": "mean", "black": "black", "blur": "blur"}


def load_card_results(
    paths: Iterable[str | os.PathLike[str]],
    *,
    references: Sequence[str] | None = None,
    training_log: str | os.PathLike[str] | None = None,
    explainer_method: str = "aha",
) -> CardResults:
    """Read result files of any of our formats into rows for a card.

    Args:
        paths: `results.json` of `hf-aha evaluate` or `hf-aha benchmark`, `.json` of [`ProtocolResult.save`], `.jsonl`
            or `.jsonl.gz` of `benchmarks/faithfulness.py`, or `.json` of [`CardResults.save`]. Files of one run belong
            together: methods are compared on the photographs that all of them were measured on.
        references: those that training used, which decides what counts as trained on; None when not known.
        training_log: `log.jsonl` of the trainer; its last validation is taken.
        explainer_method: what the files call the explainer, in upper or lower case.

    Raises:
        ValueError: a file is of none of these formats, or holds no finite numbers.
        BenchmarkError: the files of a benchmark are damaged.
        OSError: a file cannot be read.

    Example:
        `load_card_results(["aha.jsonl.gz", "baselines.jsonl.gz"], references=["blur", "mean"])`
    """
    runs, protocols, benchmarks, found = [], [], [], []
    for path in map(Path, paths):
        content = _read(path)
        if isinstance(content, list):
            runs.append((path.name, content))
        elif content.get("format") == FORMAT["format"]:
            found.append(CardResults.from_dict(content))
        elif content.get("format") == "hf_aha.protocol_result":
            protocols.append((path.name, ProtocolResult.load(path)))
        elif content.get("format") == "hf_aha.benchmark":
            # Only here, as it brings all of the measuring along.
            from .benchmark.results import BenchmarkResults

            name, results = f"{path.resolve().parent.name}/{path.name}", BenchmarkResults.load(path.parent)
            benchmarks.append((name, results))
            protocols += [(name, one) for by_method in results.protocols.values() for one in by_method.values()]
        else:
            raise ValueError(f"{path} is no result file: its format is {str(content.get('format'))[:40]!r}.")

    def is_explainer(method: str) -> bool:
        return method.casefold() == explainer_method.casefold()

    try:
        faithfulness = [read_run(group, references, is_explainer) for group in same_runs(runs)]
    except (KeyError, TypeError, IndexError) as error:
        names = ", ".join(name for name, _ in runs)
        raise ValueError(f"A result file among {names} is damaged: {error!r}.") from error
    validation = None if training_log is None else read_validation(training_log)
    return CardResults(
        tuple(m for results in found for m in results.measurements)
        + tuple(m for measurements, _ in faithfulness for m in measurements)
        + _protocols(protocols, references, is_explainer)
        + tuple(m for name, results in benchmarks for m in _metrics(name, results, is_explainer)),
        tuple(c for results in found for c in results.costs)
        + tuple(c for _, costs in faithfulness for c in costs)
        + tuple(c for _, results in benchmarks for c in _costs(results, is_explainer)),
        validation or next((results.validation for results in found if results.validation), None),
    )


def read_training_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The entries of a training log.

    Raises:
        ValueError: a line is no JSON object.
    """
    entries = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} of the training log {path} is no JSON.") from error
        if not isinstance(entry, dict):
            raise ValueError(f"Line {number} of the training log {path} is no JSON object.")
        entries.append(entry)
    return entries


def read_validation(path: str | os.PathLike[str]) -> Validation | None:
    """The last validation of a training log, or None when there was none.

    Raises:
        ValueError: a line is no JSON object.
    """
    last = None
    for entry in read_training_log(path):
        values = {name: value for name, value in entry.items() if name.startswith("validation/")}
        if values and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values.values()):
            last = Validation(int(entry["step"]), values, Path(path).name)
    return last


def _read(path: Path) -> list[dict[str, Any]] | dict[str, Any]:
    """The lines of a JSONL file, or the object of a JSON file."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
        if ".jsonl" in path.suffixes:
            lines = [json.loads(line) for line in text.splitlines()]
            if len(lines) < 2 or not {"arguments", "versions", "classifier"} <= set(lines[0]):
                raise ValueError("it is no faithfulness run")
            return lines
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no result file: {error}.") from error
    return content


# ---------------------------------------------------------------------------------------------------- protocol results


def _protocols(
    named: list[tuple[str, ProtocolResult]], references: Sequence[str] | None, is_explainer: Callable[[str], bool]
) -> tuple[Measurement, ...]:
    """A measurement for each preset, data set and size; `aha/deletion` and `aha/insertion` share one."""
    groups: dict[str, list[tuple[str, ProtocolResult]]] = {}
    for name, result in named:
        # All files of a card are about one target model, which may lie under several names; pairing them checks it.
        named_freely = ("method", "classifier", "classifier_revision", "classifier_fingerprint")
        context = {key: value for key, value in asdict(result.context).items() if key not in named_freely}
        group, _, _ = result.protocol.name.rpartition("/")
        key = [group or result.protocol.name, result.protocol.version, context, result.image_size, result.versions]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append((name, result))
    measurements = []
    for results in groups.values():
        protocol, first = results[0][1].protocol, results[0][1]
        ours = {r.protocol.name: r for _, r in results if is_explainer(r.context.method)}
        values = []
        for _, result in results:
            summary = summarise(result, resamples=RESAMPLES, confidence=CONFIDENCE)
            metric = result.protocol.name.rpartition("/")[2]
            mine = is_explainer(result.context.method)
            value = MeasuredValue.of(result.context.method, mine, metric, result.protocol.higher_is_better, summary)
            rival = ours.get(result.protocol.name)
            if rival is not None and not mine and _pairable(rival, result):
                difference = paired_difference(rival, result, resamples=RESAMPLES, confidence=CONFIDENCE)
                value = replace(value, paired=(difference.mean, difference.low, difference.high))
            values.append(value)
        drawn = getattr(first.context, "seed", None)
        measurements.append(
            Measurement(
                protocol=protocol.name.rpartition("/")[0] or protocol.name,
                version=protocol.version,
                trained_on=None if references is None else _TRAINED_REFERENCE[protocol.reference] in references,
                classifier=first.context.classifier,
                dataset=first.context.dataset,
                dataset_revision=first.context.dataset_revision,
                split=first.context.split,
                selection=None if drawn is None else f"drawn with seed {drawn}",
                image_size=first.image_size,
                seed=0,
                resamples=RESAMPLES,
                confidence=CONFIDENCE,
                versions=first.versions,
                sources=tuple(dict.fromkeys(name for name, _ in results)),
                values=tuple(values),
            )
        )
    return tuple(measurements)


def _metrics(source: str, results: BenchmarkResults, is_explainer: Callable[[str], bool]) -> Iterator[Measurement]:
    """The metrics of a benchmark that no training optimises, one measurement each; their parts are left out."""
    context = results.run["context"]
    for name, by_method in results.metrics.items():
        records = [record for record in results.methods if record.name in by_method]
        values = {
            one.title: dict(zip(results.readable(one, name), by_method[one.name], strict=True)) for one in records
        }
        values = {title: {image: v for image, v in found.items() if np.isfinite(v)} for title, found in values.items()}
        tried = {record.title: len(results.readable(record, name)) for record in records}
        values = {title: found for title, found in values.items() if found}
        if results.directions[name] is None or not values:
            continue
        ours = next((found for title, found in values.items() if is_explainer(title)), {})
        measured = []
        for title, found in values.items():
            numbers = np.array(list(found.values()))
            summary = bootstrap(numbers, tried[title] - len(numbers), name, RESAMPLES, 0, CONFIDENCE)
            value = MeasuredValue.of(title, is_explainer(title), name, results.directions[name], summary)
            both = [image for image in found if image in ours]
            if both and not value.explainer:
                difference = np.array([ours[image] - found[image] for image in both], np.float64)
                paired = bootstrap(difference, 0, name, RESAMPLES, 0, CONFIDENCE)
                value = replace(value, paired=(paired.mean, paired.low, paired.high))
            measured.append(value)
        yield Measurement(
            protocol=name,
            version=None,
            trained_on=False,
            classifier=context["classifier"],
            dataset=context["dataset"],
            dataset_revision=context["dataset_revision"],
            split=context["split"],
            selection=f"drawn with seed {context['seed']}",
            image_size=tuple(results.run["image_size"]),
            seed=0,
            resamples=RESAMPLES,
            confidence=CONFIDENCE,
            versions=results.run["versions"],
            sources=(source,),
            values=tuple(measured),
        )


def _costs(results: BenchmarkResults, is_explainer: Callable[[str], bool]) -> Iterator[MeasuredCost]:
    for record in results.methods:
        if record.seconds:
            yield MeasuredCost(
                record.title,
                is_explainer(record.title),
                float(np.median(record.seconds)),
                record.images,
                f"{results.run['device']}, {results.run['precision']}, batches of {results.run['batch_size']}",
                results.run["versions"],
            )


def _pairable(first: ProtocolResult, second: ProtocolResult) -> bool:
    """Whether both explain the same classes of the same photographs; `paired_difference` refuses anything else."""
    tried = [{*result.image_ids, *(image for image, _ in result.dropped)} for result in (first, second)]
    targets = [dict(zip(result.image_ids, result.target.tolist(), strict=True)) for result in (first, second)]
    both = targets[0].keys() & targets[1].keys()
    return tried[0] == tried[1] and bool(both) and all(targets[0][image] == targets[1][image] for image in both)


__all__ = ["load_card_results", "read_training_log", "read_validation"]
