from __future__ import annotations

import shutil

import pytest
import torch
from conftest import build_classifier

from hf_aha.classifier_aha import FrozenClassifier
from hf_aha.metrics import TargetPasses
from hf_aha.metrics.passes import has_fast_bfloat16


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_logits_are_those_of_the_classifier(precision):
    classifier = FrozenClassifier(build_classifier("vit"))
    passes = TargetPasses(classifier, precision)
    expected = classifier(PIXELS).logits
    tolerance = 1e-6 if passes.precision == "float32" else 0.05
    torch.testing.assert_close(passes(PIXELS).float(), expected.detach(), rtol=0, atol=tolerance)
    assert passes.images == 2
    assert precision != "auto" or (passes.precision == "bfloat16") == has_fast_bfloat16(torch.device("cpu"))


def test_a_classifier_in_float16_is_called_in_float16():
    classifier = FrozenClassifier(build_classifier("vit").half())
    logits = TargetPasses(classifier)(PIXELS)
    assert logits.dtype == torch.float16 and torch.isfinite(logits).all()
    with pytest.raises(ValueError, match="load it in float32"):
        TargetPasses(classifier, "bfloat16")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="'half', but must be one of auto, float32, bfloat16"):
        TargetPasses(FrozenClassifier(build_classifier("vit")), "half")


def test_compiled_passes_serve_every_batch_size_with_the_same_numbers(compile_eagerly):
    classifier = FrozenClassifier(build_classifier("vit"))
    before = {name: weights.clone() for name, weights in classifier.state_dict().items()}
    plain, passes = TargetPasses(classifier, "float32"), TargetPasses(classifier, "float32", compiled=True)
    pixels = torch.randn(5, 3, 32, 32)
    for count in (2, 5, 1, 3):
        torch.testing.assert_close(passes(pixels[:count]), plain(pixels[:count]), atol=1e-5, rtol=1e-4)
    assert passes.images == 11, "what fills up a batch does not count"
    assert all(torch.equal(weights, before[name]) for name, weights in classifier.state_dict().items())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPUs")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_inductor_gives_the_same_numbers(precision):
    classifier = FrozenClassifier(build_classifier("vit"))
    plain, passes = TargetPasses(classifier, precision), TargetPasses(classifier, precision, compiled=True)
    atol = 1e-4 if precision == "float32" else 0.05
    torch.testing.assert_close(passes(PIXELS).float(), plain(PIXELS).float(), atol=atol, rtol=1e-3)
