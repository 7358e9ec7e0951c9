"""The run folder explains itself: settings that start the run again, and an environment without secrets."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_aha.arguments import parse_yaml_and_command_line
from hf_aha.run_files import command_line, write_config, write_environment
from hf_aha.training_args import AhaTrainingArguments


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass
class Recipe(AhaTrainingArguments):
    dataset: str | None = None
    split: str | None = "validation"
    taps: list[int] | None = None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learning_rate": 1e-7, "weight_decay": 3e-4, "mixed_precision": "no", "straight_through": False},
        {"taps": [2, 4], "dataset": "someone/photos: a 'name' # with signs", "split": "", "crop_scale": (0.5, 1.0)},
        {"report_to": ["tensorboard"], "run_name": "yes", "eval_references": ["black"], "grid_range": [3, 9]},
        {"push_to_hub": True, "hub_model_id": "a/b", "image_size": 64, "torch_compile": True, "noise": 0.0},
    ],
)
def test_the_settings_of_a_run_can_be_given_as_a_recipe(tmp_path, changes):
    args = Recipe("run", **changes)
    write_config(tmp_path, args)
    again = parse_yaml_and_command_line(Recipe, [str(tmp_path / "config.yaml")])
    expected = dataclasses.replace(args, crop_scale=list(args.crop_scale))
    assert again == expected
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert set(written) == {field.name for field in dataclasses.fields(Recipe)} - {"hub_token"}


def test_no_trackers_are_written_as_none(tmp_path):
    write_config(tmp_path, Recipe("run", report_to=[]))
    assert parse_yaml_and_command_line(Recipe, [str(tmp_path / "config.yaml")]).report_to is None


def test_a_folder_given_as_a_path_is_written_as_text(tmp_path):
    write_config(tmp_path, Recipe(tmp_path / "run"))
    assert parse_yaml_and_command_line(Recipe, [str(tmp_path / "config.yaml")]).output_dir == str(tmp_path / "run")


def test_no_token_is_written_anywhere(tmp_path, monkeypatch):
    token = "hf_" + "a1B2" * 8
    words = ["train.py", "--hub_token", token, f"--hub-token={token}", f"--note=see {token}", "--tracker_token", "abc"]
    monkeypatch.setattr(sys, "argv", words)
    write_config(tmp_path, Recipe("run", hub_token=token))
    write_environment(tmp_path, Accelerator(cpu=True), 0)
    for path in tmp_path.iterdir():
        assert token not in path.read_text() and "abc" not in path.read_text()
    command = json.loads((tmp_path / "environment.json").read_text())["command"]
    assert command == [
        "train.py", "--hub_token", "...", "--hub-token=...", "--note=see hf_...", "--tracker_token", "...",
    ]  # fmt: skip


def test_the_environment_says_what_ran_where(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/hf-aha", "train", "recipe.yaml"])
    write_environment(tmp_path, Accelerator(cpu=True, mixed_precision="bf16"), 40)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["command"] == ["hf-aha", "train", "recipe.yaml"] and found["from_step"] == 40
    assert found["packages"]["torch"] == torch.__version__ and "transformers" in found["packages"]
    assert (found["device"], found["processes"], found["mixed_precision"]) == ("cpu", 1, "bf16")
    assert found["python"].count(".") == 2 and found["distributed"] == "NO" and found["cpu_cores"] >= 1
    if found["git"] is not None:
        assert len(found["git"]["commit"]) == 40 and isinstance(found["git"]["changed"], bool)


def test_the_environment_names_no_person_and_no_machine(tmp_path, monkeypatch):
    import getpass
    import socket

    monkeypatch.setattr(Path, "home", lambda: Path("/people/somebody"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", "/people/somebody/runs/mine", "/data/recipe.yaml"])
    write_environment(tmp_path, Accelerator(cpu=True), 0)
    text = (tmp_path / "environment.json").read_text()
    assert "somebody" not in text and socket.gethostname() not in text
    assert f'"{getpass.getuser()}"' not in text
    # What the user typed stays.
    assert json.loads(text)["command"][2:] == ["~/runs/mine", "/data/recipe.yaml"]


def test_the_home_of_a_container_without_one_hides_nothing(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert command_line(["train.py", "--output_dir", "/runs/mine"])[2] == "/runs/mine"


def test_outside_of_a_checkout_there_is_no_commit(monkeypatch):
    from hf_aha import run_files

    monkeypatch.setenv("PATH", "")
    assert run_files._git_state() is None
