"""Resized copies: made once, of the photographs that are larger, in a format that keeps what the file had."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from hf_aha import AhaExplainer
from hf_aha import resized_copies as module
from hf_aha.data import Photographs, RandomCrop, load_photographs
from hf_aha.resized_copies import resized_copies


CROP = RandomCrop((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def encoded(width: int, height: int, kind: str) -> bytes:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, 0 * rows + 90], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows(tmp_path):
    large, broken = encoded(60, 40, "PNG"), encoded(60, 40, "PNG")[:80]
    files = [encoded(90, 60, "JPEG"), large, encoded(20, 10, "PNG"), broken]
    cells = [{"bytes": data, "path": "a.x"} for data in files] + [None]
    (tmp_path / "rows").mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": cells, "label": list(range(5))}, features=features)
    table.to_parquet(tmp_path / "rows" / "train.parquet")
    return load_photographs(str(tmp_path / "rows"), split="train")[0]


def test_larger_photographs_shrink_to_the_side_and_all_others_stay(rows):
    copies = resized_copies(rows, "image", 20)
    assert copies.features == rows.features and copies["label"] == rows["label"]
    images = [Image.open(io.BytesIO(copies[row]["image"]["bytes"])) for row in range(3)]
    assert [image.size for image in images] == [(30, 20), (30, 20), (20, 10)]
    assert [image.format for image in images] == ["JPEG", "PNG", "PNG"]
    for image in images[:2]:
        expected = Image.open(io.BytesIO(encoded(90, 60, "PNG"))).resize((30, 20), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).mean() < 3
    for row in (2, 3, 4):
        assert copies[row]["image"] == rows[row]["image"]


def test_they_are_made_once_for_a_dataset_and_a_size(rows, tmp_path, monkeypatch):
    first = resized_copies(rows, "image", 20)
    stored = {file["filename"] for file in first.cache_files}
    assert all(str(tmp_path / "cache") in name for name in stored)
    # What counts the calls must not change the hash that `datasets` takes of the function.
    monkeypatch.setattr(module, "read_image", lambda content: pytest.fail("a photograph was read again"))
    again = resized_copies(rows, "image", 20)
    assert {file["filename"] for file in again.cache_files} == stored
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    other = resized_copies(rows, "image", 10)
    assert {file["filename"] for file in other.cache_files}.isdisjoint(stored)


def test_photographs_train_on_the_copies_and_say_so(rows):
    photographs = Photographs(rows, "image", CROP, "label", cache_size=20)
    assert photographs.summary() == {"train_rows": 5, "cache_size": 20}
    assert Photographs(rows, "image", CROP).summary() == {"train_rows": 5}
    assert Image.open(io.BytesIO(photographs.dataset[0]["image"]["bytes"])).size == (30, 20)
    read = [photographs[row] for row in range(5)]
    assert ["error" in row for row in read] == [False, False, False, True, True]


def test_copies_smaller_than_a_crop_or_than_a_pixel_are_refused(rows):
    with pytest.raises(ValueError, match="cache_size=7 is less than the 8 pixels of a crop; give at least that"):
        Photographs(rows, "image", CROP, cache_size=7)
    with pytest.raises(ValueError, match="cache_size must be at least 1 pixel, but it is 0"):
        resized_copies(rows, "image", 0)


def test_the_recipe_trains_on_copies_and_validates_on_what_users_have(rows, tmp_path, monkeypatch, make_classifier):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "recipes"))
    recipe = importlib.import_module("train_explainer")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    explainer = AhaExplainer.from_classifier(make_classifier(), image_processor=processor)
    places = {"output_dir": str(tmp_path / "run"), "classifier": "any", "dataset": str(tmp_path / "rows")}
    args = recipe.RecipeArguments(**places, cache_size=36, image_size=32, validation_split="train")
    train, validation = recipe.build_datasets(args, explainer)
    assert train.summary() == {"train_rows": 5, "cache_size": 36}
    assert min(Image.open(io.BytesIO(train.dataset[0]["image"]["bytes"])).size) == 36
    assert validation.cache_size is None and train.label_column is None
    args.target_classes = "label"
    assert recipe.build_datasets(args, explainer)[0].label_column == "label"
