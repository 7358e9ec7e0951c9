"""`hf-aha evaluate` and what it shares with `hf-aha benchmark`, on a tiny random explainer and noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import build_classifier
from PIL import Image
from test_benchmarking import LABELS, encoded
from transformers import ViTImageProcessorPil

from hf_aha import AhaExplainer
from hf_aha.benchmark import BenchmarkResults
from hf_aha.cli import main
from hf_aha.data import ProcessorCrop
from hf_aha.metrics import evaluate_maps, get_protocol, results_table
from hf_aha.metrics.passes import TargetPasses
from hf_aha.perturbation import Normalization


def save_explainer(folder: Path, seed: int = 0) -> Path:
    """A tiny explainer with its classifier, for 32 x 32 pixels."""
    classifier = build_classifier("vit", seed=seed)
    classifier.config.id2label = dict(enumerate(LABELS))
    classifier.config.label2id = {label: index for index, label in enumerate(LABELS)}
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        explainer = AhaExplainer.from_classifier(classifier, image_processor=processor, **sizes)
    explainer.save_pretrained(folder, include_classifier=True)
    return folder


def save_dataset(folder: Path, count: int = 5, broken: tuple[int, ...] = (), names: list[str] | None = LABELS) -> Path:
    """A folder with the split `validation`, labelled by `names` or not at all."""
    rows = [
        {"image": {"bytes": b"no image" if n in broken else encoded(n), "path": None}} for n in range(max(count, 1))
    ]
    columns = {"image": datasets.Image(decode=False)}
    if names is not None:
        rows = [{**row, "label": number % len(names)} for number, row in enumerate(rows)]
        columns["label"] = datasets.ClassLabel(names=names)
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(columns))
    folder.mkdir(parents=True)
    dataset = dataset.select(range(count)).cast_column("image", datasets.Image())
    dataset.to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def explainer(tmp_path_factory) -> Path:
    return save_explainer(tmp_path_factory.mktemp("explainers") / "tiny")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def evaluate(explainer, tmp_path):
    """`evaluate(words...)` runs the command on the dataset `data` into the folder `out`."""

    def run(*words: object, name: object = explainer) -> int:
        options = ["--dataset", tmp_path / "data", "--output", tmp_path / "out", "--batch-size", 2]
        return main(["evaluate", *map(str, [name, *options, "--precision", "float32", *words])])

    return run


def test_the_files_hold_what_was_measured(evaluate, explainer, tmp_path, capsys):
    save_dataset(tmp_path / "data")
    assert evaluate("--protocol", "aha", "chefer/positive", "--metrics", "road", "--images", 4, "--seed", 3) == 0
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "run.json", "parts", "maps", "results.json", "results.md", "per_image.parquet", "curves-aha.png",
        "curves-chefer.png", "maps.png",
    }  # fmt: skip
    stored = json.loads((out / "results.json").read_text())
    run, context = stored["run"], stored["run"]["context"]
    loaded = AhaExplainer.from_pretrained(explainer)
    assert (context["dataset"], context["split"], context["seed"]) == ("data", "validation", 3)
    assert context["classifier_fingerprint"] == pytest.approx(loaded.classifier.fingerprint())
    assert (run["precision"], run["image_size"], run["seed"]) == ("float32", [32, 32], 3)
    assert {"torch", "transformers", "numpy"} <= set(run["versions"]) and "evaluate" in run["command"]
    assert str(tmp_path) not in json.dumps(stored)  # folders of one machine are no names
    assert stored["protocols"]["aha/deletion"]["definition"]["version"] == 1
    summary = stored["protocols"]["aha/deletion"]["methods"]["aha"]["summary"]
    assert summary["images"] == 4 and summary["low"] <= summary["mean"] <= summary["high"]
    assert stored["methods"][0]["passes"] == [1, 0] and len(stored["methods"][0]["seconds"]) == 2

    order = np.random.default_rng(3).permutation(5)[:4]
    crop = ProcessorCrop(loaded.image_processor)
    files = [tmp_path / f"{row}.png" for row in order]
    for file, row in zip(files, order, strict=True):
        file.write_bytes(encoded(row))
    pixels = torch.stack([crop(Image.open(file), None) for file in files])
    with torch.no_grad():
        output = loaded.eval()(pixels)
    passes = TargetPasses(loaded.classifier, "float32")
    normalization = Normalization(loaded.config.image_mean, loaded.config.image_std)
    options = {"normalization": normalization, "labels": torch.from_numpy(order % 5)}
    results = BenchmarkResults.load(out)
    for protocol in (*get_protocol("aha"), *get_protocol("chefer/positive")):
        expected = evaluate_maps(passes, pixels, output.scores, output.target, protocol, **options)
        found = results.protocols[protocol.name]["aha"]
        np.testing.assert_allclose(found.curves, expected.curves, atol=1e-4)
        assert [image.partition("-")[0] for image in found.image_ids] == [str(row) for row in order]
    text = capsys.readouterr().out
    assert "| AHA (tiny) |" in text and "aha/deletion ↓" in text and "road ↑" in text


def test_a_compiled_classifier_gives_the_same_numbers_and_is_named(evaluate, tmp_path, compile_eagerly, capsys):
    save_dataset(tmp_path / "data", 3)
    assert evaluate("--protocol", "aha", "--quiet") == 0
    plain = BenchmarkResults.load(tmp_path / "out").protocols["aha/deletion"]["aha"]
    assert evaluate("--protocol", "aha", "--quiet", "--compile", "--resume") == 2
    assert "differs in precision" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert evaluate("--protocol", "aha", "--quiet", "--compile") == 0
    compiled = BenchmarkResults.load(tmp_path / "out")
    assert compiled.run["precision"] == "float32, compiled"
    np.testing.assert_allclose(compiled.protocols["aha/deletion"]["aha"].curves, plain.curves, atol=1e-5)


def test_what_cannot_be_compiled_is_one_sentence(evaluate, tmp_path, capsys, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("no compiler")

    torch.compiler.reset()
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: compile_with(module, backend=refuse, **kwargs))
    save_dataset(tmp_path / "data", 1)
    assert evaluate("--protocol", "aha", "--quiet", "--compile") == 2
    assert "cannot be compiled here (no compiler); leave out --compile" in capsys.readouterr().err.splitlines()[-1]


def test_every_protocol_fits_any_input(evaluate, tmp_path):
    save_dataset(tmp_path / "data", 1)
    assert evaluate("--protocol", "all", "--quiet") == 0
    results = BenchmarkResults.load(tmp_path / "out")
    assert len(results.protocols) == 22
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "(one image, no interval)" in text


def test_without_labels_the_others_are_measured_and_it_is_said(evaluate, tmp_path, capsys):
    save_dataset(tmp_path / "data", 2, names=None)
    assert evaluate("--protocol", "chefer") == 2
    assert "'chefer/positive' needs the ground truth" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert evaluate("--protocol", "chefer", "aha/deletion", "all") == 0
    out = capsys.readouterr().out
    assert "Not measured, for want of labels: chefer/positive, chefer/negative, mda/deletion" in out
    assert "no column of class labels" in out and "no labels" in out


def test_a_broken_row_is_counted_and_the_exit_code_is_1(evaluate, tmp_path, capsys):
    save_dataset(tmp_path / "data", 5, broken=(3,))
    assert evaluate("--protocol", "aha/deletion", "--metrics", "all") == 1
    streams = capsys.readouterr()
    assert "1 of 5 images could not be read" in streams.err and "Traceback" not in streams.err
    assert "4 | 1 |" in streams.out and "Not measured, for want of masks of the objects: localization" in streams.out
    assert "The given bytes is not in a format" in streams.out


def test_a_run_goes_on_only_where_it_was(evaluate, tmp_path, capsys):
    save_dataset(tmp_path / "data", 3)
    assert evaluate("--protocol", "aha/deletion", "--images", 2) == 0
    assert evaluate("--protocol", "aha/deletion") == 2
    assert "already holds a measurement; give --resume" in capsys.readouterr().err
    assert evaluate("--protocol", "aha", "--resume") == 0
    assert len(BenchmarkResults.load(tmp_path / "out").protocols["aha/insertion"]["aha"]) == 3
    assert evaluate("--protocol", "aha", "--resume", "--seed", 1) == 2
    assert "another measurement, which differs in context, seed" in capsys.readouterr().err


def test_another_target_or_other_weights_are_not_mixed_in(evaluate, explainer, tmp_path, capsys):
    save_dataset(tmp_path / "data", 2)
    assert evaluate("--protocol", "aha/deletion") == 0
    here = BenchmarkResults.load(tmp_path / "out").protocols["aha/deletion"]["aha"]
    other = save_explainer(tmp_path / "tiny", seed=1)
    assert evaluate("--protocol", "aha/deletion", "--resume", name=other) == 2
    assert "another measurement, which differs in context" in capsys.readouterr().err
    assert evaluate("--protocol", "aha/deletion", "--output", tmp_path / "else", name=other) == 0
    there = BenchmarkResults.load(tmp_path / "else").protocols["aha/deletion"]["aha"]
    with pytest.raises(ValueError, match="different target models cannot be compared"):
        results_table([here, there])

    retrained = AhaExplainer.from_pretrained(explainer)
    with torch.no_grad():
        next(retrained.decoder.parameters()).mul_(1.5)
    shutil.rmtree(other)
    retrained.save_pretrained(other, include_classifier=True)
    capsys.readouterr()
    assert evaluate("--protocol", "aha/deletion", "--resume", name=other) == 2
    assert "another method of the name 'aha' (other weights or settings)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--protocol", "ries"], "unknown protocol 'ries': did you mean 'rise'"),
        (["--protocol", "xyz"], "The presets are aha, chefer, hf_aha, mda, rise."),
        (["--metrics", "raod"], "did you mean 'road'? The metrics are road,"),
        (["--metrics", "localization"], "'localization' needs masks of the objects"),
        (["--split", "no"], "the dataset cannot be used: "),
        (["--dataset", "no/such/folder"], "the dataset cannot be used: "),
        (["--image-column", "picture"], "no column 'picture'; its columns are image, label"),
        (["--label-column", "kind"], "no column 'kind'"),
        (["--skip", "9"], "there is no image to measure"),
        (["--device", "abacus"], "'abacus'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_and_2(words, named, evaluate, tmp_path, capsys):
    save_dataset(tmp_path / "data", 2)
    capsys.readouterr()
    assert evaluate(*words) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and named in streams.err.splitlines()[-1]
    assert streams.err.splitlines()[-1].startswith("hf-aha evaluate: ") and "Traceback" not in streams.err
    assert not (tmp_path / "out").exists()


def test_an_empty_dataset_is_one_sentence(evaluate, tmp_path, capsys):
    save_dataset(tmp_path / "data", 0)
    assert evaluate() == 2
    assert "hf-aha evaluate: the dataset cannot be used: " in capsys.readouterr().err


def test_a_missing_explainer_is_one_sentence(evaluate, tmp_path, capsys):
    assert evaluate("--local-files-only", name="imagenete-demo") == 2
    assert "did you mean the bundled 'imagenette-demo'" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--images 0", "--seed -1", "--precision int8", "--batch-size x"])
def test_wrong_arguments_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "tiny", "--dataset", "data", *words.split()])
    assert exit.value.code == 2 and words.split()[0] in capsys.readouterr().err
