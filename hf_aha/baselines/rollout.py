"""Attention rollout: the attention of all layers multiplied, residual connections included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..classifier_aha import FrozenClassifier
from .base import Method, Passes, upsample
from .copies import attention_weights, read_tokens


@dataclass(frozen=True, kw_only=True)
class AttentionRollout(Method):
    """How much of each patch reaches the tokens that the head reads, if attention were all that mixes them.

    R = A_L .. A_1 with A_l = (mean over heads of the attention of layer l + I) / 2; the score of a patch is its entry
    in the row of R that the head reads (see `read_tokens`; the paper reads the class token). It is the same for every
    class. Bilinear from patches to pixels.
    """

    title: ClassVar[str] = "Attention rollout"
    source: ClassVar[str] = "https://arxiv.org/abs/2005.00928"
    signed: ClassVar[bool] = False
    class_specific: ClassVar[bool] = False
    name = "attention-rollout"

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(1, 0)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        size = tuple(pixel_values.shape[-2:])
        attentions, _ = attention_weights(classifier, pixel_values)
        row = read_tokens(classifier, attentions[0].shape[-1]).to(pixel_values.device)
        # The row alone is followed back through the layers, which needs no product of two T x T matrices.
        row = row.expand(len(pixel_values), 1, -1)
        for weights in reversed(attentions):
            row = (torch.bmm(row, weights.float().mean(1)) + row) / 2
        patches = row[:, 0, classifier.num_prefix_tokens :].unflatten(1, classifier.grid(*size))
        return upsample(patches, size)
