"""The benchmark of `explain-dataset` runs on a tiny explainer and records what its numbers need."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import datasets
import pytest
from test_evaluate_command import save_dataset, save_explainer


FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("explain_dataset")


def test_both_ways_are_measured_in_turns(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_dataset(tmp_path / "photographs", 8)
    save_explainer(tmp_path / "tiny")
    words = ["--dataset", tmp_path / "photographs", "--explainer", tmp_path / "tiny", "--photographs", 8, "--turns", 2]
    words += ["--decoded", 4, "--batch-size", 2, "--workers", 1, "--shard-rows", 3, "--sample", 0.01]
    result = script.main([*map(str, words), "--output", str(tmp_path / "out.json")])
    text = (tmp_path / "out.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(result)) and str(tmp_path) not in text
    assert result["photographs"] == 8 and set(result["photographs_per_second"]) == {"bare", "engine"}
    assert set(result["throughput"]) == {"wall", "readers_apart", "one_core"}
    ratios = result["throughput"]["wall"]
    assert 0 < ratios["min"] <= ratios["median"] <= ratios["max"]
    cpu = result["cpu_ms_per_photograph"]
    assert min(cpu.values()) > 0  # the readers' time as well: they have ended by then
    memory = result["memory_mib"]
    assert (
        len(memory["resident"]) == 10 and max(memory["anonymous"]) < max(memory["resident"]) <= memory["peak"] + 0.01
    )
    assert "by the clock" in capsys.readouterr().out


def test_more_photographs_than_there_are(script, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_dataset(tmp_path / "photographs", 2)
    save_explainer(tmp_path / "tiny")
    with pytest.raises(SystemExit, match="the split has 2"):
        script.main(["--dataset", str(tmp_path / "photographs"), "--explainer", str(tmp_path / "tiny")])
