"""Every baseline: its contract on every family, its cost, known answers, and what is ours computed a second time.

Methods of other libraries are marked `bench`; they run with `make bench`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_aha import FrozenClassifier, UnsupportedClassifierError
from hf_aha.baselines import METHODS, RANDOM_SEEDS, Method, MissingLibraryError, Passes, get_method, methods_table
from hf_aha.baselines.base import ClassifierOutput, baseline_image
from hf_aha.baselines.copies import attention_weights, private_copy, read_tokens
from hf_aha.classifier_aha import blocks_name


ROOT = Path(__file__).resolve().parents[1]

# Small enough for tiny models; uneven numbers, so that the last batch is a short one.
CHEAP = {
    "integrated-gradients-zero": {"steps": 6},
    "integrated-gradients-blur": {"steps": 6},
    "smoothgrad": {"samples": 5},
    "gradient-shap": {"samples": 7},
    "kernel-shap": {"samples": 30},
    "rise": {"masks": 11, "cells": 3},
    "patch-search": {"beam": 2},
}
OURS = [name for name, method in METHODS.items() if method.library is None]
NAMES = [name if name in OURS else pytest.param(name, marks=pytest.mark.bench) for name in METHODS]


def cheap(name: str) -> Method:
    # Of three images, the last then makes a batch of its own.
    return get_method(name, max_batch=4 if METHODS[name].one_by_one else 2, **CHEAP.get(name, {}))


def image_size(name: str) -> tuple[int, int]:
    """Few patches for the search, which walks through them one by one."""
    return (16, 24) if name == "patch-search" else (32, 48)


def images(count: int = 2, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(7))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    scale = expected.abs().max().clamp(min=1e-12)
    assert found.shape == expected.shape and ((found - expected).abs().max() <= tolerance * scale)


def linear_classifier(make_classifier, labels: int = 3) -> FrozenClassifier:
    """A CLIP classifier whose logits are affine in the pixels: no norm before the blocks, blocks that add nothing."""
    model = make_classifier("clip", num_labels=labels)
    model.vision_model.pre_layrnorm = nn.Identity()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "out_proj" in name or "fc2" in name:
                parameter.zero_()
            if "patch_embedding" in name or name.startswith("classifier"):
                parameter.mul_(4)
    return FrozenClassifier(model)


def weights_of(classifier: FrozenClassifier, target: int, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    """d logit / d pixels (3, H, W) of an affine classifier."""
    pixels = torch.zeros(1, 3, *size, requires_grad=True)
    return torch.autograd.grad(classifier(pixels).logits[0, target], pixels)[0][0]


def patch_sums(values: torch.Tensor, patch: int = 8) -> torch.Tensor:
    """(H, W) -> (gh, gw) sums."""
    return values.unfold(0, patch, patch).unfold(1, patch, patch).sum((-1, -2))


def spread(patches: torch.Tensor, patch: int = 8) -> torch.Tensor:
    return patches.repeat_interleave(patch, 0).repeat_interleave(patch, 1)


def footprint(model: nn.Module) -> dict[str, object]:
    """All of a model that a method could leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "attention": model.config._attn_implementation,
        "classes": [type(module) for module in model.modules()],
        "outputs": [model.config.output_attentions, model.config.output_hidden_states],
    }


def assert_same_footprint(before: dict[str, object], after: dict[str, object]) -> None:
    states = before.pop("state"), after.pop("state")
    assert before == after
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


# ------------------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("name", NAMES)
def test_passes_in_bfloat16_give_nearly_the_same_order(name, make_classifier):
    method, classifier = cheap(name), FrozenClassifier(make_classifier("vit"))
    pixels, target = images(2, image_size(name)), torch.tensor([0, 4])
    exact = method(classifier, pixels, target)
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(classifier, pixels, target)
    assert rough.dtype == torch.float32
    # The search compares nearly equal numbers, so that its order may change; Eigen-CAM's sign is arbitrary.
    if name not in ("patch-search", "eigen-cam"):
        for one, other in zip(rough.flatten(1), exact.flatten(1), strict=True):
            assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_every_family_and_nothing_else_changes(name, model):
    method, classifier = cheap(name), FrozenClassifier(model)
    size = image_size(name)
    pixels, target = images(3, size), torch.tensor([0, 4, 2])
    untouched, before, state = pixels.clone(), footprint(model), torch.get_rng_state()
    scores = method(classifier, pixels, target)
    assert scores.shape == (3, *size) and scores.dtype == torch.float32 and not scores.requires_grad
    assert torch.isfinite(scores).all() and (scores.flatten(1).amax(1) > scores.flatten(1).amin(1)).all()
    assert method.signed or scores.min() >= 0
    assert_same_footprint(before, footprint(model))
    assert torch.equal(pixels, untouched) and not pixels.requires_grad and pixels.grad is None
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert torch.equal(method(classifier, pixels, target), scores), "the same call gives other scores"
    alone = torch.cat([method(classifier, pixels[i : i + 1], target[i : i + 1]) for i in range(3)])
    close(scores, alone)


@pytest.mark.parametrize("name", NAMES)
def test_scores_depend_on_the_class_only_where_that_is_said(name, make_classifier):
    method, classifier = cheap(name), FrozenClassifier(make_classifier("vit"))
    pixels = images(1).expand(2, -1, -1, -1)
    first, second = method(classifier, pixels, torch.tensor([0, 3]))
    # Rows of one batch may round differently; scores of another class differ by far more.
    assert torch.allclose(first, second) != method.class_specific


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_under_no_grad_and_inference_mode(name, make_classifier):
    method, classifier = cheap(name), FrozenClassifier(make_classifier("vit"))
    pixels, target = images(1), torch.tensor([1])
    expected = method(classifier, pixels, target)
    with torch.no_grad():
        assert torch.equal(method(classifier, pixels, target), expected) and not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torch.equal(method(classifier, images(1), target), expected) and torch.is_inference_mode_enabled()
    assert torch.equal(method(classifier, pixels.clone().requires_grad_(), target), expected)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_classifier_gives_float32_scores(name, make_classifier):
    classifier = FrozenClassifier(make_classifier("vit").to(torch.bfloat16))
    scores = cheap(name)(classifier, images(1), torch.tensor([1]))
    assert scores.dtype == torch.float32 and torch.isfinite(scores).all()
    assert classifier.model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_passes_are_those_that_the_classifier_sees(name, make_classifier):
    model = make_classifier("vit")
    seen = {"forward": 0, "backward": 0}

    def count(module: nn.Module, args: tuple, output) -> None:
        seen["forward"] += len(output.logits)
        if output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: seen.update(backward=seen["backward"] + len(gradient)))

    model.register_forward_hook(count)
    method, classifier = cheap(name), FrozenClassifier(model)
    method(classifier, images(2), torch.tensor([0, 1]))
    expected = method.passes(classifier.grid(32, 48), classifier.hidden_size)
    assert Passes(seen["forward"] // 2, seen["backward"] // 2) == expected


@pytest.mark.parametrize("name", OURS)
def test_no_image_gives_no_scores(name, make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    empty = cheap(name)(classifier, images(0), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0, 32, 48) and empty.dtype == torch.float32


@pytest.mark.parametrize(
    ("pixels", "target", "message"),
    [
        (torch.zeros(1, 1, 32, 32), torch.tensor([0]), "pixel_values has shape"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([0]), "must be floating"),
        (torch.zeros(1, 3, 32, 33), torch.tensor([0]), "multiples of the 8 x 8 patch"),
        (torch.full((1, 3, 32, 32), torch.nan), torch.tensor([0]), "NaN or infinite"),
        (torch.zeros(2, 3, 32, 32), torch.tensor([0]), r"must be \(2,\) integers"),
        (torch.zeros(1, 3, 32, 32), torch.tensor([0.0]), "integers, one class an image"),
        (torch.zeros(1, 3, 32, 32), torch.tensor([5]), "classes 0 to 4"),
    ],
)
def test_what_cannot_be_explained_is_refused(pixels, target, message, make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    with pytest.raises(ValueError, match=message):
        get_method("random")(classifier, pixels, target)


def test_a_bare_model_is_refused(make_classifier):
    with pytest.raises(TypeError, match=r"FrozenClassifier\(model\)"):
        get_method("random")(make_classifier("vit"), images(1), torch.tensor([0]))


# ------------------------------------------------------------------------------------------------ the registry


def test_registry_holds_what_was_promised():
    assert len(METHODS) == 19 and all(name == method.name for name, method in METHODS.items())
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert {method.library for method in METHODS.values()} == {None, "captum", "grad-cam"}
    with pytest.raises(TypeError):
        METHODS["mine"] = METHODS["random"]


def test_settings_change_a_method_and_its_cost():
    method = get_method("integrated-gradients-blur", steps=16)
    assert method.passes() == (16, 16) and METHODS[method.name].steps == 50
    assert get_method("score-cam").passes(width=384) == (385, 0)
    assert get_method("occlusion").passes((16, 16)) == (257, 0)
    assert get_method("occlusion", window=3).passes((14, 14)).forward == 1 + 12 * 12
    assert get_method("patch-search", beam=1000).passes((4, 4)).forward == 2 + 16 + 16 * 17 // 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: get_method("gradcam"), ValueError, "did you mean 'grad-cam'"),
        (lambda: get_method("quite other"), ValueError, "The methods are random, centre"),
        (lambda: get_method("rise", mask=3), TypeError, "did you mean 'masks'"),
        (lambda: get_method("rise", masks=0), ValueError, "masks is 0"),
        (lambda: get_method("rise", keep=1.0), ValueError, "between 0 and 1"),
        (lambda: get_method("integrated-gradients-zero", baseline="black"), ValueError, "one of zero, blur"),
        (lambda: get_method("saliency", output="score"), ValueError, "one of probability, logit"),
        (lambda: get_method("random", max_batch=0), ValueError, "max_batch is 0"),
    ],
)
def test_wrong_names_and_settings_are_one_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("name", "module"), [("saliency", "captum"), ("grad-cam", "pytorch_grad_cam")])
def test_a_missing_library_is_named_with_the_cure(name, module, make_classifier, monkeypatch):
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingLibraryError, match=r"pip install hf-aha\[bench\]"):
        get_method(name)(FrozenClassifier(make_classifier("vit")), images(1), torch.tensor([0]))


def test_the_page_holds_the_table_of_the_registry():
    text = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")
    assert methods_table() in text, "write methods_table() into docs/baselines.md"


def test_bench_constraints_pin_what_the_bench_environment_installs():
    def pins(name: str) -> dict[str, str]:
        lines = re.findall(r"^([\w.-]+)==(\S+?)(?:;.*)?$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        return {package.lower().replace("_", "-"): version for package, version in lines}

    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|dev|bench) = \[(.*?)\]", pyproject, re.MULTILINE | re.DOTALL)
    wanted = {name for text in lists for name in re.findall(r'"([\w-]+)[<>=]', text)}
    bench, light = pins("constraints-bench.txt"), pins("constraints.txt")
    assert len(lists) == 3 and wanted <= set(bench)
    # torch alone differs: the torchvision that the CAM library needs loads beside no CPU build.
    assert {name for name in bench.keys() & light.keys() if bench[name] != light[name]} == {"torch"}


# ------------------------------------------------------------------------------------------------ copies and attention


def test_private_copy_shares_weights_and_nothing_else(model):
    classifier = FrozenClassifier(model)
    copied = private_copy(classifier)
    assert all(a is b for a, b in zip(copied.model.parameters(), model.parameters(), strict=True))
    own = {id(module) for module in model.modules()} & {id(module) for module in copied.model.modules()}
    assert not own and copied.model.config is not model.config
    assert torch.equal(copied(images()).logits, classifier(images()).logits)


def test_attention_weights_are_those_of_an_eager_model(family, make_classifier):
    eager = make_classifier(family, attn_implementation="eager")
    expected = eager(images(2, (32, 32)), output_attentions=True).attentions
    weights, logits = attention_weights(FrozenClassifier(make_classifier(family)), images(2, (32, 32)))
    assert len(weights) == len(expected) == 4
    for found, wanted in zip(weights, expected, strict=True):
        close(found, wanted)
        close(found.sum(-1), torch.ones(found.shape[:-1]))
    close(logits, eager(images(2, (32, 32))).logits)


def test_read_tokens_are_the_tokens_with_a_gradient(model):
    classifier = FrozenClassifier(model)
    kept = []
    block = model.get_submodule(blocks_name(model, model))[-1]
    block.register_forward_hook(lambda _, args, output: kept.append(output if torch.is_tensor(output) else output[0]))
    logits = classifier(images(1).requires_grad_()).logits
    gradient = torch.autograd.grad(logits[0, 1], kept[0])[0][0].norm(dim=-1)
    weights = read_tokens(classifier, len(gradient))
    assert float(weights.sum()) == pytest.approx(1)
    assert torch.equal(weights > 0, gradient > 1e-7 * gradient.max())


def test_a_model_without_attention_weights_is_refused(make_classifier):
    model = make_classifier("vit")
    plain = model.forward
    model.forward = lambda pixel_values, output_attentions=False, **kwargs: plain(pixel_values, **kwargs)
    with pytest.raises(UnsupportedClassifierError, match="gave no attention weights"):
        cheap("attention-rollout")(FrozenClassifier(model), images(1), torch.tensor([0]))


def readout_by_hand(family: str, tokens: int, patches: int) -> torch.Tensor:
    row, mean = torch.zeros(tokens), torch.zeros(tokens)
    mean[tokens - patches :] = 1 / patches
    row[0] = 1
    if family == "deit-teacher":
        row[:2] = 0.5
    if family.startswith("dinov2"):
        return (row + mean) / 2
    return mean if family in ("beit", "data2vec-vision", "ijepa", "siglip", "clip") else row


def test_rollout_equals_the_product_of_matrices(family, make_classifier):
    eager = make_classifier(family, attn_implementation="eager")
    pixels = images(2, (32, 32))
    scores = cheap("attention-rollout")(FrozenClassifier(make_classifier(family)), pixels, torch.tensor([0, 1]))
    for i in range(2):
        product = None
        for attention in eager(pixels[i : i + 1], output_attentions=True).attentions:
            mixed = (attention[0].mean(0) + torch.eye(attention.shape[-1])) / 2
            product = mixed if product is None else mixed @ product
        patches = (readout_by_hand(family, len(product), 16) @ product)[-16:].view(1, 1, 4, 4)
        close(scores[i], nn.functional.interpolate(patches, scale_factor=8, mode="bilinear")[0, 0])


def test_relevance_equals_the_update_rule(family, make_classifier):
    eager = make_classifier(family, attn_implementation="eager")
    pixels, target = images(2, (32, 32)), [3, 1]
    scores = cheap("relevance")(FrozenClassifier(make_classifier(family)), pixels, torch.tensor(target))
    for i in range(2):
        output = eager(pixels[i : i + 1], output_attentions=True)
        gradients = torch.autograd.grad(output.logits[0, target[i]], output.attentions)
        relevance = torch.eye(output.attentions[0].shape[-1])
        for attention, gradient in zip(output.attentions, gradients, strict=True):
            relevance = relevance + torch.relu(attention[0] * gradient[0]).mean(0) @ relevance
        patches = (readout_by_hand(family, len(relevance), 16) @ relevance)[-16:].view(1, 1, 4, 4)
        close(scores[i], nn.functional.interpolate(patches, scale_factor=8, mode="bilinear")[0, 0].detach())


# ------------------------------------------------------------------------------------------------ RISE


def test_rise_equals_its_sum(make_classifier):
    classifier = FrozenClassifier(make_classifier("dinov2"))
    method = get_method("rise", masks=9, cells=3, keep=0.3, seed=4, max_batch=4)
    pixels, target = images(1), torch.tensor([2])
    generator = torch.Generator().manual_seed(4)
    drawn = torch.cat([method.draw_masks(count, (32, 48), generator) for count in (4, 4, 1)])
    expected = torch.zeros(32, 48)
    for mask in drawn:
        with torch.no_grad():
            expected += classifier(pixels * mask).logits.softmax(-1)[0, 2] * mask
    close(method(classifier, pixels, target)[0], expected / (9 * 0.3))


def test_rise_masks_are_shifted_smooth_grids_with_the_asked_mean():
    method = get_method("rise", cells=4, keep=0.3)
    masks = method.draw_masks(3000, (32, 64), torch.Generator().manual_seed(0))
    assert masks.shape == (3000, 32, 64) and masks.min() == 0 and masks.max() == 1
    assert float(masks.mean()) == pytest.approx(0.3, abs=0.01)
    # Every pixel is shown as often as any other, so that the map has no grid of its own.
    assert float((masks.mean(0) - 0.3).abs().max()) < 0.05
    # Bilinear between cells of 8 x 16 pixels.
    assert float(masks.diff(dim=1).abs().max()) <= 1 / 8 + 1e-6
    assert float(masks.diff(dim=2).abs().max()) <= 1 / 16 + 1e-6
    other = method.draw_masks(3000, (32, 64), torch.Generator().manual_seed(1))
    assert not torch.equal(masks, other)


def test_rise_finds_the_only_patch_that_counts(make_classifier):
    classifier = linear_classifier(make_classifier)
    pixels, inside = torch.zeros(1, 3, 32, 32), (slice(16, 24), slice(8, 16))
    pixels[0, :, inside[0], inside[1]] = weights_of(classifier, 1)[:, inside[0], inside[1]].sign()
    scores = get_method("rise", masks=400, cells=4, max_batch=200)(classifier, pixels, torch.tensor([1]))[0]
    assert patch_sums(scores).flatten().argmax() == 2 * 4 + 1
    assert scores[inside].mean() > scores.mean() + 2 * scores.std()


# ------------------------------------------------------------------------------------------------ patch search


def test_patch_search_on_a_linear_classifier_is_the_order_of_contributions(make_classifier):
    classifier = linear_classifier(make_classifier, labels=2)
    pixels = images(2, (32, 32))
    settings = {"insertion_baseline": "zero", "deletion_baseline": "zero"}
    # With two classes the probability rises with the difference of the logits, which is a sum over patches.
    difference = weights_of(classifier, 1) - weights_of(classifier, 0)
    contribution = torch.stack([patch_sums((difference * image).sum(0)) for image in pixels])
    for beam in (16, 3):
        scores = get_method("patch-search", beam=beam, **settings)(classifier, pixels, torch.tensor([1, 1]))
        for i in range(2):
            assert torch.equal(scores[i], spread(scores[i][::8, ::8])), "a patch has more than one score"
            order = scores[i][::8, ::8].flatten().argsort(descending=True)
            # Insertion ends before any patch that speaks against the class, from where deletion goes on.
            assert torch.equal(order, contribution[i].flatten().argsort(descending=True))


def search_by_hand(logits_of, pixels, target, beam, cutoff):
    """The three steps of the docstring, one image at a time: patch numbers, the most important first."""

    def p(image):
        with torch.no_grad():
            return float(logits_of(image[None]).softmax(-1)[0, target])

    def put(canvas, patch, source):
        row, column = divmod(patch, 4)
        made = canvas.clone()
        made[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = source[
            :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8
        ]
        return made

    zero, blur = torch.zeros_like(pixels), baseline_image(pixels[None], "blur")[0]
    drops = [p(put(pixels, patch, zero)) for patch in range(16)]
    left = sorted(range(16), key=lambda patch: drops[patch])
    canvas, order = blur, []
    start, goal = p(blur), p(pixels)
    while left and p(canvas) - start < cutoff * (goal - start):
        best = max(left[:beam], key=lambda patch: p(put(canvas, patch, pixels)))
        left.remove(best)
        order.append(best)
        canvas = put(canvas, best, pixels)
    canvas, tail = zero, []
    while left:
        worst = min(left[-beam:], key=lambda patch: p(put(canvas, patch, pixels)))
        left.remove(worst)
        tail.insert(0, worst)
        canvas = put(canvas, worst, pixels)
    return order, tail


def test_patch_search_equals_the_steps_by_hand(make_classifier):
    model = make_classifier("vit")
    with torch.no_grad():
        model.classifier.weight.mul_(6)
    method = get_method("patch-search", beam=4, cutoff=0.6, max_batch=3)
    pixels = images(6, (32, 32))
    target = model(pixels).logits.argmax(-1)
    scores = method(FrozenClassifier(model), pixels, target)
    lengths = set()
    for i in range(6):
        order, tail = search_by_hand(lambda x: model(x).logits, pixels[i], int(target[i]), 4, 0.6)
        assert scores[i][::8, ::8].flatten().argsort(descending=True).tolist() == order + tail
        lengths.add((bool(order), bool(tail)))
    assert (True, True) in lengths, "no image used both searches"


# ------------------------------------------------------------------------------------------------ random and centre


def test_random_orders_are_uniform_and_five():
    classifier = FrozenClassifier(_tiny())
    pixels, target = images(2), torch.tensor([0, 0])
    five = get_method("random").repeats()
    assert [method.seed for method in five] == list(RANDOM_SEEDS) and len(five) == 5
    maps = torch.stack([method(classifier, pixels, target)[0] for method in five])
    assert len(torch.unique(maps)) > 0.99 * maps.numel()
    correlation = torch.corrcoef(maps.flatten(1)) - torch.eye(5)
    assert float(correlation.abs().max()) < 0.15
    assert METHODS["rise"].repeats() == (METHODS["rise"],)


def test_centre_falls_from_the_middle(make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    scores = get_method("centre", sigma=0.2)(classifier, images(1), torch.tensor([0]))[0]
    y, x = torch.meshgrid((torch.arange(32) + 0.5) / 32 - 0.5, (torch.arange(48) + 0.5) / 48 - 0.5, indexing="ij")
    close(scores, torch.exp(-(x**2 + y**2) / (2 * 0.2**2)))


def _tiny():
    from conftest import build_classifier

    return build_classifier("vit")


# ------------------------------------------------------------------------------------------------ captum


@pytest.mark.bench
def test_gradient_methods_equal_autograd(make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    pixels, target = images(2).requires_grad_(), torch.tensor([2, 0])
    for output in ("probability", "logit"):
        chosen = ClassifierOutput(classifier, output)(pixels).gather(1, target[:, None]).sum()
        gradient = torch.autograd.grad(chosen, pixels)[0]
        close(get_method("saliency", output=output)(classifier, pixels, target), gradient.abs().amax(1))
        expected = (gradient * pixels).sum(1).detach()
        close(get_method("input-x-gradient", output=output)(classifier, pixels, target), expected)


@pytest.mark.bench
@pytest.mark.parametrize("baseline", ["zero", "blur"])
def test_integrated_gradients_are_complete_and_exact_on_a_linear_classifier(baseline, make_classifier):
    linear, pixels = linear_classifier(make_classifier), images(2, (32, 32))
    difference = pixels - baseline_image(pixels, baseline)
    method = get_method(f"integrated-gradients-{baseline}", output="logit", steps=3)
    expected = torch.stack([(weights_of(linear, c) * d).sum(0) for c, d in zip((2, 1), difference, strict=True)])
    close(method(linear, pixels, torch.tensor([2, 1])), expected)
    vit = FrozenClassifier(make_classifier("vit"))
    method = get_method(f"integrated-gradients-{baseline}", steps=60)
    with torch.no_grad():
        ends = [vit(x).logits.softmax(-1)[:, 2] for x in (pixels, baseline_image(pixels, baseline))]
    total = method(vit, pixels, torch.tensor([2, 2])).sum((1, 2))
    assert total.tolist() == pytest.approx((ends[0] - ends[1]).tolist(), abs=2e-3)


@pytest.mark.bench
def test_smoothgrad_and_gradient_shap_on_a_linear_classifier(make_classifier):
    linear, pixels = linear_classifier(make_classifier), images(1, (32, 32))
    weights = weights_of(linear, 1)
    smooth = get_method("smoothgrad", output="logit", samples=3)(linear, pixels, torch.tensor([1]))
    close(smooth[0], weights.abs().amax(0))
    shap = get_method("gradient-shap", output="logit", samples=9, max_batch=4)(linear, pixels, torch.tensor([1]))[0]
    zero, blur = ((weights * (pixels - baseline_image(pixels, kind))[0]).sum(0) for kind in ("zero", "blur"))
    share = float(((shap - zero) * (blur - zero)).sum() / (blur - zero).square().sum()) * 9
    # Of nine draws, a whole number took the blurred baseline, and not all of them the same.
    assert share == pytest.approx(round(share), abs=1e-3) and 0 < round(share) < 9
    close(shap, zero + (blur - zero) * round(share) / 9)


@pytest.mark.bench
@pytest.mark.parametrize("baseline", ["zero", "blur"])
def test_occlusion_and_kernel_shap_find_the_contributions_of_patches(baseline, make_classifier):
    linear, pixels = linear_classifier(make_classifier), images(1, (32, 32))
    contribution = patch_sums((weights_of(linear, 1) * (pixels - baseline_image(pixels, baseline))[0]).sum(0))
    settings = {"output": "logit", "baseline": baseline}
    target = torch.tensor([1])
    close(get_method("occlusion", **settings)(linear, pixels, target)[0], spread(contribution))
    shap = get_method("kernel-shap", samples=100, **settings)(linear, pixels, target)[0]
    close(shap, spread(contribution), 1e-3)


@pytest.mark.bench
def test_occlusion_averages_the_windows_over_a_pixel(make_classifier):
    linear, pixels = linear_classifier(make_classifier), images(1, (32, 32))
    contribution = patch_sums((weights_of(linear, 1) * pixels[0]).sum(0))
    total, windows = torch.zeros(4, 4), torch.zeros(4, 4)
    for row in range(3):
        for column in range(3):
            total[row : row + 2, column : column + 2] += contribution[row : row + 2, column : column + 2].sum()
            windows[row : row + 2, column : column + 2] += 1
    scores = get_method("occlusion", output="logit", window=2)(linear, pixels, torch.tensor([1]))[0]
    close(scores, spread(total / windows))


@pytest.mark.bench
@pytest.mark.parametrize("name", ["smoothgrad", "gradient-shap", "kernel-shap"])
def test_a_seed_changes_sampled_methods(name, make_classifier):
    classifier = FrozenClassifier(make_classifier("vit"))
    maps = [dataclasses.replace(cheap(name), seed=seed)(classifier, images(1), torch.tensor([0])) for seed in (0, 1)]
    assert not torch.equal(*maps)


# ------------------------------------------------------------------------------------------------ activation maps


def activations_and_gradients(model, pixels, target):
    """Tokens before the attention of the last block and the gradient of the logit, (D, gh, gw) of patches only."""
    block = model.get_submodule(blocks_name(model, model))[-1]
    names = ("layernorm_before", "norm1", "layer_norm1")
    norm = next(child for name, child in block.named_children() if name in names)
    kept = []
    handle = norm.register_forward_hook(lambda module, args, output: kept.append(output))
    logits = FrozenClassifier(model)(pixels.clone().requires_grad_()).logits
    handle.remove()
    gradient = torch.autograd.grad(logits[0, target], kept[0])[0]
    rows, columns = pixels.shape[-2] // 8, pixels.shape[-1] // 8
    return [t[0, -rows * columns :].T.reshape(-1, rows, columns).detach() for t in (kept[0], gradient)]


def shown_as_cam(patches: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    cam = patches.clamp(min=0)
    cam = (cam - cam.min()) / (cam.max() - cam.min() + 1e-7)
    cam = nn.functional.interpolate(cam[None, None], size=size, mode="bilinear")[0, 0]
    return (cam - cam.min()) / (cam.max() - cam.min() + 1e-7)


@pytest.mark.bench
def test_cams_equal_their_formulas_on_every_family(family, make_classifier):
    model = make_classifier(family)
    classifier, pixels = FrozenClassifier(model), images(1)
    activations, gradient = activations_and_gradients(model, pixels, 3)
    target = torch.tensor([3])
    grad_cam = (activations * gradient.mean((1, 2), keepdim=True)).sum(0)
    close(get_method("grad-cam")(classifier, pixels, target)[0], shown_as_cam(grad_cam, (32, 48)), 2e-3)
    layer_cam = (activations * gradient.clamp(min=0)).sum(0)
    close(get_method("layer-cam")(classifier, pixels, target)[0], shown_as_cam(layer_cam, (32, 48)), 2e-3)


@pytest.mark.bench
def test_eigen_cam_is_the_first_component_up_to_its_sign(make_classifier):
    model = make_classifier("dinov2_with_registers")
    activations, _ = activations_and_gradients(model, images(1), 0)
    tokens = activations.flatten(1).T
    left, size, _ = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    component = (left[:, 0] * size[0]).view(4, 6)
    found = get_method("eigen-cam")(FrozenClassifier(model), images(1), torch.tensor([0]))[0]
    expected = [shown_as_cam(sign * component, (32, 48)) for sign in (1, -1)]
    assert min(float((found - map_).abs().max()) for map_ in expected) < 1e-3


@pytest.mark.bench
def test_score_cam_shows_no_bar_and_weighs_channels_by_their_logits(make_classifier, capfd):
    model = make_classifier("vit")
    activations, _ = activations_and_gradients(model, images(1), 3)
    found = get_method("score-cam", max_batch=5)(FrozenClassifier(model), images(1), torch.tensor([3]))[0]
    assert capfd.readouterr().err == ""
    masks = nn.functional.interpolate(activations[None], size=(32, 48), mode="bilinear", align_corners=True)[0]
    low, high = (getattr(masks.flatten(1), side)(1)[:, None, None] for side in ("amin", "amax"))
    with torch.no_grad():
        logits = FrozenClassifier(model)(images(1) * ((masks - low) / (high - low))[:, None]).logits[:, 3]
    cam = (activations * logits.softmax(0)[:, None, None]).sum(0)
    close(found, shown_as_cam(cam, (32, 48)), 2e-3)
