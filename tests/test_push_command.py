"""`hf-aha push` and `hf-aha card`, run in this process against a loopback Hub."""

from __future__ import annotations

import json

import pytest
from conftest import build_classifier
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, connected
from PIL import Image
from test_result_files import entry, head, write
from transformers import ViTImageProcessorPil
from transformers.utils import logging

from hf_aha import AhaExplainer
from hf_aha.cli import main


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub, connected(hub, tmp_path / "home") as patch:
        patch.setenv("HF_TOKEN", hub.add_account("alice"))
        patch.setattr("hf_aha.hub.BUNDLED_PHOTOGRAPHS", ())
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
def classifier(tmp_path):
    folder = tmp_path / "tiny-vit"
    build_classifier("vit").save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def explainer(classifier, tmp_path):
    """The folder of an explainer whose classifier lies elsewhere on this machine."""
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    AhaExplainer.from_classifier(classifier, **sizes).save_pretrained(tmp_path / "final")
    return tmp_path / "final"


@pytest.fixture
def results(tmp_path):
    return write(tmp_path / "aha.jsonl", [head(), *(entry(i, "aha") for i in range(4))])


def push(*words: object) -> int:
    return main(["push", *map(str, words)])


def test_push_uploads_with_results_and_prints_the_commit(hub, explainer, results, tmp_path, capsys):
    photograph = tmp_path / "Red House.png"
    Image.new("RGB", (40, 30), "red").save(photograph)
    words = ("--results", results, "--dataset", "org/photos", "--license", "mit", "--tag", "mine", "--private")
    words += ("--example", photograph, "--message", "Hello", "--message-body", "More")
    assert push(explainer, "aha-tiny", *words) == 0
    repository = hub.repositories["model", "alice/aha-tiny"]
    assert capsys.readouterr().out.strip().endswith(f"/alice/aha-tiny/commit/{repository.resolve('main')}")
    assert repository.private and list(repository.titles.values())[1:] == ["Hello"]
    files = repository.files()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.datasets) == ("mit", ["org/photos"]) and "mine" in card.data.tags
    assert "examples/1-red-house.jpg" in files and "(examples/1-red-house.jpg)" in card.text
    measured = json.loads(files["results.json"])["measurements"][0]
    assert measured["values"][0]["images"] == 4 and card.data.eval_results[0].metric_args["photographs"] == 4


def test_push_opens_a_pull_request_and_writes_to_branches(hub, explainer, capsys):
    assert push(explainer, "alice/aha-tiny", "--create-pr", "--no-examples") == 0
    assert "/discussions/1" in capsys.readouterr().out
    assert push(explainer, "alice/aha-tiny", "--revision", "next", "--no-examples") == 0
    repository = hub.repositories["model", "alice/aha-tiny"]
    assert "model.safetensors" in repository.files("next") and "model.safetensors" not in repository.files()


def test_push_needs_the_classifier_for_pictures_only(hub, explainer, classifier, tmp_path, capsys):
    classifier.rename(tmp_path / "moved")
    assert push(explainer, "alice/aha-tiny") == 2
    assert "--no-examples" in capsys.readouterr().err and ("model", "alice/aha-tiny") not in hub.repositories
    assert push(explainer, "alice/aha-tiny", "--no-examples") == 0
    assert push(explainer, "alice/aha-tiny", "--classifier", tmp_path / "moved", "--include-classifier") == 0
    assert "classifier/model.safetensors" in hub.repositories["model", "alice/aha-tiny"].files()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("alice/aha-tiny", "--create-pr", "--revision", "next"), "--create-pr"),
        (("alice/aha-tiny", "--results", "absent.json"), "absent.json"),
        (("alice/aha-tiny", "--example", "absent.jpg"), "absent.jpg"),
        (("a/b/c",), "a/b/c"),
        (("bob/aha-tiny",), "bob/aha-tiny"),
    ],
)
def test_push_fails_in_one_sentence(hub, explainer, capsys, words, named):
    assert push(explainer, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-aha push: ") and named in error and error.count("\n") == 1
    assert not [r for r in hub.repositories.values() if "model.safetensors" in r.files()]


def test_push_without_a_login_says_how_to_log_in(hub, explainer, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    assert push(explainer, "alice/aha-tiny", "--no-examples") == 2
    error = capsys.readouterr().err
    assert "hf auth login" in error and "wrongwrong" not in error


def test_push_of_no_explainer(hub, tmp_path, capsys):
    assert push(tmp_path / "absent", "alice/aha-tiny") == 2
    error = capsys.readouterr().err
    # Without the classifier it would be missing just the same.
    assert "there is no folder" in error and "--no-examples" not in error


def test_card_writes_a_folder_without_network(hub, explainer, results, tmp_path, capsys):
    words = ["card", explainer, "--output", tmp_path / "card", "--results", results, "--repo-id", "alice/aha-tiny"]
    assert main([*map(str, words), "--local-files-only", "--no-examples"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "card" / "README.md")
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert 'from_pretrained("alice/aha-tiny"' in card.text and card.data.eval_results
    assert (tmp_path / "card" / "results.json").is_file()
    assert not hub.requests


def test_card_of_a_broken_result_file(hub, explainer, tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    assert main(["card", str(explainer), "--results", str(tmp_path / "a.json"), "--no-examples"]) == 2
    assert "no result file" in capsys.readouterr().err
