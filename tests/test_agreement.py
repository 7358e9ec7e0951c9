"""Our deletion, insertion and ROAD beside other libraries', and answers that are known without any library.

That every preset equals a loop written from its definition is tested in `test_metrics_evaluation.py`. Comparisons with
quantus, pytorch-grad-cam and captum are marked `bench` (`make bench`); the settings that had to be matched, and why a
plain call of each library gives other numbers, stand in the docstrings.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from hf_aha import FrozenClassifier
from hf_aha.baselines.base import ClassifierOutput
from hf_aha.metrics import Protocol, evaluate_maps, get_protocol, road_curves
from hf_aha.metrics.references import gkern_blur
from hf_aha.perturbation import Normalization


HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def linear(size: int, classes: int = 3, seed: int = 0):
    """A classifier whose logits are linear in the pixels, and its weights (C, 3, H, W)."""
    weights = torch.randn(classes, 3, size, size, generator=torch.Generator().manual_seed(seed)) / size
    return lambda pixels: torch.einsum("bchw,kchw->bk", pixels, weights), weights


def on_logits(name: str, size: int, **changes) -> Protocol:
    """A preset that scores the logit of the class asked about at every count of pixels."""
    (protocol,) = get_protocol(name, image_size=size, patch_size=8)
    steps = {"rounding": "step", "step": 1, "fractions": tuple(i / size**2 for i in range(size**2 + 1))}
    return dataclasses.replace(protocol, **{**steps, "score": "logit", "class_source": "given", **changes})


# ------------------------------------------------------------------------------------------------ known answers


def test_curves_of_a_linear_classifier_are_sums_of_contributions():
    logits_of, weights = linear(6)
    pixels, scores, target = torch.randn(4, 3, 6, 6), torch.randn(4, 6, 6), torch.tensor([0, 1, 2, 0])
    contribution = (weights[target] * pixels).sum(1).flatten(1)
    ordered = contribution.gather(1, scores.flatten(1).argsort(1, descending=True))
    removed = torch.cat([torch.zeros(4, 1), ordered.cumsum(1)], 1)
    deletion = evaluate_maps(logits_of, pixels, scores, target, on_logits("rise/deletion", 6), normalization=HALF)
    assert deletion.curves == pytest.approx((removed[:, -1:] - removed).numpy(), abs=1e-4)
    # With zeros as the reference, insertion shows exactly what deletion took away.
    revealing = on_logits("rise/insertion", 6, reference="zero", reference_args={})
    insertion = evaluate_maps(logits_of, pixels, scores, target, revealing, normalization=HALF)
    assert insertion.curves == pytest.approx(removed.numpy(), abs=1e-4)
    assert insertion.values + deletion.values == pytest.approx(contribution.sum(1).numpy(), abs=1e-4)


def test_no_order_of_a_linear_classifier_beats_its_contributions():
    logits_of, weights = linear(3)
    pixels = torch.randn(1, 3, 3, 3)
    contribution = (weights[1] * pixels[0]).sum(0)
    orders = list(itertools.islice(itertools.permutations(range(9)), 0, None, 131))
    maps = torch.stack([contribution, *(-torch.tensor(order).argsort().float().view(3, 3) for order in orders)])
    many = pixels.expand(len(maps), -1, -1, -1)
    target = torch.ones(len(maps), dtype=torch.int64)
    for name, best in (("rise/deletion", min), ("rise/insertion", max)):
        protocol = on_logits(name, 3, reference="zero", reference_args={})
        values = evaluate_maps(logits_of, many, maps, target, protocol, normalization=HALF).values
        assert len(values) > 2000 and values[0] == best(values) and np.ptp(values) > 0.1


def test_road_of_a_linear_classifier_that_looks_at_one_pixel():
    """The removed pixel becomes the mean of its neighbours, 1/6 direct and 1/12 diagonal, and so does the logit."""
    pixels = torch.rand(1, 3, 5, 5)

    def logits_of(images):
        seen = images[:, 0, 2, 3]
        return torch.stack([seen, torch.zeros_like(seen)], 1)

    scores = torch.zeros(1, 5, 5)
    scores[0, 2, 3] = 1
    exact = {"fractions": (1 / 25,), "noise": 0.0, "score": "logit"}
    found = road_curves(logits_of, pixels, scores, torch.tensor([0]), HALF, **exact)
    around = pixels[0, 0, 1:4, 2:5]
    kernel = torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12
    assert float(found.morf) == pytest.approx(float((around * kernel).sum() - around[1, 1]), abs=1e-4)
    assert float(found.lerf) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------ quantus


def tiny(make_classifier, size: int) -> FrozenClassifier:
    model = make_classifier("vit", image_size=size, patch_size=8)
    with torch.no_grad():
        model.classifier.weight.mul_(4)
    return FrozenClassifier(model)


def pixel_flipping(classifier, pixels, target, scores, pixels_a_step, perturb, **settings):
    """Curves of quantus (B, points) with a perturbation of ours: its arguments are flat arrays and flat indices."""
    import quantus

    metric = quantus.PixelFlipping(
        features_in_step=3 * pixels_a_step,
        normalise=False,
        perturb_func=perturb,
        disable_warnings=True,
        **settings,
    )
    return metric(
        model=ClassifierOutput(classifier).eval(),
        x_batch=pixels.numpy(),
        y_batch=target.numpy(),
        a_batch=scores[:, None].numpy(),
        softmax=True,
        channel_first=True,
        device="cpu",
    )


@pytest.mark.bench
@pytest.mark.parametrize("curve", ["deletion", "insertion"])
def test_curves_equal_quantus_pixel_flipping(curve, make_classifier, monkeypatch):
    """quantus.PixelFlipping agrees point by point, once these are matched.

    - It refuses a `PreTrainedModel`: it is given a plain module in eval mode that returns logits, with `softmax=True`.
    - It flattens the three channels and broadcasts the map over them, so that one pixel is three features of one
      score: `features_in_step` must be a multiple of 3, and it must divide height x width too. At 224 pixels no
      multiple of 3 does, so that a step there splits a pixel between two steps. Hence 24 x 24 pixels here, 16 a step.
    - `perturb_baseline="black"` is the least value of each normalised array, not black: the fill is given by hand.
    - The unperturbed point is missing: its curve is ours without the first point.
    - It has no insertion: the reference is given as the image, and the "perturbation" puts the image's pixels in.
    - `normalise` divides the map by its extreme, which may make two scores equal that were not; it is off.
    - Its area calls `np.trapz`, which numpy 2.4 no longer has: the name is put back for the call.
    - Its sort is not stable, so a map with ties may be flipped in another order: this map has none.
    """
    classifier, size = tiny(make_classifier, 24), 24
    pixels, scores = torch.randn(3, 3, size, size), torch.randn(3, size, size)
    with torch.no_grad():
        target = classifier(pixels).logits.argmax(-1)
    (protocol,) = get_protocol(f"rise/{curve}", image_size=size, patch_size=8)
    protocol = dataclasses.replace(protocol, step=16, fractions=tuple(i / 36 for i in range(37)))
    logits_of = lambda images: classifier(images).logits  # noqa: E731
    ours = evaluate_maps(logits_of, pixels, scores, target, protocol, normalization=HALF)
    blurred = gkern_blur(pixels, 11, 5.0)
    start, finish = (pixels, torch.zeros_like(pixels)) if curve == "deletion" else (blurred, pixels)
    filling = finish.flatten(1).numpy()

    def perturb(arr, indices, **kwargs):
        made = arr.copy()
        np.put_along_axis(made, indices, np.take_along_axis(filling, indices, 1), 1)
        return made

    theirs = np.array(pixel_flipping(classifier, start, target, scores, 16, perturb))
    assert theirs.shape == (3, 36) and np.ptp(theirs, axis=1).min() > 0.05
    assert theirs == pytest.approx(ours.curves[:, 1:], abs=2e-5)
    # Its area has steps of length 1 and lacks the first interval.
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    first = (ours.curves[:, 0] + theirs[:, 0]) / 2
    area = np.array(pixel_flipping(classifier, start, target, scores, 16, perturb, return_auc_per_sample=True))
    assert (area + first) / 36 == pytest.approx(ours.values, abs=2e-5)


# ------------------------------------------------------------------------------------------------ pytorch-grad-cam


@pytest.mark.bench
def test_road_equals_pytorch_grad_cam(make_classifier):
    """pytorch_grad_cam.metrics.road agrees for every order, share and image, once these are matched.

    - A percentile is a place among N - 1 gaps: percentile p keeps ceil((N - 1) p / 100) pixels and not pN / 100; ours
      is asked for exactly as many.
    - It keeps what is under the threshold, so that ties at it all go at once: this map has none.
    - The least important order is made of `1 - map`: the map must lie in [0, 1].
    - Whether a logit or a probability is compared depends on the target object: here the softmax of the class.
    - Its noise comes from the global generator and ours from a seed of its own: none is added on either side. It
      imputes normalised values, we RGB; without noise that is the same, since the weights sum to one.
    """
    from pytorch_grad_cam.metrics import road as cam_road

    size, percentiles = 32, [10, 30, 50, 70, 90]
    classifier = tiny(make_classifier, size)
    smooth = torch.nn.functional.interpolate(torch.randn(2, 3, 8, 8), size=size, mode="bilinear")
    pixels = smooth + 0.3 * torch.randn(2, 3, size, size)
    scores = torch.stack([torch.randperm(size**2).view(size, size) for _ in range(2)]).float() / size**2
    with torch.no_grad():
        target = classifier(pixels).logits.argmax(-1)
    count = size**2
    removed = [count - int(np.ceil((count - 1) * p / 100)) for p in percentiles]
    ours = road_curves(
        lambda images: classifier(images).logits,
        pixels,
        scores,
        target,
        HALF,
        fractions=tuple(sorted(n / count for n in removed)),
        noise=0.0,
    )

    def theirs(order) -> np.ndarray:
        changes = []
        for percentile in sorted(percentiles, reverse=True):
            metric = order(percentile)
            metric.perturbation.imputer.noise = 0.0
            probabilities = [lambda logits, c=int(c): logits.softmax(-1)[c] for c in target]
            changes.append(metric(pixels, scores.numpy(), probabilities, ClassifierOutput(classifier)))
        return np.stack(changes, 1)

    most, least = theirs(cam_road.ROADMostRelevantFirst), theirs(cam_road.ROADLeastRelevantFirst)
    assert np.abs(most).max() > 0.01
    assert ours.morf.numpy() == pytest.approx(most, abs=1e-4)
    assert ours.lerf.numpy() == pytest.approx(least, abs=1e-4)
    assert ours.value.numpy() == pytest.approx((least - most).mean(1) / 2, abs=1e-4)


# ------------------------------------------------------------------------------------------------ captum


@pytest.mark.bench
def test_one_step_of_deletion_equals_captum_feature_ablation(make_classifier):
    """captum has no deletion curve, but its FeatureAblation is the first step of one.

    The mask of features must be given (by default every channel of every pixel is one), the baseline is in normalised
    space, and what is returned is the drop, repeated over the pixels and channels of a feature.
    """
    from captum.attr import FeatureAblation

    size, patch = 32, 8
    classifier = tiny(make_classifier, size)
    pixels = torch.randn(1, 3, size, size)
    numbers = torch.arange(16).view(4, 4).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    drops = FeatureAblation(ClassifierOutput(classifier, "probability")).attribute(
        pixels, baselines=0, target=2, feature_mask=numbers[None, None], perturbations_per_eval=4
    )[0, 0, ::patch, ::patch]
    (protocol,) = get_protocol("rise/deletion", image_size=size, patch_size=patch)
    first = {"rounding": "round", "step": None, "fractions": (0, 1 / 16, 1), "unit": (patch, patch)}
    protocol = dataclasses.replace(protocol, **first, auc="trapezoid_unit", class_source="given")
    maps = (numbers == torch.arange(16)[:, None, None]).float()
    ours = evaluate_maps(
        lambda images: classifier(images).logits,
        pixels.expand(16, -1, -1, -1),
        maps,
        torch.full((16,), 2),
        protocol,
        normalization=HALF,
    )
    assert ours.curves[:, 0] - ours.curves[:, 1] == pytest.approx(drops.flatten().numpy(), abs=1e-5)
    assert drops.abs().max() > 1e-3


@pytest.mark.bench
def test_captum_infidelity_of_contributions_is_zero():
    """Contributions add up, so that captum's infidelity of them is 0; a map that only ranks needs `normalize=True`.

    Our scores are orders: multiplied by ten they are the same explanation, but another infidelity without `normalize`.
    """
    from captum.metrics import infidelity

    logits_of, weights = linear(6)
    pixels = torch.randn(1, 3, 6, 6)
    contribution = weights[1:2]

    def perturb(images):
        torch.manual_seed(0)
        noise = 0.5 * torch.randn_like(images)
        return noise, images - noise

    plain = {"target": 1, "n_perturb_samples": 20}
    assert float(infidelity(logits_of, perturb, pixels, contribution, **plain)) < 1e-8
    assert float(infidelity(logits_of, perturb, pixels, 10 * contribution, **plain)) > 1e-3
    assert float(infidelity(logits_of, perturb, pixels, 10 * contribution, normalize=True, **plain)) < 1e-5
