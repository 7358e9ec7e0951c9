"""Gradient maps, and the explainer that reads them."""

from __future__ import annotations

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_aha import AhaExplainer, FrozenClassifier
from hf_aha.gradients_aha import gradient_maps
from hf_aha.references_aha import Normalization, reference_image


NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_classifier():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=5,
        initializer_range=0.3,
    )
    return ViTForImageClassification(config).eval()


def make_explainer(**settings):
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    settings = {"gradient_features": 1, "grid_width": 16, "quarter_width": 8, "half_width": 8} | settings
    explainer = AhaExplainer.from_classifier(make_classifier(), image_processor=processor, **settings)
    return explainer.eval()


def gradient_by_definition(model, pixel_values, target):
    pixel_values = pixel_values.clone().requires_grad_()
    log_probability = torch.log_softmax(model(pixel_values).logits, dim=-1)[torch.arange(len(target)), target]
    return torch.autograd.grad(log_probability.sum(), pixel_values)[0]


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("kind", ["blur", "mean", "black"])
def test_the_maps_are_those_of_the_definition(kind, points):
    model = make_classifier()
    pixels, target = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    reference = NORMALIZATION.normalize(reference_image(NORMALIZATION.denormalize(pixels), kind))
    shares = [(2 * k + 1) / (2 * points) for k in range(points)]
    gradient = sum(
        gradient_by_definition(model, reference + share * (pixels - reference), target) for share in shares
    ) / len(shares)
    maps = gradient_maps(FrozenClassifier(model), pixels, target, NORMALIZATION, references=[kind], points=points)
    assert maps.dtype == torch.float32 and not maps.requires_grad
    torch.testing.assert_close(maps[:, 0], (gradient * (pixels - reference)).sum(dim=1), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(maps[:, 1], gradient.norm(dim=1), atol=1e-5, rtol=1e-3)


def test_many_points_add_up_to_the_difference_of_log_probabilities():
    model = make_classifier()
    pixels, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    maps = gradient_maps(FrozenClassifier(model), pixels, target, NORMALIZATION, references=["black"], points=64)
    black = NORMALIZATION.normalize(torch.zeros_like(pixels))
    with torch.no_grad():
        at = [model(x).logits.log_softmax(-1)[torch.arange(2), target] for x in (pixels, black)]
    torch.testing.assert_close(maps[:, 0].sum(dim=(1, 2)), at[0] - at[1], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_maps_do_not_depend_on_the_callers_gradient_mode_and_leave_no_trace(mode):
    explainer = make_explainer()
    pixels = torch.randn(2, 3, 32, 32)
    expected = explainer(pixels).scores.detach()
    with mode():
        output = explainer(pixels.clone())
    torch.testing.assert_close(output.scores.detach(), expected)
    assert not pixels.requires_grad
    assert all(parameter.grad is None for parameter in explainer.classifier.parameters())


def test_every_class_has_its_own_gradient():
    explainer = make_explainer()
    pixels = torch.randn(3, 3, 32, 32)
    target = torch.tensor([[0, 1], [2, 3], [4, 0]])
    together = explainer(pixels, target).scores
    for place in range(2):
        torch.testing.assert_close(together[:, place], explainer(pixels, target[:, place]).scores)
    top = explainer.explain_top(pixels, 2)
    torch.testing.assert_close(top.scores, explainer(pixels, top.target).scores)


def test_the_single_pass_explainer_is_the_default_and_uses_no_gradient():
    explainer = make_explainer(gradient_features=0)
    assert explainer.gradients(torch.randn(1, 3, 32, 32), torch.tensor([0])) is None
    assert (
        AhaExplainer.from_classifier(
            make_classifier(), image_processor=ViTImageProcessor()
        ).config.passes_per_explanation
        == 1
    )


def test_the_settings_survive_saving_and_loading(tmp_path):
    explainer = make_explainer(gradient_features=2, gradient_references=["black", "blur"])
    explainer.save_pretrained(tmp_path)
    loaded = AhaExplainer.from_pretrained(tmp_path, classifier=explainer.classifier.model)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(pixels).scores, explainer(pixels).scores)
    assert loaded.config.passes_per_explanation == 9


@pytest.mark.parametrize("scope", ["scores", "latent", "decoder"])
def test_refinement_starts_from_the_same_map_and_counts_the_gradient_passes(scope):
    explainer = make_explainer()
    pixels = torch.randn(2, 3, 32, 32)
    refined = explainer.refine(pixels, steps=1, scope=scope, curve_points=3)
    torch.testing.assert_close(refined.initial_scores, explainer(pixels).scores.detach())
    # A plain explanation of 5 passes, 6 forward and 6 backward through them, and 6 for the second map.
    assert refined.passes.tolist() == [5 + 6 + 6 + 6] * 2
    with pytest.raises(ValueError, match="measuring the plain map alone takes 11"):
        explainer.refine(pixels, steps=1, curve_points=3, max_passes=10)
