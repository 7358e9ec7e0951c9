"""Relevance propagation through attention, weighted by its gradient (Chefer et al.)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..classifier_aha import FrozenClassifier
from .base import Method, Passes, upsample
from .copies import attention_weights, read_tokens


@dataclass(frozen=True, kw_only=True)
class AttentionRelevance(Method):
    """Attention weighted by the gradient of the class logit, accumulated over the layers.

    The self-attention rule of "Generic Attention-model Explainability": R = I, then for every layer
    R = R + E_h[(dlogit/dA * A)^+] R, the mean being over heads. It needs attention weights and their gradients only,
    hence works for every family; the LRP variant of the first paper (2012.09838) needs a rewritten model class and is
    not this. The score of a patch is its entry in the row that the head reads (see `read_tokens`; the paper reads the
    class token, most families here average patches). Bilinear from patches to pixels.
    """

    title: ClassVar[str] = "Attention relevance (Chefer)"
    source: ClassVar[str] = "https://arxiv.org/abs/2103.15679"
    signed: ClassVar[bool] = False
    name = "relevance"

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(1, 1)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        size = tuple(pixel_values.shape[-2:])
        with torch.enable_grad():
            # The weights are frozen: only through the pixels do the attention weights have a graph.
            attentions, logits = attention_weights(classifier, pixel_values.requires_grad_())
            chosen = logits.float().gather(1, target[:, None]).sum()
            gradients = torch.autograd.grad(chosen, attentions)
        row = read_tokens(classifier, attentions[0].shape[-1]).to(pixel_values.device)
        row = row.expand(len(pixel_values), 1, -1)
        for weights, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
            row = row + torch.bmm(row, (weights * gradient).float().clamp(min=0).mean(1))
        patches = row[:, 0, classifier.num_prefix_tokens :].unflatten(1, classifier.grid(*size))
        return upsample(patches.detach(), size)
