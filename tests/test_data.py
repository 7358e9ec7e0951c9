"""Photographs: finding the image column, crops, broken rows."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from hf_aha.data import (
    Photographs,
    ProcessorCrop,
    RandomCrop,
    collate,
    find_label_column,
    load_photographs,
    read_row,
)


HALF = (0.5, 0.5, 0.5)


def photograph(seed: int = 0, width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(seed: int = 0, **size: int) -> bytes:
    buffer = io.BytesIO()
    photograph(seed, **size).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(folder: Path, columns: dict[str, list], features: dict | None = None) -> str:
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None)
    rows.to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def photographs(tmp_path):
    """Four rows: good, truncated, without an image, good."""
    cells = [{"bytes": data, "path": None} for data in (encoded(0), encoded(1)[:60])]
    cells += [None, {"bytes": encoded(3), "path": None}]
    source = write_parquet(
        tmp_path / "rows",
        {"picture": cells, "kind": [2, 1, 0, None]},
        {"picture": datasets.Image(), "kind": datasets.Value("int64")},
    )
    rows, column = load_photographs(source, split="train")
    return Photographs(rows, column, RandomCrop((8, 8), HALF, HALF), "kind")


# ---------------------------------------------------------------------------------------------- loading


def test_parquet_folder_gives_encoded_bytes_of_the_only_image_column(tmp_path):
    data = encoded()
    source = write_parquet(
        tmp_path / "rows",
        {"name": ["a"], "photo": [{"bytes": data, "path": None}]},
        {"name": datasets.Value("string"), "photo": datasets.Image()},
    )
    rows, column = load_photographs(source, split="train")
    assert column == "photo"
    assert rows[0]["photo"]["bytes"] == data


def test_image_folder_has_labels_from_its_subfolders(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for seed in range(2):
            photograph(seed).save(tmp_path / "photos" / name / f"{seed}.png")
    rows, column = load_photographs(str(tmp_path / "photos"), split="train")
    dataset = Photographs(rows, column, RandomCrop((8, 8), HALF, HALF), "label")
    assert column == "image"
    assert sorted(dataset[i]["label"] for i in range(4)) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("columns", "features", "named", "message"),
    [
        ({"a": [1]}, None, None, "has no image column among its columns a"),
        (
            {"x": [None], "y": [None]},
            {"x": datasets.Image(), "y": datasets.Image()},
            None,
            r"2 image columns \(x, y\)",
        ),
        ({"x": [None]}, {"x": datasets.Image()}, "z", "has no column 'z'; its columns are x"),
        ({"a": [1]}, None, "a", "column 'a' of the dataset .* holds no images but Value"),
    ],
)
def test_unusable_columns_are_one_clear_sentence(tmp_path, columns, features, named, message):
    source = write_parquet(tmp_path / "rows", columns, features)
    with pytest.raises(ValueError, match=message) as raised:
        load_photographs(source, split="train", image_column=named)
    assert "\n" not in str(raised.value)


def test_an_empty_split_is_refused_and_one_of_two_image_columns_can_be_named(tmp_path):
    cell = [{"bytes": encoded(), "path": None}]
    source = write_parquet(tmp_path / "rows", {"x": cell, "y": cell}, {"x": datasets.Image(), "y": datasets.Image()})
    assert load_photographs(source, split="train", image_column="y")[1] == "y"
    with pytest.raises(ValueError, match=r"train\[:0\]. corresponds to no data"):
        load_photographs(source, split="train[:0]", image_column="y")
    empty = write_parquet(tmp_path / "empty", {"x": []}, {"x": datasets.Image()})
    with pytest.raises(ValueError, match="train. corresponds to no data"):
        load_photographs(empty, split="train")


def test_a_label_column_must_exist_and_hold_integers(tmp_path):
    source = write_parquet(
        tmp_path / "rows",
        {"x": [None], "word": ["cat"]},
        {"x": datasets.Image(), "word": datasets.Value("string")},
    )
    rows, column = load_photographs(source, split="train")
    crop = RandomCrop((8, 8), HALF, HALF)
    with pytest.raises(ValueError, match="no column 'kind'; its columns are x, word"):
        Photographs(rows, column, crop, "kind")
    with pytest.raises(ValueError, match="'word' must hold class indices, but it holds string"):
        Photographs(rows, column, crop, "word")


def test_the_label_column_is_found_when_it_is_unambiguous():
    number, classes = datasets.Value("int64"), datasets.ClassLabel(names=["cat", "dog"])
    for expected, columns in {
        "kind": {"kind": classes, "label": number},
        "cls": {"jpg": datasets.Image(), "cls": number, "width": number},
        "label": {"label": datasets.Value("uint8"), "cls": datasets.Value("string")},
    }.items():
        assert find_label_column(datasets.Features(columns)) == expected
    with pytest.raises(ValueError, match="2 columns of classes \\(a, b\\) among its columns a, b; name one"):
        find_label_column(datasets.Features({"a": classes, "b": classes}))
    with pytest.raises(ValueError, match="no column of classes among its columns a; name one with label_column"):
        find_label_column(datasets.Features({"a": number}))


# ---------------------------------------------------------------------------------------------- rows and batches


def test_broken_rows_are_set_aside_and_the_others_stacked(photographs):
    batch = collate([photographs[i] for i in range(4)])
    assert batch.indices.tolist() == [0, 3]
    assert batch.labels.tolist() == [2, -1], "an empty label is unknown"
    assert batch.pixel_values.shape == (2, 3, 8, 8)
    assert [row for row, _ in batch.errors] == [1, 2]
    assert "truncated" in batch.errors[0][1]
    assert "missing" in batch.errors[1][1]
    assert torch.equal(batch.pixel_values[1], photographs[3]["pixel_values"])


def test_a_batch_of_broken_rows_only_has_no_pixels(photographs):
    batch = collate([photographs[1], photographs[2]])
    assert batch.pixel_values is None
    assert batch.labels.shape == batch.indices.shape == (0,)
    assert len(batch.errors) == 2


def test_a_crop_depends_on_seed_epoch_and_row_alone(photographs):
    def crop(seed, epoch, index):
        photographs.seed, photographs.epoch = seed, epoch
        return photographs[index]["pixel_values"]

    first = crop(0, 0, 0)
    crop(0, 0, 3)
    assert torch.equal(crop(0, 0, 0), first)
    assert not torch.equal(crop(1, 0, 0), first)
    assert not torch.equal(crop(0, 1, 0), first)
    photographs.dataset = photographs.dataset.select([0, 0, 0, 0])
    assert not torch.equal(crop(0, 0, 1), first), "the same picture in another row has another crop"


def test_a_remote_image_is_fetched_and_a_missing_one_is_an_unreadable_row():
    with fsspec.open("memory://photos/a.png", "wb") as file:
        file.write(encoded(0))
    crop = RandomCrop((8, 8), HALF, HALF)
    rows = [
        read_row({"bytes": None, "path": f"memory://photos/{name}.png"}, 2, 5, crop, np.random.default_rng(0))
        for name in "ab"
    ]
    local = read_row({"bytes": encoded(0), "path": None}, 2, 5, crop, np.random.default_rng(0))
    assert torch.equal(rows[0]["pixel_values"], local["pixel_values"]) and rows[0]["label"] == 2
    assert rows[1] == {"index": 5, "error": rows[1]["error"]}
    assert "The image memory://photos/b.png cannot be fetched" in rows[1]["error"]


def test_the_fingerprint_is_that_of_rows_and_columns(photographs):
    first = photographs.fingerprint()
    assert first == photographs.fingerprint()
    photographs.dataset = photographs.dataset.select([0, 1, 3, 2])
    assert photographs.fingerprint() != first
    photographs.dataset = photographs.dataset.select(range(3))
    assert photographs.fingerprint() != first


# ---------------------------------------------------------------------------------------------- crops


def test_random_crop_has_the_asked_shape_and_stays_in_range():
    crop = RandomCrop((12, 20), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for seed in range(20):
        pixels = crop(photograph(seed, width=7 + seed, height=30 - seed), np.random.default_rng(seed))
        assert pixels.shape == (3, 12, 20)
        assert pixels.dtype == torch.float32
        assert 0 <= pixels.min() and pixels.max() <= 1


def test_random_crop_of_the_whole_image_is_a_plain_resize_or_its_mirror():
    image = photograph(width=30, height=22)
    mean, std = np.array([0.4, 0.5, 0.6], np.float32), np.array([0.2, 0.3, 0.4], np.float32)
    plain = np.asarray(image.resize((16, 10), Image.Resampling.BICUBIC), np.float32) / 255
    plain = torch.from_numpy(((plain - mean) / std).transpose(2, 0, 1))
    crop = RandomCrop((10, 16), tuple(mean.tolist()), tuple(std.tolist()), scale=(1, 1))
    mirrored = 0
    for seed in range(30):
        pixels = crop(image, np.random.default_rng(seed))
        kept, flipped = (torch.allclose(pixels, other, atol=1e-5) for other in (plain, plain.flip(-1)))
        assert kept or flipped
        mirrored += flipped
    assert 5 < mirrored < 25


def test_random_crop_covers_the_asked_share_of_the_area():
    # The red channel holds the column and the green one the row, so a crop shows which part it took.
    rows, columns = np.mgrid[0:200, 0:250]
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))
    crop = RandomCrop((64, 64), (0, 0, 0), (1, 1, 1), scale=(0.3, 0.5), resample=Image.Resampling.BILINEAR)
    for seed in range(30):
        pixels = crop(image, np.random.default_rng(seed)) * 255
        width, height = (float(x.max() - x.min()) * 64 / 63 for x in pixels[:2])
        assert 0.27 < width * height / (200 * 250) < 0.53
        assert 0.7 < width / height < 1.4


def test_processor_crop_equals_the_processor():
    processor = ViTImageProcessor(size={"height": 12, "width": 12}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    image = photograph()
    expected = np.asarray(image.resize((12, 12), Image.Resampling.BILINEAR), np.float32) / 255
    pixels = ProcessorCrop(processor)(image, np.random.default_rng(0))
    assert torch.equal(pixels, processor(image, return_tensors="pt")["pixel_values"][0])
    assert np.allclose(pixels.numpy(), (expected.transpose(2, 0, 1) - 0.4) / 0.2, atol=0.03)
