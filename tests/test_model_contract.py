"""What every model of transformers can do, `AhaExplainer` can do: the contract that its common tests describe.

Families, targets, files and attaching are tested in `test_modeling_aha.py`; transformers' own common tests run on the
explainer in `test_transformers_common.py`, which also says which of them do not apply.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import pytest
import torch
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree
from transformers import AutoConfig, AutoModel, Dinov2Config, Dinov2Model, ViTImageProcessor
from transformers.utils import ModelOutput

import hf_aha.decoder_aha as decoder_module
from hf_aha import AhaConfig, AhaExplainer, AhaOutput, UnsupportedClassifierError
from hf_aha.encoder_aha import FrozenEncoder


SIZES = {"grid_width": 16, "grid_depth": 2, "quarter_width": 8, "half_width": 8}
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


def make_explainer(model, **arguments):
    return AhaExplainer.from_classifier(model, image_processor=PROCESSOR, **SIZES | arguments).eval()


@pytest.fixture
def explainer(make_classifier):
    return make_explainer(make_classifier("vit"))


@pytest.fixture
def folder(explainer, tmp_path):
    """A saved explainer that needs nothing else."""
    explainer.save_pretrained(tmp_path / "explainer", include_classifier=True)
    return tmp_path / "explainer"


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 32, 32)


# ----------------------------------------------------------------------------------------------------- call and output


def test_the_signature_of_the_forward():
    parameters = inspect.signature(AhaExplainer.forward).parameters
    assert list(parameters) == ["self", "pixel_values", "target", "return_dict", "against"]
    assert AhaExplainer.main_input_name == list(parameters)[1]


def test_the_output_is_a_model_output(explainer, pixels):
    output = explainer(pixel_values=pixels)
    assert isinstance(output, ModelOutput) and type(output) is AhaOutput
    assert list(output) == ["scores", "logits", "target"]
    assert output["scores"] is output.scores is output[0] is output.to_tuple()[0]
    assert all(a is b for a, b in zip(output[:2], (output.scores, output.logits), strict=True))
    leaves, spec = pytree.tree_flatten(output)
    assert len(leaves) == 3 and type(pytree.tree_unflatten(leaves, spec)) is AhaOutput
    assert list(AhaOutput(scores=output.scores)) == ["scores"]


def test_equal_calls_give_equal_maps(explainer, pixels):
    first = explainer(pixels)
    torch.manual_seed(99)
    assert torch.equal(explainer(pixels).scores, first.scores)
    # Nothing is dropped or normalised over the batch in training either.
    assert torch.equal(explainer.train()(pixels).scores, first.scores)


def test_a_map_depends_on_its_own_image_and_class_only(explainer, pixels):
    target = torch.tensor([4, 0, 2])
    with torch.no_grad():
        together = explainer(pixels, target).scores
        for order in ([2, 0, 1], [1], [0, 0, 2, 1, 0]):
            again = explainer(pixels[order], target[order]).scores
            torch.testing.assert_close(again, together[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 80), (64, 64)])
def test_other_input_sizes(explainer, size):
    output = explainer(torch.randn(2, 3, *size))
    assert output.scores.shape == (2, *size) and output.logits.shape == (2, 5)


# ---------------------------------------------------------------------------------------------------- dtype and device


@pytest.mark.parametrize("move", ["half", "bfloat16", "to"])
def test_casts_reach_both_parts_and_the_scores_stay_float32(explainer, pixels, move):
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "to": torch.float64}[move]
    wanted = explainer(pixels, 1)
    moved = explainer.to(dtype) if move == "to" else getattr(explainer, move)()
    assert moved is explainer and explainer.dtype == dtype
    assert {p.dtype for p in explainer.parameters()} == {dtype}
    output = explainer(pixels.to(dtype), 1)
    assert output.scores.dtype == torch.float32
    assert output.logits.dtype == dtype
    worst = (output.scores - wanted.scores).abs().max() / wanted.scores.abs().max()
    assert worst < {"half": 0.02, "bfloat16": 0.1, "to": 1e-4}[move]
    explainer.float()
    assert {p.dtype for p in explainer.parameters()} == {torch.float32}


def test_a_move_to_another_device_takes_the_classifier_along(explainer):
    explainer.to("meta")
    assert explainer.device.type == explainer.classifier.model.device.type == "meta"
    assert {p.device.type for p in explainer.parameters()} == {"meta"}


@pytest.mark.gpu
def test_an_accelerator_gives_the_map_of_the_cpu(explainer, pixels):
    with torch.no_grad():
        wanted = explainer(pixels, 1)
        explainer.to("cuda")
        found = explainer(pixels.cuda(), 1)
        compiled = torch.compile(explainer, fullgraph=True)(pixels.cuda(), torch.tensor([1, 1, 1]).cuda())
    assert found.scores.is_cuda
    scale = wanted.scores.abs().max()
    torch.testing.assert_close(found.scores.cpu() / scale, wanted.scores / scale, atol=1e-3, rtol=0)
    torch.testing.assert_close(compiled.scores.cpu() / scale, wanted.scores / scale, atol=1e-3, rtol=0)


def test_another_attention_reaches_the_classifier(explainer, pixels):
    wanted = explainer(pixels, 1).scores
    for name in ("eager", "sdpa", "eager"):
        explainer.set_attn_implementation(name)
        assert explainer.classifier.model.config._attn_implementation == name
        torch.testing.assert_close(explainer(pixels, 1).scores, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="attn_implementation=.foo."):
        explainer.set_attn_implementation("foo")
    with pytest.raises(RuntimeError, match="No classifier is attached"):
        AhaExplainer(AhaConfig()).set_attn_implementation("eager")


# ------------------------------------------------------------------------------------------------------------ training


def test_train_leaves_the_classifier_in_eval_mode(explainer):
    explainer.train()
    assert all(module.training for module in explainer.decoder.modules())
    assert not any(module.training for module in explainer.classifier.model.modules())
    explainer.eval()
    assert not any(module.training for module in explainer.modules())


def test_gradient_checkpointing_computes_again_and_changes_nothing(explainer, pixels, monkeypatch):
    assert explainer.supports_gradient_checkpointing
    calls = []
    forward = decoder_module._gelu
    monkeypatch.setattr(decoder_module, "_gelu", lambda x: calls.append(1) or forward(x))
    explainer.train()

    def gradients():
        calls.clear()
        explainer.zero_grad()
        scores = explainer(pixels, 1).scores
        scores.square().mean().backward()
        return len(calls), scores.detach(), [p.grad.clone() for p in explainer.decoder.parameters()]

    plain, scores, wanted = gradients()
    # Older versions of transformers have the other name only.
    word = "activation" if hasattr(explainer, "activation_checkpointing_enable") else "gradient"
    getattr(explainer, f"{word}_checkpointing_enable")()
    assert getattr(explainer, f"is_{word}_checkpointing")
    again, same, found = gradients()
    blocks = SIZES["grid_depth"] + 2
    assert again == plain + blocks
    assert torch.equal(same, scores)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    getattr(explainer, f"{word}_checkpointing_disable")()
    assert not getattr(explainer, f"is_{word}_checkpointing")
    assert gradients()[0] == plain


def test_parameters_are_counted(explainer):
    decoder = sum(p.numel() for p in explainer.decoder.parameters())
    classifier = sum(p.numel() for p in explainer.classifier.parameters())
    assert explainer.num_parameters() == decoder + classifier
    assert explainer.num_parameters(only_trainable=True) == decoder
    assert explainer.get_memory_footprint() >= 4 * (decoder + classifier)


def test_nothing_is_tied(explainer):
    before = {name: value.clone() for name, value in explainer.state_dict().items()}
    explainer.tie_weights()
    assert not explainer.all_tied_weights_keys
    after = explainer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


# ----------------------------------------------------------------------------------------------------- compile, export


@pytest.mark.parametrize("family", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])])
def test_the_forward_compiles_to_one_graph(make_classifier, pixels, family):
    explainer = make_explainer(make_classifier(family))
    torch._dynamo.reset()
    compiled = torch.compile(explainer, backend="eager", fullgraph=True)
    with torch.no_grad():
        found, wanted = compiled(pixels), explainer(pixels)
    assert type(found) is AhaOutput
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logits, wanted.logits)
    assert torch.equal(found.target, wanted.target)


@pytest.mark.slow
def test_compiled_calls_with_classes_sizes_and_gradients(explainer, pixels):
    torch._dynamo.reset()
    compiled = torch.compile(explainer, backend="eager", fullgraph=True)
    for target in (torch.tensor([1, 0, 4]), torch.tensor([[0, 1], [3, 2], [4, 4]])):
        torch.testing.assert_close(
            compiled(pixels, target).scores, explainer(pixels, target).scores, atol=1e-5, rtol=1e-5
        )
    wide = torch.randn(5, 3, 32, 48)
    torch.testing.assert_close(compiled(wide).scores, explainer(wide).scores, atol=1e-5, rtol=1e-5)
    compiled(pixels).scores.mean().backward()
    assert all(p.grad is not None for p in explainer.decoder.parameters())
    assert all(p.grad is None for p in explainer.classifier.parameters())


@pytest.mark.slow
def test_an_encoder_of_its_own_compiles_too(make_classifier, pixels, tmp_path):
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    explainer = make_explainer(make_classifier("vit"), encoder=tmp_path)
    assert isinstance(explainer.encoder, FrozenEncoder)
    torch._dynamo.reset()
    found = torch.compile(explainer, backend="eager", fullgraph=True)(pixels)
    torch.testing.assert_close(found.scores, explainer(pixels).scores, atol=1e-5, rtol=1e-5)


def test_the_forward_can_be_exported_for_any_batch(explainer, pixels):
    with torch.no_grad():
        program = torch.export.export(explainer, (pixels,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        module = program.module()
        for batch in (2, 3, 7):
            images = torch.randn(batch, 3, 32, 32)
            found, wanted = module(images), explainer(images)
            torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=1e-5)
            assert torch.equal(found.target, wanted.target)


def test_the_forward_can_be_exported_with_a_target(explainer, pixels):
    with torch.no_grad():
        module = torch.export.export(explainer, (pixels, torch.tensor([0, 1, 2]))).module()
        for target in (torch.tensor([0, 1, 2]), torch.tensor([4, 4, 0])):
            torch.testing.assert_close(
                module(pixels, target).scores, explainer(pixels, target).scores, atol=1e-5, rtol=1e-5
            )


def test_an_eager_call_after_compiling_still_refuses_what_is_wrong(explainer, pixels):
    torch._dynamo.reset()
    torch.compile(explainer, backend="eager", fullgraph=True)(pixels)
    with pytest.raises(ValueError, match="class index 5 is out of range"):
        explainer(pixels, 5)
    with pytest.raises(ValueError, match="target asks about classes 0 to 7"):
        explainer.classifier.class_vectors(torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        explainer(pixels * float("nan"))


# ----------------------------------------------------------------------------------------------------- copies, pickles


def test_a_config_is_copied_and_pickled(explainer):
    config = explainer.config
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), copy.copy(config)):
        assert type(other) is AhaConfig and other is not config
        assert other.to_dict() == config.to_dict()
    other = copy.deepcopy(config)
    other.taps.append(99)
    other.id2label[0] = "changed"
    assert config.taps == [1, 2, 3, 4] and config.id2label[0] == "LABEL_0"


def test_an_explainer_is_pickled(explainer, pixels):
    other = pickle.loads(pickle.dumps(explainer))
    assert torch.equal(other(pixels).scores, explainer(pixels).scores)
    assert other.image_processor.to_dict() == explainer.image_processor.to_dict()


def test_a_config_goes_through_json_whole_and_as_a_difference(explainer):
    config = explainer.config
    for text in (config.to_json_string(use_diff=True), config.to_json_string(use_diff=False)):
        content = json.loads(text)
        assert AhaConfig.from_dict(content).to_dict() == config.to_dict()
    difference = config.to_diff_dict()
    assert difference["grid_width"] == 16 and difference["model_type"] == "aha"
    assert "chunk_size_feed_forward" not in difference, "what every config has is left out"


# ------------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_round_trip_in_every_dtype(explainer, pixels, tmp_path, dtype):
    explainer.to(dtype).save_pretrained(tmp_path, include_classifier=True)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    loaded = AhaExplainer.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)
    loaded.save_pretrained(tmp_path / "again", include_classifier=True)
    again = AhaExplainer.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(again(pixels).scores, explainer(pixels).scores)


def test_sharded_weights(explainer, pixels, tmp_path):
    explainer.save_pretrained(tmp_path, max_shard_size="10KB", include_classifier=True)
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and sorted(set(index["weight_map"].values())) == shards
    assert set(index["weight_map"]) == {f"decoder.{name}" for name in explainer.decoder.state_dict()}
    loaded, info = AhaExplainer.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    # One file again: the shards of the earlier save must not be read instead.
    with torch.no_grad():
        explainer.decoder.pixel_score.weight.mul_(-2)
    explainer.save_pretrained(tmp_path, include_classifier=True)
    assert torch.equal(AhaExplainer.from_pretrained(tmp_path)(pixels).scores, explainer(pixels).scores)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(folder, explainer, pixels, device_map):
    loaded = AhaExplainer.from_pretrained(folder, device_map=device_map)
    assert len({p.device for p in loaded.parameters()}) == 1, "decoder and classifier lie apart"
    found = loaded(pixels.to(loaded.device), 1).scores
    torch.testing.assert_close(found.cpu(), explainer(pixels, 1).scores, atol=1e-4, rtol=1e-3)


def test_loading_takes_memory_only_for_what_is_in_the_file(folder, monkeypatch):
    """The decoder is built without storage: neither initialised at random nor held twice."""
    places = []
    build = AhaExplainer.__init__

    def spy(self, config):
        build(self, config)
        places.append({p.device.type for p in self.parameters()})

    monkeypatch.setattr(AhaExplainer, "__init__", spy)
    loaded = AhaExplainer.from_pretrained(folder, low_cpu_mem_usage=True)
    assert places and all(place == {"meta"} for place in places)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


def test_loading_is_in_eval_mode_and_reports_what_it_did(folder):
    loaded, info = AhaExplainer.from_pretrained(folder, output_loading_info=True)
    assert not any(module.training for module in loaded.modules())
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_weights_in_the_file_that_it_does_not_have_are_reported(folder, explainer, pixels):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"decoder.extra": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AhaExplainer.from_pretrained(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"decoder.extra"}
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)


def test_auto_classes(folder, explainer, pixels):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is AhaConfig
    assert type(AutoModel.from_config(config)) is AhaExplainer
    loaded = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
    assert type(loaded) is AhaExplainer
    assert torch.equal(loaded(pixels).scores, explainer(pixels).scores)
    for_model, unused = AutoConfig.from_pretrained(folder, grid_depth=2, nonsense=3, return_unused_kwargs=True)
    assert for_model.grid_depth == 2 and unused == {"nonsense": 3}


def test_a_config_can_be_overridden_where_the_weights_still_fit(folder):
    loaded = AhaExplainer.from_pretrained(folder, training={"steps": 7})
    assert loaded.config.training == {"steps": 7}


def test_the_same_code_serves_a_second_explainer_of_the_classifier(explainer, pixels, tmp_path):
    """Two explainers may share one classifier, and saving one of them keeps the other's hands off it."""
    other = AhaExplainer(explainer.config).attach(explainer.classifier).eval()
    other.save_pretrained(tmp_path / "other")
    explainer.save_pretrained(tmp_path / "explainer")
    for folder in ("other", "explainer"):
        assert all(name.startswith("decoder.") for name in load_file(tmp_path / folder / "model.safetensors"))
    assert torch.equal(other(pixels).logits, explainer(pixels).logits)


def test_an_explainer_is_no_classifier_itself(explainer):
    with pytest.raises(UnsupportedClassifierError):
        AhaExplainer.from_classifier(explainer, image_processor=PROCESSOR)
