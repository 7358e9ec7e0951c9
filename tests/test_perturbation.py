"""References, cells, deletion and insertion images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from hf_aha.perturbation import (
    REFERENCES,
    Normalization,
    deletion_images,
    gaussian_blur,
    insertion_images,
    pool_to_cells,
    random_references,
    reference_image,
    spread_cells,
)


@pytest.fixture
def rgb() -> torch.Tensor:
    return torch.rand(3, 3, 20, 26)


def scipy_blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    # Torch's "reflect" does not repeat the border pixel, which scipy calls "mirror".
    blurred = ndimage.gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=3)
    return torch.from_numpy(blurred).float()


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.2, 6.0])
def test_blur_is_a_gaussian_cut_at_three_sigma(rgb, sigma):
    assert torch.allclose(gaussian_blur(rgb, sigma), scipy_blur(rgb, sigma), atol=1e-5)


def test_blur_of_sigma_zero_or_of_one_pixel_changes_nothing(rgb):
    assert gaussian_blur(rgb, 0.0) is rgb
    assert torch.equal(gaussian_blur(rgb[..., :1, :1], 2.0), rgb[..., :1, :1])


def test_blur_wider_than_the_image_stays_an_average(rgb):
    blurred = gaussian_blur(rgb, 50.0)
    assert blurred.std(dim=(-2, -1)).max() < 0.1
    assert 0 <= blurred.min() and blurred.max() <= 1


def test_blur_reference_measures_sigma_in_shares_of_the_shorter_side(rgb):
    assert torch.allclose(reference_image(rgb, "blur", blur_sigma=0.1), scipy_blur(rgb, 2.0), atol=1e-5)


def test_black_and_mean_are_colours_of_rgb(rgb):
    assert torch.equal(reference_image(rgb, "black"), torch.zeros_like(rgb))
    mean = reference_image(rgb, "mean")
    assert mean.shape == rgb.shape
    assert torch.equal(mean[1, :, 7, 9], torch.tensor([0.485, 0.456, 0.406]))
    assert mean.flatten(2).std(-1).max() < 1e-6
    assert reference_image(rgb, "mean", mean_rgb=(0.1, 0.2, 0.3))[0, 2, 0, 0] == torch.tensor(0.3)


def test_noise_is_uniform_and_comes_from_the_generator_alone(rgb):
    big = torch.zeros(1, 3, 100, 100)
    noise = reference_image(big, "noise", generator=torch.Generator().manual_seed(3))
    torch.rand(5)
    assert torch.equal(noise, reference_image(big, "noise", generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(noise, reference_image(big, "noise", generator=torch.Generator().manual_seed(4)))
    assert 0 <= noise.min() and noise.max() <= 1
    assert abs(noise.mean() - 0.5) < 0.01 and abs(noise.var() - 1 / 12) < 0.005
    assert abs(np.corrcoef(noise[0].flatten(1).numpy())[0, 1]) < 0.05, "channels are independent"


def test_an_unknown_reference_is_refused_with_the_known_ones(rgb):
    with pytest.raises(ValueError, match="Unknown reference 'grey'; choose among black, mean, blur, noise."):
        reference_image(rgb, "grey")


@pytest.mark.parametrize("kind", REFERENCES)
def test_references_keep_dtype_and_range(rgb, kind):
    reference = reference_image(rgb.double(), kind, generator=torch.Generator())
    assert reference.dtype == torch.float64
    assert 0 <= reference.min() and reference.max() <= 1


def test_random_references_draw_a_kind_for_every_image():
    rgb = torch.rand(60, 3, 8, 8) * 0.5 + 0.2
    references = random_references(rgb, ("black", "mean", "blur"), torch.Generator().manual_seed(0), blur_sigma=0.2)
    counts = {"black": 0, "mean": 0, "blur": 0}
    for row in range(60):
        matching = [
            kind
            for kind in counts
            if torch.allclose(references[row], reference_image(rgb[row : row + 1], kind, blur_sigma=0.2)[0], atol=1e-6)
        ]
        assert len(matching) == 1
        counts[matching[0]] += 1
    assert min(counts.values()) > 8
    again = random_references(rgb, ("black", "mean", "blur"), torch.Generator().manual_seed(0), blur_sigma=0.2)
    assert torch.equal(references, again)


def test_normalization_is_the_processors_map_and_its_inverse(rgb):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    norm = Normalization(mean, std)
    by_hand = torch.stack([(rgb[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.allclose(norm.normalize(rgb), by_hand, atol=1e-6)
    assert torch.allclose(norm.denormalize(norm.normalize(rgb)), rgb, atol=1e-6)
    assert norm.normalize(rgb[:, None]).shape == (3, 1, 3, 20, 26)


def test_deletion_of_a_mask_is_insertion_of_the_rest(rgb):
    reference, masks = torch.rand_like(rgb), torch.rand(3, 4, 20, 26)
    deleted = deletion_images(rgb, reference, masks)
    assert deleted.shape == (3, 4, 3, 20, 26)
    assert torch.allclose(deleted, insertion_images(rgb, reference, 1 - masks), atol=1e-6)
    expected = rgb[2] * (1 - masks[2, 1]) + reference[2] * masks[2, 1]
    assert torch.allclose(deleted[2, 1], expected, atol=1e-6)


def test_hard_masks_copy_pixels_exactly(rgb):
    reference = torch.rand_like(rgb)
    mask = (torch.rand(3, 1, 20, 26) > 0.5).float()
    deleted = deletion_images(rgb, reference, mask)[:, 0]
    inserted = insertion_images(rgb, reference, mask)[:, 0]
    taken = mask.bool().expand(-1, 3, -1, -1)
    assert torch.equal(deleted, torch.where(taken, reference, rgb))
    assert torch.equal(inserted, torch.where(taken, rgb, reference))


def test_cells_are_means_and_spread_back_over_their_pixels():
    scores = torch.rand(2, 12, 20)
    cells = pool_to_cells(scores, (3, 5))
    assert torch.allclose(cells, scores.view(2, 3, 4, 5, 4).mean(dim=(2, 4)), atol=1e-6)
    spread = spread_cells(cells[:, None], (12, 20))
    assert torch.equal(spread[:, 0], cells.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert torch.allclose(pool_to_cells(spread[:, 0], (3, 5)), cells, atol=1e-6)


@pytest.mark.parametrize("cells", [(7, 7), (5, 9), (1, 1), (22, 31)])
def test_cells_of_sizes_that_do_not_divide_cover_every_pixel_evenly(cells):
    pooled = pool_to_cells(torch.rand(2, 22, 31), cells)
    assert pooled.shape == (2, *cells)
    numbered = torch.arange(cells[0] * cells[1]).float().view(1, 1, *cells)
    spread = spread_cells(numbered, (22, 31))[0, 0]
    assert spread.shape == (22, 31)
    # Every cell is one rectangle whose sides differ by at most a pixel from the others'.
    heights = torch.unique(spread[:, 0], return_counts=True)[1]
    widths = torch.unique(spread[0], return_counts=True)[1]
    assert len(heights) == cells[0] and len(widths) == cells[1]
    assert heights.max() - heights.min() <= 1 and widths.max() - widths.min() <= 1
    assert torch.equal(spread, spread[:, :1] + spread[:1])
    # The grid is centred: turning it by half a turn turns the picture.
    assert torch.equal(spread_cells(numbered.flip(-1, -2), (22, 31))[0, 0], spread.flip(-1, -2))
