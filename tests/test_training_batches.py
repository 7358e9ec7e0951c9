"""Training batches: endless, exact after a resume, unreadable rows counted, waiting measured."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from PIL import Image

from hf_aha import training_batches
from hf_aha.data import Batch, Photographs, RandomCrop, UnreadableDataError, load_photographs
from hf_aha.streaming import PhotographStream, stream_photographs
from hf_aha.training_batches import TrainingBatches


HALF = (0.5, 0.5, 0.5)
SHARDS = (9, 4, 7)
BROKEN = (3, 11)


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def write(folder: Path, broken: tuple[int, ...]) -> str:
    """Twenty rows in three files, numbered through in `label`."""
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    start = 0
    for shard, size in enumerate(SHARDS):
        cells = []
        for number in range(start, start + size):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue()[: 60 if number in broken else None], "path": None})
        rows = datasets.Dataset.from_dict({"image": cells, "label": list(range(start, start + size))}, features)
        rows.to_parquet(folder / f"train-{shard}.parquet")
        start += size
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("batches") / "rows", BROKEN)


def accelerator(index: int = 0, processes: int = 1) -> Accelerator | SimpleNamespace:
    """A real one, or what a stream asks of one of several processes."""
    if processes > 1:
        return SimpleNamespace(process_index=index, num_processes=processes, is_main_process=index == 0)
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0))


@pytest.fixture
def make_source(folder):
    def make(
        kind: str, workers: int = 0, *, source: str = folder, process=(0, 1), buffer: int = 3, size: int = 3, **more
    ):
        crop = RandomCrop((6, 6), HALF, HALF)
        if kind == "rows":
            rows, column = load_photographs(source, split="train")
            dataset = Photographs(rows, column, crop, "label")
        else:
            rows, column = stream_photographs(source, split="train")
            dataset = PhotographStream(rows, column, crop, "label", shuffle_buffer=buffer)
        return TrainingBatches(dataset, size, accelerator(*process), num_workers=workers, **more)

    return make


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.pixel_values, b.pixel_values) and torch.equal(a.indices, b.indices) and a.errors == b.errors


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("kind", "workers", "buffer"),
    [("rows", 0, 0), ("rows", 2, 0), ("stream", 0, 0), ("stream", 0, 1000), ("stream", 2, 3), ("stream", 5, 3)],
)
@pytest.mark.filterwarnings("ignore:The streamed dataset has 3 shard")
def test_a_source_goes_on_with_the_very_batches_of_an_undisturbed_one(make_source, kind, workers, buffer):
    """Over three epochs, with broken rows, workers that end before others, and more workers than files."""
    undisturbed = make_source(kind, workers, buffer=buffer)
    states, expected = [], []
    for batch in islice(undisturbed, 16):
        expected.append(batch)
        states.append(json.loads(json.dumps(undisturbed.state_dict())))
    cuts = (0, 4, 5, 6, 11) if workers else range(15)
    for cut in cuts:
        AcceleratorState._reset_state(reset_partial_state=True)
        later = make_source(kind, workers, buffer=buffer)
        later.load_state_dict(states[cut])
        rest = expected[cut + 1 : cut + 6]
        assert all(same(a, b) for a, b in zip(islice(later, len(rest)), rest, strict=True))
        counted = states[min(cut + 5, 15)]["processes"][0]
        assert later.batches == counted["batches"]
        assert [list(error) for error in later.errors] == counted["errors"]


def test_what_workers_fetched_ahead_does_not_count(make_source):
    source = make_source("stream", 2)
    assert len(list(islice(source, 2))) == 2
    assert source.batches == 2
    taken = source.state_dict()["processes"][0]["position"]["workers"]
    assert {worker: place["batches"] for worker, place in taken.items()} == {"0": 1, "1": 1}


def test_every_process_has_its_own_place(make_source):
    """Two processes over three files: no row twice in the first epoch, and each goes on where it stood."""
    sources = [make_source("stream", process=(index, 2)) for index in range(2)]
    batches = [list(islice(source, 3)) for source in sources]
    rows = [set(torch.cat([batch.indices for batch in taken]).tolist()) for taken in batches]
    assert not rows[0] & rows[1]
    states = [source.state_dict() for source in sources]
    together = {**states[0], "processes": [state["processes"][0] for state in states]}
    for index, source in enumerate(sources):
        later = make_source("stream", process=(index, 2))
        later.load_state_dict(together)
        expected = list(islice(source, 3))
        assert all(same(a, b) for a, b in zip(islice(later, 3), expected, strict=True))
        assert later.unreadable_rows() == len(set(sources[0].errors + sources[1].errors) | set(later.errors))


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (("rows",), ("stream",), "data=rows, but this run has stream"),
        (("stream", 2), ("stream", 1), "dataloader_num_workers=2, but this run has 1"),
    ],
)
def test_a_place_that_means_nothing_here_is_refused(make_source, then, now, message):
    state = make_source(*then).state_dict()
    AcceleratorState._reset_state(reset_partial_state=True)
    source = make_source(*now)
    before = source.state_dict()
    with pytest.raises(ValueError, match=message):
        source.load_state_dict(state)
    with pytest.raises(ValueError, match=r"that of 2 process\(es\), but this run has 1; start it with as many"):
        source.load_state_dict({**before, "processes": 2 * before["processes"]})
    assert source.state_dict() == before
    other = make_source(now[0], *now[1:], size=5)
    with pytest.raises(ValueError, match="batch_size=3, but this run has 5; set it back"):
        other.load_state_dict(before)


# ---------------------------------------------------------------------------------------------- epochs, bad rows


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_unreadable_rows_are_left_out_and_listed_once(make_source, tmp_path, kind):
    listed = tmp_path / "unreadable.jsonl"
    source = make_source(kind, list_path=listed, size=20)
    for batch in islice(source, 3):
        assert sorted(batch.labels.tolist()) == [i for i in range(20) if i not in BROKEN]
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    names = [3, 11] if kind == "rows" else ["shard 0 row 3", "shard 1 row 2"]
    assert sorted(line["row"] for line in lines) == names
    assert all("truncated" in line["reason"] for line in lines)
    assert (source.batches, source.unreadable_rows()) == (3, 2)

    listed.write_text('{"row": 17, "reason": "after the checkpoint"}\n')
    later = make_source(kind, list_path=listed, size=20)
    later.load_state_dict(source.state_dict())
    later.start_list()
    assert [json.loads(line) for line in listed.read_text().splitlines()] == lines


@pytest.mark.parametrize(("kind", "workers"), [("rows", 0), ("stream", 0), ("stream", 2)])
@pytest.mark.filterwarnings("ignore:The streamed dataset has")
def test_too_many_unreadable_rows_or_none_readable_stop_the_run(make_source, tmp_path, kind, workers):
    with pytest.raises(UnreadableDataError, match="2 rows .* more than max_unreadable=1; the last was row") as raised:
        list(islice(make_source(kind, workers, max_unreadable=1), 20))
    assert "\n" not in str(raised.value)
    source = write(tmp_path / "broken", tuple(range(20)))
    with pytest.raises(UnreadableDataError, match="No row of the training dataset could be read"):
        next(iter(make_source(kind, workers, source=source)))


def test_a_file_that_vanishes_is_one_sentence_also_from_a_worker(make_source, tmp_path):
    source = write(tmp_path / "rows", ())
    batches = iter(make_source("stream", 1, source=source, buffer=0, size=9))
    (tmp_path / "rows" / "train-2.parquet").unlink()
    with pytest.raises(UnreadableDataError, match="Shard 2 .* cannot be read beyond row 0") as raised:
        list(islice(batches, 5))
    assert "\n" not in str(raised.value)


def test_fewer_files_than_readers_are_announced(make_source):
    with pytest.warns(UserWarning, match=r"3 shard\(s\) for 2 process\(es\) of 2 worker\(s\): .* keep every n-th row"):
        make_source("stream", 2, process=(0, 2))


# ---------------------------------------------------------------------------------------------- waiting, fingerprint


def test_waiting_is_the_time_between_asking_and_getting(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(training_batches.time, "perf_counter", lambda: clock.now)

    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            clock.now += 1.0
            return {"pixel_values": torch.zeros(3, 2, 2), "index": index, "label": -1}

    source = TrainingBatches(Slow(), 2, accelerator())
    clock.now += 50  # building the model
    batches = iter(source)
    next(batches)
    source.take_wait_share()
    for _ in range(4):
        next(batches)  # two seconds each
        clock.now += 6
    assert source.take_wait_share() == pytest.approx(0.25)
    next(batches)
    clock.now += 6
    assert source.take_wait_seconds() == pytest.approx(2)
    assert source.take_wait_share() == 0


def test_the_fingerprint_follows_the_data_and_not_their_place(make_source, tmp_path):
    first = make_source("rows").fingerprint()
    assert make_source("rows", source=write(tmp_path / "moved", BROKEN)).fingerprint() == first
    assert make_source("rows", source=write(tmp_path / "other", ())).fingerprint() != first
    assert make_source("stream").fingerprint() != first
