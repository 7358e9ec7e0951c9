"""Why a rather than b: maps, curves, refinement and pictures that compare two classes."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import ViTImageProcessor, ViTImageProcessorPil

import hf_aha
from hf_aha import AhaExplainer
from hf_aha.contrast_aha import contrast_classes, contrast_scores
from hf_aha.metrics.curves import deletion_insertion_curves
from hf_aha.perturbation import Normalization, reference_image
from hf_aha.refinement import SCOPES
from hf_aha.visualization import explanation_sheet, overlay, rank_map


LABELS = {0: "tench", 1: "English springer", 2: "golf ball", 3: "church", 4: "parachute"}
SIZES = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
NORMALIZATION = Normalization(PROCESSOR.image_mean, PROCESSOR.image_std)


@pytest.fixture
def make_explainer(make_classifier):
    def make(**settings):
        model = make_classifier("vit")
        model.config.id2label = dict(LABELS)
        with torch.no_grad():
            # Probabilities of a random head hardly move; these do.
            model.classifier.weight *= 10
        return AhaExplainer.from_classifier(model, image_processor=PROCESSOR, **SIZES, **settings).eval()

    return make


@pytest.fixture
def explainer(make_explainer):
    return make_explainer()


@pytest.fixture
def pixels():
    return NORMALIZATION.normalize(F.interpolate(torch.rand(3, 3, 4, 5), size=(32, 32), mode="bicubic").clamp(0, 1))


def make_photograph(seed=0, size=(40, 30)):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def standardised(scores):
    """One map as numpy sees it."""
    values = scores.double().numpy()
    return (values - values.mean()) / values.std()


# ---------------------------------------------------------------------------------------------------- both functions


def test_scores_are_standardised_map_by_map_and_subtracted():
    a, b = torch.randn(2, 3, 6, 5) * 7 + 3, torch.randn(2, 3, 6, 5) / 50
    found = contrast_scores(a, b)
    for place in np.ndindex(2, 3):
        expected = standardised(a[place]) - standardised(b[place])
        np.testing.assert_allclose(found[place].numpy(), expected, atol=1e-4)
    assert torch.equal(contrast_scores(b, a), -found)
    # Neither unit nor offset of a class's scores counts.
    torch.testing.assert_close(contrast_scores(100 * a - 5, b / 9 + 2), found, atol=1e-3, rtol=1e-3)
    half = contrast_scores(a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32


def test_a_flat_map_counts_as_nothing():
    a, flat = torch.randn(1, 4, 4), torch.full((1, 4, 4), 0.1)
    order = contrast_scores(a, flat).flatten().argsort()
    assert torch.equal(order, a.flatten().argsort())
    assert torch.isfinite(contrast_scores(flat, flat)).all()


def test_without_a_target_the_most_probable_other_class_is_asked_about():
    logits = torch.tensor([[0.0, 5.0, 3.0], [9.0, 1.0, 2.0]])
    target, against = contrast_classes(logits, None, torch.tensor([1, 1]))
    assert target.tolist() == [2, 0] and against.tolist() == [1, 1]


def test_one_class_is_compared_with_each_of_several():
    target, against = contrast_classes(torch.zeros(2, 5), torch.tensor([[0, 1], [2, 3]]), torch.tensor([4, 0]))
    assert target.shape == (2, 2) and against.tolist() == [[4, 4], [0, 0]]


# ---------------------------------------------------------------------------------------------------- forward


@torch.no_grad()
def test_forward_subtracts_the_maps_of_both_classes(explainer, pixels):
    target, against = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 4])
    output = explainer(pixels, target, against=against)
    a, b = explainer(pixels, target), explainer(pixels, against)
    torch.testing.assert_close(output.scores, contrast_scores(a.scores, b.scores))
    assert output.scores.shape == (3, 32, 32) and output.scores.dtype == torch.float32
    assert output.target.tolist() == [0, 1, 2] and output.against.tolist() == [3, 3, 4]
    torch.testing.assert_close(output.logits, a.logits)
    torch.testing.assert_close(explainer(pixels, against, against=target).scores, -output.scores)
    # One class for all images is the same question.
    torch.testing.assert_close(explainer(pixels, 0, against=3).scores[0], output.scores[0])
    assert a.against is None and len(explainer(pixels, target, return_dict=False)) == 3
    scores, _, _, other = explainer(pixels, target, return_dict=False, against=against)
    assert torch.equal(scores, output.scores) and torch.equal(other, output.against)


@torch.no_grad()
def test_forward_compares_several_classes_an_image(explainer, pixels):
    target = torch.tensor([[0, 1], [2, 3], [1, 0]])
    output = explainer(pixels, target, against=4)
    assert output.scores.shape == (3, 2, 32, 32) and output.against.shape == (3, 2)
    for place in (0, 1):
        one = explainer(pixels, target[:, place], against=torch.tensor([4, 4, 4]))
        torch.testing.assert_close(output.scores[:, place], one.scores, atol=1e-4, rtol=1e-4)
    pairs = explainer(pixels, target, against=torch.tensor([[4, 3], [0, 1], [2, 2]]))
    torch.testing.assert_close(pairs.scores[:, 0], explainer(pixels, target[:, 0], against=pairs.against[:, 0]).scores)


@torch.no_grad()
def test_forward_without_a_target(explainer, pixels):
    predicted = explainer(pixels).target
    runners_up = explainer.explain_top(pixels, 2).target[:, 1]
    assert torch.equal(explainer(pixels, against=runners_up).target, predicted)
    # Why not the predicted class? Then the most probable other one is asked about.
    assert torch.equal(explainer(pixels, against=predicted).target, runners_up)


@torch.no_grad()
def test_the_gradient_informed_explainer_reads_each_class_its_own_gradients(make_explainer, pixels):
    explainer = make_explainer(gradient_features=1)
    output = explainer(pixels, 1, against=2)
    expected = contrast_scores(explainer(pixels, 1).scores, explainer(pixels, 2).scores)
    torch.testing.assert_close(output.scores, expected, atol=1e-4, rtol=1e-4)
    refined = explainer.refine(pixels, 1, against=2, steps=0, curve_points=2)
    torch.testing.assert_close(refined.scores, output.scores, atol=1e-4, rtol=1e-4)
    assert refined.passes.tolist() == [1 + 2 * (explainer.config.passes_per_explanation - 1) + 4] * 3


def test_gradients_reach_the_decoder(explainer, pixels):
    explainer(pixels, 0, against=1).scores.square().sum().backward()
    assert explainer.decoder.class_modulation.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("target", "against", "message"),
    [
        (1, 1, "Class 1 of image 0 is compared with itself: target and against must be two classes."),
        (torch.tensor([0, 1, 2]), torch.tensor([1, 2, 2]), "Class 2 of image 2 is compared with itself"),
        (0, 5, "The class index 5 is out of range"),
        (0, torch.tensor([1, 2]), r"against has shape \(2,\) for 3 images"),
        (0, torch.tensor([1.0, 2.0, 3.0]), "against must hold class indices as integers"),
        (None, torch.ones(3, 2, dtype=torch.long), r"against has shape \(3, 2\), but the classes asked about have"),
        (torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 2, dtype=torch.long), r"asked about have \(3, 3\)"),
    ],
    ids=str,
)
def test_a_question_that_cannot_be_asked_is_one_sentence(explainer, pixels, target, against, message):
    for ask in (explainer, explainer.refine):
        with pytest.raises(ValueError, match=message) as raised:
            ask(pixels, target, against=against)
        assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------- the metric


@torch.no_grad()
def test_curves_are_those_of_the_difference_of_the_probabilities(explainer, pixels):
    target, against = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 1])
    reference = NORMALIZATION.normalize(reference_image(NORMALIZATION.denormalize(pixels), "blur"))
    scores = torch.randn(3, 32, 32)

    def logits_of(images):
        return explainer.classifier(images).logits

    def curves(**question):
        return deletion_insertion_curves(logits_of, pixels, reference, scores, **question)

    found = curves(target=target, against=against)
    a, b = curves(target=target), curves(target=against)
    torch.testing.assert_close(found.deletion, a.deletion - b.deletion, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.insertion, a.insertion - b.insertion, atol=1e-5, rtol=1e-5)
    # The question turned round, with the map turned round, has the same value: what is deleted first is shown last.
    turned = deletion_insertion_curves(logits_of, pixels, reference, -scores, against, against=target)
    value = found.insertion_auc - found.deletion_auc
    torch.testing.assert_close(turned.insertion_auc - turned.deletion_auc, value, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"against has shape \(2,\), but must name one class for each of 3 images"):
        curves(target=target, against=against[:2])


# ---------------------------------------------------------------------------------------------------- refinement


@pytest.mark.parametrize("scope", SCOPES)
def test_refinement_follows_the_difference_and_never_loses(explainer, pixels, scope):
    target, against, points = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 1]), 3
    before = copy.deepcopy(explainer.state_dict())
    with torch.no_grad():
        refined = explainer.refine(pixels, target, against=against, steps=3, curve_points=points, scope=scope)
        plain = explainer(pixels, target, against=against).scores
    torch.testing.assert_close(refined.initial_scores, plain, atol=1e-5, rtol=1e-5)
    assert (refined.gain >= 0).all() and (refined.gain > 0).any()
    assert refined.against.tolist() == [3, 4, 1]
    reference = NORMALIZATION.normalize(reference_image(NORMALIZATION.denormalize(pixels), "blur"))
    curves = deletion_insertion_curves(
        lambda images: explainer.classifier(images).logits,
        pixels,
        reference,
        refined.scores,
        target,
        against=against,
        fractions=[step / (points + 1) for step in range(points + 2)],
    )
    torch.testing.assert_close(refined.value, curves.insertion_auc - curves.deletion_auc, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in explainer.state_dict().items())
    assert refined.passes.tolist() == [1 + 2 * points + 3 * 4 * points] * 3


# ---------------------------------------------------------------------------------------------------- photographs


def test_explain_takes_labels_and_tells_both_classes(explainer):
    photograph = make_photograph()
    found = explainer.explain(photograph, "Golf Ball", against="parachute")
    assert (found.label, found.against, found.against_label) == ("golf ball", 4, "parachute")
    probability = explainer.explain(photograph, 4).probability
    assert found.against_probability == pytest.approx(probability, abs=1e-6)
    assert found.title.startswith(f"golf ball  {found.probability:.1%} rather than parachute  {probability:.1%}")
    pixels = PROCESSOR(photograph, return_tensors="pt")["pixel_values"]
    seen = explainer.explain(Image.new("RGB", (32, 32)), 2, against=4)
    with torch.no_grad():
        black = PROCESSOR(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(seen.scores, explainer(black, 2, against=4).scores[0].numpy(), atol=1e-5)
        assert int(explainer(pixels, against=4).target) == explainer.explain(photograph, against=4).target
    assert explainer.explain(photograph, 2).against is None


def test_explain_takes_one_class_an_image(explainer):
    photographs = [make_photograph(seed) for seed in range(3)]
    found = explainer.explain(photographs, [0, 1, 2], against=["church", 3, "parachute"], batch_size=2)
    assert [(one.target, one.against) for one in found] == [(0, 3), (1, 3), (2, 4)]
    alone = explainer.explain(photographs[2], 2, against=4)
    np.testing.assert_allclose(found[2].scores, alone.scores, atol=1e-4)
    refined = explainer.explain(photographs[0], 0, against=3, refine=1)
    assert refined.against == 3 and refined.refinement["gain"] >= 0


def test_explain_refuses_in_one_sentence(explainer):
    photographs = [make_photograph(0), make_photograph(1)]
    for question, message in (
        ({"target": [0, 1], "against": 1}, r"Class 1 \(English springer\) of image 1 is compared with itself"),
        ({"against": "parachut"}, "has no label 'parachut'; did you mean 'parachute'?"),
        ({"against": [1]}, "against lists 1 classes for 2 images"),
        ({"against": 1, "top_k": 2}, "Give either against or top_k, not both."),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            explainer.explain(photographs, **question)


def test_both_ends_of_a_map(explainer):
    found = explainer.explain(make_photograph(), 2, against=4)
    high, low = found.evidence_for(0.2), found.evidence_against(0.2)
    assert high.dtype == low.dtype == bool and high.shape == found.scores.shape
    assert high.mean() == pytest.approx(0.2, abs=0.01) and low.mean() == pytest.approx(0.2, abs=0.01)
    assert not (high & low).any()
    assert found.scores[high].min() > found.scores[~high].max()
    assert found.scores[low].max() < found.scores[~low].min()
    # Asked the other way round, the ends change places.
    turned = explainer.explain(make_photograph(), 4, against=2)
    assert (turned.evidence_for(0.2) == low).mean() > 0.99
    with pytest.raises(ValueError, match="share must lie between 0 and 1, but it is 1.5"):
        found.evidence_against(1.5)


def test_pixels_that_were_not_seen_are_evidence_of_nothing(make_classifier):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    found = AhaExplainer.from_classifier(make_classifier(), image_processor=processor, **SIZES).explain(
        make_photograph()
    )
    scores = found.scores.copy()
    scores[:, :10] = np.nan
    found = type(found)(**{**vars(found), "scores": scores})
    for mask in (found.evidence_for(0.3), found.evidence_against(0.3)):
        assert not mask[:, :10].any() and mask[:, 10:].mean() == pytest.approx(0.3, abs=0.01)


# ---------------------------------------------------------------------------------------------------- pictures


def test_the_sign_chooses_the_coloured_end():
    # A grey photograph, least important at the left.
    photograph, scores = Image.new("RGB", (60, 20), (128, 128, 128)), np.tile(np.arange(60.0), (20, 1))
    pictures = {sign: np.asarray(overlay(photograph, scores, sign=sign)).astype(int) for sign in hf_signs()}
    colourfulness = {sign: np.ptp(picture, axis=-1).mean(0) for sign, picture in pictures.items()}
    assert colourfulness["positive"][-5:].mean() > 50 and colourfulness["positive"][:20].max() < 5
    assert colourfulness["negative"][:5].mean() > 50 and colourfulness["negative"][-15:].max() < 5
    assert colourfulness["both"][:3].mean() > 50 and colourfulness["both"][-3:].mean() > 50
    assert colourfulness["both"][25:35].max() < 5
    # Blue against; orange for and violet against.
    red, blue = pictures["negative"][0, 3, 0], pictures["negative"][0, 3, 2]
    assert blue > red
    left, right = pictures["both"][0, 1], pictures["both"][0, -2]
    assert left[2] > left[1] and right[0] > right[2]
    np.testing.assert_array_equal(pictures["positive"], np.asarray(overlay(photograph, scores)))
    with pytest.raises(ValueError, match="sign is 'minus'; it must be 'positive', 'negative', 'both'."):
        overlay(photograph, scores, sign="minus")


def hf_signs():
    return importlib.import_module("hf_aha.visualization").SIGNS


def test_the_sheet_of_a_comparison_shows_both_ends(explainer):
    photograph = make_photograph()
    found = explainer.explain(photograph, 2, against=4)
    assert found.sheet() == found.sheet(sign="both") != found.sheet(sign="positive")
    assert found.sheet() == explanation_sheet(photograph, found.scores, found.title, sign="both")
    plain = explainer.explain(photograph, 2)
    assert plain.sheet() == plain.sheet(sign="positive") == explanation_sheet(photograph, plain.scores, plain.title)
    negative = np.asarray(plain.overlay(sign="negative"))
    np.testing.assert_array_equal(negative, np.asarray(overlay(photograph, plain.scores, sign="negative")))
    assert rank_map(plain.scores).max() == 1


# ---------------------------------------------------------------------------------------------------- the comparison


def test_the_comparison_of_ways_runs_and_its_result_is_kept(tmp_path, monkeypatch, explainer):
    root = Path(hf_aha.__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    contrast = importlib.import_module("contrast")
    monkeypatch.setattr(contrast, "CONFIDENT", 0.0)
    rng = np.random.default_rng(0)
    photographs = tmp_path / "photographs" / "validation"
    for label in LABELS.values():
        (photographs / label).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 32)).save(photographs / label / f"{number}.png")
    explainer.save_pretrained(tmp_path / "explainer", include_classifier=True)
    words = ["--explainer", str(tmp_path / "explainer"), "--dataset", str(tmp_path / "photographs"), "--rows", "20"]
    words += ["--singles", "2", "--settings", "blur/pixel", "mean/cell", "--output", str(tmp_path / "contrast.json")]
    result = contrast.main(words)
    text = (tmp_path / "contrast.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(result)) and str(tmp_path) not in text
    kept = json.loads((root / "benchmarks" / "results" / "contrast.json").read_text(encoding="utf-8"))
    for part in ("choosing", "reporting"):
        singles = result[part]["photographs"]
        assert set(singles["ways"]) == set(contrast.WAYS) == set(kept[part]["mosaics"]["ways"])
        for entry in singles["ways"].values():
            assert set(entry["value"]) == {"blur/pixel", "mean/cell", "mean"}
            expected = (entry["value"]["blur/pixel"]["mean"] + entry["value"]["mean/cell"]["mean"]) / 2
            assert entry["value"]["mean"]["mean"] == pytest.approx(expected, abs=1e-6)
        # The library's own answer is the way that was chosen.
        assert kept[part]["mosaics"]["ways"]["standardised scores"]["minus_plain"]["mean"]["low"] > 0


def test_mosaics_and_their_halves(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(hf_aha.__file__).parents[1] / "benchmarks"))
    contrast = importlib.import_module("contrast")
    predicted, labels = torch.tensor([0, 0, 1, 2, 1]), torch.tensor([0, 0, 1, 1, 1])
    pairs = contrast.mosaic_pairs(predicted, torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5]), labels)
    assert pairs == [(0, 2)]
    images = torch.arange(8.0).expand(5, 3, 4, 8) + 10 * torch.arange(5.0)[:, None, None, None]
    mosaic = contrast.side_by_side(images, pairs)
    assert mosaic.shape == (1, 3, 4, 8)
    assert mosaic[0, 0, 0].tolist() == [2, 3, 4, 5, 22, 23, 24, 25]
    scores = torch.arange(8.0, 0, -1).expand(2, 4, 8)
    top, bottom = contrast.halves(scores, torch.tensor([True, False]))
    assert top.tolist() == [1, 0] and bottom.tolist() == [1, 0]
