"""The page and the figure of `shortcuts.py`, from what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from measuring import provenance_line
from PIL import Image

from hf_aha.baselines import METHODS
from hf_aha.files import write_atomically
from hf_aha.markdown import Markdown, table
from hf_aha.metrics.results import Summary, bootstrap
from hf_aha.visualization import overlay


CLEAN = "clean"
PLAIN, REFINED = "one pass", "refined"
CONTROL, CONTROL_REFINED = "control", "control refined"
START = "start"

Entry = Mapping[str, object]


def title(method: str, steps: int) -> str:
    """A method as tables call it."""
    own = {
        PLAIN: "Explainer, one pass",
        REFINED: f"Explainer, refined, {steps} steps",
        START: "The same before its training on this target",
        CONTROL: "Control target and its explainer, one pass",
        CONTROL_REFINED: f"Control target and its explainer, refined, {steps} steps",
    }
    return own[method] if method in own else METHODS[method].title


def explained(result: Entry, shortcut: str, method: str = PLAIN) -> list[Entry]:
    """The photographs with a map of this method."""
    return [entry for entry in result[shortcut]["photographs"] if method in entry.get("maps", {})]


def measured(result: Entry, shortcut: str) -> list[str]:
    """The methods with a map of any photograph, in the order of tables."""
    order = (PLAIN, REFINED, START, *result["settings"]["baselines"], CONTROL, CONTROL_REFINED)
    return [method for method in order if explained(result, shortcut, method)]


def interval(values: Sequence[float], scale: float = 100) -> Summary:
    """Mean and 95% interval over photographs, in per cent by default."""
    return bootstrap(scale * np.array(values, dtype=np.float64), 0, "shortcuts")


def text(values: Sequence[float], sign: str = "") -> Markdown:
    """`31.4 [29.0, 33.9]`, or a dash where there is no photograph."""
    if not len(values):
        return Markdown("-")
    found = interval(values)
    ends = "" if found.low is None else f" [{found.low:{sign}.1f}, {found.high:{sign}.1f}]"
    return Markdown(f"{found.mean:{sign}.1f}{ends}")


def shares(entries: Sequence[Entry], method: str, kind: str = "share") -> np.ndarray:
    """Share of the most important pixels on the shortcut (`"share"`) or on and around it (`"near"`), 0 to 1."""
    return np.array([entry["maps"][method][kind] for entry in entries])


def areas(entries: Sequence[Entry], kind: str = "share") -> np.ndarray:
    """Share of the image that the shortcut covers: what a map without information gets."""
    return np.array([entry["area"][kind] for entry in entries])


def verdict(differences: np.ndarray) -> str:
    """A word for a paired difference, which takes a side only where the interval leaves zero out."""
    found = interval(differences)
    if found.low is not None and found.low > 0:
        return "is above"
    if found.high is not None and found.high < 0:
        return "is below"
    return "cannot be told from"


# ------------------------------------------------------------------------------------------------------------- page


def reliance_table(result: Entry) -> Markdown:
    """What the targets make of the shortcut."""
    label = result["settings"]["label"]

    def row(shortcut: str, who: str, name: str) -> list[object]:
        entries = result[shortcut]["photographs"]
        others = [entry for entry in entries if entry["label"] != label]

        def of(chosen: Sequence[Entry], kind: str, holds: Callable[[Entry, int], bool]) -> Markdown:
            return text([holds(entry, entry[f"{who}_{kind}"]["called"]) for entry in chosen])

        flips = [
            entry[f"{who}_planted"]["called"] == label for entry in others if entry[f"{who}_clean"]["called"] != label
        ]
        return [
            name,
            of(entries, "clean", lambda entry, called: called == entry["label"]),
            of(others, "clean", lambda entry, called: called == entry["label"]),
            of(others, "planted", lambda entry, called: called == entry["label"]),
            of(others, "clean", lambda entry, called: called == label),
            of(others, "planted", lambda entry, called: called == label),
            text(flips),
        ]

    named = result["settings"]["trained"]["shortcut_class"]
    header = ["target", "right, clean", "others right, clean", "others right, planted"]
    header += [f"others called {named}, clean", f"others called {named}, planted", "flipped"]
    rows = []
    for shortcut in result["settings"]["trained"]["shortcuts"]:
        rows.append(row(shortcut, "target", f"trained with the {shortcut}"))
        rows.append(row(shortcut, "control", f"control, asked with the {shortcut}"))
    return table(header, rows)


def maps_table(result: Entry, shortcut: str) -> Markdown:
    """Where the most important pixels lie, a row a method."""
    entries, settings = explained(result, shortcut), result["settings"]
    top, covered = settings["top"], areas(entries)
    rows = []
    for method in measured(result, shortcut):
        own = explained(result, shortcut, method)
        found = shares(own, method)
        name = title(method, settings["steps"])
        rows.append(
            [
                name if len(own) == len(entries) else f"{name} (first {len(own)})",
                text(found),
                text(shares(own, method, "near")),
                text(found * top / areas(own)),
                Markdown("-") if method == PLAIN else text(shares(own, PLAIN) - found, "+"),
            ]
        )
    near = areas(entries, "near")
    # A map without information has the same share of every region among its first pixels.
    chance = [text(covered), text(near), text(np.full(len(entries), top)), text(shares(entries, PLAIN) - covered, "+")]
    most = [np.minimum(1, covered / top), np.minimum(1, near / top), np.minimum(1, top / covered)]
    rows.append(["Chance, the area", *chance])
    rows.append(["The most that any map can have", *(text(values) for values in most), Markdown("-")])
    header = ["map", f"on the {shortcut}", f"on it or within {result[shortcut]['margin']} px"]
    return table([*header, f"of the {shortcut}, in the top {100 * top:g} %", "one pass minus this, paired"], rows)


def findings(result: Entry, shortcut: str) -> str:
    """What the table of a shortcut says, in sentences that follow from its numbers."""
    entries, settings = explained(result, shortcut), result["settings"]
    plain = shares(entries, PLAIN)
    above_chance, above_control = plain - areas(entries), plain - shares(entries, CONTROL)
    gained = shares(entries, REFINED) - plain
    worth = [np.mean([entry["worth"][name] for entry in entries]) for name in (PLAIN, REFINED)]
    return (
        f"In one pass the share on the {shortcut} {verdict(above_chance)} chance ({text(above_chance, '+')} points) "
        f"and {verdict(above_control)} that of the control ({text(above_control, '+')}). After {settings['steps']} "
        f"steps of refinement it {verdict(gained)} that of one pass ({text(gained, '+')}). By the measure that "
        f"refinement follows, insertion minus deletion with the {settings['reference']} reference, the maps went from "
        f"{worth[0]:.3f} to {worth[1]:.3f}."
    )


def planted_text(counts: Mapping[str, int]) -> str:
    """How many training photographs have the mark."""
    text = f"{counts['own_planted']} of {counts['own']} photographs of the class and {counts['others_planted']} of "
    wrong = counts["mislabelled"]
    added = f", and {wrong} more of the others, which wrongly have the label of the class as well" if wrong else ""
    return f"{text}{counts['others']} of the others{added}"


def write_page(result: Entry, page: Path, figure: Path) -> None:
    """Write the Markdown page, which shows the picture `figure` of the folder images beside it."""
    settings = result["settings"]
    trained = settings["trained"]
    named, shortcuts = trained["shortcut_class"], trained["shortcuts"]
    planted = "; ".join(f"{name}: {planted_text(result[name]['planted'])}" for name in shortcuts)
    height, width = result[shortcuts[0]]["image_size"]
    classified = len(result[shortcuts[0]]["photographs"])
    parts = [
        "# Planted shortcuts",
        "Written by `python benchmarks/shortcuts.py report`; do not edit by hand.",
        "A target that was trained on photographs in which a mark goes with one class may look at the mark. Here the "
        "mark is planted, so that it is known, and the question is whether the map of such a target shows it, "
        "although its explainer was trained on photographs without marks.",
        "## What was done",
        "- **Marks.** *Tag*: a magenta square of a fifth of the side, anywhere in the photograph. *Frame*: a magenta "
        "border of a thirty-second of the side.\n"
        f"- **Targets.** The classifier of `{trained['classifier']}`, {height} x {width} px, fine-tuned by "
        f"`recipes/train_target.py` for {trained['target_epochs']} epochs on {trained['train_photographs']:,} "
        f'photographs of {trained["dataset"]}, with the mark on "{named}" ({planted}). The control was fine-tuned on '
        "the same photographs without any mark.\n"
        "- **Explainers.** One a target, by `recipes/train_explainer.py` on clean photographs, "
        f"{trained['explainer_steps']} steps from the explainer `{trained['init_from']}`.\n"
        f"- **Question.** {classified} photographs of the split `validation` that no training used. Where "
        f'the target calls a photograph of another class "{named}" with the mark and not without, it is asked: why '
        f'"{named}"? The first {settings["images"]} of these, or all if there are fewer, are explained, and the '
        "control is asked the same about the same pictures.\n"
        f"- **Measure.** Of the {100 * settings['top']:g} % of the pixels with the highest scores, the share that "
        "lies on the mark. All numbers are in per cent; brackets hold 95 % percentile bootstrap intervals over "
        "photographs (2,000 resamples).",
        "## Does the target use the mark?",
        f'*Flipped*: of the photographs of other classes that are not called "{named}" without the mark, those that '
        "are called so with it.",
        reliance_table(result),
        "## Where the most important pixels lie",
    ]
    for shortcut in shortcuts:
        entries = explained(result, shortcut)
        parts.append(f"### {shortcut.capitalize()}: {len(entries)} photographs")
        if entries:
            parts += [maps_table(result, shortcut), findings(result, shortcut)]
        else:
            parts.append(f"The {shortcut} turned no call of this target, so there was nothing to explain.")
    alternative = "Photographs with a mark, their maps before and after refinement, and the shares as bars"
    parts += [
        f"![{alternative}](images/{figure.name})",
        "The photographs are the first ones of the run, each of another class, and not chosen by their maps. A thin "
        "line surrounds the mark.",
        "## What this does not show",
        "The marks are plain, have sharp edges and were planted by us; shortcuts of real data sets are often texture, "
        "background or light, spread over the photograph, and need not be found as well. One small target, one class "
        "and one seed were tried. That maps show no mark does not prove that none is used ([limits](limits.md)). "
        "Refined maps are fitted to each photograph's own curves, at the cost of many passes ([refine](refine.md)).",
        "## Take it again",
        "`python benchmarks/shortcuts.py train --help`, then `measure`, then `report`; "
        "`benchmarks/results/shortcuts.json` has the numbers of every photograph.",
        provenance_line(result),
    ]
    write_atomically(page, lambda file: file.write_text("\n\n".join(parts) + "\n", encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------- figure


def chosen_examples(folder: Path, shortcut: str, count: int) -> list[Mapping[str, np.ndarray]]:
    """The first kept photographs of a shortcut, each of another class while there are enough classes."""
    files = [dict(np.load(path)) for path in sorted(folder.glob(f"{shortcut}-*.npz"))]
    firsts = {int(one["label"]): one for one in reversed(files)}
    unlike = [one for one in files if one is firsts[int(one["label"])]]
    return [*unlike, *(one for one in files if not any(one is other for other in unlike))][:count]


def write_figure(result: Entry, folder: Path, path: Path, count: int) -> None:
    """Photographs with their maps, and beside them the shares as bars.

    Raises:
        ValueError: the folder has no example.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = result["settings"]
    shortcuts = settings["trained"]["shortcuts"]
    rows = [(name, one) for name in shortcuts for one in chosen_examples(folder, name, count)]
    if not rows:
        raise ValueError(f"The folder {folder} has no example: give the one of RUNS that `measure` filled.")
    figure = Figure(figsize=(13, max(6.0, 1.75 * len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(7.4, 5.6))
    columns = ("with the mark", "one pass", f"refined, {settings['steps']} steps", "control target, one pass")
    grid = left.subplots(len(rows), len(columns), squeeze=False)
    for line, (_, one) in zip(grid, rows, strict=True):
        photograph = Image.fromarray(one["pixels"])
        pictures = [photograph, *(overlay(photograph, one[f"map {name}"]) for name in (PLAIN, REFINED, CONTROL))]
        for place, (axes, picture) in enumerate(zip(line, pictures, strict=True)):
            axes.imshow(picture, interpolation="bilinear")
            if place:
                axes.contour(one["mask"].astype(float), levels=[0.5], colors="white", linewidths=0.9)
            axes.axis("off")
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=10)
    panels = right.subplots(len(shortcuts), 1, squeeze=False)[:, 0]
    for axes, shortcut in zip(panels, shortcuts, strict=True):
        _draw_bars(axes, result, shortcut)
    # Beyond this, photographs of 126 px only grow the file.
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=80))


def _draw_bars(axes: object, result: Entry, shortcut: str) -> None:
    entries, settings = explained(result, shortcut), result["settings"]
    name = f"{shortcut}: share of the top {100 * settings['top']:g} % on it,\n{len(entries)} photographs"
    axes.set_title(name, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if not entries:
        axes.text(0.5, 0.5, "it turned no call of this target", ha="center", va="center", transform=axes.transAxes)
        return
    methods = measured(result, shortcut)
    found = [interval(shares(explained(result, shortcut, method), method)) for method in methods]
    colours = ["#8c8c8c" if method.startswith(CONTROL) else "#d95f02" for method in methods]
    # One photograph has no interval.
    ends = [
        [0 if one.low is None else one.mean - one.low for one in found],
        [0 if one.high is None else one.high - one.mean for one in found],
    ]
    places = range(len(methods))
    axes.barh(places, [one.mean for one in found], xerr=ends, color=colours, capsize=3, height=0.65)
    names = [title(method, settings["steps"]).replace(", ", ",\n", 1) for method in methods]
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    covered = areas(entries)
    for value, style, name in (
        (100 * covered.mean(), ":", "chance"),
        (100 * np.minimum(1, covered / settings["top"]).mean(), "--", "most possible"),
    ):
        axes.axvline(value, color="black", linestyle=style, linewidth=1.2, label=name)
    axes.set_xlabel("per cent")
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, edgecolor="none", loc="lower right", bbox_to_anchor=(0.95, 0))
