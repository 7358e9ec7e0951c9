"""`AhaConfig`: round trips, what it refuses, and what it tolerates from other versions."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig

import hf_aha.modeling_aha  # noqa: F401  (registers the config)
from hf_aha import AhaConfig


FILLED = {
    "base_model_name_or_path": "org/classifier",
    "base_model_revision": "0" * 40,
    "base_model_fingerprint": [0.5, -1.25, 3.0],
    "base_model_type": "dinov2",
    "image_size": [112, 98],
    "patch_size": [14, 14],
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
    "token_size": 384,
    "class_vector_size": 768,
    "taps": [2, 4],
    "encoder_name_or_path": "org/encoder",
    "encoder_revision": "1" * 40,
    "grid_width": 8,
    "grid_depth": 0,
    "quarter_width": 4,
    "half_width": 2,
    "gradient_features": 3,
    "gradient_references": ["black"],
    "gradient_layers": [1, 3],
    "gradient_detail": True,
    "init_from": {"explainer": "org/explainer", "base_model": None, "copied": ["half_stem"], "new": ["class"]},
    "includes_classifier": True,
    "training": {"steps": 10, "loss": 0.5},
}


def values(config):
    return {name: getattr(config, name) for name in FILLED}


def test_every_field_survives_saving_and_loading(tmp_path):
    config = AhaConfig(**FILLED, id2label={0: "tench", 1: "church"})
    config.save_pretrained(tmp_path)
    for loaded in (AhaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is AhaConfig
        assert values(loaded) == FILLED
        assert loaded.id2label == {0: "tench", 1: "church"}
        assert loaded.num_labels == 2


def test_defaults_and_tuples_become_lists_so_that_json_gives_the_same_back(tmp_path):
    config = AhaConfig(taps=(1, 2))
    assert config.taps == [1, 2]
    assert config.image_size == [224, 224]
    assert AhaConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_two_configs_share_no_list():
    first, second = AhaConfig(), AhaConfig()
    first.taps.append(13)
    assert second.taps == [3, 6, 9, 12]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copy_and_pickle(duplicate):
    config = AhaConfig(**FILLED)
    other = duplicate(config)
    assert other.to_dict() == config.to_dict()
    other.taps.append(9)
    assert config.taps == [2, 4]


@pytest.mark.parametrize(
    "name, value",
    [
        ("grid_width", "8"),
        ("grid_width", 8.0),
        ("grid_depth", True),
        ("taps", 3),
        ("taps", "3"),
        ("taps", [1.5]),
        ("taps", None),
        ("image_size", 224),
        ("image_mean", ["a", "b", "c"]),
        ("base_model_name_or_path", 5),
        ("base_model_fingerprint", ["x"]),
        ("includes_classifier", "yes"),
        ("training", [1]),
    ],
)
def test_a_wrong_type_is_refused_by_the_name_of_its_field(name, value, tmp_path):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
        AhaConfig(**{name: value})
    content = AhaConfig().to_dict() | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
        AhaConfig.from_pretrained(tmp_path)


def test_a_wrong_type_is_refused_on_assignment_too():
    config = AhaConfig()
    with pytest.raises(StrictDataclassFieldValidationError, match="'token_size'"):
        config.token_size = "768"
    assert config.token_size == 768


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("grid_width", 0, "grid_width must be at least 1, but it is 0"),
        ("half_width", -1, "half_width must be at least 1, but it is -1"),
        ("grid_depth", -1, "grid_depth must not be negative, but it is -1"),
        ("taps", [], "taps must name at least one layer"),
        ("taps", [0, 3], "counted from 1, but it is .0, 3"),
        ("image_size", [224], "image_size must hold 2 values"),
        ("image_mean", [0.5], "image_mean must hold 3 values"),
        ("patch_size", [0, 16], "patch_size must hold positive values"),
        ("image_std", [0.5, 0.0, 0.5], "image_std must hold positive values"),
        ("gradient_features", -1, "gradient_features must lie in 0..1024, but it is -1"),
        (
            "gradient_references",
            ["blur", "blur"],
            "gradient_references must be some of black, mean, blur, noise, each",
        ),
        ("gradient_references", ["white"], "each once, but it is .'white'."),
        ("gradient_references", [], "gradient_references must be some of"),
        ("gradient_detail", True, "gradient_detail is true, but gradient_features is 0"),
        ("gradient_layers", [1], "need gradient_features of at least 2, but they are .1. with gradient_features=0"),
    ],
)
def test_values_that_do_not_fit_are_refused(name, value, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        AhaConfig(**{name: value})


def test_whole_numbers_serve_as_normalisation():
    assert AhaConfig(image_mean=[0, 0, 0], image_std=[1, 1, 1]).image_std == [1, 1, 1]


def test_a_key_of_a_newer_version_is_left_out_with_a_warning(tmp_path):
    content = AhaConfig(taps=[5]).to_dict() | {"a_later_field": {"x": 1}, "transformers_weights": "other.bin"}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    for load in (AhaConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.warns(UserWarning, match="holds 'a_later_field', 'transformers_weights', which this version"):
            config = load(tmp_path)
        assert config.taps == [5]
        assert not {"a_later_field", "transformers_weights"} & set(config.to_dict())


@pytest.mark.filterwarnings("error")
def test_what_transformers_writes_itself_is_no_unknown_key(tmp_path):
    content = AhaConfig(id2label={0: "a", 1: "b", 2: "c"}, dtype="bfloat16").to_dict()
    AhaConfig.from_dict(content | {"auto_map": {"AutoModel": "modeling_aha.AhaExplainer"}, "custom_pipelines": {}})


@pytest.mark.parametrize("name", ["base_model_revision", "encoder_revision"])
@pytest.mark.parametrize("value", ["main", "abc", "../" * 13 + "a", "A" * 40])
def test_models_are_pinned_to_commits_only(name, value):
    with pytest.raises(StrictDataclassClassValidationError, match=f"{name} must be a commit of 40 hexadecimal digits"):
        AhaConfig(**{name: value})


def test_every_field_is_documented():
    own = set(AhaConfig.__annotations__) - {"model_type"}
    assert own == set(FILLED), "a new field needs a value in FILLED"
    missing = [name for name in own if f"{name} (" not in AhaConfig.__doc__ and f"{name}, " not in AhaConfig.__doc__]
    assert missing == []


def test_what_an_explanation_costs():
    assert (AhaConfig().num_gradient_maps, AhaConfig().passes_per_explanation) == (0, 1)
    config = AhaConfig(gradient_features=2, gradient_references=["blur", "mean", "black"])
    assert (config.num_gradient_maps, config.passes_per_explanation) == (12, 13)
    config = AhaConfig(gradient_features=2, gradient_references=["blur", "mean"], gradient_layers=[2, 4, 6])
    assert config.num_gradient_token_maps == 6
