"""One process or several: the same training at an equal global batch; a whole decoder also where it is sharded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from distributed_training import CASES, new_explainer, train
from safetensors.torch import load_file
from test_trainer import encoded
from torch import nn

from hf_aha.scaling import WholeDecoder, settle_batches, whole_tensor
from hf_aha.training_args import AhaTrainingArguments


SCRIPT = Path(__file__).with_name("distributed_training.py")
ROWS = 20  # two steps and a half: where batches are accumulated, the third step ends in the next epoch


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, dict[str, dict[str, torch.Tensor]]]:
    """Folders of the runs of one and of two processes, and the final weights of the former."""
    folders = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp(name)
        (folder / "photographs").mkdir()
        cells = [{"bytes": encoded(i), "path": None} for i in range(ROWS)]
        table = datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image()}))
        table.to_parquet(folder / "photographs" / "train.parquet")
        folders.append(folder)
    one, two = folders
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_DATASETS_CACHE": str(two / "cache"),
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])]),
    }
    pair = subprocess.Popen(
        [*launch, str(SCRIPT), str(two), "2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", one / "cache")
        weights = train(one, 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    output, _ = pair.communicate(timeout=300)
    assert pair.returncode == 0, output.decode()[-3000:]
    return one, two, weights


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- one and two processes


@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_the_losses_of_one(runs, case):
    one, two, _ = runs
    logs = [log_of(folder / case) for folder in (one, two)]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]] == [1, 2, 3, 4, 5, 5]
    for single, double in zip(*logs, strict=True):
        compared = [name for name in single if name not in ("images_per_second", "data_wait_share")]
        assert set(single) == set(double)
        for name in compared:
            # The log rounds to four digits.
            assert double[name] == pytest.approx(single[name], abs=3e-4), (single["step"], name)
    losses = [entry["loss"] for entry in logs[0] if "loss" in entry]
    assert len(set(losses)) == 5, "losses that never change would agree by themselves"


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_with_the_weights_of_one(runs, case):
    _, two, weights = runs
    pair = [torch.load(two / f"weights-{rank}.pt", weights_only=True)[case] for rank in (0, 1)]
    for name, value in pair[0].items():
        assert torch.equal(value, pair[1][name]), f"the processes differ in {name}"
    start, one, both = (what_ranks(w) for w in (new_explainer().decoder.state_dict(), weights[case], pair[0]))
    moved, apart = (one - start).norm(), (both - one).norm()
    assert apart < 0.01 * moved
    others = [what_ranks(weights[other]) for other in CASES if other != case]
    assert all((one - other).norm() > 0.1 * moved for other in others), "what differs would be seen"


def what_ranks(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weights as one vector, without the biases that shift all scores alike.

    They change no rank, so their gradient is the rounding of sums, which depends on the batch; and Adam scales it up.
    """
    kept = {name: value for name, value in weights.items() if name != "grid_score.bias"}
    kept["pixel_score.bias"] = kept["pixel_score.bias"] - kept["pixel_score.bias"].mean()
    return torch.cat([value.flatten() for value in kept.values()])


def test_the_runs_of_two_processes_are_written_once_and_hold_no_classifier(runs):
    _, two, weights = runs
    run = two / "default"
    names = set(weights["default"])
    assert set(load_file(run / "checkpoint-3" / "model.safetensors")) == names
    assert set(load_file(run / "final" / "model.safetensors")) == {f"decoder.{name}" for name in names}
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["processes"], environment["distributed"]) == (2, "MULTI_CPU")
    training = json.loads((run / "final" / "config.json").read_text())["training"]
    assert training["images_seen"] == 5 * 8


# ---------------------------------------------------------------------------------------------- sharded decoders


@pytest.fixture
def gloo(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Accelerator:
    def __init__(self, kind: DistributedType):
        self.distributed_type = kind


def test_the_whole_decoder_follows_one_that_fsdp_shards(gloo, monkeypatch):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    monkeypatch.setattr("hf_aha.scaling.broadcast", lambda tensor: tensor)
    decoder = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 1))
    start = {name: value.clone() for name, value in decoder.state_dict().items()}
    whole = WholeDecoder(Accelerator(DistributedType.FSDP), decoder)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(decoder, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    decoder(torch.randn(5, 4)).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(decoder.parameters(), 1e9)
    assert type(whole_tensor(norm)) is torch.Tensor and whole_tensor(norm) > 0
    optimizer.step()
    assert all(torch.equal(value, start[name]) for name, value in whole.module.state_dict().items())
    whole.update()
    for name, value in decoder.state_dict().items():
        assert type(whole.module.state_dict()[name]) is torch.Tensor
        assert torch.equal(value.full_tensor(), whole.module.state_dict()[name])
        assert not torch.equal(value.full_tensor(), start[name])
    pixels = torch.randn(2, 4)
    torch.testing.assert_close(whole.module(pixels), decoder(pixels))


def test_the_whole_decoder_is_a_full_precision_copy_where_an_engine_casts(monkeypatch):
    monkeypatch.setattr("hf_aha.scaling.broadcast", lambda tensor: tensor)
    decoder = nn.Linear(4, 3)
    whole = WholeDecoder(Accelerator(DistributedType.DEEPSPEED), decoder)
    decoder.to(torch.bfloat16)
    with torch.no_grad():
        decoder.weight.add_(1)
    whole.update()
    assert whole.module.weight.dtype == torch.float32
    assert torch.equal(whole.module.weight, decoder.weight.float())


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU])
def test_a_decoder_that_is_whole_is_not_copied(kind):
    decoder = nn.Linear(2, 2)
    whole = WholeDecoder(Accelerator(kind), decoder)
    whole.update()
    assert whole.module is decoder


def test_the_engine_of_deepspeed_is_told_what_a_step_holds():
    class Plugin:
        deepspeed_config = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto"}

    class State:
        deepspeed_plugin = Plugin

    accelerator = Accelerator(DistributedType.DEEPSPEED)
    accelerator.state = State
    args = AhaTrainingArguments("run", per_device_batch_size=6, gradient_accumulation_steps=3, max_grad_norm=0.5)
    settle_batches(accelerator, args)
    assert accelerator.gradient_accumulation_steps == 3
    assert Plugin.deepspeed_config == {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
    }
