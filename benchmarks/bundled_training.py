"""A small training run from what the package brings along: its classifier, its recipe, its photographs."""

from __future__ import annotations

from pathlib import Path

import datasets
import torch
import yaml
from transformers import AutoImageProcessor

import hf_aha
from hf_aha import AhaExplainer
from hf_aha.data import Photographs, ProcessorCrop, RandomCrop, load_photographs
from hf_aha.training_args import AhaTrainingArguments


BUNDLED = Path(hf_aha.__file__).parent / "bundled"
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "imagenette-demo" / "explainer.yaml"
ATTENTION = "attn_implementation"  # of the recipe; the other settings are the trainer's


def bundled_explainer() -> AhaExplainer:
    """An untrained explainer of the bundled classifier, the same in every process."""
    torch.manual_seed(0)
    place = BUNDLED / "imagenette-demo"
    return AhaExplainer.from_classifier(
        place / "classifier",
        image_processor=AutoImageProcessor.from_pretrained(place, local_files_only=True),
        local_files_only=True,
        attn_implementation="eager",
    )


def bundled_arguments(recipe: Path, output: Path, **changes: object) -> AhaTrainingArguments:
    """The settings of a recipe with some of them changed, for a run in `output`."""
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    settings.pop(ATTENTION, None)
    return AhaTrainingArguments(**{**settings, "output_dir": str(output), **changes})


def bundled_photographs(
    folder: Path, explainer: AhaExplainer, side: int, *, rows: int
) -> tuple[Photographs, Photographs]:
    """Training crops of `side` pixels and validation rows, of the bundled photographs over and over.

    Args:
        folder: for a parquet file, written if it is not there.
        explainer: its image processor and normalisation are used.
        side: of a training crop.
        rows: of the dataset.
    """
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    place = folder / "photographs"
    if not place.exists():
        files = sorted((BUNDLED / "photographs").glob("*.jpg"))
        cells = [{"bytes": files[row % len(files)].read_bytes(), "path": None} for row in range(rows)]
        table = datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image()}))
        place.mkdir()
        table.to_parquet(place / "train.parquet")
    table, column = load_photographs(str(place), split="train")
    config = explainer.config
    crop = RandomCrop((side, side), tuple(config.image_mean), tuple(config.image_std))
    return Photographs(table, column, crop), Photographs(table, column, ProcessorCrop(explainer.image_processor))
