"""Faithfulness metrics: what happens to the class probability when pixels go or come in the order of a map.

A number is measured by a named `Protocol` (`get_protocol`, `evaluate_maps`), kept per image in a `ProtocolResult`, and
compared only with numbers of the same protocol.
"""

from __future__ import annotations

from .curves import Curves, deletion_insertion_curves
from .evaluation import evaluate_maps
from .protocols import Protocol, get_protocol, protocol_names
from .results import (
    ProtocolResult,
    ResultContext,
    Summary,
    merge_results,
    paired_difference,
    results_table,
    summarise,
)


__all__ = [
    "Curves",
    "Protocol",
    "ProtocolResult",
    "ResultContext",
    "Summary",
    "deletion_insertion_curves",
    "evaluate_maps",
    "get_protocol",
    "merge_results",
    "paired_difference",
    "protocol_names",
    "results_table",
    "summarise",
]
