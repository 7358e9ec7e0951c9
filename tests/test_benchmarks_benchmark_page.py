"""The page of the benchmarks: `benchmarks/benchmark_page.py`."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_benchmarking import Made, classifier, images_of, photographs, results_of, settings_of  # noqa: F401

from hf_aha.baselines import Passes, get_method
from hf_aha.benchmark import Entry


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import benchmark_page  # noqa: E402


@pytest.fixture
def results(classifier, tmp_path):  # noqa: F811
    """Two methods, the first of which is passed off as an explainer that reads gradients."""
    entries = [Entry(Made()), Entry(get_method("rise", masks=4), 3)]
    settings = settings_of(*entries, protocols=("hf_aha",), metrics=("total_variation",))
    found = results_of(classifier, images_of(photographs(5)), settings, tmp_path)
    ours = replace(found.methods[0], title="AHA (made)", passes=Passes(3, 2))
    return replace(found, methods=(ours, *found.methods[1:]))


def with_values(results, method: str, curve: str, values: list[float]):
    """The results with other areas of one method in all protocols of one curve."""
    protocols = {
        name: {
            one: replace(found, values=np.array(values[: len(found)], np.float32))
            if (one, name.split("/")[-1]) == (method, curve)
            else found
            for one, found in by_method.items()
        }
        for name, by_method in results.protocols.items()
    }
    return replace(results, protocols=protocols)


def test_areas_are_means_over_the_references(results):
    found = benchmark_page.areas(results, "made-gradient", "cell4", "deletion")
    pair = [results.protocols[f"hf_aha/cell4/{kind}/deletion"]["made-gradient"] for kind in ("blur", "mean")]
    assert list(found) == list(pair[0].image_ids)
    np.testing.assert_allclose(list(found.values()), np.mean([one.values for one in pair], axis=0), atol=1e-6)


@pytest.mark.parametrize(("curve", "ours", "other"), [("deletion", 0.1, 0.4), ("insertion", 0.8, 0.5)])
def test_better_is_positive_on_both_curves_and_only_shared_photographs_count(results, curve, ours, other):
    made = with_values(results, "made-gradient", curve, [ours, ours, ours, 9, 9])
    made = with_values(made, "rise", curve, [other] * 3)
    found = benchmark_page.difference(made, "made-gradient", "rise", "patch", curve)
    assert found.mean == pytest.approx(0.3, abs=1e-6) and found.images == 3
    assert benchmark_page.verdict(found) == "better"
    turned = benchmark_page.difference(made, "rise", "made-gradient", "patch", curve)
    assert turned.mean == pytest.approx(-0.3, abs=1e-6) and benchmark_page.verdict(turned) == "worse"


def test_a_difference_that_may_be_chance_is_open(results):
    made = with_values(results, "made-gradient", "insertion", [0.1, 0.9, 0.4, 0.4, 0.4])
    made = with_values(made, "rise", "insertion", [0.9, 0.1, 0.4])
    assert (
        benchmark_page.verdict(benchmark_page.difference(made, "made-gradient", "rise", "pixel", "insertion"))
        == "open"
    )
    assert benchmark_page.verdict(None) == "open"


def test_the_sentence_counts_and_names_every_exception(results):
    made = with_values(results, "made-gradient", "deletion", [0.1] * 5)
    made = with_values(made, "rise", "deletion", [0.2] * 3)
    made = with_values(made, "made-gradient", "insertion", [0.3] * 5)
    made = with_values(made, "rise", "insertion", [0.6] * 3)
    text = benchmark_page.claims(made)
    assert "AHA (made) against all methods of more passes: significantly better in 3 of 6 comparisons" in text
    assert text.count("insertion (worse)") == 3 and "deletion (" not in text


def test_the_page_holds_every_method_and_links_to_the_results(results, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_page, "ROOT", tmp_path)
    text = benchmark_page.page({tmp_path / "results": results})
    assert "[results](../results/results.md)" in text and "5 photographs" in text
    rows = [line for line in text.splitlines() if line.startswith("| RISE") or line.startswith("| **AHA (made)**")]
    assert len(rows) >= 4 and "total variation ↓" in text
    row = next(line for line in rows if line.startswith("| RISE") and "(3)" in line)
    mean = np.nanmean(results.metrics["total_variation"]["rise"])
    assert re.search(rf"\| {mean:.3f} \[", row)


def test_what_is_no_benchmark_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="No page was written: .*holds no results.json"):
        benchmark_page.main([str(tmp_path), "--file", str(tmp_path / "page.md")])
    assert not (tmp_path / "page.md").exists()
