"""The classifier's passes on perturbed images: where a training step spends its time and its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .classifier_aha import FrozenClassifier


class DifferentiablePasses:
    """Logits of perturbed images with a gradient to their pixels, as (N, 3, H, W) -> (N, C).

    Args:
        classifier: frozen, in evaluation mode.
        autocast: makes the context that the passes run in (`accelerator.autocast`).
        gradient_checkpointing: keep only what enters each block and compute the rest again in the backward pass: one
            forward pass more for a fraction of the memory; the same numbers.
        compile_backend: of `torch.compile`, or None to leave the model as it is. The first pass compiles, which takes
            minutes for large models.

    Raises:
        ValueError: the classifier's class cannot checkpoint, or there is no such backend.

    Example:
        `DifferentiablePasses(explainer.classifier, accelerator.autocast, gradient_checkpointing=True)(pixel_values)`
    """

    def __init__(
        self,
        classifier: FrozenClassifier,
        autocast: Callable[[], contextlib.AbstractContextManager[None]],
        *,
        gradient_checkpointing: bool = False,
        compile_backend: str | None = None,
    ):
        self.autocast = autocast
        self.checkpointed_model = None
        if gradient_checkpointing:
            enable_checkpointing(classifier.model)
            self.checkpointed_model = classifier.model
        self.classifier: nn.Module = classifier
        if compile_backend is not None:
            known = torch.compiler.list_backends(exclude_tags=())
            if compile_backend not in known:
                raise ValueError(
                    f"torch_compile_backend must be one of {', '.join(known)}, but it is {compile_backend!r}."
                )
            self.classifier = torch.compile(classifier, backend=compile_backend)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        model = self.checkpointed_model
        with self.autocast(), contextlib.nullcontext() if model is None else checkpointed(model):
            return self.classifier(pixel_values).logits


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Let the blocks of a model of transformers checkpoint; they do so in training mode, or in `checkpointed`.

    Raises:
        ValueError: the model's class has no blocks that can.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(model).__name__} does not support gradient checkpointing; set gradient_checkpointing to false."
        )
    # Renamed in transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Let the blocks of a frozen model checkpoint although it is in evaluation mode.

    A block of transformers checkpoints when its own `training` is set. Only that flag is set here, not those of the
    modules inside, so that every dropout stays off; no supported block asks for its own flag for anything else.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    modes = [block.training for block in blocks]
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block, mode in zip(blocks, modes, strict=True):
            block.training = mode


__all__ = ["DifferentiablePasses", "checkpointed", "enable_checkpointing"]
