"""The classes that a training step explains."""

from __future__ import annotations

import pytest
import torch

from hf_aha.training_classes import FIRST_CLASSES, SECOND_CLASSES, first_classes, second_classes


LOGITS = torch.tensor([[0.0, 2.0, 1.0]])


@pytest.mark.parametrize("kind", FIRST_CLASSES)
def test_the_class_explained_is_the_one_asked_for(kind):
    logits, labels, alone = LOGITS.expand(3000, -1), torch.full((3000,), 2), torch.zeros(3000, dtype=torch.long)
    drawn = first_classes(kind, logits, labels, torch.Generator().manual_seed(0), alone)
    shares = torch.bincount(drawn, minlength=3) / 3000
    one = {"predicted": [0, 1, 0], "label": [0, 0, 1], "alone": [1, 0, 0]}
    expected = one.get(kind, LOGITS[0].softmax(-1).tolist())
    assert shares.tolist() == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("kind", SECOND_CLASSES[1:])
def test_the_second_class_is_never_the_first(kind):
    logits, labels = torch.randn(200, 4), torch.randint(4, (200,))
    for first_kind in ("predicted", "label", "sampled"):
        first = first_classes(first_kind, logits, labels, torch.Generator().manual_seed(0))
        second = second_classes(kind, logits, labels, first)
        assert (second != first).all()
        others = logits.scatter(1, first[:, None], -100.0).argmax(1)
        takes_label = (labels != first) if kind == "label" else torch.zeros(200, dtype=torch.bool)
        assert torch.equal(second, torch.where(takes_label, labels, others))


def test_one_class_has_no_second():
    with pytest.raises(ValueError, match="has one class only"):
        second_classes("rival", torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, dtype=torch.long))
