"""`FrozenEncoder`: its tokens against an independent extraction, saving, and explainers that read it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    BeitModel,
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from hf_aha import AhaExplainer, ClassifierMismatchError, UnsupportedClassifierError
from hf_aha.encoder_aha import FrozenEncoder


MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
SHAPE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10}
TEXT |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
BACKBONES = {
    "vit": (ViTModel, ViTConfig, {}, 1),
    "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}, 1),
    "dinov2_with_registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"num_register_tokens": 4}, 5),
    "dinov3_vit": (DINOv3ViTModel, DINOv3ViTConfig, {"num_register_tokens": 4}, 5),
    "beit": (BeitModel, BeitConfig, {"use_relative_position_bias": True}, 1),
    "clip_vision_model": (CLIPVisionModel, CLIPVisionConfig, {}, 1),
}


def make_backbone(name, patch_size=8, image_size=32):
    model_class, config_class, extra, prefix = BACKBONES[name]
    torch.manual_seed(3)
    model = model_class(config_class(**SHAPE, image_size=image_size, patch_size=patch_size, **extra))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lambda" in key:
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval(), prefix


def save_backbone(folder, name, **sizes):
    model, prefix = make_backbone(name, **sizes)
    model.save_pretrained(folder)
    BitImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return model, prefix


def save_classifier(folder, model, size=32):
    model.save_pretrained(folder)
    processor = ViTImageProcessor(size={"height": size, "width": size}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return request.param


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_tokens_equal_an_independent_extraction(backbone, size):
    model, prefix = make_backbone(backbone)
    encoder = FrozenEncoder(model, MEAN, STD)
    rgb = torch.rand(2, 3, *size)
    pixels = (rgb - 0.4) / 0.3
    with torch.no_grad():
        tokens = encoder(pixels, [1, 3], [0.4] * 3, [0.3] * 3)
    assert [t.shape for t in tokens] == [(2, size[0] // 8, size[1] // 8, 24)] * 2

    inner = getattr(model, "vision_model", model)
    own = (rgb - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    flag = {} if "dino" in backbone or size == (32, 32) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = inner(own, output_hidden_states=True, **flag).hidden_states
    for layer, token in zip((1, 3), tokens, strict=True):
        expected = states[layer][:, prefix:].reshape(2, size[0] // 8, size[1] // 8, 24)
        torch.testing.assert_close(token, expected, atol=1e-4, rtol=1e-4)


def test_another_patch_size_resizes_to_its_next_multiple():
    model, prefix = make_backbone("dinov2", patch_size=14, image_size=42)
    encoder = FrozenEncoder(model, MEAN, STD)
    rgb = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        (token,) = encoder((rgb - 0.4) / 0.3, [2], [0.4] * 3, [0.3] * 3)
        own = (rgb - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        resized = torch.nn.functional.interpolate(own, size=(42, 56), mode="bilinear")
        expected = model(resized, output_hidden_states=True).hidden_states[2][:, prefix:].reshape(1, 3, 4, 24)
    torch.testing.assert_close(token, expected, atol=1e-4, rtol=1e-4)


def test_the_grid_is_row_major():
    model, _ = make_backbone("vit")
    encoder = FrozenEncoder(model, (0.0,) * 3, (1.0,) * 3)
    pixels = torch.zeros(1, 3, 32, 48)
    changed = pixels.clone()
    changed[..., 8:16, 40:48] = 2.0
    with torch.no_grad():
        first, second = (encoder(x, [1], (0.0,) * 3, (1.0,) * 3)[0] for x in (pixels, changed))
    row, column = divmod(int((second - first).norm(dim=-1).flatten().argmax()), first.shape[2])
    assert (row, column) == (1, 5)


def test_it_is_frozen_and_stays_in_eval_mode():
    encoder = FrozenEncoder(make_backbone("vit")[0].train(), MEAN, STD).train()
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", [*BACKBONES, "siglip"])
def test_save_and_load_round_trip(name, tmp_path):
    if name == "siglip":
        vision = {**SHAPE, "image_size": 32, "patch_size": 8}
        SiglipModel(SiglipConfig(vision_config=vision, text_config=TEXT)).save_pretrained(tmp_path / "a")
        CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path / "a")
    else:
        save_backbone(tmp_path / "a", name)
    first = FrozenEncoder.from_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    second = FrozenEncoder.from_pretrained(tmp_path, subfolder="b")
    assert second.image_mean == pytest.approx(MEAN)
    assert second.image_std == pytest.approx(STD)
    pixels = torch.randn(1, 3, 32, 32)
    for a, b in zip(*(e(pixels, [1, 2, 3], MEAN, STD) for e in (first, second)), strict=True):
        assert torch.equal(a, b)


def test_one_that_was_built_in_memory_says_what_saving_needs(tmp_path):
    with pytest.raises(ValueError, match="image processor"):
        FrozenEncoder(make_backbone("vit")[0], MEAN, STD).save_pretrained(tmp_path)


def test_a_processor_that_does_not_normalise_means_plain_rgb(tmp_path):
    make_backbone("vit")[0].save_pretrained(tmp_path)
    ViTImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    encoder = FrozenEncoder.from_pretrained(tmp_path)
    assert (encoder.image_mean, encoder.image_std) == ((0.0,) * 3, (1.0,) * 3)


def test_hierarchical_models_are_refused():
    swin = SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    )
    with pytest.raises(UnsupportedClassifierError, match="SwinModel cannot serve as encoder"):
        FrozenEncoder(swin, MEAN, STD)(torch.zeros(1, 3, 32, 32), [1, 2], MEAN, STD)


# ------------------------------------------------------------------------------------------ explainers with an encoder


@pytest.fixture
def folders(tmp_path, make_classifier):
    save_backbone(tmp_path / "encoder", "dinov3_vit", patch_size=16)
    return save_classifier(tmp_path / "classifier", make_classifier("vit")), tmp_path / "encoder"


def make_explainer(folders, **arguments):
    classifier, encoder = folders
    return AhaExplainer.from_classifier(classifier, encoder=encoder, grid_width=8, grid_depth=1, **arguments)


def test_sizes_and_layers_are_the_encoders(folders):
    config = make_explainer(folders).config
    assert (config.token_size, config.class_vector_size) == (24, 32)
    assert config.taps == [1, 2, 3]
    assert config.encoder_name_or_path == str(folders[1])


def test_scores_come_from_its_tokens_and_the_logits_from_the_classifier(folders):
    explainer = make_explainer(folders)
    pixels = torch.randn(2, 3, 32, 48)
    output = explainer(pixels, 3)
    tokens = explainer.encoder(pixels, [1, 2, 3], explainer.config.image_mean, explainer.config.image_std)
    vectors = explainer.classifier.class_vectors(torch.tensor([3, 3]))
    torch.testing.assert_close(output.scores, explainer.decoder(tokens, pixels, vectors))
    expected = explainer.classifier.model(pixels, interpolate_pos_encoding=True).logits
    assert torch.equal(output.logits, expected)


def test_the_map_does_not_depend_on_the_classifiers_weights_below_its_head(folders):
    explainer = make_explainer(folders)
    pixels = torch.randn(1, 3, 32, 32)
    before = explainer(pixels, 1)
    with torch.no_grad():
        for parameter in explainer.classifier.model.vit.parameters():
            parameter.normal_()
    after = explainer(pixels, 1)
    assert torch.equal(before.scores, after.scores)
    assert not torch.equal(before.logits, after.logits)


def test_train_leaves_both_frozen_parts_alone(folders):
    explainer = make_explainer(folders).train()
    assert explainer.decoder.training
    frozen = [*explainer.encoder.modules(), *explainer.classifier.modules()]
    assert not any(module.training for module in frozen)
    explainer(torch.randn(1, 3, 32, 32)).scores.sum().backward()
    assert all(p.grad is None for part in (explainer.encoder, explainer.classifier) for p in part.parameters())


def test_only_the_decoder_is_saved_and_both_are_found_again(folders, tmp_path):
    explainer = make_explainer(folders).eval()
    explainer.save_pretrained(tmp_path / "explainer")
    assert sorted(p.name for p in (tmp_path / "explainer").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    loaded, info = AhaExplainer.from_pretrained(tmp_path / "explainer", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(pixels).scores, explainer(pixels).scores)


def test_include_classifier_includes_the_encoder(folders, tmp_path):
    explainer = make_explainer(folders).eval()
    explainer.save_pretrained(tmp_path / "all", include_classifier=True)
    for folder in folders:
        shutil.rmtree(folder)
    shutil.move(tmp_path / "all", tmp_path / "moved")
    loaded = AhaExplainer.from_pretrained(tmp_path / "moved")
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(pixels).scores, explainer(pixels).scores)


def test_explain_reads_the_encoder_too(folders):
    explainer = make_explainer(folders)
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    assert explainer.explain(photograph).scores.shape == (20, 30)


def test_a_classifier_alone_is_not_enough(folders, make_classifier):
    explainer = AhaExplainer(make_explainer(folders).config)
    with pytest.raises(ClassifierMismatchError, match="give it with encoder="):
        explainer.attach(make_classifier("vit"))


def test_an_encoder_that_the_config_does_not_name_is_refused(folders, make_classifier):
    explainer = AhaExplainer.from_classifier(folders[0], grid_width=8, grid_depth=1)
    encoder = FrozenEncoder.from_pretrained(folders[1])
    with pytest.raises(ClassifierMismatchError, match="classifier's own tokens"):
        explainer.attach(make_classifier("vit"), encoder=encoder)


def test_an_encoder_of_other_sizes_is_refused(folders, make_classifier):
    explainer = make_explainer(folders)
    wide = FrozenEncoder(ViTModel(ViTConfig(**SHAPE | {"hidden_size": 32}, image_size=32, patch_size=8)), MEAN, STD)
    with pytest.raises(ClassifierMismatchError, match="width 24, but the encoder's are 32"):
        explainer.attach(make_classifier("vit"), encoder=wide)
    shallow = FrozenEncoder(
        ViTModel(ViTConfig(**SHAPE | {"num_hidden_layers": 2}, image_size=32, patch_size=8)), MEAN, STD
    )
    with pytest.raises(ClassifierMismatchError, match="reads layer 3, but the encoder has 2"):
        explainer.attach(make_classifier("vit"), encoder=shallow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_and_attention_reach_it(folders, tmp_path, dtype):
    make_explainer(folders).save_pretrained(tmp_path / "explainer")
    loaded = AhaExplainer.from_pretrained(tmp_path / "explainer", dtype=dtype, attn_implementation="eager")
    assert loaded.encoder.model.dtype == dtype
    assert loaded.encoder.model.config._attn_implementation == "eager"
    scores = loaded(torch.randn(1, 3, 32, 32)).scores
    assert scores.dtype == torch.float32 and bool(torch.isfinite(scores).all())
    assert make_explainer(folders, attn_implementation="eager").encoder.model.config._attn_implementation == "eager"
