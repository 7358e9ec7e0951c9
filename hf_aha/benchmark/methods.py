"""What is measured: explainers and baselines under names, with what makes two runs of one name the same method."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..baselines import METHODS, Method, Passes, get_method
from ..classifier_aha import FrozenClassifier
from ..modeling_aha import AhaExplainer
from .counts import counts_of


@dataclass(frozen=True, kw_only=True, eq=False)
class LearnedExplainer(Method):
    """A trained explainer as a method among the baselines: a light decoder beside the classifier's passes.

    Args:
        explainer: with its classifier; explains that one only.
        label: its name in files.
        heading: its name in tables.
        revision: commit of the explainer, for the record.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2604.05819"

    explainer: AhaExplainer
    label: str
    heading: str = "AHA"
    revision: str | None = None

    @property
    def title(self) -> str:
        """Its name in tables."""
        return self.heading

    @property
    def name(self) -> str:
        """Its name in files."""
        return self.label

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        """One forward pass, and as many of both kinds more as it reads gradients."""
        gradients = (self.explainer.config.passes_per_explanation - 1) // 2
        return Passes(1 + gradients, gradients)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        own = self.explainer.classifier
        try:
            self.explainer.classifier = classifier
            return self.explainer(pixel_values, target).scores
        finally:
            self.explainer.classifier = own


@dataclass(frozen=True)
class Entry:
    """One row of a benchmark.

    Attributes:
        method: what explains.
        images: measure it on the first of the images only; None for all.
    """

    method: Method
    images: int | None = None

    @property
    def name(self) -> str:
        """The method's name."""
        return self.method.name

    def identity(self) -> dict[str, Any]:
        """JSON values that change when its maps would: the settings, or the explainer's weights."""
        if isinstance(self.method, LearnedExplainer):
            digest = hashlib.sha256()
            for name, tensor in sorted(self.method.explainer.decoder.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            return {"decoder": digest.hexdigest()[:16], "revision": self.method.revision}
        settings = {
            field.name: getattr(self.method, field.name)
            for field in dataclasses.fields(self.method)
            if field.name != "max_batch"
        }
        return {"method": type(self.method).__name__, **settings}


def parse_entries(words: Sequence[str]) -> list[Entry]:
    """Baselines from words `NAME` or `NAME:IMAGES`; `"all"` stands for every one that is not named besides.

    Raises:
        ValueError: no method has this name, a count is not a positive integer, or a method is named twice.

    Example:
        >>> [(entry.name, entry.images) for entry in parse_entries(["random", "rise:100"])]
        [('random', None), ('rise', 100)]
    """
    counts = counts_of(words, "method", "rise:100")
    for name in counts:
        if name != "all":
            get_method(name)
    if "all" in counts:
        counts = {name: counts.get(name, counts["all"]) for name in METHODS}
    return [Entry(get_method(name), images) for name, images in counts.items()]
