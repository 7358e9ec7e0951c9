"""Tiny random classifiers of every supported family, built from configurations: nothing is downloaded."""

from __future__ import annotations

import os


# Read when the libraries are imported, so they come before every other import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import copy  # noqa: E402
import importlib  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import (  # noqa: E402
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)


torch.set_num_threads(1)

MakeClassifier = Callable[..., PreTrainedModel]

FAMILIES = (
    "vit",
    "deit",
    "deit-teacher",
    "beit",
    "data2vec-vision",
    "dinov2",
    "dinov2_with_registers",
    "vit_msn",
    "ijepa",
    "siglip",
    "clip",
)

_PLAIN = {
    "vit": (ViTConfig, ViTForImageClassification, {}),
    "deit": (DeiTConfig, DeiTForImageClassification, {}),
    "deit-teacher": (DeiTConfig, DeiTForImageClassificationWithTeacher, {}),
    "beit": (BeitConfig, BeitForImageClassification, {"use_relative_position_bias": True}),
    "data2vec-vision": (
        Data2VecVisionConfig,
        Data2VecVisionForImageClassification,
        {"use_relative_position_bias": True},
    ),
    "dinov2": (Dinov2Config, Dinov2ForImageClassification, {"mlp_ratio": 2}),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersForImageClassification,
        {"mlp_ratio": 2, "num_register_tokens": 4},
    ),
    "vit_msn": (ViTMSNConfig, ViTMSNForImageClassification, {}),
    "ijepa": (IJepaConfig, IJepaForImageClassification, {}),
}

_TWO_TOWERS = {
    "siglip": (SiglipConfig, SiglipForImageClassification),
    "clip": (CLIPConfig, CLIPForImageClassification),
}


def build_classifier(
    family: str,
    *,
    image_size: int | tuple[int, int] = 32,
    patch_size: int = 8,
    hidden_size: int = 32,
    num_layers: int = 4,
    num_labels: int = 5,
    seed: int = 0,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """A tiny random classifier in evaluation mode whose logits and tokens depend on the pixels and on every layer."""
    shape = {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
    }
    if family in _TWO_TOWERS:
        config_class, model_class = _TWO_TOWERS[family]
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        text |= {"vocab_size": 10, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
        config = config_class(vision_config=shape, text_config=text)
        config.num_labels = num_labels
    else:
        config_class, model_class, extra = _PLAIN[family]
        config = config_class(**shape, **extra, num_labels=num_labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, attn_implementation=attn_implementation)
        with torch.no_grad():
            # The libraries' small or zero initial values (position tables, layer scales of 1e-5 or 0.1) would hide
            # most of the network from the logits.
            for name, parameter in model.named_parameters():
                if "lambda" in name:
                    parameter.fill_(0.5)
                elif parameter.ndim > 1:
                    parameter.normal_(std=0.5 if "relative_position" in name else 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def _classifier_cache() -> dict[tuple, PreTrainedModel]:
    return {}


@pytest.fixture
def make_classifier(_classifier_cache: dict[tuple, PreTrainedModel]) -> MakeClassifier:
    """`make_classifier(family, **shape)`: an own copy of a tiny classifier, which is built once a session."""

    def make(family: str = "vit", **shape: object) -> PreTrainedModel:
        key = (family, *sorted(shape.items()))
        if key not in _classifier_cache:
            _classifier_cache[key] = build_classifier(family, **shape)
        return copy.deepcopy(_classifier_cache[key])

    return make


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every supported family in turn."""
    return request.param


@pytest.fixture
def model(family: str, make_classifier: MakeClassifier) -> PreTrainedModel:
    """An own copy of a tiny classifier of every supported family in turn: 32 x 32 pixels, patch 8, 5 classes."""
    return make_classifier(family)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state, whichever tests ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """`script(name)`: a benchmark as a module, found as if it were run from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
        yield importlib.import_module


@pytest.fixture
def accelerate_afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Accelerate keeps the first precision of a process, and datasets its copies; a training here meets neither."""
    from accelerate.state import AcceleratorState

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def compile_eagerly(monkeypatch) -> None:
    """`torch.compile` without a compiler: the graphs are captured, but run as they are."""
    torch.compiler.reset()  # a classifier compiled by another test may not stand in
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: compile_with(module, backend="eager", **kwargs))
