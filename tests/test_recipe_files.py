"""Every YAML file of recipes/ holds valid settings only, so that a renamed setting cannot leave a recipe behind."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import yaml

from hf_aha.arguments import parse_yaml_and_command_line


FOLDER = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "accelerate")  # those are Accelerate's
IMAGENET = sorted(FOLDER.glob("*-imagenet*.yaml"))
IMAGENET_PHOTOGRAPHS = 1_281_167


@pytest.fixture(scope="module")
def script():
    """`script(name)`: a recipe script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module


def values_of(path: Path) -> dict[str, object]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def parse(path: Path, script, *words: str):
    """The file as the script that it is for reads it, with what the file leaves to the command line filled in."""
    if path.name == "target.yaml":
        cls, required = script("train_target").TargetArguments, ("dataset", "output_dir", "teacher")
    else:
        cls, required = script("train_explainer").RecipeArguments, ("classifier", "dataset", "output_dir")
    missing = [word for name in required if name not in values_of(path) for word in (f"--{name}", f"some-{name}")]
    return parse_yaml_and_command_line(cls, [str(path), *missing, *words])


def test_there_are_recipes():
    assert len(IMAGENET) >= 4 and len(FILES) > len(IMAGENET)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_value_arrives_with_the_type_of_its_setting(path, script):
    arguments = parse(path, script)
    types = {field.name: str(field.type) for field in dataclasses.fields(arguments)}
    for name, value in values_of(path).items():
        assert getattr(arguments, name) == value
        # YAML reads 3e-4 as a word; only 3.0e-4 is a number.
        for kind, python_type in (("float", float), ("int", int), ("str", str), ("bool", bool)):
            if types[name].split(" |")[0] == kind:
                assert type(value) is python_type, f"{name}: {value!r} is no {kind}"
            if types[name].startswith(f"list[{kind}]"):
                assert all(type(item) is python_type for item in value), f"{name}: {value!r} is no list of {kind}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_the_command_line_wins(path, script):
    assert parse(path, script, "--output_dir", "elsewhere", "--seed", "77").output_dir == "elsewhere"
    assert parse(path, script, "--output_dir", "elsewhere", "--seed", "77").seed == 77


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_an_imagenet_recipe_runs_as_it_is_for_one_epoch(path, script):
    arguments = script("train_explainer").RecipeArguments
    arguments = parse_yaml_and_command_line(arguments, [str(path)])
    seen = arguments.max_steps * arguments.per_device_batch_size * arguments.gradient_accumulation_steps
    a_step = arguments.per_device_batch_size * arguments.gradient_accumulation_steps
    assert abs(seen - IMAGENET_PHOTOGRAPHS) < a_step
    assert arguments.output_dir == f"runs/{path.stem}"
    assert f"recipes/{path.name}" in path.read_text(encoding="utf-8"), "the command in the file names another file"


def test_the_paper_recipe_holds_the_released_settings(script):
    arguments = parse(FOLDER / "vit-b16-imagenet-paper.yaml", script)
    objective = arguments.objective()
    assert (arguments.learning_rate, arguments.weight_decay) == (3e-4, 1e-3)
    assert (arguments.per_device_batch_size, arguments.tau_start, arguments.tau_end) == (32, 1.0, 0.3)
    assert arguments.taps == [5, 12, 18, 24] and "dinov3-vitl16" in arguments.encoder
    # Sixteen points from 0 to 1 are fifteen steps, all of them taken.
    assert (objective.ranker, objective.num_bins, objective.curve_points) == ("sinkhorn", 15, 0)
    assert not objective.straight_through and objective.noise == 1.0
