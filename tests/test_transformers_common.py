"""transformers' own common model tests (`ModelTesterMixin`), run on `AhaExplainer`.

They lie in transformers' repository and source archive, not in the installed package, so this module is skipped unless
TRANSFORMERS_TESTS names the folder `tests` of the installed version: `make test-transformers` fetches it. It needs
`parameterized` and, for transformers' own markers, `pytest -o addopts=`.

What does not apply, beside text generation, embeddings of tokens, mixtures of experts, flash attention and parallel
plans, which the mixin skips by itself, is in `NOT_OURS` with the reason.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import types
import unittest
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_classifier
from transformers import AutoModelForImageClassification, ViTImageProcessor

from hf_aha import AhaConfig, AhaExplainer


FOLDER = os.environ.get("TRANSFORMERS_TESTS", "")
if not FOLDER:
    pytest.skip("TRANSFORMERS_TESTS names no folder with transformers' tests", allow_module_level=True)

# Siblings that the common tests import and the source archive lacks. Generation is for text; export and compilation
# are tested in test_model_contract.py.
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}

_NO_STATES = "the forward returns scores, logits and target: states and attentions are the classifier's, ask it"
_NO_EMBEDDING = "no weights of the explainer embed tokens or pixels"
_REFUSED = "files without all of the decoder's weights are refused instead of being filled in at random"
NOT_OURS = {
    "test_all_tensors_are_parameter_or_buffer": "it calls a model built on the meta device, which has no classifier",
    "test_attention_outputs": _NO_STATES,
    "test_can_capture_specific_layers_hidden_states": _NO_STATES,
    "test_can_set_attention_dynamically": "its own config names none; test_model_contract.py asks the classifier",
    "test_capture_outputs_decorator": _NO_STATES,
    "test_hidden_states_output": _NO_STATES,
    "test_model_outputs_equivalence": _NO_STATES + "; tuple and dict are compared in test_modeling_aha.py",
    "test_retain_grad_hidden_states_attentions": _NO_STATES,
    "test_from_pretrained_no_checkpoint": "weights come from safetensors files only, never from a dict without them",
    "test_model_weights_reload_no_missing_tied_weights": _REFUSED,
    "test_can_load_ignoring_mismatched_shapes": "it sets image_std to one number, which the strict config refuses",
    "test_load_with_mismatched_shapes": "it changes num_labels, which belongs to the classifier",
    "test_model_get_set_embeddings": _NO_EMBEDDING,
    "test_enable_input_require_grads": _NO_EMBEDDING,
    "test_enable_input_require_grads_with_gradient_checkpointing": _NO_EMBEDDING,
    "test_training": "the forward has no loss: training compares the classifier's answers to many perturbed images",
}


def load_mixin() -> type:
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(Path(FOLDER).resolve())]
    sys.modules["transformers_tests"] = package
    for name, mixin in ABSENT.items():
        for part in (name.partition(".")[0], name):
            module = types.ModuleType(f"transformers_tests.{part}")
            module.__path__ = []
            sys.modules[module.__name__] = module
        setattr(module, mixin, type(mixin, (), {}))
    return importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


ModelTesterMixin = load_mixin()


class Explainer(AhaExplainer):
    """The common tests build a model from its config alone; this one then fetches its classifier by itself."""

    def __init__(self, config: AhaConfig):
        super().__init__(config)
        weight = self.decoder.half_stem.weight
        if config.base_model_name_or_path and not weight.is_meta:
            name = config.base_model_name_or_path
            self.attach(AutoModelForImageClassification.from_pretrained(name, dtype=weight.dtype))


class ModelTester:
    """What the common tests ask about a model: a config, and inputs for it."""

    is_training = False
    batch_size = 3

    def __init__(self, classifier: str):
        self.classifier = classifier

    def get_config(self) -> AhaConfig:
        sizes = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
        return AhaExplainer.from_classifier(self.classifier, **sizes).config

    def prepare_config_and_inputs_for_common(self) -> tuple[AhaConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {"pixel_values": torch.randn(self.batch_size, 3, 32, 32)}


def skipped(reason: str) -> Callable[[unittest.TestCase], None]:
    def test(self: unittest.TestCase) -> None:
        self.skipTest(reason)

    return test


class TestCommon(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (Explainer,)
    has_attentions = False
    test_resize_embeddings = False
    locals().update({name: skipped(reason) for name, reason in NOT_OURS.items() if hasattr(ModelTesterMixin, name)})

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        build_classifier("vit").save_pretrained(cls.folder.name)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(cls.folder.name)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.folder.cleanup()

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.folder.name)
