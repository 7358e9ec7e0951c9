"""`hf-aha push-space EXPLAINER REPO_ID`: publishes the demo of an explainer as a Space on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import CommandError
from .loading import load_explainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.description += (
        " The Space loads the explainer from the Hub, so push that first. Log in with `hf auth login` first, or set "
        "HF_TOKEN."
    )
    parser.add_argument("explainer", metavar="EXPLAINER", help="Hub id, or name of a bundled explainer")
    parser.add_argument("repo_id", metavar="REPO_ID", help="NAMESPACE/NAME of the Space; made when it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make a new Space private")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--title", metavar="TEXT", help="of the Space")
    parser.add_argument("--license", metavar="ID", help="of the page (default: apache-2.0)")
    parser.add_argument(
        "--classifier", metavar="ID", help="Hub id of the classifier, where the explainer does not say it"
    )
    parser.add_argument(
        "--package",
        metavar="REQUIREMENT",
        help="what pip installs in the Space (default: hf-aha), for instance hf-aha @ git+https://...",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write the Space's files into this folder instead of uploading"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Upload, print the address of the Space, and return 0.

    Raises:
        CommandError: the explainer cannot be loaded here or by a Space, a file cannot be written, or the Hub refused.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    from ..hub import explain_hub_error
    from ..space import push_space, space_contents, space_files

    place = {"revision": None, "device": "cpu", "dtype": "float32", "local_files_only": False}
    explainer = load_explainer(argparse.Namespace(**{**vars(arguments), **place}), load_classifier=False)
    try:
        contents = space_contents(
            arguments.explainer,
            explainer.config,
            classifier=arguments.classifier,
            title=arguments.title,
            licence=arguments.license,
            package=arguments.package,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    if arguments.output is not None:
        try:
            arguments.output.mkdir(parents=True, exist_ok=True)
            for name, text in space_files(contents).items():
                (arguments.output / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise CommandError(
                f"the Space cannot be written to {arguments.output}: {error.strerror or error}."
            ) from error
        print(arguments.output)
        return 0
    try:
        commit = push_space(contents, arguments.repo_id, private=arguments.private, commit_message=arguments.message)
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise CommandError(explain_hub_error(error, arguments.repo_id)) from error
    print(commit.repo_url)
    return 0
