"""What a metric measures: an explanation method on a classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..classifier_aha import FrozenClassifier
from ..perturbation import Normalization
from .calls import Explain, LogitsOf
from .randomization import ExplainWith


if TYPE_CHECKING:
    from ..modeling_aha import AhaExplainer


@dataclass(frozen=True)
class Subject:
    """What is measured: an explanation method on a classifier.

    Attributes:
        explain: pixel_values (B, 3, H, W), target (B,) -> scores (B, H, W). Called with gradients as the caller of the
            metric left them.
        logits_of: pixel_values (N, 3, H, W) -> logits (N, C), in any dtype.
        normalization: mean and std of the image processor.
        classifier: the target model, where the method has one that can be copied; needed by `randomization`.
        explain_with: classifier -> the same method's `explain` for it; needed by `randomization`.
        external_encoder: the method reads tokens of an encoder of its own, not of the classifier.
    """

    explain: Explain
    logits_of: LogitsOf
    normalization: Normalization
    classifier: FrozenClassifier | None = None
    explain_with: ExplainWith | None = None
    external_encoder: bool = False

    @classmethod
    def from_explainer(cls, explainer: AhaExplainer) -> Subject:
        """The subject of a trained explainer with its classifier attached.

        Raises:
            ValueError: no classifier is attached.

        Example:
            `Subject.from_explainer(AhaExplainer.from_pretrained("imagenette-demo"))`
        """
        if explainer.classifier is None:
            raise ValueError("The explainer has no classifier: call attach(classifier) first.")

        def explain_with(classifier: FrozenClassifier) -> Explain:
            # Its own decoder is drawn at random and replaced; the caller's random numbers stay as they are.
            with torch.random.fork_rng(devices=[]):
                other = type(explainer)(explainer.config)
            other.decoder = explainer.decoder
            # The copy is random on purpose, so its fingerprint is not that of the config.
            other.attach(classifier, check_fingerprint=False)
            return _forward_of(other)

        external = explainer.encoder is not None
        return cls(
            explain=_forward_of(explainer),
            logits_of=lambda pixel_values: explainer.classifier(pixel_values).logits,
            normalization=Normalization(explainer.config.image_mean, explainer.config.image_std),
            classifier=explainer.classifier,
            explain_with=None if external else explain_with,
            external_encoder=external,
        )

    @classmethod
    def from_method(
        cls,
        method: Callable[[FrozenClassifier, torch.Tensor, torch.Tensor], torch.Tensor],
        classifier: FrozenClassifier,
        normalization: Normalization,
        *,
        logits_of: LogitsOf | None = None,
    ) -> Subject:
        """The subject of a method that takes the classifier at every call, as those of `hf_aha.baselines` do.

        Args:
            method: classifier, pixel_values (B, 3, H, W), target (B,) -> scores (B, H, W).
            classifier: the target model.
            normalization: the image processor's.
            logits_of: how metrics ask the classifier, for example in bfloat16; default: the classifier itself.
        """
        return cls(
            explain=partial(method, classifier),
            logits_of=(lambda pixel_values: classifier(pixel_values).logits) if logits_of is None else logits_of,
            normalization=normalization,
            classifier=classifier,
            explain_with=lambda other: partial(method, other),
        )


def _forward_of(explainer: AhaExplainer) -> Explain:
    def explain(pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return explainer(pixel_values, target).scores

    return explain
