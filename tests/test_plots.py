from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from hf_aha.plots import plot_curves, plot_training


FRACTIONS = np.linspace(0, 1, 11)


def lines(axes) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def legend(axes) -> list[str]:
    return [] if axes.get_legend() is None else [text.get_text() for text in axes.get_legend().get_texts()]


def test_curves_and_bands():
    mean = 1 - FRACTIONS
    figure = plot_curves(
        {"AHA": (FRACTIONS, mean**2, mean**2 - 0.1, mean**2 + 0.1), "random": (FRACTIONS.tolist(), mean, None, None)},
        title="Deletion",
        ylabel="probability",
        xlabel="share removed",
    )
    (axes,) = figure.axes
    drawn = lines(axes)
    assert [line[0] for line in drawn] == [FRACTIONS.tolist()] * 2
    assert drawn[0][1] == (mean**2).tolist()
    assert legend(axes) == ["AHA", "random"]
    (band,) = axes.collections
    vertices = band.get_paths()[0].vertices
    assert vertices[:, 1].min() == pytest.approx(-0.1)
    assert vertices[:, 1].max() == pytest.approx(1.1)
    assert (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()) == (
        "Deletion",
        "share removed",
        "probability",
    )


def test_many_curves_can_be_told_apart():
    figure = plot_curves({f"method {i}": (FRACTIONS, FRACTIONS * i, None, None) for i in range(20)})
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(styles) == 20


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_saving(tmp_path, suffix):
    path = tmp_path / "plots" / f"curves{suffix}"
    plot_curves({"AHA": (FRACTIONS, FRACTIONS, None, None)}, path=path)
    magic = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(magic)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_text_is_drawn_as_it_is(tmp_path):
    """Dollar signs, underscores and scripts that the font lacks are text, neither a formula nor an error."""
    path = tmp_path / "plot.png"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = plot_curves(
            {"_private $\\frac{": (FRACTIONS, FRACTIONS, None, None), "虎": (FRACTIONS, FRACTIONS, None, None)},
            title="costs $5, not $\\sqrt{",
            path=path,
        )
    assert [name.strip() for name in legend(figure.axes[0])] == ["_private $\\frac{", "虎"]
    picture = np.asarray(Image.open(path).convert("L"))
    assert (picture[:, :4] == 255).all() and (picture[:4] == 255).all()
    assert (picture < 100).any()


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        (([0, 1], [1, 0, 0], None, None), "all of one length"),
        (([0, 1], [1, 0], [0, 0], None), "both or neither"),
        (([0, 1], [1, 0], [0], [1, 1]), "all of one length"),
    ],
)
def test_refused_curves(curve, reason):
    with pytest.raises(ValueError, match=f"The curve 'AHA' must be .*{reason}"):
        plot_curves({"AHA": curve})
    with pytest.raises(ValueError, match="no curve"):
        plot_curves({})


def training_log() -> list[dict]:
    log = []
    for step in range(1, 101):
        log.append(
            {"step": step, "loss": 1 / step, "deletion": 0.5, "insertion": 0.6, "tau": 0.3, "learning_rate": 1e-3}
        )
        if step % 25 == 0:
            log.append({"step": step, "validation/blur/deletion": 0.4, "validation/black/insertion": 0.7})
    return log


def panels(figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_training_panels_hold_what_the_log_holds(tmp_path):
    path = tmp_path / "training.png"
    by_title = panels(plot_training(training_log(), path))
    assert list(by_title) == [
        "loss",
        "deletion (lower is better)",
        "insertion (higher is better)",
        "temperature of the ranking",
        "learning rate",
    ]
    assert legend(by_title["deletion (lower is better)"]) == ["training", "validation/blur"]
    assert legend(by_title["insertion (higher is better)"]) == ["training", "validation/black"]
    assert legend(by_title["loss"]) == []
    assert lines(by_title["deletion (lower is better)"])[-1] == ([25, 50, 75, 100], [0.4] * 4)
    assert Image.open(path).size[0] > 1000


def test_running_mean_is_centred():
    log = [{"step": step, "loss": 3.0 * step} for step in range(1, 101)]
    raw, mean = lines(plot_training(log).axes[0])
    assert raw == (list(range(1, 101)), [3.0 * step for step in range(1, 101)])
    np.testing.assert_allclose(mean[1], [3.0 * step for step in mean[0]])
    assert len(mean[0]) > 90


def test_short_logs_and_schedules_are_not_averaged():
    figure = plot_training([{"step": 1, "loss": 0.5, "tau": 0.3}])
    assert [lines(axes) for axes in figure.axes] == [[([1], [0.5])], [([1], [0.3])]]
    log = [{"step": step, "learning_rate": step**2} for step in range(100)]
    assert lines(plot_training(log).axes[0]) == [(list(range(100)), [step**2 for step in range(100)])]


def test_what_is_no_number_is_left_out():
    log = [
        {"step": 1, "loss": float("nan"), "note": "warm-up", "done": True, "epoch": 0.1, "extra": 3},
        {"step": 2, "loss": 0.4, "insertion": None},
        {"loss": 0.1},
        {"step": None, "loss": 0.2},
    ]
    by_title = panels(plot_training(log))
    assert list(by_title) == ["loss", "extra"]
    assert lines(by_title["loss"]) == [([2], [0.4])]


@pytest.mark.parametrize("log", [[], [{"loss": 0.5}], [{"step": 1, "loss": float("inf")}], [{"step": 3}]])
def test_log_without_numbers(log):
    with pytest.raises(ValueError, match="no entry with a step and a number"):
        plot_training(log)
