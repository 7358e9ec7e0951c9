"""Noisy linear imputation against a sparse direct solve of the written-out equations."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest
import torch
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve

from hf_aha.metrics import linear_imputation, noisy_linear_imputation
from hf_aha.perturbation import gaussian_blur


def solved(image: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Every removed pixel's equation in a loop, solved by scipy in float64."""
    filled, (_, height, width) = image.astype(np.float64), image.shape
    places = [tuple(place) for place in np.argwhere(removed)]
    number = {place: index for index, place in enumerate(places)}
    matrix, right = lil_matrix((len(places), len(places))), np.zeros((len(places), 3))
    for index, (y, x) in enumerate(places):
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                there = (y + down, x + across)
                if there == (y, x) or not (0 <= there[0] < height and 0 <= there[1] < width):
                    continue
                weight = 1 / 6 if down * across == 0 else 1 / 12
                matrix[index, index] += weight
                if there in number:
                    matrix[index, number[there]] -= weight
                else:
                    right[index] += weight * filled[:, there[0], there[1]]
    if places:
        values = spsolve(matrix.tocsc(), right).reshape(-1, 3)
        filled[:, [y for y, _ in places], [x for _, x in places]] = values.T
    return filled


def top(scores: torch.Tensor, share: float) -> torch.Tensor:
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: round(share * scores.numel())]] = True
    return mask.view(scores.shape)


def kinds(height: int, width: int) -> dict[str, torch.Tensor]:
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    noise = torch.randn(height, width)
    return {
        "noise": noise,
        "blobs": gaussian_blur(noise[None, None], 2)[0, 0],
        "centre": -(y.square() + x.square()),
        "border": y.square() + x.square(),
        "corner": y + x,
        "stripes": torch.sin(20 * x) + 0.01 * y,
    }


@pytest.mark.parametrize("size", [(20, 20), (17, 31), (5, 4), (1, 9), (33, 2)])
def test_equals_a_direct_solve(size):
    image = torch.rand(1, 3, *size)
    masks = torch.stack([top(scores, share) for scores in kinds(*size).values() for share in (0.1, 0.5, 0.9)])
    masks = torch.cat([masks, torch.ones_like(masks[:1]), torch.zeros_like(masks[:1])])
    masks[-2, size[0] // 2, size[1] // 2] = False  # all but one pixel
    found = linear_imputation(image, masks[None])
    assert found.images.shape == (1, len(masks), 3, *size) and found.images.dtype == torch.float32
    assert float(found.residual.max()) <= 1e-5 and float(found.residual[0, -1]) == 0
    for index, mask in enumerate(masks):
        expected = solved(image[0].numpy(), mask.numpy())
        assert np.abs(found.images[0, index].numpy() - expected).max() < 1e-3, index
        assert torch.equal(found.images[0, index][:, ~mask], image[0][:, ~mask])


def test_large_holes_are_solved_to_the_same_tolerance():
    image, scores = torch.rand(1, 3, 72, 64), kinds(72, 64)
    masks = torch.stack([top(scores[name], 0.9) for name in ("centre", "blobs")])
    found = linear_imputation(image, masks[None])
    for index, mask in enumerate(masks):
        assert np.abs(found.images[0, index].numpy() - solved(image[0].numpy(), mask.numpy())).max() < 5e-4


def test_residual_is_the_distance_to_the_mean_of_the_neighbours():
    image, mask = torch.rand(1, 3, 12, 14), torch.rand(1, 1, 12, 14) < 0.7
    rough = linear_imputation(image, mask, tolerance=1e-2)
    weights = torch.tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12
    kernel = weights.view(1, 1, 3, 3)
    total = torch.nn.functional.conv2d(torch.ones(1, 1, 12, 14), kernel, padding=1)
    mean = torch.nn.functional.conv2d(rough.images[0].view(3, 1, 12, 14), kernel, padding=1) / total
    difference = (rough.images[0, 0] - mean[:, 0]).abs()[:, mask[0, 0]].max()
    assert float(rough.residual) == pytest.approx(float(difference), abs=1e-6)
    assert 1e-5 < float(rough.residual) <= 1e-2
    assert float(linear_imputation(image, mask, tolerance=1e-6).residual) <= 1e-6


def test_a_plane_without_borders_in_the_hole_is_continued_exactly():
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    plane = (0.2 + 0.5 * y + 0.3 * x).expand(1, 3, 16, 16)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 3:12, 4:13] = True
    assert torch.allclose(linear_imputation(plane, mask).images[0], plane, atol=1e-4)


def test_images_do_not_depend_on_their_batch():
    images, masks = torch.rand(3, 3, 16, 16), torch.rand(3, 4, 16, 16) < 0.6
    together = noisy_linear_imputation(images, masks, seed=3)
    alone = noisy_linear_imputation(images[1:2], masks[1:2, 2:3], seed=3)
    assert torch.allclose(together[1, 2], alone[0, 0], atol=1e-4)


def test_noise_is_seeded_and_only_on_removed_pixels():
    image, mask = torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32) < 0.5
    clean = noisy_linear_imputation(image, mask, noise=0.0)
    first, again, other = (noisy_linear_imputation(image, mask, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    kept = ~mask[:, :, None].expand_as(clean)
    assert torch.equal(first[kept], clean[kept])
    assert (first - clean)[~kept].std().item() == pytest.approx(0.01, rel=0.1)
    assert torch.equal(clean, linear_imputation(image, mask).images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rgb": torch.rand(1, 1, 4, 4)}, r"rgb is torch.float32 of shape \(1, 1, 4, 4\)"),
        ({"removed": torch.zeros(1, 1, 4, 4)}, "removed is torch.float32"),
        ({"removed": torch.zeros(1, 1, 4, 5, dtype=torch.bool)}, r"must be bool \(1, masks, 4, 4\)"),
        ({"removed": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, "Mask 0 of image 0 removes every pixel"),
        ({"rgb": torch.full((1, 3, 4, 4), torch.nan)}, "NaN or infinite pixels"),
        ({"tolerance": 1e-8}, "tolerance is 1e-08, but float32 needs 1e-6"),
        ({"noise": -1.0}, "noise is -1.0"),
    ],
)
def test_refuses_what_has_no_solution(change, message):
    arguments = {"rgb": torch.rand(1, 3, 4, 4), "removed": torch.zeros(1, 1, 4, 4, dtype=torch.bool), **change}
    with pytest.raises(ValueError, match=message):
        noisy_linear_imputation(arguments.pop("rgb"), arguments.pop("removed"), **arguments)


def test_says_when_the_tolerance_is_not_reached(monkeypatch):
    monkeypatch.setattr("hf_aha.metrics.imputation._MAX_ITERATIONS", 1)
    with pytest.raises(RuntimeError, match=r"reached a residual of .* in 1 iterations, but 1.0e-05 was asked"):
        linear_imputation(torch.rand(1, 3, 24, 24), torch.rand(1, 1, 24, 24) < 0.8)


# The least important tenth of a map of 126 x 126, on whose coarser grids plain damped Jacobi steps grow.
_THIN_AND_SCATTERED = (
    "eNrtk01ygzAMhUWh9SYzZNdNpuQIPUBmyE3ak9TcotfxTeAI7MIioMqWDZKzaaftLt6ABn9PTz8A3B4H93M/fEqxDOUA0OrlKLBT"
    "cY0at4tWw6uKGxxVjDjEtyBrMMk3HV9P8vy0Sc4sbCbJtQubQRddhnttkjM4cbYl2XCMTxG/stmIg3VMpWIOUUWbN1kvzJS18j/m"
    "U73o+Fk3GN50XFht6jGr4XMdAFfUy5qo/WqeFmec1PQuUo7616OTamhRDX9W62AjvkurRbh3M/EeBJzcmJG+0EvCm64Oc28J925O"
    "NPcluEnZay9TRDwkDm7mdfxjuHRJbhoXLvWpuIfYOhTFv0PVCvf0m+wbEdcAZ/n9Awqqb21WMUG1bSuZGWBfbsvv1/28LT/jYt08"
    "TvHWWcruNVacssupngiXZyBcLmZHuNypDIcMB43T2XC2vOJPGX7I8GOGg8Z/mv0buMtqz/Bdhr/+Dv9j87c4fAGJjcGR"
)


def test_thin_scattered_holes_are_solved_too():
    packed = np.frombuffer(zlib.decompress(base64.b64decode(_THIN_AND_SCATTERED)), dtype=np.uint8)
    removed = torch.from_numpy(np.unpackbits(packed, count=126 * 126).astype(bool)).view(1, 1, 126, 126)
    rgb = torch.rand(1, 3, 126, 126, generator=torch.Generator().manual_seed(0))
    assert linear_imputation(rgb, removed).residual.max() <= 1e-5
