"""Learned pixel attribution for the image classifiers of the Hugging Face Hub.

Public names load on first use, so `import hf_aha` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

__all__ = [
    "AhaConfig",
    "AhaExplainer",
    "AhaOutput",
    "AhaTrainer",
    "AhaTrainingArguments",
    "AttributionDecoder",
    "ClassifierMismatchError",
    "Explanation",
    "FrozenClassifier",
    "ImageReadError",
    "InputGeometry",
    "QuantileRanker",
    "SinkhornRanker",
    "TransportRanker",
    "UnsupportedClassifierError",
    "VisualAttributionPipeline",
    "__version__",
    "hard_ranks",
    "pipeline",
    "read_image",
]

# Public name -> the module of this package that defines it. A new public name is added here, to `__all__` and to the
# imports below; tests/test_package.py holds the three together.
_MODULE_OF = {
    "AhaConfig": "configuration_aha",
    "AhaExplainer": "modeling_aha",
    "AhaOutput": "modeling_aha",
    "AhaTrainer": "trainer",
    "AhaTrainingArguments": "training_args",
    "AttributionDecoder": "decoder_aha",
    "ClassifierMismatchError": "modeling_aha",
    "Explanation": "explanation",
    "FrozenClassifier": "classifier_aha",
    "ImageReadError": "images",
    "InputGeometry": "geometry",
    "QuantileRanker": "ranking",
    "SinkhornRanker": "ranking",
    "TransportRanker": "ranking",
    "UnsupportedClassifierError": "classifier_aha",
    "VisualAttributionPipeline": "pipelines",
    "hard_ranks": "ranking",
    "pipeline": "pipelines",
    "read_image": "images",
}

if TYPE_CHECKING:
    from .classifier_aha import FrozenClassifier, UnsupportedClassifierError
    from .configuration_aha import AhaConfig
    from .decoder_aha import AttributionDecoder
    from .explanation import Explanation
    from .geometry import InputGeometry
    from .images import ImageReadError, read_image
    from .modeling_aha import AhaExplainer, AhaOutput, ClassifierMismatchError
    from .pipelines import VisualAttributionPipeline, pipeline
    from .ranking import QuantileRanker, SinkhornRanker, TransportRanker, hard_ranks
    from .trainer import AhaTrainer
    from .training_args import AhaTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    # The next access finds the name in the module itself and does not come here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
