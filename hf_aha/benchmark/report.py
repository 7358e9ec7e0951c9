"""A measurement for people: Markdown tables, plots of the curves and of quality against cost, a sheet of maps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import write_atomically
from ..metrics.protocols import Protocol
from ..metrics.results import ProtocolResult, Summary, paired_difference, summarise
from ..perturbation import Normalization
from ..plots_benchmark import plot_protocol_curves, plot_quality_against_cost
from ..visualization import comparison_sheet
from .images import EvaluationImages
from .results import BenchmarkResults, MethodRecord, metric_summary
from .runner import BenchmarkSettings
from .store import Store, file_name


_MOST_PARTS = 6  # of a metric in a table
_LISTED = 10  # images or classes named in the text; the JSON file names all


def protocol_groups(results: BenchmarkResults) -> dict[str, dict[str, dict[str, ProtocolResult]]]:
    """The results by preset, and for our own protocols by granularity: `groups["hf_aha/pixel"][protocol][method]`."""
    groups: dict[str, dict[str, dict[str, ProtocolResult]]] = {}
    for name, by_method in results.protocols.items():
        parts = name.split("/")
        groups.setdefault("/".join(parts[: max(1, len(parts) - 2)]), {})[name] = by_method
    return groups


def markdown(results: BenchmarkResults, id2label: dict[int, str]) -> str:
    """The whole measurement as a Markdown page.

    Args:
        results: what was measured.
        id2label: names of the classifier's classes.
    """
    parts = [_head(results, id2label)]
    for group, protocols in protocol_groups(results).items():
        parts.append(f"## {group}\n\n{_protocol_table(results, protocols)}")
        if len(results.methods) > 1:
            parts.append(f"### {group}: {results.methods[0].title} minus the others\n\n{_paired(results, protocols)}")
    if results.metrics:
        parts.append(f"## Metrics that no map was optimised for\n\n{_metric_tables(results)}")
    parts.append(f"## Cost of one map\n\n{_cost_table(results)}")
    parts.append(f"## Left out\n\n{_left_out(results)}")
    return "\n\n".join(parts) + "\n"


def write_report(results: BenchmarkResults, id2label: dict[int, str], folder: Path) -> list[Path]:
    """Write `results.md` and the plots; returns the paths."""
    text = markdown(results, id2label)
    written = [
        write_atomically(folder / "results.md", lambda file: file.write_text(text, encoding="utf-8")),
    ]
    titles = {record.name: record.title for record in results.methods}
    seconds = {record.title: float(np.median(record.seconds)) for record in results.methods if record.seconds}
    for group, protocols in protocol_groups(results).items():
        panels = {
            name: {titles[method]: result for method, result in by_method.items()}
            for name, by_method in protocols.items()
        }
        measured = {title for by_method in panels.values() for title, result in by_method.items() if len(result)}
        if measured:
            path = folder / f"curves-{file_name(group)}.png"
            plot_protocol_curves(panels, path)
            written.append(path)
        if len(measured & set(seconds)) > 1:
            path = folder / f"cost-{file_name(group)}.png"
            plot_quality_against_cost(panels, seconds, path)
            written.append(path)
    return written


def write_examples(
    results: BenchmarkResults,
    images: EvaluationImages,
    settings: BenchmarkSettings,
    store: Store,
    id2label: dict[int, str],
) -> Path | None:
    """Write `maps.png`, the maps of every method on the first readable images; None where there is none."""
    normalization, rows, titles = settings.normalization, [], []
    maps: dict[str, dict[str, np.ndarray]] = {}
    for batch in range(-(-min(settings.examples, len(images)) // settings.batch_size)):
        for entry in settings.entries:
            maps.setdefault(entry.name, {}).update(store.read_maps(entry.name, batch))
    for index in range(min(settings.examples, len(images))):
        row = images[index]
        found = {
            entry.method.title: maps[entry.name][row["id"]]
            for entry in settings.entries
            if row["id"] in maps[entry.name] and not np.isnan(maps[entry.name][row["id"]]).all()
        }
        if "pixel_values" in row and found:
            rows.append((_picture(row["pixel_values"], normalization), found))
            predicted = results.predicted[row["id"]]
            titles.append(f"why {id2label[predicted]}?{_truth(row['label'], predicted, id2label)}")
    if not rows:
        return None
    many = len(settings.entries) > 8
    sheet = comparison_sheet(rows, row_titles=titles, panel_size=140 if many else 200)
    return write_atomically(store.folder / "maps.png", lambda file: sheet.save(file, format="PNG", optimize=True))


def _picture(pixel_values: Any, normalization: Normalization) -> Image.Image:
    rgb = normalization.denormalize(pixel_values).clamp(0, 1).permute(1, 2, 0).numpy()
    return Image.fromarray((rgb * 255).round().astype(np.uint8))


def _truth(label: int, predicted: int, id2label: dict[int, str]) -> str:
    return f" (the label is {id2label[label]})" if label >= 0 and label != predicted else ""


def _head(results: BenchmarkResults, id2label: dict[int, str]) -> str:
    run, context = results.run, results.run["context"]
    prints = context["classifier_fingerprint"]
    fingerprint = "" if prints is None else f", fingerprint {', '.join(f'{value:g}' for value in prints[:3])}, ..."
    accuracy = results.accuracy()
    never = results.never_predicted(len(id2label))
    names = ", ".join(id2label[index] for index in never) if len(never) <= _LISTED else "listed in results.json"
    lines = [
        f"- Target model: {context['classifier']}, revision {context['classifier_revision'] or 'none'}{fingerprint}",
        f"- Images: {len(results.images)} of the split `{context['split']}` of {context['dataset']} (revision "
        f"{context['dataset_revision'] or 'none'}), drawn with seed {context['seed']}, {run['image_size'][0]} x "
        f"{run['image_size'][1]} px; {len(results.unreadable)} unreadable",
        f"- Maps are for the predicted class; {'no labels' if accuracy is None else f'accuracy {accuracy:.3f}'}",
        *_objects(run.get("masks")),
        f"- Classes never predicted: {len(never)} of {len(id2label)}{f' ({names})' if never else ''}",
        f"- Passes of the target model: {run['precision']} on {run['device']} ({run['machine']}); those of the "
        f"methods: {run.get('method_precision', 'float32')}; metrics in float32",
        f"- {', '.join(f'{name} {number}' for name, number in run['versions'].items())}; seed {run['seed']}",
        f"- Command: `{run['command']}`",
        *(f"- {note}" for note in run["notes"]),
    ]
    title = ", ".join(record.title for record in results.methods[:3])
    note = (
        "Brackets: 95 % percentile bootstrap over images (2,000 resamples, seed 0). ↓ lower is better, ↑ higher is "
        "better. Numbers in different columns are of different protocols and cannot be compared."
    )
    facts = "\n".join(lines)
    return f"# {title}{' and others' if len(results.methods) > 3 else ''}\n\n{facts}\n\n{note}"


def _objects(masks: dict[str, str] | None) -> list[str]:
    if masks is None:
        return []
    where = (
        f"`{masks['mask_column']}`"
        if "mask_column" in masks
        else f"`{masks['box_column']}`, boxes as {masks['box_format']}"
    )
    return [f"- Masks of the objects: column {where}"]


def _protocol_table(results: BenchmarkResults, protocols: dict[str, dict[str, ProtocolResult]]) -> str:
    first = next(iter(next(iter(protocols.values())).values())).protocol
    heads = [_column(next(iter(by_method.values())).protocol) for by_method in protocols.values()]
    lines = [_line(["method", *heads, "images", "left out"]), _line(["---"] * (len(heads) + 3))]
    for record in results.methods:
        found = [by_method[record.name] for by_method in protocols.values()]
        counts = sorted({len(result) for result in found})
        left = sorted({len(result.dropped) for result in found})
        lines.append(
            _line(
                [
                    record.title,
                    *(_cell(summarise(result) if len(result) else None, result.protocol) for result in found),
                    " / ".join(map(str, counts)),
                    " / ".join(map(str, left)),
                ]
            )
        )
    return "\n".join([*lines, "", f"Version {first.version} of each protocol."])


def _paired(results: BenchmarkResults, protocols: dict[str, dict[str, ProtocolResult]]) -> str:
    """Differences to the first method on the images that both were tried on."""
    ours, others = results.methods[0], results.methods[1:]
    heads = [_column(next(iter(by_method.values())).protocol) for by_method in protocols.values()]
    lines = [_line(["minus", *heads]), _line(["---"] * (len(heads) + 1))]
    for record in others:
        cells = []
        for by_method in protocols.values():
            tried = results.images[: min(ours.images, record.images)]
            pair = [by_method[name].select(tried) for name in (ours.name, record.name)]
            both = set(pair[0].image_ids) & set(pair[1].image_ids)
            cells.append(_cell(paired_difference(*pair) if both else None, pair[0].protocol, sign="+"))
        lines.append(_line([record.title, *cells]))
    return "\n".join(lines)


def _metric_tables(results: BenchmarkResults) -> str:
    """The headline of every metric in one table, and the parts of each in a table of its own."""
    headlines = [name for name, direction in results.directions.items() if direction is not None]
    tables = [_metric_table(results, headlines)]
    for headline in headlines:
        parts = [name for name in results.metrics if name.startswith(f"{headline}/")]
        if 0 < len(parts) <= _MOST_PARTS:
            tables.append(f"Parts of `{headline}`:\n\n{_metric_table(results, parts)}")
        elif parts:
            tables.append(f"The {len(parts)} parts of `{headline}` are in `results.json`.")
    return "\n\n".join(tables)


def _metric_table(results: BenchmarkResults, names: list[str]) -> str:
    arrows = {True: " ↑", False: " ↓", None: ""}
    first = {name: results.metric_images.get(name.split("/")[0]) for name in names}
    heads = [f"{name}{arrows[results.directions[name]]}{_on_first(first[name])}" for name in names]
    lines = [_line(["method", *heads]), _line(["---"] * (len(heads) + 1))]
    for record in results.methods:
        cells = []
        for name in names:
            values = results.metrics[name].get(record.name)
            summary = None if values is None else metric_summary(values, name)
            left = f", {summary.left_out} without" if summary is not None and summary.left_out else ""
            cells.append("-" if values is None else _cell(summary, None) + left)
        lines.append(_line([record.title, *cells]))
    return "\n".join(lines)


def _on_first(images: int | None) -> str:
    return "" if images is None else f" (first {images} images)"


def _cost_table(results: BenchmarkResults) -> str:
    lines = [
        _line(["method", "images forward", "images backward", "seconds a map", "peak memory", "maps"]),
        _line(["---"] * 6),
    ]
    for record in results.methods:
        seconds = f"{np.median(record.seconds):.3g}" if record.seconds else "-"
        peak = f"{np.median(record.peak_mib):.0f} MiB" if record.peak_mib else "not measured"
        forward, backward = record.passes
        tried = len(results.readable(record))
        lines.append(_line([record.title, f"{forward:,}", f"{backward:,}", seconds, peak, str(tried)]))
    size = results.run["batch_size"]
    return "\n".join(
        [
            *lines,
            "",
            "Images through the target model and back for one map. Time and memory are medians over batches of "
            f"{size}, measured in this run around the call of the method: wall time divided by the images, and the "
            "peak above what was in use before, of a whole batch.",
        ]
    )


def _left_out(results: BenchmarkResults) -> str:
    lines = []
    if results.unreadable:
        lines.append(f"- Unreadable images: {_names([f'{i}: {why}' for i, why in results.unreadable.items()])}")
    if results.no_mask:
        reasons = [f"{image}: {why}" for image, why in results.no_mask.items()]
        lines.append(f"- {len(reasons)} images without a mask of their object: {_names(reasons)}")
    for record in results.methods:
        if record.constant:
            lines.append(
                f"- {record.title}: {len(record.constant)} constant maps, whose pixels went by lowest index first: "
                f"{_names(record.constant)}"
            )
        for reason, count in Counter(why for _, why in record.failed).items():
            lines.append(
                f"- {record.title}: {count} images without a usable map, because {reason}: "
                f"{_names([image for image, why in record.failed if why == reason])}"
            )
        lines += [f"- {record.title}, {metric}: {reason}" for metric, reason in record.unmeasured.items()]
        lines += _filtered(results, record)
    return "\n".join(lines) or "Nothing: every image has every number."


def _filtered(results: BenchmarkResults, record: MethodRecord) -> list[str]:
    """Images that single protocols leave out, besides those already named."""
    named = {*results.unreadable, *(image for image, _ in record.failed)}
    by_reason: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for protocol, by_method in results.protocols.items():
        for image, reason in by_method[record.name].dropped:
            if image not in named:
                by_reason.setdefault((protocol, reason), []).append(image)
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (protocol, reason), images in by_reason.items():
        merged.setdefault((reason, tuple(images)), []).append(protocol)
    return [
        f"- {record.title}, {', '.join(protocols)}: {len(images)} images, because {reason}: {_names(images)}"
        for (reason, images), protocols in merged.items()
    ]


def _names(entries: Any) -> str:
    more = f" and {len(entries) - _LISTED} more (results.json)" if len(entries) > _LISTED else ""
    return ", ".join(entries[:_LISTED]) + more


def _column(protocol: Protocol) -> str:
    return f"{protocol.name} {'↑' if protocol.higher_is_better else '↓'}"


def _cell(summary: Summary | None, protocol: Protocol | None, sign: str = "") -> str:
    if summary is None:
        return "no image"
    form = f"{sign}.1f" if protocol is not None and protocol.auc == "trapezoid_x100" else f"{sign}.3f"
    mean = format(summary.mean, form)
    if summary.low is None:
        return f"{mean} (one image, no interval)"
    return f"{mean} [{format(summary.low, form)}, {format(summary.high, form)}]"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
