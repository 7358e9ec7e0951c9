from __future__ import annotations

import warnings

import pytest
import torch

from hf_aha.finite_steps import FiniteSteps, poisoned


NAN, INF, ONE = (torch.tensor(value) for value in (float("nan"), float("inf"), 1.0))


def test_steps_in_a_row_are_limited_and_not_their_sum():
    steps = FiniteSteps(limit=3, announce=False)
    for step in range(0, 20, 3):
        assert not steps.take(step, NAN) and not steps.take(step + 1, INF)
        assert steps.take(step + 2, ONE) and steps.in_a_row == 0
    assert steps.skipped == 14
    assert not steps.take(21, NAN) and not steps.take(22, NAN)
    told = "NaN or infinity in the gradient at step 23, the last of 3 such steps in a row; lower the learning rate"
    with pytest.raises(FloatingPointError, match=told):
        steps.take(23, NAN)


@pytest.mark.parametrize("first", ["scores", "loss"])
def test_the_first_thing_found_is_named_once(first):
    steps = FiniteSteps(limit=5)
    assert steps.check("scores", ONE)
    assert not steps.check(first, torch.tensor([1.0, float("-inf")])) and not steps.check("loss", NAN)
    with pytest.warns(UserWarning, match=rf"Step 7 is left out because of NaN or infinity in the {first} \(1 in"):
        assert not steps.take(7, NAN)
    with pytest.warns(UserWarning, match="in the gradient"):
        assert not steps.take(8, NAN)


def test_a_process_whose_own_loss_was_finite_says_nothing_unless_asked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not FiniteSteps(limit=5, announce=False).take(0, NAN)


def test_without_a_norm_what_the_process_saw_counts():
    steps = FiniteSteps(limit=2, announce=False)
    assert steps.take(0, None)
    steps.check("loss", NAN)
    assert not steps.take(1, None) and steps.take(2, None)


def test_poison_reaches_every_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    poisoned(model(torch.randn(5, 3))).backward()
    assert all(parameter.grad.isnan().all() for parameter in model[2].parameters())
    assert all(parameter.grad.isnan().any() for parameter in model.parameters())
