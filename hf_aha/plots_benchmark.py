"""Plots of a benchmark: the curves of every method under one protocol, and quality against cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from .metrics.bands import curve_band
from .metrics.results import ProtocolResult, summarise
from .plots import PALETTE, _decorate, _new_figure, _saved


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P")

_SCORES = {
    "accuracy": "accuracy",
    "logit": "logit of the class",
    "probability": "probability of the class",
    "normalised_monotone": "normalised probability",
    "magnitude_aligned": "aligned probability",
}


def plot_protocol_curves(
    panels: Mapping[str, Mapping[str, ProtocolResult]], path: str | PathLike[str] | None = None
) -> Figure:
    """Draw the mean curves of every method with 95% bootstrap bands, a panel a protocol.

    Args:
        panels: by protocol, the result of each method by the name to show; the first method is drawn strongest. A
            method without a measured image is left out of its panel.
        path: where to save the figure as well; the suffix gives the format (.png, .svg, .pdf).

    Returns:
        the matplotlib figure.

    Raises:
        ValueError: there is no panel, or none with a measured image.
    """

    def draw(axes: Axes, by_method: Mapping[str, ProtocolResult], styles: Mapping[str, dict]) -> None:
        first = next(iter(by_method), None)
        alpha = 0.16 if len(by_method) <= 4 else 0.07
        for name, result in reversed(by_method.items()):
            fractions, mean, low, high = curve_band(result)
            color, dash = styles[name]["color"], styles[name]["linestyle"]
            axes.plot(fractions, mean, color=color, linestyle=dash, linewidth=2.6 if name == first else 1.5)
            if low is not None:
                axes.fill_between(fractions, low, high, color=color, alpha=alpha, linewidth=0)

    def label(protocol: str, result: ProtocolResult) -> tuple[str, str, str]:
        units = "pixels" if result.protocol.unit == "pixel" else "cells of {} x {} px".format(*result.protocol.cell)
        moved = "removed" if result.protocol.start == "image" else "shown"
        if result.protocol.order == "least_relevant_first":
            moved += ", the least important first"
        better = "higher is better" if result.protocol.higher_is_better else "lower is better"
        return f"{protocol} ({better})", f"share of the {units} {moved}", _SCORES[result.protocol.score]

    return _panels(panels, draw, label, path)


def plot_quality_against_cost(
    panels: Mapping[str, Mapping[str, ProtocolResult]],
    seconds: Mapping[str, float],
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw the value of every method, with its 95% bootstrap interval, over the time of one map on a log scale.

    Args:
        panels: by protocol, the result of each method by the name to show; the first one is drawn strongest.
        seconds: of one map, by the same names; a method without a positive one is left out.
        path: where to save the figure as well.

    Returns:
        the matplotlib figure.

    Raises:
        ValueError: there is no panel, or none with a measured image and its time.
    """
    timed = {
        protocol: {name: result for name, result in by_method.items() if seconds.get(name, 0) > 0}
        for protocol, by_method in panels.items()
    }

    def draw(axes: Axes, by_method: Mapping[str, ProtocolResult], styles: Mapping[str, dict]) -> None:
        axes.set_xscale("log")
        first = next(iter(by_method), None)
        for name, result in by_method.items():
            found = summarise(result)
            bars = None if found.low is None else [[found.mean - found.low], [found.high - found.mean]]
            axes.errorbar(
                [seconds[name]],
                [found.mean],
                yerr=bars,
                color=styles[name]["color"],
                marker="*" if name == first else styles[name]["marker"],
                markersize=14 if name == first else 7,
                elinewidth=1.4,
                linestyle="none",
                zorder=3 if name == first else 2,
            )
        axes.margins(x=0.08, y=0.08)

    def label(protocol: str, result: ProtocolResult) -> tuple[str, str, str]:
        arrow = "higher is better" if result.protocol.higher_is_better else "lower is better"
        return f"{protocol} ({arrow})", "seconds for one map", "area"

    return _panels(timed, draw, label, path, markers=True)


def _panels(
    panels: Mapping[str, Mapping[str, ProtocolResult]],
    draw: Callable[[Axes, Mapping[str, ProtocolResult], Mapping[str, dict]], None],
    label: Callable[[str, ProtocolResult], tuple[str, str, str]],
    path: str | PathLike[str] | None,
    *,
    markers: bool = False,
) -> Figure:
    names = list(dict.fromkeys(name for by_method in panels.values() for name in by_method))
    measured = {
        protocol: {name: result for name, result in by_method.items() if len(result)}
        for protocol, by_method in panels.items()
    }
    measured = {protocol: by_method for protocol, by_method in measured.items() if by_method}
    if not measured:
        raise ValueError("There is nothing to plot: no protocol has a measured image.")
    styles = {name: _style(number) for number, name in enumerate(names)}
    columns = min(len(measured), 2)
    rows = math.ceil(len(measured) / columns)
    figure = _new_figure(5.2 * columns + 2.9, max(3.9 * rows, 0.6 + 0.24 * len(names)))
    for number, (protocol, by_method) in enumerate(measured.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        draw(axes, by_method, styles)
        margins = axes.margins()
        _decorate(axes, *label(protocol, next(iter(by_method.values()))))
        axes.title.set_fontsize(11)
        if markers:
            axes.margins(*margins)
    _add_outer_legend(figure, names, styles, markers)
    return _saved(figure, path)


def _style(number: int) -> dict[str, str]:
    """Colours repeat after eight methods with another dash and marker; colour and dash together are unique to 32."""
    turn = number // len(PALETTE)
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": _DASHES[turn % len(_DASHES)],
        "marker": _MARKERS[turn % len(_MARKERS)],
    }


def _add_outer_legend(figure: Figure, names: Sequence[str], styles: Mapping[str, dict], markers: bool) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for number, name in enumerate(names):
        style = styles[name]
        if markers:
            marker = "*" if number == 0 else style["marker"]
            handles.append(Line2D([], [], color=style["color"], marker=marker, markersize=9, linestyle="none"))
        else:
            width = 2.6 if number == 0 else 1.5
            handles.append(Line2D([], [], color=style["color"], linestyle=style["linestyle"], linewidth=width))
    # matplotlib leaves names that begin with an underscore out of a legend.
    shown = [f" {name}" if name.startswith("_") else name for name in names]
    legend = figure.legend(handles, shown, loc="outside right upper", frameon=False, fontsize=9.5)
    for text in legend.get_texts():
        text.set_parse_math(False)
