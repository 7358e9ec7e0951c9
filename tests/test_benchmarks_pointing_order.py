"""The study of how much deletion and insertion care where a map points."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_classifier
from PIL import Image
from transformers import ViTImageProcessor

from hf_aha import AhaExplainer
from hf_aha.metrics import grid_pointing_shares


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("pointing_order")


def test_questions_and_shares_are_those_of_the_pointing_game(study):
    images, groups, maps = torch.rand(8, 3, 16, 24), torch.arange(8).view(2, 4), torch.randn(8, 16, 24)
    inside = study.inside_cells((16, 24), 2)
    asked = iter(maps.split(4))
    game = grid_pointing_shares(lambda *given: next(asked), images, torch.arange(8), groups, batch_size=4)
    torch.testing.assert_close(study.share_inside(maps, inside), game.rank_share.flatten())


def test_what_is_varied(study):
    scores, inside = torch.randn(4, 16, 16) * 5 + 2, study.inside_cells((16, 16), 1)
    found = study.variants(scores, inside, 2.0)
    torch.testing.assert_close(found["as it is"].mean((1, 2)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["own cell raised"] - found["as it is"], inside.float())
    assert found["smoothed"].diff(dim=2).abs().mean() < 0.2 * found["as it is"].diff(dim=2).abs().mean()
    shares = {kind: study.share_inside(maps, inside).mean() for kind, maps in found.items()}
    assert shares["own cell raised"] > shares["as it is"]


def test_it_runs_and_its_result_is_kept(study, tmp_path):
    torch.manual_seed(0)
    model = build_classifier("vit")
    with torch.no_grad():
        model.classifier.weight *= 50  # a random head puts everything into one class
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    explainer = AhaExplainer.from_classifier(model, image_processor=processor, **sizes)
    explainer.save_pretrained(tmp_path / "explainer", include_classifier=True)
    folder = tmp_path / "photographs" / "validation" / "thing"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(24):
        Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((40, 32)).save(
            folder / f"{number}.png"
        )
    words = ["--explainers", str(tmp_path / "explainer"), "--dataset", str(tmp_path / "photographs"), "--rows", "24"]
    words += ["--mosaics", "1", "--min-probability", "0", "--output", str(tmp_path / "out.json")]
    result = study.main(words)
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(result))
    assert set(result["explainers"]["explainer"]) == {"as it is", "smoothed", "own cell raised"}
    for entry in result["explainers"]["explainer"].values():
        assert all(0 <= one["mean"] <= 1 and one["low"] is None for one in entry.values()), "one mosaic: no interval"
    text = study.results_table(result)
    assert "1 mosaics, 4 questions" in text and "| explainer | own cell raised |" in text
    with pytest.raises(SystemExit, match="give more --rows"):
        study.main([*words, "--min-probability", "1.1"])


def test_the_kept_result_says_what_the_page_says():
    kept = json.loads((BENCHMARKS / "results" / "pointing_order.json").read_text(encoding="utf-8"))
    for by_kind in kept["explainers"].values():
        plain, raised = by_kind["as it is"], by_kind["own cell raised"]
        assert raised["pointing"]["low"] > plain["pointing"]["high"]
        for area in ("pixels, deletion", "pixels, insertion", "patches, deletion", "patches, insertion"):
            assert raised[area]["mean"] == pytest.approx(plain[area]["mean"], abs=0.03)
