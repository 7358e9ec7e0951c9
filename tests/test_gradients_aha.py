"""Gradient maps, and the explainer that reads them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    IJepaConfig,
    IJepaForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

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
    settings = {
        "gradient_features": 1,
        "gradient_references": ["blur", "mean"],
        "grid_width": 16,
        "quarter_width": 8,
        "half_width": 8,
    } | settings
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
    gradients = [gradient_by_definition(model, reference + share * (pixels - reference), target) for share in shares]
    maps = gradient_maps(FrozenClassifier(model), pixels, target, NORMALIZATION, references=[kind], points=points)
    assert maps.dtype == torch.float32 and not maps.requires_grad
    assert maps.shape == (2, 2 * points, 32, 32)
    for point, gradient in enumerate(gradients):
        product = (gradient * (pixels - reference)).sum(dim=1)
        torch.testing.assert_close(maps[:, point], product, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(maps[:, points + point], gradient.norm(dim=1), atol=1e-5, rtol=1e-3)


def test_several_references_come_one_after_the_other():
    classifier, pixels, target = FrozenClassifier(make_classifier()), torch.randn(1, 3, 32, 32), torch.tensor([2])
    settings = {"points": 2, "layers": [1, 2]}
    both = gradient_maps(classifier, pixels, target, NORMALIZATION, references=["mean", "blur"], **settings)
    mean, blur = (
        gradient_maps(classifier, pixels, target, NORMALIZATION, references=[kind], **settings)
        for kind in ("mean", "blur")
    )
    expected = [part[:, rows] for rows in (slice(0, 2), slice(2, 4), slice(4, 6)) for part in (mean, blur)]
    torch.testing.assert_close(both, torch.cat(expected, dim=1))


def test_many_points_add_up_to_the_difference_of_log_probabilities():
    model = make_classifier()
    pixels, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    maps = gradient_maps(FrozenClassifier(model), pixels, target, NORMALIZATION, references=["black"], points=64)
    black = NORMALIZATION.normalize(torch.zeros_like(pixels))
    with torch.no_grad():
        at = [model(x).logits.log_softmax(-1)[torch.arange(2), target] for x in (pixels, black)]
    estimate = maps[:, :64].mean(dim=1).sum(dim=(1, 2))
    torch.testing.assert_close(estimate, at[0] - at[1], atol=1e-2, rtol=1e-2)


def test_attributions_of_tokens_add_up_to_what_the_later_blocks_do():
    # I-JEPA has no prefix tokens, so that all evidence passes through the patch tokens of every layer.
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = IJepaConfig(**sizes, image_size=32, patch_size=8, num_labels=5, initializer_range=0.3)
    model = IJepaForImageClassification(config).eval()
    pixels, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    maps = gradient_maps(
        FrozenClassifier(model), pixels, target, NORMALIZATION, references=["black"], points=64, layers=[1, 2]
    )
    black = NORMALIZATION.normalize(torch.zeros_like(pixels))
    with torch.no_grad():
        at = [model(x).logits.log_softmax(-1)[torch.arange(2), target] for x in (pixels, black)]
    token_maps = maps[:, 128:]
    patches = token_maps.unflatten(2, (4, 8)).unflatten(4, (4, 8))
    assert (patches == patches[:, :, :, :1, :, :1]).all(), "the map must be constant over a patch"
    sums = patches[:, :, :, 0, :, 0].sum(dim=(2, 3))
    torch.testing.assert_close(sums, (at[0] - at[1])[:, None].expand(2, 2), atol=2e-2, rtol=2e-2)


def test_the_last_layer_of_a_class_token_model_has_no_attribution_and_no_error():
    maps = gradient_maps(
        FrozenClassifier(make_classifier()),
        torch.randn(1, 3, 32, 32),
        torch.tensor([0]),
        NORMALIZATION,
        points=2,
        layers=[1, 2],
    )
    assert maps[:, 4].abs().max() > 0 and maps[:, 5].abs().max() == 0


def test_layers_need_two_points_and_must_exist():
    arguments = FrozenClassifier(make_classifier()), torch.randn(1, 3, 32, 32), torch.tensor([0]), NORMALIZATION
    with pytest.raises(ValueError, match="need two points at least, but points is 1"):
        gradient_maps(*arguments, points=1, layers=[1])
    with pytest.raises(ValueError, match="Layer 3 was asked"):
        gradient_maps(*arguments, points=2, layers=[3])
    with pytest.raises(ValueError, match="attributions of layer 3, but the classifier has 2 layers"):
        make_explainer(gradient_features=2, gradient_layers=[3])


def test_two_points_bring_the_tokens_of_layers_spread_over_the_depth():
    assert make_explainer().config.gradient_layers == []
    assert make_explainer(gradient_features=2).config.gradient_layers == [1, 2]
    assert make_explainer(gradient_features=2, gradient_layers=[2]).config.num_gradient_token_maps == 2
    assert make_explainer(gradient_features=2, gradient_layers=[]).config.num_gradient_token_maps == 0


def test_every_family_attributes_to_its_tokens(model):
    size = FrozenClassifier(model).image_size
    processor = ViTImageProcessor(size={"height": size[0], "width": size[1]})
    explainer = AhaExplainer.from_classifier(model, image_processor=processor, gradient_features=2).eval()
    maps = explainer.gradients(torch.randn(1, 3, *size), torch.tensor([1]))
    assert torch.isfinite(maps).all()
    token_maps = maps[:, explainer.config.num_gradient_maps :]
    assert token_maps.shape[1] == len(explainer.config.gradient_layers) and token_maps[:, 0].abs().max() > 0


def test_trained_weights_are_not_set_back_by_loading(tmp_path):
    explainer = make_explainer(gradient_features=2)
    with torch.no_grad():
        for parameter in explainer.decoder.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    explainer.save_pretrained(tmp_path)
    loaded = AhaExplainer.from_pretrained(tmp_path, classifier=explainer.classifier.model)
    for name, weight in explainer.decoder.state_dict().items():
        assert torch.equal(weight, loaded.decoder.state_dict()[name]), name


def test_before_training_the_scores_are_integrated_gradients_of_tokens_and_pixels():
    explainer = make_explainer(gradient_features=2, gradient_layers=[2, 1], gradient_references=["blur"])
    pixels, target = torch.randn(1, 3, 32, 32), torch.tensor([3])
    maps = explainer.gradients(pixels, target)
    features = explainer.decoder.gradient_stem(maps, (4, 4), (16, 16))
    unit = maps / maps.square().mean(dim=(2, 3), keepdim=True).sqrt().clamp_min(1e-30)
    torch.testing.assert_close(features.fine, unit[:, :2].mean(dim=1, keepdim=True))
    torch.testing.assert_close(features.coarse, unit[:, 4:, ::8, ::8].mean(dim=1, keepdim=True))
    # Nothing else has a say yet: the sum's details go through the decoder's [1 2 1]/4 filter, its patches do not.
    kernel = torch.tensor([1.0, 2, 1]) / 4
    fine = F.pad(features.fine, (1, 1, 1, 1), mode="replicate")
    fine = F.conv2d(fine, kernel.outer(kernel)[None, None])
    coarse = F.interpolate(features.coarse, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(explainer(pixels, target).scores, (fine + coarse)[:, 0], atol=1e-5, rtol=1e-4)


def test_the_detail_lets_the_gradients_score_pass_beside_the_filter():
    torch.manual_seed(3)
    explainer = make_explainer(gradient_features=2, gradient_references=["blur"], gradient_detail=True)
    assert explainer.decoder.gradient_detail.weight.tolist() == [1.0]
    pixels, target = torch.randn(2, 3, 32, 32), torch.tensor([3, 1])
    fine = explainer.decoder.gradient_stem(explainer.gradients(pixels, target), (4, 4), (16, 16)).fine[:, 0]

    def with_weight(value: float) -> torch.Tensor:
        torch.nn.init.constant_(explainer.decoder.gradient_detail.weight, value)
        with torch.no_grad():
            return explainer(pixels, target).scores

    none, half, whole = map(with_weight, (0.0, 0.5, 1.0))
    torch.testing.assert_close(whole - none, 2 * (half - none), atol=1e-5, rtol=1e-4)
    # Whole, the score of single pixels is untouched: what is left besides it is the same with a smoother one.
    kernel = torch.tensor([1.0, 2, 1]) / 4
    smooth = F.conv2d(F.pad(fine[:, None], (1, 1, 1, 1), mode="replicate"), kernel.outer(kernel)[None, None])[:, 0]
    torch.testing.assert_close(whole - fine, none - smooth, atol=1e-5, rtol=1e-4)


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
    assert loaded.config.passes_per_explanation == 9 and loaded.config.gradient_layers == [1, 2]


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
