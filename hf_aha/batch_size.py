"""Batches that do not fit into memory: found before the training begins, or explained when it meets one."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size

from .training_args import AhaTrainingArguments


class BatchDoesNotFitError(RuntimeError):
    """A batch needs more memory than there is."""


def fitting_batch_size(attempt: Callable[[int], None], start: int, accelerator: Accelerator) -> int:
    """The largest of `start`, `start // 2`, ... images for which `attempt` does not run out of memory.

    With several processes it is the least that any of them finds, so that all of them take it; `attempt` must not
    wait for the other processes.

    Args:
        attempt: does the work of one batch of that many images.
        start: images to begin with.
        accelerator: of the run.

    Raises:
        BatchDoesNotFitError: not even one image fits, on some process.

    Example:
        `fitting_batch_size(lambda images: model(pixels[:images]).sum().backward(), 64, accelerator)`
    """
    size = start

    def halve() -> int:
        nonlocal size
        size //= 2
        return size

    @find_executable_batch_size(starting_batch_size=start, reduce_batch_size_fn=halve)
    def try_batches(batch_size: int) -> None:
        attempt(batch_size)

    try:
        try_batches()
    except RuntimeError:
        if size > 0:
            raise
        # No batch fits this process. It still tells the others, which wait for its answer below.
    found = int(accelerator.gather(torch.tensor([size], device=accelerator.device)).min())
    if found == 0:
        raise BatchDoesNotFitError(
            f"Not even one image a batch fits into the memory of {_name(accelerator.device)}; lower image_size or "
            "curve_points, or set gradient_checkpointing to true."
        )
    return found


def with_fitting_batch_size(
    args: AhaTrainingArguments, attempt: Callable[[int], None], accelerator: Accelerator
) -> AhaTrainingArguments:
    """The settings with a batch that fits into memory; as many more batches are accumulated as it is smaller.

    A step then holds as many images as before, or, where halving leaves a rest, up to a batch more; a warning of the
    main process says which.

    Args:
        args: settings of the run.
        attempt, accelerator: as in `fitting_batch_size`.

    Raises:
        BatchDoesNotFitError: not even one image fits.
    """
    size, batches = args.per_device_batch_size, args.gradient_accumulation_steps
    found = fitting_batch_size(attempt, size, accelerator)
    if found == size:
        return args
    more = math.ceil(size * batches / found)
    if accelerator.is_main_process:
        warnings.warn(
            f"{size} images do not fit into memory: training with per_device_batch_size={found} and "
            f"gradient_accumulation_steps={more}, so that a step holds {found * more} images a process, and "
            f"{size * batches} were asked for.",
            UserWarning,
            stacklevel=3,
        )
    return replace(args, per_device_batch_size=found, gradient_accumulation_steps=more)


@contextlib.contextmanager
def memory_errors_explained(batch_size: int, perturbed: int, step: int, device: torch.device) -> Iterator[None]:
    """Raise an out-of-memory error of the body again as one sentence that says what to set.

    Args:
        batch_size: images of the batch.
        perturbed: perturbed images of the batch.
        step: optimiser step, from 0.
        device: of the run.

    Raises:
        BatchDoesNotFitError: the body ran out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise BatchDoesNotFitError(
            f"A batch of {batch_size} images with {perturbed} perturbed ones does not fit into the memory of "
            f"{_name(device)} (step {step}); lower per_device_batch_size={batch_size} and raise "
            "gradient_accumulation_steps as much, or set auto_find_batch_size or gradient_checkpointing to true."
        ) from error


def _name(device: torch.device) -> str:
    return "this machine" if device.type == "cpu" else str(device)


__all__ = ["BatchDoesNotFitError", "fitting_batch_size", "memory_errors_explained", "with_fitting_batch_size"]
