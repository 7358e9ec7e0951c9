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
    "AhaModelCard",
    "AhaModelCardData",
    "AhaOutput",
    "AhaTrainer",
    "AhaTrainingArguments",
    "AttributionDecoder",
    "ClassifierMismatchError",
    "ExplainerAccessError",
    "ExplainerFilesError",
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
    "create_model_card",
    "hard_ranks",
    "load_card_results",
    "pipeline",
    "push_explainer",
    "read_image",
]

# Public name -> the module of this package that defines it. A new public name is added here, to `__all__` and to the
# imports below; tests/test_package.py holds the three together.
_MODULE_OF = {
    "AhaConfig": "configuration_aha",
    "AhaExplainer": "modeling_aha",
    "AhaModelCard": "model_card",
    "AhaModelCardData": "model_card",
    "AhaOutput": "modeling_aha",
    "AhaTrainer": "trainer",
    "AhaTrainingArguments": "training_args",
    "AttributionDecoder": "decoder_aha",
    "ClassifierMismatchError": "modeling_aha",
    "ExplainerAccessError": "repository_aha",
    "ExplainerFilesError": "repository_aha",
    "Explanation": "explanation",
    "FrozenClassifier": "classifier_aha",
    "ImageReadError": "images",
    "InputGeometry": "geometry",
    "QuantileRanker": "ranking",
    "SinkhornRanker": "ranking",
    "TransportRanker": "ranking",
    "UnsupportedClassifierError": "classifier_aha",
    "VisualAttributionPipeline": "pipelines",
    "create_model_card": "model_card",
    "hard_ranks": "ranking",
    "load_card_results": "result_files",
    "pipeline": "pipelines",
    "push_explainer": "hub",
    "read_image": "images",
}

if TYPE_CHECKING:
    from .classifier_aha import FrozenClassifier, UnsupportedClassifierError
    from .configuration_aha import AhaConfig
    from .decoder_aha import AttributionDecoder
    from .explanation import Explanation
    from .geometry import InputGeometry
    from .hub import push_explainer
    from .images import ImageReadError, read_image
    from .model_card import AhaModelCard, AhaModelCardData, create_model_card
    from .modeling_aha import AhaExplainer, AhaOutput, ClassifierMismatchError
    from .pipelines import VisualAttributionPipeline, pipeline
    from .ranking import QuantileRanker, SinkhornRanker, TransportRanker, hard_ranks
    from .repository_aha import ExplainerAccessError, ExplainerFilesError
    from .result_files import load_card_results
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
