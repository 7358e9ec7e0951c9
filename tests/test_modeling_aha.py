"""`AhaExplainer`: the forward over every family, saving and loading, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
import socket
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    BitImageProcessor,
    CLIPImageProcessor,
    PreTrainedModel,
    ViTImageProcessor,
)
from transformers.dynamic_module_utils import get_imports
from transformers.utils import ModelOutput

import hf_aha.modeling_aha as modeling
from hf_aha import AhaConfig, AhaExplainer, AhaOutput, ClassifierMismatchError, UnsupportedClassifierError
from hf_aha.repository_aha import ExplainerFilesError


SIZES = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])


def make_explainer(model, **arguments):
    return AhaExplainer.from_classifier(model, image_processor=PROCESSOR, **SIZES | arguments).eval()


@pytest.fixture
def explainer(make_classifier):
    return make_explainer(make_classifier("vit"))


@pytest.fixture
def classifier_folder(tmp_path, make_classifier):
    folder = tmp_path / "classifier"
    make_classifier("vit").save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path, classifier_folder):
    """An explainer of a classifier in a folder, the folder it is saved in, and some pixels."""
    explainer = AhaExplainer.from_classifier(classifier_folder, **SIZES).eval()
    folder = tmp_path / "explainer"
    explainer.save_pretrained(folder)
    return explainer, folder, torch.randn(2, 3, 32, 32)


# ------------------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_forward_of_every_family(model, size):
    pixels = torch.randn(2, 3, *size)
    plain = "dinov2" in model.config.model_type or model.config.model_type in ("beit", "data2vec-vision")
    flag = {} if plain or size == (32, 32) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = model(pixels, **flag).logits
    explainer = make_explainer(model)
    output = explainer(pixels)
    assert isinstance(output, ModelOutput) and isinstance(output, AhaOutput)
    assert torch.equal(output.logits, expected)
    assert torch.equal(output.target, expected.argmax(-1))
    assert output.scores.shape == (2, *size)
    assert output.scores.dtype == torch.float32
    assert bool(torch.isfinite(output.scores).all())
    assert output.scores.unique().numel() > 0.95 * output.scores.numel()
    assert torch.equal(explainer(pixels).scores, output.scores), "a second call differs"


def test_several_classes_of_every_family_in_one_forward_of_the_classifier(model):
    explainer = make_explainer(model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    pixels = torch.randn(2, 3, 32, 32)
    target = torch.tensor([[0, 3, 4], [2, 2, 1]])
    with torch.no_grad():
        together = explainer(pixels, target)
        assert len(calls) == 1
        assert together.scores.shape == (2, 3, 32, 32)
        assert torch.equal(together.target, target)
        for place in range(3):
            alone = explainer(pixels, target[:, place])
            torch.testing.assert_close(together.scores[:, place], alone.scores, atol=1e-4, rtol=1e-4)
    assert (together.scores[0, 0] != together.scores[0, 1]).float().mean() > 0.99, "two classes give one map"


def test_only_the_decoder_of_every_family_learns(model):
    explainer = make_explainer(model).train()
    assert explainer.training and explainer.decoder.training
    assert not any(module.training for module in explainer.classifier.modules())
    explainer(torch.randn(1, 3, 32, 32), 0).scores.square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in explainer.decoder.parameters())
    trainable = {name for name, p in explainer.named_parameters() if p.requires_grad}
    assert trainable == {f"decoder.{name}" for name, _ in explainer.decoder.named_parameters()}


def test_a_map_of_every_family_alone_is_its_map_in_a_batch(model):
    explainer = make_explainer(model)
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        together = explainer(pixels, torch.arange(4)).scores
        for row in range(4):
            alone = explainer(pixels[row : row + 1], row).scores
            torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)


def test_every_family_is_saved_and_found_again(model, tmp_path):
    model.save_pretrained(tmp_path / "classifier")
    PROCESSOR.save_pretrained(tmp_path / "classifier")
    explainer = AhaExplainer.from_classifier(tmp_path / "classifier", **SIZES).eval()
    explainer.save_pretrained(tmp_path / "explainer")
    assert all(key.startswith("decoder.") for key in load_file(tmp_path / "explainer" / "model.safetensors"))
    loaded = AhaExplainer.from_pretrained(tmp_path / "explainer")
    pixels = torch.randn(1, 3, 32, 32)
    a, b = explainer(pixels), loaded(pixels)
    assert torch.equal(a.scores, b.scores) and torch.equal(a.logits, b.logits)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_of_every_family_gives_float32_scores_with_few_ties(family, make_classifier, how):
    explainer = make_explainer(make_classifier(family, image_size=64))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        if how == "weights":
            scores = explainer.to(torch.bfloat16)(pixels, 1).scores
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores = explainer(pixels, 1).scores
    assert scores.dtype == torch.float32
    assert bool(torch.isfinite(scores).all())
    assert scores.unique().numel() > 0.95 * scores.numel()


# ------------------------------------------------------------------------------------------------------------- forward


def test_target_in_all_its_forms(explainer):
    pixels = torch.randn(3, 3, 32, 32)
    expected = explainer(pixels, torch.tensor([2, 2, 2]))
    for target in (2, torch.tensor(2), torch.tensor([2, 2, 2], dtype=torch.int32), [2, 2, 2]):
        output = explainer(pixels, target)
        assert torch.equal(output.scores, expected.scores)
        assert output.target.tolist() == [2, 2, 2]
    one_column = explainer(pixels, torch.tensor([[2], [2], [2]]))
    assert one_column.scores.shape == (3, 1, 32, 32)
    assert torch.equal(one_column.scores[:, 0], expected.scores)


@pytest.mark.parametrize(
    "target, message",
    [
        (5, "class index 5 is out of range: the classifier has the classes 0..4"),
        (-1, "class index -1 is out of range"),
        (torch.tensor([0, 7]), "class index 7 is out of range"),
        (torch.tensor([[0, 1], [2, 9]]), "class index 9 is out of range"),
        (torch.tensor([0]), r"shape \(1,\) for 2 images"),
        (torch.tensor([0, 1, 2]), r"shape \(3,\) for 2 images"),
        (torch.zeros(2, 1, 1, dtype=torch.long), r"shape \(2, 1, 1\) for 2 images"),
        (torch.tensor([0.0, 1.0]), "integers, but its dtype is torch.float32"),
        (torch.tensor([True, False]), "integers, but its dtype is torch.bool"),
        (1.0, "integers, but its dtype is torch.float32"),
    ],
)
def test_targets_that_are_refused(explainer, target, message):
    with pytest.raises(ValueError, match=message):
        explainer(torch.randn(2, 3, 32, 32), target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(explainer, value):
    pixels = torch.randn(3, 3, 32, 32)
    pixels[1, 2, 5, 7] = value
    for call in (lambda: explainer(pixels), lambda: explainer.explain_top(pixels, 2)):
        with pytest.raises(ValueError, match="image 1 hold NaN or infinite pixels") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 30, 32)])
def test_pixels_of_another_shape_are_refused(explainer, shape):
    with pytest.raises(ValueError, match="shape|multiples of the 8 x 8 patch"):
        explainer(torch.zeros(shape))


def test_the_most_probable_classes(explainer):
    pixels = torch.randn(2, 3, 32, 32)
    calls = []
    explainer.classifier.model.register_forward_hook(lambda *_: calls.append(1))
    output = explainer.explain_top(pixels, 3)
    assert len(calls) == 1
    assert torch.equal(output.target, output.logits.topk(3).indices)
    assert torch.equal(output.scores, explainer(pixels, output.target).scores)
    assert torch.equal(output.target[:, 0], explainer(pixels).target)
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"k must lie in 1..5, the number of classes, but it is {k}"):
            explainer.explain_top(pixels, k)


def test_return_dict_false_gives_the_tuple(explainer):
    pixels = torch.randn(1, 3, 32, 32)
    output = explainer(pixels)
    scores, logits, target = explainer(pixels, return_dict=False)
    assert torch.equal(scores, output.scores)
    assert torch.equal(logits, output.logits)
    assert torch.equal(target, output.target)
    assert [type(x) for x in output.to_tuple()] == [torch.Tensor] * 3


def test_gradients_reach_pixels_that_ask_for_them(explainer):
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    explainer(pixels).logits[0, 1].backward()
    assert bool(pixels.grad.any())


def test_a_head_of_21843_classes_is_read_row_by_row(make_classifier):
    explainer = make_explainer(make_classifier("vit", num_labels=21843))
    target = torch.tensor([[0, 21842, 17]])
    output = explainer(torch.randn(1, 3, 32, 32), target)
    assert output.scores.shape == (1, 3, 32, 32)
    head = explainer.classifier.model.classifier.weight
    assert torch.equal(explainer.classifier.class_vectors(target), head[target])
    assert sum(p.numel() for p in explainer.decoder.parameters()) < 21843, "the decoder grows with the classes"


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_it_works_under_torch_compile(explainer):
    pixels = torch.randn(1, 3, 32, 32)
    expected = explainer(pixels, torch.tensor([1]))
    output = torch.compile(explainer, backend="eager")(pixels, torch.tensor([1]))
    torch.testing.assert_close(output.scores, expected.scores)


# ---------------------------------------------------------------------------------------------------- from_classifier


def test_every_fact_is_derived(make_classifier):
    model = make_classifier("dinov2")
    model.config.id2label = {0: "tench", 1: "church", 2: "truck", 3: "dog", 4: "horn"}
    config = make_explainer(model).config
    assert config.base_model_type == "dinov2"
    assert (config.image_size, config.patch_size) == ([32, 32], [8, 8])
    assert (config.token_size, config.class_vector_size) == (32, 64)
    assert config.taps == [1, 2, 3, 4]
    assert config.image_mean == pytest.approx([0.4, 0.5, 0.6])
    assert config.image_std == pytest.approx([0.2, 0.3, 0.4])
    assert config.id2label[4] == "horn" and config.label2id["horn"] == 4
    assert (config.base_model_name_or_path, config.base_model_revision) == (None, None)
    assert len(config.base_model_fingerprint) == 16


@pytest.mark.parametrize(
    "layers, taps", [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (12, [3, 6, 9, 12]), (24, [6, 12, 18, 24])]
)
def test_default_taps(layers, taps):
    assert sorted(set(modeling._default_taps(layers))) == taps


@pytest.mark.parametrize(
    "processor, size",
    [
        (BitImageProcessor(size={"shortest_edge": 50}, crop_size={"height": 40, "width": 48}), [40, 48]),
        (ViTImageProcessor(size={"height": 48, "width": 40}), [48, 40]),
        (CLIPImageProcessor(size={"shortest_edge": 50}, do_center_crop=False), [32, 32]),
        (ViTImageProcessor(do_resize=False, size={"height": 48, "width": 40}), [32, 32]),
    ],
)
def test_the_input_size_is_what_the_processor_makes(make_classifier, processor, size):
    explainer = AhaExplainer.from_classifier(make_classifier("vit"), image_processor=processor, **SIZES)
    assert explainer.config.image_size == size


def test_a_processor_that_does_not_normalise(make_classifier):
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False)
    config = AhaExplainer.from_classifier(make_classifier("vit"), image_processor=processor, **SIZES).config
    assert (config.image_mean, config.image_std) == ([0.0] * 3, [1.0] * 3)


def test_a_classifier_by_folder_brings_its_processor_and_labels(classifier_folder):
    explainer = AhaExplainer.from_classifier(classifier_folder, taps=[2], attn_implementation="eager", **SIZES)
    assert explainer.config.base_model_name_or_path == str(classifier_folder)
    assert explainer.config.base_model_revision is None
    assert explainer.image_processor.size["height"] == 32
    assert explainer.config.taps == [2]
    assert explainer.classifier.model.config._attn_implementation == "eager"
    assert (
        AhaExplainer.from_classifier(classifier_folder, dtype=torch.bfloat16).classifier.model.dtype == torch.bfloat16
    )


def test_what_from_classifier_refuses(make_classifier, tmp_path):
    with pytest.raises(ValueError, match="give its image_processor"):
        AhaExplainer.from_classifier(make_classifier("vit"))
    with pytest.raises(TypeError, match="no argument 'depth'"):
        AhaExplainer.from_classifier(make_classifier("vit"), image_processor=PROCESSOR, depth=3)
    with pytest.raises(ValueError, match="reads layer 9, but the classifier has 4 layers"):
        make_explainer(make_classifier("vit"), taps=[1, 9])
    with pytest.raises(UnsupportedClassifierError):
        AhaExplainer.from_classifier(torch.nn.Linear(2, 2), image_processor=PROCESSOR)
    with pytest.raises(OSError):
        AhaExplainer.from_classifier(tmp_path / "nothing")


def test_from_classifier_leaves_the_classifier_where_and_what_it_was(make_classifier):
    model = make_classifier("vit").to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explainer = make_explainer(model)
    assert explainer.classifier.model is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(explainer.decoder.parameters()).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- saving, loading


def test_only_the_decoder_the_config_and_the_processor_are_saved(saved):
    explainer, folder, _ = saved
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    keys = set(load_file(folder / "model.safetensors"))
    assert keys == {f"decoder.{name}" for name in explainer.decoder.state_dict()}


def test_reload_is_equal_and_complete(saved, classifier_folder):
    explainer, folder, pixels = saved
    loaded, info = AhaExplainer.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert isinstance(AhaExplainer.from_pretrained(folder), AhaExplainer)
    assert not loaded.training
    a, b = explainer(pixels), loaded(pixels)
    assert torch.equal(a.scores, b.scores) and torch.equal(a.logits, b.logits)
    assert loaded.config.base_model_name_or_path == str(classifier_folder)
    assert loaded.image_processor.to_dict() == explainer.image_processor.to_dict()


def test_saving_twice_and_over_itself(saved):
    explainer, folder, pixels = saved
    loaded = AhaExplainer.from_pretrained(folder)
    loaded.save_pretrained(folder)
    loaded.save_pretrained(folder)
    assert torch.equal(AhaExplainer.from_pretrained(folder)(pixels).scores, explainer(pixels).scores)
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)


def test_a_path_object_and_a_subfolder(saved):
    explainer, folder, pixels = saved
    loaded = AhaExplainer.from_pretrained(folder.parent, subfolder=folder.name)
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)


def test_include_classifier_needs_nothing_else(saved, classifier_folder, tmp_path):
    explainer, _, pixels = saved
    explainer.save_pretrained(tmp_path / "all", include_classifier=True)
    assert explainer.config.includes_classifier is False
    shutil.rmtree(classifier_folder)
    shutil.move(tmp_path / "all", tmp_path / "elsewhere")
    loaded = AhaExplainer.from_pretrained(tmp_path / "elsewhere")
    assert loaded.config.includes_classifier is True
    a, b = explainer(pixels), loaded(pixels)
    assert torch.equal(a.scores, b.scores) and torch.equal(a.logits, b.logits)
    in_subfolder = AhaExplainer.from_pretrained(tmp_path, subfolder="elsewhere")
    assert torch.equal(in_subfolder(pixels).scores, a.scores)

    loaded.save_pretrained(tmp_path / "without")
    assert json.loads((tmp_path / "without" / "config.json").read_text())["includes_classifier"] is False
    loaded.save_pretrained(tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere" / "config.json").read_text())["includes_classifier"] is False
    with pytest.raises(OSError, match="could not be loaded: .* or give it with classifier="):
        AhaExplainer.from_pretrained(tmp_path / "elsewhere")


def test_include_classifier_of_one_that_was_built_in_memory(explainer, tmp_path):
    explainer.save_pretrained(tmp_path, include_classifier=True)
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(AhaExplainer.from_pretrained(tmp_path)(pixels).scores, explainer(pixels).scores)


def test_a_classifier_built_in_memory_must_be_given_again(explainer, make_classifier, tmp_path):
    explainer.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="give that classifier with classifier="):
        AhaExplainer.from_pretrained(tmp_path)
    loaded = AhaExplainer.from_pretrained(tmp_path, classifier=make_classifier("vit"))
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)


def test_the_classifier_can_be_given_as_folder_or_model(saved, classifier_folder, make_classifier, tmp_path):
    explainer, folder, pixels = saved
    shutil.move(classifier_folder, tmp_path / "moved")
    with pytest.raises(OSError, match="could not be loaded: .* or give it with classifier=") as caught:
        AhaExplainer.from_pretrained(folder)
    assert str(folder) in str(caught.value) and str(classifier_folder) in str(caught.value)
    model = make_classifier("vit")
    for classifier in (tmp_path / "moved", str(tmp_path / "moved"), model):
        loaded = AhaExplainer.from_pretrained(folder, classifier=classifier)
        assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)
    assert loaded.classifier.model is model


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"hidden_size": 16}, "class_vector_size 32|tokens of width 32"),
        ({"patch_size": 16}, "patch_size .8, 8."),
        ({"num_labels": 7}, "num_labels 5 .*, but this one has 7"),
        ({"num_layers": 2}, "reads layer 4, but the classifier has 2"),
        ({"seed": 1}, "does not behave like .*fingerprint distance"),
    ],
)
def test_the_wrong_classifier_is_refused_in_one_sentence(saved, make_classifier, shape, message):
    _, folder, _ = saved
    with pytest.raises(ClassifierMismatchError, match=message) as caught:
        AhaExplainer.from_pretrained(folder, classifier=make_classifier("vit", **shape))
    assert "\n" not in str(caught.value)


def test_a_mismatch_in_behaviour_can_be_accepted_and_one_in_size_cannot(saved, make_classifier):
    _, folder, pixels = saved
    other = make_classifier("vit", seed=1)
    with pytest.warns(UserWarning, match="does not behave like"):
        loaded = AhaExplainer.from_pretrained(folder, classifier=other, allow_classifier_mismatch=True)
    assert torch.equal(loaded(pixels).logits, other(pixels).logits)
    with pytest.raises(ClassifierMismatchError):
        AhaExplainer.from_pretrained(
            folder, classifier=make_classifier("vit", num_labels=7), allow_classifier_mismatch=True
        )


def test_a_failed_attach_keeps_the_classifier_that_was_there(explainer, make_classifier):
    before = explainer.classifier
    with pytest.raises(ClassifierMismatchError):
        explainer.attach(make_classifier("vit", seed=1))
    assert explainer.classifier is before


def test_the_decoder_alone(saved, classifier_folder, make_classifier):
    explainer, folder, pixels = saved
    shutil.rmtree(classifier_folder)
    loaded = AhaExplainer.from_pretrained(folder, load_classifier=False)
    assert loaded.classifier is None
    for call in (loaded, lambda x: loaded.explain_top(x, 1), loaded.features):
        with pytest.raises(RuntimeError, match="No classifier is attached: call attach"):
            call(pixels)
    assert loaded.attach(make_classifier("vit")) is loaded
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)


def test_the_decoder_alone_is_saved_as_it_was(saved, tmp_path):
    explainer, folder, pixels = saved
    AhaExplainer.from_pretrained(folder, load_classifier=False).save_pretrained(tmp_path / "again")
    assert (
        not load_file(tmp_path / "again" / "model.safetensors").keys() ^ load_file(folder / "model.safetensors").keys()
    )
    with pytest.raises(RuntimeError, match="No classifier is attached"):
        AhaExplainer.from_pretrained(folder, load_classifier=False).save_pretrained(
            tmp_path / "included", include_classifier=True
        )


def test_weights_saved_in_half_precision_load_in_float32(saved, tmp_path):
    explainer, _, pixels = saved
    copy.deepcopy(explainer).to(torch.float16).save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = AhaExplainer.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(pixels, 1).scores, explainer(pixels, 1).scores, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "bfloat16"])
def test_dtype_attention_and_device_map_reach_the_classifier(saved, dtype):
    _, folder, pixels = saved
    loaded = AhaExplainer.from_pretrained(folder, dtype=dtype, attn_implementation="eager", device_map="cpu")
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert loaded.classifier.model.dtype == wanted
    assert next(loaded.decoder.parameters()).dtype == wanted
    assert loaded.classifier.model.config._attn_implementation == "eager"
    assert loaded(pixels).scores.dtype == torch.float32


def test_pickled_weights_are_refused(saved):
    _, folder, _ = saved
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        AhaExplainer.from_pretrained(folder)


def test_one_without_an_image_processor_is_saved_and_loaded(explainer, make_classifier, tmp_path):
    alone = AhaExplainer(explainer.config).attach(make_classifier("vit")).eval()
    alone.save_pretrained(tmp_path)
    loaded = AhaExplainer.from_pretrained(tmp_path, classifier=make_classifier("vit"))
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(pixels).scores, alone(pixels).scores)
    with pytest.raises(RuntimeError, match="no image processor"):
        loaded.explain("photo.jpg")


def test_missing_weights_are_refused_instead_of_drawn_at_random(saved):
    _, folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.half_stem.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="lacks 1 of its decoder's weights .decoder.half_stem.weight"):
        AhaExplainer.from_pretrained(folder)


def test_a_config_of_another_version(saved):
    explainer, folder, pixels = saved
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"a_later_field": [1, 2]}))
    with pytest.warns(UserWarning, match="holds 'a_later_field', which this version of hf_aha does not know"):
        loaded = AhaExplainer.from_pretrained(folder)
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)
    path.write_text(json.dumps(content | {"grid_width": "wide"}))
    with pytest.raises(ExplainerFilesError, match="'grid_width' expected int"):
        AhaExplainer.from_pretrained(folder)


def test_a_config_without_fingerprint_loads_without_the_check(saved, make_classifier):
    _, folder, _ = saved
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_fingerprint": None}))
    AhaExplainer.from_pretrained(folder, classifier=make_classifier("vit", seed=1))


def test_nothing_is_asked_of_the_network(saved, monkeypatch, tmp_path):
    explainer, folder, pixels = saved

    def refuse(*arguments, **named):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    explainer.save_pretrained(tmp_path / "again", include_classifier=True)
    for name, arguments in ((folder, {"local_files_only": True}), (tmp_path / "again", {}), (folder, {})):
        assert torch.equal(AhaExplainer.from_pretrained(name, **arguments)(pixels).scores, explainer(pixels).scores)


@pytest.mark.filterwarnings("error")
def test_loading_is_quiet(saved, capfd):
    _, folder, _ = saved
    capfd.readouterr()
    AhaExplainer.from_pretrained(folder)
    _, errors = capfd.readouterr()
    assert "MISSING" not in errors and "UNEXPECTED" not in errors and "Warning" not in errors


# ------------------------------------------------------------------------------------------- the Hub's cache and names


def fill_cache(cache, repo, commit, fill):
    """A repository in a Hub cache, its main branch at `commit`."""
    root = cache / f"models--{repo.replace('/', '--')}"
    fill(root / "snapshots" / commit)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)


def test_the_commit_of_a_hub_classifier_is_pinned(make_classifier, tmp_path):
    cache, first, second = tmp_path / "cache", "a" * 40, "b" * 40

    def fill_with(seed):
        def fill(folder):
            make_classifier("vit", seed=seed).save_pretrained(folder)
            PROCESSOR.save_pretrained(folder)

        return fill

    fill_cache(cache, "org/classifier", first, fill_with(0))
    explainer = AhaExplainer.from_classifier("org/classifier", cache_dir=cache, **SIZES).eval()
    assert explainer.config.base_model_name_or_path == "org/classifier"
    assert explainer.config.base_model_revision == first
    explainer.save_pretrained(tmp_path / "explainer")

    fill_cache(cache, "org/classifier", second, fill_with(1))
    pixels = torch.randn(1, 3, 32, 32)
    loaded = AhaExplainer.from_pretrained(tmp_path / "explainer", cache_dir=cache)
    assert torch.equal(loaded(pixels).logits, explainer(pixels).logits), "main has moved, the pinned commit has not"
    by_commit = AhaExplainer.from_classifier("org/classifier", revision=second, cache_dir=cache, **SIZES)
    assert by_commit.config.base_model_revision == second


def test_the_explainers_revision_is_not_the_classifiers(make_classifier, tmp_path):
    cache, commit, own = tmp_path / "cache", "a" * 40, "c" * 40

    def fill(folder):
        make_classifier("vit").save_pretrained(folder)
        PROCESSOR.save_pretrained(folder)

    fill_cache(cache, "org/classifier", commit, fill)
    explainer = AhaExplainer.from_classifier("org/classifier", cache_dir=cache, **SIZES).eval()
    fill_cache(cache, "org/explainer", own, explainer.save_pretrained)
    fill_cache(cache, "org/whole", own, lambda folder: explainer.save_pretrained(folder, include_classifier=True))
    pixels = torch.randn(1, 3, 32, 32)
    for name in ("org/explainer", "org/whole"):
        for revision in ("main", own):
            loaded = AhaExplainer.from_pretrained(name, revision=revision, cache_dir=cache)
            assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)


def test_a_bundled_name_gives_way_to_a_folder_of_that_name(explainer, tmp_path, monkeypatch, make_classifier):
    package = tmp_path / "package"
    explainer.save_pretrained(package / "bundled" / "demo", include_classifier=True)
    monkeypatch.setattr(modeling, "__file__", str(package / "modeling_aha.py"))
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(AhaExplainer.from_pretrained("demo")(pixels).scores, explainer(pixels).scores)

    other = make_explainer(make_classifier("vit"))
    with torch.no_grad():
        other.decoder.pixel_score.weight.mul_(-3)
    monkeypatch.chdir(tmp_path)
    other.save_pretrained("demo", include_classifier=True)
    assert torch.equal(AhaExplainer.from_pretrained("demo")(pixels).scores, other(pixels).scores)


@pytest.mark.parametrize("name", ["", ".", "..", "demo/../demo", "absent", "org/demo"])
def test_other_names_are_not_bundled(name, tmp_path, monkeypatch):
    (tmp_path / "bundled" / "demo").mkdir(parents=True)
    (tmp_path / "bundled" / "demo" / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(modeling, "__file__", str(tmp_path / "modeling_aha.py"))
    assert modeling._bundled_path(name) == name


# ----------------------------------------------------------------------------------------------- the rest of the stack


def test_auto_classes_know_it(saved):
    explainer, folder, pixels = saved
    assert type(AutoConfig.from_pretrained(folder)) is AhaConfig
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is AhaExplainer
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)
    assert AutoModel.from_pretrained(folder, load_classifier=False).classifier is None
    assert type(AutoModel.from_config(explainer.config)) is AhaExplainer


def test_its_files_travel_as_custom_code():
    package = Path(modeling.__file__).parent
    # The last two are what transformers itself cannot be installed without.
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors"}
    standard = set(sys.stdlib_module_names)
    for name in sorted(path.stem for path in package.glob("*_aha.py")):
        assert set(get_imports(package / f"{name}.py")) - standard <= allowed, name


def test_deepcopy_is_independent(explainer):
    pixels = torch.randn(1, 3, 32, 32)
    before = explainer(pixels).scores
    other = copy.deepcopy(explainer)
    assert torch.equal(other(pixels).scores, before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert torch.equal(explainer(pixels).scores, before)


def test_a_new_decoder_is_drawn_from_the_global_seed(make_classifier):
    maps = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        maps.append(make_explainer(make_classifier("vit"))(torch.ones(1, 3, 32, 32), 0).scores)
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


def test_an_untrained_decoder_starts_at_a_sane_scale(explainer):
    scores = explainer(torch.randn(4, 3, 32, 32)).scores
    assert 0.1 < scores.std().item() < 30


def test_it_is_a_pretrained_model_of_the_library(explainer):
    assert isinstance(explainer, PreTrainedModel)
    assert explainer.main_input_name == "pixel_values"
    assert explainer.device == torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explainer.to(torch.bfloat16).dtype == torch.bfloat16
    assert explainer.classifier.model.dtype == torch.bfloat16
