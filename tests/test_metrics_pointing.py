"""The grid pointing game: groups, mosaics and values."""

from __future__ import annotations

import pytest
import torch

from hf_aha.metrics import choose_groups, grid_pointing_shares, make_mosaics


def colours(count, size=8):
    """Photograph i shows the value i everywhere and is of class i."""
    values = torch.arange(count).float()
    return values.view(-1, 1, 1, 1).expand(-1, 3, size, size).clone(), torch.arange(count)


def knows_the_class(pixel_values, target):
    return (pixel_values[:, 0] == target.view(-1, 1, 1)).float()


def test_groups_hold_distinct_classes_of_confident_photographs_once():
    predicted = torch.tensor([0, 0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 1])
    probability = torch.full((12,), 0.95)
    probability[4] = 0.5
    target = predicted.clone()
    target[5] = 9
    groups = choose_groups(predicted, probability, target, seed=1)
    used = groups.flatten().tolist()
    assert groups.shape == (2, 4) and len(set(used)) == 8
    assert not {4, 5} & set(used)
    for group in groups:
        assert len(set(predicted[group].tolist())) == 4
    assert torch.equal(groups, choose_groups(predicted, probability, target, seed=1))
    assert not torch.equal(groups, choose_groups(predicted, probability, target, seed=2))


def test_as_many_groups_as_the_classes_allow():
    # Two mosaics need class 0 in both; taking any four classes first could leave three of class 0.
    predicted = torch.tensor([0, 0, 1, 1, 2, 3, 4, 5])
    for seed in range(20):
        assert len(choose_groups(predicted, torch.ones(8), seed=seed)) == 2
    assert choose_groups(torch.tensor([0, 1, 2, 2, 2]), torch.ones(5)).shape == (0, 4)
    assert choose_groups(torch.arange(9), torch.ones(9), grid=3).shape == (1, 9)


def test_mosaics_lay_cells_out_in_row_order():
    pixels, _ = colours(5)
    shrunk = make_mosaics(pixels, torch.tensor([[4, 1, 2, 3]]))
    expected = torch.tensor([[4.0, 1.0], [2.0, 3.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert shrunk.shape == (1, 3, 8, 8) and torch.equal(shrunk[0, 0], expected)
    photographs = torch.rand(4, 3, 6, 10)
    large = make_mosaics(photographs, torch.tensor([[2, 0, 1, 3]]), layout="enlarge")
    assert large.shape == (1, 3, 12, 20)
    assert torch.equal(large[0, :, 6:, :10], photographs[1]) and torch.equal(large[0, :, :6, 10:], photographs[0])


def test_shrunk_cells_are_smoothed_photographs():
    photograph = torch.rand(1, 3, 8, 8)
    cell = make_mosaics(photograph, torch.zeros(1, 4, dtype=torch.int64))[0, :, :4, :4]
    expected = torch.nn.functional.interpolate(photograph, (4, 4), mode="bilinear", antialias=True)[0]
    assert torch.equal(cell, expected)


@pytest.mark.parametrize("layout", ["shrink", "enlarge"])
def test_known_answers(layout):
    pixels, target = colours(8)
    groups = choose_groups(target, torch.ones(8))
    options = {"layout": layout, "batch_size": 3}
    good = grid_pointing_shares(knows_the_class, pixels, target, groups, **options)
    assert good.rank_share.shape == (2, 4) and (good.rank_share == 1).all() and (good.mass_share == 1).all()
    bad = grid_pointing_shares(lambda p, t: 1 - knows_the_class(p, t), pixels, target, groups, **options)
    assert (bad.rank_share == 0).all() and (bad.mass_share == 0).all()
    constant = grid_pointing_shares(lambda p, t: torch.ones_like(p[:, 0]), pixels, target, groups, **options)
    assert (constant.rank_share == 0.25).all() and constant.chance == 0.25


def test_maps_that_do_not_know_the_class_are_at_chance_on_average():
    pixels, target = torch.randn(8, 3, 8, 8), torch.arange(8)
    groups = choose_groups(target, torch.ones(8))
    found = grid_pointing_shares(lambda p, t: p.sum(1), pixels, target, groups)
    # The shares of the four cells of one map add up to all of its top pixels.
    assert torch.allclose(found.rank_share.sum(1), torch.ones(2))
    assert torch.isnan(found.mass_share).all()


def test_rank_form_does_not_change_under_increasing_transforms():
    pixels, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    groups = torch.tensor([[0, 1, 2, 3]])
    first, second = (
        grid_pointing_shares(lambda p, t, form=form: form(p.sum(1) * (t + 1).view(-1, 1, 1)), pixels, target, groups)
        for form in (lambda x: x, lambda x: x.double().exp())
    )
    assert torch.equal(first.rank_share, second.rank_share) and torch.isfinite(second.mass_share).all()


def test_values_go_back_to_their_photographs():
    pixels, target = colours(6)
    groups = torch.tensor([[5, 2, 0, 3]])
    found = grid_pointing_shares(knows_the_class, pixels, target, groups)
    values = found.per_image(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), 6)
    assert values[[5, 2, 0, 3]].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert torch.isnan(values[[1, 4]]).all()


def test_no_group_and_maps_that_are_not_finite():
    pixels, target = colours(4)
    none = grid_pointing_shares(knows_the_class, pixels, target, torch.empty(0, 4, dtype=torch.int64))
    assert none.rank_share.shape == (0, 4) and torch.isnan(none.per_image(none.rank_share, 4)).all()

    def broken(pixel_values, classes):
        return torch.where((classes == 2).view(-1, 1, 1), torch.nan, knows_the_class(pixel_values, classes))

    found = grid_pointing_shares(broken, pixels, target, torch.tensor([[0, 1, 2, 3]]))
    assert torch.isnan(found.rank_share).tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, t: grid_pointing_shares(knows_the_class, p, t * 0, torch.tensor([[0, 1, 2, 3]])), "must differ"),
        (lambda p, t: make_mosaics(p, torch.tensor([[0, 1, 2]])), r"must be \(mosaics, 4\) indices of 5"),
        (lambda p, t: make_mosaics(p, torch.tensor([[0, 1, 2, 5]])), "indices of 5 photographs"),
        (lambda p, t: make_mosaics(p[..., :7], torch.tensor([[0, 1, 2, 3]])), "8 x 7 pixels cannot be cut into 2 x 2"),
        (lambda p, t: make_mosaics(p, torch.tensor([[0, 1, 2, 3]]), layout="crop"), "must be one of 'shrink'"),
        (lambda p, t: choose_groups(t, torch.ones(3)), r"probability \(3,\)"),
        (lambda p, t: choose_groups(t, torch.ones(5), grid=1), "at least 2 cells"),
        (lambda p, t: grid_pointing_shares(lambda a, b: a, p, t, torch.tensor([[0, 1, 2, 3]])), "scores have shape"),
    ],
)
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*colours(5))
