"""`hf-aha benchmark`: explainers beside the methods people use, by the same protocols, on the same images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import CommandError
from .loading import _find_device, _first_line, describe_explainer, load_explainer
from .measuring import (
    add_measuring_arguments,
    add_running_arguments,
    begin_processes,
    public_name,
    run_measurement,
    sentence,
)


if TYPE_CHECKING:
    from ..benchmark import Entry
    from ..modeling_aha import AhaExplainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument(
        "--classifier",
        metavar="ID_OR_DIR",
        help="the target model (default: the one that the first explainer names)",
    )
    parser.add_argument(
        "--explainer",
        dest="explainers",
        nargs="+",
        default=[],
        metavar="ID",
        help="trained explainers of it: Hub ids, folders, or names of bundled ones; the first is what the others are "
        "compared with",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["random", "centre"],
        metavar="NAME[:N]",
        help="baselines, or all; rise:100 measures one on the first 100 images only (default: random centre)",
    )
    parser.add_argument(
        "--protocols",
        nargs="+",
        default=["hf_aha"],
        metavar="NAME",
        help="aha, rise, chefer, mda, hf_aha, one of their curves such as rise/deletion, or all (default: hf_aha)",
    )
    add_running_arguments(parser)
    add_measuring_arguments(parser, "benchmark")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure every method by every protocol.

    Returns:
        0, or 1 when an image could not be read or a map could not be used.

    Raises:
        CommandError: a model or the dataset cannot be loaded, a name is unknown, or the run cannot go on.
    """
    from ..benchmark import parse_entries

    if arguments.classifier is None and not arguments.explainers:
        raise CommandError("there is no target model: give --classifier, --explainer, or both.")
    try:
        baselines = parse_entries(arguments.methods)
    except ValueError as error:
        raise CommandError(sentence(error)) from error
    begin_processes(arguments)
    entries, host = _load_explainers(arguments)
    name, revision = arguments.classifier, None
    if host is None:
        host = _untrained(arguments)
        revision = host.config.base_model_revision
    else:
        named = argparse.Namespace(**{**vars(arguments), "explainer": arguments.explainers[0], "revision": None})
        record = describe_explainer(host, named)["classifier"]
        name, revision = record["id"], record["revision"]
    return run_measurement(arguments, host, [*entries, *baselines], arguments.protocols, name, revision)


def _load_explainers(arguments: argparse.Namespace) -> tuple[list[Entry], AhaExplainer | None]:
    """The trained explainers, all of one target model, and the first of them."""
    from ..benchmark import Entry, LearnedExplainer

    entries, host = [], None
    several = len(arguments.explainers) > 1
    for number, explainer_id in enumerate(arguments.explainers):
        named = argparse.Namespace(**{**vars(arguments), "explainer": explainer_id, "revision": None})
        explainer = load_explainer(named)
        if host is not None and _differs(explainer, host):
            raise CommandError(
                f"{explainer_id!r} explains another target model than {arguments.explainers[0]!r}, or another input "
                "size; their numbers cannot be compared, so measure them in two folders."
            )
        host = host or explainer
        entries.append(
            Entry(
                LearnedExplainer(
                    explainer=explainer,
                    label=f"aha-{number + 1}" if several else "aha",
                    heading=f"AHA ({public_name(explainer_id)})",
                    revision=describe_explainer(explainer, named)["explainer"]["revision"],
                )
            )
        )
    return entries, host


def _differs(one: AhaExplainer, other: AhaExplainer) -> bool:
    from ..classifier_aha import FINGERPRINT_TOLERANCE, fingerprint_distance

    prints = one.classifier.fingerprint(), other.classifier.fingerprint()
    return (
        one.config.image_size != other.config.image_size
        or len(prints[0]) != len(prints[1])
        or fingerprint_distance(*prints) > FINGERPRINT_TOLERANCE
    )


def _untrained(arguments: argparse.Namespace) -> AhaExplainer:
    """The target model with its image processor, in the shape that the explainers give them."""
    import torch

    from .. import AhaExplainer

    try:
        host = AhaExplainer.from_classifier(
            arguments.classifier,
            dtype=getattr(torch, arguments.dtype),
            local_files_only=arguments.local_files_only,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise CommandError(
            f"the target model {arguments.classifier!r} cannot be loaded: {_first_line(error)}"
        ) from error
    host.to(_find_device(arguments.device))
    host.classifier.to(host.device)
    return host.eval()
