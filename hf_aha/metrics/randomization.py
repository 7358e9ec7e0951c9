"""The randomisation check: a map that survives random weights does not explain the trained ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..classifier_aha import FrozenClassifier, blocks_name
from .calls import Explain, explain_in_batches, finite_rows, only_where
from .rank_maps import rank_correlation


ExplainWith = Callable[[FrozenClassifier], Explain]
"""The same explanation method for another classifier."""

EXTERNAL_ENCODER = (
    "an external encoder gives the tokens, which random weights in the classifier cannot change, so that the map "
    "stays by construction"
)


@dataclass(frozen=True)
class Randomization:
    """Rank correlation of the maps before and after, at every depth; float32 on the CPU, NaN where there is none.

    Attributes:
        stages: what is random, the head first; at each depth all stages before it are random too.
        correlation: (B, S) Spearman's rank correlation with the map of the trained classifier.
        not_applicable: why the check says nothing about this method, or None. There are no stages then, and the value
            is NaN: it is neither passed nor failed.
    """

    name: ClassVar[str] = "randomization"
    higher_is_better: ClassVar[bool] = False
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    stages: tuple[str, ...]
    correlation: torch.Tensor
    not_applicable: str | None = None

    @property
    def value(self) -> torch.Tensor:
        """(B,) mean magnitude over depths: 0 is a map that depends on the weights, 1 one that does not look at them.

        The magnitude, since a map turned upside down still shows the structure of the old one.
        """
        return self.correlation.abs().mean(1)  # of no stages: NaN


def cascading_randomization(
    classifier: FrozenClassifier,
    explain_with: ExplainWith,
    pixel_values: torch.Tensor,
    target: torch.Tensor,
    *,
    seed: int = 0,
    stages: int | None = None,
    external_encoder: bool = False,
    scores: torch.Tensor | None = None,
    batch_size: int = 32,
) -> Randomization:
    """Make the classifier random from the head down, on a copy, and compare the maps of each depth with the first.

    Every weight tensor of a stage is replaced by normal draws of its own mean and standard deviation. (The paper
    draws from the initialiser; those of vision transformers, with weights of 0.02 and layer scales down to 1e-5, would
    switch a network off rather than make it random.) Tensors whose elements are all equal stay. A method that has
    learnt weights of its own keeps them.

    It tests that maps depend on the classifier, not that they are right. The classes asked about stay the same.

    Args:
        classifier: the target model; it is copied and stays as it is.
        explain_with: classifier -> the method's `explain` for it. Called once for every depth.
        pixel_values: (B, 3, H, W) normalised images.
        target: (B,) classes.
        seed: of the weights; they do not depend on the batch.
        stages: only the first so many (1 is the head alone); default all: head, blocks from the last to the first,
            embeddings.
        external_encoder: the method reads an encoder of its own; the check is not applicable then.
        scores: (B, H, W) maps of the trained classifier, where they are known already.
        batch_size: images a call of the method.

    Raises:
        ValueError: the images, classes or maps have another shape, `stages` is out of range, or weights are quantized.

    Reference: Adebayo et al., Sanity Checks for Saliency Maps (https://arxiv.org/abs/1810.03292).
    """
    if external_encoder:
        return Randomization((), torch.empty(len(pixel_values), 0), EXTERNAL_ENCODER)
    parts = randomization_stages(classifier)
    if stages is not None and not 1 <= stages <= len(parts):
        raise ValueError(f"stages is {stages}, but this classifier has 1 to {len(parts)} of them.")
    names = tuple(parts)[:stages]
    if scores is None:
        scores = explain_in_batches(explain_with(classifier), pixel_values, target, batch_size)
    random = FrozenClassifier(copy.deepcopy(classifier.model))
    parameters = dict(random.model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for name in names:
        for parameter in parts[name]:
            _randomize(parameter, parameters[parameter], generator)
        maps = explain_in_batches(explain_with(random), pixel_values, target, batch_size).to(scores)
        finite = finite_rows(scores, maps)
        before, after = (torch.where(finite[:, None, None], each, 0.0) for each in (scores, maps))
        columns.append(only_where(finite, rank_correlation(before, after)))
    return Randomization(names, torch.stack(columns, 1))


def randomization_stages(classifier: FrozenClassifier) -> dict[str, tuple[str, ...]]:
    """Names of the classifier's weights by stage: `head`, `block 12` down to `block 1`, `embeddings`.

    The head holds everything the model lists behind its blocks (final norm, pooling, linear head), the embeddings
    everything before them.

    Example:
        `list(randomization_stages(classifier))` is `["head", "block 2", "block 1", "embeddings"]` for two blocks.
    """
    model = classifier.model
    prefix = blocks_name(model, model) + "."
    stages: dict[str, list[str]] = {"head": []}
    stages |= {f"block {block}": [] for block in range(classifier.num_layers, 0, -1)}
    stages["embeddings"] = []
    current = "embeddings"
    for name, _ in model.named_parameters():
        if name.startswith(prefix):
            stages[f"block {int(name.removeprefix(prefix).split('.')[0]) + 1}"].append(name)
            current = "head"
        else:
            stages[current].append(name)
    return {stage: tuple(names) for stage, names in stages.items()}


@torch.no_grad()
def _randomize(name: str, parameter: nn.Parameter, generator: torch.Generator) -> None:
    if not parameter.is_floating_point():
        raise ValueError(
            f"The classifier's weight {name} is {parameter.dtype}, but only floating weights can be made random: load "
            "the classifier without quantization."
        )
    values = parameter.float()
    spread = values.std(correction=0)
    draws = torch.randn(parameter.shape, generator=generator).to(values.device)
    # A constant stays exactly what it is: its computed spread may be a rounding error.
    constant = values.amin() == values.amax()
    parameter.copy_(torch.where(constant, values, values.mean() + spread * draws))
