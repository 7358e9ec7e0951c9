"""Maps of a whole dataset: made by any number of processes, kept as a dataset of the Hub, read back in photographs.

`hf-aha explain-dataset` is this package on the command line. `load_maps` reads what it wrote, `StoredMap` brings one
row back to the pixels of its photograph.
"""

from __future__ import annotations

from .engine import MapSettings, MapsSummary, explain_dataset
from .folder import MapsError, MapsFolder
from .ranks import QUANTISATIONS, Quantisation, ranks_from_png, ranks_to_png
from .reader import StoredMap, load_maps
from .rows import ExplainedRows
from .sharing import push_maps


__all__ = [
    "QUANTISATIONS",
    "ExplainedRows",
    "MapSettings",
    "MapsError",
    "MapsFolder",
    "MapsSummary",
    "Quantisation",
    "StoredMap",
    "explain_dataset",
    "load_maps",
    "push_maps",
    "ranks_from_png",
    "ranks_to_png",
]
