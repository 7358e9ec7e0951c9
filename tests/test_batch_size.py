"""Batches that do not fit: halved with the global batch kept, or one sentence that says what to set."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_aha.batch_size import (
    BatchDoesNotFitError,
    fitting_batch_size,
    memory_errors_explained,
    with_fitting_batch_size,
)
from hf_aha.training_args import AhaTrainingArguments


CUDA_ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Memory:
    """Room for so many images."""

    def __init__(self, room: int):
        self.room, self.tried = room, []

    def __call__(self, count: int) -> None:
        self.tried.append(count)
        if count > self.room:
            raise torch.OutOfMemoryError(CUDA_ERROR)


@pytest.mark.parametrize(("start", "room", "tried"), [(64, 64, [64]), (64, 20, [64, 32, 16]), (5, 1, [5, 2, 1])])
def test_the_batch_is_halved_until_it_fits(start, room, tried):
    memory = Memory(room)
    assert fitting_batch_size(memory, start, Accelerator(cpu=True)) == tried[-1]
    assert memory.tried == tried


def test_other_errors_are_passed_on():
    def broken(count: int) -> None:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4).")

    with pytest.raises(RuntimeError, match="must match"):
        fitting_batch_size(broken, 8, Accelerator(cpu=True))


def test_when_not_even_one_image_fits_one_sentence_says_what_to_set():
    memory = Memory(0)
    with pytest.raises(
        BatchDoesNotFitError, match="Not even one image a batch fits into the memory of this"
    ) as raised:
        fitting_batch_size(memory, 4, Accelerator(cpu=True))
    assert memory.tried == [4, 2, 1]
    assert "lower image_size or curve_points, or set gradient_checkpointing" in str(raised.value)


@pytest.mark.parametrize(
    ("size", "batches", "room", "found"),
    [(64, 1, 20, (16, 4)), (64, 2, 33, (32, 4)), (10, 1, 3, (2, 5)), (5, 3, 4, (2, 8))],
)
def test_the_images_of_a_step_are_kept_by_accumulation(size, batches, room, found):
    args = AhaTrainingArguments("run", per_device_batch_size=size, gradient_accumulation_steps=batches)
    with pytest.warns(UserWarning, match=f"training with per_device_batch_size={found[0]} and ") as warned:
        fitting = with_fitting_batch_size(args, Memory(room), Accelerator(cpu=True))
    assert (fitting.per_device_batch_size, fitting.gradient_accumulation_steps) == found
    assert f"a step holds {found[0] * found[1]} images a process, and {size * batches} were" in str(warned[0].message)
    assert 0 <= found[0] * found[1] - size * batches < found[0], "equal where halving leaves no rest"
    assert args.per_device_batch_size == size, "the caller's settings stay"


def test_a_batch_that_fits_is_left_alone(recwarn):
    args = AhaTrainingArguments("run", per_device_batch_size=8)
    assert with_fitting_batch_size(args, Memory(8), Accelerator(cpu=True)) is args
    assert not [w for w in recwarn if "fit" in str(w.message)]


@pytest.mark.parametrize("device", [CPU, torch.device("cuda:1")])
def test_a_memory_error_names_the_batch_and_the_settings(device):
    with pytest.raises(BatchDoesNotFitError) as raised, memory_errors_explained(64, 512, 7, device):
        raise torch.OutOfMemoryError(CUDA_ERROR)
    message = str(raised.value)
    assert "\n" not in message and "A batch of 64 images with 512 perturbed ones does not fit into" in message
    assert "(step 7); lower per_device_batch_size=64 and raise gradient_accumulation_steps as much, or" in message
    assert ("this machine" if device == CPU else "cuda:1") in message


def test_a_real_memory_error_of_the_cpu_is_one_too():
    with pytest.raises(BatchDoesNotFitError), memory_errors_explained(1, 1, 0, CPU):
        torch.empty(1 << 60)


def test_other_errors_of_a_step_stay_as_they_are():
    with pytest.raises(RuntimeError, match="^shapes$"), memory_errors_explained(1, 1, 0, CPU):
        raise RuntimeError("shapes")
