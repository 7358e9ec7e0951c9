"""Every preset against a loop written from its definition, and what evaluation must never do silently."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from hf_aha.metrics import MeasuredImages, deletion_insertion_curves, evaluate_maps, get_protocol
from hf_aha.perturbation import Normalization, reference_image


SIZE = 16
N = SIZE * SIZE
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def one(name: str, **changes):
    (protocol,) = get_protocol(name, image_size=SIZE, patch_size=8)
    return dataclasses.replace(protocol, **changes)


def linear(classes: int = 4, seed: int = 0, scale: float = 0.15):
    weights = scale * torch.randn(classes, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return lambda pixels: torch.einsum("bchw,kchw->bk", pixels, weights)


def batch(count: int = 3, normalization: Normalization = IMAGENET):
    rgb = torch.rand(count, 3, SIZE, SIZE)
    return rgb, normalization.normalize(rgb), torch.randn(count, SIZE, SIZE)


def vit_logits(make_classifier):
    model = make_classifier("vit", image_size=SIZE, patch_size=4)
    return lambda pixels: model(pixels).logits


def order_of(scores):
    return np.argsort(-np.asarray(scores, dtype=np.float64).ravel(), kind="stable")


def swap(image, other, order, count):
    """A copy of `image` (3, H, W) with the first `count` pixels of the order taken from `other`."""
    made = image.clone().flatten(1)
    chosen = torch.from_numpy(order[:count].copy())
    made[:, chosen] = other.flatten(1)[:, chosen]
    return made.view_as(image)


def probability(logits_of, image, target):
    with torch.no_grad():
        return float(logits_of(image[None]).softmax(-1)[0, target])


def scipy_blur(image, kernel, sigma):
    dirac = np.zeros((kernel, kernel))
    dirac[kernel // 2, kernel // 2] = 1
    weight = torch.from_numpy(gaussian_filter(dirac, sigma)).float()[None, None].repeat(3, 1, 1, 1)
    return torch.nn.functional.conv2d(image[None], weight, padding=kernel // 2, groups=3)[0]


def mean_interval(curve):
    return (sum(curve) - curve[0] / 2 - curve[-1] / 2) / (len(curve) - 1)


def trapezoid(values, places):
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(places, places[1:], values, values[1:], strict=False))


def close(values, expected, tolerance=2e-5):
    assert np.asarray(values, np.float64) == pytest.approx(np.asarray(expected, np.float64), abs=tolerance)


# ------------------------------------------------------------------------------------------------ the presets


def test_aha_equals_its_definition(make_classifier):
    logits_of = vit_logits(make_classifier)
    rgb, pixels, scores = batch()
    target = logits_of(pixels).argmax(-1)
    deletion, insertion = (
        evaluate_maps(logits_of, pixels, scores, target, one(f"aha/{curve}"), normalization=IMAGENET, max_batch=7)
        for curve in ("deletion", "insertion")
    )
    grey = torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand(3, SIZE, SIZE)
    shares = [0.05 * step for step in range(21)]
    for row in range(3):
        for result, sign in ((deletion, 1), (insertion, -1)):
            order = order_of(sign * scores[row])
            curve = [
                probability(logits_of, IMAGENET.normalize(swap(rgb[row], grey, order, round(share * N))), target[row])
                for share in shares
            ]
            close(result.curves[row], curve)
            close(result.values[row], trapezoid(curve, shares))
            close([result.clean[row], result.reference[row]], [curve[0], curve[-1]])
    negated = evaluate_maps(logits_of, pixels, -scores, target, one("aha/deletion"), normalization=IMAGENET)
    assert np.array_equal(insertion.curves, negated.curves) and np.array_equal(insertion.values, negated.values)
    assert insertion.protocol.higher_is_better and not deletion.protocol.higher_is_better


@pytest.mark.parametrize("step", [16, 10])
def test_rise_equals_its_definition(make_classifier, step):
    logits_of = vit_logits(make_classifier)
    _, pixels, scores = batch()
    target = logits_of(pixels).argmax(-1)
    points = -(-N // step) + 1
    steps = {"step": step, "fractions": tuple(i / (points - 1) for i in range(points))}
    for curve_name in ("deletion", "insertion"):
        result = evaluate_maps(
            logits_of, pixels, scores, target, one(f"rise/{curve_name}", **steps), normalization=IMAGENET
        )
        for row in range(3):
            image = pixels[row]
            if curve_name == "deletion":
                start, finish = image, torch.zeros_like(image)
            else:
                start, finish = scipy_blur(image, 11, 5), image
            order = order_of(scores[row])
            curve = [probability(logits_of, swap(start, finish, order, step * i), target[row]) for i in range(points)]
            close(result.curves[row], curve)
            close(result.values[row], mean_interval(curve))


def test_chefer_equals_its_definition():
    logits_of = linear(scale=0.05)
    rgb, pixels, scores = batch(12, HALF)
    labels = logits_of(pixels).argmax(-1)
    labels[::4] = (labels[::4] + 1) % 4  # the classifier is wrong on these
    target = torch.zeros(12, dtype=torch.int64)
    shares = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    for name, sign in (("positive", 1), ("negative", -1)):
        result = evaluate_maps(
            logits_of, pixels, scores, target, one(f"chefer/{name}"), normalization=HALF, labels=labels
        )
        hits = np.zeros((12, 10))
        for row in range(12):
            order = order_of(sign * scores[row])
            for column, share in enumerate([0, *shares]):
                image = swap(rgb[row], torch.zeros_like(rgb[row]), order, int(N * share))
                hits[row, column] = int(logits_of(HALF.normalize(image)[None]).argmax()) == labels[row]
        assert np.array_equal(result.curves, hits[:, 1:]) and np.array_equal(result.clean, hits[:, 0])
        assert result.clean.mean() == 0.75 and 0 < hits[:, 1:].mean() < 0.75
        close(result.values.mean(), trapezoid(hits.mean(0), [0, *shares]) * 100, 1e-4)


def test_the_maximum_of_chefers_area_is_90_times_the_clean_accuracy():
    # Right or wrong by the first pixel alone, which the map ranks last.
    def logits_of(pixels):
        return torch.stack([pixels[:, 0, 0, 0], -pixels[:, 0, 0, 0]], 1)

    pixels = torch.ones(4, 3, SIZE, SIZE)
    scores = torch.arange(N).view(1, SIZE, SIZE).expand(4, -1, -1).float()
    labels = torch.tensor([0, 0, 0, 1])
    result = evaluate_maps(
        logits_of, pixels, scores, labels, one("chefer/positive"), normalization=HALF, labels=labels
    )
    close(result.values, [90, 90, 90, result.values[3]], 1e-4)
    assert result.values[:3].mean() == pytest.approx(90 * result.clean[:3].mean(), abs=1e-4)
    assert result.clean.tolist() == [1, 1, 1, 0]


def mda_classifier(pixels):
    """Class 0 by the sum of the image and a fine pattern, class 1 by a constant."""
    pattern = torch.linspace(-1, 1, 3 * N).view(3, SIZE, SIZE).sin() * 0.02 + 0.03
    return torch.stack([(pixels * pattern).sum((1, 2, 3)), torch.full((len(pixels),), 5.0)], 1)


def mda_images():
    base = torch.rand(6, 3, SIZE, SIZE) * 0.3
    return base + torch.tensor([0.15, 0.25, 0.35, 0.9, 30.0, 0.2])[:, None, None, None]


def test_mda_equals_its_definition():
    pixels, scores = mda_images(), torch.randn(6, SIZE, SIZE)
    scores[5] = 0  # no order at all: MDA skips it
    target, labels = mda_classifier(pixels).argmax(-1), torch.zeros(6, dtype=torch.int64)
    labels[2] = 1  # wrongly classified
    assert target.tolist() == [0] * 6
    results = {
        name: evaluate_maps(
            mda_classifier, pixels, scores, target, one(f"mda/{name}"), normalization=HALF, labels=labels, max_batch=5
        )
        for name in ("deletion", "insertion", "mas-deletion", "mas-insertion")
    }
    measured, used = 0, set()
    for row in range(6):
        image, magnitude = pixels[row], scores[row].abs().double().numpy().ravel()
        clean = probability(mda_classifier, image, 0)
        kernel = next(
            (k for k in range(31, 102, 2) if probability(mda_classifier, scipy_blur(image, k, k), 0) <= 0.01), None
        )
        if kernel is None or clean < 0.6 or labels[row] != 0 or magnitude.sum() == 0:
            assert all(str(row) in dict(result.dropped) for result in results.values())
            continue
        used.add(kernel)
        order = order_of(magnitude)
        for falling in (True, False):
            empty = torch.zeros_like(image) if falling else scipy_blur(image, kernel, kernel)
            start, finish = (image, empty) if falling else (empty, image)
            low = probability(mda_classifier, empty, 0)
            best, response, density = (1.0, [], []) if falling else (0.0, [], [])
            for point in range(SIZE + 1):
                value = probability(mda_classifier, swap(start, finish, order, SIZE * point), 0)
                value = min(max((value - low) / abs(clean - low), 0), 1)
                best = min(best, value) if falling else max(best, value)
                response.append(best)
                moved = magnitude[order[: SIZE * point]].sum() / magnitude.sum()
                density.append(1 - moved if falling else moved)
            response, density = np.array(response), np.array(density)
            gap = np.abs(response - density)
            aligned = np.clip(response + gap if falling else response - gap, 0, 1)
            aligned = (aligned - aligned.min()) / (aligned.max() - aligned.min())
            curve = "deletion" if falling else "insertion"
            for name, expected in ((curve, response), (f"mas-{curve}", aligned)):
                close(results[name].curves[measured], expected, 2e-4)
                close(results[name].values[measured], mean_interval(expected), 2e-4)
            close(results[curve].reference[measured], low)
            close(results[curve].clean[measured], clean)
        measured += 1
    assert measured >= 2 and len(used) >= 2, "the images must need different blurs"
    reasons = dict(results["deletion"].dropped)
    assert dict(results["insertion"].dropped) == reasons
    assert reasons["2"] == "the prediction is not the label" and reasons["5"] == "the map is zero everywhere"
    assert reasons["4"] == "no blur of 31, 33, .., 101 pixels brings the probability of its class to 0.01"


def test_mda_of_a_reference_that_scores_what_the_image_scores_is_a_ramp():
    pixels = torch.rand(1, 3, SIZE, SIZE)
    changes = {"image_filter": None}
    for name, flat, ramp in (("deletion", 1.0, range(16, -1, -1)), ("insertion", 0.0, range(17))):
        # Insertion needs a fixed blur here: no blur removes the class of a classifier that sees nothing.
        blur = {} if name == "deletion" else {"reference": "zero", "reference_args": {}}
        for curve, expected in ((name, [flat] * 17), (f"mas-{name}", [point / 16 for point in ramp])):
            result = evaluate_maps(
                lambda x: torch.zeros(len(x), 2),
                pixels,
                torch.ones(1, SIZE, SIZE),
                torch.tensor([0]),
                one(f"mda/{curve}", **changes, **blur),
                normalization=HALF,
            )
            close(result.curves[0], expected)


@pytest.mark.parametrize(("level", "side"), [("pixel", 1), ("cell4", 4), ("patch", 8)])
@pytest.mark.parametrize("kind", ["blur", "mean"])
def test_hf_aha_equals_its_definition_and_the_curves_of_the_package(make_classifier, level, side, kind):
    logits_of = vit_logits(make_classifier)
    _, pixels, scores = batch(2)
    target = logits_of(pixels).argmax(-1)
    reference = IMAGENET.normalize(reference_image(IMAGENET.denormalize(pixels), kind, blur_sigma=0.05))
    cells = None if side == 1 else (SIZE // side, SIZE // side)
    curves = deletion_insertion_curves(logits_of, pixels, reference, scores, target, cells=cells)
    for name, expected in (("deletion", curves.deletion), ("insertion", curves.insertion)):
        result = evaluate_maps(
            logits_of, pixels, scores, target, one(f"hf_aha/{level}/{kind}/{name}"), normalization=IMAGENET
        )
        close(result.curves, expected, 1e-5)
    block = scores[0].view(SIZE // side, side, SIZE // side, side).mean((1, 3))
    order = order_of(block)
    for point in (3, 10, 17):
        mask = np.zeros(block.numel(), bool)
        mask[order[: round(0.05 * point * block.numel())]] = True
        mask = torch.from_numpy(np.kron(mask.reshape(block.shape), np.ones((side, side), bool)))
        shown = torch.where(mask, pixels[0], reference[0])
        close(result.curves[0, point], probability(logits_of, shown, target[0]))


# ------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("name", ["aha", "rise", "chefer", "hf_aha/pixel"])
def test_only_the_order_of_the_scores_matters(name):
    logits_of = linear()
    _, pixels, scores = batch()
    target = logits_of(pixels).argmax(-1)
    for protocol in get_protocol(name, image_size=SIZE):
        plain, stretched = (
            evaluate_maps(logits_of, pixels, maps, target, protocol, normalization=IMAGENET, labels=target)
            for maps in (scores, 1e3 * torch.exp(2 * scores.double()) - 7)
        )
        assert plain == stretched and len(plain) == 3


def test_mda_uses_the_values():
    pixels, scores = mda_images()[:2], torch.randn(2, SIZE, SIZE)
    labels = torch.zeros(2, dtype=torch.int64)
    for name in ("deletion", "mas-insertion"):
        plain, stretched = (
            evaluate_maps(mda_classifier, pixels, maps, labels, one(f"mda/{name}"), normalization=HALF, labels=labels)
            for maps in (scores, torch.exp(scores))
        )
        assert len(plain) == 2 and not np.allclose(plain.values, stretched.values)


@pytest.mark.parametrize("name", ["aha/deletion", "rise/insertion", "hf_aha/patch/mean/insertion"])
def test_the_batch_and_its_chunks_do_not_matter(name):
    logits_of = linear()
    _, pixels, scores = batch(4)
    target = logits_of(pixels).argmax(-1)
    whole = evaluate_maps(logits_of, pixels, scores, target, one(name), normalization=IMAGENET)
    for row in range(4):
        alone = slice(row, row + 1)
        single = evaluate_maps(
            logits_of, pixels[alone], scores[alone], target[alone], one(name), normalization=IMAGENET, max_batch=1
        )
        close(single.curves[0], whole.curves[row], 1e-6)
        close(single.values, whole.values[alone], 1e-6)


def test_a_constant_map_goes_by_index_and_is_all_ties():
    logits_of = linear()
    _, pixels, _ = batch(1)
    target = logits_of(pixels).argmax(-1)
    falling = -torch.arange(N).view(1, SIZE, SIZE).float()
    constant, ordered = (
        evaluate_maps(logits_of, pixels, maps, target, one("aha/deletion"), normalization=IMAGENET)
        for maps in (torch.full((1, SIZE, SIZE), 3.0), falling)
    )
    assert np.array_equal(constant.curves, ordered.curves)
    assert constant.tie_fraction.tolist() == [1] and ordered.tie_fraction.tolist() == [0]
    # Of the negated constant map the lowest index still goes first.
    reverse = evaluate_maps(
        logits_of, pixels, torch.zeros(1, SIZE, SIZE), target, one("aha/insertion"), normalization=IMAGENET
    )
    assert np.array_equal(reverse.curves, ordered.curves)


def test_tie_fraction_counts_the_units_that_are_not_alone():
    logits_of = linear()
    _, pixels, _ = batch(1)
    scores = torch.arange(N).view(1, SIZE, SIZE).float()
    scores[0, 0, :3] = 1000.0
    scores[0, 5, 5] = scores[0, 5, 6]
    target = logits_of(pixels).argmax(-1)
    result = evaluate_maps(logits_of, pixels, scores, target, one("aha/deletion"), normalization=IMAGENET)
    assert result.tie_fraction.tolist() == [5 / N]
    cells = torch.arange(16.0).view(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)[None]
    result = evaluate_maps(logits_of, pixels, cells, target, one("hf_aha/cell4/mean/deletion"), normalization=IMAGENET)
    assert result.tie_fraction.tolist() == [0], "cells are ranked, so equal pixels of one cell are no tie"


def test_random_ties_average_over_seeded_orders():
    logits_of = linear()
    _, pixels, scores = batch(2)
    scores[0] = 0
    target = logits_of(pixels).argmax(-1)
    kwargs = {"normalization": IMAGENET}
    random = one("aha/deletion", ties="random_mean", tie_orders=3, tie_seed=5)
    result = evaluate_maps(logits_of, pixels, scores, target, random, **kwargs)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(N, generator=generator) for _ in range(3)]
    single = []
    for order in orders:  # the constant map in this order equals a map without ties that falls along it
        falling = torch.empty(N)
        falling[order] = -torch.arange(N).float()
        maps = torch.stack([falling.view(SIZE, SIZE), scores[1]])
        single.append(evaluate_maps(logits_of, pixels, maps, target, one("aha/deletion"), **kwargs))
    assert len({s.values[0] for s in single}) == 3 and len({s.values[1] for s in single}) == 1
    close(result.values, np.mean([s.values for s in single], 0), 1e-6)
    close(result.curves, np.mean([s.curves for s in single], 0), 1e-6)
    other = evaluate_maps(logits_of, pixels, scores, target, dataclasses.replace(random, tie_seed=6), **kwargs)
    assert other.values[0] != result.values[0] and other.values[1] == pytest.approx(result.values[1], abs=1e-6)


# ------------------------------------------------------------------------------------------------ nothing silent


def test_images_without_a_number_are_listed_with_the_reason():
    logits_of = linear()
    _, pixels, scores = batch(5)
    target = logits_of(pixels).argmax(-1)
    scores[0, 3, 3] = torch.nan
    scores[1, 0, 0] = torch.inf
    pixels[2, 0, 0, 0] = torch.nan
    target[3] = (target[3] + 1) % 4
    result = evaluate_maps(
        logits_of, pixels, scores, target, one("aha/deletion"), normalization=IMAGENET, image_ids="abcde"
    )
    assert result.image_ids == ("e",) and len(result.values) == len(result.curves) == 1
    reasons = dict(result.dropped)
    assert list(reasons) == ["a", "b", "c", "d"]
    assert reasons["a"] == reasons["b"] == "the map holds NaN or infinite values"
    assert reasons["c"] == "the classifier gave logits that are not finite"
    assert "another class than the predicted one" in reasons["d"]
    given = one("aha/deletion", class_source="given")
    kept = evaluate_maps(logits_of, pixels, scores, target, given, normalization=IMAGENET, image_ids="abcde")
    assert kept.image_ids == ("d", "e") and kept.target.tolist() == target[3:].tolist()
    close(kept.clean[0], probability(logits_of, pixels[3], target[3]))


@pytest.mark.parametrize(
    "name", ["aha/insertion", "rise/insertion", "mda/mas-insertion", "hf_aha/patch/blur/insertion"]
)
def test_a_batch_may_lose_every_image(name):
    _, pixels, _ = batch(2)
    target = torch.tensor([0, 1])
    result = evaluate_maps(
        linear(),
        pixels,
        torch.full((2, SIZE, SIZE), torch.nan),
        target,
        one(name),
        normalization=IMAGENET,
        labels=target,
    )
    assert len(result) == 0 and len(result.dropped) == 2 and result.curves.shape == (0, len(one(name).fractions))


def test_logits_that_break_on_a_perturbed_image_are_noticed():
    def logits_of(pixels):
        broken = (pixels[:, 0, 0, 0] == 0)[:, None]  # only once the first pixel is removed
        return torch.where(broken, torch.nan, linear()(pixels))

    _, pixels, scores = batch(2)
    target = linear()(pixels).argmax(-1)
    for name, labels in (("rise/deletion", None), ("chefer/positive", target)):
        changes = {"reference": "zero", "space": "normalised"}
        result = evaluate_maps(
            logits_of, pixels, scores, target, one(name, **changes), normalization=IMAGENET, labels=labels
        )
        assert [reason for _, reason in result.dropped] == [
            "the classifier gave logits that are not finite on a perturbed image"
        ] * 2


def test_the_classifier_is_only_called_and_scores_are_float32(make_classifier):
    model = make_classifier("vit", image_size=SIZE, patch_size=4).to(torch.bfloat16).train()
    _, pixels, scores = batch(2)
    pixels = pixels.bfloat16()
    seen = []

    def logits_of(images):
        seen.append((len(images), images.dtype, torch.is_grad_enabled()))
        return model(images).logits

    target = logits_of(pixels).argmax(-1)
    result = evaluate_maps(
        logits_of, pixels, scores.bfloat16(), target, one("hf_aha/pixel/blur/deletion"), normalization=IMAGENET,
        max_batch=8,
    )  # fmt: skip
    assert model.training and model.dtype == torch.bfloat16 and result.dtype == "bfloat16"
    assert {dtype for _, dtype, _ in seen} == {torch.bfloat16} and not any(grad for *_, grad in seen[1:])
    # Two clean, two reference, two times 19 perturbed images, never more than eight at once.
    assert sum(count for count, *_ in seen[1:]) == 42 and max(count for count, *_ in seen) == 8
    arrays = (result.values, result.curves, result.clean, result.reference, result.tie_fraction)
    assert all(array.dtype == np.float32 for array in arrays)


def test_logit_scores_are_those_of_the_scored_class():
    logits_of = linear()
    _, pixels, scores = batch(2)
    labels = torch.tensor([1, 3])
    protocol = one("rise/deletion", score="logit", class_source="label")
    result = evaluate_maps(logits_of, pixels, scores, labels * 0, protocol, normalization=IMAGENET, labels=labels)
    close(result.clean, logits_of(pixels)[[0, 1], labels])
    close(result.curves[:, -1], [0, 0])
    assert result.target.tolist() == [0, 0] and result.labels.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 8, 8)}, r"scores have shape \(2, 8, 8\), but these images need \(2, 16, 16\)"),
        ({"pixel_values": torch.zeros(2, 1, 16, 16)}, r"pixel_values has shape"),
        ({"target": torch.tensor([0])}, r"target has shape \(1,\)"),
        ({"target": torch.tensor([0.0, 1.0])}, "dtype torch.float32, but must be"),
        ({"target": torch.tensor([0, 9])}, r"target holds \[0, 9\], but the classifier has the classes 0 to 3"),
        ({"labels": torch.tensor([0, -2])}, r"labels holds \[0, -2\]"),
        ({"protocol": one("chefer/positive")}, "'chefer/positive' needs the ground truth: pass labels="),
        ({"protocol": one("mda/deletion")}, "'mda/deletion' needs the ground truth"),
        ({"protocol": get_protocol("rise")[0]}, r"make it for this size with get_protocol\('rise/deletion'"),
        (
            {"protocol": get_protocol("hf_aha/patch", patch_size=17)[0]},
            "cells of 17 x 17 pixels, which do not fit",
        ),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"image_ids": ["a", "a"]}, "image_ids must be 2 different names"),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    arguments = {
        "pixel_values": torch.zeros(2, 3, SIZE, SIZE),
        "scores": torch.zeros(2, SIZE, SIZE),
        "target": torch.tensor([0, 1]),
        "protocol": one("aha/deletion"),
        "normalization": IMAGENET,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        evaluate_maps(linear(), **arguments)


def test_cells_that_do_not_divide_the_image_are_smaller_at_the_border(make_classifier):
    logits_of = vit_logits(make_classifier)
    rgb, pixels, scores = batch(1)
    target = logits_of(pixels).argmax(-1)
    protocol = one("hf_aha/cell4/mean/deletion", unit=(6, 10), fractions=(0.0, 0.5, 1.0))
    result = evaluate_maps(logits_of, pixels, scores, target, protocol, normalization=IMAGENET)
    cells = [(slice(y, y + 6), slice(x, x + 10)) for y in (0, 6, 12) for x in (0, 10)]
    means = [float(scores[0][cell].mean()) for cell in cells]
    removed = rgb[0].clone()
    for index in sorted(range(6), key=lambda index: -means[index])[:3]:
        removed[(slice(None), *cells[index])] = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    close(result.curves[0, 1], probability(logits_of, IMAGENET.normalize(removed), target[0]))


def test_several_protocols_and_maps_share_what_they_can(make_classifier):
    model, seen = vit_logits(make_classifier), []

    def logits_of(pixels):
        seen.append(len(pixels))
        return model(pixels)

    _, pixels, scores = batch(2)
    images = MeasuredImages(logits_of, pixels, normalization=IMAGENET)
    assert sum(seen) == 2
    protocols = [one("mda/mas-deletion", image_filter=None), one("mda/deletion", image_filter=None)]
    together = images.measure(scores, images.predicted, protocols)
    assert sum(seen) == 2 + 2 + 2 * (SIZE - 1)  # clean, reference, and one perturbed pass a point for both protocols
    images.measure(-scores.abs() - 1, images.predicted, protocols[:1])
    assert sum(seen) == 2 + 2 + 4 * (SIZE - 1)  # the ends of another map are known
    for protocol, result in zip(protocols, together, strict=True):
        alone = evaluate_maps(model, pixels, scores, images.predicted, protocol, normalization=IMAGENET)
        assert result == alone


def test_an_unknown_label_drops_the_image_where_the_label_counts():
    logits_of = linear()
    _, pixels, scores = batch(2)
    labels = torch.tensor([1, -1])
    options = {"normalization": IMAGENET, "labels": labels, "image_ids": ["a", "b"]}
    target = logits_of(pixels).argmax(-1)
    result = evaluate_maps(logits_of, pixels, scores, target, one("chefer/positive"), **options)
    assert result.image_ids == ("a",) and result.dropped == (("b", "the label of the image is not known"),)
    assert len(evaluate_maps(logits_of, pixels, scores, target, one("aha/deletion"), **options)) == 2
