"""The front page's table: `benchmarks/summary_table.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from test_benchmarking import classifier, images_of, photographs, results_of, settings_of  # noqa: F401

from hf_aha.baselines import get_method
from hf_aha.benchmark import Entry


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import summary_table  # noqa: E402


@pytest.fixture
def results(classifier, tmp_path):  # noqa: F811
    entries = [Entry(get_method("centre")), Entry(get_method("random"), 3)]
    settings = settings_of(*entries, protocols=("hf_aha",))
    return results_of(classifier, images_of(photographs(5)), settings, tmp_path)


def test_a_cell_is_the_mean_over_images_and_references_of_insertion_minus_deletion(results):
    parts = [
        results.protocols[f"hf_aha/patch/{reference}/{curve}"]["centre"].values * (1 if curve == "insertion" else -1)
        for reference in ("blur", "mean")
        for curve in ("insertion", "deletion")
    ]
    expected = np.mean(np.sum(parts, axis=0) / 2)
    values = summary_table.insertion_minus_deletion(results, "centre", "patch")
    assert len(values) == 5 and np.mean(list(values.values())) == pytest.approx(expected, abs=1e-6)
    row = next(line for line in summary_table.summary_table(results).splitlines() if line.startswith("| Centre"))
    assert f"{expected:.3f} [" in row.split("|")[4] and row.rstrip(" |").endswith("5")


def test_a_method_on_fewer_images_says_so(results):
    row = next(line for line in summary_table.summary_table(results).splitlines() if line.startswith("| Random"))
    assert re.search(r"\| 3 \|$", row)


@pytest.mark.parametrize(("shift", "marked"), [(0.0, False), (0.2, True)])
def test_an_asterisk_marks_a_difference_whose_interval_leaves_zero_out(shift, marked):
    first = {f"photo {number}": number / 10 for number in range(8)}
    other = {image: value + shift + (-1) ** row / 100 for row, (image, value) in enumerate(first.items())}
    assert summary_table.cell(other, first, "x").endswith("*") == marked


def test_only_what_lies_between_the_marks_is_replaced(tmp_path):
    page = f"before\n{summary_table.BEGIN}\nold\n{summary_table.END}\nafter\n"
    assert summary_table.replace_between_marks(page, "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="must hold .* once each"):
        summary_table.replace_between_marks("no marks", "new")


def test_what_cannot_be_tabulated_is_refused_in_one_sentence(classifier, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match="No table was written: .*holds no results.json"):
        summary_table.main([str(tmp_path)])
    settings = settings_of(get_method("centre"), protocols=("aha",))
    results_of(classifier, images_of(photographs(2)), settings, tmp_path).save(tmp_path)
    with pytest.raises(SystemExit, match="the protocol hf_aha was not measured, but aha/"):
        summary_table.main([str(tmp_path)])
