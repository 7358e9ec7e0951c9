"""Masks and boxes of a dataset as a measurement reads them: formats, the crop, what cannot be used, the commands."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_benchmarking import LABELS, PROCESSOR, Made, classifier, encoded, results_of, settings_of  # noqa: F401
from test_evaluate_command import save_explainer
from transformers import BitImageProcessorPil, SegformerImageProcessorPil

from hf_aha import AhaExplainer
from hf_aha.benchmark import BenchmarkError, BenchmarkResults, EvaluationImages, ObjectColumn, markdown, measure
from hf_aha.benchmark.masks import NoMaskError
from hf_aha.benchmark.store import MASKS
from hf_aha.cli import main
from hf_aha.commands.measuring import find_metrics
from hf_aha.geometry import InputGeometry
from hf_aha.metrics.localization import localization_shares
from hf_aha.metrics.unoptimised import UNOPTIMISED


CROP = BitImageProcessorPil(
    size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, resample=Image.Resampling.NEAREST
)
WHOLE = InputGeometry(original_size=(6, 8), resized_size=(6, 8), crop_box=(0, 0, 8, 6))
INNER = np.zeros((6, 8), bool)
INNER[1:4, 2:7] = True
BOXES = datasets.List(datasets.List(datasets.Value("float32")))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def cell(image: Image.Image, kind: str = "PNG") -> dict:
    file = io.BytesIO()
    image.save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def with_objects(values: list, feature: object, size: tuple[int, int] = (32, 32)) -> datasets.Dataset:
    """Photographs of noise with the column `objects`."""
    images = [
        cell(Image.fromarray(np.random.default_rng(row).integers(0, 256, (*size, 3), dtype=np.uint8)))
        for row in range(len(values))
    ]
    features = datasets.Features({"image": datasets.Image(decode=False), "objects": feature})
    return datasets.Dataset.from_dict({"image": images, "objects": values}, features=features)


def boxed(values: list, box_format: str = "xyxy", processor=PROCESSOR) -> EvaluationImages:
    dataset = with_objects(values, BOXES)
    return EvaluationImages(
        dataset, "image", range(len(dataset)), processor, objects=ObjectColumn("objects", box_format)
    )


# --------------------------------------------------------------------------------------------------------- one mask


def palette() -> Image.Image:
    image = Image.fromarray(INNER.astype(np.uint8) * 3, "P")
    image.putpalette([9, 9, 9] * 3 + [0, 0, 0])  # the object's index has the colour black
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(INNER),
        Image.fromarray(INNER.astype(np.uint8)),
        Image.fromarray(INNER.astype(np.uint16) * 256),
        Image.fromarray(INNER.astype(np.float32) * 0.1),
        palette(),
        Image.fromarray(np.stack([INNER * 0, INNER * 7, INNER * 0], -1).astype(np.uint8)),
        Image.fromarray(np.stack([*[INNER * 7] * 3, INNER * 0 + 255], -1).astype(np.uint8)),
        Image.merge("LA", [Image.fromarray(INNER.astype(np.uint8)), Image.new("L", (8, 6), 255)]),
    ],
    ids=lambda image: image.mode,
)
def test_whatever_is_not_0_is_the_object(image):
    stored = cell(image, "TIFF" if image.mode == "F" else "PNG")
    assert (ObjectColumn("mask").mask(stored, WHOLE).numpy() == INNER).all()


@pytest.mark.parametrize(
    ("value", "box_format"),
    [
        ([[2, 1, 7, 4]], "xyxy"),
        ([[2, 1, 5, 3]], "xywh"),
        ([2.2, 0.6, 7.4, 4.4], "xyxy"),  # one box; pixels whose centre is inside
        ({"bbox": [[2, 1, 5, 3]], "category": [4]}, "xywh"),
        ({"bbox": [2, 1, 5, 3]}, "xywh"),
        ([{"bbox": [2, 1, 4, 3]}, {"bbox": [5, 1, 2, 3]}], "xywh"),  # together
        ([[2, 1, 7, 4], [3, 2, 4, 3]], "xyxy"),
    ],
)
def test_boxes_come_in_several_shapes(value, box_format):
    assert (ObjectColumn("objects", box_format).mask(value, WHOLE).numpy() == INNER).all()


def test_a_box_may_reach_a_pixel_beyond_the_photograph():
    whole = ObjectColumn("objects", "xywh").mask([[-1, -0.5, 10, 7.5]], WHOLE)
    assert bool(whole.all())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "it has no box"),
        ([], "it has no box"),
        ({"bbox": []}, "it has no box"),
        ({"bbox": None}, "it has no box"),
        ([[1, 2, 3]], "its box 1 has not four numbers"),
        ([[1, 2, 3, 4], None], "its box 2 has not four numbers"),
        ([[1, 2, None, 4]], "its box 1 has not four numbers"),
        ([[1, 2, float("nan"), 4]], "its box 1 [1, 2, nan, 4] (xyxy) is not finite"),
        ([[0, 0, 2, 2], [5, 1, 2, 3]], "its box 2 [5, 1, 2, 3] (xyxy) has no area"),
        ([[0, 0, 10, 3]], "its box 1 [0, 0, 10, 3] (xyxy) reaches beyond the photograph of 8 x 6 pixels"),
        ([[-2, 0, 3, 3]], "reaches beyond the photograph"),
        ([[0.1, 0.1, 0.2, 0.2]], "its boxes hold no pixel"),
    ],
)
def test_boxes_that_cannot_be_used_are_told(value, reason):
    with pytest.raises(NoMaskError) as caught:
        ObjectColumn("objects", "xyxy").mask(value, WHOLE)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "it has no mask"),
        ({"bytes": None, "path": None}, "it has no mask"),
        ({"bytes": b"no image", "path": None}, "its mask is not in a format that Pillow can read"),
        ({"bytes": cell(Image.new("RGB", (64, 64), "red"))["bytes"][:90], "path": None}, "its mask cannot be read"),
        (cell(Image.new("L", (6, 8), 1)), "its mask has 6 x 8 pixels, but the photograph 8 x 6"),
        (cell(Image.new("L", (8, 6))), "its mask is empty"),
        ({"bytes": None, "path": "gone.png"}, "its mask cannot be read: No such file or directory"),
    ],
)
def test_masks_that_cannot_be_used_are_told(value, reason):
    with pytest.raises(NoMaskError) as caught:
        ObjectColumn("mask").mask(value, WHOLE)
    assert str(caught.value).startswith(reason)


def test_an_object_outside_the_crop_or_between_pixels_is_told():
    geometry = InputGeometry.from_processor(CROP, (36, 90))
    for box in ([0, 0, 20, 36], [40, 0, 41, 1]):
        with pytest.raises(NoMaskError, match="outside what the classifier sees"):
            ObjectColumn("objects", "xyxy").mask([box], geometry)


# ------------------------------------------------------------------------------------------------------- the images


@pytest.mark.parametrize("size", [(60, 90), (91, 61), (19, 30)])
def test_masks_follow_their_photograph_through_the_processor(size):
    """The photograph is a picture of its mask and resized without new values, so that both must stay one."""
    mask = np.random.default_rng(0).random(size) < 0.5
    picture = cell(Image.fromarray(np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)))
    features = datasets.Features({"photo": datasets.Image(decode=False), "mask": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"photo": [picture], "mask": [picture]}, features=features)
    (item,) = EvaluationImages(dataset, "photo", [0], CROP, objects=ObjectColumn("mask"))
    assert torch.equal(item["mask"], item["pixel_values"][0] > 0) and item["mask"].shape == (32, 32)


def test_columns_of_something_else_are_refused():
    with pytest.raises(ValueError, match="box_format is 'yx'"):
        ObjectColumn("objects", "yx")
    dataset = with_objects(["a"], datasets.Value("string"))
    for column, message in (
        (ObjectColumn("mask"), "no column 'mask'; its columns are image, objects"),
        (ObjectColumn("image"), "holds the photographs"),
        (ObjectColumn("objects"), "'objects' holds no masks"),
        (ObjectColumn("objects", "xyxy"), "'objects' holds no boxes"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluationImages(dataset, "image", [0], PROCESSOR, objects=column)
    for feature in ({"boxes": BOXES}, {"bbox": datasets.Value("int64")}, datasets.List(BOXES)):
        with pytest.raises(ValueError, match="holds no boxes"):
            ObjectColumn("objects", "xyxy").rows(with_objects([None], feature), "image")
    for feature in (BOXES, BOXES.feature, {"bbox": BOXES}, datasets.List({"bbox": BOXES.feature})):
        assert ObjectColumn("objects", "xyxy").rows(with_objects([None], feature), "image").num_rows == 1
    with pytest.raises(ValueError, match="cannot be mapped"):
        EvaluationImages(
            with_objects([[]], BOXES),
            "image",
            [0],
            SegformerImageProcessorPil(do_pad=True),
            objects=ObjectColumn("objects", "xyxy"),
        )


# --------------------------------------------------------------------------------------------------- the measurement


def test_values_are_those_of_the_metric_and_reasons_are_listed(classifier, tmp_path):  # noqa: F811
    images = boxed([[[0, 0, 16, 16]], [], [[8, 4, 20, 30]], [[0, 0, 99, 9]], [[3, 3, 9, 9]]])
    asked = {"protocols": ("aha/deletion",), "metrics": ("localization", "total_variation")}
    found = results_of(classifier, images, settings_of(Made(), **asked), tmp_path)
    rows = [images[index] for index in (0, 2, 4)]
    expected = localization_shares(
        torch.stack([row["pixel_values"].mean(0) for row in rows]), torch.stack([row["mask"] for row in rows])
    )
    for column, values in (("localization", expected.rank_share), ("localization/chance", expected.chance)):
        np.testing.assert_allclose(found.metrics[column]["made-gradient"][[0, 2, 4]], values)
        assert np.isnan(found.metrics[column]["made-gradient"][[1, 3]]).all()
    assert expected.chance[0] == 0.25 and np.isfinite(found.metrics["total_variation"]["made-gradient"]).all()
    assert [image.split("-")[0] for image in found.no_mask] == ["1", "3"]
    assert list(found.no_mask.values())[0] == "it has no box"
    assert len(found.protocols["aha/deletion"]["made-gradient"]) == 5  # all else is measured
    text = markdown(found, dict(enumerate(LABELS)))
    assert "2 images without a mask of their object: 1-" in text and "it has no box" in text and "2 without" in text
    assert "Masks of the objects: column `objects`, boxes as xyxy" in text
    found.save(tmp_path)
    assert BenchmarkResults.load(tmp_path).no_mask == found.no_mask


def test_a_batch_without_any_mask_does_not_end_the_run(classifier, tmp_path):  # noqa: F811
    settings = settings_of(Made(), metrics=("localization",))
    found = results_of(classifier, boxed([[], [], [], [[0, 0, 4, 4]]]), settings, tmp_path)
    values = found.metrics["localization"]["made-gradient"]
    assert np.isfinite(values).tolist() == [False] * 3 + [True] and len(found.no_mask) == 3


def test_images_without_masks_are_refused_before_anything_is_written(classifier, tmp_path):  # noqa: F811
    images = EvaluationImages(with_objects([[]], BOXES), "image", [0], PROCESSOR)
    with pytest.raises(ValueError, match="'localization' needs masks of the objects"):
        measure(classifier, images, settings_of(Made(), metrics=("localization",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_before_can_be_given_masks_and_goes_on_with_and_without(classifier, tmp_path):  # noqa: F811
    values = [[[0, 0, 16, 16]], [], [[8, 4, 20, 30]], [[0, 0, 4, 9]]]
    plain = EvaluationImages(with_objects(values, BOXES), "image", range(4), PROCESSOR)
    first = settings_of(Made(), metrics=("total_variation",))
    before = results_of(classifier, plain, first, tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert MASKS not in run  # as folders were before there were masks
    for part in (tmp_path / "parts").rglob("*.json"):
        stored = json.loads(part.read_text())
        del stored["no_mask"]
        part.write_text(json.dumps(stored))

    asked = settings_of(Made(), metrics=("total_variation", "localization"))
    found = results_of(classifier, boxed(values), asked, tmp_path, resume=True)
    fresh = results_of(classifier, boxed(values), asked, tmp_path / "fresh")
    for name in fresh.metrics:
        np.testing.assert_array_equal(found.metrics[name]["made-gradient"], fresh.metrics[name]["made-gradient"])
    assert found.no_mask == fresh.no_mask and len(fresh.no_mask) == 1
    assert found.protocols == before.protocols

    more = settings_of(Made(), metrics=("edge_alignment",))
    measure(classifier, plain, more, tmp_path, resume=True, progress=False)  # without the columns again
    assert json.loads((tmp_path / "run.json").read_text())[MASKS] == {"box_column": "objects", "box_format": "xyxy"}
    again = results_of(classifier, boxed(values), asked, tmp_path, resume=True)
    assert again.no_mask == fresh.no_mask
    with pytest.raises(BenchmarkError, match="differs in masks"):
        measure(classifier, boxed(values, "xywh"), asked, tmp_path, resume=True, progress=False)


# ------------------------------------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def explainer(tmp_path_factory) -> Path:
    return save_explainer(tmp_path_factory.mktemp("explainers") / "tiny")


@pytest.fixture
def evaluate(explainer, tmp_path):
    """`evaluate(words...)` runs the command on the image folder `data` into the folder `out`."""
    place = tmp_path / "data" / "validation"
    place.mkdir(parents=True)
    lines = []
    for row in range(4):
        photograph = Image.open(io.BytesIO(encoded(row))).resize((50, 40))
        photograph.save(place / f"{row}.png")
        mask = np.zeros((40, 50), np.uint8)
        mask[10:30, 5 : 20 + row] = row  # that of the first photograph is empty
        Image.fromarray(mask).save(place / f"{row}-mask.png")
        boxes = [[5, 10, 15 + row, 20]] if row else []
        objects = {"bbox": boxes, "category": ["fish"] * len(boxes)}
        lines.append({"file_name": f"{row}.png", "mask_file_name": f"{row}-mask.png", "objects": objects})
    text = "".join(json.dumps(line) + "\n" for line in reversed(lines))  # types are guessed from the first
    (place / "metadata.jsonl").write_text(text)

    def run(*words: object) -> int:
        options = ["--dataset", tmp_path / "data", "--batch-size", 2, "--precision", "float32", "--output"]
        options += [tmp_path / "out", "--protocol", "aha/deletion", "--seed", 1, "--quiet"]
        return main(["evaluate", *map(str, [explainer, *options, *words])])

    return run


def reference_mask(row: int) -> torch.Tensor:
    """The box of that folder on 32 x 32 pixels, pixel after pixel."""
    mask = torch.zeros(32, 32, dtype=torch.bool)
    for y in range(32):
        for x in range(32):
            mask[y, x] = 10 <= (y + 0.5) * 40 / 32 < 30 and 5 <= (x + 0.5) * 50 / 32 < 20 + row
    return mask


def test_image_folders_give_boxes_and_masks(evaluate, explainer, tmp_path):
    assert evaluate("--metrics", "localization", "--box-column", "objects", "--box-format", "xywh",
                    "--image-column", "image", "--output", tmp_path / "boxes") == 0  # fmt: skip
    assert evaluate("--metrics", "localization", "--mask-column", "mask", "--output", tmp_path / "masks") == 0
    boxes, masks = (BenchmarkResults.load(tmp_path / name) for name in ("boxes", "masks"))
    assert boxes.run["masks"] == {"box_column": "objects", "box_format": "xywh"}
    assert masks.run["masks"] == {"mask_column": "mask"}
    loaded = AhaExplainer.from_pretrained(explainer).eval()
    names = sorted(path for path in (tmp_path / "data" / "validation").glob("*.png") if "mask" not in path.name)
    for results, reason in ((boxes, "it has no box"), (masks, "its mask is empty")):
        values = dict(zip(results.images, results.metrics["localization"]["aha"], strict=True))
        for image, value in values.items():
            row = 3 - int(image.split("-")[0])
            if row == 0:
                assert np.isnan(value) and results.no_mask == {image: reason}
                continue
            pixels = loaded.image_processor(Image.open(names[row]), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                expected = localization_shares(loaded(pixels).scores, reference_mask(row)[None]).rank_share
            assert value == pytest.approx(expected.item(), abs=0.02)


def test_all_metrics_are_all_where_there_are_masks():
    assert find_metrics(["all"], has_masks=True) == (UNOPTIMISED, {}, [])
    found, _, (note,) = find_metrics(["all"])
    assert {*UNOPTIMISED} - {*found} == {"localization"} and "for want of masks of the objects: localization" in note


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--metrics", "localization"), "name their column with --mask-column, or one of boxes with --box-column"),
        (("--metrics", "localization", "--mask-column", "mask", "--box-column", "objects"), "either --mask-column or"),
        (("--metrics", "localization", "--box-column", "objects"), "--box-format (xyxy or xywh) belong together"),
        (("--metrics", "localization", "--box-format", "xyxy"), "--box-format (xyxy or xywh) belong together"),
        (("--metrics", "road", "--mask-column", "mask"), "are for the metric localization"),
        (("--mask-column", "mask",), "are for the metric localization"),
        (("--metrics", "localization", "--mask-column", "edge", "--image-column", "image"), "no column 'edge'; its"),
        (("--metrics", "localization", "--mask-column", "objects", "--image-column", "image"), "holds no masks"),
        (("--metrics", "localization", "--box-column", "mask", "--box-format", "xyxy"), "'mask' holds no boxes"),
    ],
)  # fmt: skip
def test_words_that_do_not_fit_are_one_sentence_and_2(words, named, evaluate, tmp_path, capsys):
    assert evaluate(*words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("hf-aha evaluate: ") and named in said
    assert not (tmp_path / "out").exists()
