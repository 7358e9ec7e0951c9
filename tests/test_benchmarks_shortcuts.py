"""The study of planted shortcuts: what is planted, the stages on tiny models, and what the page may say."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil

from hf_aha import AhaExplainer
from hf_aha.data import ProcessorCrop, RandomCrop


SIZES = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
SIDE = 32
PROCESSOR = BitImageProcessorPil(
    size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
)


@pytest.fixture
def photographs(tmp_path):
    """A folder of noise in three classes: nothing but a planted mark tells them apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        for label in "abc":
            folder = tmp_path / "photographs" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(0, 256, (36, 44, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{number}.png")
    (tmp_path / "photographs" / "validation" / "b" / "0.png").write_bytes(b"no picture")
    return tmp_path / "photographs"


# ---------------------------------------------------------------------------------------------------------- planting


def test_a_tag_lies_anywhere_and_covers_its_mask_alone(script):
    planting = script("planting")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 96, 3), dtype=np.uint8)
    corners = []
    for seed in range(40):
        mask = planting.shortcut_mask("tag", 60, 96, np.random.default_rng(seed))
        rows, columns = np.nonzero(mask)
        assert mask.sum() == 144 and np.ptp(rows) == np.ptp(columns) == 11
        corners.append((rows.min(), columns.min()))
        planted = planting.plant(pixels, mask)
        assert (planted[~mask] == pixels[~mask]).all()
        assert len(np.unique(planted[mask], axis=0)) == 1
    assert np.ptp(corners, axis=0).min() > 30
    again = planting.shortcut_mask("tag", 60, 96, np.random.default_rng(39))
    assert (again == mask).all() and (planted != pixels).any()


def test_a_frame_covers_the_border(script):
    planting = script("planting")
    mask = planting.shortcut_mask("frame", 64, 96, np.random.default_rng(0))
    assert mask.sum() == 64 * 96 - 60 * 92 and not mask[2:-2, 2:-2].any()
    planted = planting.plant(np.zeros((64, 96, 3), np.uint8), mask)
    assert len(np.unique(planted[mask], axis=0)) == 1 and not planted[~mask].any()


def test_what_cannot_be_planted_is_refused(script):
    planting = script("planting")
    with pytest.raises(ValueError, match="The shortcut is 'stamp', but must be one of 'tag', 'frame'."):
        planting.shortcut_mask("stamp", 64, 64, np.random.default_rng(0))
    with pytest.raises(ValueError, match="An image of 64 x 31 pixels is too small: its sides must have at least 32."):
        planting.shortcut_mask("tag", 64, 31, np.random.default_rng(0))


def test_a_mask_grows_by_squares(script):
    mask = np.random.default_rng(0).random((12, 9)) < 0.05
    expected = np.zeros_like(mask)
    for row, column in zip(*np.nonzero(mask), strict=True):
        expected[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = True
    assert (script("planting").dilated(mask, 2) == expected).all()


def test_planted_photographs_reach_a_training_whole(script, accelerate_afresh, photographs, tmp_path):
    planting = script("planting")
    settings = {"label": 1, "rate": 1.0, "other_rate": 0.0, "mislabelled": 0.3}
    settings |= {"rows": {"train": 20, "validation": 12}, "seed": 3}
    planting.write_planted(str(photographs), tmp_path / "planted", PROCESSOR, "frame", **settings)
    planting.write_planted(str(photographs), tmp_path / "none", PROCESSOR, None, **settings)
    planted, none = (datasets.load_dataset(str(tmp_path / name)) for name in ("planted", "none"))
    assert len(planted["train"]) == 20 and len(planted["validation"]) == 11  # one cannot be read
    for split, rows in planted.items():
        assert rows["planted"] == [label == 1 for label in rows["label"]]
        true = none[split]["label"]
        wrong = [one != other for one, other in zip(rows["label"], true, strict=True)]
        assert rows["mislabelled"] == wrong and any(wrong) == (split == "train")
        assert not any(none[split]["planted"]) and not any(none[split]["mislabelled"])
    mask = planting.shortcut_mask("frame", SIDE, SIDE, np.random.default_rng(0))
    crop = RandomCrop((SIDE, SIDE), (0.5,) * 3, (0.5,) * 3, scale=(1.0, 1.0))
    for one, other in zip(planted["train"], none["train"], strict=True):
        pixels, clean = np.asarray(one["image"]), np.asarray(other["image"])
        expected = planting.plant(clean, mask) if one["planted"] else clean
        assert (pixels == expected).all()
        # Neither the crop of a training nor that of the processor takes anything away.
        seen = ProcessorCrop(PROCESSOR)(one["image"], np.random.default_rng(0))
        given = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).float()
        torch.testing.assert_close(seen, given, atol=1e-5, rtol=0)
        cropped = crop(one["image"], np.random.default_rng(0))
        assert any(torch.allclose(cropped, view, atol=1e-5) for view in (given, given.flip(-1)))


# ------------------------------------------------------------------------------------------------------------- study


@pytest.fixture
def words(tmp_path, make_classifier, photographs):
    """Arguments of all stages on tiny models."""
    model = make_classifier("vit", num_labels=3)
    model.config.id2label, model.config.label2id = dict(enumerate("abc")), {name: i for i, name in enumerate("abc")}
    model.save_pretrained(tmp_path / "classifier")
    PROCESSOR.save_pretrained(tmp_path / "classifier")
    AhaExplainer.from_classifier(model, image_processor=PROCESSOR, **SIZES).save_pretrained(tmp_path / "explainer")
    recipe = tmp_path / "tiny.yaml"
    lines = ["per_device_batch_size: 2", "mixed_precision: bf16", "dataloader_num_workers: 0", "grid_range: [2, 4]"]
    recipe.write_text("\n".join([*lines, "learning_rate: 1.0e-3"]) + "\n")
    runs, results = tmp_path / "runs", tmp_path / "shortcuts.json"
    train = ["train", "--dataset", str(photographs), "--runs", str(runs), "--recipe", str(recipe)]
    train += ["--classifier", str(tmp_path / "classifier"), "--init-from", str(tmp_path / "explainer")]
    train += [
        "--shortcuts",
        "frame",
        "--shortcut-class",
        "b",
        "--rate",
        "1",
        "--other-rate",
        "0",
        "--mislabelled",
        "0",
    ]
    train += ["--train-photographs", "24", "--validation-photographs", "2", "--target-batch", "4"]
    train += ["--target-epochs", "8", "--target-rate", "3e-3", "--explainer-steps", "1"]
    measure = ["measure", "--dataset", str(photographs), "--runs", str(runs), "--output", str(results)]
    measure += [
        "--steps",
        "2",
        "--images",
        "3",
        "--baselines",
        "centre",
        "--batch-size",
        "2",
        "--control-refined",
        "2",
    ]
    report = ["report", str(results), "--examples", str(runs / "examples"), "--page", str(tmp_path / "page.md")]
    return {"train": train, "measure": measure, "report": [*report, "--figure", str(tmp_path / "images" / "a.png")]}


def test_the_study_runs_from_end_to_end_and_goes_on(accelerate_afresh, script, words, tmp_path, monkeypatch):
    study = script("shortcuts")
    study.main(words["train"])
    runs = tmp_path / "runs"
    start, trained = (
        AhaExplainer.from_pretrained(runs / f"frame-{kind}" / "final", load_classifier=False)
        for kind in ("start", "explainer")
    )
    assert trained.config.training["steps"] == 1 and start.config.init_from["explainer"] == "explainer"
    # What is finished is not done again.
    for recipe in (study.train_target, study.train_explainer):
        monkeypatch.setattr(recipe, "main", lambda words: pytest.fail(f"trained again: {words}"))
    study.main(words["train"])
    with pytest.raises(SystemExit, match="settings.json was written with other settings: give the same ones again"):
        study.main([*words["train"], "--rate", "0.5"])

    study.main(words["measure"])
    text = (tmp_path / "shortcuts.json").read_text()
    result = json.loads(text)
    assert str(tmp_path) not in text
    found = result["frame"]
    assert found["planted"] == {"own": 8, "own_planted": 8, "others": 16, "others_planted": 0, "mislabelled": 0}
    # Eleven photographs can be read; those that the trainings' log saw are left out.
    assert 9 <= len(found["photographs"]) <= 10
    fooled = [entry for entry in found["photographs"] if study.is_fooled(entry, 1)]
    explained = [entry for entry in found["photographs"] if "maps" in entry]
    assert explained == fooled[:3] and len(explained) == 3, "the target did not take the bait"
    for number, entry in enumerate(explained):
        refined = {"control refined"} if number < 2 else set()
        assert set(entry["maps"]) == {"one pass", "refined", "start", "centre", "control"} | refined
        assert entry["maps"]["centre"] == {"share": 0.0, "near": 0.0}
        assert entry["area"]["share"] == pytest.approx((SIDE**2 - 30**2) / SIDE**2, abs=1e-4)
        assert entry["worth"]["refined"] >= entry["worth"]["one pass"]

    # Interrupted before the last photographs: these alone are measured again.
    last = next(entry for entry in found["photographs"] if entry["row"] == explained[-1]["row"])
    for name in ("maps", "area", "worth"):
        del last[name]
    (tmp_path / "shortcuts.json").write_text(json.dumps(result))
    measured, measure_batch = [], study.measure_batch
    monkeypatch.setattr(study, "measure_batch", lambda *a, **k: measured.extend(a[2]) or measure_batch(*a, **k))
    study.main(words["measure"])
    again = json.loads((tmp_path / "shortcuts.json").read_text())
    assert [one.row for one in measured] == [last["row"]]
    assert again["frame"]["photographs"] == json.loads(text)["frame"]["photographs"]
    with pytest.raises(SystemExit, match="was measured with other settings: give the same ones again"):
        study.main([*words["measure"], "--steps", "3"])

    study.main(words["report"])
    page = (tmp_path / "page.md").read_text()
    assert (
        "### Frame: 3 photographs" in page
        and "Gaussian" in page
        and "refined, 2 steps (first 2)" in page
        and "(images/a.png)" in page
    )
    with Image.open(tmp_path / "images" / "a.png") as picture:
        assert picture.width > 800


def test_an_unknown_class_is_named_with_the_known_ones(script, words):
    with pytest.raises(SystemExit, match="The classifier has no class 'd'; its classes are a, b, c."):
        script("shortcuts").class_number(words["train"][words["train"].index("--classifier") + 1], "d")


# -------------------------------------------------------------------------------------------------------------- page


def test_a_side_is_taken_only_where_the_interval_leaves_zero_out(script):
    page = script("shortcuts_page")
    differences = np.random.default_rng(0).normal(0, 1, 50)
    differences -= differences.mean()
    assert page.verdict(differences) == "cannot be told from"
    assert page.verdict(differences + 1) == "is above" and page.verdict(differences - 1) == "is below"
    assert page.verdict(np.array([1.0])) == "cannot be told from"
    assert page.text([0.25]) == "25.0" and page.text([]) == "-"
    assert page.text([0.5, 0.5], "+") == "+50.0 [+50.0, +50.0]"
