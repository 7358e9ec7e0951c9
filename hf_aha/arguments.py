"""Arguments of a run: a dataclass filled from a YAML file and overridden on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser


Arguments = TypeVar("Arguments")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would print all of the many options before the one line that matters.
        raise SystemExit(f"The arguments are wrong: {message}; see --help.")


def parse_yaml_and_command_line(cls: type[Arguments], argv: Sequence[str]) -> Arguments:
    """Fill dataclass `cls` from `[file.yaml] [--name value ...]`; the command line wins.

    Raises:
        SystemExit: with one sentence, when a name is unknown (the nearest known one is named), a required one is
            missing, a value has the wrong type or is refused by `cls`, or the file is missing or no mapping.

    Example:
        `parse_yaml_and_command_line(AhaTrainingArguments, ["recipe.yaml", "--learning_rate", "1e-3"])`
    """
    argv = list(argv)
    parser = _Parser(cls, allow_abbrev=False)
    types = get_type_hints(cls)
    if argv and argv[0].endswith((".yaml", ".yml")):
        values = _read_yaml(Path(argv.pop(0)), types)
        parser.set_defaults(**{name: None for name, value in values.items() if value is None})
        # The file's values become words of the command line, so that they are converted alike (YAML itself reads 1e-3
        # as text); of two values the last one wins.
        argv = [word for name, value in values.items() for word in _words(name, value)] + argv
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].removeprefix("--").replace("-", "_")
        raise SystemExit(f"The command line has an unknown word {unknown[0]!r}{_nearest(name, types)}")
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    except ValueError as error:
        raise SystemExit(str(error)) from error


def _read_yaml(path: Path, types: dict[str, Any]) -> dict[str, object]:
    if not path.is_file():
        raise SystemExit(f"The recipe {path} does not exist.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SystemExit(f"The recipe {path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise SystemExit(f"The recipe {path} must be a YAML mapping of names to values.")
    for name, value in values.items():
        if name not in types:
            raise SystemExit(f"The recipe {path} has an unknown name {name!r}{_nearest(str(name), types)}")
        accepted = (types[name], *get_args(types[name]))
        if value is None and type(None) not in accepted:
            raise SystemExit(f"The recipe {path} gives no value for {name!r}; give one, or leave the name out.")
        if isinstance(value, bool) and bool not in accepted:
            raise SystemExit(
                f"The recipe {path} gives {name!r} a word that YAML reads as {value}; put it in quotes, "
                f'as in {name}: "no".'
            )
        if isinstance(value, dict):
            raise SystemExit(f"The recipe {path} gives {name!r} a mapping; give a value or a list.")
    return values


def _words(name: str, value: object) -> list[str]:
    if value is None:
        return []
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known names are {', '.join(sorted(known))}."
