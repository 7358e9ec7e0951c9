"""The configurations of recipes/accelerate/ are what Accelerate's own launcher reads, and say what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from hf_aha.scaling import make_accelerator
from hf_aha.training_args import AhaTrainingArguments


FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
KINDS = {
    "single": DistributedType.NO,
    "cpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed-zero2": DistributedType.DEEPSPEED,
    "deepspeed-zero3": DistributedType.DEEPSPEED,
}


def launch_arguments(path: Path, *words: str):
    """What `accelerate launch --config_file` makes of a file."""
    parsed = launch_command_parser().parse_args(["--config_file", str(path), *words, "train.py"])
    return _validate_launch_command(parsed)[0]


def test_every_kind_has_its_file():
    assert {path.stem for path in FILES} == set(KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file_and_nothing_in_it_is_unknown(path):
    config = load_config_from_file(str(path))  # refuses unknown names at the top level
    assert config.distributed_type == KINDS[path.stem]
    assert config.use_cpu == (path.stem == "cpu")
    # The recipe's own setting decides.
    assert config.mixed_precision is None
    known = vars(launch_command_parser().parse_args(["train.py"]))
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section) <= set(known), "the launcher would pass over the others"
    assert f"recipes/accelerate/{path.name}" in path.read_text(), "the command in the file names another file"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_launcher_accepts_the_file(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    arguments = launch_arguments(path)
    kind = KINDS[path.stem]
    assert arguments.multi_gpu == (kind == DistributedType.MULTI_GPU)
    assert arguments.use_fsdp == (kind == DistributedType.FSDP)
    assert arguments.use_deepspeed == (kind == DistributedType.DEEPSPEED)
    assert arguments.num_processes == (1 if kind == DistributedType.NO else 8)
    assert launch_arguments(path, "--num_processes", "2").num_processes == 2


def test_the_fsdp_file_asks_for_version_2(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    environment = prepare_multi_gpu_env(launch_arguments(FOLDER / "fsdp.yaml"))
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize("stage", [2, 3])
def test_the_deepspeed_files_ask_for_their_stage(stage):
    assert launch_arguments(FOLDER / f"deepspeed-zero{stage}.yaml").zero_stage == stage


def test_the_cpu_file_keeps_to_the_cpu():
    _, environment = prepare_simple_launcher_cmd_env(launch_arguments(FOLDER / "cpu.yaml"))
    assert environment["ACCELERATE_USE_CPU"].lower() == "true"


def test_the_first_version_of_fsdp_is_refused(tmp_path, monkeypatch):
    from hf_aha import scaling

    class Fsdp1:
        distributed_type = DistributedType.FSDP

        class state:
            class fsdp_plugin:
                fsdp_version = 1

    monkeypatch.setattr(scaling, "Accelerator", lambda **settings: Fsdp1)
    with pytest.raises(ValueError, match="Version 1 of FSDP is not supported; set fsdp_version to 2"):
        make_accelerator(AhaTrainingArguments(str(tmp_path)))


def test_the_files_do_not_name_a_machine():
    for path in FILES:
        values = yaml.safe_load(path.read_text())
        assert not {"main_process_ip", "gpu_uuid", "deepspeed_hostfile"} & set(values)
