"""The benchmark of waiting for data runs the recipe's own trainer and records what its numbers need."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import ViTImageProcessorPil


FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_share_of_waiting_is_recorded_for_a_classifier(tmp_path, monkeypatch, make_classifier, streaming):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("data_waiting")
    make_classifier().save_pretrained(tmp_path / "tiny-vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tiny-vit")
    (tmp_path / "photos" / "train").mkdir(parents=True)
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "train" / f"{number}.png")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('mixed_precision: "no"\ngrid_range: [2, 4]\ngrid_width: 8\ngrid_depth: 1\ncurve_points: 2\n')
    words = {
        "--classifier": tmp_path / "tiny-vit",
        "--dataset": tmp_path / "photos",
        "--recipe": recipe,
        "--image-size": 32,
        "--workers": 1,
        "--batch-size": 3,
        "--steps": 3,
        "--warm-up": 1,
        "--loader-batches": 2,
        "--output": tmp_path / "results" / "waiting.json",
    }
    argv = [str(word) for pair in words.items() for word in pair] + ["--streaming"] * streaming
    result = script.main(argv)
    text = (tmp_path / "results" / "waiting.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result)) and str(tmp_path) not in text
    assert result["threads"] == torch.get_num_threads() and result["streaming"] is streaming
    (row,) = result["rows"]
    assert (row["classifier"], row["image_size"], row["batch_size"]) == ("tiny-vit", 32, 3)
    assert row["data_wait_share"] == row["waited_s"] / row["seconds"] <= 1
    assert row["images_per_second"] == pytest.approx(9 / row["seconds"])
    assert row["loader_alone_images_per_second"] > 0
    assert not (tmp_path / "runs").exists()
