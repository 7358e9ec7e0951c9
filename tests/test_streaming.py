"""Streams: divided among readers without loss, shuffled, resumed exactly, read from every kind of file."""

from __future__ import annotations

import importlib
import io
import json
import tarfile
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from loopback_hub import LoopbackHub, connected
from PIL import Image
from transformers import ViTImageProcessor

from hf_aha.data import ProcessorCrop, RandomCrop, UnreadableDataError
from hf_aha.streaming import PhotographStream, Position, Share, StreamReader, stream_photographs
from hf_aha.trainer import AhaTrainer, _hub_source


HALF = (0.5, 0.5, 0.5)
CROP = RandomCrop((8, 8), HALF, HALF)
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})


def encoded(seed: int, kind: str = "PNG", side: int = 12) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(folder: Path, sizes: list[int], broken: tuple[int, ...] = ()) -> str:
    """A file a size, the rows numbered through in `label`."""
    folder.mkdir(parents=True)
    number = 0
    for shard, size in enumerate(sizes):
        numbers = list(range(number, number + size))
        cells = [{"bytes": encoded(i)[: 60 if i in broken else None], "path": None} for i in numbers]
        rows = datasets.Dataset.from_dict({"image": cells, "label": numbers}, features=FEATURES)
        rows.to_parquet(folder / f"train-{shard:02}.parquet")
        number += size
    return str(folder)


def write_tar(path: Path, numbers: range, kind: str = "png") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for suffix, data in ((kind, encoded(number)), ("cls", str(number % 3).encode())):
                info = tarfile.TarInfo(f"photo{number:03}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """33 rows in five shards of different sizes."""
    return write_parquet(tmp_path_factory.mktemp("stream") / "rows", [7, 6, 9, 1, 10])


@pytest.fixture
def make_stream(folder):
    def make(source: str = folder, **settings) -> PhotographStream:
        rows, column = stream_photographs(source, split="train")
        return PhotographStream(rows, column, CROP, **{"label_column": "label", **settings})

    return make


def labels(stream: PhotographStream, share: Share, epoch: int = 0, start: Position | None = None) -> list[int]:
    return [row.cells["label"] for row, _ in stream.shuffled(share, epoch, start or Position())]


# ---------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(
    ("processes", "workers", "buffer", "rows_are_skipped"),
    [(1, 1, 0, False), (1, 2, 4, False), (2, 2, 1000, False), (5, 1, 3, False), (2, 4, 4, True), (7, 2, 4, True)],
)
def test_readers_share_every_epoch_without_loss(make_stream, processes, workers, buffer, rows_are_skipped):
    stream = make_stream(shuffle_buffer=buffer)
    for epoch in (0, 3):
        shares = [
            stream.share(epoch, (process, processes), (worker, workers))
            for process in range(processes)
            for worker in range(workers)
        ]
        assert len({share.reader for share in shares}) == len(shares)
        assert sorted(label for share in shares for label in labels(stream, share, epoch)) == list(range(33))
        owned = [shard for share in shares for shard in share.shards]
        assert (len(owned) > len(set(owned))) == rows_are_skipped, "shards are read once wherever there are enough"


def test_the_order_depends_on_seed_epoch_and_reader_alone(make_stream):
    def order(seed: int = 0, epoch: int = 0, **settings) -> list[int]:
        stream = make_stream(seed=seed, **{"shuffle_buffer": 4, **settings})
        return labels(stream, stream.share(epoch), epoch)

    assert order() == order()
    assert len({tuple(order()), tuple(order(seed=1)), tuple(order(epoch=1))}) == 3
    assert order(shuffle_buffer=0) == order(shuffle_buffer=0, epoch=2) == list(range(33)), "as the files have it"
    assert order(shuffle_buffer=1) != order(shuffle_buffer=4), "shards alone, and rows as well"


def test_a_block_is_shuffled_within_itself_and_no_row_is_read_long_before_its_turn(make_stream, monkeypatch):
    stream = make_stream(shuffle_buffer=6)
    plain = [row.cells["label"] for row in stream.rows(stream.share(0))]
    mixed = labels(stream, stream.share(0))
    for start in range(0, 33, 6):
        assert sorted(mixed[start : start + 6]) == sorted(plain[start : start + 6])
    read, rows = 0, stream.rows

    def counting(*args):
        nonlocal read
        for row in rows(*args):
            read += 1
            yield row

    monkeypatch.setattr(stream, "rows", counting)
    for given, _ in enumerate(stream.shuffled(stream.share(0), 0, Position()), start=1):
        assert read - given <= 6, "the memory of a reader is its buffer"


@pytest.mark.parametrize("buffer", [0, 1, 5, 1000])
@pytest.mark.parametrize("worker", [(0, 1), (1, 2), (2, 7)])
def test_going_on_from_any_position_gives_the_rows_of_an_undisturbed_epoch(make_stream, buffer, worker):
    stream = make_stream(shuffle_buffer=buffer)
    share = stream.share(1, worker=worker)
    whole = list(stream.shuffled(share, 1, Position()))
    expected = [row.cells["label"] for row, _ in whole]
    for taken in range(0, len(whole), 2):
        # As a checkpoint keeps it.
        position = Position(**json.loads(json.dumps(asdict(whole[taken][1]))))
        assert labels(make_stream(shuffle_buffer=buffer), share, 1, position) == expected[taken + 1 :]


# ---------------------------------------------------------------------------------------------- rows


def test_rows_are_decoded_like_those_of_a_stored_dataset_and_crops_depend_on_the_epoch(make_stream):
    stream = make_stream()
    row = next(stream.rows(Share((2,), 1, 0, 0), row=4))
    read = stream.read(row, epoch=0)
    assert (read["label"], read["index"]) == (17, (2 << 32) + 4)
    assert read["pixel_values"].shape == (3, 8, 8) and read["pixel_values"].dtype == torch.float32
    assert torch.equal(make_stream().read(row, 0)["pixel_values"], read["pixel_values"])
    assert not torch.equal(stream.read(row, 1)["pixel_values"], read["pixel_values"])
    assert not torch.equal(make_stream(seed=1).read(row, 0)["pixel_values"], read["pixel_values"])


def test_broken_rows_are_named_by_shard_row_and_key(tmp_path, make_stream):
    stream = make_stream(write_parquet(tmp_path / "rows", [3, 4], broken=(5,)), shuffle_buffer=0)
    (batch,) = StreamReader(stream, 7, (0, 1), 0, {}, 0)
    assert batch.labels.tolist() == [0, 1, 2, 3, 4, 6]
    ((name, reason),) = batch.errors
    assert name == "shard 1 row 2" and "truncated" in reason
    write_tar(tmp_path / "tars" / "train-0.tar", range(3))
    broken = tmp_path / "tars" / "train-0.tar"
    broken.write_bytes(broken.read_bytes().replace(encoded(1), encoded(1)[:60].ljust(len(encoded(1)), b"\0")))
    (batch,) = StreamReader(make_stream(str(tmp_path / "tars"), label_column="cls"), 3, (0, 1), 0, {}, 0)
    assert [name for name, _ in batch.errors] == ["shard 0 row 1 (photo001)"]


def test_the_first_rows_are_kept_to_validate_on(make_stream):
    stream = make_stream(shuffle_buffer=100)
    stream.transform = ProcessorCrop(ViTImageProcessor(size={"height": 8, "width": 8}))
    kept = stream.first(6)
    assert [kept[i]["label"] for i in range(6)] == labels(stream, stream.share(0))[:6] != list(range(6))
    assert len(stream.first(100)) == 33
    assert kept[0]["pixel_values"].shape == (3, 8, 8)


# ---------------------------------------------------------------------------------------------- kinds of files


def test_webdataset_shards_are_found_with_their_image_and_class_columns(tmp_path, make_stream):
    for shard in range(3):
        write_tar(tmp_path / "tars" / f"train-{shard}.tar", range(4 * shard, 4 * shard + 4))
    rows, column = stream_photographs(str(tmp_path / "tars"), split="train")
    assert column == "png"
    stream = PhotographStream(rows, column, CROP, "cls")
    assert stream.dataset.num_shards == 3
    batches = list(StreamReader(stream, 4, (0, 1), 0, {}, 0))
    assert sorted(label for batch in batches for label in batch.labels.tolist()) == sorted(i % 3 for i in range(12))


def test_an_image_folder_is_streamed_with_labels_from_its_subfolders(tmp_path, make_stream):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for seed in range(3):
            (tmp_path / "photos" / "train" / name / f"{seed}.png").write_bytes(encoded(seed))
    batches = list(StreamReader(make_stream(str(tmp_path / "photos")), 2, (0, 1), 0, {}, 0))
    assert sorted(label for batch in batches for label in batch.labels.tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_column_of_bytes_can_be_named(tmp_path):
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict({"data": [encoded(0)]}).to_parquet(tmp_path / "rows" / "train.parquet")
    rows, column = stream_photographs(str(tmp_path / "rows"), split="train", image_column="data")
    stream = PhotographStream(rows, column, CROP)
    assert "pixel_values" in stream.read(next(stream.rows(stream.share(0))), 0)


def test_the_rest_of_a_damaged_shard_is_listed_once_and_the_other_shards_are_read(tmp_path, make_stream):
    for shard in range(2):
        write_tar(tmp_path / "tars" / f"train-{shard}.tar", range(20 * shard, 20 * shard + 20))
    damaged = tmp_path / "tars" / "train-1.tar"
    damaged.write_bytes(damaged.read_bytes()[:9000])
    stream = make_stream(str(tmp_path / "tars"), label_column="cls", shuffle_buffer=0)
    for worker in ((0, 1), (1, 2), (3, 4)):
        readers = [StreamReader(stream, 50, (part, worker[1]), 0, {}, 0) for part in range(worker[1])]
        batches = [batch for reader in readers for batch in reader]
        errors = [error for batch in batches for error in batch.errors]
        assert len(errors) == 1 and errors[0][0].startswith("shard 1 row ")
        assert "the rest of the shard is damaged" in errors[0][1] and "\n" not in errors[0][1]
        assert 20 < sum(len(batch.labels) for batch in batches) < 40


def test_a_file_that_cannot_be_read_ends_the_run_in_one_sentence(tmp_path, make_stream):
    stream = make_stream(write_parquet(tmp_path / "rows", [3, 3]), shuffle_buffer=0)
    (tmp_path / "rows" / "train-01.parquet").unlink()
    *batches, error = StreamReader(stream, 2, (0, 1), 0, {}, 0)
    assert [batch.labels.tolist() for batch in batches] == [[0, 1]]
    assert isinstance(error, UnreadableDataError) and "\n" not in str(error)
    assert str(error).startswith("Shard 1 of the training dataset cannot be read beyond row 0: ")


@pytest.mark.parametrize("kind", ["tar", "parquet", "photos"])
def test_a_dataset_of_the_hub_is_streamed_at_its_commit(tmp_path, monkeypatch, kind):
    if kind == "tar":
        write_tar(tmp_path / "files" / "train-0.tar", range(3))
    elif kind == "parquet":
        write_parquet(tmp_path / "files", [2, 1])
    else:
        for name in ("cat", "dog"):
            (tmp_path / "files" / "train" / name).mkdir(parents=True)
            (tmp_path / "files" / "train" / name / "a.png").write_bytes(encoded(0))
    with LoopbackHub() as hub, connected(hub, tmp_path / "home") as patch:
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        commit = hub.commit_folder("org/photos", tmp_path / "files", repo_type="dataset")
        rows, column = stream_photographs("org/photos", split="train")
        stream = PhotographStream(rows, column, CROP, shuffle_buffer=0)
        batches = list(StreamReader(stream, 2, (0, 1), 0, {}, 0))
        assert batches and not any(batch.errors for batch in batches)
        assert _hub_source(stream.dataset) == {"dataset": "org/photos", "dataset_revision": commit}
        assert not list((tmp_path / "cache").rglob("*.arrow")), "nothing is stored"


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"a": [1]}, {}, "has no image column among its columns a; name one with image_column"),
        ({"a": [1]}, {"image_column": "b"}, "has no column 'b'; its columns are a"),
        ({"a": [1]}, {"image_column": "a"}, "column 'a' of the dataset .* holds no images but Value"),
        ({"a": [1]}, {"split": "test"}, "has no split 'test' to stream, only train.$"),
        ({"a": [1]}, {"split": "train[:5]"}, "only train; a part of a split cannot be streamed"),
    ],
)
def test_what_cannot_be_streamed_is_one_sentence(tmp_path, columns, settings, message):
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows" / "train.parquet")
    with pytest.raises(ValueError, match=message) as raised:
        stream_photographs(str(tmp_path / "rows"), **{"split": "train", **settings})
    assert "\n" not in str(raised.value)


def test_an_empty_stream_untold_columns_and_a_negative_buffer_are_refused(tmp_path, make_stream):
    with pytest.raises(ValueError, match="The split 'train' of the dataset .* has no row"):
        make_stream(write_parquet(tmp_path / "rows", [0]))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="does not tell its columns before it is read"):
        make_stream(str(tmp_path / "text"))
    with pytest.raises(ValueError, match="shuffle_buffer must not be negative, but it is -1"):
        make_stream(shuffle_buffer=-1)
    with pytest.raises(ValueError, match="no column 'kind'; its columns are image, label"):
        make_stream(label_column="kind")


def test_the_fingerprint_follows_the_data_and_not_their_place(tmp_path, make_stream):
    sizes = [7, 6, 9, 1, 10]
    first = make_stream().fingerprint()
    assert make_stream(write_parquet(tmp_path / "moved", sizes), seed=5).fingerprint() == first
    assert make_stream(write_parquet(tmp_path / "other", sizes, broken=(2,))).fingerprint() != first
    assert make_stream(write_parquet(tmp_path / "fewer", sizes[:4])).fingerprint() != first
    assert make_stream(label_column=None).fingerprint() != first


# ---------------------------------------------------------------------------------------------- a whole run


def test_a_recipe_trains_on_a_stream_and_a_resumed_run_ends_with_the_same_weights(
    tmp_path, monkeypatch, make_classifier
):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "recipes"))
    recipe = importlib.import_module("train_explainer")
    make_classifier(num_labels=3).save_pretrained(tmp_path / "classifier")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "classifier")
    for shard in range(2):
        write_tar(tmp_path / "tars" / f"train-{shard}.tar", range(9 * shard, 9 * shard + 9))
    write_tar(tmp_path / "tars" / "validation-0.tar", range(5))
    words = {
        "--classifier": tmp_path / "classifier",
        "--dataset": tmp_path / "tars",
        "--streaming": "true",
        "--shuffle_buffer": 4,
        "--target_classes": "label",
        "--max_steps": 6,
        "--per_device_batch_size": 3,
        "--mixed_precision": "no",
        "--dataloader_num_workers": 1,
        "--eval_images": 4,
        "--eval_steps": 6,
        "--save_steps": 2,
        "--log_steps": 3,
        "--grid_width": 8,
        "--grid_depth": 1,
        "--quarter_width": 4,
        "--half_width": 4,
    }

    def train(run: str, *more: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        given = [str(word) for pair in words.items() for word in pair]
        return recipe.main([*given, "--grid_range", "2", "4", "--output_dir", str(tmp_path / run), *more])

    whole = train("whole")
    training = whole.config.training
    assert (training["streaming"], training["shuffle_buffer"]) == (True, 4) and "train_rows" not in training
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [0 <= entry["data_wait_share"] <= 1 for entry in log if "loss" in entry] == [True, True]
    assert any("validation/mean/deletion" in entry for entry in log)
    card = (tmp_path / "whole" / "final" / "README.md").read_text()
    assert "saw 18 crops of photographs, streamed, in 6 steps" in card

    step, done = AhaTrainer.training_step, []

    def stopping(self, *args):
        if len(done) == 5:
            raise RuntimeError("killed")
        done.append(args)
        return step(self, *args)

    monkeypatch.setattr(AhaTrainer, "training_step", stopping)
    with pytest.raises(RuntimeError, match="killed"):
        train("run")
    monkeypatch.setattr(AhaTrainer, "training_step", step)
    resumed = train("run", "--resume_from_checkpoint", "auto").decoder.state_dict()
    for name, value in whole.decoder.state_dict().items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--streaming", "true", "--cache_size", "256"), "cache_size=256 stores copies of the whole split"),
        (("--shuffle_buffer", "-1"), "shuffle_buffer must not be negative, but it is -1"),
        (("--cache_size", "0"), "cache_size must be at least 1 pixel, but it is 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_loaded(monkeypatch, words, message):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "recipes"))
    recipe = importlib.import_module("train_explainer")
    with pytest.raises(SystemExit, match=message) as raised:
        recipe.main(["--output_dir", "run", "--classifier", "none", "--dataset", "none", *words])
    assert "\n" not in str(raised.value)


def test_batches_end_with_the_epoch_and_a_small_rest_is_left_out(make_stream):
    stream = make_stream(shuffle_buffer=4)
    sizes = [len(batch.labels) for batch in StreamReader(stream, 8, (0, 1), 0, {}, 0)]
    assert sizes == [8, 8, 8, 8]
    assert [len(batch.labels) for batch in StreamReader(stream, 50, (0, 1), 0, {}, 0)] == [33], "unless it is all"
    assert [len(batch.labels) for batch in islice(StreamReader(stream, 3, (1, 2), 0, {}, 0), 2)] == [3, 3]
