"""What a run folder says of its run beside the log: the settings, and the place where they ran."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator

from .files import write_atomically
from .training_args import AhaTrainingArguments


CONFIG_FILE, ENVIRONMENT_FILE = "config.yaml", "environment.json"

_PACKAGES = (
    "hf-aha",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "safetensors",
    "numpy",
    "pillow",
    "deepspeed",
)


def write_config(folder: Path, args: AhaTrainingArguments) -> None:
    """Write `config.yaml`: every setting but the token, as a recipe that starts the same run again.

    Args:
        folder: of the run.
        args: settings, also of a recipe's own class.
    """
    settings = {name: _plain(value) for name, value in args.to_dict().items()}
    text = f"# Every setting of this run, defaults included; it can be given as a recipe.\n{_yaml(settings)}"
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def write_environment(folder: Path, accelerator: Accelerator, step: int) -> None:
    """Write `environment.json`: see `environment`; for the main process."""
    text = json.dumps({"from_step": step, **environment(accelerator)}, indent=2) + "\n"
    write_atomically(folder / ENVIRONMENT_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def environment(accelerator: Accelerator) -> dict[str, object]:
    """When, with what and on what a run was started, ready for JSON.

    It holds neither the machine's name nor the user's, no token, and of paths only those of the command line, with the
    home directory written as `~`.

    Args:
        accelerator: of the run.
    """
    device = accelerator.device
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
        "git": _git_state(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "device": torch.get_device_module(device).get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
    }


def command_line(words: Sequence[str]) -> list[str]:
    """The words of a command without tokens, and without the folders of the program and the home directory.

    Example:
        >>> command_line(["/usr/bin/train.py", "run.yaml", "--hub_token", "secret", "--hub_token=secret", "--seed=3"])
        ['train.py', 'run.yaml', '--hub_token', '...', '--hub_token=...', '--seed=3']
    """
    shown = []
    for index, word in enumerate(words):
        if index == 0 and os.path.isabs(word):
            word = Path(word).name  # an installed command, or `python -m`: nobody typed its folder
        if index > 0 and re.fullmatch(r"--[\w-]*token", words[index - 1]):
            word = "..."
        word = re.sub(r"(?i)^(--[\w-]*token=).*", r"\1...", word)
        word = re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_...", word)
        home = str(Path.home())
        shown.append(word.replace(home, "~") if len(home) > 1 else word)
    return shown


def _yaml(settings: dict[str, object]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=None)


def _plain(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return list(value) or None  # a recipe has no word for an empty list
    return value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, object] | None:
    """Commit of the checkout this package lies in, and whether the package was changed since; None elsewhere."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one of another user
            return None
        return done.stdout.strip()

    # An environment may lie inside the checkout of another project, which says nothing of this package.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "."))}


__all__ = ["CONFIG_FILE", "ENVIRONMENT_FILE", "command_line", "environment", "write_config", "write_environment"]
