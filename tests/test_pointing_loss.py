"""The loss that draws a map into the photographs of its class."""

from __future__ import annotations

import pytest
import torch

from hf_aha.pointing_loss import pointing_loss


def cells(which: int) -> torch.Tensor:
    inside = torch.zeros(2, 2, dtype=torch.bool)
    inside.view(-1)[which] = True
    return inside.repeat_interleave(4, 0).repeat_interleave(4, 1)


def test_it_is_the_negative_logarithm_of_the_softmax_inside():
    scores, inside = torch.randn(3, 8, 8), torch.stack([cells(k) for k in range(3)])
    z = (scores - scores.mean((1, 2), keepdim=True)) / scores.flatten(1).std(1, correction=0).view(-1, 1, 1)
    share = z.flatten(1).softmax(1).mul(inside.flatten(1)).sum(1)
    torch.testing.assert_close(pointing_loss(scores, inside), -share.log().mean())


def test_only_the_standardised_scores_matter_and_maps_inside_are_better():
    scores, inside = torch.randn(2, 8, 8), torch.stack([cells(0), cells(3)])
    torch.testing.assert_close(pointing_loss(scores * 50 - 7, inside), pointing_loss(scores, inside))
    assert pointing_loss(scores + inside.float(), inside) < pointing_loss(scores, inside)


@pytest.mark.parametrize("everywhere", [True, False])
def test_nothing_to_tell_apart_counts_as_zero_and_has_no_gradient(everywhere):
    scores = torch.randn(2, 8, 8, requires_grad=True)
    inside = torch.stack([cells(1), torch.full((8, 8), everywhere)])
    loss = pointing_loss(scores, inside)
    torch.testing.assert_close(loss, pointing_loss(scores[:1], inside[:1]) / 2)
    loss.backward()
    assert scores.grad.isfinite().all() and (scores.grad[1] == 0).all() and (scores.grad[0] != 0).any()


def test_a_constant_map_has_a_finite_gradient():
    scores = torch.full((1, 8, 8), 3.0, requires_grad=True)
    pointing_loss(scores, cells(2)[None]).backward()
    assert scores.grad.isfinite().all()
