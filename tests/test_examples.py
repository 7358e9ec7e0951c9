"""The scripts of examples/, run in this process on tiny settings; the Hub is one on the loopback interface."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_classifier
from loopback_hub import LoopbackHub, connected
from test_cli import save_photograph
from test_evaluate_command import save_dataset, save_explainer
from transformers import ViTImageProcessorPil

from hf_aha import AhaExplainer, InputGeometry
from hf_aha.cli import main as hf_aha_main
from hf_aha.dataset_maps import StoredMap


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    datasets.enable_progress_bars()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_says_what_it_is_and_has_a_main(name):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    assert f"python examples/{name}.py" in ast.get_docstring(tree)
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [argument.arg for argument in main.args.args] == ["argv"] and ast.get_docstring(main)


def test_explaining_writes_pictures_and_measures_each_map(tmp_path, capsys):
    explainer = save_explainer(tmp_path / "tiny")
    photographs = [str(save_photograph(tmp_path / f"{seed}.png", seed)) for seed in range(2)]
    first, second = example("explain_a_classifier").main([str(explainer), *photographs, "--target", "1"])
    assert first.target == second.target == 1
    assert len(list((tmp_path / "explained").glob("*.png"))) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("random" in line and first.label in line for line in lines)


def test_a_measured_map_that_knows_the_answer_beats_chance():
    class Classifier(torch.nn.Module):
        def forward(self, images):  # class 1 where the left half is bright
            logit = images[..., :16].mean(dim=(1, 2, 3)) - 0.5
            return type("Output", (), {"logits": torch.stack([-20 * logit, 20 * logit], dim=1)})

    class Explainer:
        device, dtype, classifier = torch.device("cpu"), torch.float32, Classifier()
        config = type("Config", (), {"image_mean": [0.0] * 3, "image_std": [1.0] * 3})

        def image_processor(self, images, return_tensors):
            return {"pixel_values": torch.ones(1, 3, 32, 32)}

        def __call__(self, pixel_values, target):
            scores = torch.zeros(1, 32, 32)
            scores[..., :16] = 1
            return type("Output", (), {"scores": scores})

    explanation = type("Explanation", (), {"image": None, "target": 1})
    ours, chance = example("explain_a_classifier").measured(Explainer(), explanation, "black")
    assert float(ours.deletion_auc) < float(chance.deletion_auc) - 0.1
    assert float(ours.insertion_auc) > float(chance.insertion_auc) + 0.1


def test_an_explainer_is_trained_and_pushed(tmp_path, capsys):
    build_classifier("vit").save_pretrained(tmp_path / "classifier")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "classifier")
    for number in range(3):
        save_photograph(tmp_path / "photographs" / "train" / "some" / f"{number}.png", number)
    words = ["--steps", "1", "--batch-size", "2", "--workers", "0", "--precision", "no", "--validation-split", ""]
    with LoopbackHub() as hub, connected(hub, tmp_path / "home") as patch:
        patch.setenv("HF_TOKEN", hub.add_account("alice"))
        patch.setattr("hf_aha.hub.BUNDLED_PHOTOGRAPHS", ())
        trained = example("train_and_push").main(["classifier", "photographs", "alice/tiny", *words, "--private"])
        pushed = hub.repository("alice/tiny")
        assert pushed.private and {"README.md", "config.json", "model.safetensors"} <= set(pushed.files())
        theirs = AhaExplainer.from_pretrained("alice/tiny", classifier=str(tmp_path / "classifier")).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels).scores, trained.eval()(pixels).scores)
    assert (tmp_path / "runs" / "example" / "final" / "config.json").exists()
    assert "It is shared as alice/tiny: " in capsys.readouterr().out


def stored_map(row: int, box: tuple[slice, slice], target: int = 0) -> StoredMap:
    """A map of 40 x 40 pixels with its highest ranks in one box."""
    ranks = np.random.default_rng(row).random((40, 40)).astype(np.float32) * 0.5
    ranks[box] += 0.5
    geometry = InputGeometry.from_processor(ViTImageProcessorPil(size={"height": 40, "width": 40}), (40, 40))
    return StoredMap(row, f"{row}.jpg", "", target, f"class-{target}", 1.0, target, "", 1.0, ranks, geometry, {})


CENTRE, CORNER = (slice(16, 26), slice(16, 26)), (slice(0, 4), slice(0, 25))


def test_the_audit_finds_the_map_that_looks_at_the_border():
    audit = example("audit_for_shortcuts").audit
    maps = [stored_map(row, CENTRE) for row in range(5)] + [stored_map(5, CORNER), stored_map(6, CORNER, target=1)]
    findings = audit(maps)
    assert [one.border for one in findings] == [0, 0, 0, 0, 0, 1, 1]
    assert findings[5].oddity == 1 and max(one.oddity for one in findings[:5]) < 0.7
    # One map has no class to be unlike.
    assert findings[6].oddity is None and findings[6].label == "class-1"


def test_a_map_without_places_of_its_own_has_its_share_at_the_border():
    module = example("audit_for_shortcuts")
    everywhere = np.ones((100, 50), dtype=bool)
    assert module.border_share(everywhere) == pytest.approx(0.36)
    assert module.places(everywhere).sum() == pytest.approx(1)
    assert module.top_pixels(np.arange(100.0).reshape(10, 10), 0.05).sum() == 5


def test_the_audit_reads_what_explain_dataset_wrote(tmp_path, capsys):
    explainer, data = save_explainer(tmp_path / "tiny"), save_dataset(tmp_path / "data", 4)
    words = ["--explainer", explainer, "--split", "validation", "--output", "maps", "--workers", "0", "--quiet"]
    assert hf_aha_main(["explain-dataset", *map(str, [data, *words])]) == 0
    findings = example("audit_for_shortcuts").main(["maps", "--least", "2", "--show", "3"])
    assert [one.row for one in findings] == [0, 1, 2, 3]
    assert all(0 <= one.border <= 1 for one in findings)
    written = json.loads((tmp_path / "audit.json").read_text())
    assert [one["border"] for one in written] == [one.border for one in findings]
    printed = capsys.readouterr().out
    assert "The 3 of 4 photographs whose top pixels are nearest to the border:" in printed
    with pytest.raises(SystemExit):
        example("audit_for_shortcuts").main(["maps", "--share", "5"])
    assert "--share must lie between 0 and 1, but it is 5.0." in capsys.readouterr().err


def test_no_example_needs_more_than_the_package():
    allowed = {"hf_aha", "datasets", "numpy", "torch", *sys.stdlib_module_names}
    for name in SCRIPTS:
        for node in ast.walk(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {module.partition(".")[0] for module in modules} <= allowed, name
