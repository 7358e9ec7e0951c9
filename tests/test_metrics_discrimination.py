"""Class discrimination against a loop, with methods and classifiers whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from hf_aha.metrics import class_discrimination, runner_up
from hf_aha.perturbation import Normalization, reference_image


NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))
UNIT = Normalization((0.0,) * 3, (1.0,) * 3)
A, B = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0])


def linear(classes=3, size=8):
    weights = torch.randn(classes, 3, size, size)
    logits_of = lambda pixels: torch.einsum("bchw,kchw->bk", pixels.float(), weights)  # noqa: E731
    explain = lambda pixels, target: (weights[target] * pixels).sum(1)  # noqa: E731
    return logits_of, explain


def test_equals_a_loop():
    logits_of, explain = linear()
    rgb = torch.rand(3, 3, 8, 8)
    pixels = NORMALIZATION.normalize(rgb)
    shares = (0.25, 0.6)
    found = class_discrimination(
        explain, logits_of, pixels, A, B, NORMALIZATION, fractions=shares, top_fraction=0.2, batch_size=3
    )
    blank = NORMALIZATION.normalize(reference_image(rgb, "blur"))
    for row in range(3):
        maps = [explain(pixels[row : row + 1], classes[row : row + 1])[0] for classes in (A, B)]
        orders = [np.argsort(-scores.double().numpy().ravel(), kind="stable") for scores in maps]

        def margin(image, row=row):
            log = logits_of(image[None]).log_softmax(1)[0]
            return float(log[A[row]] - log[B[row]])

        means = []
        for order in orders:
            values = []
            for share in shares:
                made = pixels[row].clone().flatten(1)
                chosen = torch.from_numpy(order[: round(share * 64)].copy())
                made[:, chosen] = blank[row].flatten(1)[:, chosen]
                values.append(margin(made.view(3, 8, 8)))
            means.append(np.mean(values))
        clean = margin(pixels[row])
        assert found.margin[row].item() == pytest.approx(clean, abs=1e-3)
        assert found.own_effect[row].item() == pytest.approx(clean - means[0], abs=1e-3)
        assert found.contrast[row].item() == pytest.approx((means[1] - means[0]) / 2, abs=1e-3)
        expected = spearmanr(maps[0].flatten(), maps[1].flatten()).statistic
        assert found.rank_correlation[row].item() == pytest.approx(expected, abs=1e-5)
        top = [set(order[: round(0.2 * 64)]) for order in orders]
        assert found.top_overlap[row].item() == pytest.approx(len(top[0] & top[1]) / len(top[0]), abs=1e-6)


def test_known_answer_of_two_regions():
    """Class 0 sees the brightness of the left half, class 1 that of the right."""
    logits_of = lambda pixels: torch.stack([pixels[..., :4].mean((1, 2, 3)), pixels[..., 4:].mean((1, 2, 3))], 1)  # noqa: E731
    left = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], 2)
    sees = lambda pixels, target: torch.where((target == 0).view(-1, 1, 1), left, 1 - left)  # noqa: E731
    image = torch.ones(2, 3, 8, 8)
    options = {"fractions": (0.5,), "top_fraction": 0.5, "reference": "black"}
    found = class_discrimination(sees, logits_of, image, torch.tensor([0, 1]), torch.tensor([1, 0]), UNIT, **options)
    assert found.contrast.tolist() == found.own_effect.tolist() == [1.0, 1.0]
    assert found.rank_correlation.tolist() == [-1.0, -1.0] and found.top_overlap.tolist() == [0.0, 0.0]
    wrong = lambda pixels, target: sees(pixels, 1 - target)  # noqa: E731
    worse = class_discrimination(wrong, logits_of, image, torch.tensor([0, 1]), torch.tensor([1, 0]), UNIT, **options)
    assert worse.contrast.tolist() == [-1.0, -1.0]


def test_a_map_that_does_not_depend_on_the_class_has_no_contrast():
    logits_of, _ = linear()
    pixels = torch.randn(3, 3, 8, 8)
    found = class_discrimination(lambda p, t: p.sum(1), logits_of, pixels, A, B, NORMALIZATION)
    assert (found.contrast == 0).all() and (found.rank_correlation == 1).all() and (found.top_overlap == 1).all()


def test_only_the_order_of_scores_counts_and_batches_change_nothing():
    logits_of, explain = linear()
    pixels = torch.randn(3, 3, 8, 8)
    for reference in ("blur", "noise"):
        options = {"reference": reference, "seed": 3}
        first = class_discrimination(explain, logits_of, pixels, A, B, NORMALIZATION, **options)
        steep = class_discrimination(
            lambda p, t: explain(p, t).double().exp(),
            logits_of,
            pixels,
            A,
            B,
            NORMALIZATION,
            scores=explain(pixels, A) * 7 + 1,
            batch_size=1,
            **options,
        )
        alone = class_discrimination(explain, logits_of, pixels[1:2], A[1:2], B[1:2], NORMALIZATION, **options)
        for name in ("contrast", "own_effect", "rank_correlation", "top_overlap"):
            assert torch.allclose(getattr(first, name), getattr(steep, name), atol=1e-3)
            assert torch.allclose(getattr(first, name)[1:2], getattr(alone, name), atol=1e-3)


def test_rows_that_are_not_finite_have_no_value():
    logits_of, explain = linear()
    pixels = torch.randn(3, 3, 8, 8)

    def broken(pixel_values, target):
        scores = explain(pixel_values, target)
        scores[(target == 2), 0, 0] = torch.nan
        return scores

    pixels[1, 0, 0, 0] = torch.inf
    found = class_discrimination(broken, logits_of, pixels, A, B, NORMALIZATION)
    for name in ("contrast", "own_effect", "rank_correlation", "top_overlap", "margin"):
        assert torch.isnan(getattr(found, name)).tolist() == [False, True, True]


def test_runner_up_is_the_best_other_class():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert runner_up(logits, torch.tensor([0, 2])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="one class only"):
        runner_up(torch.ones(1, 1), torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_b": torch.tensor([1, 1, 0])}, "class_a and class_b of image 1 are both 1"),
        ({"class_b": torch.tensor([1, 0, 9])}, "class 9, but the classifier has the classes 0 to 2"),
        ({"fractions": (0.5, 1.0)}, "must lie within 0..1"),
        ({"fractions": ()}, "must lie within 0..1"),
        ({"reference": "grey"}, "Unknown reference 'grey'"),
        ({"scores": torch.zeros(3, 4, 4)}, "scores have shape"),
    ],
)
def test_refuses_bad_input(change, message):
    logits_of, explain = linear()
    arguments = {"class_a": A, "class_b": B, "normalization": NORMALIZATION, **change}
    with pytest.raises(ValueError, match=message):
        class_discrimination(explain, logits_of, torch.randn(3, 3, 8, 8), **arguments)
