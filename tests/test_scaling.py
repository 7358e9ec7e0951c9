"""The settings for memory and speed, through the whole trainer: what they change, and that they change no result."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from test_trainer import arguments, explainer, make_photographs, read_log  # noqa: F401 (fixtures)

from hf_aha.batch_size import BatchDoesNotFitError
from hf_aha.differentiable_passes import DifferentiablePasses
from hf_aha.trainer import AhaTrainer


@pytest.fixture(autouse=True)
def _fresh_state(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train(tmp_path, explainer, make_photographs, monkeypatch):  # noqa: F811
    """`train(name, **settings)`: final weights of a short run of the same explainer in the folder `name`."""
    monkeypatch.setattr(AhaTrainer, "_finish", lambda self: None)  # no card

    def run(name: str, **changes: object) -> dict[str, torch.Tensor]:
        AcceleratorState._reset_state(reset_partial_state=True)
        fresh = copy.deepcopy(explainer)
        args = arguments(tmp_path / name, **{"max_steps": 3, "log_steps": 1, "ema_decay": 0.0, **changes})
        AhaTrainer(fresh, args, make_photographs()).train()
        return fresh.decoder.state_dict()

    return run


def room_for(monkeypatch, images: int) -> list[int]:
    """Let the classifier's perturbed passes run out of memory beyond so many images; gives what was tried."""
    tried, passes = [], DifferentiablePasses.__call__

    def limited(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tried.append(len(pixel_values))
        if len(pixel_values) > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return passes(self, pixel_values)

    monkeypatch.setattr(DifferentiablePasses, "__call__", limited)
    return tried


def test_gradient_checkpointing_changes_no_bit_of_a_run(train):
    plain, saving = train("plain"), train("saving", gradient_checkpointing=True)
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_compiled_passes_train_alike(train, tmp_path):
    train("plain"), train("compiled", torch_compile=True, torch_compile_backend="eager")
    logs = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("plain", "compiled")]
    assert logs[0] == pytest.approx(logs[1], abs=2e-4)


def test_a_smaller_batch_is_found_and_trains_like_the_one_asked_for(train, tmp_path, monkeypatch):
    asked = train("asked")
    tried = room_for(monkeypatch, images=2 * 8)  # of 8 perturbed images each
    with pytest.warns(UserWarning, match="per_device_batch_size=2 and gradient_accumulation_steps=4, so that a step"):
        found = train("found", auto_find_batch_size=True)
    assert tried[:2] == [64, 32], "8 photographs, then 4"
    assert set(tried[2:]) == {16}
    settings = yaml.safe_load((tmp_path / "found" / "config.yaml").read_text())
    assert (settings["per_device_batch_size"], settings["gradient_accumulation_steps"]) == (2, 4)
    # Rows and draws of a step are the same, so that only rounding differs.
    logs = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("asked", "found")]
    assert logs[0] == pytest.approx(logs[1], abs=3e-4)
    assert asked.keys() == found.keys()


def test_finding_a_batch_size_changes_nothing_where_all_of_it_fits(train):
    plain, found = train("plain"), train("found", auto_find_batch_size=True, mosaic_share=0.0)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_a_batch_that_does_not_fit_is_one_sentence(train, tmp_path, monkeypatch):
    room_for(monkeypatch, images=8)
    with pytest.raises(
        BatchDoesNotFitError, match="A batch of 8 images with 64 perturbed ones does not fit"
    ) as raised:
        train("run")
    assert "lower per_device_batch_size=8" in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run" / "final").exists()


def test_no_batch_at_all_is_one_sentence_before_anything_is_written(train, tmp_path, monkeypatch):
    room_for(monkeypatch, images=0)
    with pytest.raises(BatchDoesNotFitError, match="Not even one image a batch fits"):
        train("run", auto_find_batch_size=True)
    assert not (tmp_path / "run").exists()
