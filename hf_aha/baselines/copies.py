"""Copies of a classifier that may be hooked and switched, and the attention weights read from one."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..classifier_aha import FrozenClassifier, UnsupportedClassifierError, supported_model_types


def private_copy(classifier: FrozenClassifier) -> FrozenClassifier:
    """A copy of the model's modules and configuration, made in milliseconds: hooks and settings of it are its own.

    The weights are the classifier's own tensors, frozen and only read, so that nothing is stored twice and a change of
    the classifier's weights is seen at once.
    """
    model = classifier.model
    # What the memo names is taken from there instead of being copied.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return FrozenClassifier(copy.deepcopy(model, shared))


def attention_weights(
    classifier: FrozenClassifier, pixel_values: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Run a private copy with explicit attention and read the weights it used.

    The usual implementation (`sdpa`) never forms them. The copy computes with the same weights, so that its logits are
    the classifier's up to rounding.

    Args:
        classifier: the model asked.
        pixel_values: (B, 3, H, W). With gradients enabled, weights and logits are differentiable if the pixels are.

    Returns:
        per layer (B, heads, T, T), rows summing to one, over the prefix and the patch tokens; and the logits (B, C).

    Raises:
        UnsupportedClassifierError: the model gives no attention weights.
    """
    copied = private_copy(classifier)
    for module in copied.model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = "eager"
        # data2vec picks the class of its attention when it is built; the explicit one is the parent.
        if type(module).__name__.endswith("SdpaSelfAttention"):
            module.__class__ = type(module).__bases__[0]
    found: list[torch.Tensor] = []
    copied.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "output_attentions": True}), with_kwargs=True
    )
    copied.model.register_forward_hook(lambda module, args, output: found.extend(output.attentions or ()))
    logits = copied(pixel_values).logits
    if len(found) != classifier.num_layers or any(weights is None for weights in found):
        raise UnsupportedClassifierError(
            f"{type(classifier.model).__name__} (model type {classifier.model_type!r}) gave no attention weights for "
            f"its {classifier.num_layers} layers: choose a method that does not read attention."
        )
    return tuple(found), logits


def read_tokens(classifier: FrozenClassifier, tokens: int) -> torch.Tensor:
    """How much of each token of the last layer the head reads: (T,) float32, sum 1.

    The class token (ViT, DeiT, ViT-MSN), the mean of the class and the distillation token (DeiT with a teacher), the
    mean of the patch tokens (BEiT, data2vec, I-JEPA, SigLIP, CLIP), or half of each (DINOv2, which reads the class
    token beside the mean of the patches).

    Args:
        classifier: the model asked.
        tokens: T, prefix and patch tokens.

    Raises:
        UnsupportedClassifierError: it is not known what this head reads.
    """
    prefix = classifier.num_prefix_tokens
    weights = torch.zeros(tokens)
    model_type, config = classifier.model_type, classifier.model.config
    if model_type in ("vit", "vit_msn"):
        weights[0] = 1
    elif model_type == "deit":
        read = 2 if isinstance(getattr(classifier.model, "distillation_classifier", None), nn.Linear) else 1
        weights[:read] = 1 / read
    elif model_type in ("beit", "data2vec-vision") and not config.use_mean_pooling:
        weights[0] = 1
    elif model_type in ("beit", "data2vec-vision", "ijepa", "siglip", "clip"):
        weights[prefix:] = 1 / (tokens - prefix)
    elif model_type in ("dinov2", "dinov2_with_registers"):
        weights[0] = 0.5
        weights[prefix:] = 0.5 / (tokens - prefix)
    else:
        raise UnsupportedClassifierError(
            f"It is not known which tokens the head of a {model_type!r} model reads, so its attention cannot be "
            f"followed; the model types with a known head are {', '.join(supported_model_types())}."
        )
    return weights
