"""Attribution methods that people use, behind one call: `method(classifier, pixel_values, target) -> scores`.

Random order, centre Gaussian, attention rollout, attention relevance, RISE and patch search need nothing more than
this package; the others need `pip install hf-aha[bench]`, and say so when they are called without.
"""

from __future__ import annotations

from .base import Method, MissingLibraryError, Passes
from .random_and_centre import RANDOM_SEEDS
from .registry import METHODS, get_method, methods_table


__all__ = [
    "METHODS",
    "RANDOM_SEEDS",
    "Method",
    "MissingLibraryError",
    "Passes",
    "get_method",
    "methods_table",
]
