"""An explainer that carries its code: it loads with `trust_remote_code=True` where hf_aha is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_classifier
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, ViTImageProcessor
from transformers.dynamic_module_utils import get_relative_import_files

import hf_aha.modeling_aha as modeling
from hf_aha import AhaConfig, AhaExplainer


SIZES = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
CODE = {"modeling_aha.py", *(Path(path).name for path in get_relative_import_files(modeling.__file__))}
AUTO_MAP = {"AutoConfig": "configuration_aha.AhaConfig", "AutoModel": "modeling_aha.AhaExplainer"}
COMMIT = "c" * 40

# What every script begins with: a machine without the package.
WITHOUT_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_aha":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

# Loads by folder and by Hub id, saves again, and loads two repositories with different code.
SCRIPT = """
import json, pathlib, shutil
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

report, pixels = {}, torch.load("pixels.pt")

def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None

report["not asked"] = refusal(lambda: AutoModel.from_pretrained("explainer"))
report["refused"] = refusal(lambda: AutoModel.from_pretrained("explainer", trust_remote_code=False))

scores = {}
config = AutoConfig.from_pretrained("explainer", trust_remote_code=True)
folder = AutoModel.from_pretrained("explainer", trust_remote_code=True)
hub = AutoModel.from_pretrained("org/explainer", trust_remote_code=True)
alone = AutoModel.from_pretrained("org/explainer", trust_remote_code=True, revision="c" * 40, load_classifier=False)
report["modules"] = [type(config).__module__, type(folder).__module__, type(hub).__module__]
report["classes"] = [type(config).__name__, type(folder).__name__, type(hub).__name__]
report["alone"] = alone.classifier is None
report["processor"] = folder.image_processor.to_dict() == AutoImageProcessor.from_pretrained("explainer").to_dict()
report["label"] = folder.class_index("label_3")
report["explain"] = refusal(lambda: folder.explain("photo.jpg"))
report["refine"] = refusal(lambda: folder.refine(pixels))
report["push"] = refusal(lambda: folder.push_to_hub("org/again"))
scores["folder"], scores["hub"] = folder(pixels, 1).scores, hub(pixels, 1).scores

hub.save_pretrained("again", include_classifier=True)
shutil.rmtree("home/modules")
again = AutoModel.from_pretrained("again", trust_remote_code=True)
scores["again"] = again(pixels, 1).scores
report["files"] = sorted(path.name for path in pathlib.Path("again").glob("*.py"))
report["auto_map"] = json.loads(pathlib.Path("again/config.json").read_text())["auto_map"]

other = AutoModel.from_pretrained("other", trust_remote_code=True)
report["version"] = [getattr(model, "version", None) for model in (folder, hub, again, other)]
report["imported"] = [name for name in sys.modules if name.partition(".")[0] == "hf_aha"]
save_file({name: value.detach().contiguous() for name, value in scores.items()}, "scores.safetensors")
pathlib.Path("report.json").write_text(json.dumps(report))
"""


def make_explainer():
    return AhaExplainer.from_classifier(build_classifier("vit"), image_processor=PROCESSOR, **SIZES).eval()


@pytest.fixture
def explainer():
    return make_explainer()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What a machine without the package reports, the explainer it loaded, and the pixels it explained."""
    place = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(0)
    explainer, pixels = make_explainer(), torch.randn(2, 3, 32, 32)
    torch.save(pixels, place / "pixels.pt")
    explainer.save_pretrained(place / "explainer", include_classifier=True, include_code=True)
    cached = place / "home" / "hub" / "models--org--explainer"
    shutil.copytree(place / "explainer", cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    shutil.copytree(place / "explainer", place / "other")
    code = (place / "other" / "modeling_aha.py").read_text()
    assert code.count('    main_input_name = "pixel_values"\n') == 1
    (place / "other" / "modeling_aha.py").write_text(
        code.replace(
            '    main_input_name = "pixel_values"\n', '    main_input_name = "pixel_values"\n    version = 2\n'
        )
    )
    settings = {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    hidden = ("HF_HUB_CACHE", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE", "PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_PACKAGE + SCRIPT],
        cwd=place,
        env={name: value for name, value in os.environ.items() if name not in hidden} | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((place / "report.json").read_text()), load_file(place / "scores.safetensors"), explainer, pixels


# ------------------------------------------------------------------------------------------------ without the package


def test_custom_code_gives_the_same_scores(elsewhere):
    report, scores, explainer, pixels = elsewhere
    wanted = explainer(pixels, 1).scores
    assert set(scores) == {"folder", "hub", "again"}
    for found in scores.values():
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert report["imported"] == []
    assert report["classes"] == ["AhaConfig", "AhaExplainer", "AhaExplainer"]
    assert all(module.startswith("transformers_modules.") for module in report["modules"])
    assert f".{COMMIT}." in report["modules"][2]
    assert report["alone"] and report["processor"]
    assert report["label"] == 3


def test_code_is_never_run_without_being_trusted(elsewhere):
    report = elsewhere[0]
    for answer in ("not asked", "refused"):
        assert report[answer].startswith("ValueError") and "trust_remote_code=True" in report[answer]


def test_what_needs_the_package_says_so(elsewhere):
    report = elsewhere[0]
    for method in ("explain", "refine"):
        assert report[method] == f"ImportError: {method}() needs the hf_aha package: pip install hf-aha."
    assert report["push"].startswith("ImportError") and "pip install hf-aha" in report["push"]


def test_custom_code_is_saved_again_with_its_code(elsewhere):
    report = elsewhere[0]
    assert set(report["files"]) == CODE
    assert report["auto_map"] == AUTO_MAP


def test_every_repository_runs_its_own_code(elsewhere):
    assert elsewhere[0]["version"] == [None, None, None, 2]


# --------------------------------------------------------------------------------------------------- with the package


def test_code_is_copied_when_asked_for(explainer, tmp_path):
    explainer.save_pretrained(tmp_path / "with", include_code=True)
    explainer.save_pretrained(tmp_path / "without")
    package = Path(modeling.__file__).parent
    assert {path.name for path in (tmp_path / "with").glob("*.py")} == CODE
    assert {"configuration_aha.py", "classifier_aha.py", "decoder_aha.py", "encoder_aha.py", "labels_aha.py"} < CODE
    for name in CODE:
        assert (tmp_path / "with" / name).read_bytes() == (package / name).read_bytes()
    assert json.loads((tmp_path / "with" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert not list((tmp_path / "without").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert not hasattr(explainer.config, "auto_map")


def test_only_the_main_process_copies_code(explainer, tmp_path):
    explainer.save_pretrained(tmp_path, include_code=True, is_main_process=False)
    explainer.save_pretrained(tmp_path, False, include_code=True)
    assert not list(tmp_path.glob("*.py"))


def test_a_saved_folder_points_at_no_other_code(explainer, tmp_path):
    explainer.save_pretrained(tmp_path / "first", include_classifier=True, include_code=True)
    content = json.loads((tmp_path / "first" / "config.json").read_text())
    content["auto_map"] = {name: f"org/elsewhere--{value}" for name, value in AUTO_MAP.items()}
    (tmp_path / "first" / "config.json").write_text(json.dumps(content))
    loaded = AhaExplainer.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "without", include_classifier=True)
    loaded.save_pretrained(tmp_path / "with", include_classifier=True, include_code=True)
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    assert json.loads((tmp_path / "with" / "config.json").read_text())["auto_map"] == AUTO_MAP
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "without")(pixels).scores, explainer(pixels).scores)


@pytest.mark.parametrize("trust", [None, False, True])
def test_the_package_runs_its_own_code_instead(explainer, tmp_path, trust):
    explainer.save_pretrained(tmp_path, include_classifier=True, include_code=True)
    (tmp_path / "modeling_aha.py").write_text("raise AssertionError('the code of the folder was run')\n")
    arguments = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(tmp_path, **arguments)) is AhaConfig
    loaded = AutoModel.from_pretrained(tmp_path, **arguments)
    assert type(loaded) is AhaExplainer
    assert type(AhaExplainer.from_pretrained(tmp_path, **arguments)) is AhaExplainer


def test_a_class_of_ones_own_is_not_saved_as_ours(explainer, tmp_path):
    class Louder(AhaExplainer):
        pass

    louder = Louder(explainer.config).attach(explainer.classifier)
    louder.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    with pytest.raises(
        ValueError, match=r"code of Louder itself would be left behind: call Louder\.register_for_auto"
    ):
        louder.save_pretrained(tmp_path / "refused", include_code=True)
    assert not (tmp_path / "refused").exists()


def test_bundled_explainers_carry_no_code():
    bundled = Path(modeling.__file__).parent / "bundled"
    assert not list(bundled.rglob("*.py"))
    for path in bundled.rglob("config.json"):
        assert "auto_map" not in json.loads(path.read_text()), path
