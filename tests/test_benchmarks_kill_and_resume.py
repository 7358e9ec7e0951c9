"""The script that kills trainings: it notices what differs, and a few kills of it resume exactly."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("kill_and_resume")


def finished(run: Path) -> Path:
    """What a finished run leaves, as far as it is compared."""
    for folder in ("final", "checkpoint-2", "checkpoint-4"):
        (run / folder).mkdir(parents=True)
        save_file({"a": torch.arange(3.0)}, run / folder / "model.safetensors")
        for name in ("average.safetensors", "optimizer.pt", "process-0.pt"):
            (run / folder / name).write_bytes(b"state")
    (run / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "images_per_second": 3.1}\n')
    return run


def test_every_difference_is_noticed(script, tmp_path):
    whole = finished(tmp_path / "whole")
    assert script.differences(finished(tmp_path / "same"), whole) == []
    other = finished(tmp_path / "speed")
    (other / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "images_per_second": 9.9}\n')
    assert script.differences(other, whole) == []
    (other / "log.jsonl").write_text('{"step": 1, "loss": 0.6, "images_per_second": 9.9}\n')
    (other / "checkpoint-4" / "optimizer.pt").write_bytes(b"State")
    save_file({"a": torch.tensor([0.0, 1.0, 2.0000002])}, other / "final" / "model.safetensors")
    assert script.differences(other, whole) == ["weights", "checkpoint-4/optimizer.pt", "log"]
    other = finished(tmp_path / "fewer")
    (other / "checkpoint-4").rename(other / "checkpoint-6")
    assert script.differences(other, whole) == ["checkpoints"]


@pytest.mark.slow
def test_a_few_kills_resume_exactly(script, tmp_path, capsys):
    output = tmp_path / "kills.json"
    result = script.main(["--kills", "4", "--steps", "10", "--output", str(output)])
    assert json.loads(output.read_text()) == json.loads(json.dumps(result))
    assert str(tmp_path) not in output.read_text()
    assert result["exact_resumes"] == 4 and "4 of 4 resumes exact" in capsys.readouterr().out
    assert [(kill["kind"], kill["workers"]) for kill in result["kills"]] == [
        ("anywhere", 0),
        ("saving", 0),
        ("anywhere", 1),
        ("saving", 1),
    ]
    assert all(kill["resumed_from_step"] <= kill["after_step"] for kill in result["kills"])


@pytest.mark.parametrize("wrong", [["--kills", "0"], ["--steps", "7"]])
def test_wrong_numbers_are_refused(script, wrong, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(wrong)
    assert "must be at least 1 and --steps at least 8" in capsys.readouterr().err
