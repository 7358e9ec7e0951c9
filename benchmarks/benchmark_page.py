#!/usr/bin/env python
"""The page of the benchmarks, `docs/benchmark.md`, from folders of `hf-aha benchmark`.

    python benchmarks/benchmark_page.py benchmarks/results/{imagenette-demo,vit-s14}/benchmark

For each folder: every method's deletion and insertion area at three granularities, means of the two references of the
protocol `hf_aha`; each explainer against every other method, paired over photographs; the metrics that no map was
optimised for. Which explainer reads gradients is told by its passes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from summary_table import GRANULARITIES, REFERENCES, summary_table

from hf_aha.benchmark import BenchmarkError, BenchmarkResults, MethodRecord
from hf_aha.benchmark.results import metric_summary
from hf_aha.markdown import Markdown, table
from hf_aha.metrics.results import Summary, bootstrap


ROOT = Path(__file__).resolve().parent.parent
CURVES = {"deletion": False, "insertion": True}  # whether higher is better
EXEMPT = "input-x-gradient"
"""Gradient times (image - mean colour): the one method of two passes that the one-pass explainer need not beat."""


def areas(results: BenchmarkResults, method: str, granularity: str, curve: str) -> dict[str, float]:
    """Area of each photograph, the mean of both references, where both were measured."""
    found = [results.protocols[f"hf_aha/{granularity}/{reference}/{curve}"][method] for reference in REFERENCES]
    by_image = [dict(zip(one.image_ids, one.values.tolist(), strict=True)) for one in found]
    return {image: float(np.mean([one[image] for one in by_image])) for image in by_image[0] if image in by_image[1]}


def columns() -> Iterable[tuple[str, str]]:
    """Granularity and curve of every column."""
    return ((granularity, curve) for granularity in GRANULARITIES for curve in CURVES)


def difference(results: BenchmarkResults, ours: str, other: str, granularity: str, curve: str) -> Summary | None:
    """Ours minus the other's, paired over the photographs of both, so that above zero is better for ours."""
    first, second = (areas(results, name, granularity, curve) for name in (ours, other))
    shared = [image for image in first if image in second]
    if not shared:
        return None
    sign = 1 if CURVES[curve] else -1
    return bootstrap(np.array([sign * (first[image] - second[image]) for image in shared]), 0, curve)


def verdict(found: Summary | None) -> str:
    """`"better"`, `"worse"` or `"open"`, by whether the interval holds zero."""
    if found is None or found.low is None:
        return "open"
    return "better" if found.low > 0 else "worse" if found.high < 0 else "open"


def areas_table(results: BenchmarkResults) -> Markdown:
    """Deletion and insertion of every method."""
    rows = []
    for one in results.methods:
        cells = [
            f"{np.mean(list(areas(results, one.name, granularity, curve).values())):.3f}"
            for granularity, curve in columns()
        ]
        rows.append([_title(one), *cells, one.images])
    heads = [f"{GRANULARITIES[level]}, {curve} {'↑' if CURVES[curve] else '↓'}" for level, curve in columns()]
    return table(["method", *heads, "photographs"], rows)


def paired_table(results: BenchmarkResults, ours: MethodRecord) -> Markdown:
    """One explainer against all other methods; above zero is better for it."""
    marks = {"better": "", "open": " (open)", "worse": " (**worse**)"}
    rows = []
    for other in results.methods:
        if other.name != ours.name:
            found = [difference(results, ours.name, other.name, *column) for column in columns()]
            rows.append([_title(other), *(Markdown(f"{_text(one, '+')}{marks[verdict(one)]}") for one in found)])
    heads = [f"{GRANULARITIES[level]}, {curve}" for level, curve in columns()]
    return table(["compared with", *heads], rows)


def claim(results: BenchmarkResults, ours: MethodRecord, others: Sequence[MethodRecord], which: str) -> str:
    """A sentence on what one explainer reaches against some methods, with every exception named."""
    rest, count = [], 0
    for other in others:
        for granularity, curve in columns():
            found = verdict(difference(results, ours.name, other.name, granularity, curve))
            count += 1
            if found != "better":
                rest.append(f"{other.title}, {GRANULARITIES[granularity]}, {curve} ({found})")
    if not count:
        return ""
    exceptions = f" Not better: {'; '.join(rest)}." if rest else ""
    return (
        f"- {ours.title} against {which}: significantly better in {count - len(rest)} of {count} comparisons of "
        f"deletion and insertion.{exceptions}"
    )


def claims(results: BenchmarkResults) -> str:
    """What the explainers reach against the methods of their own cost, and against the dear ones."""
    learned = [one for one in results.methods if one.title.startswith("AHA")]
    peers = [one for one in results.methods if one not in learned and one.name not in ("random", "centre")]
    lines = []
    for ours in learned:
        cheap = [one for one in peers if sum(one.passes) <= 2]
        dear = [one for one in peers if sum(one.passes) > 2]
        if ours.passes[1] == 0:
            named = [one for one in cheap if one.name != EXEMPT]
            lines.append(claim(results, ours, named, "all methods of one forward and one backward pass at most"))
        else:
            lines.append(claim(results, ours, cheap, "all methods of one forward and one backward pass at most"))
        lines.append(claim(results, ours, dear, "all methods of more passes"))
    return "\n".join(line for line in lines if line)


def metrics_table(results: BenchmarkResults) -> Markdown | None:
    """The headline of every metric that no map was optimised for."""
    names = [name for name, direction in results.directions.items() if direction is not None]
    if not names:
        return None
    rows = []
    for one in results.methods:
        cells = []
        for name in names:
            values = results.metrics[name].get(one.name)
            found = None if values is None else metric_summary(values, name)
            cells.append(Markdown("-") if found is None else Markdown(f"{_text(found)} ({found.images})"))
        rows.append([_title(one), *cells])
    heads = [f"{name.replace('_', ' ')} {'↑' if results.directions[name] else '↓'}" for name in names]
    return table(["method", *heads], rows)


def section(results: BenchmarkResults, folder: Path) -> str:
    """All of one target."""
    run, place = results.run, f"../{folder.resolve().relative_to(ROOT).as_posix()}"
    counts = sorted({one.images for one in results.methods}, reverse=True)
    fewer = f" (for some methods the first {' or '.join(map(str, counts[1:]))} of them)" if counts[1:] else ""
    photographs = f"{counts[0]} photographs{fewer}"
    blocks = [
        f"## {run['context']['classifier']}",
        f"{photographs}, {run['image_size'][0]} x {run['image_size'][1]} px. Passes on perturbed images: "
        f"{run['precision']}; passes of the methods: {run.get('method_precision', 'float32')}. All curves, intervals "
        f"and costs: [results]({place}/results.md), [every photograph]({place}/per_image.parquet).",
        summary_table(results),
        "### Deletion and insertion apart",
        areas_table(results),
        *(
            f"### {one.title} against each method\n\n{paired_table(results, one)}"
            for one in results.methods
            if one.title.startswith("AHA")
        ),
        f"### In words\n\n{claims(results) or 'There is no explainer among the methods.'}",
    ]
    metrics = metrics_table(results)
    if metrics is not None:
        blocks += ["### Metrics that no map was optimised for", metrics]
    blocks += ["### Command", f"<!-- not run: takes an hour of a CPU or more -->\n```bash\n{run['command']}\n```"]
    pictures = [("maps of every method", "maps"), ("curves at patches", "curves-hf_aha-patch")]
    pictures.append(("quality against cost", "cost-hf_aha-patch"))
    shown = [f"[{words}]({place}/{name}.png)" for words, name in pictures if (folder / f"{name}.png").is_file()]
    if shown:
        blocks.append(f"Pictures: {', '.join(shown)}.")
    return "\n\n".join(blocks)


INTRODUCTION = """# Benchmark

Written by `python benchmarks/benchmark_page.py`; do not edit by hand. Explainers beside the methods people use, on
photographs that no explainer was trained on, under the protocol [`hf_aha`](evaluation.md): deletion and insertion
with a blurred and a mean-coloured reference, 21 points, at single pixels, cells of 4 x 4 pixels and patches. Areas
are means of both references. Brackets are 95 % percentile bootstrap intervals over photographs; differences of an
explainer to another method are paired, above zero where the explainer is better, and *open* where their interval
holds zero. The explainers were trained on deletion and insertion with these references, so read the metrics that no
map was optimised for as well. What a method is: [the methods people use](baselines.md)."""


def page(folders: Mapping[Path, BenchmarkResults]) -> str:
    """The whole page."""
    return "\n\n".join([INTRODUCTION, *(section(results, folder) for folder, results in folders.items())]) + "\n"


def _title(record: MethodRecord) -> str | Markdown:
    return Markdown(f"**{record.title}**") if record.title.startswith("AHA") else record.title


def _text(found: Summary | None, sign: str = "") -> str:
    if found is None:
        return "no photograph"
    ends = "" if found.low is None else f" [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"
    return f"{found.mean:{sign}.3f}{ends}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of hf-aha benchmark")
    parser.add_argument(
        "--file", type=Path, default=ROOT / "docs" / "benchmark.md", help="(default: docs/benchmark.md)"
    )
    args = parser.parse_args(arguments)
    try:
        text = page({folder: BenchmarkResults.load(folder) for folder in args.folders})
        args.file.write_text(text, encoding="utf-8")
    except (BenchmarkError, OSError, ValueError) as error:
        sys.exit(f"No page was written: {error}")


if __name__ == "__main__":
    main()
