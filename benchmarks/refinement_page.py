"""The section and the figure of `refinement.py`, from what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from measuring import provenance_line

from hf_aha.markdown import Markdown, table
from hf_aha.metrics.results import bootstrap


MARKERS = ("<!-- benchmarks/refinement.py report: from here -->", "<!-- benchmarks/refinement.py report: to here -->")
NAMES = {"plain": "one pass", "full": "refined", "adaptive": "refined, adaptive"}
# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = {"full": "#0072b2", "adaptive": "#d55e00"}
RESAMPLES = 2000

Entry = Mapping[str, object]


def with_section(text: str, section: str) -> str:
    """The page with what stands between the markers replaced."""
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    return f"{before}{MARKERS[0]}\n{section.strip()}\n{MARKERS[1]}{after}"


def interval(values: Sequence[float], sign: str = "") -> Markdown:
    """`0.314 [0.290, 0.339]`: mean and 95% interval over photographs."""
    found = bootstrap(np.array(values, dtype=np.float64), 0, "refinement")
    ends = "" if found.low is None else f" [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"
    return Markdown(f"{found.mean:{sign}.3f}{ends}")


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Sum over sum, with a 95% percentile interval over photographs.

    Example:
        >>> ratio([1.0, 2.0], [2.0, 4.0])
        (0.5, 0.5, 0.5)
    """
    pairs = np.array([above, below], dtype=np.float64)
    drawn = np.random.default_rng(0).integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    sums = pairs[:, drawn].sum(-1)
    ratios = sums[0] / sums[1]
    low, high = np.percentile(ratios, [2.5, 97.5])
    whole = pairs.sum(1)
    return float(whole[0] / whole[1]), float(low), float(high)


def per_cent(found: tuple[float, float, float]) -> Markdown:
    """`95.1 % [93.0, 97.2]`."""
    return Markdown("{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * value for value in found)))


def gain(run: Entry) -> float:
    """Of one photograph, in the value that refinement climbs."""
    return run["best_values"][-1] - run["best_values"][0]


def at_passes(run: Entry, passes: np.ndarray) -> np.ndarray:
    """Gain known after so many passes: that of the last measurement until then."""
    gains = np.array(run["best_values"]) - run["best_values"][0]
    place = np.searchsorted(run["best_passes"], passes, side="right") - 1
    return gains[np.maximum(place, 0)]


def adaptive_table(measured: Mapping[str, Entry]) -> str:
    """Share of the gain and of the passes of the full run."""
    rows = []
    for name, result in measured.items():
        entries = result["photographs"]
        for kind in result["made_with"]["refined_with"]:
            full, adaptive = ([entry["runs"][f"{kind}/{run}"] for entry in entries] for run in ("full", "adaptive"))
            passes = [[run["passes"] for run in runs] for runs in (full, adaptive)]
            gains = [[gain(run) for run in runs] for runs in (full, adaptive)]
            # What the full run has by the time that the adaptive one ends.
            cut = [float(at_passes(a, np.array([b["passes"]]))[0]) for a, b in zip(full, adaptive, strict=True)]
            rows.append(
                [
                    f"{name}, {kind}",
                    Markdown(f"{np.mean(passes[0]):.0f}"),
                    Markdown(f"{np.mean(passes[1]):.0f}"),
                    interval(gains[0], "+"),
                    interval(gains[1], "+"),
                    per_cent(ratio(gains[1], gains[0])),
                    per_cent(ratio(passes[1], passes[0])),
                    per_cent(ratio(cut, gains[0])),
                ]
            )
    header = ["explainer, reference", "passes, full", "adaptive", "gain, full", "adaptive", "share of the gain"]
    return table([*header, "share of the passes", "full run, stopped at the adaptive run's passes"], rows)


def areas_table(result: Entry, refined_with: str) -> str:
    """Deletion and insertion before and after, with every reference and unit."""
    entries, rows = result["photographs"], []
    for kind in result["made_with"]["references"]:
        for unit in result["made_with"]["units"]:
            setting = f"{kind}/{unit}"
            for run in ("full", "adaptive"):
                before, after = (
                    [entry["maps"][name][setting] for entry in entries] for name in ("plain", f"{refined_with}/{run}")
                )
                difference = [
                    (b["insertion"] - b["deletion"]) - (a["insertion"] - a["deletion"])
                    for a, b in zip(before, after, strict=True)
                ]
                cells = [f"{kind}{' (climbed)' if kind == refined_with else ''}, {unit}s", NAMES[run]]
                for curve in ("deletion", "insertion"):
                    means = [np.mean([each[curve] for each in side]) for side in (before, after)]
                    changes = [b[curve] - a[curve] for a, b in zip(before, after, strict=True)]
                    cells.append(Markdown(f"{means[0]:.3f} to {means[1]:.3f}: {interval(changes, '+')}"))
                fallen = sum(value < 0 for value in difference)
                rows.append([*cells, interval(difference, "+"), Markdown(f"{fallen} of {len(entries)}")])
    header = ["measured with", "map", "deletion, lower is better", "insertion, higher is better"]
    return table([*header, "insertion - deletion", "photographs where that fell"], rows)


def unseen_table(result: Entry) -> str:
    """Metrics that refinement does not know."""
    entries, rows = result["photographs"], []
    maps = list(entries[0]["maps"])
    for metric in ("ROAD", "total variation"):
        for name in maps:
            kind, _, run = name.rpartition("/")
            pairs = [(entry["maps"]["plain"][metric], entry["maps"][name][metric]) for entry in entries]
            pairs = [pair for pair in pairs if None not in pair]
            if not pairs:
                continue
            title = f"{NAMES[run]}{f' with {kind}' if kind else ''}"
            change = Markdown("-") if name == "plain" else interval([after - before for before, after in pairs], "+")
            values = interval([after for _, after in pairs])
            rows.append([metric, title, values, change, Markdown(f"{len(pairs)}")])
    return table(["metric", "map", "value", "minus one pass, paired", "photographs"], rows)


def tuning_table(tuned: Entry) -> str:
    """Gain of every setting that was tried."""
    rows = [
        [
            scope,
            *(
                Markdown(f"**{entry['learning_rate']:g}: {entry['gain']:.3f}**")
                if entry["learning_rate"] == tuned["best"][scope]
                else Markdown(f"{entry['learning_rate']:g}: {entry['gain']:.3f}")
                for entry in found
            ),
        ]
        for scope, found in tuned["rates"].items()
    ]
    columns = max(len(row) for row in rows) - 1
    rows = [[*row, *[Markdown("")] * (columns + 1 - len(row))] for row in rows]
    text = table(["scope", *[Markdown("rate: gain")] * columns], rows)
    if tuned["tolerances"]:
        text += "\n\n" + table(
            ["tolerance", "share of the gain", "share of the passes"],
            [
                [
                    Markdown(f"{entry['tolerance']:g}"),
                    Markdown(f"{100 * entry['share_of_gain']:.1f} %"),
                    Markdown(f"{100 * entry['share_of_passes']:.1f} %"),
                ]
                for entry in tuned["tolerances"]
            ],
        )
    return text


def page(result: Mapping[str, Mapping[str, Entry]], picture: str) -> str:
    """The whole section; `picture` is the link to the figure."""
    measured = result["measured"]
    parts = ["## What it brings, measured"]
    for name, found in measured.items():
        made = found["made_with"]
        rows = sorted(entry["row"] for entry in found["photographs"])
        height, width = made["image_size"]
        parts.append(
            f"**{name}**: {len(rows)} photographs of the split `{made['split']}` of {made['dataset']} (shuffled with "
            f"seed 0, rows {rows[0]} to {rows[-1]}), {height} x {width} px, predicted class, {made['steps']} steps, "
            f"scope `{made['scope']}`, {made['precision']}."
        )
    parts += [
        "No photograph's value fell where it was climbed: `benchmarks/refinement.py measure` stops with an error if "
        'one does. Brackets are 95 % bootstrap intervals over photographs. "Gain" is that of the value that is '
        "climbed, at nine points a curve.",
        f"![Gain against passes of the classifier, in full and adaptive]({picture})",
        adaptive_table(measured),
    ]
    for name, found in measured.items():
        for kind in found["made_with"]["refined_with"]:
            parts.append(f"### {name}, refined with the reference {kind}")
            parts.append("Measured by the metrics' own code at 21 points with hard masks, from one pass to refined.")
            parts.append(areas_table(found, kind))
        parts.append(f"### {name}, metrics that refinement does not know")
        parts.append(
            "ROAD (higher is better) and the total variation of the rank map (lower is smoother; 1 is pixel noise)."
        )
        parts.append(unseen_table(found))
        parts.append(provenance_line(found))
    for name, tuned in result.get("tuned", {}).items():
        parts += [
            "### What was tried",
            f"{tuned['photographs']} photographs of the split `{tuned['split']}`, {name}, reference "
            f"{tuned['reference']}, {tuned['steps']} steps; then adaptive runs of the default scope.",
            tuning_table(tuned),
            provenance_line(tuned),
        ]
    return "\n\n".join(parts)


def figure(measured: Mapping[str, Entry], path: Path) -> None:
    """Mean gain against passes, one panel an explainer and reference, bands over photographs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(name, kind) for name, found in measured.items() for kind in found["made_with"]["refined_with"]]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    drawn = Figure(figsize=(4.6 * columns, 3.3 * lines), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, kind) in zip(axes, panels, strict=False):
        entries = measured[name]["photographs"]
        full = [entry["runs"][f"{kind}/full"] for entry in entries]
        end = max(run["passes"] for run in full)
        grid = np.arange(0, end + 1)
        for run, colour in COLOURS.items():
            gains = np.stack([at_passes(entry["runs"][f"{kind}/{run}"], grid) for entry in entries])
            middle = gains.mean(0)
            chosen = np.random.default_rng(0).integers(len(gains), size=(500, len(gains)))
            low, high = np.percentile(np.stack([gains[rows].mean(0) for rows in chosen]), [2.5, 97.5], axis=0)
            axis.plot(grid, middle, color=colour, label=NAMES[run], drawstyle="steps-post")
            axis.fill_between(grid, low, high, color=colour, alpha=0.15, step="post", linewidth=0)
            mean_passes = np.mean([entry["runs"][f"{kind}/{run}"]["passes"] for entry in entries])
            mean_gain = np.mean([gain(entry["runs"][f"{kind}/{run}"]) for entry in entries])
            axis.plot(mean_passes, mean_gain, "o", color=colour)
        axis.axhline(0.95 * np.mean([gain(run) for run in full]), color="0.5", linewidth=0.8, linestyle=":")
        axis.axvline(end / 2, color="0.5", linewidth=0.8, linestyle=":")
        axis.set_title(f"{name}, {kind}", fontsize=10)
        axis.set(xlabel="passes of the classifier, an image", ylabel="gain, insertion - deletion")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)
