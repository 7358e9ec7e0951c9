"""Every code block of the documentation runs: Python as it stands, commands on tiny settings.

A page runs from top to bottom in a folder of its own, against a Hub on the loopback interface. Python is executed
word for word. A command runs in this process: `hf-aha`, `python SCRIPT` and, without their launchers, `accelerate
launch` and `torchrun`; what takes its time (steps, images, protocols) is cut down by `tiny`. Of `make TARGET` only
the target is looked up. What cannot run here stands under a comment `<!-- not run: REASON -->`, and `NOT_RUN`
lists all of these.
"""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import build_classifier
from documents import PAGES, ROOT, Block, blocks, name_of
from huggingface_hub import HfApi
from huggingface_hub.utils import logging as hub_logging
from loopback_hub import LoopbackHub, connected
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.utils import logging

import hf_aha
from hf_aha import AhaExplainer
from hf_aha.benchmark import parse_entries
from hf_aha.cli import main
from hf_aha.metrics import get_protocol, get_unoptimised


NOT_RUN = {
    ("README.md", "installs from a package index"),
    ("README.md", "serves until it is stopped; tests/test_demo*.py drive it"),
    ("docs/baselines.md", "needs the extra bench"),
    ("docs/benchmark.md", "takes an hour of a CPU or more"),
    ("docs/demo.md", "serves until it is stopped; tests/test_demo*.py drive it"),
    ("docs/get-started.md", "installs from a package index"),
    ("docs/performance.md", "takes minutes; tests/test_benchmarks*.py run the script on tiny settings"),
    ("docs/share.md", "asks for a token"),
}

# Pages that train or measure more than once.
SLOW = {
    "README.md",
    "docs/evaluation.md",
    "docs/results.md",
    "docs/scaling.md",
    "docs/train-your-own.md",
    "recipes/README.md",
}

CLASSIFIER = "google/vit-base-patch16-224"
LABELS = ("church", "golf ball", "parachute")
SIZES = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
PHOTOGRAPHS = sorted((Path(hf_aha.__file__).parent / "bundled" / "photographs").glob("*.jpg"))

# What stands for something of the reader's own.
STAND_INS = {
    "FOLDER_OR_ID": "my-photographs",
    "FOLDER": "my-photographs",
    "DIR_OR_ID": "my-photographs",
    "ID": "imagenette-demo",
}
FAST_EXPLAINER = (
    *("--dataset", "my-photographs", "--per_device_batch_size", "2", "--image_size", "32", "--eval_images", "2"),
    *(
        "--mixed_precision",
        "no",
        "--classifier_dtype",
        "float32",
        "--dataloader_num_workers",
        "0",
        "--save_steps",
        "1",
    ),
    *("--grid_range", "2", "4", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))),
)
FAST_TARGET = (
    *(
        "--dataset",
        "my-photographs",
        "--teacher",
        "my-classifier",
        "--keep_layers",
        "0",
        "1",
        "2",
        "3",
        "--epochs",
        "1",
    ),
    *("--batch_size", "2", "--mixed_precision", "no", "--num_workers", "0", "--image_size", "32"),
    *("--final_image_size", "32", "--final_resize", "36"),
)
FAST_CURVES, FAST_METRIC = "hf_aha/pixel/blur", "total_variation"


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "bash") and block.not_run is None]


RUN = [page for page in PAGES if runnable(page)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with the one classifier that the pages name, and somebody who may push."""
    folder = tmp_path_factory.mktemp("hub")
    save_classifier(folder / "classifier")
    with LoopbackHub() as hub, connected(hub, folder / "home") as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr("hf_aha.hub.BUNDLED_PHOTOGRAPHS", ())
        patch.setenv("HF_TOKEN", hub.add_account("google"))
        HfApi().create_repo(CLASSIFIER)
        HfApi().upload_folder(repo_id=CLASSIFIER, folder_path=folder / "classifier")
        patch.setenv("HF_TOKEN", hub.add_account("YOUR_NAME"))
        yield hub


@pytest.fixture(scope="module")
def workspace(hub, tmp_path_factory) -> Path:
    """The files that the pages name: photographs, a classifier, an explainer that was trained, the recipes."""
    folder = tmp_path_factory.mktemp("workspace")
    for name, photograph in zip(("photo.jpg", "a.jpg", "b.jpg", "holiday/beach.jpg"), PHOTOGRAPHS, strict=False):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(photograph, folder / name)
    for split in ("train", "validation"):
        for number, label in enumerate(LABELS):
            place = folder / "my-photographs" / split / label
            place.mkdir(parents=True)
            for copy in range(2):
                with Image.open(PHOTOGRAPHS[(number + copy) % len(PHOTOGRAPHS)]) as image:
                    image.resize((72, 60)).save(place / f"{copy}.png")
    save_classifier(folder / "my-classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        explainer = AhaExplainer.from_classifier(CLASSIFIER, **SIZES)
    explainer.save_pretrained(folder / "runs" / "mine" / "final")
    (folder / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    return folder


def save_classifier(folder: Path) -> None:
    classifier = build_classifier("vit", num_labels=len(LABELS))
    classifier.config.id2label = dict(enumerate(LABELS))
    classifier.config.label2id = {label: index for index, label in enumerate(LABELS)}
    classifier.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.fixture
def reader(workspace, tmp_path, monkeypatch):
    """A reader of one page, in a copy of the workspace."""
    shutil.copytree(workspace, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(tmp_path / "reader")
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Reader()
    AcceleratorState._reset_state(reset_partial_state=True)
    # The commands silence the libraries; other tests want to hear them.
    logging.set_verbosity(verbosity)
    hub_logging.set_verbosity(hub_verbosity)
    if bar:
        logging.enable_progress_bar()


class Reader:
    """Does what a page says, block by block."""

    def __init__(self) -> None:
        self.names: dict[str, object] = {}

    def follow(self, block: Block) -> None:
        if block.language == "python":
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), self.names)
            return
        for words in block.commands():
            self.command([STAND_INS.get(word, word) for word in words], f"{block.page}:{block.line}")

    def command(self, words: list[str], where: str) -> None:
        if words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert words[1] in targets, f"{where}: make has no target {words[1]}"
            return
        script, words = without_launcher(words)
        if script == "hf_aha.cli":
            assert main(tiny(words)) == 0, f"{where}: {words}"
        elif "--help" in words:
            with pytest.raises(SystemExit) as answered:
                module_of(script, where).main(words)
            assert answered.value.code == 0
        else:
            assert script in TINY, f"{where}: no test knows how to run {script}"
            module_of(script, where).main(TINY[script](words))


def without_launcher(words: list[str]) -> tuple[str, list[str]]:
    """Script or module, and its arguments; what the launcher is told is left out, files of it must exist."""
    if words[0] == "hf-aha":
        return "hf_aha.cli", words[1:]
    assert words[0] in ("python", "accelerate", "torchrun"), f"no test knows how to run {words[0]}"
    for index, word in enumerate(words):
        if word in ("-m", "--module"):
            return words[index + 1], words[index + 2 :]
        if word.endswith(".py"):
            return word, words[index + 1 :]
        if word.endswith(".yaml"):
            assert Path(word).exists(), f"there is no {word}"
    raise AssertionError(f"{words} runs no script")


def module_of(script: str, where: str):
    assert (ROOT / script).is_file(), f"{where}: there is no {script}"
    return importlib.import_module(Path(script).stem)


def tiny_explainer(words: list[str]) -> list[str]:
    """The same training in one step on a tiny classifier, two where it goes on; later words override earlier ones."""
    recipe = [] if words[0].startswith("--") else words[:1]
    assert all(Path(path).exists() for path in recipe), recipe
    goes_on = "--resume_from_checkpoint" in words
    output = (values(words, "--output_dir") or ["runs/recipe"])[0]
    if not goes_on:
        shutil.rmtree(output, ignore_errors=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    words = [*words, *FAST_EXPLAINER, "--max_steps", "2" if goes_on else "1", "--output_dir", output]
    if not all(Path(folder).is_dir() for folder in values(words, "--classifier") or [CLASSIFIER]):
        words += ["--classifier", CLASSIFIER]
    # The layers that a recipe names are those of a deeper classifier.
    return [*words, "--taps", "2", "4"] if recipe else words


def tiny_target(words: list[str]) -> list[str]:
    """The same fine-tuning in one epoch on six photographs, from a teacher of four layers."""
    return [*words, *FAST_TARGET]


TINY = {"recipes/train_explainer.py": tiny_explainer, "recipes/train_target.py": tiny_target}


def tiny(words: list[str]) -> list[str]:
    """The same command on few images and the fastest protocol, in a folder of its own."""
    words = without_option(words, "--results")  # there are none of this explainer
    if "--refine" in words:
        words[words.index("--refine") + 1] = "1"
    if words[0] == "explain-dataset":
        words = [*words, "--workers", "0", "--limit", "2"]
    if words[0] in ("evaluate", "benchmark"):
        protocols = "--protocol" if words[0] == "evaluate" else "--protocols"
        for name in values(words, protocols):
            assert name == "all" or get_protocol(name)
        metrics = values(words, "--metrics")
        assert all(name == "all" or get_unoptimised(name) for name in metrics)
        methods = values(words, "--methods")
        parse_entries(methods)
        for option in (protocols, "--metrics", "--methods", "--images", "--batch-size"):
            words = without_option(words, option)
        words += [protocols, FAST_CURVES, "--images", "2", "--batch-size", "2", "--quiet"]
        fast = "localization" if "localization" in metrics else FAST_METRIC  # its columns are for no other
        words += ["--metrics", fast] if metrics else []
        # `NAME:IMAGES` stands for the slow ones, which have tests of their own.
        words += ["--methods", *(name for name in methods if ":" not in name)] if methods else []
    if "--output" in words and "--resume" not in words:
        place = words.index("--output") + 1
        while Path(words[place]).exists() and words[0] != "explain":
            words[place] += "-again"
    return words


def values(words: list[str], option: str) -> list[str]:
    """The words after an option, up to the next one."""
    found = []
    for word in words[words.index(option) + 1 :] if option in words else []:
        if word.startswith("--"):
            break
        found.append(word)
    return found


def without_option(words: list[str], option: str) -> list[str]:
    if option not in words:
        return list(words)
    start = words.index(option)
    return [*words[:start], *words[start + 1 + len(values(words, option)) :]]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if name_of(page) in SLOW else []) for page in RUN],
    ids=name_of,
)
def test_the_code_of_a_page_runs(page, reader):
    for block in runnable(page):
        reader.follow(block)


def test_only_the_known_blocks_are_not_run():
    assert {(block.page, block.not_run) for page in PAGES for block in blocks(page) if block.not_run} == NOT_RUN
    assert all(block.language in ("python", "bash") for page in PAGES for block in blocks(page) if block.not_run)
