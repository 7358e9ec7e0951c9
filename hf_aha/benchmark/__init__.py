"""Methods times protocols times metrics on a split of a data set, with what each map costs, in one resumable run.

`hf-aha evaluate` and `hf-aha benchmark` are this package on the command line; `BenchmarkResults.load` reads what they
wrote.
"""

from __future__ import annotations

from .collect import collect
from .images import EvaluationImages, select_images
from .masks import ObjectColumn
from .methods import Entry, LearnedExplainer, parse_entries
from .report import markdown, write_examples, write_report
from .results import BenchmarkResults, MethodRecord
from .runner import BenchmarkSettings, measure, processes
from .store import BenchmarkError, Store


__all__ = [
    "BenchmarkError",
    "BenchmarkResults",
    "BenchmarkSettings",
    "Entry",
    "EvaluationImages",
    "LearnedExplainer",
    "MethodRecord",
    "ObjectColumn",
    "Store",
    "collect",
    "markdown",
    "measure",
    "parse_entries",
    "processes",
    "select_images",
    "write_examples",
    "write_report",
]
