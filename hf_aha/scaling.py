"""A training run on Accelerate: one process or many, with the decoder whole, replicated or sharded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from .tracking import TRACKING_FOLDER
from .training_args import AhaTrainingArguments


def make_accelerator(args: AhaTrainingArguments, trackers: Sequence[GeneralTracker] = ()) -> Accelerator:
    """The engine of a run; how many processes and which kind of them, it learns from its launcher.

    Args:
        args: settings of the run.
        trackers: besides those that `report_to` names.

    Raises:
        ValueError: the launcher asks for version 1 of FSDP.
    """
    accelerator = Accelerator(
        # Every optimiser step takes the same number of batches, also across the end of an epoch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=args.mixed_precision,
        # The order of the rows then depends on the seed and the epoch alone, so that a resumed run sees it again.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with=[*(args.report_to or ()), *trackers] or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / TRACKING_FOLDER)
        ),
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise ValueError(
                "Version 1 of FSDP is not supported; set fsdp_version to 2 in the configuration, as in "
                "recipes/accelerate/fsdp.yaml."
            )
        # Autocast chooses the precision, as everywhere. FSDP's own policy would round the scores to it, and thousands
        # of pixels would tie.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator


def settle_batches(accelerator: Accelerator, args: AhaTrainingArguments) -> None:
    """Tell the engine what a step holds, before anything is prepared: DeepSpeed's wants to know it."""
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=args.per_device_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_clipping=args.max_grad_norm,
        )


class WholeDecoder:
    """The decoder in one piece, to be averaged, validated and saved on any process.

    On one process, and replicated by DDP, it is the decoder itself. FSDP shards the decoder it is given and DeepSpeed
    casts or shards it; beside them stands a copy in full precision that follows it.

    Args:
        accelerator: of the run.
        decoder: on its device, before Accelerate prepares it.

    Attributes:
        module: the decoder in one piece.

    Example:

    ```python
    whole = WholeDecoder(accelerator, decoder)
    prepared, optimizer = accelerator.prepare(decoder, optimizer)
    ...  # a step of the optimiser
    whole.update()
    ```
    """

    def __init__(self, accelerator: Accelerator, decoder: nn.Module):
        self.decoder = self.module = decoder
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            for parameter in decoder.parameters():  # DDP does the same
                broadcast(parameter.data)
            self.module = copy.deepcopy(decoder)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the decoder; every process must call it."""
        if self.module is self.decoder:
            return
        for whole, parameter in zip(self.module.parameters(), self.decoder.parameters(), strict=True):
            if hasattr(parameter, "ds_id"):  # stage 3 of DeepSpeed
                import deepspeed

                with deepspeed.zero.GatheredParameters(parameter):
                    whole.copy_(parameter)
            else:
                whole.copy_(whole_tensor(parameter))


def whole_tensor(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that FSDP has sharded (every process must call it); anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


__all__ = ["WholeDecoder", "make_accelerator", "settle_batches", "whole_tensor"]
