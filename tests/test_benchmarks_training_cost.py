"""The cost of training on paper, against what is known of the models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import training_cost  # noqa: E402


def test_the_figures_are_those_of_the_models(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_cost, "SIZES", {"ViT-B/16": training_cost.SIZES["ViT-B/16"]})
    output = tmp_path / "cost.json"
    training_cost.main(["--curve-points", "4", "--output", str(output)])
    one = json.loads(output.read_text())["targets"]["ViT-B/16"]
    # 17.6 GMAC, as published for this model; to the pixels, the backward pass takes as much as the forward.
    assert one["features"] == pytest.approx(2 * 17.58e9, rel=0.01)
    assert one["perturbed_pass"] == pytest.approx(2 * one["features"], rel=0.03)
    assert one["perturbed"] == 8 * one["perturbed_pass"]
    assert one["decoder"] < 0.1 * one["features"]
    # Every block keeps at least the input of its wider layer's activation, 197 x 3072 numbers of two bytes.
    assert one["kept_bytes"] > one["kept_bytes_fused_attention"] > 12 * 197 * 3072 * 2
    assert one["kept_bytes"] - one["kept_bytes_fused_attention"] >= 12 * 12 * 197 * 197 * 2
    seconds = 1_281_167 * (one["features"] + one["decoder"] + one["perturbed"]) / (989e12 * 0.4)
    assert f"| {seconds / 60:.1f} min |" in capsys.readouterr().out
