"""The registry: one call shape, what is not applicable, and real explainers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import hf_aha.metrics
from hf_aha import AhaConfig, AhaExplainer
from hf_aha.classifier_aha import FrozenClassifier
from hf_aha.encoder_aha import FrozenEncoder
from hf_aha.metrics import (
    UNOPTIMISED,
    Subject,
    cascading_randomization,
    get_unoptimised,
    grid_pointing_shares,
    max_sensitivity,
    randomization_stages,
    road_with_control,
    total_variation,
)
from hf_aha.metrics.calls import explain_in_batches
from hf_aha.perturbation import Normalization


NORMALIZATION = Normalization((0.5,) * 3, (0.5,) * 3)


def explainer_of(make_classifier, encoder=None):
    classifier = FrozenClassifier(make_classifier("vit"))
    tokens_of = classifier if encoder is None else encoder
    config = AhaConfig(
        image_size=[32, 32],
        patch_size=[8, 8],
        token_size=tokens_of.hidden_size,
        class_vector_size=classifier.class_vector_size,
        taps=[2, 4],
        grid_width=16,
        quarter_width=8,
        half_width=8,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        id2label={index: str(index) for index in range(5)},
        label2id={str(index): index for index in range(5)},
        encoder_name_or_path=None if encoder is None else "an encoder",
    )
    return AhaExplainer(config).attach(classifier, encoder=encoder).eval()


@pytest.fixture
def subject(make_classifier):
    return Subject.from_explainer(explainer_of(make_classifier))


def photographs(subject, count=4):
    pixels = torch.randn(count, 3, 32, 32)
    with torch.no_grad():
        return pixels, subject.logits_of(pixels).argmax(-1)


def masks_of(pixels):
    masks = torch.zeros(len(pixels), 32, 32, dtype=torch.bool)
    masks[:, 4:20, 8:24] = True
    return masks


@pytest.mark.parametrize("name", UNOPTIMISED)
def test_every_metric_has_one_call_shape(subject, name):
    metric = get_unoptimised(name)
    assert metric.name == name and metric.description.endswith(".") and metric.source and metric.unit
    pixels, target = photographs(subject)
    calls = []

    def explain(pixel_values, classes):
        calls.append(len(pixel_values))
        return subject.explain(pixel_values, classes)

    watched = Subject(**{**vars(subject), "explain": explain})
    masks = masks_of(pixels) if metric.needs_masks else None
    scores = subject.explain(pixels, target)
    found = metric.compute(watched, pixels, target, 3, masks=masks)
    assert sum(calls) >= len(pixels)
    calls.clear()
    again = metric.compute(watched, pixels, target, 3, masks=masks, scores=scores, batch_size=2)
    if metric.cost == "none":
        assert not calls
    assert next(iter(found)) == name and all(key.startswith(f"{name}/") for key in list(found)[1:])
    for key, values in found.items():
        assert values.shape == (4,) and values.dtype == torch.float32 and values.device.type == "cpu", key
        assert torch.allclose(values, again[key], atol=1e-4, equal_nan=True), key
    low, high = metric.range
    defined = found[name][~torch.isnan(found[name])]
    assert ((low <= defined) & (defined <= high)).all()
    if name != "grid_pointing":
        assert len(defined) == 4


def test_values_are_those_of_the_plain_functions(subject):
    pixels, target = photographs(subject)
    scores = subject.explain(pixels, target)
    options = {"subject": subject, "pixel_values": pixels, "target": target, "seed": 2}
    road = road_with_control(subject.logits_of, pixels, scores, target, NORMALIZATION, seed=2)
    found = UNOPTIMISED["road"].compute(**options)
    assert torch.equal(found["road"], road.map.value) and torch.equal(found["road/blurred_copy"], road.blurred.value)
    moved = max_sensitivity(subject.explain, pixels, target, NORMALIZATION, seed=2)
    assert torch.equal(UNOPTIMISED["sensitivity"].compute(**options)["sensitivity"], moved.rank)
    random = cascading_randomization(subject.classifier, subject.explain_with, pixels, target, seed=2)
    found = UNOPTIMISED["randomization"].compute(**options)
    assert torch.equal(found["randomization"], random.value)
    assert [key.split("/")[1] for key in list(found)[1:]] == list(randomization_stages(subject.classifier))
    assert torch.equal(UNOPTIMISED["total_variation"].compute(**options)["total_variation"], total_variation(scores))


def test_grid_pointing_uses_confident_photographs_of_distinct_classes():
    """Photographs are coloured by their class, which the classifier reads from the mean, the map from each pixel."""
    value = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, 9.0])
    pixels = value.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()

    def logits_of(images):
        distance = (images.mean((1, 2, 3))[:, None] - torch.arange(5.0)).abs()
        return torch.where(distance < 0.1, 10.0, -distance)

    subject = Subject(lambda p, t: -(p[:, 0] - t.view(-1, 1, 1)).abs(), logits_of, NORMALIZATION)
    target = torch.tensor([0, 1, 2, 3, 3, 4])
    metric = UNOPTIMISED["grid_pointing"]
    found = metric.compute(subject, pixels, target)
    values = found["grid_pointing"]
    assert torch.isnan(values[5])  # class 4 by a hair: not confident
    assert torch.isnan(values[3:5]).sum() == 1 and (values[~torch.isnan(values)] == 1).all()
    few = metric.compute(subject, pixels[:3], target[:3])
    assert torch.isnan(few["grid_pointing"]).all() and metric.images_together == 4
    direct = grid_pointing_shares(subject.explain, pixels, target, torch.tensor([[0, 1, 2, 3]]))
    assert (direct.rank_share == 1).all()


def test_an_explainer_is_randomised_through_its_tokens(make_classifier):
    explainer = explainer_of(make_classifier)
    subject = Subject.from_explainer(explainer)
    pixels, target = photographs(subject)
    before, state = subject.explain(pixels, target), copy.deepcopy(explainer.state_dict())
    random_state = torch.get_rng_state()
    same = subject.explain_with(FrozenClassifier(copy.deepcopy(explainer.classifier.model)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(same(pixels, target), before)
    found = UNOPTIMISED["randomization"].compute(subject, pixels, target)
    assert (found["randomization/embeddings"] < 0.99).all()
    assert torch.equal(subject.explain(pixels, target), before)
    assert all(torch.equal(value, state[name]) for name, value in explainer.state_dict().items())


def test_an_external_encoder_makes_randomization_not_applicable(make_classifier):
    encoder = FrozenEncoder(make_classifier("dinov2").base_model, (0.5,) * 3, (0.5,) * 3)
    subject = Subject.from_explainer(explainer_of(make_classifier, encoder))
    assert subject.external_encoder and subject.explain_with is None
    metric = UNOPTIMISED["randomization"]
    assert "external encoder" in metric.not_applicable(subject)
    with pytest.raises(ValueError, match="randomization is not applicable: an external encoder gives the tokens"):
        metric.compute(subject, *photographs(subject))
    assert all(other.not_applicable(subject) is None for other in UNOPTIMISED.values() if other is not metric)


def test_a_method_that_takes_the_classifier_is_a_subject(make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))

    def method(classifier, pixel_values, target):
        with torch.no_grad():
            return classifier(pixel_values).logits[:, :1, None] * pixel_values.sum(1)

    subject = Subject.from_method(method, classifier, NORMALIZATION)
    pixels, target = photographs(subject)
    assert torch.equal(subject.explain(pixels, target), method(classifier, pixels, target))
    found = UNOPTIMISED["randomization"].compute(subject, pixels, target)
    assert found["randomization"].abs() == pytest.approx(torch.ones(4), abs=1)
    halves = Subject.from_method(method, classifier, NORMALIZATION, logits_of=lambda p: classifier(p).logits / 2)
    assert torch.equal(halves.logits_of(pixels), classifier(pixels).logits / 2)
    unknown = Subject(subject.explain, subject.logits_of, NORMALIZATION)
    assert "how the method explains another classifier" in UNOPTIMISED["randomization"].not_applicable(unknown)


def test_one_broken_map_costs_one_value(subject):
    pixels, target = photographs(subject, 3)

    def explain(pixel_values, classes):
        scores = subject.explain(pixel_values, classes).clone()
        scores[(pixel_values == pixels[1]).flatten(1).all(1), 0, 0] = torch.nan
        return scores

    broken = Subject(**{**vars(subject), "explain": explain, "explain_with": lambda other: explain})
    for name, metric in UNOPTIMISED.items():
        if name == "grid_pointing":
            continue
        masks = masks_of(pixels) if metric.needs_masks else None
        values = metric.compute(broken, pixels, target, masks=masks)[name]
        assert torch.isnan(values).tolist() == [False, True, False], name


def test_refuses_bad_input(subject):
    pixels, target = photographs(subject)
    road = UNOPTIMISED["road"]
    with pytest.raises(ValueError, match="There is no metric 'raod': did you mean 'road'"):
        get_unoptimised("raod")
    with pytest.raises(ValueError, match="localization needs masks="):
        UNOPTIMISED["localization"].compute(subject, pixels, target)
    with pytest.raises(ValueError, match="road takes no masks"):
        road.compute(subject, pixels, target, masks=masks_of(pixels))
    with pytest.raises(ValueError, match=r"scores have shape \(4, 8, 8\)"):
        road.compute(subject, pixels, target, scores=torch.zeros(4, 8, 8))
    small = Subject(lambda p, t: p[:, 0, ::2, ::2], subject.logits_of, NORMALIZATION)
    with pytest.raises(ValueError, match=r"scores have shape \(4, 16, 16\).*resize the maps"):
        road.compute(small, pixels, target)
    with pytest.raises(ValueError, match="target holds the class 5"):
        road.compute(subject, pixels, target * 0 + 5, scores=torch.zeros(4, 32, 32))
    with pytest.raises(ValueError, match=r"call attach\(classifier\) first"):
        Subject.from_explainer(AhaExplainer(AhaConfig(token_size=8, class_vector_size=8, taps=[1])))


def test_maps_come_without_gradient_and_in_chunks():
    sizes = []

    def explain(pixel_values, target):
        sizes.append(len(pixel_values))
        return pixel_values.sum(1).requires_grad_().bfloat16()

    scores = explain_in_batches(explain, torch.randn(5, 3, 4, 4), torch.zeros(5, dtype=torch.int64), 2)
    assert sizes == [2, 2, 1] and scores.dtype == torch.float32 and not scores.requires_grad


def test_ranges_and_public_names():
    for metric in UNOPTIMISED.values():
        low, high = metric.range
        assert low < high and (metric.chance is None or low <= metric.chance <= high)
        assert isinstance(metric.higher_is_better, bool) and not math.isnan(low + high) or metric.unit == "nats"
    for name in hf_aha.metrics.__all__:
        assert getattr(hf_aha.metrics, name).__doc__
