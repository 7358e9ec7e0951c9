"""`benchmarks/refinement.py` on a tiny model: what it records, that it goes on, and what its page says."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessorPil

import hf_aha
from hf_aha import AhaExplainer


ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = Path(hf_aha.__file__).parent / "bundled" / "photographs"
SIZES = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}


@pytest.fixture(scope="module")
def scripts():
    """The benchmark and its page, found as if they were run from their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("refinement"), importlib.import_module("refinement_page")


@pytest.fixture
def words(tmp_path, make_classifier):
    """The command line of a tiny explainer and its classifier, on the bundled photographs."""
    model = make_classifier("vit")
    with torch.no_grad():
        # Probabilities of a random head hardly move; these do.
        model.classifier.weight *= 10
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    folder = tmp_path / "tiny-vit"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    AhaExplainer.from_classifier(model, image_processor=processor, **SIZES).save_pretrained(tmp_path / "tiny")
    return ["--explainer", str(tmp_path / "tiny"), "--classifier", str(folder), "--dataset", str(PHOTOGRAPHS)]


PAGE = "# A page\n\nbefore\n\n{}\nold numbers\n{}\n\nafter\n"


def test_measured_twice_and_reported(scripts, words, tmp_path, monkeypatch, capsys):
    script, pages = scripts
    output = tmp_path / "refinement.json"
    words = [*words, "--steps", "4", "--batch-size", "2", "--output", str(output)]
    monkeypatch.setattr(script, "RATES", {"scores": (0.2, 0.4)})
    monkeypatch.setattr(script, "TOLERANCES", (1e-3,))
    script.main(["tune", *words, "--photographs", "2", "--scopes", "scores"])
    assert "| scores |" in capsys.readouterr().out

    short = ["measure", *words, "--split", "train", "--skip", "0", "--road", "1"]
    script.main([*short, "--photographs", "2"])
    first = json.loads(output.read_text())["measured"]["tiny"]["photographs"]
    script.main([*short, "--photographs", "3"])
    held = json.loads(output.read_text())
    entries = held["measured"]["tiny"]["photographs"]
    assert entries[:2] == first and [entry["row"] for entry in entries] == [0, 1, 2]
    assert "tiny" in held["tuned"], "the tuning stays"
    assert str(tmp_path) not in output.read_text()

    tuned = held["tuned"]["tiny"]
    gains = {entry["learning_rate"]: entry["gain"] for entry in tuned["rates"]["scores"]}
    assert tuned["best"]["scores"] == max(gains, key=gains.get)
    maps = {"plain", "blur/full", "blur/adaptive", "mean/full", "mean/adaptive"}
    for entry in entries:
        assert set(entry["maps"]) == maps and set(entry["runs"]) == maps - {"plain"}
        assert not script.fell(entry)
        for name, run in entry["runs"].items():
            assert run["best_values"][-1] >= run["best_values"][0]
            if run["steps"] == 4:
                # The plain map, the first measurement, and what `test_refinement.py` derives for each step.
                assert run["passes"] == (1 + 18 + 4 * 36 if "full" in name else 1 + 2 * 18 + 4 * 2 * 6)
        # The evaluation's own code finds the same value at the points that were climbed, up to pixels cut at a bin.
        for kind in ("blur", "mean"):
            for name, place in (("plain", 0), (f"{kind}/full", -1)):
                climbed = entry["runs"][f"{kind}/full"]["best_values"][place]
                assert entry["maps"][name][f"{kind}/pixel"]["climbed"] == pytest.approx(climbed, abs=0.02)
    assert [entry["maps"]["plain"]["ROAD"] is None for entry in entries] == [False, True, True]

    page, figure = tmp_path / "page.md", tmp_path / "images" / "passes.png"
    page.write_text(PAGE.format(*pages.MARKERS))
    for _ in range(2):
        script.main(["report", str(output), "--page", str(page), "--figure", str(figure)])
    text = page.read_text()
    assert text.startswith("# A page\n\nbefore\n") and text.endswith("\n\nafter\n") and "old numbers" not in text
    assert text.count(pages.MARKERS[0]) == 1 and figure.stat().st_size > 0
    assert "](images/passes.png)" in text and "### tiny, refined with the reference mean" in text
    gained = {
        run: sum(
            entry["runs"][f"blur/{run}"]["best_values"][-1] - entry["runs"][f"blur/{run}"]["best_values"][0]
            for entry in entries
        )
        for run in ("full", "adaptive")
    }
    assert f"| {100 * gained['adaptive'] / gained['full']:.1f} % [" in text
    deletion = {
        name: np.mean([entry["maps"][name]["blur/pixel"]["deletion"] for entry in entries])
        for name in ("plain", "blur/full")
    }
    assert f"{deletion['plain']:.3f} to {deletion['blur/full']:.3f}:" in text

    script.main([*short, "--photographs", "1", "--refine-with", "mean", "--name", "mean only"])
    (entry,) = json.loads(output.read_text())["measured"]["mean only"]["photographs"]
    assert set(entry["runs"]) == {"mean/full", "mean/adaptive"} and "blur/pixel" in entry["maps"]["mean/full"]
    script.main(["report", str(output), "--page", str(page), "--figure", str(figure)])
    assert "### mean only, refined with the reference mean" in page.read_text()
    with pytest.raises(SystemExit, match="measured with other settings"):
        script.main([*short, "--photographs", "3", "--units", "pixel"])


def test_a_fall_is_seen_in_either_account(scripts):
    script, _ = scripts
    entry = {
        "runs": {"blur/full": {"best_values": [0.1, 0.2]}},
        "maps": {"plain": {"blur/pixel": {"climbed": 0.1}}, "blur/full": {"blur/pixel": {"climbed": 0.2}}},
    }
    assert not script.fell(entry)
    for change in (
        lambda bad: bad["runs"]["blur/full"].update(best_values=[0.1, 0.0999]),
        lambda bad: bad["maps"]["blur/full"]["blur/pixel"].update(climbed=0.1 - 2 * script.ROUNDING),
    ):
        bad = copy.deepcopy(entry)
        change(bad)
        assert script.fell(bad)


def test_gain_by_passes_and_shares(scripts):
    _, pages = scripts
    run = {"best_values": [0.5, 0.6, 0.6, 0.9], "best_passes": [19, 55, 91, 127]}
    found = pages.at_passes(run, np.array([0, 19, 54, 55, 126, 127, 400]))
    np.testing.assert_allclose(found, [0, 0, 0, 0.1, 0.1, 0.4, 0.4], atol=1e-12)
    share, low, high = pages.ratio([1.0, 1.0], [1.0, 3.0])
    assert share == 0.5 and low == pytest.approx(1 / 3) and high == 1.0


def test_a_page_without_markers_is_left_alone(scripts, tmp_path):
    script, _ = scripts
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("# A page\n")
    results.write_text('{"measured": {"tiny": {}}}')
    with pytest.raises(SystemExit, match="must hold each of the lines"):
        script.main(["report", str(results), "--page", str(page), "--figure", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit, match="holds no measurement"):
        script.main(["report", str(tmp_path / "none.json"), "--page", str(page), "--figure", "a.png"])
    assert page.read_text() == "# A page\n"
