"""The frozen classifier: any supported Hugging Face image classifier seen as patch tokens, logits and class vectors.

This file travels to the Hub as custom code, so it imports torch and transformers only.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


FINGERPRINT_TOLERANCE = 0.015
"""Largest `fingerprint_distance` at which two classifiers count as the same weights.

Measured on a ViT-S/14 of ten classes: the same weights in bfloat16 lie 0.002 away, noise of 3% of each weight's spread
lies 0.015 to 0.04 away on the head alone and 0.02 to 0.04 on the last block alone.
"""

_FINGERPRINT_SIZE = 16


class UnsupportedClassifierError(ValueError):
    """The model is not an image classifier that `FrozenClassifier` can read; the message names the supported types."""


@dataclass(frozen=True)
class ClassifierFeatures:
    """What one forward pass of the classifier gives.

    Attributes:
        tokens: one (B, gh, gw, D) per asked layer, in the order asked: the patch tokens after that block on their
            row-major grid, prefix tokens dropped, before any final norm of the model, in the dtype the block computed.
        logits: (B, C), exactly what the model itself returns.
    """

    tokens: tuple[torch.Tensor, ...]
    logits: torch.Tensor


@dataclass(frozen=True)
class _Family:
    """How one model type is read.

    Attributes:
        prefix_tokens: number of tokens before the patch tokens, from the vision configuration.
        resize_argument: the model accepts a size other than the configured one only with
            `interpolate_pos_encoding=True`; without this flag, it adapts by itself.
        heads: the possible heads, each as the names of the linear layers whose logits are averaged.
    """

    prefix_tokens: Callable[[PreTrainedConfig], int]
    resize_argument: bool
    heads: tuple[tuple[str, ...], ...] = (("classifier",),)


_FAMILIES: dict[str, _Family] = {
    # The class token; logits from it.
    "vit": _Family(prefix_tokens=lambda config: 1, resize_argument=True),
    "vit_msn": _Family(prefix_tokens=lambda config: 1, resize_argument=True),
    # The class and the distillation token, also in the models trained without a teacher. With a teacher, the logits
    # are the mean of one head on each of the two.
    "deit": _Family(
        prefix_tokens=lambda config: 2,
        resize_argument=True,
        heads=(("classifier",), ("cls_classifier", "distillation_classifier")),
    ),
    # The class token; logits from the normed mean of the patch tokens. The tables of relative positions are resized
    # inside the model.
    "beit": _Family(prefix_tokens=lambda config: 1, resize_argument=False),
    "data2vec-vision": _Family(prefix_tokens=lambda config: 1, resize_argument=False),
    # The class token (and registers); logits from the class token beside the mean of the patch tokens, so that the
    # head's rows are twice as wide as a token. Positions are always interpolated inside the model.
    "dinov2": _Family(prefix_tokens=lambda config: 1, resize_argument=False),
    "dinov2_with_registers": _Family(
        prefix_tokens=lambda config: 1 + config.num_register_tokens, resize_argument=False
    ),
    # No prefix token; logits from the mean of the patch tokens.
    "ijepa": _Family(prefix_tokens=lambda config: 0, resize_argument=True),
    "siglip": _Family(prefix_tokens=lambda config: 0, resize_argument=True),
    # The class token; logits from the mean of the other tokens.
    "clip": _Family(prefix_tokens=lambda config: 1, resize_argument=True),
}


def supported_model_types() -> tuple[str, ...]:
    """The values of `config.model_type` that `FrozenClassifier` reads, sorted.

    Example:
        >>> "vit" in supported_model_types()
        True
    """
    return tuple(sorted(_FAMILIES))


class FrozenClassifier(nn.Module):
    """Any supported Hugging Face image classifier seen as patch tokens, logits and class vectors.

    The model given is frozen in place: `requires_grad_(False)` and `eval()` are called on it, and it stays in
    evaluation mode whatever `train()` says here. Nothing else of it is changed, moved or cast. It is kept as `model`.

    Gradients reach the pixels, because `forward` does not disable them: wrap the call in `torch.no_grad()` where
    nothing is to be differentiated. Two threads may call one instance at the same time.

    Args:
        model: an image classifier of transformers with a linear head, of one of `supported_model_types()`.

    Raises:
        UnsupportedClassifierError: the model is of another type, or has no classification head.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        ...                    image_size=32, patch_size=16, num_labels=3)
        >>> classifier = FrozenClassifier(ViTForImageClassification(config))
        >>> features = classifier(torch.zeros(1, 3, 32, 48), layers=(1, 2))
        >>> [tuple(tokens.shape) for tokens in features.tokens], tuple(features.logits.shape)
        ([(1, 2, 3, 8), (1, 2, 3, 8)], (1, 3))
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._head_names = _head_names(model, _family_of(model))
        self._blocks_name = blocks_name(model, _backbone(model))
        self.model = model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenClassifier:
        """Set the mode of this module; the wrapped model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def _family(self) -> _Family:
        # Looked up and not kept, because its functions cannot be pickled.
        return _FAMILIES[self.model_type]

    @property
    def model_type(self) -> str:
        """`config.model_type` of the model, a member of `supported_model_types()`."""
        return self.model.config.model_type

    @property
    def hidden_size(self) -> int:
        """Width D of a token."""
        return vision_config(self.model).hidden_size

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks, the largest layer that `forward` gives."""
        return vision_config(self.model).num_hidden_layers

    @property
    def num_labels(self) -> int:
        """Number of classes C."""
        return self.model.config.num_labels

    @property
    def id2label(self) -> dict[int, str]:
        """Name of each class."""
        return dict(self.model.config.id2label)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(vision_config(self.model).patch_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels the model was configured for; other sizes interpolate its positions."""
        return _pair(vision_config(self.model).image_size)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patch tokens (class, distillation, registers)."""
        return self._family.prefix_tokens(vision_config(self.model))

    @property
    def class_vector_size(self) -> int:
        """Width of a class vector: D, or 2D where the head reads two tokens side by side (DINOv2)."""
        return self._heads()[0].in_features

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of `height` x `width` pixels.

        Raises:
            ValueError: a side is not a positive multiple of the patch.

        Example:
            `classifier.grid(224, 336)` is `(16, 24)` for patches of 14 pixels.
        """
        patch_height, patch_width = self.patch_size
        if height < patch_height or width < patch_width or height % patch_height or width % patch_width:
            raise ValueError(
                f"The image is {height} x {width} pixels, but both sides must be multiples of the "
                f"{patch_height} x {patch_width} patch of this {self.model_type} classifier: resize the image."
            )
        return height // patch_height, width // patch_width

    def forward(self, pixel_values: torch.Tensor, layers: Sequence[int] = ()) -> ClassifierFeatures:
        """Run the model once and return its logits with the patch tokens after the asked blocks.

        Args:
            pixel_values: (B, 3, H, W), floating, normalised as the model's image processor does; H and W multiples of
                the patch. Cast to the model's dtype unless autocast is on.
            layers: blocks to read, 1 .. `num_layers`; k gives the hidden state after block k.

        Returns:
            the features; `logits` is bit for bit what `model(pixel_values)` returns at the configured size, and
            what the model returns when told to interpolate its positions at any other size.

        Raises:
            ValueError: the pixels have another shape or are not floating, or a layer does not exist.
        """
        logits, states = self.states(pixel_values, layers)
        grid = self.grid(*pixel_values.shape[-2:])
        return ClassifierFeatures(tuple(self.patch_tokens(state, grid) for state in states), logits)

    def states(self, pixel_values: torch.Tensor, layers: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the model once: its logits, and for each asked block its whole output (B, N, D), prefix tokens included.

        The outputs are those the logits were computed from, so gradients with respect to them exist. Arguments and
        errors as in `forward`.
        """
        height, width = self._check_pixel_values(pixel_values)
        self.grid(height, width)
        self._check_layers(layers)
        if not torch.is_autocast_enabled(pixel_values.device.type) and pixel_values.dtype != self.model.dtype:
            pixel_values = pixel_values.to(self.model.dtype)
        # Left out at the configured size, so that the logits are those of a plain call there.
        resized = self._family.resize_argument and (height, width) != self.image_size
        arguments = {"interpolate_pos_encoding": True} if resized else {}
        output, states = run_recorded(self.model, self._blocks_name, layers, pixel_values, **arguments)
        return output.logits, [states[layer] for layer in layers]

    def class_vectors(self, target: torch.Tensor) -> torch.Tensor:
        """One vector per class asked about: the head's own rows, without its bias.

        With two heads (DeiT trained with a teacher) it is the mean of their rows. Only the asked rows are read.

        Args:
            target: classes, integers in 0 .. `num_labels` - 1, of any shape (...).

        Returns:
            (..., `class_vector_size`), float32, on the head's device.

        Raises:
            ValueError: `target` is not of an integer dtype, or names a class the head does not have.
        """
        if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
            raise ValueError(f"target must hold class indices as integers, not {target.dtype}.")
        # A traced graph cannot depend on values; there PyTorch's indexing refuses a class that does not exist.
        known = torch.compiler.is_compiling() or not target.numel()
        if not known and not 0 <= int(target.min()) <= int(target.max()) < self.num_labels:
            raise ValueError(
                f"target asks about classes {int(target.min())} to {int(target.max())}, but this classifier has the "
                f"classes 0 to {self.num_labels - 1}."
            )
        heads = self._heads()
        index = target.to(device=heads[0].weight.device, dtype=torch.long)
        return torch.stack([head.weight[index].float() for head in heads]).mean(dim=0)

    @torch.no_grad()
    def fingerprint(self) -> list[float]:
        """16 numbers that tell these weights from others, to be compared with `fingerprint_distance`.

        The logits of two synthetic images (sums of sinusoids, no random numbers) at the configured size, projected by
        a fixed cosine matrix. It depends on what the model computes, not on names, files or shards. A model in
        half precision is computed by a temporary float32 copy, so that only the rounding of its weights is seen and
        not that of every activation. Nothing of the model is changed.

        Raises:
            ValueError: the logits are not finite.
        """
        model = self.model if self.model.dtype == torch.float32 else _float32_copy(self.model)
        images = _fingerprint_images(*self.image_size).to(device=model.device, dtype=model.dtype)
        with torch.autocast(model.device.type, enabled=False):
            logits = model(images).logits.double().cpu().flatten()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"This {self.model_type} classifier gives logits that are not finite on the fingerprint images: check "
                "its weights."
            )
        projected = _fingerprint_matrix(logits.numel()) @ logits
        return [float(f"{value:.6g}") for value in projected.tolist()]

    def _heads(self) -> list[nn.Linear]:
        return [getattr(self.model, name) for name in self._head_names]

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, but must be (batch, 3, height, width)."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values has dtype {pixel_values.dtype}, but must be floating and normalised: use the "
                "classifier's image processor."
            )
        return pixel_values.shape[-2], pixel_values.shape[-1]

    def _check_layers(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= self.num_layers:
                raise ValueError(
                    f"Layer {layer!r} was asked, but this {self.model_type} classifier has the layers 1 to "
                    f"{self.num_layers}."
                )

    def patch_tokens(self, state: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The patch tokens (B, gh, gw, D) of a block's output (B, N, D), prefix tokens dropped."""
        prefix = state.shape[1] - grid[0] * grid[1]
        if prefix != self.num_prefix_tokens:
            raise UnsupportedClassifierError(
                f"{type(self.model).__name__} (model type {self.model_type!r}) gave {state.shape[1]} tokens for a "
                f"{grid[0]} x {grid[1]} grid, that is {prefix} prefix tokens where {self.num_prefix_tokens} were "
                f"expected; supported model types are {', '.join(supported_model_types())}."
            )
        return state[:, prefix:].unflatten(1, grid)


def fingerprint_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Relative L2 distance |a - b| / max(|a|, |b|) of two fingerprints, from 0 (same) to 2.

    Same weights in another dtype stay under `FINGERPRINT_TOLERANCE`.

    Raises:
        ValueError: the fingerprints differ in length, are empty, or hold a number that is not finite.

    Example:
        >>> fingerprint_distance([3.0, 4.0], [3.0, 4.5]) < 0.1
        True
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"Fingerprints of {len(a)} and {len(b)} numbers cannot be compared.")
    if not all(math.isfinite(value) for value in (*a, *b)):
        raise ValueError("A fingerprint holds a number that is not finite.")
    size = max(math.hypot(*a), math.hypot(*b))
    return math.dist(a, b) / size if size else 0.0


def _float32_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same computation in float32, or the model itself where its weights are quantized or not in memory."""
    tensors = [*model.parameters(), *model.buffers()]
    if getattr(model, "hf_quantizer", None) is not None or any(tensor.is_meta for tensor in tensors):
        return model
    # Weights named in the memo are taken from there instead of being copied first.
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.float(), requires_grad=False) for parameter in model.parameters()
    }
    memo.update({id(buffer): buffer.float() for buffer in model.buffers() if buffer.is_floating_point()})
    return copy.deepcopy(model, memo)


def _fingerprint_images(height: int, width: int) -> torch.Tensor:
    """Two images (2, 3, height, width), float64, within -2 .. 2: waves of several lengths, shifted in each channel.

    Stored fingerprints are compared with new ones, so this formula and `_fingerprint_matrix` must not change.
    """
    y = ((torch.arange(height, dtype=torch.float64) + 0.5) / height)[:, None]
    x = ((torch.arange(width, dtype=torch.float64) + 0.5) / width)[None, :]
    images = []
    for image in range(2):
        channels = []
        for channel in range(3):
            waves = torch.zeros(height, width, dtype=torch.float64)
            for wave, (rows, columns) in enumerate(((1, 2), (3, -1), (5, 4), (-9, 11))):
                phase = 1.7 * channel + 2.3 * wave + 0.9 * image
                waves += torch.sin(2 * math.pi * ((rows + image) * y + (columns - 2 * image) * x) + phase) / 2
            channels.append(waves)
        images.append(torch.stack(channels))
    return torch.stack(images)


def _fingerprint_matrix(columns: int) -> torch.Tensor:
    """Cosines (16, columns), float64, of frequencies that share no period; rows of about unit length."""
    golden = (math.sqrt(5) - 1) / 2
    row = torch.arange(_FINGERPRINT_SIZE, dtype=torch.float64)[:, None]
    column = torch.arange(1, columns + 1, dtype=torch.float64)[None, :]
    return torch.cos(2 * math.pi * golden * (row + 1) * column + row) * math.sqrt(2 / columns)


def run_recorded(
    model: PreTrainedModel,
    blocks_name: str,
    layers: Sequence[int],
    pixel_values: torch.Tensor,
    **arguments: bool,
) -> tuple[ModelOutput, Mapping[int, torch.Tensor]]:
    """Run a vision transformer once: its output, and the states after the asked blocks.

    Args:
        model: the transformer, whose list of blocks is called `blocks_name`.
        layers: blocks to read, from 1.
        pixel_values: (B, 3, H, W) in the model's dtype.
        **arguments: of the model's forward.
    """
    if not layers:
        return model(pixel_values, **arguments), {}
    if torch.compiler.is_dynamo_compiling():
        # `torch.compile` traces no hook that comes and goes, but it does trace those transformers leaves in the model.
        _install_recorders(model)
        output = model(pixel_values, output_hidden_states=True, **arguments)
        return output, {layer: output.hidden_states[layer] for layer in layers}
    blocks = model.get_submodule(blocks_name)
    with recorded_states({layer: blocks[layer - 1] for layer in layers}) as states:
        output = model(pixel_values, **arguments)
    return output, states


@torch.compiler.assume_constant_result
def _install_recorders(model: PreTrainedModel) -> bool:
    """Let transformers install its recorders, which it does in the first call that asks for hidden states.

    That call takes a lock and cannot be traced; here it runs once, while `torch.compile` traces what calls this.
    """
    height, width = _pair(vision_config(model).image_size)
    with torch.no_grad():
        model(torch.zeros(1, 3, height, width, dtype=model.dtype, device=model.device), output_hidden_states=True)
    return True


@contextmanager
def recorded_states(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Record what the blocks give to the calling thread, until the context ends."""
    caller = threading.get_ident()
    states: dict[int, torch.Tensor] = {}

    def hook_for(layer: int) -> Callable[[nn.Module, tuple, torch.Tensor | tuple], None]:
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
            # Another thread that runs the same model meets this hook too; its states are not ours.
            if threading.get_ident() == caller:
                states[layer] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    handles = []
    try:
        for layer, block in blocks.items():
            handles.append(block.register_forward_hook(hook_for(layer)))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _refusal(model: nn.Module, reason: str) -> UnsupportedClassifierError:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return UnsupportedClassifierError(
        f"{type(model).__name__} (model type {model_type!r}) cannot be explained because {reason}; use an image "
        f"classifier of one of the supported model types {', '.join(supported_model_types())}."
    )


def _family_of(model: PreTrainedModel) -> _Family:
    if not isinstance(model, PreTrainedModel):
        raise _refusal(model, "it is not a transformers model")
    if model.config.model_type not in _FAMILIES:
        raise _refusal(model, "its model type is not supported")
    return _FAMILIES[model.config.model_type]


def _head_names(model: PreTrainedModel, family: _Family) -> tuple[str, ...]:
    for names in family.heads:
        heads = [getattr(model, name, None) for name in names]
        if all(isinstance(head, nn.Linear) for head in heads):
            for head in heads:
                if tuple(head.weight.shape) != (model.config.num_labels, head.in_features):
                    raise _refusal(
                        model,
                        f"its head has a weight of shape {tuple(head.weight.shape)} while its configuration has "
                        f"{model.config.num_labels} labels",
                    )
            return names
    raise _refusal(model, "it has no linear classification head")


def _backbone(model: PreTrainedModel) -> nn.Module:
    # The base model of SigLIP and CLIP classifiers is the classifier itself.
    return model.base_model if model.base_model is not model else model.vision_model


def blocks_name(model: PreTrainedModel, backbone: nn.Module) -> str:
    """Name, in the model, of the backbone's list of transformer blocks; it differs between families and versions."""
    blocks = None
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == vision_config(model).num_hidden_layers:
            blocks = module
            break
    for name, module in model.named_modules():
        if blocks is not None and module is blocks:
            return name
    raise _refusal(model, f"it has no list of {vision_config(model).num_hidden_layers} transformer blocks")


def vision_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The part of the config that describes the vision transformer."""
    return getattr(model.config, "vision_config", model.config)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
