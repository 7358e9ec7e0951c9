"""The passes of the target model that a metric asks for, in bfloat16 where the machine is faster with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ..classifier_aha import FrozenClassifier


PRECISIONS = ("auto", "float32", "bfloat16")
"""What `TargetPasses` accepts."""


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 have units of their own on this device.

    Example:
        >>> isinstance(has_fast_bfloat16(torch.device("cpu")), bool)
        True
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Private names of torch, absent on some platforms; without them the safe answer is no.
        asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, name)() for name in asked if hasattr(torch.cpu, name))
    return False


def passes_in(precision: str, classifier: FrozenClassifier) -> str:
    """`"float32"` (the classifier's own dtype) or `"bfloat16"` (autocast), whichever is meant by `precision`.

    Args:
        precision: one of `PRECISIONS`; `"auto"` is bfloat16 where the machine is fast in it.
        classifier: whose device and dtype decide.

    Raises:
        ValueError: unknown precision; bfloat16 for a classifier in float16, which autocast cannot mix with it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, but must be one of {', '.join(PRECISIONS)}.")
    weights = next(classifier.parameters())
    if precision == "bfloat16" and weights.dtype == torch.float16:
        raise ValueError("The classifier is in float16, which bfloat16 does not mix with: load it in float32.")
    fits = has_fast_bfloat16(weights.device) and weights.dtype != torch.float16
    return "bfloat16" if precision == "bfloat16" or (precision == "auto" and fits) else "float32"


class TargetPasses:
    """The classifier as metrics call it: (N, 3, H, W) -> logits (N, C), without gradients.

    bfloat16 means autocast: the weights stay as they are, and everything after the logits is float32.

    Args:
        classifier: the target model; never moved or cast.
        precision: `"float32"`, the classifier's own dtype; `"bfloat16"`; or `"auto"`, bfloat16 where it is fast.
        compiled: run it through `torch.compile`, which takes seconds once, and on a CPU a C++ compiler. The compiled
            passes keep the weights as they are at the first call.

    Attributes:
        precision: the one in use, `"float32"` or `"bfloat16"`.
        compiled: as given.
        images: images passed so far.

    Raises:
        ValueError: unknown precision; bfloat16 for a classifier in float16, which autocast cannot mix with it.

    Example:
        `evaluate_maps(TargetPasses(explainer.classifier), pixel_values, scores, target, protocol, ...)`
    """

    def __init__(self, classifier: FrozenClassifier, precision: str = "auto", compiled: bool = False) -> None:
        self.precision = passes_in(precision, classifier)
        self.classifier = classifier
        weights = next(classifier.parameters())
        self.device, self.dtype = weights.device, weights.dtype
        self.compiled, self.images = compiled, 0
        # Freezing lets the compiler cast the weights once and join each layer with its activation.
        self._forward = _freezing(torch.compile(classifier, dynamic=False)) if compiled else classifier
        self._batch = 0

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) of images on the classifier's device."""
        count = len(pixel_values)
        self.images += count
        pixel_values = pixel_values.to(self.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            if not self.compiled:
                return self.classifier(pixel_values).logits
            # Every batch size is compiled anew, so that smaller batches are filled up to the largest one seen.
            self._batch = max(self._batch, count)
            filled = F.pad(pixel_values, (0, 0, 0, 0, 0, 0, 0, self._batch - count))
            return self._forward(filled).logits[:count]


def _freezing(compiled: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor import config  # dear to import, and seldom needed

    return config.patch(freezing=True)(compiled)
