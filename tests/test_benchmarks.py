"""The benchmark scripts run on tiny models and record what their numbers need; no number itself is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import ViTImageProcessorPil


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the first precision of a process; the other tests may want another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def classifier(tmp_path: Path, make_classifier) -> Path:
    """A folder with a tiny classifier and its image processor."""
    folder = tmp_path / "tiny-vit"
    make_classifier("vit").save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def check_record(result: dict, output: Path, tmp_path: Path) -> None:
    """What every result file holds, and what none may hold."""
    text = output.read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(result))
    assert str(tmp_path) not in text, "an absolute path of this machine is in the result file"
    assert set(result["versions"]) == {"hf_aha", "torch", "transformers", "python"}
    assert result["threads"] == torch.get_num_threads()
    assert result["machine"]["cpu"] and result["machine"]["device"] == "cpu"
    assert result["command"].startswith("python benchmarks/") and "tiny-vit" in result["command"]


def test_explainer_cost_gives_a_row_a_batch_size(script, classifier, tmp_path, capsys):
    cost: ModuleType = script("explainer_cost")
    output = tmp_path / "results" / "cost.json"
    argv = ["--classifier", str(classifier), "--batch-size", "1", "2", "--repeats", "2", "--no-memory"]
    result = cost.main([*argv, "--output", str(output)])
    check_record(result, output, tmp_path)
    assert [(row["classifier"], row["batch_size"]) for row in result["rows"]] == [("tiny-vit", 1), ("tiny-vit", 2)]
    for row in result["rows"]:
        # The explainer runs the whole target and more.
        assert row["explainer_s"] > 0 and row["target_s"] > 0
        assert row["time_ratio"]["min"] <= row["time_ratio"]["median"] <= row["time_ratio"]["max"]
        assert row["memory_ratio"] is None
    printed = capsys.readouterr().out
    assert printed.count("| tiny-vit |") == 2 and "n/a" in printed


@pytest.mark.slow
def test_explainer_cost_measures_memory_in_fresh_processes(script, classifier, tmp_path):
    cost = script("explainer_cost")
    if not cost.can_measure_memory(torch.device("cpu")):
        pytest.skip("peak memory is read from Linux's /proc")
    argv = ["--classifier", str(classifier), "--batch-size", "2", "--repeats", "1", "--threads", "1"]
    (row,) = cost.main(argv)["rows"]
    # The decoder's weights in bfloat16 are in the one number and not in the other.
    assert row["explainer_bytes"] - row["target_bytes"] > row["decoder_parameters"]
    assert row["memory_ratio"] == row["explainer_bytes"] / row["target_bytes"]


def test_peak_memory_sees_a_tensor_that_is_gone(script):
    measuring = script("measuring")
    device = torch.device("cpu")
    if not measuring.can_measure_memory(device):
        pytest.skip("peak memory is read from Linux's /proc")
    size = 64 * 2**20
    earlier = torch.ones(2 * size, dtype=torch.uint8)
    peak = measuring.PeakMemory(device)
    del earlier
    peak.start()
    assert peak.read() < 0, "what went before the start must not count"
    kept = torch.ones(2 * size, dtype=torch.uint8)
    peak = measuring.PeakMemory(device)
    peak.start()
    torch.ones(size, dtype=torch.uint8)
    assert 0.9 * size < peak.read() < 1.5 * size
    assert kept.numel() == 2 * size


def test_timed_in_turns_takes_turns_in_both_orders_and_drops_the_warm_up(script):
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = script("measuring").timed_in_turns(calls, repeats=2, device=torch.device("cpu"), warm_up=1)
    assert "".join(called) in ("abbaab", "baabba")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_training_step_counts_perturbed_images_and_leaves_nothing_behind(script, classifier, tmp_path, capsys):
    step = script("training_step")
    output = tmp_path / "step.json"
    argv = ["--classifier", str(classifier), "--batch-size", "2", "--curve-points", "3", "--image-size", "48"]
    argv += ["--repeats", "1", "--mixed-precision", "no", "--attn-implementation", "eager", "--output", str(output)]
    result = step.main(argv)
    check_record(result, output, tmp_path)
    assert result["perturbed_images"] == 2 * 2 * 3
    assert result["image_size"] == [48, 48]
    assert result["ranker"] == "quantile"
    assert result["step_s"] > 0 and result["bare_s"] > 0
    assert "| tiny-vit | 48x48 | 2 | 3 | 12 |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "tiny-vit"]


def test_a_measured_step_trains_the_decoder_and_nothing_else(script, classifier, tmp_path):
    step = script("training_step")
    args = step.argparse.Namespace(
        classifier=str(classifier), attn_implementation=None, batch_size=2, curve_points=None, mixed_precision="no"
    )
    trainer = step.build_trainer(args, str(tmp_path / "run"))
    before = {name: value.clone() for name, value in trainer.explainer.state_dict().items()}
    step.bare_pass(trainer, torch.randn(2, 3, 32, 32))
    assert all(parameter.grad is None for parameter in trainer.explainer.parameters())
    # The first step of the warm-up has a learning rate of 0.
    for _ in range(2):
        trainer.training_step(torch.randn(2, 3, 32, 32), torch.tensor([-1, -1]), torch.arange(2))
    changed = {name for name, value in trainer.explainer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)


def test_cuda_without_a_device_is_one_sentence(script, classifier):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        script("explainer_cost").main(["--classifier", str(classifier), "--device", "cuda", "--no-memory"])
