"""The results page of `benchmarks/faithfulness.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import faithfulness  # noqa: E402


def write_run(path, explainer, methods, images, cells, **facts):
    """A results file in which the insertion curve of a method is constant, deletion is zero."""
    head = {
        "arguments": {"split": "validation", "images": 4, "skip": 0, "cell_images": 4, "seed": 0, "compile": False},
        "dataset": "photographs",
        "explainer": explainer,
        "classifier": "vit",
        "image_size": [32, 32],
        "patch_size": [8, 8],
        "decoder_parameters": 10,
        "training": None,
        "versions": {"torch": "2"},
        "machine": "a machine",
    } | facts
    lines = [json.dumps(head)]
    for image in images:
        for method, value in methods.items():
            curve = {"deletion": [0.0] * 21, "insertion": [value] * 21}
            levels = ["pixel", "cells"] if image in cells else ["pixel"]
            curves = {f"{kind}/{level}": curve for kind in ("blur", "mean") for level in levels}
            lines.append(json.dumps({"image": image, "method": method, "target": 0, "seconds": 0.1, "curves": curves}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


BASELINES = {"random": 0.1, "centre": 0.2, "gradient x input": 0.3, "integrated gradients": 0.4}


@pytest.fixture
def main_run(tmp_path):
    methods = BASELINES | {"aha": 0.5}
    return write_run(tmp_path / "main.jsonl", "one-pass", methods, range(4), cells=(0, 1))


def test_another_explainer_of_the_classifier_is_one_more_row(main_run, tmp_path):
    other = write_run(tmp_path / "other.jsonl", "informed", {"aha": 0.75}, (0, 2), cells=(0, 2), passes=5)
    page = faithfulness.section([main_run, other])
    assert "2 photographs of the split" in page and "2 left out" in page
    assert page.count("| AHA (informed) | 0.000 [0.000, 0.000] | 0.750 [0.750, 0.750] |") == 4
    assert page.count("| -0.250 [-0.250, -0.250] |") == 4, "paired with the explainer of the page"
    # Cells were measured on photograph 0 by both; 2 has them from one only.
    assert "### Patch cells (8 px), blur reference (1 photographs)" in page
    assert "| AHA (informed) | 3 forward + 2 backward |" in page


def test_the_shards_of_one_explainer_are_one_row(tmp_path):
    shards = [
        write_run(tmp_path / f"{first}.jsonl", "one-pass", {"aha": 0.5 + 0.1 * first}, (first, first + 2), cells=())
        for first in (0, 1)
    ]
    page = faithfulness.section([*shards, write_run(tmp_path / "b.jsonl", None, BASELINES, range(4), cells=())])
    assert "4 photographs of the split" in page and "AHA (" not in page
    assert page.count("| **AHA** (this explainer) | 0.000 [0.000, 0.000] | 0.550 [") == 2


def test_different_photographs_are_refused(main_run, tmp_path):
    arguments = {"split": "validation", "images": 4, "skip": 9, "cell_images": 4, "seed": 0, "compile": False}
    other = write_run(tmp_path / "other.jsonl", "informed", {"aha": 0.7}, (0,), cells=(), arguments=arguments)
    with pytest.raises(SystemExit, match="measured on different photographs"):
        faithfulness.section([main_run, other])
