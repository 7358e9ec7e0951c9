"""What the README shows runs: its Python and its commands, on the bundled explainer."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub, connected

import hf_aha
from hf_aha import AhaExplainer
from hf_aha.cli import main


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PHOTOGRAPHS = sorted((Path(hf_aha.__file__).parent / "bundled" / "photographs").glob("*.jpg"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with the files that the README names."""
    for name, photograph in zip(("photo.jpg", "a.jpg", "b.jpg"), PHOTOGRAPHS, strict=False):
        shutil.copy(photograph, tmp_path / name)
    (tmp_path / "holiday").mkdir()
    shutil.copy(PHOTOGRAPHS[0], tmp_path / "holiday" / "beach.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run(folder):
    local = [block for block in blocks("python") if "google/" not in block and "YOUR_NAME" not in block]
    assert local, "the README shows no Python that runs offline"
    names: dict[str, object] = {}
    for block in local:
        exec(compile(block, "README.md", "exec"), names)
    assert (folder / "overlay.png").stat().st_size > 1000
    assert names["scores"].dtype == "float32"


def test_python_that_shares_runs(folder):
    shared = [block for block in blocks("python") if "YOUR_NAME" in block]
    assert shared, "the README no longer shows how to share"
    with LoopbackHub() as hub, connected(hub, folder / "home") as patch:
        patch.setenv("HF_TOKEN", hub.add_account("YOUR_NAME"))
        AhaExplainer.from_pretrained("imagenette-demo").push_to_hub("YOUR_NAME/aha-vit-b16")
        for block in shared:
            exec(compile(block, "README.md", "exec"), {})
        assert hub.repository("YOUR_NAME/a-copy").private
    assert (folder / "overlay.png").stat().st_size > 1000


def test_measuring_commands_run(folder):
    for index, photograph in enumerate(PHOTOGRAPHS[:2]):
        place = folder / "data" / "validation" / f"class-{index}"
        place.mkdir(parents=True)
        shutil.copy(photograph, place)
    commands = [line for line in README.splitlines() if line.startswith(("hf-aha evaluate ", "hf-aha benchmark "))]
    assert commands
    for command in commands:
        words = shlex.split(command.replace("FOLDER_OR_ID", str(folder / "data")).replace("--protocol all", ""))
        assert main([*words[1:], "--quiet"]) == 0, command
    assert (folder / "evaluation" / "results.md").exists() and (folder / "benchmark" / "results.md").exists()


def test_explain_commands_run(folder):
    commands = [line for line in README.splitlines() if line.startswith("hf-aha explain ") and "--help" not in line]
    assert commands
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not link.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / link).exists(), f"{page.name} links {link}"
