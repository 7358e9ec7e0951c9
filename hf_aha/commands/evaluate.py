"""`hf-aha evaluate EXPLAINER`: how faithful the maps of one explainer are, by named protocols."""

from __future__ import annotations

import argparse

from .loading import describe_explainer, load_explainer
from .measuring import add_measuring_arguments, add_running_arguments, begin_processes, public_name, run_measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument("explainer", metavar="EXPLAINER", help="Hub id, folder, or name of a bundled explainer")
    parser.add_argument("--revision", metavar="REV", help="commit, tag or branch of the explainer on the Hub")
    parser.add_argument(
        "--classifier",
        metavar="ID_OR_DIR",
        help="load the explained classifier from here instead of where the explainer says it is",
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        default=["hf_aha"],
        metavar="NAME",
        help="aha, rise, chefer, mda, hf_aha, one of their curves such as rise/deletion, or all (default: hf_aha)",
    )
    add_running_arguments(parser)
    add_measuring_arguments(parser, "evaluation")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate the explainer.

    Returns:
        0, or 1 when an image could not be read or a map could not be used.

    Raises:
        CommandError: the explainer or the dataset cannot be loaded, or the run cannot go on.
    """
    begin_processes(arguments)
    explainer = load_explainer(arguments)
    from ..benchmark import Entry, LearnedExplainer

    record = describe_explainer(explainer, arguments)
    name = public_name(arguments.explainer)
    method = LearnedExplainer(
        explainer=explainer, label="aha", heading=f"AHA ({name})", revision=record["explainer"]["revision"]
    )
    classifier = record["classifier"]
    return run_measurement(
        arguments, explainer, [Entry(method)], arguments.protocol, classifier["id"], classifier["revision"]
    )
