"""The runs that `benchmarks/faithfulness.py` writes, a line a photograph and method, read for a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from .card_results import MeasuredCost, MeasuredValue, Measurement
from .metrics.results import bootstrap


RESAMPLES, CONFIDENCE = 2000, 0.95

Run = tuple[str, list[dict]]
"""Name of a file and its lines, the first of which describes the run."""


def same_runs(runs: Sequence[Run]) -> list[list[Run]]:
    """Files of the same photographs and the same classifier together, in the order given."""

    def key(run: Run) -> str:
        head = run[1][0]
        chosen = [head["arguments"].get(name) for name in ("split", "images", "skip", "seed")]
        return json.dumps([head["classifier"], head["dataset"], head["image_size"], *chosen])

    order = {key(run): place for place, run in reversed(list(enumerate(runs)))}
    ordered = sorted(runs, key=lambda run: order[key(run)])
    return [list(group) for _, group in groupby(ordered, key)]


def read_run(
    group: Sequence[Run], references: Sequence[str] | None, is_explainer: Callable[[str], bool]
) -> tuple[tuple[Measurement, ...], tuple[MeasuredCost, ...]]:
    """Measurements and costs of one run, which may lie in several files; methods on their common photographs.

    Raises:
        ValueError: no photograph was measured by every method.
    """
    heads = [lines[0] for _, lines in group]
    entries = [entry for _, lines in group for entry in lines[1:]]
    failed = {entry["image"] for entry in entries if "error" in entry}
    entries = sorted((entry for entry in entries if "error" not in entry), key=lambda entry: entry["image"])
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    measured = {method: {entry["image"] for entry in entries if entry["method"] == method} for method in methods}
    common = set.intersection(*measured.values()) if measured else set()
    if not common:
        raise ValueError(f"No photograph was measured by every method of {', '.join(name for name, _ in group)}.")
    head, choice = heads[0], heads[0]["arguments"]
    facts = {
        "classifier": head["classifier"],
        "dataset": head["dataset"],
        "dataset_revision": head.get("dataset_revision"),
        "split": choice["split"],
        "selection": f"shuffled with seed {choice['seed']}, rows {choice['skip']} to "
        f"{choice['skip'] + choice['images'] - 1}",
        "image_size": tuple(head["image_size"]),
        "versions": head["versions"],
        "sources": tuple(name for name, _ in group),
    }
    measurements = []
    for key in dict.fromkeys(key for entry in entries for key in entry["curves"]):
        reference, level = key.split("/", 1)
        limit = choice.get("cell_images", math.inf) if level == "cells" else math.inf
        tried = {entry["image"] for entry in entries if key in entry["curves"]}
        tried |= {image for image in failed if image < limit}
        chosen = [entry for entry in entries if entry["image"] in common and key in entry["curves"]]
        images = {method: {entry["image"] for entry in chosen if entry["method"] == method} for method in methods}
        shared = set.intersection(*filter(None, images.values()))
        curves = {
            method: [e["curves"][key] for e in chosen if e["method"] == method and e["image"] in shared]
            for method in methods
            if images[method]
        }
        points = len(next(iter(curves.values()))[0]["deletion"])
        unit = {"pixel": "pixels", "cells": "patch cells ({} x {} px)".format(*head["patch_size"])}.get(level, level)
        measurements.append(
            Measurement(
                protocol=f"{unit}, {reference} reference, {points} points",
                version=None,
                trained_on=None if references is None else reference in references,
                seed=choice["seed"],
                resamples=RESAMPLES,
                confidence=CONFIDENCE,
                values=_curve_values(curves, len(tried), choice["seed"], is_explainer),
                **facts,
            )
        )
    costs = tuple(
        MeasuredCost(
            method,
            is_explainer(method),
            float(np.median([entry["seconds"] for entry in entries if entry["method"] == method])),
            len(measured[method]),
            f"{head['machine']}, one photograph at a time",
            head["versions"],
        )
        for method in methods
    )
    return tuple(measurements), costs


def _curve_values(
    curves: Mapping[str, list[dict[str, list[float]]]], tried: int, seed: int, is_explainer: Callable[[str], bool]
) -> tuple[MeasuredValue, ...]:
    areas = {}
    for method, found in curves.items():
        area = {name: _area(np.array([curve[name] for curve in found])) for name in ("deletion", "insertion")}
        areas[method] = {**area, "insertion - deletion": area["insertion"] - area["deletion"]}
    ours = next((area for method, area in areas.items() if is_explainer(method)), None)
    values = []
    for method, area in areas.items():
        for metric, numbers in area.items():
            summary = bootstrap(numbers, tried - len(numbers), metric, RESAMPLES, seed, CONFIDENCE)
            value = MeasuredValue.of(method, is_explainer(method), metric, metric != "deletion", summary)
            if ours is not None and not value.explainer:
                difference = bootstrap(ours[metric] - numbers, 0, metric, RESAMPLES, seed, CONFIDENCE)
                value = replace(value, paired=(difference.mean, difference.low, difference.high))
            values.append(value)
    return tuple(values)


def _area(curves: np.ndarray) -> np.ndarray:
    """Trapezoid on [0, 1] of evenly spaced points: (n, P) -> (n,)."""
    return (curves.sum(1) - (curves[:, 0] + curves[:, -1]) / 2) / (curves.shape[1] - 1)


__all__ = ["read_run", "same_runs"]
