"""ROAD against a loop over images and fractions, and its rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_metrics_imputation import solved

from hf_aha.metrics import blurred_copy, road_curves, road_with_control
from hf_aha.perturbation import IMAGENET_MEAN_RGB, Normalization


IMAGENET = Normalization(IMAGENET_MEAN_RGB, (0.229, 0.224, 0.225))
SIZE = 16


def batch(make_classifier, count=3):
    model = make_classifier("vit", image_size=SIZE, patch_size=4)
    rgb = torch.rand(count, 3, SIZE, SIZE)
    pixels = IMAGENET.normalize(rgb)
    logits_of = lambda images: model(images).logits  # noqa: E731
    with torch.no_grad():
        target = logits_of(pixels).argmax(-1)
    return logits_of, rgb, pixels, torch.randn(count, SIZE, SIZE), target


@pytest.mark.parametrize("score", ["probability", "logit"])
def test_equals_its_definition(make_classifier, score):
    logits_of, rgb, pixels, scores, target = batch(make_classifier)
    fractions = (0.1, 0.45, 0.9)
    found = road_curves(logits_of, pixels, scores, target, IMAGENET, fractions=fractions, score=score, batch_size=5)
    noise = 0.01 * torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def value(image, row):
        with torch.no_grad():
            logits = logits_of(IMAGENET.normalize(image)[None])[0]
        return float((logits.softmax(-1) if score == "probability" else logits)[target[row]])

    for row in range(3):
        clean = value(rgb[row], row)
        assert found.clean[row].item() == pytest.approx(clean, abs=1e-5)
        for sign, changes in ((1, found.morf), (-1, found.lerf)):
            order = np.argsort(-sign * scores[row].double().numpy().ravel(), kind="stable")
            for column, share in enumerate(fractions):
                removed = np.zeros(SIZE * SIZE, bool)
                removed[order[: round(share * SIZE * SIZE)]] = True
                removed = removed.reshape(SIZE, SIZE)
                filled = torch.from_numpy(solved(rgb[row].numpy(), removed)).float() + noise * torch.tensor(removed)
                assert changes[row, column].item() == pytest.approx(value(filled, row) - clean, abs=1e-4)
    assert torch.allclose(found.value, (found.lerf - found.morf).mean(1) / 2)


def test_only_the_order_of_scores_counts_and_batches_change_nothing(make_classifier):
    logits_of, _, pixels, scores, target = batch(make_classifier)
    options = {"fractions": (0.2, 0.6)}
    first = road_curves(logits_of, pixels, scores, target, IMAGENET, **options)
    transformed = road_curves(logits_of, pixels, scores.double().exp(), target, IMAGENET, batch_size=2, **options)
    alone = road_curves(logits_of, pixels[1:2], scores[1:2], target[1:2], IMAGENET, **options)
    assert torch.allclose(first.morf, transformed.morf, atol=1e-4)
    assert torch.allclose(first.value[1:2], alone.value, atol=1e-4)
    assert torch.allclose(first.value, -road_curves(logits_of, pixels, -scores, target, IMAGENET, **options).value)


def test_a_constant_map_removes_exactly_the_first_pixels():
    seen = []

    def logits_of(images):
        seen.append(images)
        return torch.zeros(len(images), 2)

    unit = Normalization((0.0,) * 3, (1.0,) * 3)
    pixels = torch.rand(1, 3, 10, 10)
    found = road_curves(logits_of, pixels, torch.ones(1, 10, 10), torch.tensor([1]), unit, fractions=(0.3,))
    changed = (torch.cat(seen[1:]) != pixels).any(1)
    assert changed.flatten(1).sum(1).tolist() == [30, 30]
    assert changed[:, :3].all() and found.value.item() == 0


def test_a_classifier_that_reads_a_known_region():
    """Its answer is the contrast of the left half: the map of that half must win, a map of the other one lose."""
    unit = Normalization((0.0,) * 3, (1.0,) * 3)
    chess = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    pixels = chess.float().expand(1, 3, 16, 16)

    def logits_of(images):
        contrast = images[:, 0, :, :8].diff(dim=2).abs().mean((1, 2))
        return torch.stack([4 * contrast, torch.zeros(len(images))], 1)

    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    good = road_curves(logits_of, pixels, left, torch.tensor([0]), unit, fractions=(0.5,))
    assert good.morf.item() < -0.2 and abs(good.lerf.item()) < 0.02
    assert good.value.item() > 0.1
    assert road_curves(logits_of, pixels, -left, torch.tensor([0]), unit, fractions=(0.5,)).value.item() < -0.1


def test_control_is_the_metric_of_the_blurred_ranks(make_classifier):
    logits_of, _, pixels, scores, target = batch(make_classifier)
    both = road_with_control(logits_of, pixels, scores, target, IMAGENET, fractions=(0.5,), blur_of_side=0.2)
    copy = blurred_copy(scores, 0.2)
    again = road_curves(logits_of, pixels, copy, target, IMAGENET, fractions=(0.5,))
    assert torch.equal(both.blurred.morf, again.morf)
    assert torch.allclose(both.gain_by_blur, both.blurred.value - both.map.value)
    assert torch.equal(copy, blurred_copy(scores.double().exp(), 0.2))
    assert copy.diff(dim=2).abs().mean() < 0.5 * blurred_copy(scores, 0.01).diff(dim=2).abs().mean()


def test_rows_that_are_not_finite_have_no_value_and_spoil_no_other(make_classifier):
    logits_of, _, pixels, scores, target = batch(make_classifier)
    whole = road_curves(logits_of, pixels, scores, target, IMAGENET, fractions=(0.5,))
    scores[0, 3, 3], pixels[2, 0, 0, 0] = torch.nan, torch.inf
    found = road_with_control(logits_of, pixels, scores, target, IMAGENET, fractions=(0.5,))
    for part in (found.map, found.blurred):
        assert torch.isnan(part.value).tolist() == [True, False, True]
    assert torch.allclose(found.map.value[1], whole.value[1], atol=1e-5)


def test_bfloat16_classifiers_give_float32_values(make_classifier):
    logits_of, _, pixels, scores, target = batch(make_classifier)
    found = road_curves(
        lambda images: logits_of(images).bfloat16(), pixels, scores, target, IMAGENET, fractions=(0.5,)
    )
    assert found.value.dtype == torch.float32 and torch.isfinite(found.value).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": (0.0, 0.5)}, r"fractions are \(0.0, 0.5\), but each must lie within 0..1"),
        ({"fractions": (0.999,)}, "remove 1 to 255 of the 256 pixels"),
        ({"fractions": ()}, "fractions are"),
        ({"score": "loss"}, "score is 'loss', but must be one of 'probability', 'logit'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"scores": torch.zeros(1, 4, 4)}, r"need \(1, 16, 16\): resize the maps"),
        ({"target": torch.tensor([7])}, "class 7, but the classifier has the classes 0 to 4"),
        ({"target": torch.tensor([0.5])}, "target has shape"),
        ({"pixel_values": torch.zeros(0, 3, 16, 16)}, "pixel_values has shape"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "must be floating"),
    ],
)
def test_refuses_bad_input(make_classifier, change, message):
    logits_of, _, pixels, scores, target = batch(make_classifier, 1)
    arguments = {"pixel_values": pixels, "scores": scores, "target": target, "normalization": IMAGENET, **change}
    with pytest.raises(ValueError, match=message):
        road_curves(logits_of, **arguments)
