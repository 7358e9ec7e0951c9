"""The command line, run in this process on a tiny random explainer that lies in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_classifier
from huggingface_hub.utils import logging as hub_logging
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.utils import logging

import hf_aha
from hf_aha import AhaExplainer
from hf_aha.cli import main


LABELS = ("tench", "English springer", "../cassette: player", "chain saw", "пёс")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved explainer together with its classifier."""
    classifier = build_classifier("vit")
    classifier.config.id2label = dict(enumerate(LABELS))
    classifier.config.label2id = {label: index for index, label in enumerate(LABELS)}
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        explainer = AhaExplainer.from_classifier(classifier, image_processor=processor, **sizes)
    path = tmp_path_factory.mktemp("explainer")
    explainer.save_pretrained(path, include_classifier=True)
    return path


@pytest.fixture(autouse=True)
def library_verbosity():
    """The command silences the libraries; other tests want to hear them."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    hub_logging.set_verbosity(hub_verbosity)
    if bar:
        logging.enable_progress_bar()


def save_photograph(path: Path, seed: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photograph(tmp_path) -> Path:
    return save_photograph(tmp_path / "photos" / "dog.png")


@pytest.fixture
def explain(folder, tmp_path):
    """`explain(words...)` runs the command with the tiny explainer and the folder `out`."""

    def run(*words: object, explainer: object = folder) -> int:
        options = ["--explainer", explainer, "--output", tmp_path / "out"]
        return main(["explain", *map(str, [*words, *options])])

    return run


def written(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("words", [["--help"], ["explain", "--help"], ["--version"]])
def test_help_needs_no_torch(words):
    code = f"""
import sys
from hf_aha.cli import main
try:
    main({words})
except SystemExit as answer:
    assert answer.code == 0
print(*(name for name in ("torch", "transformers", "numpy", "PIL") if name in sys.modules), file=sys.stderr)
"""
    root = Path(hf_aha.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stderr.strip() == ""
    assert ("explain" if "--help" in words else hf_aha.__version__) in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "COMMAND"),
        (["elucidate"], "elucidate"),
        (["explain"], "PHOTO"),
        (["explain", "a.png", "--format", "png,gif"], "'gif'"),
        (["explain", "a.png", "--format", ","], "no format"),
        (["explain", "a.png", "--top-k", "0"], "'0'"),
        (["explain", "a.png", "--batch-size", "many"], "'many'"),
        (["explain", "a.png", "--dtype", "int8"], "int8"),
        (["explain", "a.png", "--target", "tench", "--top-k", "2"], "not allowed with"),
    ],
)
def test_wrong_arguments_exit_with_2_and_name_the_argument(words, named, capsys):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    assert named in capsys.readouterr().err


def test_the_files_hold_what_the_explainer_says(explain, folder, photograph, tmp_path, capsys):
    assert explain(photograph, "--format", "png,npy", "--format", "json") == 0
    assert written(tmp_path) == {"dog.png", "dog.npy", "dog.json"}
    expected = AhaExplainer.from_pretrained(folder).explain(Image.open(photograph))

    scores = np.load(tmp_path / "out" / "dog.npy", allow_pickle=False)
    assert scores.shape == (40, 48) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-4, atol=1e-5)
    with Image.open(tmp_path / "out" / "dog.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG" and sheet.width > sheet.height > 0

    record = json.loads((tmp_path / "out" / "dog.json").read_text(encoding="utf-8"))
    assert record["file"] == str(photograph)
    assert record["image_size"] == {"width": 48, "height": 40}
    assert (record["label"], record["target"]) == (expected.label, expected.target)
    assert record["label"] == record["predicted_label"] == LABELS[record["target"]]
    assert record["probability"] == pytest.approx(expected.probability, abs=1e-5)
    assert record["explainer"]["id"] == str(folder)
    assert record["classifier"]["fingerprint"] == AhaExplainer.from_pretrained(folder).config.base_model_fingerprint
    assert record["versions"]["hf_aha"] == hf_aha.__version__
    assert set(record["written"]) == written(tmp_path)

    line = capsys.readouterr().out.strip()
    assert line == f"dog.png: {expected.label} {expected.probability:.2f} -> {tmp_path / 'out' / 'dog.png'}"


def test_a_class_is_compared_with_another(explain, folder, photograph, tmp_path, capsys):
    assert explain(photograph, "--format", "json,npy", "--target", "tench", "--against", "CHAIN SAW") == 0
    assert written(tmp_path) == {"dog.tench-rather-than-chain-saw.json", "dog.tench-rather-than-chain-saw.npy"}
    record = json.loads((tmp_path / "out" / "dog.tench-rather-than-chain-saw.json").read_text(encoding="utf-8"))
    expected = AhaExplainer.from_pretrained(folder).explain(Image.open(photograph), "tench", against="chain saw")
    assert (record["target"], record["against"], record["against_label"]) == (0, 3, "chain saw")
    assert record["against_probability"] == pytest.approx(expected.against_probability, abs=1e-5)
    scores = np.load(tmp_path / "out" / "dog.tench-rather-than-chain-saw.npy")
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-3, atol=1e-4)
    start = f"dog.png: tench {expected.probability:.2f} rather than chain saw {expected.against_probability:.2f}"
    assert capsys.readouterr().out.startswith(start)
    # Without a target, the most probable other class is asked about, also where `--against` is the predicted one.
    for index in range(2):
        assert explain(photograph, "--format", "json", "--against", index, "--refine", "1", "--adaptive") == 0
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").glob("*than-[tE]*.json")]
    assert {record["against"] for record in records} == {0, 1}
    assert all(record["target"] != record["against"] and "refinement" in record for record in records)


def test_a_target_is_named_in_the_files_and_beside_the_prediction(explain, photograph, tmp_path, capsys):
    explain(photograph, "--format", "json")
    predicted = json.loads((tmp_path / "out" / "dog.json").read_text(encoding="utf-8"))["target"]
    asked = (predicted + 1) % 2  # tench or English springer, and not the prediction
    capsys.readouterr()

    assert explain(photograph, "--format", "json", "--target", LABELS[asked].upper()) == 0
    name = ("dog.tench.json", "dog.English-springer.json")[asked]
    by_label = json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
    assert by_label["target"] == asked
    line = capsys.readouterr().out
    assert line.startswith(f"dog.png: {LABELS[asked]} ") and f"(predicted: {LABELS[predicted]} " in line

    assert explain(photograph, "--format", "json", "--target", asked) == 0
    by_index = json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
    assert {**by_index, "date": None} == {**by_label, "date": None}


def test_top_k_writes_one_explanation_a_class_inside_the_output_folder(explain, photograph, tmp_path, capsys):
    assert explain(photograph, "--top-k", len(LABELS), "--format", "npy") == 0
    names = ["tench", "English-springer", "cassette-player", "chain-saw", "пёс"]
    assert written(tmp_path) == {f"dog.{name}.npy" for name in names}
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "out"}
    assert len(capsys.readouterr().out.splitlines()) == len(LABELS)


def test_photographs_of_one_name_get_files_of_their_own(explain, tmp_path):
    photographs = [save_photograph(tmp_path / name / "a.png", seed) for seed, name in enumerate("xyz")]
    photographs.append(save_photograph(tmp_path / "x" / "A.jpg", 3))
    assert explain(*photographs, "--format", "json", "--batch-size", 3) == 0
    assert {name.lower() for name in written(tmp_path)} == {"a.json", "a-2.json", "a-3.json", "a-4.json"}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").iterdir()]
    assert {record["file"] for record in records} == {str(path) for path in photographs}


def test_a_photograph_in_the_output_folder_is_not_overwritten(explain, tmp_path):
    photograph = save_photograph(tmp_path / "out" / "cat.png")
    before = photograph.read_bytes()
    assert explain(photograph, "--format", "png") == 0
    assert photograph.read_bytes() == before
    assert written(tmp_path) == {"cat.png", "cat-2.png"}


def test_good_photographs_are_explained_and_bad_ones_listed(explain, photograph, tmp_path, capsys):
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(photograph.read_bytes()[:200])
    text = tmp_path / "text.jpg"
    text.write_text("not a photograph", encoding="utf-8")
    other = save_photograph(tmp_path / "photos" / "cat.png", 1)
    bad = [truncated, text, tmp_path / "missing.jpg", tmp_path / "nothing*.png"]
    assert explain(truncated, photograph, text, other, *bad[2:], "--batch-size", 2) == 1
    assert written(tmp_path) == {"dog.png", "dog.json", "cat.png", "cat.json"}
    streams = capsys.readouterr()
    assert len(streams.out.splitlines()) == 2
    assert "4 of 6 inputs could not be explained" in streams.err and "Traceback" not in streams.err
    for path in bad:
        assert sum(path.name in line for line in streams.err.splitlines()) == 1, path.name


def test_only_bad_photographs_load_no_explainer(explain, tmp_path, capsys):
    assert explain(tmp_path / "nothing*.png", explainer="no-such-explainer") == 1
    assert "nothing*.png" in capsys.readouterr().err


def test_quiet_prints_nothing(explain, photograph, capsys):
    assert explain(photograph, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--target", "English springr"], "'English springer'"),
        (["--target", "5"], "0..4"),
        (["--top-k", "6"], "6"),
        (["--against", "newt"], "newt"),
        (["--target", "chain saw", "--against", "3"], "--target and --against both name chain saw"),
        (["--top-k", "2", "--against", "3"], "--against does not go with --top-k"),
        (["--adaptive"], "--adaptive goes with --refine"),
        (["--device", "abacus"], "'abacus'"),
        (["--classifier", "no-such-classifier", "--local-files-only"], "no-such-classifier"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_2(words, named, explain, photograph, tmp_path, capsys):
    assert explain(photograph, *words) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("hf-aha explain: ") and named in streams.err
    assert len(streams.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists() or written(tmp_path) == set()


def test_unknown_explainer_is_one_sentence_unless_debugged(explain, photograph, capsys):
    words = (photograph, "--local-files-only")
    assert explain(*words, explainer="no-such-explainer") == 2
    quiet = capsys.readouterr().err
    assert "'no-such-explainer' cannot be loaded" in quiet and len(quiet.strip().splitlines()) == 1
    assert explain(*words, "--debug", explainer="no-such-explainer") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_near_bundled_explainer_is_suggested(explain, photograph, tmp_path, monkeypatch, capsys):
    (tmp_path / "bundled" / "petals-demo").mkdir(parents=True)
    (tmp_path / "bundled" / "petals-demo" / "config.json").touch()
    monkeypatch.setattr("hf_aha.commands.loading.BUNDLED", tmp_path / "bundled")
    assert explain(photograph, "--local-files-only", explainer="petal-demo") == 2
    assert "did you mean the bundled 'petals-demo'?" in capsys.readouterr().err


def test_a_missing_folder_is_called_a_folder(explain, photograph, tmp_path, capsys):
    assert explain(photograph, explainer=tmp_path / "nowhere") == 2
    assert "there is no folder" in capsys.readouterr().err


def test_damaged_weights_are_one_sentence(explain, photograph, folder, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            content = path.read_bytes()
            (damaged / path.name).write_bytes(content[:100] if path.suffix == ".safetensors" else content)
    assert explain(photograph, explainer=damaged) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_another_classifier_is_refused(explain, photograph, tmp_path, capsys):
    other = tmp_path / "other"
    build_classifier("vit", seed=1).save_pretrained(other)
    assert explain(photograph, "--classifier", other) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_the_same_classifier_from_another_folder_is_recorded(explain, photograph, folder, tmp_path):
    assert explain(photograph, "--classifier", folder / "classifier", "--format", "json") == 0
    record = json.loads((tmp_path / "out" / "dog.json").read_text(encoding="utf-8"))
    assert record["classifier"]["id"] == str(folder / "classifier")


def test_output_that_is_a_file_is_refused(photograph, folder, capsys):
    assert main(["explain", str(photograph), "--explainer", str(folder), "--output", str(photograph)]) == 2
    assert str(photograph) in capsys.readouterr().err


def test_a_failed_write_leaves_no_part_of_a_file(explain, photograph, tmp_path, monkeypatch, capsys):
    def full_disk(path, *arguments, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    assert explain(photograph, "--format", "npy") == 2
    assert "dog.npy cannot be written: No space left on device" in capsys.readouterr().err
    assert written(tmp_path) == set()


def test_interruption_is_130(explain, photograph, monkeypatch, capsys):
    def interrupt(source):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_aha.images.read_image", interrupt)
    assert explain(photograph) == 130
    assert "Traceback" not in capsys.readouterr().err
