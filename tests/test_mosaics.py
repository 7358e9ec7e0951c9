"""Mosaics of training images: halves of two, quarters of four."""

from __future__ import annotations

import pytest
import torch

from hf_aha.metrics import make_mosaics
from hf_aha.mosaics import MOSAICS, paste


def pixels(*given):
    return paste(*given).pixel_values


def test_mosaic_keeps_one_side_and_takes_the_other_from_the_neighbour():
    images = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 20, 24).clone()
    before = images.clone()
    mixed = pixels(images, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    axes = set()
    for row, neighbour in enumerate([1, 0, 3, 2, 5, 4, 5]):
        assert set(mixed[row].round().unique().tolist()) == {float(row), float(neighbour)}
        assert mixed[row, :, -1, -1].eq(row).all(), "the lower or right side stays"
        by_row, by_column = mixed[row, 0, :, -1].eq(neighbour), mixed[row, 0, -1].eq(neighbour)
        taken = by_row.float().mean() if by_row.any() else by_column.float().mean()
        assert 0.25 < taken < 0.75
        axes.add(bool(by_row.any()))
    assert axes == {True, False}


def test_mosaic_changes_the_asked_share_only():
    images = torch.arange(200.0).view(200, 1, 1, 1).expand(200, 3, 4, 4)
    mixed = pixels(images, 0.25, torch.Generator().manual_seed(1))
    changed = (mixed != images).flatten(1).any(1).float().mean()
    assert 0.15 < changed < 0.35
    assert torch.equal(pixels(images, 0.0, torch.Generator()), images)
    assert torch.equal(pixels(images[:1], 1.0, torch.Generator()), images[:1])


@pytest.mark.parametrize("layout", MOSAICS)
def test_a_mosaic_does_not_depend_on_how_the_batch_is_cut_between_neighbours(layout):
    images, step = torch.rand(8, 3, 12, 12), MOSAICS[layout]
    generators = [[torch.Generator().manual_seed(row) for row in range(8)] for _ in range(2)]
    whole = pixels(images, 0.7, generators[0], layout)
    cuts = [slice(start, start + step) for start in range(0, 8, step)]
    parts = [pixels(images[cut], 0.7, generators[1][cut], layout) for cut in cuts]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, images)


def test_quarters_are_the_mosaics_of_the_pointing_game():
    images = torch.rand(8, 3, 16, 24)
    mixed = pixels(images, 1.0, torch.Generator().manual_seed(0), "quarters")
    cells = set()
    for row in range(8):
        block = range(row - row % 4, row - row % 4 + 4)
        tiles = {k: make_mosaics(images, torch.tensor([[k] * 4]))[0, :, :8, :12] for k in block}
        shown = [mixed[row, :, top : top + 8, left : left + 12] for top in (0, 8) for left in (0, 12)]
        found = [next(k for k, tile in tiles.items() if torch.allclose(tile, cell, atol=1e-6)) for cell in shown]
        assert sorted(found) == list(block), "each photograph once"
        cells.add(found.index(row))
    assert len(cells) > 2, "the image itself stands in any cell"


@pytest.mark.parametrize("layout", MOSAICS)
def test_the_source_says_where_each_pixel_comes_from(layout):
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 14, 18)
    found = paste(images, 0.6, torch.Generator().manual_seed(3), layout)
    assert found.source.shape == (8, 14, 18) and found.source.dtype == torch.int64
    assert torch.equal(found.source, found.pixel_values.round()[:, 0].long())
    assert torch.equal(paste(images, 0.0, None, layout).source, images[:, 0].long())
    assert any(len(each.unique()) == MOSAICS[layout] for each in found.source)


def test_quarters_of_an_odd_size_and_of_few_photographs_keep_the_size():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 15, 9)
    mixed = pixels(images, 1.0, torch.Generator().manual_seed(0), "quarters")
    assert mixed.shape == images.shape
    assert all(set(mixed[row].round().unique().tolist()) == {0.0, 1.0, 2.0, 3.0} for row in range(4))
    assert all(set(mixed[row].round().unique().tolist()) == {4.0, 5.0} for row in (4, 5)), "only two are left"


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout is 'thirds', but must be one of 'halves', 'quarters'"):
        pixels(torch.zeros(2, 3, 4, 4), 0.5, torch.Generator(), "thirds")
