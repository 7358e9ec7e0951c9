"""The command line, `hf-aha COMMAND ...`: finds the command, runs it, and turns its errors into one sentence.

Nothing here imports torch or transformers, so `--help` answers at once. A command lives in a module of
`hf_aha.commands`, is listed in `COMMANDS`, and imports what is heavy inside the function it runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from . import __version__
from .commands import CommandError


# Name -> (one line of help, "module:function" of `hf_aha.commands` that gives the command its arguments). The function
# takes the command's parser and sets the default `run`, a function from the parsed arguments to the exit code.
COMMANDS: dict[str, tuple[str, str]] = {
    "explain": ("explain photographs: pictures, raw scores and a record of each", "explain:add_arguments"),
    "explain-dataset": ("explain every photograph of a dataset and keep the maps", "explain_dataset:add_arguments"),
    "evaluate": ("measure how faithful the maps of an explainer are, by named protocols", "evaluate:add_arguments"),
    "benchmark": ("measure explainers beside the methods people use", "benchmark:add_arguments"),
    "card": ("write the model card of an explainer from what was measured", "card:add_arguments"),
    "push": ("upload an explainer with its card, log and pictures to the Hub", "push:add_arguments"),
    "demo": ("try an explainer on photographs in the browser", "demo:add_arguments"),
    "push-space": ("publish the demo of an explainer as a Space on the Hub", "push_space:add_arguments"),
}

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after `hf-aha`; those of the process when left out.

    Returns:
        0 when everything worked, 1 when some inputs failed, 2 for a wrong argument, 130 after Ctrl-C.

    Raises:
        SystemExit: argparse answered by itself (`--help`, `--version`, an unknown or malformed option).

    Example:
        `main(["explain", "photo.jpg", "--explainer", "imagenette-demo"])`
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser(argv).parse_args(argv)
    arguments.words = argv  # for commands that record how they were called
    try:
        return arguments.run(arguments)
    except CommandError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"hf-aha {arguments.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"hf-aha {arguments.command}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for `argv`; it imports only the command that `argv` names, the others show their line of help.

    Example:
        >>> build_parser(["explain"]).parse_args(["explain", "photo.jpg", "--top-k", "3"]).top_k
        3
    """
    parser = argparse.ArgumentParser(
        prog="hf-aha", description="Which pixels made an image classifier say that? Learned attribution in one pass."
    )
    parser.add_argument("--version", action="version", version=f"hf-aha {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, (summary, place) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == named:
            module, function = place.split(":")
            getattr(importlib.import_module(f".commands.{module}", __package__), function)(command)
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
