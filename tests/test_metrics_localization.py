"""Pointing game and shares against masks and boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_aha.metrics import boxes_to_masks, localization_shares


def half(batch=1, size=4):
    masks = torch.zeros(batch, size, size, dtype=torch.bool)
    masks[:, :, : size // 2] = True
    return masks


def test_equals_a_loop():
    scores, masks = torch.rand(5, 7, 9), torch.rand(5, 7, 9) < 0.3
    found = localization_shares(scores, masks)
    for row in range(5):
        values, inside = scores[row].numpy().ravel(), masks[row].numpy().ravel()
        order = np.argsort(-values)
        assert found.hit[row].item() == inside[order[0]]
        assert found.rank_share[row].item() == pytest.approx(inside[order[: inside.sum()]].mean())
        assert found.mass_share[row].item() == pytest.approx(values[inside].sum() / values.sum(), abs=1e-6)
        assert found.chance[row].item() == pytest.approx(inside.mean())
    assert not found.empty.any() and found.hit.dtype == torch.float32


def test_known_answers():
    masks = half(2)
    found = localization_shares(torch.stack([masks[0].float(), (~masks[0]).float()]), masks)
    for values in (found.hit, found.rank_share, found.mass_share):
        assert values.tolist() == [1.0, 0.0]


def test_ties_count_in_part_and_a_constant_map_is_at_chance():
    masks = half()
    masks[0, 0, 2] = True
    scores = torch.zeros(1, 4, 4)
    scores[0, 1, 1] = scores[0, 1, 2] = scores[0, 2, 3] = 5
    assert localization_shares(scores, masks).hit.item() == pytest.approx(1 / 3)
    constant = localization_shares(torch.full((1, 4, 4), 0.7), masks)
    for values in (constant.hit, constant.rank_share, constant.mass_share):
        assert values.item() == pytest.approx(9 / 16)


def test_rank_forms_do_not_change_under_increasing_transforms():
    scores, masks = torch.randn(3, 8, 8), torch.rand(3, 8, 8) < 0.4
    first, second = localization_shares(scores, masks), localization_shares(scores.double().exp() * 1e4, masks)
    assert torch.equal(first.hit, second.hit) and torch.equal(first.rank_share, second.rank_share)
    assert torch.isnan(first.mass_share).all() and torch.isfinite(second.mass_share).all()


def test_images_without_a_value_are_nan_and_counted():
    masks, scores = half(4), torch.rand(4, 4, 4)
    masks[0] = False
    scores[1, 0, 0] = torch.nan
    scores[2] = 0
    found = localization_shares(scores, masks)
    assert found.empty.tolist() == [True, False, False, False]
    assert torch.isnan(found.hit).tolist() == torch.isnan(found.rank_share).tolist() == [True, True, False, False]
    assert torch.isnan(found.mass_share).tolist() == [True, True, True, False]


def test_negative_maps_have_no_mass():
    assert torch.isnan(localization_shares(-torch.rand(1, 4, 4) - 1, half()).mass_share).all()


def test_boxes_cover_the_pixels_whose_centre_they_hold():
    boxes = [torch.tensor([[0.0, 0.0, 2.0, 1.0], [2.4, 1.6, 9.0, 9.0]]), torch.empty(0, 4)]
    masks = boxes_to_masks(boxes, (3, 4))
    assert masks[0].int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert not masks[1].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: localization_shares(torch.rand(1, 4, 4), half(2)), r"masks are torch.bool of shape \(2, 4, 4\)"),
        (lambda: localization_shares(torch.rand(1, 4, 4), half().float()), "masks bool"),
        (lambda: boxes_to_masks([torch.zeros(4)], (4, 4)), r"boxes of image 0 have shape \(4,\)"),
        (lambda: boxes_to_masks([torch.tensor([[2.0, 0.0, 1.0, 1.0]])], (4, 4)), "ends before it starts"),
        (lambda: boxes_to_masks([torch.full((1, 4), torch.nan)], (4, 4)), "not finite"),
    ],
)
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
