#!/usr/bin/env python
"""Explain photographs, and measure on each of them whether the map is better than chance.

    python examples/explain_a_classifier.py imagenette-demo photo.jpg
    python examples/explain_a_classifier.py vit-s14-imagenette photo.jpg --classifier FOLDER_OR_ID --target church

An explainer is a folder, an id of the Hub or the name of a bundled one; it fetches the classifier that it explains
unless `--classifier` gives it. For every photograph a picture is written, and the areas under its deletion and
insertion curves are printed beside those of a random order of the pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_aha import AhaExplainer, Explanation
from hf_aha.metrics import Curves, deletion_insertion_curves
from hf_aha.perturbation import Normalization, reference_image


def measured(explainer: AhaExplainer, explanation: Explanation, reference: str) -> tuple[Curves, Curves]:
    """The curves of the map, and those of one random order, for the class that the map explains."""
    pixel_values = explainer.image_processor([explanation.image], return_tensors="pt")["pixel_values"]
    pixel_values = pixel_values.to(explainer.device, explainer.dtype)
    target = torch.tensor([explanation.target], device=explainer.device)
    normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
    removed = normalization.normalize(reference_image(normalization.denormalize(pixel_values), reference))
    with torch.no_grad():
        scores = explainer(pixel_values, target).scores
    chance = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)).to(scores)

    def curves(order: torch.Tensor) -> Curves:
        return deletion_insertion_curves(
            lambda images: explainer.classifier(images).logits, pixel_values, removed, order, target
        )

    return curves(scores), curves(chance)


def main(argv: Sequence[str] | None = None) -> list[Explanation]:
    """Explain, measure, print a line a photograph, and return the explanations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("explainer", help="folder, Hub id, or name of a bundled explainer")
    parser.add_argument("photographs", nargs="+", metavar="PHOTO")
    parser.add_argument("--classifier", metavar="ID_OR_DIR", help="where the classifier lies, if not where it was")
    parser.add_argument("--target", help="class to explain, by label or index (default: the predicted one)")
    parser.add_argument("--reference", default="blur", choices=("black", "mean", "blur"), help="of a removed pixel")
    parser.add_argument("--output", type=Path, default=Path("explained"), metavar="DIR")
    arguments = parser.parse_args(argv)

    explainer = AhaExplainer.from_pretrained(arguments.explainer, classifier=arguments.classifier).eval()
    target = None if arguments.target is None else explainer.class_index(arguments.target)
    arguments.output.mkdir(parents=True, exist_ok=True)
    explanations = []
    for number, photograph in enumerate(arguments.photographs):
        explanation = explainer.explain(photograph, target)
        explanation.sheet().save(arguments.output / f"{number:03d}-{Path(photograph).stem}.png")
        ours, chance = measured(explainer, explanation, arguments.reference)
        print(
            f"{photograph}: {explanation.title}; deletion {float(ours.deletion_auc):.3f} "
            f"(random {float(chance.deletion_auc):.3f}), insertion {float(ours.insertion_auc):.3f} "
            f"(random {float(chance.insertion_auc):.3f})"
        )
        explanations.append(explanation)
    return explanations


if __name__ == "__main__":
    main()
