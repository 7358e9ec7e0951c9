"""Arguments of a run: a dataclass filled from a YAML file and overridden on the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser


Arguments = TypeVar("Arguments")


def parse_yaml_and_command_line(cls: type[Arguments], argv: Sequence[str]) -> Arguments:
    """Fill dataclass `cls` from `[file.yaml] [--name value ...]`; the command line wins.

    Raises:
        SystemExit: a key of the YAML file is unknown (the nearest known one is named), the file is missing or is not a
            mapping, or the command line is wrong.

    Example:
        `parse_yaml_and_command_line(AhaTrainingArguments, ["recipe.yaml", "--learning_rate", "1e-3"])`
    """
    argv = list(argv)
    parser = HfArgumentParser(cls)
    values: dict[str, object] = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = _read_yaml(Path(argv.pop(0)), {f.name for f in dataclasses.fields(cls)})
    given = {token[2:].split("=")[0].replace("-", "_") for token in argv if token.startswith("--")}
    # What the YAML file sets is no longer required on the command line and becomes its default there.
    for action in parser._actions:
        if action.dest in values:
            action.required = False
    parser.set_defaults(**values)
    (arguments,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name, value in values.items():
        if name not in given:
            setattr(arguments, name, value)
    if hasattr(arguments, "__post_init__"):
        arguments.__post_init__()
    return arguments


def _read_yaml(path: Path, known: set[str]) -> dict[str, object]:
    if not path.exists():
        raise SystemExit(f"The recipe {path} does not exist.")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        raise SystemExit(f"The recipe {path} must be a YAML mapping of names to values.")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known names are {', '.join(sorted(known))}."
            raise SystemExit(f"The recipe {path} has an unknown name {key!r}{hint}")
    return values
