#!/usr/bin/env python
"""The table on the front page, from a folder of `hf-aha benchmark`, written between two marks of a Markdown file.

    python benchmarks/summary_table.py benchmarks/results/vit-s14/benchmark --file README.md

One row a method, one column a granularity of the protocol `hf_aha`: insertion minus deletion area, the mean of the
blurred and the mean-coloured reference, with its 95 % percentile bootstrap interval over images; then a map's cost.
Every method is compared with the first of the folder on the images that both were measured on: an asterisk marks a
difference whose paired interval does not hold zero. Rows are in the order of their patch column.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_aha.benchmark import BenchmarkError, BenchmarkResults
from hf_aha.markdown import Markdown, table
from hf_aha.metrics.results import Summary, bootstrap


GRANULARITIES = {"pixel": "pixels", "cell4": "cells of 4 px", "patch": "patches"}
REFERENCES = ("blur", "mean")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def insertion_minus_deletion(results: BenchmarkResults, method: str, granularity: str) -> dict[str, float]:
    """Value of each image that has all four curves, the mean over the references."""
    areas = []
    for reference in REFERENCES:
        for curve, sign in (("insertion", 1), ("deletion", -1)):
            found = results.protocols[f"hf_aha/{granularity}/{reference}/{curve}"][method]
            areas.append({image: sign * value for image, value in zip(found.image_ids, found.values, strict=True)})
    images = [image for image in areas[0] if all(image in area for area in areas)]
    return {image: float(sum(area[image] for area in areas)) / len(REFERENCES) for image in images}


def cell(values: dict[str, float], first: dict[str, float], name: str) -> Markdown:
    """`0.512 [0.480, 0.541]`, with an asterisk where it differs from the first method on the images of both."""
    shared = [image for image in values if image in first]
    difference = bootstrap(np.array([values[image] - first[image] for image in shared]), 0, name)
    differs = difference.low is not None and not difference.low <= 0 <= difference.high
    return Markdown(f"{_text(bootstrap(np.array(list(values.values())), 0, name))}{'*' if differs else ''}")


def _text(summary: Summary) -> str:
    interval = "" if summary.low is None else f" [{summary.low:.3f}, {summary.high:.3f}]"
    return f"{summary.mean:.3f}{interval}"


def summary_table(results: BenchmarkResults) -> str:
    """The table and the sentence that says what it is.

    Raises:
        ValueError: the protocol `hf_aha` was not measured.
    """
    if "hf_aha/pixel/blur/insertion" not in results.protocols:
        raise ValueError(f"the protocol hf_aha was not measured, but {', '.join(results.protocols) or 'nothing'}.")
    names = [one.name for one in results.methods]
    values = {
        name: {level: insertion_minus_deletion(results, name, level) for level in GRANULARITIES} for name in names
    }
    records = sorted(results.methods, key=lambda one: -np.mean(list(values[one.name]["patch"].values())))
    rows = []
    for one in records:
        title = Markdown(f"**{one.title}**") if one.title.startswith("AHA") else one.title
        cells = [cell(values[one.name][level], values[names[0]][level], level) for level in GRANULARITIES]
        forward, backward = one.passes
        cost = f"{forward:,} + {backward:,}" if backward else f"{forward:,}"
        seconds = f"{np.median(one.seconds):.2g}" if one.seconds else ""
        rows.append([title, *cells, cost, seconds, len(values[one.name]["pixel"])])
    header = ["method", *GRANULARITIES.values(), "passes (forward + backward)", "seconds a map", "images"]
    run = results.run
    context, versions = run["context"], run["versions"]
    version = next(iter(results.protocols["hf_aha/pixel/blur/insertion"].values())).protocol.version
    classifier, dataset = (context[key].split(",")[0] for key in ("classifier", "dataset"))
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("hf-aha", "torch", "transformers"))
    return (
        f"{table(header, rows)}\n\n"
        f"*Insertion minus deletion area (higher is better) for `{classifier}`, protocol `hf_aha` version {version}, "
        f"mean of its two references; photographs of the split `{context['split']}` of {dataset}, seed {run['seed']}; "
        "brackets are 95 % intervals over photographs, fewer images are the first of the same, an asterisk marks a "
        f"significant paired difference to {results.methods[0].title}, on the images of both. "
        f"{' '.join([f'{libraries}.', *run['notes']])}*"
    )


def replace_between_marks(text: str, content: str) -> str:
    """The text with everything between the two marks replaced.

    Raises:
        ValueError: a mark is missing, or not there exactly once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"The file must hold {BEGIN} and {END} once each: add them where the table belongs.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of hf-aha benchmark")
    parser.add_argument("--file", type=Path, help="Markdown file to write to; printed when left out")
    args = parser.parse_args(arguments)
    try:
        text = summary_table(BenchmarkResults.load(args.folder))
        if args.file is None:
            print(text)
            return
        page = replace_between_marks(args.file.read_text(encoding="utf-8"), text)
    except (BenchmarkError, OSError, ValueError) as error:
        sys.exit(f"No table was written: {error}")
    args.file.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
