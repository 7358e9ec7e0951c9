"""The classifier's training passes: the same numbers with less memory or a compiler, and dropout always off."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_aha import AhaExplainer
from hf_aha.classifier_aha import FrozenClassifier
from hf_aha.differentiable_passes import DifferentiablePasses, enable_checkpointing


def bfloat16() -> contextlib.AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)


def logits_and_gradient(passes, seed: int = 0, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, 3, side, side, generator=generator).requires_grad_()
    logits = passes(pixels)
    (logits.float() * torch.arange(logits.shape[-1])).sum().backward()
    return logits.detach(), pixels.grad


@pytest.fixture
def with_dropout(model):
    """A classifier of every family whose dropouts would show, were any of them on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        for name in ("attention_dropout", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    return FrozenClassifier(model)


@pytest.mark.parametrize("autocast", [contextlib.nullcontext, bfloat16])
def test_checkpointing_changes_no_bit_and_turns_no_dropout_on(with_dropout, autocast):
    plain = logits_and_gradient(DifferentiablePasses(with_dropout, autocast))
    passes = DifferentiablePasses(with_dropout, autocast, gradient_checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(logits_and_gradient(passes), plain, strict=True))
    # The state outside of a pass is as it was.
    assert not any(module.training for module in with_dropout.model.modules())
    assert not any(parameter.requires_grad for parameter in with_dropout.model.parameters())
    with torch.no_grad():
        assert torch.equal(
            passes(torch.ones(1, 3, 32, 32)), DifferentiablePasses(with_dropout, autocast)(torch.ones(1, 3, 32, 32))
        )


def test_checkpointed_blocks_run_again_in_the_backward_pass(make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    blocks = [m for m in classifier.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    runs = []
    for block in blocks:
        # Inside the block, which checkpointing runs again; a hook on the block itself is not.
        next(block.children()).register_forward_hook(lambda *_: runs.append(1))
    for checkpointing, expected in ((False, 1), (True, 2)):
        runs.clear()
        logits_and_gradient(
            DifferentiablePasses(classifier, contextlib.nullcontext, gradient_checkpointing=checkpointing)
        )
        assert len(runs) == expected * len(blocks) == expected * 4


def test_a_pass_that_fails_leaves_the_blocks_in_evaluation_mode(make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    passes = DifferentiablePasses(classifier, contextlib.nullcontext, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="both sides must be multiples"):
        passes(torch.zeros(1, 3, 33, 32))
    assert not any(module.training for module in classifier.model.modules())


def test_a_model_that_cannot_checkpoint_is_refused(make_classifier):
    model = make_classifier("vit")
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="ViTForImageClassification does not support gradient checkpointing; set"):
        DifferentiablePasses(FrozenClassifier(model), contextlib.nullcontext, gradient_checkpointing=True)


def test_the_decoder_checkpoints_in_training_with_the_same_gradient(make_classifier):
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    explainer = AhaExplainer.from_classifier(make_classifier("vit"), image_processor=processor, grid_width=16)
    pixels = torch.randn(2, 3, 32, 32)
    tokens, logits = explainer.features(pixels)
    vectors = explainer.classifier.class_vectors(logits.argmax(-1))
    found, runs = [], []
    explainer.decoder.half_block.expand.register_forward_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(explainer)
        explainer.train()
        explainer.zero_grad()
        explainer.decoder(tokens, pixels, vectors).square().sum().backward()
        found.append([parameter.grad for parameter in explainer.decoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(runs) == 1 + 2, "once without, and twice with checkpointing"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_passes_give_the_same_numbers(make_classifier, checkpointing):
    classifier = FrozenClassifier(make_classifier("vit"))
    plain = logits_and_gradient(DifferentiablePasses(classifier, contextlib.nullcontext))
    passes = DifferentiablePasses(
        classifier, contextlib.nullcontext, gradient_checkpointing=checkpointing, compile_backend="eager"
    )
    for mine, theirs in zip(logits_and_gradient(passes), plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_another_batch_and_image_size_compile_too(make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    compiled = DifferentiablePasses(classifier, contextlib.nullcontext, compile_backend="eager")
    for count, side in ((2, 32), (3, 32), (2, 48)):
        pixels = torch.randn(count, 3, side, side)
        torch.testing.assert_close(compiled(pixels), classifier(pixels).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on CPUs")
def test_inductor_gives_the_same_numbers(make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    plain = logits_and_gradient(DifferentiablePasses(classifier, contextlib.nullcontext))
    compiled = DifferentiablePasses(classifier, contextlib.nullcontext, compile_backend="inductor")
    for mine, theirs in zip(logits_and_gradient(compiled), plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_an_unknown_backend_is_refused_with_the_known_ones(make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    with pytest.raises(ValueError, match="torch_compile_backend must be one of .*inductor.*, but it is 'inductr'"):
        DifferentiablePasses(classifier, contextlib.nullcontext, compile_backend="inductr")
