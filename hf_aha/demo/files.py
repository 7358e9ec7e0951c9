"""What the demo lets people take home: the sheet as PNG, the raw scores as npy, the record as JSON."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from .answers import Answer


MAX_MAP_PIXELS = 4_000_000
"""Largest map written; that of a larger photograph is written at this size, which the record says."""


def write_files(answer: Answer, record: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Write the sheet, the scores and the record of one answer.

    The scores are float32 of shape (H, W) in the pixels of the photograph, NaN where the classifier did not look;
    above `MAX_MAP_PIXELS` in those of a smaller copy.

    Args:
        answer: what was explained.
        record: facts about explainer and versions that the JSON holds besides.
        folder: an existing one.

    Returns:
        the paths by "png", "npy" and "json".
    """
    explanation, photograph = answer.explanation, answer.photograph
    height, width = photograph.geometry.original_size
    scale = min(math.sqrt(MAX_MAP_PIXELS / (height * width)), 1.0)
    size = (max(round(scale * height), 1), max(round(scale * width), 1))
    paths = {kind: folder / f"explanation.{kind}" for kind in ("png", "npy", "json")}
    explanation.sheet().save(paths["png"])
    np.save(paths["npy"], photograph.to_size(answer.scores, size), allow_pickle=False)
    facts = {
        "image_size": {"width": width, "height": height},
        "map_size": {"width": size[1], "height": size[0]},
        "label": explanation.label,
        "target": explanation.target,
        "probability": explanation.probability,
        "against_label": explanation.against_label,
        "against": explanation.against,
        "against_probability": explanation.against_probability,
        "predicted_label": explanation.predicted_label,
        "predicted_probability": explanation.predicted_probability,
        "refinement": explanation.refinement,
        **record,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    paths["json"].write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return paths
