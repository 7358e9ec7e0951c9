"""Spaces: their files, the example in the repository, and the upload to a loopback Hub."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from conftest import build_classifier
from loopback_hub import LoopbackHub, connected
from transformers import ViTImageProcessorPil
from transformers.utils import logging

from hf_aha import AhaConfig, AhaExplainer
from hf_aha.cli import main
from hf_aha.space import GRADIO_VERSION, SpaceContents, space_contents, space_files


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub, connected(hub, tmp_path / "home") as patch:
        patch.setenv("HF_TOKEN", hub.add_account("alice"))
        yield hub


@pytest.fixture(autouse=True)
def library_verbosity():
    """The commands silence the libraries; other tests want to hear them."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if bar:
        logging.enable_progress_bar()


@pytest.fixture
def explainer(tmp_path) -> Path:
    """The folder of an explainer that was saved without its classifier."""
    build_classifier("vit").save_pretrained(tmp_path / "tiny-vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tiny-vit")
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    AhaExplainer.from_classifier(tmp_path / "tiny-vit", **sizes).save_pretrained(tmp_path / "final")
    return tmp_path / "final"


def push(*words: object) -> int:
    return main(["push-space", *map(str, words)])


def front_matter(readme: str) -> dict:
    return yaml.safe_load(readme.split("---\n")[1])


def test_the_example_in_the_repository_is_up_to_date():
    bundled = AhaConfig.from_pretrained(ROOT / "hf_aha" / "bundled" / "imagenette-demo")
    files = space_files(space_contents("imagenette-demo", bundled))
    folder = ROOT / "spaces" / "imagenette-demo"
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()} == files


def test_the_space_runs_the_gradio_that_is_tested():
    pins = (ROOT / "constraints-demo.txt").read_text(encoding="utf-8")
    assert re.search(r"^gradio==(.+?)(?:;|$)", pins, re.MULTILINE).group(1).strip() == GRADIO_VERSION


def test_files_of_a_hub_explainer():
    contents = SpaceContents(
        "alice/aha-vit", "google/vit", "google/vit", 1000, ("org/photos",), 'Say "hi": {{ 7*7 }}', "mit", "hf-aha==1.0"
    )
    files = space_files(contents)
    matter = front_matter(files["README.md"])
    assert matter["models"] == ["alice/aha-vit", "google/vit"] and matter["datasets"] == ["org/photos"]
    assert matter["sdk"] == "gradio" and matter["sdk_version"] == GRADIO_VERSION and matter["app_file"] == "app.py"
    assert matter["license"] == "mit" and matter["title"] == 'Say "hi": {{ 7*7 }}'
    assert len(matter["short_description"]) <= 60 and "HF_TOKEN" in files["README.md"]
    assert files["requirements.txt"] == "hf-aha==1.0\n"
    call = ast.parse(files["app.py"]).body[-1].body[0].value
    assert call.args[0].value == "alice/aha-vit" and call.keywords[0].value.value == "google/vit"


def test_push_space_makes_a_gradio_space_in_one_commit(hub, capsys):
    assert push("imagenette-demo", "aha-demo", "--private", "--message", "Hello", "--title", "Mine") == 0
    space = hub.repositories["space", "alice/aha-demo"]
    assert space.sdk == "gradio" and space.private and list(space.titles.values())[1:] == ["Hello"]
    assert sorted(space.files()) == ["README.md", "app.py", "requirements.txt"]
    assert front_matter(space.files()["README.md"].decode())["title"] == "Mine"
    assert b'run_space("imagenette-demo")' in space.files()["app.py"]
    assert capsys.readouterr().out.strip().endswith("/spaces/alice/aha-demo")
    # Again, into the Space that is there, where somebody has added a file.
    hub.commit("alice/aha-demo", {"notes.txt": "mine"}, repo_type="space")
    assert push("imagenette-demo", "alice/aha-demo") == 0
    assert space.files()["notes.txt"] == b"mine" and not front_matter(space.files()["README.md"].decode()).get("x")


def test_push_space_of_an_explainer_of_the_hub(hub, explainer, capsys):
    hub.commit_folder("alice/aha-tiny", explainer)
    # Its classifier was a folder, which a Space cannot load.
    assert push("alice/aha-tiny", "alice/aha-demo") == 2
    assert "--classifier" in capsys.readouterr().err and ("space", "alice/aha-demo") not in hub.repositories
    assert push("alice/aha-tiny", "alice/aha-demo", "--classifier", "alice/tiny-vit") == 0
    files = hub.repositories["space", "alice/aha-demo"].files()
    assert b'run_space("alice/aha-tiny", classifier="alice/tiny-vit")' in files["app.py"]
    assert front_matter(files["README.md"].decode())["models"] == ["alice/aha-tiny", "alice/tiny-vit"]


def test_push_space_refuses_what_a_space_cannot_load(hub, explainer, capsys):
    assert push(explainer, "alice/aha-demo") == 2
    assert "hf-aha push" in capsys.readouterr().err
    assert push("alice/absent", "alice/aha-demo") == 2
    assert "alice/absent" in capsys.readouterr().err
    assert push("imagenette-demo", "alice/aha-demo", "--classifier", explainer) == 2
    assert "give its Hub id" in capsys.readouterr().err
    assert not [key for key in hub.repositories if key[0] == "space"]


@pytest.mark.parametrize("repo_id", ["bob/aha-demo", "a/b/c"])
def test_push_space_fails_in_one_sentence(hub, capsys, repo_id):
    assert push("imagenette-demo", repo_id) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-aha push-space: ") and repo_id in error and error.count("\n") == 1


def test_push_space_without_a_login_says_how_to_log_in(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    assert push("imagenette-demo", "alice/aha-demo") == 2
    error = capsys.readouterr().err
    assert "hf auth login" in error and "wrongwrong" not in error


def test_output_writes_the_files_without_network(hub, tmp_path, capsys):
    assert push("imagenette-demo", "alice/aha-demo", "--output", tmp_path / "space") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "space") and not hub.requests
    assert (tmp_path / "space" / "app.py").is_file()
    (tmp_path / "file").write_text("")
    assert push("imagenette-demo", "alice/aha-demo", "--output", tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err
