"""Datasets of maps: ranks as small pictures, the engine in one process and several, kills, and the way back."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_classifier
from PIL import Image
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from hf_aha import AhaExplainer
from hf_aha.dataset_maps import (
    QUANTISATIONS,
    ExplainedRows,
    MapsError,
    MapSettings,
    MapsFolder,
    StoredMap,
    explain_dataset,
    load_maps,
    ranks_from_png,
    ranks_to_png,
)
from hf_aha.dataset_maps.card import maps_card
from hf_aha.dataset_maps.folder import CONTRAST_FEATURES, FEATURES, split_name
from hf_aha.dataset_maps.ranks import quantised_ranks
from hf_aha.metrics.rank_maps import rank_correlation


LABELS = ("tench", "springer", "player", "saw", "church")
CROP = BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
NAMES = {"dataset": {"id": "photos", "split": "train"}, "explainer": {"id": "tiny"}, "classifier": {"id": "tiny-vit"}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tiny_explainer(processor=CROP, seed: int = 0) -> AhaExplainer:
    classifier = build_classifier("vit")
    classifier.config.id2label = dict(enumerate(LABELS))
    classifier.config.label2id = {label: index for index, label in enumerate(LABELS)}
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AhaExplainer.from_classifier(classifier, image_processor=processor, **sizes).eval()


@pytest.fixture(scope="module")
def explainer() -> AhaExplainer:
    return tiny_explainer()


def photograph(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Smooth noise, as photographs are smooth: (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def photographs(count: int = 7, broken: tuple[int, ...] = (), sizes: tuple = ((60, 40),)) -> datasets.Dataset:
    rows = [
        {
            "image": {
                "bytes": b"no image" if row in broken else encoded(photograph(row, sizes[row % len(sizes)])),
                "path": f"{row}.png",
            },
            "label": row % 5,
        }
        for row in range(count)
    ]
    columns = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=list(LABELS))}
    return datasets.Dataset.from_list(rows, features=datasets.Features(columns))


def make(explainer, output: Path, dataset=None, *, resume=False, names=NAMES, asked=None, **settings):
    """Explain `dataset` in float32 without readers, so that a reference can be exact."""
    rows = ExplainedRows(dataset or photographs(), "image", explainer.image_processor, **(asked or {}))
    settings = MapSettings(**{"precision": "float32", "batch_size": 3, "workers": 0, "shard_rows": 3, **settings})
    return explain_dataset(explainer, rows, settings, output, names=names, resume=resume, progress=False)


def tables(output: Path) -> list[dict]:
    """Rows of all files, in order."""
    files = sorted((output / "data").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def assert_same_rows(one: list[dict], other: list[dict]) -> None:
    """The same rows, but for what processes may round differently: swapped neighbours in rank, last digits."""
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        rounded = {"ranks", "probability", "predicted_probability", "top_classes"}
        assert {key: first[key] for key in first.keys() - rounded} == {
            key: second[key] for key in second.keys() - rounded
        }
        levels = [np.asarray(Image.open(io.BytesIO(row["ranks"]["bytes"]))).astype(int) for row in (first, second)]
        assert abs(levels[0] - levels[1]).max() <= 1
        for key in ("probability", "predicted_probability"):
            assert first[key] == pytest.approx(second[key], rel=1e-5)
        top = [json.loads(row["top_classes"]) for row in (first, second)]
        assert [one["target"] for one in top[0]] == [one["target"] for one in top[1]]


def reference_levels(scores: np.ndarray, levels: int) -> np.ndarray:
    """The ranks by Python's sort, one pixel after the other."""
    flat = scores.ravel().tolist()
    order = sorted(range(len(flat)), key=lambda index: (-flat[index], index))
    found = np.empty(len(flat), np.int64)
    for rank, index in enumerate(order):
        found[index] = int((len(flat) - 1 - rank) / (len(flat) - 1) * levels + 0.5)
    return found.reshape(scores.shape)


def pixels_of(explainer, images) -> torch.Tensor:
    return torch.cat([explainer.image_processor([image], return_tensors="pt")["pixel_values"] for image in images])


# ---------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("name", ["uint8", "uint16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_are_those_of_a_plain_sort_with_ties_in_index_order(name, dtype):
    scores = torch.randn(6, 5, 9, dtype=dtype)
    scores[0] = 3.0
    scores[1] = scores[1].round()
    scores[2, 0] = torch.tensor([0.0, -0.0] * 4 + [0.0])
    scores[3] = -scores[3].abs()
    scores[4, 1] = torch.finfo(torch.float32).max
    scores[4, 2] = -torch.finfo(torch.float32).max
    scores[5] *= 1e-42  # subnormal in float32
    scores = scores.float().to(dtype)
    quantisation = QUANTISATIONS[name]
    found = quantised_ranks(scores, quantisation)
    assert found.dtype == np.dtype(name) and found.shape == scores.shape
    for one, levels in zip(scores.numpy(), found, strict=True):
        assert (levels == reference_levels(one, quantisation.levels)).all()


@pytest.mark.parametrize(("name", "bound"), [("uint8", 0.5 / 255), ("uint16", 0.5 / 65535)])
def test_a_rank_read_back_is_within_the_stated_error(name, bound):
    quantisation, scores = QUANTISATIONS[name], torch.randn(1, 61, 67)
    exact = scores.flatten().argsort().argsort().reshape(61, 67).numpy() / (61 * 67 - 1)
    back = ranks_from_png(ranks_to_png(quantised_ranks(scores, quantisation)[0]))
    assert quantisation.error_bound == bound
    assert abs(back - exact).max() <= bound + 1e-7 and abs(back - exact).max() > bound / 2
    assert quantisation.keeps_order(61 * 67) == (name == "uint16")
    if name == "uint16":
        assert (back.ravel().argsort() == scores.flatten().numpy().argsort()).all()


def test_scores_without_an_order_and_pictures_without_ranks_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantised_ranks(torch.full((1, 2, 2), torch.nan), QUANTISATIONS["uint8"])
    with pytest.raises(ValueError, match="'RGB'"):
        ranks_from_png(encoded(photograph(0)))


# ---------------------------------------------------------------------------------------------------- the engine


def test_rows_hold_the_explainers_own_answers(explainer, tmp_path):
    summary = make(explainer, tmp_path / "out")
    found = tables(tmp_path / "out")
    assert (summary.maps, summary.photographs, summary.explained, summary.unreadable) == (7, 7, 7, [])
    assert summary.bytes == sum(file.stat().st_size for file in (tmp_path / "out" / "data").iterdir())
    assert [row["row"] for row in found] == list(range(7)) and found[4]["image_id"] == "4.png"
    with torch.no_grad():
        output = explainer(pixels_of(explainer, [photograph(row) for row in range(7)]))
    probability = output.logits.softmax(-1)
    for number, row in enumerate(found):
        levels = np.asarray(Image.open(io.BytesIO(row["ranks"]["bytes"])))
        # Batches of another size may round the scores differently, which can swap neighbours in rank.
        assert abs(levels.astype(int) - reference_levels(output.scores[number].numpy(), 255)).max() <= 1
        assert row["target"] == row["predicted_target"] == output.target[number]
        assert row["label"] == row["predicted_label"] == LABELS[row["target"]] and row["place"] == 0
        assert row["probability"] == pytest.approx(probability[number].max().item(), rel=1e-5)
        top = json.loads(row["top_classes"])
        assert [one["target"] for one in top] == probability[number].argsort(descending=True).tolist()
        assert sum(one["probability"] for one in top) == pytest.approx(1, abs=1e-4)
        sizes = json.loads(row["geometry"])
        assert sizes == {"original_size": [40, 60], "resized_size": [36, 54], "crop_box": [11, 2, 43, 34]}
        made_by = json.loads(row["made_by"])
        assert made_by["explainer"]["id"] == "tiny" and made_by["quantisation"]["error_bound"] == 0.5 / 255
        assert made_by["classifier"]["fingerprint"] == explainer.config.base_model_fingerprint
        assert {"torch", "transformers"} <= set(made_by["versions"])
    stated = json.loads(pq.read_metadata(summary.folder.path_of(0)).metadata[b"hf_aha"])["quantisation"]
    assert (stated["dtype"], stated["levels"], stated["error_bound"]) == ("uint8", 255, 0.5 / 255)


@pytest.mark.parametrize("name", ["uint8", "uint16"])
def test_maps_come_back_in_the_photographs_own_pixels(explainer, tmp_path, name):
    make(explainer, tmp_path / "out", quantisation=name)
    maps = load_maps(tmp_path / "out")
    assert maps.features["ranks"] == datasets.Image() and len(maps) == 7
    encoded_too = maps.cast_column("ranks", datasets.Image(decode=False))
    for number in (0, 6):
        image = photograph(number)
        expected = explainer.explain(image)
        one = StoredMap.from_row(maps[number])
        assert one.ranks.shape == (40, 60) and one.ranks.dtype == np.float32
        assert (np.isnan(one.ranks) == np.isnan(expected.scores)).all() and np.isnan(one.ranks).any()
        scores = torch.from_numpy(expected.scores)
        seen = ~torch.isnan(scores)
        agreement = rank_correlation(scores[seen][None], torch.from_numpy(one.ranks)[seen][None])
        assert agreement > 0.98
        # Interpolation is a weighted mean, so the bound of the stored ranks holds here as well.
        with torch.no_grad():
            exact = explainer(pixels_of(explainer, [image])).scores.flatten().argsort().argsort().double() / 1023
        exact = one.geometry.to_original(exact.reshape(32, 32)).numpy()
        error = np.nanmax(abs(exact - one.ranks))
        assert error <= one.made_by["quantisation"]["error_bound"] + 1.1 / 1023  # neighbours may have been swapped
        explanation = one.explanation(image)
        assert (explanation.label, explanation.target) == (expected.label, expected.target)
        assert explanation.probability == pytest.approx(expected.probability, rel=1e-5)
        assert explanation.overlay().size == image.size and explanation.title == expected.title
        assert (StoredMap.from_row(encoded_too[number]).input_ranks == one.input_ranks).all()
    with pytest.raises(ValueError, match="60 x 40"):
        StoredMap.from_row(maps[0]).explanation(photograph(0, (40, 60)))
    with pytest.raises(ValueError, match="'geometry'"):
        StoredMap.from_row({name: value for name, value in maps[0].items() if name != "geometry"})


def test_smaller_maps_are_averages_and_come_back_whole(explainer, tmp_path):
    make(explainer, tmp_path / "out", map_size=(8, 16), quantisation="uint16")
    one = StoredMap.from_row(load_maps(tmp_path / "out")[2])
    with torch.no_grad():
        scores = explainer(pixels_of(explainer, [photograph(2)])).scores[0]
    averaged = scores.reshape(8, 4, 16, 2).mean((1, 3))
    expected = averaged.flatten().argsort().argsort().reshape(8, 16).numpy() / 127
    assert one.input_ranks.shape == (8, 16)
    assert abs(one.input_ranks - expected).max() <= 0.5 / 65535 + 1.1 / 127
    whole = one.geometry.to_original(
        torch.nn.functional.interpolate(torch.from_numpy(one.input_ranks)[None, None], (32, 32), mode="bilinear")[0, 0]
    )
    assert np.array_equal(one.ranks, whole.numpy(), equal_nan=True)


def test_several_classes_a_photograph(explainer, tmp_path):
    summary = make(explainer, tmp_path / "out", top_k=2)
    found = tables(tmp_path / "out")
    assert summary.maps == 14 and [(row["row"], row["place"]) for row in found[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    best, second = explainer.explain(photograph(3), top_k=2)
    assert [found[6]["label"], found[7]["label"]] == [best.label, second.label]
    assert found[7]["probability"] == pytest.approx(second.probability, rel=1e-5)
    ranks = StoredMap.from_row(found[7]).ranks
    seen = ~np.isnan(ranks)
    agreement = rank_correlation(torch.from_numpy(second.scores[seen])[None], torch.from_numpy(ranks[seen])[None])
    assert agreement > 0.98


def test_the_class_asked_about_may_be_fixed_or_the_rows_own(explainer, tmp_path):
    make(explainer, tmp_path / "fixed", asked={"target": 3})
    assert {row["label"] for row in tables(tmp_path / "fixed")} == {"saw"}
    asked = {"label_column": "label", "classes": [4, 3, 2, -1, 0]}
    summary = make(explainer, tmp_path / "own", asked=asked)
    assert [row["target"] for row in tables(tmp_path / "own")] == [4, 3, 2, 0, 4, 3]
    assert [(one["row"], one["error"]) for one in summary.unreadable] == [
        (3, "Its label 3 is no class of the classifier.")
    ]
    with pytest.raises(ValueError, match="not both"):
        make(explainer, tmp_path / "both", asked={"target": 3}, top_k=2)


@pytest.mark.parametrize("target", [2, None])
def test_a_class_may_be_compared_with_another(explainer, tmp_path, target):
    """Target 2 rather than the class most predicted, or the most probable class other than that."""
    images = [photograph(row) for row in range(7)]
    with torch.no_grad():
        predicted = explainer(pixels_of(explainer, images)).target
    against = int(predicted[predicted != 2].mode().values)
    summary = make(explainer, tmp_path / "out", asked={"target": target, "against": against})
    maps = load_maps(tmp_path / "out")
    assert (summary.maps, summary.unreadable) == (7, [])
    assert maps.features == {**FEATURES, **CONTRAST_FEATURES} == {**MapsFolder.existing(tmp_path / "out").features}
    for number, image in enumerate(images):
        expected = explainer.explain(image, target, against=against)
        one = StoredMap.from_row(maps[number])
        assert (one.target, one.against, one.against_label) == (expected.target, against, LABELS[against])
        assert one.target == (target or predicted[number]) or predicted[number] == against
        assert one.against_probability == pytest.approx(expected.against_probability, rel=1e-4)
        seen = ~np.isnan(one.ranks)
        pair = (torch.from_numpy(scores[seen])[None] for scores in (expected.scores, one.ranks))
        assert rank_correlation(*pair) > 0.98
        explanation = one.explanation(image)
        assert explanation.title == expected.title and f" rather than {LABELS[against]}" in explanation.title
    with pytest.raises(ValueError, match="no 'against_label'"):
        StoredMap.from_row({name: value for name, value in maps[0].items() if name != "against_label"})
    card = maps_card(summary, json.loads((tmp_path / "out" / "run.json").read_text())["identity"], name="out")
    asked = "class 2" if target else f"the most probable class other than {against}"
    assert f"{asked}, rather than class {against}" in card and "| `against` | index of the class" in card


def test_rows_of_the_compared_class_are_listed_and_the_others_explained(explainer, tmp_path):
    asked = {"label_column": "label", "classes": [4, 3, 2, 1, 0], "against": 2}
    summary = make(explainer, tmp_path / "out", asked=asked)
    found = tables(tmp_path / "out")
    assert [row["target"] for row in found] == [4, 3, 1, 0, 4, 3] and {row["against"] for row in found} == {2}
    assert [(one["row"], one["error"]) for one in summary.unreadable] == [
        (2, "Its class 2 is the one that the target is compared with.")
    ]


def test_maps_without_a_comparison_are_as_they_were(explainer, tmp_path):
    make(explainer, tmp_path / "out", top_k=2)
    assert "against" not in json.loads((tmp_path / "out" / "run.json").read_text())["identity"]
    maps = load_maps(tmp_path / "out")
    assert maps.features == FEATURES and StoredMap.from_row(maps[0]).against is None


def test_photographs_that_cannot_be_read_are_listed_and_the_others_keep_their_numbers(explainer, tmp_path):
    summary = make(explainer, tmp_path / "out", photographs(8, broken=(0, 3, 4, 5)))
    assert [row["row"] for row in tables(tmp_path / "out")] == [1, 2, 6, 7]
    assert [one["row"] for one in summary.unreadable] == [0, 3, 4, 5]
    assert "format" in summary.unreadable[0]["error"] and summary.unreadable[0]["image_id"] == "0.png"
    assert len(load_maps(tmp_path / "out")) == 4  # although one file holds no row at all
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "| 5 | 5.png |" in maps_card(summary, run["identity"], name="out")


def test_a_dataset_without_any_readable_photograph_says_so(explainer, tmp_path):
    assert make(explainer, tmp_path / "out", photographs(2, broken=(0, 1))).maps == 0
    with pytest.raises(MapsError, match="none of its photographs"):
        load_maps(tmp_path / "out")


def test_missing_images_and_scores_that_are_no_numbers_are_listed_too(explainer, tmp_path, monkeypatch):
    dataset = photographs(4)
    cells = [dataset[0]["image"], None, {"bytes": None, "path": str(tmp_path / "gone.png")}, dataset[3]["image"]]
    dataset = dataset.remove_columns("image").add_column("image", cells, feature=datasets.Image(decode=False))
    plain = type(explainer.decoder).decode

    def decode(self, *arguments, **named):
        scores = plain(self, *arguments, **named)
        scores[-1, 0, 0] = torch.inf
        return scores

    monkeypatch.setattr(type(explainer.decoder), "decode", decode)
    summary = make(explainer, tmp_path / "out", dataset, shard_rows=4, batch_size=4)
    assert [row["row"] for row in tables(tmp_path / "out")] == [0]
    assert [one["row"] for one in summary.unreadable] == [1, 2, 3]
    reasons = [one["error"] for one in summary.unreadable]
    assert "missing" in reasons[0] and "No such file" in reasons[1] and "not finite" in reasons[2]
    assert str(tmp_path) not in json.dumps(summary.unreadable)


def test_readers_do_not_change_the_maps_and_inputs_may_differ_in_size(tmp_path):
    keeps_shape = ViTImageProcessorPil(do_resize=False)
    explainer = tiny_explainer(keeps_shape)
    dataset = photographs(6, sizes=((32, 40), (48, 32)))
    make(explainer, tmp_path / "one", dataset)
    make(explainer, tmp_path / "two", dataset, workers=2)
    assert_same_rows(tables(tmp_path / "one"), tables(tmp_path / "two"))
    maps = load_maps(tmp_path / "two")
    assert [StoredMap.from_row(row).ranks.shape for row in maps.select(range(3))] == [(40, 32), (32, 48), (40, 32)]


def test_names_of_photographs_come_from_a_column_or_the_folder(explainer, tmp_path):
    inside = tmp_path / "photos" / "cats" / "a.png"
    inside.parent.mkdir(parents=True)
    photograph(0).save(inside)
    cells = {"image": [{"bytes": None, "path": str(inside)}], "file_name": ["x.png"], "number": [7]}
    features = {"image": datasets.Image(decode=False), "file_name": datasets.Value("string")}
    dataset = datasets.Dataset.from_dict(
        cells, features=datasets.Features(features | {"number": datasets.Value("int8")})
    )

    def name(dataset, **named) -> str:
        return ExplainedRows(dataset, "image", CROP, **named)[0]["image_id"]

    assert name(dataset) == "x.png" and name(dataset, id_column="number") == "7"
    plain = dataset.remove_columns("file_name")
    assert name(plain) == "a.png" and name(plain, folder=tmp_path / "photos") == "cats/a.png"
    with pytest.raises(ValueError, match="no column 'name'"):
        name(dataset, id_column="name")


# ---------------------------------------------------------------------------------------------------- resuming


class Deadly(ExplainedRows):
    """Rows that end the process, as `kill -9` does, where row 5 is read."""

    def __getitem__(self, row):
        if row == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)


def in_processes(work, *each: tuple) -> list[int]:
    """Exit codes of forks of this process, which need not import anything again."""
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=work, args=arguments) for arguments in each]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


def test_a_kill_loses_one_file_at_most(explainer, tmp_path):
    output = tmp_path / "out"

    def die() -> None:
        rows = Deadly(photographs(), "image", CROP)
        settings = MapSettings(precision="float32", batch_size=3, workers=0, shard_rows=3)
        explain_dataset(explainer, rows, settings, output, names=NAMES, progress=False)

    assert in_processes(die, ()) == [-signal.SIGKILL]
    kept = [file.name for file in (output / "data").iterdir()]
    assert kept == ["train-00000-of-00003.parquet"]
    (output / "data" / ".half.partial.parquet").write_bytes(b"half")
    with pytest.raises(MapsError, match="lacks 2 of its 3 files"):
        load_maps(output)
    with pytest.raises(MapsError, match="--resume"):
        make(explainer, output)
    written = (output / "data" / kept[0]).stat().st_mtime_ns
    assert make(explainer, output, resume=True).explained == 4
    assert (output / "data" / kept[0]).stat().st_mtime_ns == written
    make(explainer, tmp_path / "undisturbed")
    assert_same_rows(tables(output), tables(tmp_path / "undisturbed"))
    assert len(list((output / "data").iterdir())) == 3
    assert make(explainer, output, resume=True).explained == 0


def test_a_damaged_file_is_made_again(explainer, tmp_path):
    before = make(explainer, tmp_path / "out").folder
    file = before.path_of(1)
    whole = pq.read_table(file)
    file.write_bytes(file.read_bytes()[:-100])
    assert before.missing() == [1]
    assert make(explainer, tmp_path / "out", resume=True).explained == 3
    assert pq.read_table(file) == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dataset": "changed"}, "another dataset, or one that has changed since (dataset.digest"),
        ({"dataset": "longer"}, "another number of photographs (photographs: 7 there, 8 now)"),
        ({"names": {**NAMES, "explainer": {"id": "other"}}}, 'another explainer (explainer.id: "tiny" there'),
        ({"quantisation": "uint16"}, 'other settings (quantisation: "uint8" there, "uint16" now)'),
        ({"asked": {"target": 1}}, 'other settings (target: "predicted" there, 1 now)'),
        ({"asked": {"against": 1}}, "other settings (against: null there, 1 now)"),
        ({"top_k": 2}, "other settings (top_k: 1 there, 2 now)"),
        ({"map_size": (8, 8)}, "other settings (map_size: null there, [8, 8] now)"),
        ({"shard_rows": 2}, "other settings (shard_rows: 3 there, 2 now)"),
        ({"weights": 1}, "another explainer (explainer.weights:"),
        ({"processor": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)}, "another image processor"),
    ],
)
def test_what_was_made_differently_is_not_continued(explainer, tmp_path, change, named):
    make(explainer, tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.*") if file.is_file()}
    other = {"changed": photographs(broken=(6,)), "longer": photographs(8)}
    change = dict(change)
    if "weights" in change or "processor" in change:
        explainer = tiny_explainer(change.pop("processor", CROP), seed=change.pop("weights", 0))
    dataset = other.get(change.pop("dataset", None))
    with pytest.raises(MapsError) as caught:
        make(explainer, tmp_path / "out", dataset, resume=True, **change)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in before} == before


def test_a_batch_size_or_readers_may_change(explainer, tmp_path):
    folder = make(explainer, tmp_path / "out").folder
    folder.path_of(2).unlink()
    assert make(explainer, tmp_path / "out", resume=True, batch_size=2, workers=1).explained == 1


def test_foreign_folders_and_folders_in_use_are_left_alone(explainer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(MapsError, match="other files already"):
        make(explainer, tmp_path / "out", resume=True)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["README.md"]
    folder = make(explainer, tmp_path / "used").folder

    def resume() -> None:
        try:
            make(explainer, tmp_path / "used", resume=True)
        except MapsError as error:
            os._exit(7 if "in use by another run" in str(error) else 8)

    with folder.locked():
        assert in_processes(resume, ()) == [7]
    assert in_processes(resume, ()) == [0]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}'])
def test_records_that_are_none_of_ours_are_refused(explainer, tmp_path, content):
    with pytest.raises(MapsError, match=r"run\.json"):
        MapsFolder.existing(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(MapsError, match=r"run\.json"):
        make(explainer, tmp_path, resume=True)


# ---------------------------------------------------------------------------------------------- several processes


def test_two_processes_give_the_same_rows_as_one(explainer, tmp_path):
    dataset = photographs(11, broken=(4,))
    make(explainer, tmp_path / "one", dataset, shard_rows=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work(rank: int) -> None:
        variables = {
            "WORLD_SIZE": 2,
            "RANK": rank,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in variables.items()})
        AcceleratorState._reset_state(reset_partial_state=True)
        summary = make(explainer, tmp_path / "two", dataset, shard_rows=2)
        fine = not summary.is_main_process or (summary.maps, summary.explained) == (10, 11)
        os._exit(summary.is_main_process == (rank == 0) and fine)

    assert in_processes(work, (0,), (1,)) == [1, 1]
    assert_same_rows(tables(tmp_path / "two"), tables(tmp_path / "one"))
    assert len(tables(tmp_path / "one")) == 10
    # Swapped neighbours in rank compress to another number of bytes.
    (maps, _, errors), two = (MapsFolder.existing(tmp_path / name).summary() for name in ("one", "two"))
    assert (maps, errors) == (two[0], two[2])


# ---------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top_k": 6}, "1..5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "workers"),
        ({"quantisation": "uint4"}, "'uint4'"),
        ({"map_size": (64, 8)}, "32 x 32"),
        ({"map_size": (0, 8)}, "map_size"),
        ({"precision": "int8"}, "int8"),
        ({"asked": {"label_column": "image"}}, "class indices"),
        ({"asked": {"label_column": "colour"}}, "'colour'"),
        ({"asked": {"target": 1, "label_column": "label"}}, "not both"),
        ({"asked": {"target": 1, "against": 1}}, "both class 1, but must be two classes"),
        ({"asked": {"against": 5}}, "against must lie in 0..4"),
        ({"asked": {"against": 1}, "top_k": 2}, "either against or top_k"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(explainer, tmp_path, settings, named):
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        make(explainer, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_other_datasets_are_no_maps(tmp_path):
    (tmp_path / "data").mkdir()
    photographs(2).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(MapsError, match=r"no run\.json"):
        load_maps(tmp_path / "data")


def test_names_of_splits():
    assert split_name("validation[10%:20%]+test") == "validation_test"
    assert split_name("train[:5]") == "train"
