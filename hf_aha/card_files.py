"""What lies beside a model card: the results it cites, example pictures, the log and plot of the training."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from .card_results import CardResults
from .files import write_atomically
from .images import ImageSource, read_image
from .markdown import clean_text
from .model_card import AhaModelCard, Example, Licence, create_model_card
from .modeling_aha import AhaExplainer
from .plots import plot_training
from .result_files import read_training_log, read_validation
from .visualization import explanation_sheet


CARD_FILE = "README.md"
RESULTS_FILE = "results.json"
EXAMPLES_FOLDER = "examples"
TRAINING_FOLDER = "training"
TRAINING_LOG = "log.jsonl"
TRAINING_PLOT = "training.png"

# The first three by name, so that nobody chose them by their maps.
BUNDLED_PHOTOGRAPHS = tuple(sorted((Path(__file__).parent / "bundled" / "photographs").glob("*.jpg"))[:3])


def write_card(
    explainer: AhaExplainer,
    folder: Path,
    *,
    repo_id: str,
    results: CardResults | None = None,
    datasets: Sequence[str] | None = None,
    licence: Licence | str | None = None,
    tags: Iterable[str] | None = None,
    photographs: Iterable[ImageSource] = (),
    examples: Sequence[Example] = (),
) -> AhaModelCard:
    """Write `README.md` into `folder`, with `results.json` and the pictures that it shows.

    A training log that lies in `folder`/training already is shown, and its last validation is among the results.

    Args:
        explainer: for pictures its classifier must be attached.
        folder: as it will be uploaded.
        repo_id, results, datasets, licence, tags: as in [`create_model_card`].
        photographs: explained for the class predicted, in the order given.
        examples: pictures that lie in `folder` already.

    Raises:
        ImageReadError: a photograph cannot be read.
        OSError: a file cannot be written.
    """
    results = results or CardResults()
    log = folder / TRAINING_FOLDER / TRAINING_LOG
    if results.validation is None and log.is_file():
        results = CardResults(results.measurements, results.costs, read_validation(log))
    examples = [*examples, *write_examples(explainer, photographs, folder)]
    if results:
        results.save(folder / RESULTS_FILE)
        # As the file has them, so that the card cannot say more.
        results = CardResults.from_dict(results.to_dict())
    card = create_model_card(
        explainer,
        repo_id=repo_id,
        results=results,
        results_file=RESULTS_FILE,
        datasets=datasets,
        licence=licence,
        tags=tags,
        examples=examples,
        folder=folder,
    )
    write_atomically(folder / CARD_FILE, lambda file: file.write_text(str(card), encoding="utf-8"))
    return card


def write_examples(explainer: AhaExplainer, photographs: Iterable[ImageSource], folder: Path) -> list[Example]:
    """Explain photographs for their predicted classes and write the pictures into `folder`/examples."""
    examples = []
    for number, source in enumerate(photographs, 1):
        with torch.no_grad():
            explanation = explainer.explain(read_image(source))
        # The title is the label alone: a probability would be a number that no result file holds.
        sheet = explanation_sheet(
            explanation.image, explanation.scores, clean_text(explanation.label), panel_height=240
        )
        stem = Path(source).stem if isinstance(source, (str, Path)) else ""
        name = f"{number}-{re.sub(r'[^a-z0-9]+', '-', stem.casefold()).strip('-')}".strip("-")
        file = f"{EXAMPLES_FOLDER}/{name}.jpg"
        write_atomically(folder / file, lambda path, sheet=sheet: sheet.save(path, "JPEG", quality=90))
        examples.append(Example(file, explanation.label))
    return examples


def write_training_files(log: Path, folder: Path) -> None:
    """Copy a training log into `folder`/training, and draw it beside the copy.

    Raises:
        ValueError: a line of the log is no JSON.
    """
    place = folder / TRAINING_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    if log.resolve() != (place / TRAINING_LOG).resolve():
        write_atomically(place / TRAINING_LOG, lambda file: shutil.copyfile(log, file))
    entries = read_training_log(log)
    if any(len(entry) > 1 for entry in entries):
        plot_training(entries, place / TRAINING_PLOT)


def training_log_of(explainer: AhaExplainer) -> Path | None:
    """The training log that lies beside the files of an explainer which was loaded from a folder or just trained."""
    log = Path(explainer.name_or_path or "") / TRAINING_FOLDER / TRAINING_LOG
    return log if log.is_file() else None


def licence_of_card(card: ModelCard, *, inherited: bool = True) -> Licence | None:
    """The licence that the card of a target model names, or None."""
    data = card.data
    if not isinstance(data.license, str):
        return None
    name, link = (value if isinstance(value, str) else None for value in (data.license_name, data.license_link))
    return Licence(data.license, name, link, inherited=inherited)


__all__ = [
    "BUNDLED_PHOTOGRAPHS",
    "CARD_FILE",
    "EXAMPLES_FOLDER",
    "RESULTS_FILE",
    "TRAINING_FOLDER",
    "TRAINING_LOG",
    "TRAINING_PLOT",
    "licence_of_card",
    "training_log_of",
    "write_card",
    "write_examples",
    "write_training_files",
]
