"""Faithfulness metrics: what happens to the class probability when pixels go or come in the order of a map."""

from __future__ import annotations

from .curves import Curves, deletion_insertion_curves


__all__ = ["Curves", "deletion_insertion_curves"]
