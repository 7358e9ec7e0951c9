"""`hf-aha card EXPLAINER`: writes the model card of an explainer with what it cites and shows, without uploading."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError
from .loading import load_explainer


if TYPE_CHECKING:
    from ..modeling_aha import AhaExplainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument("explainer", metavar="EXPLAINER", help="Hub id, folder, or name of a bundled explainer")
    parser.add_argument(
        "--output", type=Path, default=Path("model-card"), metavar="DIR", help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--repo-id", metavar="ID", help="where users will load it from (default: EXPLAINER, without its folders)"
    )
    add_card_arguments(parser)
    parser.set_defaults(run=run)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `hf-aha card` and `hf-aha push` have in common: what the card says, and how the explainer is loaded."""
    group = parser.add_argument_group("card")
    group.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="what was measured: results.json of `hf-aha evaluate` or `hf-aha benchmark`, .json of a protocol or of a "
        "card, .jsonl(.gz) of benchmarks/faithfulness.py",
    )
    group.add_argument("--training-log", type=Path, metavar="FILE", help="log.jsonl (default: beside the explainer)")
    group.add_argument("--dataset", nargs="+", metavar="ID", help="trained on (default: as the explainer records)")
    group.add_argument("--license", metavar="ID", help="such as apache-2.0 (default: that of the target model)")
    group.add_argument("--tag", nargs="+", default=[], metavar="TAG", help="more tags")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--example", nargs="+", metavar="PHOTO", help="to show (default: three bundled photographs)")
    which.add_argument("--no-examples", action="store_true", help="show none; the classifier need not be there")
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--classifier",
        metavar="ID_OR_DIR",
        help="load the explained classifier from here instead of where the explainer says it is",
    )
    group.add_argument("--local-files-only", action="store_true", help="load only files that are here")


def run(arguments: argparse.Namespace) -> int:
    """Write the card and return 0.

    Raises:
        CommandError: the explainer cannot be loaded, a result file or photograph cannot be read, or the output cannot
            be written.
    """
    from ..hub import add_card
    from ..images import ImageReadError

    explainer = load(arguments)
    contents = card_contents(arguments, explainer)
    place = Path(arguments.explainer)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        add_card(
            explainer,
            arguments.output,
            repo_id=arguments.repo_id or (place.name if place.is_dir() else arguments.explainer),
            include_classifier=explainer.config.includes_classifier,
            local_files_only=arguments.local_files_only,
            **contents,
        )
    except ImageReadError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"the card cannot be written to {arguments.output}: {error.strerror or error}.") from error
    print(arguments.output / "README.md")
    return 0


def load(arguments: argparse.Namespace, *, with_classifier: bool = False) -> AhaExplainer:
    """The explainer, with its classifier where pictures of it are wanted.

    Raises:
        CommandError: it cannot be loaded.
    """
    place = {"revision": None, "device": "cpu", "dtype": "float32"}
    wanted = argparse.Namespace(**{**vars(arguments), **place})
    if with_classifier or not arguments.no_examples:
        try:
            return load_explainer(wanted)
        except CommandError as error:
            if with_classifier:
                raise
            # Raises by itself where it is not the classifier that is missing.
            load_explainer(wanted, load_classifier=False)
            hint = "with --no-examples the classifier is not needed"
            raise CommandError(f"{str(error).rstrip('.')} ({hint}).") from error
    return load_explainer(wanted, load_classifier=False)


def card_contents(arguments: argparse.Namespace, explainer: AhaExplainer) -> dict[str, Any]:
    """The arguments of `add_card` and `push_explainer` that say what the card holds.

    Raises:
        CommandError: a result file cannot be read.
    """
    from ..model_card import training_references
    from ..result_files import load_card_results

    try:
        results = load_card_results(
            arguments.results,
            references=training_references(explainer.config),
            training_log=arguments.training_log,
        )
    except OSError as error:
        raise CommandError(
            f"{error.filename or 'a result file'} cannot be read: {error.strerror or error}."
        ) from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    return {
        "results": results,
        "training_log": arguments.training_log,
        "datasets": arguments.dataset,
        "licence": arguments.license,
        "tags": arguments.tag,
        "photographs": () if arguments.no_examples else arguments.example,
    }
