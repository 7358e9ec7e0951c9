"""Total variation and edge alignment of rank maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from hf_aha.metrics import edge_alignment, total_variation
from hf_aha.perturbation import Normalization, gaussian_blur


NORMALIZATION = Normalization((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))


def test_total_variation_equals_a_loop():
    scores = torch.randint(0, 20, (2, 5, 7)).float()
    for row in range(2):
        ranks = rankdata(scores[row].numpy().ravel()).reshape(5, 7)
        steps = [abs(ranks[y, x] - ranks[y, x + 1]) for y in range(5) for x in range(6)]
        steps += [abs(ranks[y, x] - ranks[y + 1, x]) for y in range(4) for x in range(7)]
        # A random order is a permutation of 1..n, whose members lie (n + 1) / 3 apart on average.
        assert total_variation(scores)[row].item() == pytest.approx(np.mean(steps) / (36 / 3), rel=1e-5)


def test_total_variation_of_known_maps():
    noise = torch.randn(1, 64, 64)
    assert total_variation(noise).item() == pytest.approx(1, abs=0.03)
    smooth = gaussian_blur(noise[None], 6)[0]
    assert total_variation(smooth).item() < 0.15
    chess = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float()[None]
    assert total_variation(chess + 1e-3 * noise).item() == pytest.approx(1.5, abs=0.01)
    mixed = total_variation(torch.cat([noise, smooth, torch.zeros_like(noise)]))
    assert torch.isnan(mixed).tolist() == [False, False, True] and mixed.dtype == torch.float32


def test_edges_of_the_image_attract_an_aligned_map():
    rgb = torch.zeros(1, 3, 60, 60)
    rgb[..., 20:40, 20:40] = 1
    pixels = NORMALIZATION.normalize(rgb)
    aligned, apart = torch.zeros(1, 60, 60), torch.zeros(1, 60, 60)
    aligned[:, 20:40, 20:40] = 1
    apart[:, :8, :8] = 1
    assert edge_alignment(pixels, aligned, NORMALIZATION).item() == pytest.approx(1)
    # All of its edges lie where the image is flat: it gets its part of the ties, far under chance.
    assert edge_alignment(pixels, apart, NORMALIZATION).item() < 0.2
    noise = edge_alignment(torch.randn(1, 3, 60, 60), torch.randn(1, 60, 60), NORMALIZATION)
    assert noise.item() == pytest.approx(0.2, abs=0.03)


def test_a_flat_image_gives_chance():
    flat = torch.full((1, 3, 20, 20), 0.3)
    values = edge_alignment(flat, torch.randn(1, 20, 20), NORMALIZATION, edge_share=0.35)
    assert values.item() == pytest.approx(0.35, abs=1e-6)


def test_edges_are_those_of_rgb_luminance():
    """The blue channel is weak in luminance although its input is scaled like the others."""
    rgb = torch.zeros(1, 3, 60, 60)
    rgb[:, 2, :, 15:] += 1
    rgb[:, 1, :, 45:] += 1
    green, blue = torch.zeros(1, 60, 60), torch.zeros(1, 60, 60)
    green[..., 45:], blue[..., 15:] = 1, 1
    pixels = NORMALIZATION.normalize(rgb)
    found = [edge_alignment(pixels, scores, NORMALIZATION, edge_share=0.02).item() for scores in (green, blue)]
    assert found[0] > 0.9 and found[1] < 0.1


def test_only_the_order_of_scores_counts():
    pixels, scores = torch.randn(2, 3, 9, 11), torch.randn(2, 9, 11)
    steep = scores.double().exp() * 1e5
    assert torch.equal(total_variation(scores), total_variation(steep))
    assert torch.equal(edge_alignment(pixels, scores, NORMALIZATION), edge_alignment(pixels, steep, NORMALIZATION))


def test_images_without_a_value_are_nan():
    pixels, scores = torch.randn(4, 3, 9, 9), torch.randn(4, 9, 9)
    scores[0], scores[1, 0, 0], pixels[2, 0, 0, 0] = 1.0, torch.inf, torch.nan
    assert torch.isnan(total_variation(scores)).tolist() == [True, True, False, False]
    assert torch.isnan(edge_alignment(pixels, scores, NORMALIZATION)).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: total_variation(torch.ones(3, 3)), r"shape \(3, 3\), but must be \(batch, height, width\)"),
        (lambda: total_variation(torch.ones(2, 1, 1)), "2 pixels or more"),
        (lambda: edge_alignment(torch.ones(1, 3, 4, 4), torch.ones(1, 4, 5), NORMALIZATION), r"need \(1, 4, 4\)"),
        (
            lambda: edge_alignment(torch.ones(1, 3, 4, 4), torch.ones(1, 4, 4), NORMALIZATION, edge_share=1.0),
            "edge_share is 1.0",
        ),
    ],
)
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
