"""Test-time refinement: what it may change, what it must not, what it is worth and what it says it cost."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import LABELS as CLI_LABELS
from test_cli import folder, library_verbosity  # noqa: F401
from torch import nn
from torch.nn import functional as F
from transformers import ViTImageProcessor
from transformers.utils import ModelOutput

from hf_aha import AhaExplainer
from hf_aha.classifier_aha import ClassifierFeatures
from hf_aha.cli import main
from hf_aha.metrics.curves import deletion_insertion_curves
from hf_aha.objectives import FaithfulnessObjective
from hf_aha.perturbation import Normalization, reference_image
from hf_aha.ranking import make_ranker
from hf_aha.refinement import DECODER_LAYERS, LEARNING_RATES, SCOPES, RefinementOutput, refine
from hf_aha.refinement_curves import MeasuredCurves, most_sensitive
from hf_aha.refinement_scopes import make_start


SIZES = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
NORMALIZATION = Normalization(PROCESSOR.image_mean, PROCESSOR.image_std)
POINTS = 3


@pytest.fixture
def explainer(make_classifier):
    model = make_classifier("vit")
    with torch.no_grad():
        # Probabilities of a random head hardly move; these do.
        model.classifier.weight *= 10
    return AhaExplainer.from_classifier(model, image_processor=PROCESSOR, **SIZES).eval()


def photographs(count, height=32, width=32):
    rgb = F.interpolate(torch.rand(count, 3, 4, 5), size=(height, width), mode="bicubic").clamp(0, 1)
    return NORMALIZATION.normalize(rgb)


def reference_of(pixel_values, kind="blur"):
    return NORMALIZATION.normalize(reference_image(NORMALIZATION.denormalize(pixel_values), kind))


def measure(explainer, pixel_values, scores, target, kind="blur", points=POINTS):
    """Insertion minus deletion by the evaluation's own code."""
    curves = deletion_insertion_curves(
        lambda pixels: explainer.classifier(pixels).logits,
        pixel_values,
        reference_of(pixel_values, kind),
        scores,
        target,
        fractions=[step / (points + 1) for step in range(points + 2)],
    )
    return curves.insertion_auc - curves.deletion_auc


class Counter:
    """Images through the classifier, forward and backward."""

    def __init__(self, explainer):
        self.forward = self.backward = 0
        self.batches = []
        explainer.classifier.model.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        self.forward += len(output.logits)
        self.batches.append(len(output.logits))
        if output.logits.requires_grad:
            output.logits.register_hook(self.count_backward)

    def count_backward(self, gradient):
        self.backward += len(gradient)


class LinearClassifier(nn.Module):
    """p(class 1) rises with a weighted sum of the pixels, so the best order for both curves is that of the terms."""

    patch = 8

    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", weights)

    def grid(self, height, width):
        return height // self.patch, width // self.patch

    def class_vectors(self, target):
        return torch.eye(2)[target]

    def forward(self, pixel_values, layers=()):
        total = (pixel_values * self.weights).sum(dim=(1, 2, 3))
        patches = F.avg_pool2d(pixel_values, self.patch).permute(0, 2, 3, 1)
        return ClassifierFeatures((patches,) * len(layers), torch.stack([torch.zeros_like(total), total], dim=1))


@pytest.fixture
def linear(explainer):
    """An explainer of a linear classifier, images, and the terms of its sum, (B, H, W), black for removed pixels."""
    weights = F.interpolate(torch.randn(1, 3, 4, 4), size=(32, 32), mode="bilinear")[0]
    pixel_values = photographs(4)
    terms = ((pixel_values - reference_of(pixel_values, "black")) * weights).sum(1)
    weights *= 2 / terms.flatten(1).sum(1).abs().mean()
    config = copy.deepcopy(explainer.config)
    config.token_size, config.class_vector_size, config.taps = 3, 2, [1]
    config.id2label = {0: "no", 1: "yes"}
    explainer = AhaExplainer(config).eval()
    explainer.classifier = LinearClassifier(weights)
    return explainer, pixel_values, terms


# ------------------------------------------------------------------------------------ what it is worth


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reference", ["black", "blur"])
def test_no_map_gets_worse_and_values_are_those_of_the_evaluation(explainer, scope, reference):
    pixel_values = photographs(3)
    found = refine(explainer, pixel_values, scope=scope, reference=reference, steps=5, curve_points=POINTS)
    plain = explainer(pixel_values)
    assert isinstance(found, (RefinementOutput, ModelOutput))
    assert torch.equal(found.initial_scores, plain.scores)
    assert torch.equal(found.target, plain.target)
    torch.testing.assert_close(found.logits, plain.logits)
    assert found.scores.dtype == torch.float32 and found.scores.shape == (3, 32, 32)
    assert not found.scores.requires_grad
    assert bool((found.value >= found.initial_value).all())
    assert torch.equal(found.gain, found.value - found.initial_value)
    for scores, value in ((found.scores, found.value), (found.initial_scores, found.initial_value)):
        expected = measure(explainer, pixel_values, scores.detach(), found.target, reference)
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=0)
    improved = found.gain > 0
    assert bool(improved.any())
    changed = (found.scores != found.initial_scores).flatten(1).any(1)
    assert torch.equal(changed, improved), "a map changed without gain, or the other way round"


@pytest.mark.parametrize("scope", SCOPES)
def test_it_climbs_towards_the_known_optimum(linear, scope):
    explainer, pixel_values, terms = linear
    best = measure(explainer, pixel_values, terms, torch.ones(4, dtype=torch.long), "black")
    found = refine(explainer, pixel_values, 1, scope=scope, reference="black", steps=20, curve_points=POINTS)
    assert bool((found.value <= best + 1e-6).all())
    closed = found.gain.mean() / (best - found.initial_value).mean()
    assert closed > {"scores": 0.5, "latent": 0.2, "decoder": 0.2}[scope]


def test_nothing_is_won_at_the_optimum(linear):
    explainer, pixel_values, terms = linear
    explainer.decoder.decode = lambda features, class_vectors, gradients: terms
    found = refine(explainer, pixel_values, 1, reference="black", steps=4, curve_points=POINTS)
    torch.testing.assert_close(found.gain, torch.zeros(4), atol=1e-6, rtol=0)


def test_the_first_step_follows_the_objective(explainer, monkeypatch):
    """The gradient on the map is that of the training objective with all points of both curves."""
    pixel_values = photographs(1)
    found = {}

    def first_gradient(self, gradients):
        found.setdefault("gradients", gradients)

    monkeypatch.setattr("hf_aha.refinement._Descent.update", first_gradient)
    output = refine(explainer, pixel_values, steps=1, curve_points=POINTS, max_batch=2)
    objective = FaithfulnessObjective(
        num_bins=POINTS + 1, curve_points=0, pixel_share=1.0, references=("blur",), straight_through=True
    )
    offset = torch.zeros(1, 1, 4, 4, requires_grad=True)
    unit = output.initial_scores.std(correction=0)
    scores = output.initial_scores + unit * F.interpolate(offset, size=(32, 32), mode="bilinear")[:, 0]
    loss = objective(
        scores,
        pixel_values,
        output.target,
        lambda pixels: explainer.classifier(pixels).logits,
        NORMALIZATION,
        tau=0.3,
        generator=torch.Generator().manual_seed(0),
    ).loss
    # The value weighs POINTS points by 1 / (POINTS + 1), the loss by 1 / POINTS, and the loss descends.
    expected = -torch.autograd.grad(loss, offset)[0] * POINTS / (POINTS + 1)
    torch.testing.assert_close(found["gradients"][0], expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(output.initial_value[0], -loss.detach() * POINTS / (POINTS + 1), atol=1e-6, rtol=0)


def test_the_correction_of_a_map_is_smooth(explainer):
    """Pixel by pixel it changes far less than from patch to patch: it cannot scatter pixels."""
    found = refine(explainer, photographs(2), steps=6, learning_rate=1.0, curve_points=POINTS)
    correction = (found.scores - found.initial_scores)[found.gain > 0]
    assert len(correction)
    curvature = correction[:, 1:-1, :] * 2 - correction[:, 2:, :] - correction[:, :-2, :]
    assert curvature.abs().amax() < 0.7 * (correction.amax() - correction.amin())
    # Bilinear between nodes 4 and 8 pixels apart, none of which lies between rows 6 and 9, 14 and 17, 22 and 25.
    straight = curvature.abs().amax(dim=(0, 2))[[6, 7, 14, 15, 22, 23]]
    assert straight.amax() < 1e-4 * correction.abs().amax()


# ------------------------------------------------------------------------------------ what it must not do


@pytest.mark.parametrize("scope", SCOPES)
def test_an_image_does_not_feel_its_batch(explainer, scope):
    pixel_values = photographs(3)
    settings = {"scope": scope, "steps": 3, "curve_points": POINTS, "reference": "noise", "seed": 7}
    together = refine(explainer, pixel_values, **settings)
    for row in range(3):
        alone = refine(explainer, pixel_values[row : row + 1], **settings)
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(alone.value[0], together.value[row], atol=1e-4, rtol=0)
    shuffled = refine(explainer, pixel_values[[2, 0, 1]], max_batch=3, **settings)
    torch.testing.assert_close(shuffled.scores, together.scores[[2, 0, 1]], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_weights_modes_and_gradients_are_left_alone(explainer, scope):
    explainer.train()
    before = {name: tensor.clone() for name, tensor in explainer.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in explainer.named_parameters()}
    modes = {name: module.training for name, module in explainer.named_modules()}
    pixel_values = photographs(2)
    pixels = pixel_values.clone().requires_grad_()
    refine(explainer, pixels, scope=scope, steps=2, curve_points=POINTS)
    assert torch.equal(pixels, pixel_values) and pixels.grad is None
    after = explainer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert wanted == {name: parameter.requires_grad for name, parameter in explainer.named_parameters()}
    assert modes == {name: module.training for name, module in explainer.named_modules()}
    assert all(parameter.grad is None for parameter in explainer.parameters())


@pytest.mark.parametrize("scope", SCOPES)
def test_the_same_call_gives_the_same_map(explainer, scope):
    pixel_values = photographs(2)
    settings = {"scope": scope, "steps": 3, "curve_points": POINTS, "reference": "noise"}
    state = torch.get_rng_state()
    first = refine(explainer, pixel_values, **settings)
    assert torch.equal(torch.get_rng_state(), state), "the global random numbers were used"
    assert torch.equal(refine(explainer, pixel_values, **settings).scores, first.scores)
    assert not torch.equal(refine(explainer, pixel_values, seed=1, **settings).value, first.value)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_caller_may_have_gradients_off(explainer, scope, context):
    pixel_values = photographs(2)
    settings = {"scope": scope, "steps": 3, "curve_points": POINTS}
    expected = refine(explainer, pixel_values, **settings)
    with context():
        found = explainer.refine(pixel_values.clone(), expected.target.clone(), **settings)
        assert not torch.is_grad_enabled()
    assert torch.equal(found.target, expected.target)
    assert torch.equal(found.scores, expected.scores)
    assert bool((expected.gain > 0).any())


@pytest.mark.parametrize("scope", SCOPES)
def test_under_autocast(explainer, scope):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = refine(explainer, photographs(2), scope=scope, steps=3, curve_points=POINTS)
        assert torch.is_autocast_enabled("cpu")
    assert found.scores.dtype == found.value.dtype == torch.float32
    assert bool((found.gain >= 0).all()) and bool((found.gain > 0).any())
    assert found.scores[0].unique().numel() > 500, "scores were rounded to bfloat16"


# ------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize("scope", SCOPES)
def test_no_steps_give_the_plain_map(explainer, scope):
    pixel_values = photographs(2)
    counter = Counter(explainer)
    found = refine(explainer, pixel_values, torch.tensor([3, 1]), scope=scope, steps=0, curve_points=POINTS)
    assert (counter.forward, counter.backward) == (2 * (1 + 2 * POINTS), 0)
    assert found.passes.tolist() == [1 + 2 * POINTS] * 2
    assert found.steps_taken.tolist() == [0, 0]
    assert torch.equal(found.scores, explainer(pixel_values, torch.tensor([3, 1])).scores)
    assert torch.equal(found.value, found.initial_value) and not bool(found.gain.any())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("max_batch", [1, 5, 40])
def test_passes_are_those_that_ran(explainer, scope, max_batch):
    counter = Counter(explainer)
    found = refine(explainer, photographs(2), scope=scope, steps=2, curve_points=POINTS, max_batch=max_batch)
    assert found.steps_taken.tolist() == [2, 2]
    assert counter.forward == 2 * (1 + 3 * 2 * POINTS)
    assert counter.backward == 2 * 2 * 2 * POINTS
    assert int(found.passes.sum()) == counter.forward + counter.backward
    assert max(counter.batches[1:]) <= max(max_batch, 2)


def test_images_that_gain_little_leave_the_batch(explainer):
    pixel_values = photographs(4)
    settings = {"steps": 12, "curve_points": POINTS}
    full = refine(explainer, pixel_values, **settings)
    assert full.steps_taken.tolist() == [12] * 4
    counter = Counter(explainer)
    # Between the images: some of them gain more a pass than this, others less.
    tolerance = float(full.gain.median() / full.passes[0])
    found = refine(explainer, pixel_values, tolerance=tolerance, **settings)
    assert int(found.passes.sum()) == counter.forward + counter.backward
    assert found.passes.sum() < full.passes.sum()
    assert len(set(found.steps_taken.tolist())) > 1, "all images stopped together"
    assert bool((found.steps_taken >= 3).all()) and bool((found.gain >= 0).all())
    # An image's own stop is that of the image alone.
    alone = refine(explainer, pixel_values[1:2], tolerance=tolerance, **settings)
    assert alone.steps_taken[0] == found.steps_taken[1]
    assert refine(explainer, pixel_values, tolerance=10.0, **settings).steps_taken.tolist() == [3] * 4


def test_max_passes_is_kept(explainer):
    pixel_values = photographs(2)
    step, start = 4 * POINTS, 1 + 2 * POINTS
    for allowed, steps in ((start, 0), (start + step - 1, 0), (start + step, 1), (start + 2 * step + 5, 2)):
        found = refine(explainer, pixel_values, steps=9, curve_points=POINTS, max_passes=allowed)
        assert found.steps_taken.tolist() == [steps] * 2
        assert found.passes.tolist() == [start + steps * step] * 2
    with pytest.raises(ValueError, match=f"max_passes is 6, but .* takes {start}; give at least"):
        refine(explainer, pixel_values, curve_points=POINTS, max_passes=6)


# ------------------------------------------------------------------------------------ adaptive


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("steps", [0, 1, 5, 6])
def test_adaptive_passes_are_those_that_ran(explainer, scope, steps):
    counter = Counter(explainer)
    found = refine(
        explainer, photographs(2), scope=scope, steps=steps, curve_points=POINTS, adaptive=True, tolerance=1e-12
    )
    # All six perturbed images of the first, every fifth and the last map; two with soft masks and gradient an update.
    forward = 6 * {0: 1, 1: 2, 5: 2, 6: 3}[steps] + 2 * steps
    backward = 2 * steps
    if found.steps_taken.tolist() == [steps] * 2:
        assert (counter.forward, counter.backward) == (2 * (1 + forward), 2 * backward)
        assert found.passes.tolist() == [1 + forward + backward] * 2
    assert int(found.passes.sum()) == counter.forward + counter.backward
    assert bool((found.gain >= 0).all())


@pytest.mark.parametrize("scope", SCOPES)
def test_adaptive_maps_are_worth_what_they_say_and_do_not_feel_their_batch(explainer, scope):
    pixel_values = photographs(3)
    settings = {"scope": scope, "steps": 6, "curve_points": POINTS, "adaptive": True}
    found = refine(explainer, pixel_values, **settings)
    expected = measure(explainer, pixel_values, found.scores, found.target)
    torch.testing.assert_close(found.value, expected, atol=2e-6, rtol=0)
    assert bool((found.gain >= 0).all()) and bool((found.gain > 0).any())
    alone = refine(explainer, pixel_values[1:2], **settings)
    torch.testing.assert_close(alone.value[0], found.value[1], atol=1e-4, rtol=0)
    assert int(alone.passes) == int(found.passes[1])


def test_adaptive_gains_most_of_it_for_fewer_passes(linear):
    explainer, pixel_values, _ = linear
    settings = {"reference": "black", "steps": 10, "curve_points": 9}
    full = refine(explainer, pixel_values, 1, **settings)
    adaptive = refine(explainer, pixel_values, 1, adaptive=True, **settings)
    assert adaptive.passes.float().mean() < 0.5 * full.passes.float().mean()
    assert adaptive.gain.mean() > 0.9 * full.gain.mean()


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_way_up_is_told(explainer, adaptive):
    pixel_values = photographs(3)
    settings = {"curve_points": POINTS, "adaptive": adaptive, "tolerance": 2e-3}
    found = refine(explainer, pixel_values, steps=11, **settings)
    assert found.best_values.shape == found.best_passes.shape
    assert torch.equal(found.best_values[:, 0], found.initial_value)
    assert torch.equal(found.best_values[:, -1], found.value)
    assert bool((found.best_values.diff(dim=1) >= 0).all()) and bool((found.best_passes.diff(dim=1) >= 0).all())
    assert torch.equal(found.best_passes[:, -1], found.passes) or not bool((found.steps_taken == 11).all())
    # A run that ends earlier has just the value and the cost that the longer one tells for that place.
    shorter = refine(explainer, pixel_values, steps=5, **settings)
    place = 1 if adaptive else 5
    torch.testing.assert_close(shorter.value, found.best_values[:, place], atol=1e-6, rtol=0)
    assert torch.equal(shorter.passes, found.best_passes[:, place])


def test_max_passes_is_kept_when_adaptive(explainer):
    pixel_values = photographs(2)
    settings = {"curve_points": POINTS, "adaptive": True, "tolerance": 1e-12}
    costs = {0: 7, 1: 17, 2: 21, 5: 33, 6: 43}
    for allowed, steps in ((7, 0), (16, 0), (17, 1), (20, 1), (21, 2), (33, 5), (42, 5), (43, 6)):
        found = refine(explainer, pixel_values, steps=9, max_passes=allowed, **settings)
        assert bool((found.passes <= allowed).all())
        assert bool((found.steps_taken <= steps).all())
        for taken, passes in zip(found.steps_taken.tolist(), found.passes.tolist(), strict=True):
            assert taken < steps or passes == costs[steps]


def test_the_default_tolerance_is_that_of_adaptive_runs_only(explainer, monkeypatch):
    monkeypatch.setattr("hf_aha.refinement.ADAPTIVE_TOLERANCE", 10.0)
    found = refine(explainer, photographs(2), steps=9, curve_points=POINTS, adaptive=True)
    assert found.steps_taken.tolist() == [5, 5], "one measurement after the first"
    assert refine(explainer, photographs(2), steps=6, curve_points=POINTS).steps_taken.tolist() == [6, 6]


@pytest.mark.parametrize("contrast", [False, True])
def test_gradients_and_sensitivity_of_chosen_points(explainer, contrast):
    """Against autograd through soft masks, and through hard ones, written out here."""
    pixel_values = photographs(2)
    target, against = torch.tensor([3, 1]), torch.tensor([0, 2]) if contrast else None
    with torch.no_grad():
        start = make_start(explainer, pixel_values, target, against, "blur", 0)
    curves = MeasuredCurves(explainer, start, POINTS, max_batch=4)
    chosen = torch.zeros(2, 2, POINTS, dtype=torch.bool)
    chosen[0, 0, 1] = chosen[0, 1, 1] = chosen[1, 1, 2] = True
    rows = torch.arange(2)
    found = curves.measure(start.scores, rows, with_gradient=True)
    bare = curves.measure(start.scores, rows, with_gradient=False)
    assert bare.gradient is None and found.gradient.shape == start.scores.shape
    torch.testing.assert_close(bare.values, found.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(bare.sensitivity, found.sensitivity, atol=1e-6, rtol=0)

    # Soft masks, written out here.
    scores = start.scores.clone().requires_grad_()
    masks = make_ranker("quantile", straight_through=False)(
        scores.flatten(1), POINTS + 1, torch.arange(1, POINTS + 1), tau=0.3
    ).view(2, POINTS, 1, *scores.shape[1:])
    value = 0
    for image, curve, point in chosen.nonzero().tolist():
        mask = masks[image, point]
        shown = mask if curve == 0 else 1 - mask
        mixed = pixel_values[image] * shown + reference_of(pixel_values)[image] * (1 - shown)
        probability = explainer.classifier(mixed[None]).logits.softmax(-1)[0]
        lead = probability[target[image]] - (probability[against[image]] if contrast else 0)
        value = value + (lead if curve == 0 else -lead) / (POINTS + 1)
    expected = torch.autograd.grad(value, scores)[0]
    soft = curves.soft_gradient(start.scores, rows, chosen)
    torch.testing.assert_close(soft, expected, atol=1e-7, rtol=1e-3)
    rest = curves.soft_gradient(start.scores, rows, ~chosen)
    whole = curves.soft_gradient(start.scores, rows, torch.ones_like(chosen))
    torch.testing.assert_close(soft + rest, whole, atol=1e-6, rtol=1e-4)

    # One perturbed image: deletion of the third point of the second photograph.
    counts = round(3 / (POINTS + 1) * start.scores[1].numel())
    order = start.scores[1].flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(start.scores[1].numel()).index_fill(0, order[:counts], 1.0).view_as(start.scores[1])
    deleted = torch.where(mask.bool(), reference_of(pixel_values)[1], pixel_values[1])
    logits = explainer.classifier(deleted[None]).logits.detach().requires_grad_()
    lead = logits.softmax(-1)[0, 1] - (logits.softmax(-1)[0, 2] if contrast else 0)
    expected = torch.autograd.grad(lead, logits)[0].norm()
    torch.testing.assert_close(found.sensitivity[1, 1, 2], expected, atol=1e-6, rtol=1e-4)


def test_the_most_sensitive_points_are_taken_image_by_image():
    sensitivity = torch.tensor([[[0.1, 0.9, 0.2], [0.3, 0.0, 0.8]], [[0.0, 0.0, 0.5], [0.4, 0.3, 0.2]]])
    chosen = most_sensitive(sensitivity, 2)
    assert chosen.tolist() == [
        [[False, True, False], [False, False, True]],
        [[False, False, True], [True, False, False]],
    ]


# ------------------------------------------------------------------------------------ shapes and classes


@pytest.mark.parametrize("scope", SCOPES)
def test_inputs_need_not_be_square(explainer, scope):
    pixel_values = photographs(2, 32, 48)
    found = refine(explainer, pixel_values, scope=scope, steps=3, curve_points=POINTS)
    assert found.scores.shape == (2, 32, 48)
    expected = measure(explainer, pixel_values, found.scores, found.target)
    torch.testing.assert_close(found.value, expected, atol=2e-6, rtol=0)


def test_every_family(model):
    explainer = AhaExplainer.from_classifier(model, image_processor=PROCESSOR, **SIZES).eval()
    for scope in SCOPES:
        found = refine(explainer, photographs(1), 2, scope=scope, steps=2, curve_points=POINTS)
        assert found.target.tolist() == [2]
        assert float(found.gain) >= 0


def test_a_flat_map_is_refined_too(explainer):
    explainer.decoder.decode = lambda features, class_vectors, gradients: torch.zeros(
        len(class_vectors), *features.size
    )
    found = refine(explainer, photographs(2), steps=4, curve_points=POINTS)
    assert bool((found.gain > 0).any()) and bool(torch.isfinite(found.scores).all())


def test_the_layers_that_move_exist_and_follow_the_grid(explainer):
    children = dict(explainer.decoder.named_children())
    assert set(DECODER_LAYERS) <= set(children)
    assert not {"taps", "class_modulation", "grid_blocks"} & set(DECODER_LAYERS)
    assert set(LEARNING_RATES) == set(SCOPES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must be a whole number of at least 0, but it is -1"),
        ({"steps": 2.5}, "steps must be a whole number of at least 0, but it is 2.5"),
        ({"curve_points": 0}, "curve_points must be a whole number of at least 1, but it is 0"),
        ({"max_passes": 0}, "max_passes must be a whole number of at least 1, but it is 0"),
        ({"max_batch": True}, "max_batch must be a whole number of at least 1, but it is True"),
        ({"reference": "white"}, "reference must be one of black, mean, blur, noise, but it is 'white'"),
        ({"scope": "pixels"}, "scope must be one of scores, latent, decoder, but it is 'pixels'"),
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, or None, but it is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, or None, but it is nan"),
        ({"tolerance": -1e-3}, "tolerance must be a positive number, or None, but it is -0.001"),
        ({"adaptive": 1}, "adaptive must be True or False, but it is 1"),
        ({"target": 5}, "class index 5 is out of range"),
        ({"target": torch.zeros(2, 2, dtype=torch.long)}, r"shape \(2, 2\), but refinement takes one class an image"),
    ],
)
def test_bad_arguments(explainer, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        explainer.refine(photographs(2), **settings)
    assert "\n" not in str(caught.value)


def test_unusable_pixels_and_no_classifier(explainer):
    pixel_values = photographs(2)
    pixel_values[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="image 1 hold NaN"):
        explainer.refine(pixel_values)
    with pytest.raises(RuntimeError, match="No classifier is attached"):
        AhaExplainer(explainer.config).refine(photographs(1))


# ------------------------------------------------------------------------------------ explain


def make_photograph(seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC)


def test_explain_refines_the_class_given_by_its_label(explainer):
    explainer.config.id2label = {0: "tench", 1: "church", 2: "horn", 3: "truck", 4: "ball"}
    photograph = make_photograph()
    plain = explainer.explain(photograph, "church")
    counter = Counter(explainer)
    found = explainer.explain(photograph, "church", refine=3)
    assert counter.forward + counter.backward == found.refinement["passes"]
    pixel_values = PROCESSOR(photograph, return_tensors="pt")["pixel_values"]
    expected = explainer.refine(pixel_values, 1, steps=3)
    assert plain.refinement is None
    assert (found.label, found.target) == ("church", 1)
    np.testing.assert_array_equal(found.scores, expected.scores[0].numpy())
    # The plain explanation, its measurement, and three backward and forward passes on nine points of two curves.
    assert found.refinement["passes"] == 1 + 18 + 3 * 36
    assert found.refinement == {
        "steps": 3,
        "passes": int(expected.passes),
        "value": float(expected.value),
        "initial_value": float(expected.initial_value),
        "gain": float(expected.gain),
    }
    assert found.title == plain.title


def test_explain_refines_every_class_of_every_photograph(explainer):
    images = [make_photograph(0), make_photograph(1)]
    found = explainer.explain(images, top_k=2, refine=1)
    pixel_values = torch.cat([PROCESSOR(image, return_tensors="pt")["pixel_values"] for image in images])
    for row in range(2):
        for place in range(2):
            explanation = found[row][place]
            expected = explainer.refine(pixel_values[row : row + 1], explanation.target, steps=1)
            assert explanation.refinement["value"] == pytest.approx(float(expected.value), abs=1e-4)
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="refine must be a number of steps"):
            explainer.explain(images, refine=bad)


def test_command_line(folder, tmp_path, capsys):  # noqa: F811
    make_photograph().save(tmp_path / "dog.png")
    command = ["explain", str(tmp_path / "dog.png"), "--explainer", str(folder), "--output", str(tmp_path / "out")]
    command += ["--target", CLI_LABELS[1], "--format", "json"]
    assert main(command) == 0
    plain = json.loads((tmp_path / "out" / "dog.English-springer.json").read_text())
    assert "refinement" not in plain and "refined" not in capsys.readouterr().out
    assert main([*command, "--refine", "2"]) == 0
    refinement = json.loads((tmp_path / "out" / "dog.English-springer.json").read_text())["refinement"]
    assert refinement["steps"] == 2 and refinement["passes"] > 0
    assert refinement["gain"] == pytest.approx(refinement["value"] - refinement["initial_value"], abs=1e-6)
    line = capsys.readouterr().out
    assert f"refined: insertion - deletion {refinement['initial_value']:.3f} to {refinement['value']:.3f}" in line
    with pytest.raises(SystemExit):
        main([*command, "--refine", "0"])
    assert "'0' is not a whole number" in capsys.readouterr().err
