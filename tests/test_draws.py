"""What is drawn in a training step depends on the seed, the step and the row: not on batches, processes or order."""

from __future__ import annotations

import pytest
import torch

from hf_aha.draws import StepDraws, draw_rows, uniform
from hf_aha.objectives import FaithfulnessObjective
from hf_aha.perturbation import Normalization, random_references
from hf_aha.ranking import make_ranker


NORM = Normalization((0.5,) * 3, (0.5,) * 3)
ROWS = [7, 3, 900, (5 << 32) + 1]


def numbers(draws: StepDraws) -> torch.Tensor:
    return uniform((len(draws.images), 6), draws.images)


def test_an_image_gets_its_numbers_wherever_it_stands():
    whole = numbers(StepDraws.of(0, 12, ROWS))
    parts = torch.cat([numbers(StepDraws.of(0, 12, ROWS[start : start + 2])) for start in (0, 2)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole.flip(0), numbers(StepDraws.of(0, 12, ROWS[::-1])))
    shared = [torch.rand(4, generator=StepDraws.of(0, 12, rows).shared) for rows in (ROWS, ROWS[:1])]
    assert torch.equal(*shared)


def test_seeds_steps_and_rows_draw_apart():
    drawn = [numbers(StepDraws.of(seed, step, range(50))) for seed in (0, 1) for step in (0, 1)]
    shared = [torch.rand(1, 6, generator=StepDraws.of(seed, step, []).shared) for seed in (0, 1) for step in (0, 1)]
    everything = torch.cat([*drawn, *shared])
    assert len(everything.unique(dim=0)) == len(everything)
    # Uniform over neighbouring rows and steps, also in their first number.
    first = torch.cat([numbers(StepDraws.of(3, step, range(100)))[:, 0] for step in range(20)])
    assert abs(first.mean() - 0.5) < 0.02 and abs(first.var() - 1 / 12) < 0.005
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 0.06


def test_a_batch_behind_itself_draws_anew_and_an_image_still_alone():
    whole = numbers(StepDraws.of(0, 12, ROWS).times(2))
    assert len(whole.unique(dim=0)) == 2 * len(ROWS)
    parts = [numbers(StepDraws.of(0, 12, [row]).times(2)) for row in ROWS]
    assert torch.equal(whole, torch.cat([torch.stack([part[place] for part in parts]) for place in (0, 1)]))
    one = StepDraws(torch.Generator(), torch.Generator())
    assert one.times(2) is one


def test_one_generator_draws_as_it_did_for_a_whole_batch():
    one, two = (torch.Generator().manual_seed(5) for _ in range(2))
    assert torch.equal(uniform((3, 2), one), torch.rand(3, 2, generator=two))
    assert uniform((3, 2), None).shape == (3, 2)


def test_generators_and_images_must_be_as_many():
    with pytest.raises(ValueError, match="There are 2 generators for 3 images; give one an image, or one."):
        draw_rows(lambda shape, own: torch.rand(tuple(shape), generator=own), (3,), [torch.Generator()] * 2)


def test_references_are_drawn_image_by_image():
    rgb = torch.rand(4, 3, 12, 12)
    kinds = ("black", "mean", "blur", "noise")
    whole = random_references(rgb, kinds, StepDraws.of(0, 1, ROWS).images)
    parts = [
        random_references(rgb[start : start + 1], kinds, StepDraws.of(0, 1, ROWS[start : start + 1]).images)
        for start in range(4)
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    noise = random_references(rgb, ("noise",), StepDraws.of(0, 1, ROWS).images)
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("ranker", ["transport", "quantile", "sinkhorn"])
def test_the_noise_of_a_ranker_is_drawn_image_by_image(ranker):
    scores = torch.randn(4, 36)
    ranker = make_ranker(ranker, straight_through=False, noise=1.0)
    whole = ranker(scores, 4, tau=0.5, generator=StepDraws.of(0, 1, ROWS).images)
    parts = [
        ranker(scores[row : row + 1], 4, tau=0.5, generator=StepDraws.of(0, 1, ROWS[row : row + 1]).images)
        for row in range(4)
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-4)
    assert not torch.allclose(whole, ranker(scores, 4, tau=0.5, generator=StepDraws.of(0, 2, ROWS).images), atol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"noise": 0.5, "references": ("noise", "blur"), "pixel_share": 0.0}])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(settings):
    objective = FaithfulnessObjective(grid_range=(2, 4), **settings)
    pixels, weight = torch.randn(4, 3, 16, 16), torch.randn(5, 3 * 16 * 16) / 30
    scores = torch.randn(4, 16, 16, requires_grad=True)

    def loss(rows: slice) -> torch.Tensor:
        draws = StepDraws.of(0, 4, ROWS[rows])
        target = torch.zeros(len(ROWS[rows]), dtype=torch.int64)

        def logits_of(images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1) @ weight.T

        return objective(scores[rows], pixels[rows], target, logits_of, NORM, tau=0.5, generator=draws).loss

    whole = torch.autograd.grad(loss(slice(0, 4)), scores)[0]
    parts = torch.autograd.grad((loss(slice(0, 2)) + loss(slice(2, 4))) / 2, scores)[0]
    torch.testing.assert_close(whole, parts, atol=1e-7, rtol=1e-4)
    assert whole.abs().sum() > 0


def test_the_extremes_of_an_objective_rank_pixels_and_the_finest_grid():
    pixels, finest = FaithfulnessObjective(pixel_share=0.5, grid_range=(3, 9)).extremes()
    assert pixels.pixel_share == 1.0 and (finest.pixel_share, finest.grid_range) == (0.0, (9, 9))
    assert [e.pixel_share for e in FaithfulnessObjective(pixel_share=1.0).extremes()] == [1.0]
    assert [e.pixel_share for e in FaithfulnessObjective.preset("paper").extremes()] == [0.0]
