"""Line plots: perturbation curves and training logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .files import write_atomically


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind people can tell apart; yellow, hard to see on white, comes last.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_DASHES = ("-", "--", ":", "-.")

_PANELS = {
    "loss": "loss",
    "deletion": "deletion (lower is better)",
    "insertion": "insertion (higher is better)",
    "tau": "temperature of the ranking",
    "learning_rate": "learning rate",
}
_SCHEDULES = ("tau", "learning_rate")  # set, not measured: there is no noise to average away
_NOT_PLOTTED = ("step", "epoch")


def plot_curves(
    curves: Mapping[str, tuple],
    title: str = "",
    ylabel: str = "probability of the class",
    path: str | PathLike[str] | None = None,
    *,
    xlabel: str = "share of the pixels",
) -> Figure:
    """Draw perturbation curves with their bands.

    Args:
        curves: by name, `(fractions, mean, low, high)`: four sequences of equal length, where `low` and `high` bound a
            band (such as a confidence interval) or are both None.
        title, ylabel, xlabel: plain text, drawn as it is.
        path: where to save the figure as well; the suffix gives the format (.png, .svg, .pdf).

    Returns:
        the matplotlib figure, which is not known to pyplot and so need not be closed.

    Raises:
        ValueError: there is no curve, or the sequences of one differ in length.

    Example:
        >>> figure = plot_curves({"random": ([0, 0.5, 1], [0.9, 0.4, 0.0], None, None)}, title="Deletion")
        >>> figure.axes[0].get_title(loc="left")
        'Deletion'
    """
    if not curves:
        raise ValueError("There is no curve to plot; give at least one.")
    figure = _new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    handles = []
    for i, (name, (fractions, mean, low, high)) in enumerate(curves.items()):
        lengths = {len(values) for values in (fractions, mean, low, high) if values is not None}
        if len(lengths) != 1 or (low is None) != (high is None):
            raise ValueError(
                f"The curve {name!r} must be (fractions, mean, low, high), all of one length, low and high both or "
                "neither None."
            )
        style = {"color": PALETTE[i % len(PALETTE)], "linestyle": _DASHES[i // len(PALETTE) % len(_DASHES)]}
        handles += axes.plot(np.asarray(fractions), np.asarray(mean), linewidth=1.8, **style)
        if low is not None:
            axes.fill_between(
                np.asarray(fractions), np.asarray(low), np.asarray(high), color=style["color"], alpha=0.18, linewidth=0
            )
    _decorate(axes, title, xlabel, ylabel)
    _add_legend(axes, handles, list(curves))
    return _saved(figure, path)


def plot_training(log: Sequence[Mapping[str, object]], path: str | PathLike[str] | None = None) -> Figure:
    """Draw a training log: one panel for each quantity, training values with a running mean, validation as dots.

    Args:
        log: entries with "step" and any of "loss", "deletion", "insertion", "tau", "learning_rate", or
            "validation/.../<quantity>"; other finite numbers get panels of their own, anything else is left out. Keys
            that end in the same quantity share its panel.
        path: where to save the figure as well; the suffix gives the format (.png, .svg, .pdf).

    Returns:
        the matplotlib figure, which is not known to pyplot and so need not be closed.

    Raises:
        ValueError: no entry has a step and a number.

    Example:
        >>> log = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"step": 2, "validation/blur/insertion": 0.7}]
        >>> [axes.get_title(loc="left") for axes in plot_training(log).axes]
        ['loss', 'insertion (higher is better)']
    """
    panels = _series_by_panel(log)
    if not panels:
        raise ValueError("The training log holds no entry with a step and a number, so that there is nothing to plot.")
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = _new_figure(5.4 * columns, 3.1 * rows)
    for i, (quantity, series) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        handles = [_draw_series(axes, key, *points, number) for number, (key, points) in enumerate(series.items())]
        _decorate(axes, _PANELS.get(quantity, quantity), "step", "")
        if len(series) > 1 or set(series) != {quantity}:
            names = [key.rpartition("/")[0] or "training" for key in series]
            # Below the panel: noisy curves leave no free corner in it.
            _add_legend(axes, handles, names, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2)
    return _saved(figure, path)


def _series_by_panel(log: Sequence[Mapping[str, object]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Collect (steps, values) of each key, grouped by the last part of the key; known quantities come first."""
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {quantity: {} for quantity in _PANELS}
    for entry in log:
        step = entry.get("step")
        if not _is_number(step):
            continue
        for key, value in entry.items():
            if key not in _NOT_PLOTTED and _is_number(value):
                steps, values = panels.setdefault(key.rpartition("/")[2], {}).setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return {quantity: series for quantity, series in panels.items() if series}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _draw_series(axes: Axes, key: str, steps: list[float], values: list[float], number: int):
    color = PALETTE[number % len(PALETTE)]
    if key in _SCHEDULES:
        return axes.plot(steps, values, color=color, linewidth=1.8)[0]
    if "/" in key or len(values) < 20:
        return axes.plot(steps, values, color=color, linewidth=1.4, marker="o", markersize=4)[0]
    axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
    half = max(len(values) // 60, 1)
    mean = np.convolve(values, np.full(2 * half + 1, 1 / (2 * half + 1)), mode="valid")
    return axes.plot(steps[half:-half], mean, color=color, linewidth=1.8)[0]


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return figure


def _decorate(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    texts = [
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold"),
        axes.set_xlabel(xlabel, fontsize=11),
        axes.set_ylabel(ylabel, fontsize=11),
    ]
    for text in texts:
        text.set_parse_math(False)  # a dollar sign in a class name is no formula
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, color="0.6")
    axes.margins(x=0.02)


def _add_legend(axes: Axes, handles: list, names: list[str], **place: object) -> None:
    # matplotlib leaves names that begin with an underscore out of a legend.
    shown = [f" {name}" if name.startswith("_") else name for name in names]
    legend = axes.legend(handles, shown, frameon=False, fontsize=10, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _saved(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    if path is not None:
        suffix = Path(path).suffix.lstrip(".") or "png"
        write_atomically(path, lambda file: figure.savefig(file, format=suffix))
    return figure
