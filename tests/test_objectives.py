"""The training objective against plain loops, and the direction of its gradient."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from hf_aha.objectives import FaithfulnessObjective, _log_odds, peak_penalty, score_variation
from hf_aha.perturbation import Normalization, reference_image


NORM = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
# Hard masks, every point of both curves, one certain reference: nothing is left to chance.
EXACT = FaithfulnessObjective(num_bins=8, curve_points=0, straight_through=True, pixel_share=1.0, references=("mean",))


class Linear(torch.nn.Module):
    def __init__(self, height: int, width: int, scale: float = 0.05):
        super().__init__()
        self.weights = torch.nn.Parameter(scale * torch.randn(3, 3, height, width), requires_grad=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bchw,kchw->bk", pixels, self.weights)


def evaluate(objective, scores, pixels, target, logits_of, tau=0.3, seed=0):
    return objective(scores, pixels, target, logits_of, NORM, tau=tau, generator=torch.Generator().manual_seed(seed))


def loop_loss(scores, pixels, target, logits_of, bins, score=lambda p: p):
    """Deletion minus insertion at the points 1..bins-1 with hard masks, one image and point at a time."""
    deletion, insertion = [], []
    for image, s, c in zip(pixels, scores, target, strict=True):
        reference = NORM.normalize(reference_image(image[None], "mean"))[0]
        order = s.flatten().argsort(descending=True, stable=True)
        for k in range(1, bins):
            mask = torch.zeros(s.numel(), dtype=torch.bool)
            mask[order[: round(k * s.numel() / bins)]] = True
            mask = mask.view(s.shape)
            deletion.append(score(logits_of(torch.where(mask, reference, image)[None]).softmax(-1)[0, c]))
            insertion.append(score(logits_of(torch.where(mask, image, reference)[None]).softmax(-1)[0, c]))
    return torch.stack(deletion).mean(), torch.stack(insertion).mean()


@pytest.fixture
def case():
    """Two non-square images with scores, classes and a linear classifier."""
    return torch.randn(2, 8, 12), torch.randn(2, 3, 8, 12), torch.tensor([2, 0]), Linear(8, 12)


@pytest.mark.parametrize("ranker", ["quantile", "transport", "sinkhorn"])
def test_with_hard_masks_the_loss_is_that_of_a_plain_loop(case, ranker):
    scores, pixels, target, logits_of = case
    output = evaluate(replace(EXACT, ranker=ranker), scores.requires_grad_(), pixels, target, logits_of)
    deletion, insertion = loop_loss(scores.detach(), pixels, target, logits_of, bins=8)
    assert output.deletion.item() == pytest.approx(deletion.item(), abs=1e-5)
    assert output.insertion.item() == pytest.approx(insertion.item(), abs=1e-5)
    assert output.loss.item() == pytest.approx((deletion - insertion).item(), abs=1e-5)


def test_log_odds_replace_the_probability_in_the_loss_only(case):
    scores, pixels, target, logits_of = case
    output = evaluate(replace(EXACT, score="log_odds"), scores, pixels, target, logits_of)
    deletion, insertion = loop_loss(scores, pixels, target, logits_of, 8, score=lambda p: (p / (1 - p)).log())
    assert output.loss.item() == pytest.approx((deletion - insertion).item(), abs=1e-4)
    assert 0 < output.deletion < 1 and 0 < output.insertion < 1


def test_random_points_estimate_the_same_loss_without_bias(case):
    scores, pixels, target, logits_of = case
    exact = evaluate(EXACT, scores, pixels, target, logits_of).loss.item()
    # 7 points in 3 equal parts: the parts do not end at whole points.
    drawn = replace(EXACT, curve_points=3)
    losses = torch.stack([evaluate(drawn, scores, pixels, target, logits_of, seed=s).loss for s in range(300)])
    assert losses.std() > 1e-4
    assert abs(losses.mean() - exact) < 4 * losses.std() / math.sqrt(300)


def test_every_inner_point_is_drawn_equally_often():
    objective = FaithfulnessObjective(num_bins=8, curve_points=3)
    steps = objective._draw_steps(7000, torch.Generator().manual_seed(0))
    assert steps.shape == (7000, 3)
    counts = torch.bincount(steps.flatten(), minlength=9)
    assert counts[0] == 0 and counts[8] == 0
    assert counts[1:8].min() > 2800 and counts[1:8].max() < 3200
    assert (steps.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("ranker", ["quantile", "transport", "sinkhorn"])
@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("pixel_share", [1.0, 0.0])
def test_small_steps_down_the_gradient_of_a_free_map_lower_the_loss(ranker, straight_through, pixel_share):
    pixels, target, logits_of = torch.randn(2, 3, 12, 12), torch.tensor([1, 0]), Linear(12, 12)
    objective = replace(
        EXACT, ranker=ranker, straight_through=straight_through, pixel_share=pixel_share, grid_range=(5, 5)
    )
    scores = torch.randn(2, 12, 12, requires_grad=True)
    first = evaluate(objective, scores, pixels, target, logits_of)
    for _ in range(5):
        (gradient,) = torch.autograd.grad(evaluate(objective, scores, pixels, target, logits_of).loss, scores)
        scores = (scores - 0.3 * gradient / gradient.std()).detach().requires_grad_()
    assert evaluate(objective, scores, pixels, target, logits_of).loss < first.loss - 0.01


@pytest.mark.parametrize("score", ["probability", "log_odds"])
def test_training_a_free_map_finds_the_contributions_of_a_linear_model(score):
    pixels, target, logits_of = torch.randn(1, 3, 8, 8), torch.tensor([1]), Linear(8, 8)
    objective = FaithfulnessObjective(pixel_share=1.0, references=("mean",), score=score)
    scores = torch.zeros(1, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for step in range(150):
        optimizer.zero_grad()
        evaluate(objective, scores, pixels, target, logits_of, tau=0.5, seed=step).loss.backward()
        optimizer.step()
    other = logits_of.weights[[0, 2]].mean(0)
    reference = NORM.normalize(reference_image(pixels, "mean"))
    truth = ((logits_of.weights[1] - other) * (pixels - reference)[0]).sum(0)
    found = scores.detach()[0]
    assert torch.corrcoef(torch.stack([truth.flatten(), found.flatten()]))[0, 1] > 0.8


def test_gradients_reach_the_scores_alone(make_classifier):
    model = make_classifier().requires_grad_(False)
    pixels, scores = torch.randn(2, 3, 32, 32), torch.randn(2, 32, 32, requires_grad=True)
    output = evaluate(FaithfulnessObjective(), scores, pixels, torch.tensor([0, 1]), lambda x: model(x).logits)
    output.loss.backward()
    assert scores.grad.abs().sum() > 0 and torch.isfinite(scores.grad).all()
    assert pixels.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not (output.deletion.requires_grad or output.insertion.requires_grad or output.peak_penalty.requires_grad)


def test_the_same_generator_gives_the_same_loss_and_gradient(case):
    scores, pixels, target, logits_of = case
    objective = FaithfulnessObjective(noise=0.3, references=("noise", "blur"), straight_through=False)
    results = []
    for seed in (5, 5, 6):
        free = scores.clone().requires_grad_()
        torch.rand(1)  # the global state plays no part
        loss = evaluate(objective, free, pixels, target, logits_of, seed=seed).loss
        results.append((loss.detach(), torch.autograd.grad(loss, free)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_without_noise_drops_the_noise_only():
    objective = FaithfulnessObjective.preset("paper")
    assert objective.without_noise() == replace(objective, noise=0.0)


def test_grid_masks_are_constant_within_a_cell(case):
    scores, pixels, target, _ = case
    seen = []

    def watching(perturbed):
        seen.append(perturbed)
        return perturbed.flatten(1).mean(1, keepdim=True) * torch.tensor([1.0, -1.0, 0.5])

    objective = replace(EXACT, pixel_share=0.0, grid_range=(4, 4))
    evaluate(objective, scores, pixels, target, watching)
    perturbed = seen[0].unflatten(0, (2, 14))
    reference = NORM.normalize(reference_image(pixels, "mean"))
    masks = (perturbed - reference[:, None]).abs().amax(2) < 1e-6  # where the reference is seen
    blocks = masks.unflatten(-1, (4, 3)).unflatten(-3, (4, 2))
    share = blocks.float().mean(dim=(-3, -1))
    assert ((share == 0) | (share == 1)).all()
    # Deletion point k hides k/8 of the 16 cells, insertion point k all others.
    hidden = share.flatten(2).sum(-1)
    assert hidden[0].tolist() == [2 * k for k in range(1, 8)] + [16 - 2 * k for k in range(1, 8)]


def test_grids_are_no_finer_than_the_image(case):
    scores, pixels, target, logits_of = case
    output = evaluate(replace(EXACT, pixel_share=0.0, grid_range=(10, 30)), scores, pixels, target, logits_of)
    assert torch.isfinite(output.loss)


def test_the_paper_preset_holds_the_released_settings():
    paper = FaithfulnessObjective.preset("paper")
    assert (paper.ranker, paper.noise, paper.straight_through) == ("sinkhorn", 1.0, False)
    assert paper.num_bins + 1 == 16 and paper.curve_points == 0, "16 fractions from 0 to 1"
    assert paper.pixel_share == 0 and tuple(paper.grid_range) == (7, 28)
    assert tuple(paper.references) == ("black", "mean", "blur")
    assert paper.blur_sigma * 224 == pytest.approx(37)
    assert (paper.mask_smoothing, paper.peak_weight, paper.score) == (1.0, 0.0025, "probability")


def test_the_paper_preset_runs_and_its_masks_are_smooth(case):
    scores, pixels, target, logits_of = case
    scores.requires_grad_()
    output = evaluate(
        replace(FaithfulnessObjective.preset("paper"), grid_range=(3, 6)), scores, pixels, target, logits_of
    )
    output.loss.backward()
    assert -1 < output.loss < 1 and scores.grad.abs().sum() > 0


def test_peak_penalty_equals_a_plain_loop():
    scores, window = torch.randn(2, 9, 13), 5
    total = 0.0
    for b, y, x in itertools.product(range(2), range(9), range(13)):
        around = scores[b, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        total += max(0.0, float(scores[b, y, x] - around.mean())) ** 2
    assert peak_penalty(scores, window).item() == pytest.approx(total / scores.numel(), rel=1e-4)
    assert peak_penalty(torch.full((1, 9, 9), 3.0)).item() == pytest.approx(0, abs=1e-10)
    assert torch.isfinite(peak_penalty(torch.randn(1, 4, 30))), "the window shrinks to an odd one inside the map"


def test_the_peak_penalty_enters_the_loss_by_its_weight(case):
    scores, pixels, target, logits_of = case
    plain = evaluate(EXACT, scores, pixels, target, logits_of)
    weighted = evaluate(replace(EXACT, peak_weight=2.0), scores, pixels, target, logits_of)
    assert (weighted.loss - plain.loss).item() == pytest.approx(2 * peak_penalty(scores).item(), abs=1e-5)
    assert weighted.peak_penalty.item() == plain.peak_penalty.item()


def test_the_variation_of_the_scores_equals_a_plain_loop_and_ignores_their_scale():
    scores = torch.randn(2, 5, 7)
    total, pairs = 0.0, 0
    for one in scores:
        one = (one - one.mean()) / one.std(correction=0)
        for y, x in itertools.product(range(5), range(7)):
            for below, right in ((y + 1, x), (y, x + 1)):
                if below < 5 and right < 7:
                    total, pairs = total + abs(float(one[y, x] - one[below, right])), pairs + 1
    assert score_variation(scores).item() == pytest.approx(total / pairs, rel=1e-5)
    assert score_variation(40 * scores + 3).item() == pytest.approx(total / pairs, rel=1e-4)
    assert score_variation(torch.randn(4, 100, 100)).item() == pytest.approx(2 / math.pi**0.5, rel=0.02)
    with pytest.raises(ValueError, match=r"scores have shape \(3, 1, 1\), but must be"):
        score_variation(torch.zeros(3, 1, 1))


def test_the_variation_enters_the_loss_by_its_weight_and_its_gradient_smooths(case):
    scores, pixels, target, logits_of = case
    plain = evaluate(EXACT, scores, pixels, target, logits_of)
    weighted = evaluate(replace(EXACT, tv_weight=2.0), scores, pixels, target, logits_of)
    assert (weighted.loss - plain.loss).item() == pytest.approx(2 * score_variation(scores).item(), abs=1e-5)
    scores.requires_grad_()
    before = score_variation(scores)
    before.backward()
    assert score_variation(scores.detach() - 5 * scores.grad) < before


def test_deletion_is_weighed_against_insertion(case):
    scores, pixels, target, logits_of = case
    found = evaluate(replace(EXACT, deletion_weight=3.0), scores, pixels, target, logits_of)
    assert found.loss.item() == pytest.approx(3 * found.deletion.item() - found.insertion.item(), abs=1e-6)
    plain = evaluate(EXACT, scores, pixels, target, logits_of)
    assert (found.deletion, found.insertion) == (plain.deletion, plain.insertion)


def test_log_odds_stay_finite_where_the_probability_saturates():
    logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0], [20.0, 0.0], [0.3, 0.0]], requires_grad=True)
    odds = _log_odds(logits.log_softmax(-1)[:, 0])
    odds.sum().backward()
    assert torch.isfinite(odds).all() and torch.isfinite(logits.grad).all()
    assert odds[0].item() == pytest.approx(math.log(1e6), rel=0.01)
    assert odds[1].item() == pytest.approx(-200)
    assert odds[3].item() == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"score": "logit"}, "score must be 'probability' or 'log_odds', but it is 'logit'"),
        ({"ranker": "bubble"}, "ranker must be one of quantile, sinkhorn, transport"),
        ({"references": ("grey",)}, "references must be some of black, mean, blur, noise"),
        ({"num_bins": 1}, "num_bins must be at least 2"),
        ({"curve_points": 20}, "curve_points must lie in 0..num_bins-1, but it is 20"),
        ({"grid_range": (0, 4)}, "grid_range must be two rising numbers from 1 on"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"tv_weight": -1.0}, "tv_weight must not be negative"),
        ({"deletion_weight": -1.0}, "deletion_weight must not be negative"),
    ],
)
def test_unusable_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        FaithfulnessObjective(**setting)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="Unknown objective preset 'ours'; choose 'default' or 'paper'"):
        FaithfulnessObjective.preset("ours")
