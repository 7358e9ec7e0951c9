"""Everything a training step changes, as the files of a checkpoint and back."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from .checkpoints import CheckpointError


WEIGHTS, AVERAGE, OPTIMIZER, STATE = "model.safetensors", "average.safetensors", "optimizer.pt", "state.json"
ENGINE = "engine"


@dataclass
class TrainingState:
    """Reads and writes what a run needs to go on exactly where it stood.

    | file | holds |
    |---|---|
    | `model.safetensors` | the decoder's weights, in full also where they are sharded |
    | `average.safetensors` | their average, where there is one |
    | `optimizer.pt` | the state of the optimiser |
    | `process-N.pt` | of process N: its random states and what the trainer adds, such as its place in the data |
    | `state.json` | the step, the schedule, the gradient scaler, and what the trainer adds |

    The `.pt` files are read with `weights_only=True`, which runs no code. The exception is DeepSpeed, whose engine
    owns the optimiser and writes a folder `engine/` of its own, with pickles, in the place of `optimizer.pt`.

    Args:
        accelerator: of the run.
        whole: the decoder in one piece: itself, or where it is sharded a copy that follows it.
        prepared: the decoder as Accelerate prepared it.
        optimizer, schedule: of the decoder.
        average: its averaged weights, or None.

    Example:
        `TrainingState(accelerator, whole, prepared, optimizer, schedule, average).collect({"step": 3}, {})`
    """

    accelerator: Accelerator
    whole: nn.Module
    prepared: nn.Module
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    average: AveragedModel | None = None

    def collect(self, common: Mapping[str, object], own: Mapping[str, object]) -> dict[str, bytes]:
        """The files of a checkpoint, as name -> content, on the main process; nothing on the others.

        Every process must call it: weights may be sharded, and every process has random states of its own.

        Args:
            common: the same on every process; becomes part of `state.json`.
            own: of this process: tensors and plain Python.
        """
        optimizer = {} if self._engine else {OPTIMIZER: self._optimizer_state()}
        # To the main process, which writes: the folder then either holds all of a step or nothing.
        processes = gather_object([_saved({"random": random_states(self.accelerator.device), "own": dict(own)})])
        if not self.accelerator.is_main_process:
            return {}
        scaler = self.accelerator.scaler
        state = {
            "common": dict(common),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "averaged": None if self.average is None else int(self.average.n_averaged),
        }
        files = {WEIGHTS: _weights(self.whole)}
        if self.average is not None:
            files[AVERAGE] = _weights(self.average.module)
        files |= {name: _saved(content) for name, content in optimizer.items()}
        files |= {_process_file(index): content for index, content in enumerate(processes)}
        # Last, as it is what a reader opens first.
        return {**files, STATE: json.dumps(state, indent=2).encode()}

    def save_engine(self, folder: Path) -> Path | None:
        """Let DeepSpeed's engine write its state to `folder`; every process must call it. None without DeepSpeed."""
        if not self._engine:
            return None
        self.prepared.save_checkpoint(str(folder), tag=_ENGINE_TAG)
        self.accelerator.wait_for_everyone()
        return folder

    def restore(self, folder: Path) -> dict[str, object]:
        """Load a verified checkpoint into decoder, average, optimiser, schedule and random states.

        Returns:
            what `collect` got as `own` from this process.
        """
        state = read_state(folder)
        weights = safetensors.torch.load_file(folder / WEIGHTS)
        if self._engine:
            self.prepared.load_checkpoint(str(folder / ENGINE), tag=_ENGINE_TAG)
        elif self._sharded:
            set_model_state_dict(self.prepared, weights, options=_FULL)
            state_dict = _loaded(folder / OPTIMIZER)
            set_optimizer_state_dict(self.prepared, self.optimizer.optimizer, state_dict, options=_FULL)
        else:
            self.whole.load_state_dict(weights)
            self.optimizer.load_state_dict(_loaded(folder / OPTIMIZER))
        if self.average is not None:
            self.average.module.load_state_dict(safetensors.torch.load_file(folder / AVERAGE))
            self.average.n_averaged.fill_(state["averaged"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        process = _loaded(folder / _process_file(self.accelerator.process_index))
        set_random_states(process["random"], self.accelerator.device)
        return process["own"]

    @property
    def _sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def _engine(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _optimizer_state(self) -> dict[str, object]:
        if self._sharded:
            return get_optimizer_state_dict(self.prepared, self.optimizer.optimizer, options=_FULL)
        return self.optimizer.state_dict()


def read_state(folder: Path) -> dict[str, object]:
    """`state.json` of a verified checkpoint; what the trainer added stands under `"common"`."""
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def random_states(device: torch.device) -> dict[str, object]:
    """States of the generators of Python, NumPy, torch and the accelerator, as plain Python and tensors.

    Example:
        >>> before = random_states(torch.device("cpu"))
        >>> first = torch.rand(3)
        >>> set_random_states(before, torch.device("cpu"))
        >>> torch.equal(torch.rand(3), first)
        True
    """
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    states = {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {"key": key, "pos": int(numpy_state["state"]["pos"])}},
        "torch": torch.get_rng_state(),
    }
    if device.type in _WITH_RANDOM_STATE:
        states[device.type] = torch.get_device_module(device.type).get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, object], device: torch.device) -> None:
    """Restore what `random_states` gave; a device that had no state keeps its own."""
    random.setstate(states["python"])
    inner = states["numpy"]["state"]
    key = inner["key"].numpy().astype(np.uint32)
    np.random.set_state({**states["numpy"], "state": {"key": key, "pos": inner["pos"]}})
    torch.set_rng_state(states["torch"])
    if device.type in _WITH_RANDOM_STATE and device.type in states:
        torch.get_device_module(device.type).set_rng_state(states[device.type], device)


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_ENGINE_TAG = "state"
_WITH_RANDOM_STATE = ("cuda", "xpu")


def _weights(module: nn.Module) -> bytes:
    return safetensors.torch.save({name: value.cpu().contiguous() for name, value in module.state_dict().items()})


def _process_file(index: int) -> str:
    return f"process-{index}.pt"


def _saved(content: object) -> bytes:
    # In memory first, so that a full disk is an OSError of ours and no error of torch's writer.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _loaded(path: Path) -> dict[str, object]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"The file {path} is none of ours: it holds more than tensors and plain Python, and was not loaded."
        ) from error


__all__ = ["ENGINE", "TrainingState", "random_states", "read_state", "set_random_states"]
