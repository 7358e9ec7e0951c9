"""Rankers against independent references, and the properties that every ranker promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_aha.ranking import (
    RANKERS,
    QuantileRanker,
    SinkhornRanker,
    TransportRanker,
    hard_masks,
    hard_ranks,
    make_ranker,
    standardize,
)


EXACT = [TransportRanker(), QuantileRanker()]
ALL = [*EXACT, SinkhornRanker(noise=0.0, standardize_scores=True, iterations=100)]
NAMES = {"ids": lambda ranker: type(ranker).__name__}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nasty(n: int) -> torch.Tensor:
    """One image of each difficult kind, in one batch."""
    base = normal(n, seed=1)
    spike = torch.zeros(n)
    spike[n // 2] = 1
    rows = [
        base,
        torch.full((n,), 0.1),
        torch.arange(n).remainder(3).float(),
        (normal(n, seed=2) / normal(n, seed=3)),
        base * 1e6 + 3e6,
        spike,
        (3 * base).exp(),
        (base > 2).float(),
    ]
    return torch.stack(rows)


def unrolled_transport(scores: torch.Tensor, num_bins: int, tau: float, iterations: int) -> torch.Tensor:
    """The reference plan (B, n, K): log-domain Sinkhorn on standardised scores, ending on the bin masses."""
    n = scores.shape[1]
    z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True, correction=0)
    log_plan = z[:, :, None] * torch.linspace(1, -1, num_bins, dtype=scores.dtype) / tau
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(2, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True) + np.log(n / num_bins)
    return log_plan.exp()


# ---------------------------------------------------------------- hard ranking and standardising


def test_hard_ranks_match_numpy_stable_argsort():
    scores = torch.cat([normal(3, 101), nasty(101), torch.tensor([[0.0, -0.0] * 50 + [1.0]])])
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    ranks = hard_ranks(scores)
    assert ranks.dtype == torch.int64
    np.testing.assert_array_equal(np.take_along_axis(ranks.numpy(), order, 1), np.tile(np.arange(101), (12, 1)))


def test_hard_masks_hold_exact_counts_under_ties():
    scores = nasty(60)
    counts = torch.tensor([7, 0, 60, 33])
    masks = hard_masks(scores, counts)
    assert masks.dtype == torch.float32 and masks.shape == (8, 4, 60)
    assert torch.equal(masks.sum(2), counts.float().expand(8, -1))
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    for image in range(8):
        assert set(masks[image, 3].nonzero()[:, 0].tolist()) == set(order[image, :33].tolist())
    per_image = torch.stack([counts, counts.flip(0)] * 4)
    assert torch.equal(hard_masks(scores, per_image)[1], masks[1].flip(0))


def test_hard_ranking_refuses_unusable_input():
    with pytest.raises(ValueError, match="NaN or infinite"):
        hard_ranks(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        hard_ranks(torch.zeros(4))
    with pytest.raises(ValueError, match="reach from 1 to 5"):
        hard_masks(torch.zeros(1, 4), torch.tensor([1, 5]))
    with pytest.raises(ValueError, match="give integers"):
        hard_masks(torch.zeros(1, 4), torch.tensor([0.5]))


def test_standardize_is_exact_for_large_offsets_and_scales():
    base = normal(1, 5000, seed=4, dtype=torch.float64)
    rows = torch.cat([base, base * 1e6, base * 1e-20, base * 1e25])
    expected = (base - base.mean()) / base.std(correction=0)
    result = standardize(rows.float())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected.expand(4, -1), atol=1e-5, rtol=1e-5)
    shifted = standardize((base + 1e4).float())
    assert abs(float(shifted.double().mean())) < 1e-6
    assert abs(float(shifted.double().square().mean()) - 1) < 1e-5
    assert standardize(base.bfloat16()).dtype == torch.float32


def test_standardize_constant_map_is_zero_and_keeps_the_centred_gradient():
    scores = torch.full((1, 50176), 0.1, requires_grad=True)
    result = standardize(scores)
    assert torch.equal(result, torch.zeros_like(result))
    incoming = normal(1, 50176)
    result.backward(incoming)
    torch.testing.assert_close(scores.grad, incoming - incoming.mean())


# ---------------------------------------------------------------- properties of every ranker


@pytest.mark.parametrize("ranker", ALL, **NAMES)
@pytest.mark.parametrize("n", [64, 50])
def test_masks_hold_their_share_and_are_monotone(ranker, n):
    masks = ranker(normal(3, n), 8, tau=0.3)
    share = torch.arange(1, 9) / 8
    assert masks.shape == (3, 8, n) and masks.dtype == torch.float32
    assert float((masks.mean(2) / share - 1).abs().max()) < 1e-3
    assert float(masks.diff(dim=1).min()) > -1e-6
    assert float(masks.min()) >= 0 and float(masks.max()) <= 1


@pytest.mark.parametrize("ranker", EXACT, **NAMES)
@pytest.mark.parametrize("n", [3000, 50])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01, 1e-5])
def test_exact_for_every_kind_of_scores_with_finite_gradients(ranker, n, tau):
    scores = nasty(n).requires_grad_()
    masks = ranker(scores, 16, tau=tau)
    share = torch.arange(1, 17) / 16
    assert float((masks.detach().double().mean(2) / share - 1).abs().max()) < 1e-3
    assert float(masks.detach().diff(dim=1).min()) > -1e-6
    assert bool((masks[:, -1] == 1).all())
    masks.backward(normal(*masks.shape))
    assert bool(scores.grad.isfinite().all())


def test_transport_bins_hold_their_mass():
    masks = TransportRanker()(nasty(4000), 32, tau=0.01).double()
    bins = torch.diff(masks.sum(2), dim=1, prepend=torch.zeros(8, 1)) / (4000 / 32)
    assert float((bins - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("ranker", [RANKERS[name]() for name in RANKERS], **NAMES)
def test_constant_scores_give_finite_gradients(ranker):
    scores = torch.zeros(1, 64, requires_grad=True)
    ranker(scores, 4, tau=0.3).backward(normal(1, 4, 64))
    assert bool(scores.grad.isfinite().all()) and float(scores.grad.abs().max()) > 0


@pytest.mark.parametrize("ranker", ALL, **NAMES)
def test_permutation_equivariant(ranker):
    scores = torch.cat([normal(2, 90), torch.arange(90).remainder(3)[None].float()])
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ranker(scores, 5, tau=0.2)[:, :, order], ranker(scores[:, order], 5, tau=0.2), atol=2e-4, rtol=1e-3
    )


@pytest.mark.parametrize("ranker", ALL, **NAMES)
def test_invariant_to_increasing_affine_maps(ranker):
    scores = normal(2, 64, dtype=torch.float64)
    torch.testing.assert_close(ranker(scores, 5, tau=0.2), ranker(scores * 7 - 3, 5, tau=0.2), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("ranker", EXACT, **NAMES)
def test_no_temperature_means_hard_ranking(ranker):
    scores = torch.linspace(-1, 1, 60).roll(17)[None]
    expected = hard_masks(scores, torch.arange(1, 6) * 12)
    torch.testing.assert_close(ranker(scores, 5, tau=1e-4), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ranker", ALL, **NAMES)
def test_chosen_steps_equal_those_of_the_whole_curve(ranker):
    scores = normal(2, 80).requires_grad_()
    weight = normal(2, 3, 80)
    whole = ranker(scores, 6, tau=0.1)
    steps = torch.tensor([[5, 1, 6], [2, 2, 3]])
    expected = whole.gather(1, (steps - 1)[:, :, None].expand(-1, -1, 80))
    chosen = ranker(scores, 6, steps, tau=0.1)
    torch.testing.assert_close(chosen, expected, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad((chosen * weight).sum(), scores)
    (other,) = torch.autograd.grad((expected * weight).sum(), scores)
    torch.testing.assert_close(gradient, other, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(ranker(scores, 6, steps[0], tau=0.1)[0], chosen[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ranker", ALL, **NAMES)
def test_an_image_does_not_depend_on_its_batch(ranker):
    scores = nasty(70)[[0, 1, 3]]
    together = ranker(scores, 4, tau=0.1)
    for image in range(3):
        torch.testing.assert_close(
            ranker(scores[image : image + 1], 4, tau=0.1)[0], together[image], atol=2e-4, rtol=0
        )


@pytest.mark.parametrize("ranker", ALL, **NAMES)
def test_straight_through(ranker):
    hard = type(ranker)(**{**vars(ranker), "straight_through": True})
    scores = torch.cat([normal(1, 49), torch.arange(49).remainder(3)[None].float()]).requires_grad_()
    steps = torch.tensor([1, 3, 4])
    counts = torch.tensor([round(k * 49 / 4) for k in steps.tolist()])
    masks = hard(scores, 4, steps, tau=0.3)
    assert torch.equal(masks, hard_masks(scores, counts))
    weight = normal(2, 3, 49)
    (gradient,) = torch.autograd.grad((masks * weight).sum(), scores)
    (soft,) = torch.autograd.grad((ranker(scores, 4, steps, tau=0.3) * weight).sum(), scores)
    assert float(soft.abs().max()) > 1e-3
    torch.testing.assert_close(gradient, soft)
    with torch.no_grad():
        assert torch.equal(hard(scores, 4, steps, tau=0.3), masks)


@pytest.mark.parametrize("name", sorted(RANKERS))
def test_noise_comes_from_the_generator(name):
    ranker = make_ranker(name, straight_through=False, noise=0.5)

    def draw(seed: int) -> torch.Tensor:
        return ranker(normal(2, 64), 4, tau=0.3, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert float((draw(1) - draw(2)).abs().max()) > 0.05
    if name != "sinkhorn":
        assert float((draw(1).mean(2) / torch.tensor([0.25, 0.5, 0.75, 1.0]) - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("ranker", ALL, **NAMES)
def test_autocast_computes_in_float32(ranker):
    scores = normal(2, 64).requires_grad_()
    weight = normal(2, 4, 64)
    expected = ranker(scores, 4, tau=0.2)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = ranker(scores, 4, tau=0.2)
        (under_autocast,) = torch.autograd.grad((masks * weight).sum(), scores)
    assert masks.dtype == torch.float32
    assert torch.equal(masks, expected)
    torch.testing.assert_close(under_autocast, gradient)
    rounded = scores.detach().bfloat16().requires_grad_()
    half = ranker(rounded, 4, tau=0.2)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, ranker(rounded.float(), 4, tau=0.2))


# ---------------------------------------------------------------- transport


@pytest.mark.parametrize("tau", [1.0, 0.2])
@pytest.mark.parametrize("steps", [None, torch.tensor([[1, 4], [3, 2]])], ids=["all", "chosen"])
def test_transport_matches_thousands_of_unrolled_iterations(tau, steps):
    scores = torch.cat([normal(1, 42, dtype=torch.float64), normal(1, 42, seed=5, dtype=torch.float64).exp()])
    scores.requires_grad_()
    reference = unrolled_transport(scores, 6, tau, 2000).cumsum(2).transpose(1, 2)
    if steps is not None:
        reference = reference.gather(1, (steps - 1)[:, :, None].expand(-1, -1, 42))
    masks = TransportRanker()(scores, 6, steps, tau=tau)
    torch.testing.assert_close(masks, reference, atol=1e-7, rtol=0)
    weight = normal(*masks.shape, seed=9, dtype=torch.float64)
    (expected,) = torch.autograd.grad((reference * weight).sum(), scores, retain_graph=True)
    (gradient,) = torch.autograd.grad((masks * weight).sum(), scores)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


def test_transport_float32_gradient_agrees_with_float64_over_several_tiles():
    scores = normal(2, 20000, seed=6, dtype=torch.float64).requires_grad_()
    weight = normal(2, 16, 20000, seed=7, dtype=torch.float64)
    exact = TransportRanker()(scores, 16, tau=0.05)
    (expected,) = torch.autograd.grad((exact * weight).sum(), scores)
    single = TransportRanker()(scores.float(), 16, tau=0.05)
    torch.testing.assert_close(single.double(), exact, atol=2e-4, rtol=0)
    (gradient,) = torch.autograd.grad((single * weight.float()).sum(), scores)
    assert float(torch.cosine_similarity(gradient, expected).min()) > 0.99999


@pytest.mark.parametrize("ranker", [*EXACT, TransportRanker(noise=0.3), QuantileRanker(noise=0.3)], **NAMES)
@pytest.mark.parametrize("steps", [None, torch.tensor([4, 1])], ids=["all", "chosen"])
def test_gradcheck(ranker, steps):
    tied = torch.tensor([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0, 1.0, 2.0, 2.0]], dtype=torch.float64)
    scores = torch.cat([normal(1, 9, dtype=torch.float64), tied]).requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        return ranker(x, 4, steps, tau=0.5, generator=torch.Generator().manual_seed(3))

    assert torch.autograd.gradcheck(run, (scores,))


def test_transport_keeps_one_plan_for_the_backward_pass():
    scores = normal(2, 600).requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        masks = TransportRanker()(scores, 32, torch.tensor([3, 9]), tau=0.1)
    plan = 2 * 32 * 600 * 4
    assert masks.requires_grad
    assert plan <= sum(saved.values()) < 1.75 * plan


@pytest.mark.parametrize("tau", [0.1, 0.002])
def test_transport_holds_its_mass_under_strong_noise(tau):
    ranker = TransportRanker(noise=1.0)
    masks = ranker(nasty(300), 16, tau=tau, generator=torch.Generator().manual_seed(0)).double()
    assert float((masks.mean(2) / (torch.arange(1, 17) / 16) - 1).abs().max()) < 1e-3


# ---------------------------------------------------------------- Sinkhorn


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_sinkhorn_matches_a_plain_reference(noise):
    scores = torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gumbel = torch.zeros(2, 9, 9, dtype=torch.float64)
    if noise:
        draws = torch.empty(2, 9, 9, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1))
        gumbel = -draws.log()
    expected = np.zeros((2, 4, 9))
    for image in range(2):
        anchors = np.linspace(1, 0, 9)
        logits = [[-((float(scores[image, j]) - anchors[r]) ** 2) for j in range(9)] for r in range(9)]
        plan = np.exp((np.array(logits) + gumbel[image].numpy()) / 0.3)
        for _ in range(30):
            plan /= plan.sum(0, keepdims=True)
            plan /= plan.sum(1, keepdims=True)
        cumulative = np.vstack([np.zeros(9), plan.cumsum(0)])
        for k in range(1, 5):
            lower = int(k * 9 / 4)
            part = k * 9 / 4 - lower
            upper = cumulative[min(lower + 1, 9)]
            expected[image, k - 1] = np.clip((1 - part) * cumulative[lower] + part * upper, 0, 1)
    masks = SinkhornRanker(noise=noise)(scores, 4, tau=0.3, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(masks.numpy(), expected, atol=1e-10)


def test_sinkhorn_ranks_raw_scores_unless_told():
    scores = torch.rand(1, 49)
    ranker = SinkhornRanker(noise=0.0)
    assert float((ranker(scores, 4, tau=0.3) - ranker(scores * 5, 4, tau=0.3)).abs().max()) > 0.05


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", sorted(RANKERS))
def test_unusable_arguments_are_refused(name):
    ranker = make_ranker(name, straight_through=False, noise=0.0)
    scores = torch.randn(2, 16)
    with pytest.raises(ValueError, match="NaN or infinite"):
        ranker(scores.fill_diagonal_(float("inf")), 4, tau=0.1)
    scores = torch.randn(2, 16)
    with pytest.raises(ValueError, match="tau is 0"):
        ranker(scores, 4, tau=0.0)
    with pytest.raises(ValueError, match="num_bins is 0"):
        ranker(scores, 0, tau=0.1)
    with pytest.raises(ValueError, match=r"reach from 0 to 5; keep to 1\.\.4"):
        ranker(scores, 4, torch.tensor([0, 5]), tau=0.1)
    with pytest.raises(ValueError, match=r"give \(S,\) or \(2, S\)"):
        ranker(scores, 4, torch.ones(3, 2, dtype=torch.int64), tau=0.1)
    with pytest.raises(ValueError, match="floating-point"):
        ranker(scores.long(), 4, tau=0.1)
    with pytest.raises(ValueError, match="noise is -1"):
        make_ranker(name, straight_through=False, noise=-1.0)


def test_sinkhorn_refuses_pixel_resolution():
    with pytest.raises(ValueError, match="n = 5000 > 4096; .*TransportRanker"):
        SinkhornRanker()(torch.zeros(1, 5000), 4, tau=0.1)


def test_make_ranker():
    assert make_ranker("transport", straight_through=True, noise=0.5) == TransportRanker(True, 0.5)
    with pytest.raises(ValueError, match="'fast'; choose one of quantile, sinkhorn, transport"):
        make_ranker("fast", straight_through=False, noise=0.0)


def test_one_bin_and_one_element():
    for ranker in ALL:
        torch.testing.assert_close(ranker(normal(2, 9), 1, tau=0.1), torch.ones(2, 1, 9), atol=1e-4, rtol=0)
    for ranker in EXACT:
        torch.testing.assert_close(ranker(torch.ones(1, 1), 4, tau=0.1)[0, :, 0], torch.arange(1, 5) / 4)
