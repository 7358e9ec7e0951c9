"""`hf-aha explain-dataset DATASET`: explains every photograph of a dataset and keeps the maps as a dataset."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError
from .loading import add_loading_arguments, describe_explainer, load_explainer
from .measuring import _command, _positive, begin_processes, public_name, sentence


if TYPE_CHECKING:
    from ..dataset_maps import ExplainedRows, MapsSummary
    from ..modeling_aha import AhaExplainer

PREDICTED, LABEL_COLUMN = "predicted", "label-column"
DEFAULT_OUTPUT = "maps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.description += (
        " Started by `accelerate launch` or `torchrun`, it shares the work among the processes. Read the maps with "
        "hf_aha.dataset_maps.load_maps."
    )
    parser.add_argument("dataset", metavar="DATASET", help="dataset of the Hub, folder of parquet files, image folder")
    add_loading_arguments(parser)
    group = parser.add_argument_group("photographs")
    group.add_argument("--split", default="train", help="slices allowed: 'validation[:1000]' (default: %(default)s)")
    group.add_argument("--config", metavar="NAME", help="configuration of the dataset")
    group.add_argument("--dataset-revision", metavar="REV", help="commit, tag or branch of the dataset")
    group.add_argument("--image-column", metavar="NAME", help="found by its type when left out")
    group.add_argument("--id-column", metavar="NAME", help="names the photographs (default: image_id, file_name, ...)")
    group.add_argument("--limit", type=_positive, metavar="N", help="the first N photographs only")
    group = parser.add_argument_group("question")
    group.add_argument(
        "--target",
        metavar="CLASS",
        help=f"'{PREDICTED}', the predicted class of each (the default); '{LABEL_COLUMN}', the class that the dataset "
        "gives it; or a label or index of the classifier for all of them",
    )
    group.add_argument(
        "--against",
        metavar="CLASS",
        help="explain why the target rather than this label or index; without --target, why the most probable class "
        "other than this one",
    )
    group.add_argument("--label-column", metavar="NAME", help=f"for --target {LABEL_COLUMN}; found by its type")
    group.add_argument(
        "--top-k", type=_positive, default=1, metavar="N", help="maps of the N most probable classes (default: 1)"
    )
    group = parser.add_argument_group("maps")
    group.add_argument(
        "--quantisation",
        choices=("uint8", "uint16"),
        default="uint8",
        help="uint8 keeps ranks to 0.2%%; uint16 keeps the whole order of up to 65,536 pixels, at three times the "
        "size (default: %(default)s)",
    )
    group.add_argument(
        "--map-size",
        type=_size,
        metavar="HxW",
        help="average the scores to this size before they are ranked (default: the classifier's input size)",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the passes; auto takes bfloat16 where the machine has units for it (default: %(default)s)",
    )
    group = parser.add_argument_group("work")
    group.add_argument(
        "--batch-size", type=_positive, default=16, metavar="N", help="photographs a pass (default: 16)"
    )
    group.add_argument(
        "--workers", type=_count, default=2, metavar="N", help="readers of photographs a process (default: 2)"
    )
    group.add_argument(
        "--shard-rows",
        type=_positive,
        default=1000,
        metavar="N",
        help="photographs a file, which is what a killed process loses at most (default: 1000)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder (default: {DEFAULT_OUTPUT}, or with --push the last part of its name)",
    )
    group.add_argument("--resume", action="store_true", help="go on with what the folder holds")
    group.add_argument("--push", metavar="REPO_ID", help="upload the finished folder as this dataset of the Hub")
    group.add_argument("--private", action="store_true", default=None, help="make a new dataset on the Hub private")
    group.add_argument("--quiet", action="store_true", help="print only errors")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Explain what is missing, write the card, upload if wished, and say what the folder holds.

    Returns:
        0, or 1 when a photograph has no map.

    Raises:
        CommandError: the explainer or the dataset cannot be loaded, an argument does not fit, the folder holds
            something else, it cannot be written, or the Hub refused.
    """
    import torch

    from ..dataset_maps import MapsError, MapSettings, explain_dataset

    if arguments.private and not arguments.push:
        raise CommandError("--private is about --push REPO_ID: give both, or none.")
    output = arguments.output or Path(arguments.push.rpartition("/")[2] if arguments.push else DEFAULT_OUTPUT)
    begin_processes(arguments)
    explainer = load_explainer(arguments)
    rows, dataset = _rows(arguments, explainer)
    described = describe_explainer(explainer, arguments)
    for one in (described["explainer"], described["classifier"]):
        one["id"] = public_name(one["id"])
    names = {"dataset": dataset, "explainer": described["explainer"], "classifier": described["classifier"]}
    try:
        settings = MapSettings(
            top_k=arguments.top_k,
            quantisation=arguments.quantisation,
            map_size=arguments.map_size,
            precision=arguments.precision,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            shard_rows=arguments.shard_rows,
        )
        progress = False if arguments.quiet else None
        summary = explain_dataset(
            explainer, rows, settings, output, names=names, resume=arguments.resume, progress=progress
        )
    except torch.OutOfMemoryError as error:
        raise CommandError(
            f"memory ran out with --batch-size {arguments.batch_size}; give a smaller one and --resume, or --device "
            "cpu."
        ) from error
    except (MapsError, ValueError) as error:
        raise CommandError(sentence(error)) from error
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise CommandError(
            f"a reader of photographs was lost ({sentence(error)}); give fewer --workers, and --resume."
        ) from error
    except OSError as error:
        raise CommandError(
            f"maps cannot be written to {output}, or photographs not be read: {error.strerror or error}; mend it, and "
            "give --resume to go on."
        ) from error
    if not summary.is_main_process:
        return 0
    _write_card(summary, arguments)
    if not arguments.quiet:
        print(_answer(summary))
    if arguments.push:
        print(_push(summary, arguments))
    if summary.unreadable:
        print(
            f"{len(summary.unreadable)} of {summary.photographs} photographs have no map; "
            f"{output / 'unreadable.jsonl'} lists them:",
            file=sys.stderr,
        )
        for one in summary.unreadable[:5]:
            print(f"  row {one['row']}: {one['error']}", file=sys.stderr)
    return 1 if summary.unreadable else 0


def _rows(arguments: argparse.Namespace, explainer: AhaExplainer) -> tuple[ExplainedRows, dict[str, Any]]:
    """The photographs with the class asked about, and the names of the dataset for the record."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    from ..data import load_photographs
    from ..dataset_maps import ExplainedRows

    local = Path(arguments.dataset).is_dir()
    if not local and arguments.dataset.startswith((".", "/", "~")):
        raise CommandError(f"there is no folder {arguments.dataset!r} to read photographs from.")
    if arguments.quiet:
        datasets.disable_progress_bars()
    revision = None if local else _commit(arguments)
    try:
        with _offline(arguments.local_files_only):
            dataset, image_column = load_photographs(
                arguments.dataset,
                split=arguments.split,
                config_name=arguments.config,
                image_column=arguments.image_column,
                revision=revision,
            )
    except (OSError, ValueError, HfHubHTTPError, DatasetsError) as error:
        raise CommandError(f"the dataset cannot be used: {sentence(error)}") from error
    if arguments.top_k > 1 and arguments.target not in (None, PREDICTED):
        raise CommandError("give either --target or --top-k, not both.")
    if arguments.top_k > 1 and arguments.against is not None:
        raise CommandError("--against does not go with --top-k; give --target for another class than the predicted.")
    asked = _asked(arguments, explainer, dataset)
    try:
        rows = ExplainedRows(
            dataset,
            image_column,
            explainer.image_processor,
            limit=arguments.limit,
            id_column=arguments.id_column,
            folder=Path(arguments.dataset) if local else None,
            against=_against(arguments, explainer, asked.get("target")),
            **asked,
        )
    except ValueError as error:
        raise CommandError(sentence(error)) from error
    named = {"id": public_name(arguments.dataset), "config": arguments.config, "revision": revision}
    return rows, {**named, "split": arguments.split, "on_hub": not local}


def _commit(arguments: argparse.Namespace) -> str | None:
    """The commit of a dataset of the Hub, so that what is read and what is recorded are the same."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    from ..hub import hub_api

    if arguments.local_files_only:
        return arguments.dataset_revision
    try:
        return hub_api(None).dataset_info(arguments.dataset, revision=arguments.dataset_revision).sha
    except (HfHubHTTPError, HTTPError, OSError, ValueError):
        # Loading it tells why it is not to be had, or finds it in the cache.
        return arguments.dataset_revision


def _asked(arguments: argparse.Namespace, explainer: AhaExplainer, dataset: Any) -> dict[str, Any]:
    """The arguments of `ExplainedRows` that say which class is explained."""
    from ..benchmark.images import _only_class_column, match_classes

    if arguments.target != LABEL_COLUMN:
        if arguments.label_column is not None:
            raise CommandError(f"--label-column is for --target {LABEL_COLUMN}: give both, or none.")
        if arguments.target in (None, PREDICTED):
            return {}
        try:
            return {"target": explainer.class_index(arguments.target)}
        except ValueError as error:
            raise CommandError(sentence(error)) from error
    column = arguments.label_column or _only_class_column(dataset)
    if column is None:
        raise CommandError(
            "the dataset has no column of class labels, or several: name one of "
            f"{', '.join(dataset.column_names)} with --label-column."
        )
    names = getattr(dataset.features.get(column), "names", None)
    classes = list(range(explainer.config.num_labels))
    if names is not None:
        classes, _ = match_classes(names, explainer.class_index, explainer.config.num_labels)
        if classes is None:
            raise CommandError(
                f"none of the labels in the column {column!r} ({', '.join(names[:3])}, ...) is a class of the "
                "classifier; explain the predicted class instead."
            )
    return {"label_column": column, "classes": classes}


def _against(arguments: argparse.Namespace, explainer: AhaExplainer, target: int | None) -> int | None:
    """Index of the class that the target is compared with."""
    if arguments.against is None:
        return None
    try:
        against = explainer.class_index(arguments.against)
    except ValueError as error:
        raise CommandError(sentence(error)) from error
    if against == target:
        raise CommandError(f"--target and --against both name {explainer.config.id2label[target]}; give two classes.")
    return against


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Keep `datasets` and `huggingface_hub`, which read their settings on import, from the network."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    try:
        if wanted:
            datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _write_card(summary: MapsSummary, arguments: argparse.Namespace) -> None:
    from ..dataset_maps.card import write_maps_card

    try:
        write_maps_card(summary, repo_id=arguments.push, command=_command(arguments.words))
    except OSError as error:
        raise CommandError(
            f"the folder {summary.folder.folder} cannot be written: {error.strerror or error}."
        ) from error


def _push(summary: MapsSummary, arguments: argparse.Namespace) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    from ..dataset_maps import push_maps
    from ..hub import explain_hub_error

    try:
        return push_maps(summary.folder, arguments.push, private=arguments.private).commit_url
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        reason = explain_hub_error(error, arguments.push)
        raise CommandError(
            f"{sentence(ValueError(reason))} The maps are in {summary.folder.folder}; --resume --push tries again."
        ) from error


def _answer(summary: MapsSummary) -> str:
    kept = f"{summary.maps:,} maps of {summary.photographs:,} photographs, {summary.bytes / 1e6:.1f} MB"
    if not summary.explained:
        return f"{kept}; nothing was left to do -> {summary.folder.folder}"
    rate = summary.explained / max(summary.seconds, 1e-9)
    return f"{kept}; {summary.explained:,} explained now at {rate:.1f} a second -> {summary.folder.folder}"


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; give a height and a width as in 112x112, or one number"
        )
    return int(found[1]), int(found[2] or found[1])


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)
