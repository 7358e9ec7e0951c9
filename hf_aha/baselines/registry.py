"""The methods by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .base import Method
from .cam import EigenCam, GradCam, GradCamPlusPlus, LayerCam, ScoreCam
from .captum import GradientSHAP, InputXGradient, IntegratedGradients, KernelSHAP, Occlusion, Saliency, SmoothGrad
from .patch_search import PatchSearch
from .random_and_centre import CentreGaussian, RandomOrder
from .relevance import AttentionRelevance
from .rise import RISE
from .rollout import AttentionRollout


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            RandomOrder(),
            CentreGaussian(),
            Saliency(),
            InputXGradient(),
            IntegratedGradients(baseline="zero"),
            IntegratedGradients(baseline="blur"),
            SmoothGrad(),
            GradientSHAP(),
            Occlusion(),
            KernelSHAP(),
            GradCam(),
            GradCamPlusPlus(),
            LayerCam(),
            ScoreCam(),
            EigenCam(),
            AttentionRollout(),
            AttentionRelevance(),
            RISE(),
            PatchSearch(),
        )
    }
)
"""Every method with its default settings, by name, in the order of tables."""


def get_method(name: str, **settings: Any) -> Method:
    """The method of this name, with other settings where given.

    Args:
        name: a key of `METHODS`.
        settings: values of the method's own dataclass fields, checked by it.

    Raises:
        ValueError: no method has this name, or the value of a setting is not allowed.
        TypeError: the method has no such setting.

    Example:
        >>> get_method("rise", masks=100).forward_passes
        100
    """
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"Unknown method {name!r}: {hint}The methods are {', '.join(METHODS)}.")
    method = METHODS[name]
    allowed = [field.name for field in dataclasses.fields(method)]
    for setting in settings:
        if setting not in allowed:
            near = difflib.get_close_matches(setting, allowed, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(
                f"The method {name!r} has no setting {setting!r}: {hint}Its settings are {', '.join(allowed)}."
            )
    return dataclasses.replace(method, **settings)


def methods_table() -> str:
    """The methods as a Markdown table: name, computed by, passes of a ViT-B/16 at 224 pixels, settings, source."""
    lines = [
        "| name | method | computed by | forward | backward | signed | per class | settings and defaults | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        settings = ", ".join(f"`{field.name}={getattr(method, field.name)!r}`" for field in _settings(method))
        cells = [
            f"`{name}`",
            method.title,
            method.library or "hf_aha",
            f"{method.forward_passes:,}",
            f"{method.backward_passes:,}",
            "yes" if method.signed else "no",
            "yes" if method.class_specific else "no",
            settings or "-",
            f"<{method.source}>" if method.source.startswith("http") else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _settings(method: Method) -> list[dataclasses.Field]:
    """The settings that change the map; `max_batch` only changes speed and memory."""
    return [field for field in dataclasses.fields(method) if field.name != "max_batch"]
