"""`hf-aha explain-dataset`, run in this process on a tiny random explainer, folders of noise and a loopback Hub."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard
from loopback_hub import LoopbackHub, connected
from PIL import Image
from test_cli import library_verbosity, save_photograph  # noqa: F401
from test_evaluate_command import save_dataset, save_explainer
from torch.utils.data import get_worker_info

from hf_aha import AhaExplainer
from hf_aha.cli import main
from hf_aha.dataset_maps import StoredMap, load_maps


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def explainer(tmp_path_factory) -> Path:
    return save_explainer(tmp_path_factory.mktemp("explainers") / "tiny")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_bars():
    """What is on stderr is then what the command says."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def explain(explainer, tmp_path):
    """`explain(words...)` runs the command on the dataset `data` into the folder `out`."""

    def run(*words: object, data: object = tmp_path / "data", split: str = "validation") -> int:
        options = ["--explainer", explainer, "--split", split, "--output", tmp_path / "out", "--workers", 0]
        options += ["--precision", "float32", "--shard-rows", 2, "--batch-size", 2]
        return main(["explain-dataset", *map(str, [data, *options, *words])])

    return run


def test_the_output_is_a_dataset_with_a_card(explain, explainer, tmp_path, capsys):
    save_dataset(tmp_path / "data", 5)
    assert explain() == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"README.md", "run.json", "data", ".lock"}
    plain = datasets.load_dataset(str(out), split="validation")
    ours = load_maps(out)
    assert plain.features == ours.features and plain["row"][:] == ours["row"][:] == [0, 1, 2, 3, 4]
    loaded = AhaExplainer.from_pretrained(explainer).eval()
    photographs = datasets.load_dataset(str(tmp_path / "data"), split="validation")["image"]
    for row, image in zip(ours, photographs, strict=True):
        one, expected = StoredMap.from_row(row), loaded.explain(image)
        assert (one.label, one.ranks.shape) == (expected.label, expected.scores.shape)
        assert one.probability == pytest.approx(expected.probability, rel=1e-4)
    card = DatasetCard.load(out / "README.md")
    assert card.data.configs[0]["data_files"] == [{"split": "validation", "path": "data/*.parquet"}]
    assert "explainability" in card.data.tags and card.data.source_datasets is None
    for said in ("explain-dataset data", "off by at most 0.002", "| `geometry` |", "| 5, ", "the predicted class"):
        assert said in card.text, said
    printed = capsys.readouterr().out
    assert printed.startswith("5 maps of 5 photographs") and printed.count("\n") == 1
    texts = "".join(path.read_text() for path in (out / "README.md", out / "run.json")) + str(ours[:])
    assert str(tmp_path) not in texts and str(ROOT) not in texts  # folders of one machine are no names

    assert explain("--resume") == 0
    assert "nothing was left to do" in capsys.readouterr().out
    assert explain("--resume", "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_an_image_folder_with_a_broken_file_is_explained_but_for_that(explain, tmp_path, capsys):
    for number, name in enumerate(("cats/a.png", "cats/b.png", "dogs/a.png")):
        save_photograph(tmp_path / "data" / name, seed=number, size=(40 + number, 48))
    (tmp_path / "data" / "dogs" / "b.png").write_bytes(b"no image")
    assert explain("--target", "Church", split="train") == 1
    said = capsys.readouterr().err
    assert "1 of 4 photographs have no map" in said and "row 3: " in said
    listed = [json.loads(line) for line in (tmp_path / "out" / "unreadable.jsonl").read_text().splitlines()]
    assert [(one["row"], one["image_id"]) for one in listed] == [(3, "dogs/b.png")]
    maps = load_maps(tmp_path / "out")
    assert maps["image_id"][:] == ["cats/a.png", "cats/b.png", "dogs/a.png"] and set(maps["label"]) == {"church"}
    assert [StoredMap.from_row(row).ranks.shape for row in maps] == [(48, 40), (48, 41), (48, 42)]
    assert "dogs/b.png" in (tmp_path / "out" / "README.md").read_text()


def test_the_class_may_be_that_of_the_dataset(explain, tmp_path):
    save_dataset(tmp_path / "data", 5)
    assert explain("--target", "label-column", "--limit", 3, "--quantisation", "uint16", "--map-size", "8x16") == 0
    maps = load_maps(tmp_path / "out")
    assert maps["target"][:] == [0, 1, 2]
    assert maps[0]["ranks"].size == (16, 8) and maps[0]["ranks"].mode == "I;16"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "class in the column label" in card and "8 x 16, averaged" in card and "whole order" in card


def test_why_a_class_rather_than_another(explain, explainer, tmp_path, capsys):
    save_dataset(tmp_path / "data", 3)
    words = ("--target", "church", "--against", "parachute")
    assert explain(*words) == 0
    maps = load_maps(tmp_path / "out")
    assert set(maps["label"]) == {"church"} and set(maps["against_label"]) == {"parachute"}
    image = datasets.load_dataset(str(tmp_path / "data"), split="validation")[1]["image"]
    expected = AhaExplainer.from_pretrained(explainer).eval().explain(image, "church", against="parachute")
    assert StoredMap.from_row(maps[1]).explanation(image).title == expected.title
    assert "rather than class" in (tmp_path / "out" / "README.md").read_text()
    assert explain(*words, "--resume") == 0
    for other in (words[:2], (*words[:3], "tench")):
        capsys.readouterr()
        assert explain(*other, "--resume") == 2
        assert "(against: 2 there, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--target", "plane"), "'plane'"),
        (("--target", "church", "--top-k", 2), "--top-k"),
        (("--against", "plane"), "'plane'"),
        (("--target", "church", "--against", "church"), "both name church; give two classes"),
        (("--against", "church", "--top-k", 2), "--against does not go with --top-k"),
        (("--target", "label-column"), "--label-column"),
        (("--target", "label-column", "--label-column", "colour"), "'colour'"),
        (("--label-column", "label"), "--target label-column"),
        (("--top-k", 6), "1..5"),
        (("--map-size", "64"), "32 x 32"),
        (("--split", "test"), "test"),
        (("--image-column", "picture"), "'picture'"),
        (("--id-column", "name"), "'name'"),
        (("--private",), "--push"),
        (("--device", "abacus"), "'abacus'"),
        (("--explainer", "imagenet-demo"), "imagenette-demo"),
    ],
)
def test_wrong_words_are_answered_in_one_sentence(explain, tmp_path, capsys, words, named):
    save_dataset(tmp_path / "data", 2, names=None)
    assert explain(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("hf-aha explain-dataset: ") and named in said and said.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [("--map-size", "8x"), ("--workers", "-1"), ("--limit", "0"), ("--quantisation", "f")]
)
def test_malformed_words_end_in_argparse(explain, words, capsys):
    with pytest.raises(SystemExit) as caught:
        explain(*words)
    assert caught.value.code == 2 and words[0] in capsys.readouterr().err


@pytest.mark.parametrize("data", ["./nowhere", "alice/nowhere"])
def test_a_dataset_that_is_not_there(explain, capsys, data):
    assert explain("--local-files-only", data=data) == 2
    said = capsys.readouterr().err
    assert "nowhere" in said and said.strip().count("\n") == 0


def test_another_run_is_not_overwritten(explain, tmp_path, capsys):
    save_dataset(tmp_path / "data", 3)
    assert explain() == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    for words, named in (((), "--resume"), (("--resume", "--top-k", 2), "top_k: 1 there, 2 now")):
        capsys.readouterr()
        assert explain(*words) == 2
        assert named in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_memory_or_disk_that_run_out_and_a_lost_reader_are_told(explain, tmp_path, capsys, monkeypatch):
    save_dataset(tmp_path / "data", 3)

    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(AhaExplainer, "forward", run_out)
        assert explain() == 2
        assert "--batch-size 2" in capsys.readouterr().err

    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hf_aha.dataset_maps.folder.write_atomically", fill)
        assert explain("--resume") == 2
        assert "No space left" in capsys.readouterr().err

    def die(self, row):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not in a reader")

    with monkeypatch.context() as patch:
        patch.setattr("hf_aha.dataset_maps.rows.ExplainedRows.__getitem__", die)
        assert explain("--resume", "--workers", 1) == 2
        said = capsys.readouterr().err
        assert "a reader of photographs was lost" in said and "--resume" in said
    assert explain("--resume") == 0 and len(load_maps(tmp_path / "out")) == 3


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub() as hub, connected(hub, tmp_path / "home") as patch:
        patch.setenv("HF_TOKEN", hub.add_account("alice"))
        # As `connected` does for the other libraries.
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        yield hub


def test_push_shares_a_dataset_that_others_read(explain, hub, tmp_path, capsys):
    save_dataset(tmp_path / "data", 5, broken=(4,))
    assert explain("--push", "alice/maps", "--private") == 1
    repository = hub.repositories["dataset", "alice/maps"]
    assert repository.private and f"/alice/maps/commit/{repository.resolve('main')}" in capsys.readouterr().out
    files = repository.files()
    parts = {f"data/validation-0000{number}-of-00003.parquet" for number in range(3)}
    assert set(files) == {"README.md", "run.json", "unreadable.jsonl", *parts}
    token = os.environ["HF_TOKEN"]
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(token.encode() not in content for content in [*files.values(), *written])
    assert 'load_maps("alice/maps")' in files["README.md"].decode()

    there, here = load_maps("alice/maps"), load_maps(tmp_path / "out")
    assert there.features == here.features and there["row"][:] == [0, 1, 2, 3]
    assert (StoredMap.from_row(there[3]).ranks == StoredMap.from_row(here[3]).ranks).all()

    # What is finished can be uploaded again, and files that are no longer there go away.
    hub.commit("alice/maps", {"data/validation-00007-of-00008.parquet": b"old"}, repo_type="dataset")
    assert explain("--resume", "--push", "alice/maps") == 1
    assert set(repository.files()) == set(files)


def test_an_upload_that_fails_keeps_the_maps(explain, hub, tmp_path, monkeypatch, capsys):
    save_dataset(tmp_path / "data", 2)
    assert explain("--push", "bob/maps") == 2
    said = capsys.readouterr().err
    assert "bob/maps" in said and "--resume --push" in said and said.count("\n") == 1
    assert len(load_maps(tmp_path / "out")) == 2
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    assert explain("--resume", "--push", "alice/maps") == 2
    said = capsys.readouterr().err
    assert "hf auth login" in said and "wrongwrong" not in said


def test_the_folder_is_named_after_the_repository(explainer, hub, tmp_path, monkeypatch):
    save_dataset(tmp_path / "data", 1)
    monkeypatch.chdir(tmp_path)
    words = ["--explainer", explainer, "--split", "validation", "--workers", 0, "--quiet", "--push", "alice/tiny-maps"]
    assert main(["explain-dataset", str(tmp_path / "data"), *map(str, words)]) == 0
    assert (tmp_path / "tiny-maps" / "README.md").is_file()


def test_a_dataset_of_the_hub_is_named_with_its_commit(explain, hub, tmp_path):
    save_dataset(tmp_path / "local", 3)
    commit = hub.commit_folder("alice/photos", tmp_path / "local", repo_type="dataset")
    assert explain(data="alice/photos") == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["identity"]["dataset"]["id"] == "alice/photos" and run["identity"]["dataset"]["revision"] == commit
    assert DatasetCard.load(tmp_path / "out" / "README.md").data.source_datasets == ["alice/photos"]
    hub.clear_log()
    assert explain("--resume", "--local-files-only", "--dataset-revision", commit, data="alice/photos") == 0
    assert hub.requests == []


def test_help_does_not_load_torch():
    code = "import sys; from hf_aha.cli import build_parser; build_parser(['explain-dataset']).format_help(); "
    code += "print('torch' in sys.modules, 'datasets' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False"] * 3


@pytest.mark.slow
def test_torchrun_shares_the_work(explain, explainer, tmp_path):
    """Two real processes with readers of their own give the files of one process."""
    save_dataset(tmp_path / "data", 9, broken=(2,))
    assert explain() == 1
    words = [tmp_path / "data", "--explainer", explainer, "--split", "validation", "--output", tmp_path / "two"]
    words += ["--precision", "float32", "--shard-rows", 2, "--batch-size", 2, "--workers", 1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, "hf_aha.cli", "explain-dataset", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)
    assert "8 maps of 9 photographs" in done.stdout, done.stderr
    one, two = load_maps(tmp_path / "out"), load_maps(tmp_path / "two")
    names = [name for name in one.column_names if name != "ranks"]
    assert one.select_columns(names)[:] == two.select_columns(names)[:]
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(one["ranks"], two["ranks"], strict=True))
    assert isinstance(one["ranks"][0], Image.Image)
