"""Max sensitivity against a loop, with methods whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from hf_aha.metrics import max_sensitivity
from hf_aha.perturbation import Normalization


NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def curvy(pixel_values, target):
    return (3 * pixel_values[:, 0]).sin() + pixel_values[:, 1] * pixel_values[:, 2] + target.view(-1, 1, 1)


def batch(count=3):
    return torch.randn(count, 3, 6, 7), torch.arange(count)


def relative(first, second):
    return np.linalg.norm(second - first) / np.linalg.norm(first)


def test_equals_a_loop():
    pixels, target = batch()
    found = max_sensitivity(curvy, pixels, target, NORMALIZATION, radius=0.1, samples=4, seed=2, batch_size=2)
    generator = torch.Generator().manual_seed(2)
    draws = [(2 * torch.rand(3, 6, 7, generator=generator) - 1) * 0.1 for _ in range(4)]
    std = torch.tensor(NORMALIZATION.std).view(3, 1, 1)
    for row in range(3):
        values = {"raw": [], "standardized": [], "rank": []}
        image, classes = pixels[row : row + 1], target[row : row + 1]
        first = curvy(image, classes)[0].double().numpy().ravel()
        for draw in draws:
            second = curvy(image + draw / std, classes)[0].double().numpy().ravel()
            values["raw"].append(relative(first, second))
            standard = [(scores - scores.mean()) / scores.std() for scores in (first, second)]
            values["standardized"].append(relative(*standard))
            ranks = [rankdata(scores) for scores in (first, second)]
            values["rank"].append(relative(*(rank - rank.mean() for rank in ranks)))
        for name, each in values.items():
            assert getattr(found, name)[row].item() == pytest.approx(max(each), rel=1e-4), name
    assert found.rank.dtype == torch.float32 and (found.rank > 0).all() and (found.rank <= 2).all()


def test_the_radius_is_in_rgb_units():
    """The pixels a method sees move by up to radius / std in each channel, and reach nearly that far."""
    moved = []

    def explain(pixel_values, target):
        moved.append(pixel_values)
        return pixel_values[:, 0]

    pixels = torch.zeros(1, 3, 32, 32)
    max_sensitivity(explain, pixels, torch.tensor([0]), NORMALIZATION, radius=0.02, samples=3)
    largest = torch.cat(moved[1:]).abs().amax((0, 2, 3))
    limit = 0.02 / torch.tensor(NORMALIZATION.std)
    assert (largest <= limit).all() and (largest > 0.98 * limit).all()


def test_forms_are_functions_of_a_correlation():
    pixels, target = batch(1)
    found = max_sensitivity(curvy, pixels, target, NORMALIZATION, radius=0.3, samples=1)
    noise = (2 * torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(0)) - 1) * 0.3
    second = curvy(pixels + noise / torch.tensor(NORMALIZATION.std).view(3, 1, 1), target)
    rho = spearmanr(curvy(pixels, target).flatten(), second.flatten()).statistic
    assert found.rank.item() == pytest.approx((2 - 2 * rho) ** 0.5, abs=1e-5)


def test_rank_form_does_not_change_under_increasing_transforms():
    pixels, target = batch()
    plain = max_sensitivity(curvy, pixels, target, NORMALIZATION)
    steep = max_sensitivity(lambda p, t: curvy(p, t).double().exp() + 50, pixels, target, NORMALIZATION)
    assert torch.allclose(plain.rank, steep.rank) and not torch.allclose(plain.raw, steep.raw)
    shifted = max_sensitivity(lambda p, t: 5 * curvy(p, t) - 2, pixels, target, NORMALIZATION)
    assert torch.allclose(plain.standardized, shifted.standardized, atol=1e-3)


def test_a_fixed_map_does_not_move_and_a_reversed_one_moves_by_two():
    pixels, target = batch()
    fixed = torch.randn(6, 7)
    still = max_sensitivity(lambda p, t: fixed.expand(len(p), 6, 7), pixels, target, NORMALIZATION)
    assert (still.rank == 0).all() and (still.raw == 0).all() and not still.higher_is_better
    away = max_sensitivity(
        lambda p, t: -fixed.expand(len(p), 6, 7), pixels, target, NORMALIZATION, scores=fixed.expand(3, 6, 7)
    )
    for values in (away.rank, away.standardized, away.raw):
        assert values.tolist() == pytest.approx([2.0] * 3)


def test_values_do_not_depend_on_the_batch_but_on_the_seed():
    pixels, target = batch()
    whole = max_sensitivity(curvy, pixels, target, NORMALIZATION, seed=1)
    alone = max_sensitivity(curvy, pixels[2:], target[2:], NORMALIZATION, seed=1)
    assert torch.allclose(whole.rank[2:], alone.rank)
    assert not torch.allclose(whole.rank, max_sensitivity(curvy, pixels, target, NORMALIZATION, seed=2).rank)


def test_gradient_methods_find_gradients_on():
    pixels, target = batch()

    def explain(pixel_values, classes):
        pixel_values = pixel_values.clone().requires_grad_()
        return torch.autograd.grad(pixel_values.pow(3).sum(), pixel_values)[0].sum(1)

    assert torch.isfinite(max_sensitivity(explain, pixels, target, NORMALIZATION).rank).all()


def test_constant_and_broken_maps_have_no_value():
    pixels, target = batch(4)

    def explain(pixel_values, classes):
        scores = curvy(pixel_values, classes)
        scores[classes == 0] = 3.0
        scores[classes == 1] = 0.0
        moved = (pixel_values != pixels[classes]).flatten(1).any(1)
        scores[(classes == 2) & moved, 0, 0] = torch.inf
        return scores

    found = max_sensitivity(explain, pixels, target, NORMALIZATION)
    assert torch.isnan(found.rank).tolist() == [True, True, True, False]
    assert torch.isnan(found.standardized).tolist() == [True, True, True, False]
    assert torch.isnan(found.raw).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 0.0}, "radius is 0.0"),
        ({"samples": 0}, "samples 0"),
        ({"scores": torch.zeros(3, 7, 6)}, r"need \(3, 6, 7\)"),
    ],
)
def test_refuses_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        max_sensitivity(curvy, *batch(), NORMALIZATION, **change)
