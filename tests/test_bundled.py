"""The bundled explainer: real weights on real photographs, without network."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_aha
from hf_aha import AhaExplainer
from hf_aha.metrics import deletion_insertion_curves
from hf_aha.perturbation import Normalization, reference_image


BUNDLED = Path(hf_aha.__file__).parent / "bundled"
PHOTOGRAPHS = sorted((BUNDLED / "photographs").glob("*.jpg"))


@pytest.fixture(scope="module")
def explainer() -> AhaExplainer:
    return AhaExplainer.from_pretrained("imagenette-demo").eval()


def test_weights_fit_the_limit_and_are_half_precision_safetensors():
    weights = list(BUNDLED.rglob("*.safetensors"))
    assert sorted(path.parent.name for path in weights) == [
        "classifier",
        "imagenette-demo",
        "imagenette-demo-gradient",
        "vit-s14-imagenette",
        "vit-s14-imagenette-gradient",
    ]
    assert sum(path.stat().st_size for path in weights) <= 24_000_000
    assert not [path for path in BUNDLED.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_loads_in_float32_and_names_no_machine(explainer):
    assert {p.dtype for p in explainer.parameters()} == {torch.float32}
    assert explainer.config.includes_classifier
    for path in BUNDLED.rglob("*.json"):
        assert not [value for value in _strings(json.loads(path.read_text())) if value.startswith(("/", ".."))], path


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_predicts_the_class_of_each_photograph(explainer, path):
    explanation = explainer.explain(path)
    assert explanation.label.casefold().replace(" ", "-") == path.stem
    assert explanation.scores.shape == (explanation.image.height, explanation.image.width)


def test_maps_are_more_faithful_than_random_and_centred_ones(explainer):
    """Mean insertion minus deletion over the photographs, both references."""
    processor = explainer.image_processor
    explanations = explainer.explain(list(PHOTOGRAPHS))
    pixels = processor([e.image for e in explanations], return_tensors="pt")["pixel_values"]
    norm = Normalization(explainer.config.image_mean, explainer.config.image_std)
    with torch.no_grad():
        output = explainer(pixels)
    height, width = pixels.shape[-2:]
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)[None]
    rivals = {
        "random": torch.rand(output.scores.shape, generator=torch.Generator().manual_seed(0)),
        "centre": torch.exp(-2 * (y**2 + x**2)).expand(output.scores.shape),
    }

    def gap(scores: torch.Tensor, reference: torch.Tensor) -> float:
        curves = deletion_insertion_curves(
            lambda batch: explainer.classifier(batch).logits,
            pixels,
            reference,
            scores,
            output.target,
            fractions=(0, 0.1, 0.2, 0.3, 0.5, 0.75, 1),
        )
        return float((curves.insertion_auc - curves.deletion_auc).mean())

    for kind in ("blur", "mean"):
        reference = norm.normalize(reference_image(norm.denormalize(pixels), kind))
        ours = gap(output.scores, reference)
        assert ours > gap(rivals["random"], reference) + 0.1, kind
        assert ours > gap(rivals["centre"], reference), kind


def test_maps_of_two_classes_part_where_two_photographs_share_one_image(explainer):
    """Class conditioning: the top pixels of a class lie in its own half more than those of the other class do."""
    found = {path.stem: explainer.explain(path) for path in sorted((BUNDLED / "photographs").glob("*.jpg"))}
    side, leads = 160, []
    for pair in itertools.combinations(found.values(), 2):
        mosaic = np.concatenate([np.asarray(e.image.resize((side, 2 * side))) for e in pair], axis=1)
        shares = []
        for explanation in pair:
            scores = explainer.explain(mosaic, target=explanation.label).scores
            top = scores >= np.nanquantile(scores, 0.8)
            shares.append(top[:, :side].sum() / top.sum())
        leads.append(shares[0] - shares[1])
    assert len(leads) == 10 and np.mean(leads) > 0.3, leads
    # One pair, the dog and the truck, is told apart no better than by chance.
    assert sum(lead > 0.05 for lead in leads) >= 9, leads


def test_the_gradient_informed_explainer_shares_the_classifier_and_puts_the_pixels_in_a_better_order(explainer):
    informed = AhaExplainer.from_pretrained("imagenette-demo-gradient", local_files_only=True).eval()
    assert informed.config.passes_per_explanation == 5 and informed.config.gradient_detail
    processor = informed.image_processor
    photographs = [e.image for e in explainer.explain(list(PHOTOGRAPHS))]
    pixels = processor(photographs, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        maps = {one: one(pixels) for one in (explainer, informed)}
    torch.testing.assert_close(maps[explainer].logits, maps[informed].logits, atol=1e-4, rtol=1e-4)
    norm = Normalization(informed.config.image_mean, informed.config.image_std)
    reference = norm.normalize(reference_image(norm.denormalize(pixels), "blur"))
    areas = {
        one: deletion_insertion_curves(
            lambda batch: explainer.classifier(batch).logits,
            pixels,
            reference,
            found.scores,
            found.target,
            fractions=(0, 0.1, 0.2, 0.3, 0.5, 0.75, 1),
        )
        for one, found in maps.items()
    }
    assert areas[informed].deletion_auc.mean() < areas[explainer].deletion_auc.mean()
    assert areas[informed].insertion_auc.mean() > areas[explainer].insertion_auc.mean()


@pytest.mark.parametrize(("name", "passes"), [("vit-s14-imagenette", 1), ("vit-s14-imagenette-gradient", 5)])
def test_the_larger_explainers_ask_for_their_classifier(name, passes):
    decoder = AhaExplainer.from_pretrained(name, load_classifier=False)
    assert decoder.classifier is None and decoder.config.image_size == [224, 224]
    assert decoder.config.passes_per_explanation == passes
    assert decoder.config.base_model_name_or_path == "vit-s14-imagenette"
    with pytest.raises(OSError, match="classifier="):
        AhaExplainer.from_pretrained(name, local_files_only=True)


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []
