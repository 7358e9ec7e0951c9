#!/usr/bin/env python
"""Write the cards of the published explainers again, from `cards.yaml`, the bundled explainers and the result files.

    python model_cards/render.py --classifier vit-s14-imagenette=FOLDER_OR_ID

Pictures need the classifier. One that neither lies beside its explainer nor is given keeps its pictures, if they show
the weights that are bundled now.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml

from hf_aha import AhaConfig, AhaExplainer, create_model_card
from hf_aha.card_files import (
    BUNDLED_PHOTOGRAPHS,
    CARD_FILE,
    EXAMPLES_FOLDER,
    RESULTS_FILE,
    TRAINING_FOLDER,
    write_examples,
    write_training_files,
)
from hf_aha.card_results import CardResults
from hf_aha.files import write_atomically
from hf_aha.model_card import AhaModelCard, Example, Licence, training_references
from hf_aha.result_files import load_card_results


ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
BUNDLED = ROOT / "hf_aha" / "bundled"
EXAMPLES_RECORD = Path(EXAMPLES_FOLDER) / "examples.json"


def measure(name: str, settings: Mapping[str, object], explainer: AhaExplainer) -> CardResults:
    """What the result files of a card say."""
    paths = [path for pattern in settings["results"] for path in sorted(ROOT.glob(pattern))]
    log = settings["training_log"]
    if settings["results"] and not paths:
        raise SystemExit(f"No file matches the results of {name} in cards.yaml: {', '.join(settings['results'])}.")
    return load_card_results(
        paths, references=training_references(explainer.config), training_log=None if log is None else ROOT / log
    )


def compose(
    name: str,
    settings: Mapping[str, object],
    explainer: AhaExplainer,
    results: CardResults,
    examples: Sequence[Example],
    folder: Path,
) -> AhaModelCard:
    """The card itself, from what lies in `folder`."""
    return create_model_card(
        explainer,
        repo_id=name,
        results=results,
        results_file=RESULTS_FILE,
        datasets=settings["datasets"],
        licence=Licence(settings["license"], inherited=True),
        examples=examples,
        folder=folder,
    )


def weights_digest(name: str) -> str:
    """SHA-256 of the bundled weights, which says which decoder the pictures show."""
    return hashlib.sha256((BUNDLED / name / "model.safetensors").read_bytes()).hexdigest()


def read_examples(name: str, cards: Path = CARDS) -> list[Example]:
    """The pictures that lie beside a card.

    Raises:
        SystemExit: there are none, or they show other weights than the bundled ones.
    """
    path = cards / name / EXAMPLES_RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record.get("weights") != weights_digest(name):
        raise SystemExit(
            f"The pictures of {name} do not show its bundled weights; give --classifier {name}=FOLDER_OR_ID to draw "
            "them again."
        )
    return [Example(**example) for example in record["examples"]]


def draw_examples(name: str, explainer: AhaExplainer, folder: Path) -> list[Example]:
    """Draw the pictures of a card, and note which weights they show."""
    shutil.rmtree(folder / EXAMPLES_FOLDER, ignore_errors=True)
    examples = write_examples(explainer, BUNDLED_PHOTOGRAPHS, folder)
    record = {"weights": weights_digest(name), "examples": [vars(example) for example in examples]}
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / EXAMPLES_RECORD, lambda file: file.write_text(text, encoding="utf-8"))
    return examples


def render(name: str, settings: Mapping[str, object], classifier: str | None, cards: Path = CARDS) -> Path:
    """Write one card with everything beside it, and return its folder."""
    folder = cards / name
    explained = AhaConfig.from_pretrained(BUNDLED / name).base_model_name_or_path
    included = (BUNDLED / str(explained) / "classifier").is_dir()
    drawable = classifier is not None or included
    explainer = AhaExplainer.from_pretrained(
        str(BUNDLED / name), classifier=classifier, load_classifier=drawable, dtype=torch.float32
    ).eval()
    examples = draw_examples(name, explainer, folder) if drawable else read_examples(name, cards)
    if settings["training_log"] is not None:
        write_training_files(ROOT / settings["training_log"], folder)
    else:
        shutil.rmtree(folder / TRAINING_FOLDER, ignore_errors=True)
    results = measure(name, settings, explainer)
    results.save(folder / RESULTS_FILE)
    card = compose(name, settings, explainer, CardResults.from_dict(results.to_dict()), examples, folder)
    return write_atomically(folder / CARD_FILE, lambda file: file.write_text(str(card), encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="cards to write (default: all)")
    parser.add_argument("--classifier", action="append", default=[], metavar="NAME=FOLDER_OR_ID")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    settings = yaml.safe_load((CARDS / "cards.yaml").read_text(encoding="utf-8"))
    classifiers = dict(pair.split("=", 1) for pair in args.classifier)
    unknown = sorted({*args.names, *classifiers} - set(settings))
    if unknown:
        parser.error(f"there is no card {unknown[0]!r}; cards.yaml has {', '.join(settings)}")
    for name in args.names or settings:
        print(render(name, settings[name], classifiers.get(name)).relative_to(ROOT))


if __name__ == "__main__":
    main()
