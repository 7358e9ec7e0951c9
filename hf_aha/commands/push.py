"""`hf-aha push EXPLAINER REPO_ID`: uploads an explainer with its card, log and pictures to the Hub, in one commit."""

from __future__ import annotations

import argparse

from . import CommandError
from .card import add_card_arguments, card_contents, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.description += " Log in with `hf auth login` first, or set HF_TOKEN."
    parser.add_argument("explainer", metavar="EXPLAINER", help="folder, such as RUN/final, or Hub id")
    parser.add_argument("repo_id", metavar="REPO_ID", help="NAMESPACE/NAME on the Hub; made when it is not there")
    group = parser.add_argument_group("upload")
    group.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    group.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    group.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    group.add_argument("--message", metavar="TEXT", help="of the commit")
    group.add_argument("--message-body", metavar="TEXT", help="more about the commit")
    group.add_argument("--max-shard-size", default="50GB", metavar="SIZE", help="(default: %(default)s)")
    group.add_argument(
        "--include-classifier",
        action="store_true",
        default=None,
        help="upload the classifier's weights, too (default: if the explainer was saved with them)",
    )
    add_card_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Upload, print the address of the commit or pull request, and return 0.

    Raises:
        CommandError: the explainer cannot be loaded, something for its card cannot be read, or the Hub refused.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    from ..hub import explain_hub_error, push_explainer
    from ..images import ImageReadError

    if arguments.create_pr and arguments.revision not in (None, "main"):
        raise CommandError("--create-pr opens a pull request against main: give no --revision with it.")
    # What was saved together with its classifier would be of no use without it.
    explainer = load(arguments, with_classifier=bool(arguments.include_classifier))
    if explainer.config.includes_classifier and explainer.classifier is None:
        explainer = load(arguments, with_classifier=True)
    contents = card_contents(arguments, explainer)
    try:
        commit = push_explainer(
            explainer,
            arguments.repo_id,
            commit_message=arguments.message,
            commit_description=arguments.message_body,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            max_shard_size=arguments.max_shard_size,
            include_classifier=arguments.include_classifier,
            **contents,
        )
    except ImageReadError as error:
        raise CommandError(str(error)) from error
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise CommandError(explain_hub_error(error, arguments.repo_id)) from error
    print(commit.pr_url or commit.commit_url)
    return 0
