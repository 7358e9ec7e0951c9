"""The benchmarks of whole training runs, on a few steps; no number itself is asserted."""

from __future__ import annotations

import json

import numpy as np
import pytest


pytestmark = pytest.mark.usefixtures("accelerate_afresh")


def test_growth_is_the_slope_after_the_warm_up(script):
    growth = script("training_memory").growth
    steps = list(range(0, 1001, 10))
    # The first tenth grows steeply, the rest by 50 bytes a step with noise around it.
    noise = np.random.default_rng(0).normal(0, 200, len(steps))
    sizes = [
        1_000_000 + 50 * step + extra - max(0, 100 - step) * 9000 for step, extra in zip(steps, noise, strict=True)
    ]
    found = growth(steps, sizes)
    assert found["bytes_per_step"] == pytest.approx(50, abs=1)
    assert found["bytes_over_the_run"] == pytest.approx(50 * 890, rel=0.02)
    assert found["largest_bytes"] >= found["last_bytes"] > found["first_bytes"] > 1_000_000


@pytest.mark.slow
def test_the_memory_of_a_run_is_read_at_every_line_of_its_log(script, tmp_path, capsys):
    output = tmp_path / "memory.json"
    memory = script("training_memory")
    result = memory.main(
        ["--steps", "4", "--rows", "16", "--batch-size", "2", "--image-size", "28", "--output", str(output)]
    )
    assert json.loads(output.read_text()) == result
    assert [step for step, _, _ in result["resident"]] == [1, 2, 3, 4]
    assert all(1e8 < size < whole for _, size, whole in result["resident"])
    assert result["recipe"] == "imagenette-demo/explainer.yaml" and str(tmp_path) not in output.read_text()
    assert "| 4 |" in capsys.readouterr().out


@pytest.mark.slow
def test_one_and_two_processes_are_timed(script, tmp_path, capsys):
    output = tmp_path / "scaling.json"
    words = ["--steps", "4", "--log-steps", "2", "--batch-size", "2", "--image-size", "28", "--rows", "16"]
    result = script("scaling_cpu").main([*words, "--repeats", "1", "--output", str(output)])
    assert json.loads(output.read_text()) == result
    assert set(result["images_per_second"]) == {"1", "2"} and result["efficiency"]["2"] > 0
    assert str(tmp_path) not in output.read_text()
    assert "| 2 |" in capsys.readouterr().out
