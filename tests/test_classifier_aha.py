"""The frozen classifier against the models it wraps: every supported family, and what it refuses."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_aha.classifier_aha import (
    FINGERPRINT_TOLERANCE,
    FrozenClassifier,
    UnsupportedClassifierError,
    _fingerprint_images,
    _fingerprint_matrix,
    fingerprint_distance,
    supported_model_types,
)


PREFIX_TOKENS = {
    "vit": 1,
    "deit": 2,
    "deit-teacher": 2,
    "beit": 1,
    "data2vec-vision": 1,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "vit_msn": 1,
    "ijepa": 0,
    "siglip": 0,
    "clip": 1,
}
# Families that take another size only when told to interpolate their positions.
STRICT = {"vit", "deit", "deit-teacher", "vit_msn", "ijepa", "siglip", "clip"}


def pixels(height: int = 32, width: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width)


def plain_logits(model: PreTrainedModel, images: torch.Tensor, **arguments: bool) -> torch.Tensor:
    # Without no_grad, attention under a trainable position bias (BEiT) picks another kernel and other last bits.
    with torch.no_grad():
        return model(images, **arguments).logits


def heads_of(model: PreTrainedModel) -> list[nn.Linear]:
    if hasattr(model, "cls_classifier"):
        return [model.cls_classifier, model.distillation_classifier]
    return [model.classifier]


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def perturbed(model: PreTrainedModel, part: str, share: float) -> PreTrainedModel:
    """A copy with noise of `share` of each weight's spread on the parameters whose name holds `part`."""
    model = copy.deepcopy(model)
    touched = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name and parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * share)
                touched += 1
    assert touched
    return model


# What one forward gives


def test_logits_are_those_of_the_model(model: PreTrainedModel) -> None:
    images = pixels()
    expected = plain_logits(model, images)
    classifier = FrozenClassifier(model)
    assert torch.equal(classifier(images).logits, expected)
    assert torch.equal(classifier(images, layers=(1, 4)).logits, expected)
    assert expected.std() > 0.01


def test_tokens_are_the_hidden_states_without_prefix(model: PreTrainedModel, family: str) -> None:
    images = pixels(32, 48)
    classifier = FrozenClassifier(copy.deepcopy(model))
    features = classifier(images, layers=(3, 1, 4))
    arguments = {"interpolate_pos_encoding": True} if family in STRICT else {}
    with torch.no_grad():
        hidden_states = model(images, output_hidden_states=True, **arguments).hidden_states
    assert len(hidden_states) == classifier.num_layers + 1 == 5
    for layer, tokens in zip((3, 1, 4), features.tokens, strict=True):
        patches = hidden_states[layer][:, PREFIX_TOKENS[family] :]
        assert tokens.shape == (2, 4, 6, 32)
        for row in range(4):
            assert torch.equal(tokens[:, row], patches[:, 6 * row : 6 * row + 6])


def test_tokens_lie_where_the_pixels_are(model: PreTrainedModel) -> None:
    classifier = FrozenClassifier(model)
    images = pixels(32, 48, batch=1)
    changed = images.clone()
    changed[:, :, 8:16, 32:40] += 3.0
    before, after = (classifier(batch, layers=(1,)).tokens[0] for batch in (images, changed))
    assert int((after - before).norm(dim=-1).flatten().argmax()) == 1 * 6 + 4


@pytest.mark.parametrize("size", [(48, 32), (64, 64), (16, 40)])
def test_other_sizes_equal_the_model_told_to_interpolate(
    model: PreTrainedModel, family: str, size: tuple[int, int]
) -> None:
    images = pixels(*size)
    expected = plain_logits(model, images, **({"interpolate_pos_encoding": True} if family in STRICT else {}))
    assert torch.equal(FrozenClassifier(model)(images).logits, expected)


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_every_patch_size(make_classifier, family: str, patch: int) -> None:
    classifier = FrozenClassifier(make_classifier(family, patch_size=patch, image_size=2 * patch, num_layers=2))
    features = classifier(pixels(2 * patch, 3 * patch, batch=1), layers=(2,))
    assert classifier.patch_size == (patch, patch)
    assert features.tokens[0].shape == (1, 2, 3, 32)


def test_configured_size_and_patch_may_be_oblong() -> None:
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=(32, 48),
        patch_size=(8, 16),
    )
    model = ViTForImageClassification(config).eval()
    classifier = FrozenClassifier(model)
    images = pixels(32, 48)
    features = classifier(images, layers=(2,))
    assert (classifier.image_size, classifier.patch_size) == ((32, 48), (8, 16))
    assert features.tokens[0].shape == (2, 4, 3, 8)
    assert torch.equal(features.logits, plain_logits(model, images))


def test_eager_and_sdpa_agree(make_classifier, family: str) -> None:
    images = pixels()
    sdpa, eager = (
        FrozenClassifier(make_classifier(family, attn_implementation=name))(images, layers=(2, 4))
        for name in ("sdpa", "eager")
    )
    torch.testing.assert_close(sdpa.logits, eager.logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(sdpa.tokens, eager.tokens, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_take_float32_pixels(model: PreTrainedModel, dtype: torch.dtype) -> None:
    images = pixels()
    model = model.to(dtype)
    features = FrozenClassifier(model)(images, layers=(4,))
    assert torch.equal(features.logits, plain_logits(model, images.to(dtype)))
    assert features.logits.dtype == features.tokens[0].dtype == dtype


def test_float32_models_take_half_precision_pixels(model: PreTrainedModel) -> None:
    images = pixels().bfloat16()
    assert torch.equal(FrozenClassifier(model)(images).logits, plain_logits(model, images.float()))


def test_autocast_is_left_to_the_caller(model: PreTrainedModel) -> None:
    images = pixels()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain_logits(model, images)
        features = FrozenClassifier(model)(images, layers=(2,))
    assert expected.dtype == torch.bfloat16
    assert torch.equal(features.logits, expected)


def test_pixels_are_cast_unless_autocast_is_on(model: PreTrainedModel) -> None:
    seen: list[torch.dtype] = []
    classifier = FrozenClassifier(model.bfloat16())
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    classifier(pixels())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        classifier(pixels())
    assert seen == [torch.bfloat16, torch.float32]


# Freezing, gradients, hooks, threads


def test_gradients_reach_every_pixel_and_no_weight(model: PreTrainedModel) -> None:
    classifier = FrozenClassifier(model)
    images = pixels().requires_grad_()
    features = classifier(images, layers=(2,))
    features.logits[:, 1].sum().backward(retain_graph=True)
    by_logits = images.grad.clone()
    images.grad = None
    features.tokens[0].square().sum().backward()
    for gradient in (by_logits, images.grad):
        assert (gradient.abs().amax(dim=1) > 0).float().mean() > 0.99
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_the_wrapped_model_stays_in_evaluation_mode(make_classifier) -> None:
    model = make_classifier("vit").train()
    classifier = FrozenClassifier(model)
    assert classifier.model is model
    assert not any(module.training for module in model.modules())
    parent = nn.Sequential(classifier).train()
    assert classifier.training and not any(module.training for module in model.modules())
    assert classifier.train() is classifier
    parent.eval()
    assert not classifier.training


def test_hooks_are_gone_after_success_and_after_an_exception(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = FrozenClassifier(model)
    before = count_hooks(model)
    classifier(pixels(), layers=(1, 2, 3, 4))
    assert count_hooks(model) == before

    seen = []

    def fail(*args: object) -> None:
        seen.append(count_hooks(model))
        raise RuntimeError("the head broke")

    for head in heads_of(model):
        monkeypatch.setattr(head, "forward", fail)
    with pytest.raises(RuntimeError, match="the head broke"):
        classifier(pixels(), layers=(1, 2))
    assert seen == [before + 2]
    assert count_hooks(model) == before


def test_two_threads_may_share_one_model(make_classifier) -> None:
    classifier = FrozenClassifier(make_classifier("vit"))
    batches = [pixels(32, 32 + 8 * index, batch=1) for index in range(2)]
    expected = [classifier(batch, layers=(1, 4)) for batch in batches]
    start = threading.Barrier(2)
    wrong: list[str] = []

    def work(index: int) -> None:
        start.wait()
        for _ in range(40):
            try:
                features = classifier(batches[index], layers=(1, 4))
            except Exception as error:  # noqa: BLE001  (reported to the main thread, which fails the test)
                wrong.append(repr(error))
                return
            for ours, right in zip(features.tokens, expected[index].tokens, strict=True):
                if not torch.equal(ours, right):
                    wrong.append(f"thread {index} got other tokens")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert count_hooks(classifier.model) == 0


def test_states_computed_by_another_thread_are_not_taken(make_classifier) -> None:
    classifier = FrozenClassifier(make_classifier("vit"))
    mine, other = pixels(batch=1), pixels(batch=1)
    expected = classifier(mine, layers=(1,)).tokens[0]
    meddled = []

    def meddle(*args: object) -> None:
        # Runs the whole model in another thread while our hooks are in place and layer 1 was already recorded.
        if not meddled:
            meddled.append(True)
            thread = threading.Thread(target=classifier.model, args=(other,))
            thread.start()
            thread.join()

    classifier.model.classifier.register_forward_pre_hook(meddle)
    assert torch.equal(classifier(mine, layers=(1,)).tokens[0], expected)
    assert meddled


def test_copies_are_independent(make_classifier) -> None:
    classifier = FrozenClassifier(make_classifier("siglip"))
    images = pixels()
    expected = classifier(images, layers=(2,))
    twin = copy.deepcopy(classifier)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.zero_()
    features = twin(images, layers=(2,))
    assert torch.equal(features.logits, expected.logits)
    assert torch.equal(features.tokens[0], expected.tokens[0])


# Facts


def test_facts(model: PreTrainedModel, family: str) -> None:
    classifier = FrozenClassifier(model)
    assert classifier.model_type == model.config.model_type == family.removesuffix("-teacher")
    assert classifier.num_prefix_tokens == PREFIX_TOKENS[family]
    assert (classifier.hidden_size, classifier.num_layers, classifier.num_labels) == (32, 4, 5)
    assert (classifier.image_size, classifier.patch_size) == ((32, 32), (8, 8))
    assert classifier.class_vector_size == (64 if family.startswith("dinov2") else 32)
    assert classifier.id2label == {index: f"LABEL_{index}" for index in range(5)}


def test_every_supported_type_has_a_test_model() -> None:
    assert supported_model_types() == tuple(sorted({name.removesuffix("-teacher") for name in PREFIX_TOKENS}))


def test_state_dict_holds_each_weight_once(model: PreTrainedModel) -> None:
    assert set(FrozenClassifier(model).state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_class_vectors_are_what_the_head_multiplies(model: PreTrainedModel) -> None:
    inputs: list[torch.Tensor] = []
    heads = heads_of(model)
    for head in heads:
        head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    classifier = FrozenClassifier(model)
    with torch.no_grad():
        # The mean of two heads is linear in the mean row only where both read the same token.
        if len(heads) == 2:
            vectors = classifier.class_vectors(torch.arange(5))
            assert torch.equal(vectors, (heads[0].weight + heads[1].weight) / 2)
        else:
            logits = classifier(pixels()).logits
            torch.testing.assert_close(inputs[0] @ classifier.class_vectors(torch.arange(5)).T + heads[0].bias, logits)


def test_class_vectors_take_targets_of_any_shape(make_classifier) -> None:
    model = make_classifier("dinov2").bfloat16()
    classifier = FrozenClassifier(model)
    target = torch.tensor([[0, 4, 4], [2, 1, 0]], dtype=torch.int32)
    vectors = classifier.class_vectors(target)
    assert vectors.shape == (2, 3, 64) and vectors.dtype == torch.float32
    assert torch.equal(vectors[1, 0], model.classifier.weight[2].float())
    assert classifier.class_vectors(torch.tensor(3)).shape == (64,)
    assert classifier.class_vectors(torch.empty(0, dtype=torch.long)).shape == (0, 64)


@pytest.mark.parametrize("target", [[5], [-1], [0, 1, 7]])
def test_classes_the_head_lacks_are_refused(make_classifier, target: list[int]) -> None:
    with pytest.raises(ValueError, match=r"classes 0 to 4"):
        FrozenClassifier(make_classifier()).class_vectors(torch.tensor(target))


@pytest.mark.parametrize("target", [torch.tensor([1.0]), torch.tensor([True])])
def test_targets_must_be_integers(make_classifier, target: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="integers"):
        FrozenClassifier(make_classifier()).class_vectors(target)


# Refusals


def test_grid(make_classifier) -> None:
    classifier = FrozenClassifier(make_classifier(patch_size=14, image_size=28))
    assert classifier.grid(28, 56) == (2, 4)
    for height, width in ((28, 30), (27, 28), (0, 28), (28, -14), (7, 28)):
        with pytest.raises(ValueError, match=f"{height} x {width} pixels.*14 x 14 patch"):
            classifier.grid(height, width)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.zeros(3, 32, 32), r"shape \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"shape \(1, 1, 32, 32\)"),
        (torch.zeros(1, 32, 32, 3), r"shape \(1, 32, 32, 3\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 32, 33), "32 x 33 pixels"),
    ],
)
def test_bad_pixels(make_classifier, pixel_values: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenClassifier(make_classifier())(pixel_values)


@pytest.mark.parametrize("layer", [0, 5, -1, 1.0, True])
def test_layers_that_do_not_exist(make_classifier, layer: object) -> None:
    with pytest.raises(ValueError, match="layers 1 to 4"):
        FrozenClassifier(make_classifier())(pixels(), layers=(1, layer))


def _swin() -> PreTrainedModel:
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    )


def _convnext() -> PreTrainedModel:
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))


def _resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    )


def _bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            vocab_size=10,
            pad_token_id=0,
        )
    )


def _siglip2() -> PreTrainedModel:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokens = {"vocab_size": 10, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    return Siglip2ForImageClassification(
        Siglip2Config(vision_config=small | {"num_patches": 16, "patch_size": 8}, text_config=small | tokens)
    )


@pytest.mark.parametrize(
    ("build", "model_type"),
    [(_swin, "swin"), (_convnext, "convnext"), (_resnet, "resnet"), (_bert, "bert"), (_siglip2, "siglip2")],
)
def test_other_families_are_refused(build, model_type: str) -> None:
    model = build()
    with pytest.raises(UnsupportedClassifierError) as caught:
        FrozenClassifier(model)
    message = str(caught.value)
    assert type(model).__name__ in message and f"'{model_type}'" in message
    assert all(name in message for name in supported_model_types())
    assert any(parameter.requires_grad for parameter in model.parameters()), "a refused model is left untouched"


def test_models_without_a_usable_head_are_refused(make_classifier) -> None:
    config = make_classifier().config
    for model, reason in (
        (ViTModel(config), "no linear classification head"),
        (make_classifier("clip", num_labels=0), "no linear classification head"),
        (make_classifier("deit-teacher", num_labels=0), "no linear classification head"),
    ):
        with pytest.raises(UnsupportedClassifierError, match=rf"{type(model).__name__} .*{reason}"):
            FrozenClassifier(model)
    model = make_classifier()
    model.classifier = nn.Linear(32, 9)
    with pytest.raises(UnsupportedClassifierError, match=r"\(9, 32\).*5 labels"):
        FrozenClassifier(model)
    with pytest.raises(UnsupportedClassifierError, match="Linear .*not a transformers model"):
        FrozenClassifier(nn.Linear(3, 3))


def test_an_unexpected_number_of_tokens_is_refused(make_classifier) -> None:
    classifier = FrozenClassifier(make_classifier("dinov2_with_registers"))
    classifier.model.config.num_register_tokens = 3
    with pytest.raises(UnsupportedClassifierError, match="5 prefix tokens where 4 were expected"):
        classifier(pixels(), layers=(1,))


# Fingerprint


def test_fingerprint_of_the_same_weights(model: PreTrainedModel, tmp_path) -> None:
    classifier = FrozenClassifier(model)
    fingerprint = classifier.fingerprint()
    assert len(fingerprint) == 16 and all(isinstance(value, float) for value in fingerprint)
    assert classifier.fingerprint() == fingerprint
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = FrozenClassifier(type(model).from_pretrained(tmp_path))
    assert fingerprint_distance(again.fingerprint(), fingerprint) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_hardly_moves_with_the_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    fingerprint = FrozenClassifier(copy.deepcopy(model)).fingerprint()
    distance = fingerprint_distance(FrozenClassifier(model.to(dtype)).fingerprint(), fingerprint)
    assert distance <= (FINGERPRINT_TOLERANCE if dtype == torch.bfloat16 else 0.003)


def test_fingerprint_of_other_weights(make_classifier, family: str) -> None:
    model = make_classifier(family)
    fingerprint = FrozenClassifier(copy.deepcopy(model)).fingerprint()
    blocks = "layer.3." if family in ("data2vec-vision", "dinov2", "dinov2_with_registers") else "layers.3."
    for other, least in (
        (make_classifier(family, seed=1), 0.3),
        (perturbed(model, "classifier", 0.05), FINGERPRINT_TOLERANCE),
        (perturbed(model, blocks, 0.1), FINGERPRINT_TOLERANCE),
        (perturbed(model, "", 0.05), FINGERPRINT_TOLERANCE),
    ):
        assert fingerprint_distance(FrozenClassifier(other).fingerprint(), fingerprint) > least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_changes_nothing(model: PreTrainedModel, dtype: torch.dtype) -> None:
    classifier = FrozenClassifier(model.to(dtype))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    classifier.train()
    fingerprint = classifier.fingerprint()
    assert classifier.training and not model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [id(parameter) for parameter in model.parameters()] == identities
    for name, value in model.state_dict().items():
        assert value.dtype == weights[name].dtype and torch.equal(value, weights[name])
    assert count_hooks(model) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert classifier.fingerprint() == fingerprint


@pytest.mark.parametrize("num_labels", [1, 2, 3000])
def test_fingerprint_of_few_and_many_classes(make_classifier, num_labels: int) -> None:
    model = make_classifier(num_labels=num_labels)
    fingerprint = FrozenClassifier(copy.deepcopy(model)).fingerprint()
    changed = FrozenClassifier(perturbed(model, "classifier", 0.1)).fingerprint()
    assert fingerprint_distance(fingerprint, changed) > FINGERPRINT_TOLERANCE


def test_fingerprint_of_a_broken_model(make_classifier) -> None:
    model = make_classifier()
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        FrozenClassifier(model).fingerprint()


def test_fingerprint_distance() -> None:
    assert fingerprint_distance([3.0, 4.0], [3.0, 4.0]) == 0.0
    assert fingerprint_distance([3.0, 4.0], [0.0, 0.0]) == fingerprint_distance([0.0, 0.0], [3.0, 4.0]) == 1.0
    assert fingerprint_distance([3.0, 4.0], [-3.0, -4.0]) == 2.0
    assert fingerprint_distance([0.0], [0.0]) == 0.0
    assert fingerprint_distance([30.0, 40.0], [30.0, 41.0]) == pytest.approx(1 / (30**2 + 41**2) ** 0.5)
    for a, b in (([1.0], [1.0, 2.0]), ([], []), ([float("nan")], [1.0]), ([1.0], [float("inf")])):
        with pytest.raises(ValueError, match="ingerprint"):
            fingerprint_distance(a, b)


def test_fingerprint_formulas_are_those_of_published_explainers() -> None:
    """Stored fingerprints are compared with new ones, so the images and the matrix must never change."""
    images, matrix = _fingerprint_images(32, 48), _fingerprint_matrix(20)
    assert images.shape == (2, 3, 32, 48) and matrix.shape == (16, 20)
    pinned = [images[0, 0, 0, 0], images[1, 2, 5, 7], images[0, 1, 31, 47], images[1, 0, 16, 24]]
    assert [float(value) for value in pinned] == pytest.approx(
        [0.2189578883, -0.3750995682, 0.1746076252, 0.0547652271], abs=1e-8
    )
    assert [float(matrix[0, 0]), float(matrix[3, 7]), float(matrix[15, 19])] == pytest.approx(
        [-0.2331765130, -0.0090441481, 0.1724511975], abs=1e-8
    )
