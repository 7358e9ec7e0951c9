"""One run of a training recipe with overrides, resumable and timed, and what its maps are worth."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from accelerate.utils import set_seed
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_aha
from hf_aha import AhaExplainer
from hf_aha.data import Photographs, ProcessorCrop, collate, load_photographs
from hf_aha.metrics.curves import deletion_insertion_curves
from hf_aha.metrics.legibility import total_variation
from hf_aha.metrics.passes import TargetPasses
from hf_aha.metrics.results import bootstrap
from hf_aha.perturbation import Normalization, reference_image
from hf_aha.trainer import AhaTrainer


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SETTINGS = ("blur/pixel", "blur/cell", "mean/pixel", "mean/cell")
ELEVEN = tuple(step / 10 for step in range(11))
WARM_UP = 2  # steps that are not timed, where there are more

References = Callable[[str, torch.Tensor, range], torch.Tensor]
"""(kind, RGB images (B, 3, H, W), their rows) -> references, RGB (B, 3, H, W)."""


def recipe_script() -> ModuleType:
    """recipes/train_explainer.py, wherever the study is run from."""
    spec = importlib.util.spec_from_file_location("train_explainer", RECIPES / "train_explainer.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["train_explainer"] = module
    spec.loader.exec_module(module)
    return module


def bundled_classifier(target: str) -> Path | None:
    """The folder of a bundled explainer's classifier; None where `target` is none, or is a folder itself."""
    found = Path(hf_aha.__file__).parent / "bundled" / target / "classifier"
    return found if found.is_dir() and not Path(target).is_dir() else None


def prepare_classifier(target: str, folder: Path) -> str:
    """A folder or id that the recipe takes as its classifier, with its image processor beside it.

    Args:
        target: a classifier, or the name of a bundled explainer that has one.
        folder: where the classifier of a bundled explainer is copied to.
    """
    bundled = bundled_classifier(target)
    if bundled is None:
        return target
    found = folder / target
    if not (found / "preprocessor_config.json").is_file():
        AutoModelForImageClassification.from_pretrained(bundled, dtype=torch.float32).save_pretrained(found)
        # Last, because its presence says that the folder is whole.
        AutoImageProcessor.from_pretrained(bundled.parent).save_pretrained(found)
    return str(found)


class TimedTrainer(AhaTrainer):
    """Remembers the processor seconds of every training step (one thread: core seconds; decoding not counted)."""

    def training_step(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor
    ) -> hf_aha.objectives.ObjectiveOutput:
        started = time.process_time()
        output = super().training_step(pixel_values, labels, indices)
        self.seconds = [*getattr(self, "seconds", ()), time.process_time() - started]
        return output


@dataclass(frozen=True)
class Trained:
    """A trained explainer.

    Attributes:
        explainer: with its final weights.
        seconds_per_step: mean processor seconds of the steps that this process took; None where it took none.
    """

    explainer: AhaExplainer
    seconds_per_step: float | None


def train(recipe: ModuleType, words: Sequence[str]) -> Trained:
    """Run a recipe from its words, going on from the newest checkpoint of its folder.

    Args:
        recipe: of `recipe_script`.
        words: YAML file and command line, with classifier, dataset and output_dir.

    Raises:
        SystemExit: a word is unknown or a value refused; a signal ended the run, with a checkpoint (code 0).
    """
    args = recipe.parse_yaml_and_command_line(recipe.RecipeArguments, [*words, "--resume_from_checkpoint=auto"])
    set_seed(args.seed)
    explainer = recipe.build_explainer(args)
    trainer = TimedTrainer(explainer, args, *recipe.build_datasets(args, explainer))
    explainer = trainer.train()
    seconds = getattr(trainer, "seconds", [])
    seconds = seconds[WARM_UP:] or seconds
    return Trained(explainer, statistics.fmean(seconds) if seconds else None)


def held_out(explainer: AhaExplainer, dataset: str, split: str) -> Photographs:
    """The photographs that studies measure on: the split shuffled with seed 0, as the image processor makes them."""
    rows, column = load_photographs(dataset, split=split)
    return Photographs(rows.shuffle(seed=0), column, ProcessorCrop(explainer.image_processor))


def plain_references(kind: str, rgb: torch.Tensor, rows: range) -> torch.Tensor:
    """`reference_image`, with the same noise for a row whoever asks."""
    if kind != "noise":
        return reference_image(rgb, kind)
    noise = [reference_image(rgb[:1], kind, generator=torch.Generator().manual_seed(row)) for row in rows]
    return torch.cat(noise)


@dataclass
class Measured:
    """What maps are worth, image by image.

    Attributes:
        areas: setting -> insertion minus deletion area of each photograph.
        roughness: total variation of each rank map (`hf_aha.metrics.total_variation`); NaN for a constant map.
    """

    areas: dict[str, list[float]] = field(default_factory=dict)
    roughness: list[float] = field(default_factory=list)

    def mean_areas(self) -> torch.Tensor:
        """(images,) mean over the settings."""
        return torch.tensor(list(self.areas.values())).mean(0)


@torch.no_grad()
def measure(
    explainer: AhaExplainer,
    photographs: Photographs,
    rows: int,
    settings: Sequence[str],
    *,
    references: References = plain_references,
    batch_size: int = 8,
) -> Measured:
    """Insertion minus deletion area of the predicted class, with eleven points a curve.

    Args:
        explainer: with its classifier.
        photographs: as the image processor makes them.
        rows: the first of them are measured.
        settings: REFERENCE/UNIT, the unit pixel or cell (a patch).
        references: makes a reference from its kind.
        batch_size: photographs a pass of the explainer.
    """
    explainer.eval()
    passes = TargetPasses(explainer.classifier)
    normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
    measured = Measured({setting: [] for setting in settings})
    for start in range(0, rows, batch_size):
        batch = range(start, min(start + batch_size, rows))
        pixel_values = collate([photographs[row] for row in batch]).pixel_values.to(passes.device)
        rgb = normalization.denormalize(pixel_values)
        output = explainer(pixel_values)
        measured.roughness += total_variation(output.scores).tolist()
        for setting in settings:
            kind, unit = setting.rsplit("/", 1)
            curves = deletion_insertion_curves(
                passes,
                pixel_values,
                normalization.normalize(references(kind, rgb, batch)),
                output.scores,
                output.target,
                fractions=ELEVEN,
                cells=explainer.classifier.grid(*pixel_values.shape[-2:]) if unit == "cell" else None,
            )
            measured.areas[setting] += (curves.insertion_auc - curves.deletion_auc).tolist()
    return measured


def interval(values: torch.Tensor | Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean and 95 % bootstrap interval over images, None and NaN left out; ready for JSON."""
    values = torch.as_tensor([math.nan if value is None else float(value) for value in values])
    kept = values[~values.isnan()]
    if not len(kept):
        return {"mean": None, "low": None, "high": None, "images": 0}
    found = bootstrap(kept.numpy(), len(values) - len(kept), "quality")
    return {"mean": found.mean, "low": found.low, "high": found.high, "images": found.images}


def shown(entry: Mapping[str, float | None] | None, sign: str = "") -> str:
    """An interval as a cell of a table.

    Example:
        >>> shown({"mean": 0.1, "low": -0.02, "high": 0.22}, "+")
        '+0.100 [-0.020, +0.220]'
    """
    if entry is None or entry["mean"] is None:
        return "-"
    if entry["low"] is None:
        return f"{entry['mean']:{sign}.3f}"
    return f"{entry['mean']:{sign}.3f} [{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]"
