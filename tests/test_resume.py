"""Runs that are killed, stopped, starved of disk or fed with NaN: what they lose, and that they go on exactly."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import io
import json
import multiprocessing
import os
import resource
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import ViTImageProcessor

from hf_aha import AhaExplainer, files
from hf_aha.checkpoints import CheckpointError, verify_checkpoint, write_checkpoint
from hf_aha.data import Photographs, ProcessorCrop, RandomCrop
from hf_aha.run_folder import RunFolderError
from hf_aha.run_identity import check_same_run
from hf_aha.stop_signals import LostWorkerError, TrainingStopped
from hf_aha.trainer import AhaTrainer
from hf_aha.training_args import MAY_CHANGE_ON_RESUME, AhaTrainingArguments
from hf_aha.training_log import append_entries, read_whole_entries
from hf_aha.training_state import TrainingState


HALF = (0.5, 0.5, 0.5)
TIMES = ("images_per_second", "data_wait_share", "eta_seconds")
FORK = multiprocessing.get_context("fork") if os.name == "posix" else None
forked = pytest.mark.skipif(FORK is None, reason="the runs to be killed are forked")


def rows(count: int = 12, first: int = 0) -> datasets.Dataset:
    """Pictures of coarse blocks; two of them cannot be read."""
    cells = []
    for seed in range(first, first + count):
        blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
        buffer = io.BytesIO()
        Image.fromarray(blocks).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue()[: 60 if seed in (2, 7) else None], "path": None})
    return datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image(decode=False)}))


def fresh_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch):
    # The plot takes most of the time of a tiny run.
    monkeypatch.setattr("hf_aha.card_files.plot_training", lambda log, path: Image.new("RGB", (9, 9)).save(path))
    fresh_state()
    yield
    fresh_state()


def build_explainer(classifier, **sizes) -> AhaExplainer:
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    sizes = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8, **sizes}
    return AhaExplainer.from_classifier(classifier, image_processor=processor, **sizes)


@pytest.fixture
def explainer(make_classifier) -> AhaExplainer:
    return build_explainer(make_classifier())


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def make_trainer(tmp_path, explainer, run):
    """`make_trainer(**settings)`: a trainer in the run folder, always of the same fresh explainer."""
    fresh = copy.deepcopy(explainer)

    def make(folder=run, dataset=None, explainer=fresh, validation=False, **settings) -> AhaTrainer:
        fresh_state()
        torch.manual_seed(int(time.time()))  # the seed of the process must not matter
        settings = {
            "max_steps": 8,
            "per_device_batch_size": 4,
            "mixed_precision": "no",
            "dataloader_num_workers": 0,
            "log_steps": 1,
            "eval_steps": 3,
            "eval_images": 4,
            "save_steps": 2,
            "grid_range": [2, 4],
            "learning_rate": 0.01,
            "noise": 0.5,
            "target_classes": "sampled",
            "mosaic_share": 0.5,
            "references": ["noise", "blur"],
            "resume_from_checkpoint": "auto",
            **settings,
        }
        photographs = Photographs(dataset or rows(), "image", RandomCrop((32, 32), HALF, HALF))
        processor = ProcessorCrop(explainer.image_processor)
        measured = Photographs(rows(4, first=50), "image", processor) if validation else None
        args = AhaTrainingArguments(str(folder), **settings)
        return AhaTrainer(copy.deepcopy(explainer), args, photographs, measured)

    return make


@pytest.fixture(scope="module")
def _undisturbed(tmp_path_factory):
    return {}, tmp_path_factory


@pytest.fixture
def whole(_undisturbed, make_trainer):
    """`whole(**settings)`: the folder of an undisturbed run, trained once."""

    def train(**settings) -> Path:
        known, places = _undisturbed
        key = repr(sorted(settings.items()))
        if key not in known:
            known[key] = places.mktemp("whole")
            make_trainer(known[key], **settings).train()
        return known[key]

    return train


def assert_same(run: Path, whole: Path, log: bool = True) -> None:
    """Weights, averages, optimisers, random states and logs of two finished runs, bit for bit."""
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (run, whole)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    checkpoints = [sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (run, whole)]
    assert checkpoints[0] == checkpoints[1] != []
    for name in checkpoints[0]:
        for file in ("model.safetensors", "average.safetensors", "optimizer.pt", "process-0.pt"):
            assert (run / name / file).read_bytes() == (whole / name / file).read_bytes(), (name, file)
    if log:
        logs = [read_whole_entries(folder / "log.jsonl") for folder in (run, whole)]
        timeless = [[{k: v for k, v in entry.items() if k not in TIMES} for entry in entries] for entries in logs]
        assert timeless[0] == timeless[1]
    # Several processes may list a row twice.
    lists = [set((folder / "unreadable.jsonl").read_text().splitlines()) for folder in (run, whole)]
    assert lists[0] == lists[1]


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file but the lock."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.lock"
    }


def in_a_process(work, wait: bool = True):
    """Start `work` in a forked process."""

    def quiet() -> None:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            work()

    process = FORK.Process(target=quiet)
    process.start()
    if wait:
        process.join(60)
    return process


def stop_at(trainer: AhaTrainer, batch: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while the trainer works on its `batch`-th batch."""
    step, taken = trainer.training_step, 0

    def stopping(*args, **kwargs):
        nonlocal taken
        taken += 1
        if taken == batch:
            signal.raise_signal(number)
        return step(*args, **kwargs)

    trainer.training_step = stopping


# ---------------------------------------------------------------------------------------------- killed


@forked
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_killed_anywhere_goes_on_exactly(run, make_trainer, whole, workers):
    whole = whole()
    process = in_a_process(lambda: make_trainer(dataloader_num_workers=workers).train(), wait=False)
    while len(read_whole_entries(run / "log.jsonl")) < 4 and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (run / "final").exists()
    make_trainer(dataloader_num_workers=workers).train()
    assert_same(run, whole)


@forked
@pytest.mark.parametrize(("flushes", "resumed_from"), [(1, 0), (7, 0), (11, 2)])
def test_a_run_killed_within_a_save_goes_on_exactly(run, make_trainer, whole, monkeypatch, flushes, resumed_from):
    """A save flushes six files and their folder, then gives the folder its name."""
    whole = whole()

    def train_and_die() -> None:
        flush, done = files.flush_to_disk, 0

        def flush_or_die(path):
            nonlocal done
            done += "partial-checkpoint" in str(path)
            if done == flushes:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        monkeypatch.setattr(files, "flush_to_disk", flush_or_die)
        make_trainer().train()

    assert in_a_process(train_and_die).exitcode == -signal.SIGKILL
    assert any(run.glob("partial-checkpoint-*"))
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{resumed_from}"] * (resumed_from > 0)
    make_trainer().train()
    assert not any(run.glob("partial-*"))
    assert_same(run, whole)


def test_a_corrupt_newest_checkpoint_costs_only_the_way_from_the_one_before(run, make_trainer, whole):
    whole = whole(save_total_limit=3)
    stopped = make_trainer(save_total_limit=3)
    stop_at(stopped, 5)
    with pytest.raises(TrainingStopped):
        stopped.train()
    weights = run / "checkpoint-5" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="goes on from checkpoint-4, the newest whole .* because the file model"):
        make_trainer(save_total_limit=3).train()
    assert (run / "set-aside-checkpoint-5").is_dir()
    assert_same(run, whole)


# ---------------------------------------------------------------------------------------------- stopped by a signal


@pytest.mark.parametrize(
    ("number", "settings", "batch", "saved"),
    [
        (signal.SIGTERM, {}, 3, 3),
        (signal.SIGINT, {}, 4, 4),  # where a checkpoint is due anyway
        (signal.SIGTERM, {"gradient_accumulation_steps": 2, "max_steps": 4}, 3, 2),  # the step on its way is finished
        (signal.SIGTERM, {"validation": True}, 3, 3),  # a validation is due, and made up for later
    ],
)
def test_a_signal_saves_and_the_run_goes_on_exactly(run, make_trainer, whole, capsys, settings, batch, saved, number):
    whole = whole(**settings)
    stopped = make_trainer(**settings)
    stop_at(stopped, batch, number)
    with pytest.raises(TrainingStopped) as raised:
        stopped.train()
    assert raised.value.code == 0
    told = f"Stopped by {signal.Signals(number).name} at step {saved} of {stopped.args.max_steps}, with "
    assert str(raised.value).startswith(told) and str(raised.value) in capsys.readouterr().err
    assert f"checkpoint-{saved} saved; go on with --resume_from_checkpoint auto." in str(raised.value)
    verify_checkpoint(run / f"checkpoint-{saved}")
    assert not (run / "final").exists() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    make_trainer(**settings).train()
    assert_same(run, whole)


def test_a_signal_cuts_a_validation_short(run, make_trainer, whole):
    whole = whole(validation=True)
    stopped = make_trainer(validation=True)
    passes = 0

    def counting(*_):
        nonlocal passes
        passes += stopped.step == 3
        if passes == 2:  # the first gives the maps
            signal.raise_signal(signal.SIGTERM)

    stopped.classifier.model.register_forward_pre_hook(counting)
    with pytest.raises(TrainingStopped, match="at step 3"):
        stopped.train()
    assert passes == 2, "a validation of these settings takes many passes"
    assert not any("validation/blur/deletion" in entry for entry in read_whole_entries(run / "log.jsonl"))
    make_trainer(validation=True).train()
    assert_same(run, whole)


def test_a_signal_at_the_last_step_still_finishes(run, make_trainer, whole):
    whole = whole()
    trainer = make_trainer()
    stop_at(trainer, 8)
    trainer.train()
    assert_same(run, whole)


@forked
def test_a_stopped_process_ends_well_and_in_time(run, make_trainer):
    def train() -> None:
        os.setpgrp()
        make_trainer(max_steps=10_000, dataloader_num_workers=1).train()

    process = in_a_process(train, wait=False)
    while len(read_whole_entries(run / "log.jsonl")) < 3:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # also to the process that reads the data
    process.join(30)
    assert process.exitcode == 0
    assert any(run.glob("checkpoint-*")) and not (run / "final").exists()


# ---------------------------------------------------------------------------------------------- refused


def started(make_trainer, **settings) -> None:
    """A run stopped at step 3."""
    trainer = make_trainer(**settings)
    stop_at(trainer, 3)
    with pytest.raises(TrainingStopped):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"learning_rate": 0.02, "noise": 0.25},
            r"The settings have changed since the checkpoint .*checkpoint-3 \(learning_rate: 0.01 then, 0.02 now; "
            "noise: 0.5 then, 0.25 now\\); go back to what was, or choose another output_dir",
        ),
        ({"per_device_batch_size": 2}, "per_device_batch_size: 4 then, 2 now"),
        (
            {"dataset": rows(13)},
            r"The dataset has .*checkpoint-3 \(rows: 12 then, 13 now; fingerprint: ",
        ),
        ({"dataset": rows(12, first=1)}, r"The dataset has changed since .*checkpoint-3 \(fingerprint: "),
        ({"max_steps": 3}, "stands at step 3, so max_steps=3 leaves nothing to train; raise max_steps"),
        ({"resume_from_checkpoint": None}, "holds checkpoint-3 of another run; resume it with"),
        ({"resume_from_checkpoint": "nowhere"}, "The checkpoint nowhere does not exist; use 'auto'"),
    ],
)
def test_another_run_is_refused_and_nothing_is_overwritten(run, make_trainer, settings, told):
    started(make_trainer)
    before = contents(run)
    with pytest.raises((CheckpointError, FileExistsError, FileNotFoundError), match=told) as raised:
        make_trainer(**settings).train()
    assert "\n" not in str(raised.value)
    assert contents(run) == before


def test_another_classifier_or_decoder_is_refused(run, make_trainer, make_classifier):
    started(make_trainer)
    before = contents(run)
    other = build_explainer(make_classifier(seed=1))
    with pytest.raises(CheckpointError, match=r"belongs to another classifier \(fingerprint distance \d"):
        make_trainer(explainer=other).train()
    other = build_explainer(make_classifier(), grid_width=24)
    with pytest.raises(CheckpointError, match=r"The decoder has changed since .* \(grid_width: 16 then, 24 now\)"):
        make_trainer(explainer=other).train()
    rounded = build_explainer(make_classifier())
    rounded.classifier.model.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"The classifier or its encoder has .*: float32 then, bfloat16 now"):
        make_trainer(explainer=rounded).train()
    assert contents(run) == before


@pytest.mark.parametrize(("then", "now", "told"), [(2, 1, "2 processes, but this run has 1"), (1, 4, "1 process, b")])
def test_another_number_of_processes_is_refused(run, make_trainer, then, now, told):
    started(make_trainer)
    identity = json.loads((run / "checkpoint-3" / "state.json").read_text())["common"]["run"]
    with pytest.raises(
        CheckpointError, match=rf"written by {told}.*; start as many \(torchrun --nproc_per_node {then}"
    ):
        check_same_run(run / "checkpoint-3", {**identity, "processes": then}, {**identity, "processes": now})


def test_what_does_not_change_the_weights_may_change(run, make_trainer, whole, tmp_path):
    whole = whole()
    started(make_trainer)
    changes = {"log_steps": 4, "save_steps": 4, "save_total_limit": 7, "max_unreadable": 7, "max_nonfinite_steps": 3}
    changes |= {"dataloader_num_workers": 1, "eval_images": 2, "eval_references": ["black"]}
    assert set(changes) < set(MAY_CHANGE_ON_RESUME)
    moved = run.rename(tmp_path / "moved")
    make_trainer(moved, validation=True, **changes).train()
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (moved, whole)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_more_steps_are_a_warning(run, make_trainer):
    started(make_trainer)
    with pytest.warns(UserWarning, match="max_steps was 8 and is 10 now: learning rate and temperature follow"):
        make_trainer(max_steps=10).train()
    rates = [entry["learning_rate"] for entry in read_whole_entries(run / "log.jsonl")]
    assert len(rates) == 10 and rates[8] > rates[9] == 0


def test_a_run_folder_in_use_is_refused(run, make_trainer):
    first = make_trainer()
    step = first.training_step

    def starting_another(*args, **kwargs):
        first.training_step = step
        with pytest.raises(RunFolderError, match=rf"in use by another process \(pid {os.getpid()} on "):
            make_trainer().train()
        return step(*args, **kwargs)

    first.training_step = starting_another
    first.train()
    assert (run / "final").is_dir() and not (run / "run.pid").exists()


def test_a_checkpoint_with_code_in_it_is_not_loaded(run, make_trainer, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    started(make_trainer)
    folder = run / "checkpoint-3"
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    buffer = io.BytesIO()
    torch.save({"random": Evil()}, buffer)
    write_checkpoint(folder, {**content, "process-0.pt": buffer.getvalue()})
    with pytest.raises(CheckpointError, match="process-0.pt is none of ours: it holds more than tensors"):
        make_trainer().train()
    assert not (tmp_path / "touched").exists()


# ---------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(name)`: no file of that name can be written from then on, until it is called with None."""
    place = [None]
    write_bytes, save = Path.write_bytes, AhaExplainer.save_pretrained

    def full(path, data):
        if path.name == place[0]:
            write_bytes(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    def full_save(explainer, folder, *args, **kwargs):
        if place[0] == "final":
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(explainer, folder, *args, **kwargs)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(AhaExplainer, "save_pretrained", full_save)
    return lambda name: place.__setitem__(0, name)


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(run, make_trainer, whole, full_disk):
    whole = whole(save_total_limit=1)
    trainer = make_trainer(save_total_limit=1)
    step = trainer.training_step

    def filling(*args, **kwargs):
        full_disk("optimizer.pt" if trainer.step in (3, 4) else None)
        return step(*args, **kwargs)

    trainer.training_step = filling
    told = r"checkpoint-4 could not be written \(No space left on device\); checkpoint-2 is still there, and the trai"
    with pytest.warns(UserWarning, match=told):
        trainer.train()
    assert_same(run, whole)


def test_a_full_disk_at_the_end_says_where_and_loses_little(run, make_trainer, whole, full_disk):
    whole = whole()
    full_disk("final")
    told = r"could not be written to .*run/final \(\[Errno 28\] No space left on device\); make room, then take the"
    with pytest.raises(OSError, match=told):
        make_trainer().train()
    assert not (run / "final").exists() and not any(run.glob("partial-*"))
    full_disk(None)
    make_trainer().train()
    assert_same(run, whole)


def test_a_full_disk_after_a_signal_is_an_error(run, make_trainer, full_disk):
    trainer = make_trainer(save_steps=100)
    stop_at(trainer, 3)
    full_disk("state.json")
    with pytest.raises(OSError, match="checkpoint-3 could not be written .*; there is no earlier one, and the run"):
        trainer.train()
    assert not any(run.glob("*checkpoint*"))


@forked
def test_lines_of_the_log_are_whole_or_absent(tmp_path):
    """A real limit: a write beyond it is cut, the next one fails."""
    log = tmp_path / "log.jsonl"
    append_entries(log, [{"step": 1, "text": "a" * 50}])
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard[1]))
    try:
        with pytest.warns(UserWarning, match=r"A line of .*log.jsonl could not be written \(File too large\)"):
            append_entries(log, [{"step": 2, "text": "b" * 50}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, hard)
    append_entries(log, [{"step": 3}])
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 3]
    log.write_bytes(log.read_bytes() + b'\x00\x00{"step": 4, "lo')
    assert [entry["step"] for entry in read_whole_entries(log)] == [1, 3]


# ---------------------------------------------------------------------------------------------- lost and poisoned


class KillsItsReader(Photographs):
    """Row 5 of the second epoch ends the process that reads it."""

    def __getitem__(self, index):
        if index == 5 and self.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_lost_worker_is_one_sentence_and_the_checkpoint_is_whole(run, make_trainer, whole):
    whole = whole()
    trainer = make_trainer(dataloader_num_workers=1, save_steps=1, save_total_limit=1)
    trainer.source.feed.loader.dataset.__class__ = KillsItsReader
    told = r"A process that reads the data was lost \(DataLoader worker .*go on with resume_from_checkpoint='auto'"
    with pytest.raises(LostWorkerError, match=told) as raised:
        trainer.train()
    assert "\n" not in str(raised.value)
    make_trainer().train()
    assert_same(run, whole, log=False)


def poison(trainer: AhaTrainer, calls: set[int]) -> None:
    """Infinite logits in these calls of the classifier on perturbed images, from 1."""
    logits_of, called = trainer._logits_of, 0

    def poisoned(pixels):
        nonlocal called
        called += 1
        return logits_of(pixels) + (float("inf") if called in calls else 0.0)

    trainer._logits_of = poisoned


@pytest.mark.parametrize(
    ("settings", "calls", "steps"),
    [({}, {3, 4}, (2, 3)), ({"gradient_accumulation_steps": 2}, {6}, (2,))],  # one half of a step spoils it
)
def test_a_step_with_nan_changes_nothing(run, make_trainer, settings, calls, steps):
    trainer = make_trainer(max_steps=6, save_steps=3, **settings)
    poison(trainer, calls)
    states = []
    step = trainer.training_step

    def recording(*args, **kwargs):
        output = step(*args, **kwargs)
        if trainer.accelerator.sync_gradients:
            optimizer = trainer.optimizer.state_dict()["state"]
            flat = {f"{key}/{name}": value for key, part in optimizer.items() for name, value in part.items()}
            states.append(copy.deepcopy((trainer.decoder.state_dict(), trainer.average.state_dict(), flat)))
        return output

    trainer.training_step = recording
    with pytest.warns(UserWarning, match=f"Step {steps[-1]} is left out because of NaN or infinity in the loss"):
        trainer.train()
    for number in range(1, 6):
        changed = [
            any(not torch.equal(value, before[name]) for name, value in after.items())
            for after, before in zip(states[number], states[number - 1], strict=True)
        ]
        assert changed == [number not in steps] * 3, number
    log = read_whole_entries(run / "log.jsonl")
    assert [entry["step"] for entry in log] == [n + 1 for n in range(6) if n not in steps]
    assert all(np.isfinite(value) for entry in log for value in entry.values())
    assert log[-1]["skipped_steps"] == len(steps)
    training = json.loads((run / "final" / "config.json").read_text())["training"]
    assert training["skipped_steps"] == len(steps) and training["steps"] == 6


def test_a_first_step_with_nan_leaves_the_weights_as_they_began(make_trainer):
    trainer = make_trainer()
    before = copy.deepcopy(trainer.decoder.state_dict())
    with torch.no_grad():
        next(trainer.decoder.parameters()).fill_(float("nan"))
    batch = next(iter(trainer.source))
    poisoned = copy.deepcopy(trainer.decoder.state_dict())
    with pytest.warns(UserWarning, match="Step 0 is left out because of NaN or infinity in the scores"):
        trainer.training_step(batch.pixel_values, batch.labels, batch.indices)
    after = trainer.decoder.state_dict()
    assert all(torch.equal(value.nan_to_num(), poisoned[name].nan_to_num()) for name, value in after.items())
    assert before.keys() == after.keys() and not trainer.optimizer.state_dict()["state"]


def test_the_count_of_steps_in_a_row_survives_a_resume(run, make_trainer):
    trainer = make_trainer(max_nonfinite_steps=4)
    poison(trainer, {3, 4, 5, 6})
    stop_at(trainer, 4)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(TrainingStopped, match="at step 4"):
        trainer.train()
    resumed = make_trainer(max_nonfinite_steps=4)
    poison(resumed, {1, 2})
    with pytest.warns(UserWarning, match=r"\(3 in a row, 3 in all"):
        with pytest.raises(FloatingPointError, match="at step 5, the last of 4 such steps in a row"):
            resumed.train()


# ---------------------------------------------------------------------------------------------- sharded state


class Engine(nn.Module):
    """Stands in for DeepSpeed's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def save_checkpoint(self, folder, tag):
        place = Path(folder) / tag
        place.mkdir(parents=True)
        torch.save(self.module.state_dict(), place / "engine.pt")

    def load_checkpoint(self, folder, tag):
        self.module.load_state_dict(torch.load(Path(folder) / tag / "engine.pt"))


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_every_kind_of_state_comes_back(tmp_path, kind):
    """Without shards to gather, but by the calls that gather them."""

    def build():
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        average = torch.optim.swa_utils.AveragedModel(module)
        prepared = Engine(module) if kind == DistributedType.DEEPSPEED else module
        accelerator = SimpleNamespace(
            distributed_type=kind, device=torch.device("cpu"), scaler=None, is_main_process=True, process_index=0
        )
        accelerator.wait_for_everyone = lambda: None
        accelerator.get_state_dict = lambda engine: engine.module.state_dict()
        wrapped = SimpleNamespace(
            optimizer=optimizer, state_dict=optimizer.state_dict, load_state_dict=optimizer.load_state_dict
        )
        return module, optimizer, schedule, TrainingState(accelerator, module, prepared, wrapped, schedule, average)

    def take_step(module, optimizer, schedule, state):
        optimizer.zero_grad()
        module(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
        state.average.update_parameters(module)
        return [p.detach().clone() for p in (*module.parameters(), *state.average.parameters())]

    first = build()
    for _ in range(2):
        take_step(*first)
    collected = first[-1].collect({"step": 2}, {"images": 8})
    engine = first[-1].save_engine(tmp_path / "partial-engine")
    folder = write_checkpoint(tmp_path / "checkpoint-2", collected, {"engine": engine} if engine else {})
    expected = take_step(*first)
    second = build()
    assert second[-1].restore(folder) == {"images": 8}
    assert second[2].last_epoch == 2
    if kind == DistributedType.DEEPSPEED:  # whose optimiser the stand-in does not hold
        assert not (folder / "optimizer.pt").exists() and (folder / "engine" / "state" / "engine.pt").is_file()
        return
    assert all(torch.equal(a, b) for a, b in zip(take_step(*second), expected, strict=True))


# ---------------------------------------------------------------------------------------------- two processes


def in_two_processes(work) -> list[int]:
    """Run `work(rank)` in two forked processes of one group; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def process(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE="2")
        work(rank)

    processes = [FORK.Process(target=process, args=(rank,)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
    return [each.exitcode for each in processes]


@forked
@pytest.mark.slow
def test_two_processes_stop_together_skip_together_and_go_on_exactly(run, tmp_path, make_trainer):
    def undisturbed(rank):
        trainer = make_trainer(tmp_path / "whole", max_steps=6)
        if rank == 1:
            poison(trainer, {2})
        trainer.train()

    def interrupted(rank):
        trainer = make_trainer(max_steps=6)
        if rank == 1:
            poison(trainer, {2})
            stop_at(trainer, 4)
        trainer.train()

    assert in_two_processes(undisturbed) == [0, 0]
    assert in_two_processes(interrupted) == [0, 0]
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    own = [(run / "checkpoint-4" / f"process-{rank}.pt").read_bytes() for rank in range(2)]
    assert own[0] != own[1], "random states of its own"
    assert in_two_processes(lambda rank: make_trainer(max_steps=6).train()) == [0, 0]
    assert_same(run, tmp_path / "whole")
    log = read_whole_entries(run / "log.jsonl")
    assert [entry["step"] for entry in log] == [1, 3, 4, 5, 6] and log[-1]["skipped_steps"] == 1
    with pytest.raises(CheckpointError, match="written by 2 processes, but this run has 1"):
        make_trainer(max_steps=6).train()


@forked
@pytest.mark.slow
def test_weights_and_optimiser_sharded_by_fsdp_are_saved_whole_and_come_back(tmp_path):
    def work(rank):
        accelerator = Accelerator()
        kind = SimpleNamespace(distributed_type=DistributedType.FSDP, device=accelerator.device, scaler=None)
        kind.is_main_process, kind.process_index = accelerator.is_main_process, rank

        def build(seed):
            torch.manual_seed(seed)
            module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
            whole = copy.deepcopy(module)
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
            optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
            wrapped = SimpleNamespace(optimizer=optimizer)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            return module, whole, optimizer, TrainingState(kind, whole, module, wrapped, schedule)

        def take_step(module, whole, optimizer, _):
            optimizer.zero_grad()
            module(torch.full((2, 3), 1.0 + rank)).square().sum().backward()
            optimizer.step()
            for copied, shard in zip(whole.parameters(), module.parameters(), strict=True):
                copied.data.copy_(shard.full_tensor())

        first = build(seed=0)
        take_step(*first)
        collected = first[-1].collect({"step": 1}, {"rank": rank})
        assert bool(collected) == (rank == 0)
        if rank == 0:
            write_checkpoint(tmp_path / "checkpoint-1", collected)
            saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
            assert {name: tuple(value.shape) for name, value in saved.items()} == {
                name: tuple(value.shape) for name, value in first[1].state_dict().items()
            }
        accelerator.wait_for_everyone()
        take_step(*first)
        second = build(seed=1)
        assert second[-1].restore(tmp_path / "checkpoint-1") == {"rank": rank}
        take_step(*second)
        for one, other in zip(first[1].parameters(), second[1].parameters(), strict=True):
            assert torch.equal(one, other)

    assert in_two_processes(work) == [0, 0]
