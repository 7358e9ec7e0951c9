"""The benchmark of deletion and insertion runs on a tiny model; no time of it is asserted."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from transformers import ViTImageProcessorPil


FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("deletion_insertion")


@pytest.fixture
def classifier(tmp_path: Path, make_classifier) -> Path:
    folder = tmp_path / "tiny-vit"
    make_classifier("vit").save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def run(script, classifier: Path, output: Path, *more: str) -> dict:
    argv = [
        "--classifier",
        str(classifier),
        "--images",
        "2",
        "--repeats",
        "1",
        "--precision",
        "float32",
        "--no-memory",
    ]
    result = script.main([*argv, *more, "--output", str(output)])
    assert json.loads(output.read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    assert str(classifier.parent) not in output.read_text(encoding="utf-8")
    # The loop is written from the definition, so that ours is also right where its time is taken.
    assert result["largest_difference_of_areas"] < 1e-5
    return result


def test_it_compares_the_ways_and_their_areas(script, classifier, tmp_path, capsys):
    result = run(script, classifier, tmp_path / "result.json", "--no-quantus")
    assert set(result["seconds"]) == {"ours", "bare", "loop"} and set(result["ratios"]) == {"bare", "loop"}
    assert result["memory_bytes"] is None and result["quantus_steps"] is None
    assert "it takes" in capsys.readouterr().out


def test_compiled_passes_stand_beside_ours(script, classifier, tmp_path, capsys, compile_eagerly):
    result = run(script, classifier, tmp_path / "result.json", "--no-quantus", "--compile")
    assert set(result["seconds"]) == {"ours", "compiled", "bare", "loop"}
    assert set(result["ratios"]) == {"compiled", "bare", "loop"}
    assert set(result["ratios_to_compiled"]) == {"bare", "loop"}
    assert "| Way | Seconds an image | Against ours | Against compiled |" in capsys.readouterr().out


def test_bare_makes_exactly_the_passes_of_ours(script, classifier):
    parser = {"device": "cpu", "classifier": str(classifier), "precision": "float32", "max_batch": 7}
    setting = script.Setting(script.argparse.Namespace(**parser), 3)
    counts = []
    for call in (setting.ours, setting.bare):
        before = setting.passes.images
        call()
        counts.append(setting.passes.images - before)
    assert counts == [3 * 40, 3 * 40]


def test_quantus_takes_21_steps_at_224_pixels(script):
    assert 3 * 224 * 224 // script.quantus_features(224, 224) == 21
    assert 3 * 32 * 32 // script.quantus_features(32, 32) == 24


@pytest.mark.bench
def test_it_runs_quantus(script, classifier, tmp_path):
    result = run(script, classifier, tmp_path / "result.json")
    assert result["quantus_steps"] == 24
    assert {"quantus", "quantus (same passes)"} <= set(result["ratios"])
