"""Hard deletion and insertion curves against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_aha.metrics.curves import FRACTIONS_21, Curves, deletion_insertion_curves
from hf_aha.perturbation import reference_image


def linear(height: int, width: int, classes: int = 3, scale: float = 0.4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weights = scale * torch.randn(classes, 3, height, width, generator=generator)
    return weights, lambda pixels: torch.einsum("bchw,kchw->bk", pixels, weights)


def loop_curves(logits_of, image, reference, scores, target, fractions, block):
    """Both curves of one image with numpy: sort blocks by mean score, paste, classify, one image at a time."""
    (rows, height), (columns, width) = ((size // side, side) for size, side in zip(scores.shape, block, strict=True))
    means = scores.double().numpy().reshape(rows, height, columns, width).mean((1, 3)).ravel()
    order = np.argsort(-means, kind="stable")
    deletion, insertion = [], []
    for fraction in fractions:
        chosen = np.zeros(rows * columns, bool)
        chosen[order[: round(fraction * rows * columns)]] = True
        mask = torch.from_numpy(np.kron(chosen.reshape(rows, columns), np.ones(block, bool)))
        for curve, shown in ((deletion, ~mask), (insertion, mask)):
            curve.append(float(logits_of(torch.where(shown, image, reference)[None]).softmax(-1)[0, target]))
    return deletion, insertion


def area(values, fractions):
    points = list(zip(fractions, values, strict=True))
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False))


@pytest.mark.parametrize(("cells", "block"), [(None, (1, 1)), ((4, 5), (3, 4)), ((1, 20), (12, 1))])
@pytest.mark.parametrize("kind", ["black", "mean", "blur", "noise"])
def test_curves_equal_a_plain_loop(cells, block, kind):
    _, logits_of = linear(12, 20)
    images = torch.rand(2, 3, 12, 20)
    reference = reference_image(images, kind, generator=torch.Generator().manual_seed(0))
    scores, target = torch.randn(2, 12, 20), torch.tensor([2, 0])
    fractions = (0.0, 0.03, 0.2, 0.55, 0.9, 1.0)
    curves = deletion_insertion_curves(
        logits_of, images, reference, scores, target, fractions=fractions, cells=cells, max_batch=3
    )
    for row in range(2):
        deletion, insertion = loop_curves(
            logits_of, images[row], reference[row], scores[row], target[row], fractions, block
        )
        assert curves.deletion[row].tolist() == pytest.approx(deletion, abs=1e-5)
        assert curves.insertion[row].tolist() == pytest.approx(insertion, abs=1e-5)
        assert curves.deletion_auc[row].item() == pytest.approx(area(deletion, fractions), abs=1e-5)
        assert curves.insertion_auc[row].item() == pytest.approx(area(insertion, fractions), abs=1e-5)


def test_areas_of_uneven_fractions_follow_the_trapezoid_rule():
    curves = Curves(torch.tensor([0.0, 0.5, 0.6, 1.0]), torch.tensor([[1.0, 0.0, 1.0, 1.0]]), torch.ones(1, 4))
    assert curves.deletion_auc.item() == pytest.approx(0.25 + 0.05 + 0.4)
    assert curves.insertion_auc.item() == pytest.approx(1.0)


def test_both_ends_are_the_clean_and_the_empty_image_and_cost_one_pass_each():
    _, logits_of = linear(8, 8)
    images, reference = torch.rand(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    seen = []

    def counting(pixels):
        seen.append(len(pixels))
        return logits_of(pixels)

    curves = deletion_insertion_curves(counting, images, reference, torch.rand(1, 8, 8), torch.tensor([1]))
    assert curves.fractions.tolist() == pytest.approx(list(FRACTIONS_21))
    clean, empty = (logits_of(x).softmax(-1)[0, 1].item() for x in (images, reference))
    assert curves.deletion[0, 0] == curves.insertion[0, -1] == pytest.approx(clean)
    assert curves.deletion[0, -1] == curves.insertion[0, 0] == pytest.approx(empty)
    assert sum(seen) == 40


def test_only_the_order_of_the_scores_matters():
    _, logits_of = linear(8, 10)
    images, scores, target = torch.rand(2, 3, 8, 10), torch.randn(2, 8, 10), torch.tensor([0, 1])
    plain, stretched = (
        deletion_insertion_curves(logits_of, images, torch.zeros_like(images), s, target)
        for s in (scores, 1e6 * torch.exp(3 * scores))
    )
    assert torch.equal(plain.deletion, stretched.deletion)
    assert torch.equal(plain.insertion, stretched.insertion)


def test_the_true_contributions_of_a_linear_model_beat_random_maps():
    weights, logits_of = linear(8, 8, classes=2, scale=0.2)
    image, reference = torch.rand(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)
    best = ((weights[1] - weights[0]) * (image[0] - reference[0])).sum(0)[None]
    maps = torch.cat([best, -best, torch.randn(50, 8, 8)])
    curves = deletion_insertion_curves(
        logits_of,
        image.expand(52, -1, -1, -1),
        reference.expand(52, -1, -1, -1),
        maps,
        torch.ones(52, dtype=torch.int64),
    )
    assert curves.deletion_auc.argmin() == 0 and curves.insertion_auc.argmax() == 0
    assert curves.deletion_auc.argmax() == 1 and curves.insertion_auc.argmin() == 1
    # No other order is better at any single point.
    assert (curves.deletion[0] <= curves.deletion + 1e-5).all()


def test_a_constant_map_goes_by_index():
    _, logits_of = linear(6, 6)
    images, target = torch.rand(1, 3, 6, 6), torch.tensor([1])
    falling = -torch.arange(36.0).view(1, 6, 6)
    constant, ordered = (
        deletion_insertion_curves(logits_of, images, torch.zeros_like(images), scores, target)
        for scores in (torch.zeros(1, 6, 6), falling)
    )
    assert torch.equal(constant.deletion, ordered.deletion)


def test_no_graph_is_kept():
    weights, logits_of = linear(6, 6)
    weights.requires_grad_()
    scores = torch.rand(1, 6, 6, requires_grad=True)
    curves = deletion_insertion_curves(
        logits_of, torch.rand(1, 3, 6, 6), torch.zeros(1, 3, 6, 6), scores, torch.tensor([0])
    )
    assert not curves.deletion.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(1, 6, 5)}, r"scores have shape \(1, 6, 5\), but images of shape \(1, 3, 6, 6\) need"),
        ({"scores": torch.full((1, 6, 6), float("nan"))}, "NaN or infinite"),
        ({"reference": torch.zeros(3, 6, 6)}, r"reference has shape \(3, 6, 6\)"),
        ({"target": torch.tensor(1)}, r"target \(\), but"),
        ({"fractions": (0.0, 0.5)}, "fractions must ascend from 0 to 1"),
        ({"fractions": (0.0, 0.7, 0.3, 1.0)}, "fractions must ascend from 0 to 1"),
        ({"fractions": ()}, "fractions must ascend from 0 to 1"),
        ({"fractions": (0.0, 1.0)}, "with at least one between"),
    ],
)
def test_unusable_arguments_are_refused(change, message):
    _, logits_of = linear(6, 6)
    arguments = {
        "pixel_values": torch.rand(1, 3, 6, 6),
        "reference": torch.zeros(1, 3, 6, 6),
        "scores": torch.rand(1, 6, 6),
        "target": torch.tensor([0]),
    }
    with pytest.raises(ValueError, match=message):
        deletion_insertion_curves(logits_of, **{**arguments, **change})
