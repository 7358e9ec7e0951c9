"""Cascading randomisation on every family, with methods whose answer is known."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.stats import spearmanr

from hf_aha.classifier_aha import FrozenClassifier
from hf_aha.metrics import cascading_randomization, randomization_stages


def gradient_with(classifier):
    def explain(pixel_values, target):
        with torch.enable_grad():
            pixels = pixel_values.clone().requires_grad_()
            logits = classifier(pixels).logits.gather(1, target[:, None]).sum()
            return torch.autograd.grad(logits, pixels)[0].abs().sum(1)

    return explain


def brightness_with(classifier):
    return lambda pixel_values, target: pixel_values.sum(1)


def setup(make_classifier, **shape):
    return FrozenClassifier(make_classifier("vit", **shape)), torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])


def test_stages_hold_every_weight_once(model):
    classifier = FrozenClassifier(model)
    stages = randomization_stages(classifier)
    assert list(stages) == ["head", "block 4", "block 3", "block 2", "block 1", "embeddings"]
    names = [name for part in stages.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    heads = {name for name, parameter in model.named_parameters() if parameter.ndim == 2 and parameter.shape[0] == 5}
    assert heads and heads <= set(stages["head"])
    assert all(stages.values())
    for block in range(1, 5):
        assert all(f".{block - 1}." in name for name in stages[f"block {block}"])


def test_each_stage_randomises_its_weights_and_those_before(make_classifier):
    classifier, pixels, target = setup(make_classifier)
    trained = {name: value.clone() for name, value in classifier.model.named_parameters()}
    stages, seen = randomization_stages(classifier), []

    def explain_with(other):
        seen.append((other, {name: value.clone() for name, value in other.model.named_parameters()}))
        return brightness_with(other)

    found = cascading_randomization(classifier, explain_with, pixels, target)
    assert found.stages == tuple(stages) and found.correlation.shape == (3, 6) and len(seen) == 7
    assert seen[0][0] is classifier
    random: set[str] = set()
    for stage, (other, weights) in zip(found.stages, seen[1:], strict=True):
        assert other is not classifier
        random |= set(stages[stage])
        for name, value in weights.items():
            constant = trained[name].min() == trained[name].max()
            assert torch.equal(value, trained[name]) == (name not in random or bool(constant)), (stage, name)
            if name in random and value.numel() > 500:
                assert value.std().item() == pytest.approx(trained[name].std().item(), rel=0.15)
    for name, value in classifier.model.named_parameters():
        assert torch.equal(value, trained[name])


def test_a_method_that_ignores_the_classifier_fails(make_classifier):
    classifier, pixels, target = setup(make_classifier)
    found = cascading_randomization(classifier, brightness_with, pixels, target)
    assert (found.value == 1).all() and found.not_applicable is None and not found.higher_is_better


def test_a_gradient_changes_and_equals_a_loop(make_classifier):
    classifier, pixels, target = setup(make_classifier)
    copies = []

    def explain_with(other):
        copies.append(copy.deepcopy(other))
        return gradient_with(other)

    found = cascading_randomization(classifier, explain_with, pixels, target, seed=4, batch_size=2)
    before = gradient_with(classifier)(pixels, target)
    for column, other in enumerate(copies[1:]):
        after = gradient_with(other)(pixels, target)
        expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(before, after, strict=True)]
        assert found.correlation[:, column].tolist() == pytest.approx(expected, abs=1e-4)
    assert found.correlation[:, -1].abs().max() < 0.5
    alone = cascading_randomization(classifier, gradient_with, pixels[1:2], target[1:2], seed=4)
    assert torch.allclose(alone.correlation[0], found.correlation[1], atol=1e-3)
    other = cascading_randomization(classifier, gradient_with, pixels, target, seed=5)
    assert not torch.allclose(other.correlation, found.correlation, atol=1e-3)


def test_known_maps_are_not_computed_again_and_stages_can_be_fewer(make_classifier):
    classifier, pixels, target = setup(make_classifier)
    calls = []

    def explain_with(other):
        calls.append(other)
        return brightness_with(other)

    found = cascading_randomization(classifier, explain_with, pixels, target, scores=-pixels.sum(1), stages=2)
    assert len(calls) == 2 and found.stages == ("head", "block 4")
    assert (found.correlation == -1).all()


def test_an_external_encoder_is_neither_pass_nor_fail(make_classifier):
    classifier, pixels, target = setup(make_classifier)
    found = cascading_randomization(classifier, brightness_with, pixels, target, external_encoder=True)
    assert "external encoder" in found.not_applicable and found.stages == ()
    assert found.value.shape == (3,) and torch.isnan(found.value).all()


def test_constant_and_broken_maps_have_no_value(make_classifier):
    classifier, pixels, target = setup(make_classifier)

    def explain_with(other):
        def explain(pixel_values, classes):
            scores = pixel_values.sum(1)
            scores[classes == 0] = 1.0
            scores[classes == 1, 0, 0] = torch.nan
            return scores

        return explain

    found = cascading_randomization(classifier, explain_with, pixels, target, stages=1)
    assert torch.isnan(found.value).tolist() == [True, True, False]


def test_bfloat16_weights_stay_bfloat16(make_classifier):
    classifier, pixels, target = setup(make_classifier)
    classifier.model.bfloat16()
    seen = []
    explain_with = lambda other: seen.append(other) or brightness_with(other)  # noqa: E731
    cascading_randomization(classifier, explain_with, pixels, target, stages=1)
    assert {value.dtype for value in seen[-1].model.parameters()} == {torch.bfloat16}


def test_refuses_bad_input(make_classifier):
    classifier, pixels, target = setup(make_classifier)
    with pytest.raises(ValueError, match="stages is 7, but this classifier has 1 to 6 of them"):
        cascading_randomization(classifier, brightness_with, pixels, target, stages=7)
    classifier.model.classifier.weight = torch.nn.Parameter(torch.ones(5, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="classifier.weight is torch.int8, but only floating weights"):
        cascading_randomization(classifier, brightness_with, pixels, target)
