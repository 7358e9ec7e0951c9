"""What `hf-aha evaluate` and `hf-aha benchmark` share: the images, the numbers asked for, and the run itself."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import CommandError
from .loading import DTYPES, _find_device, _first_line


if TYPE_CHECKING:
    from ..benchmark import BenchmarkResults, Entry, ObjectColumn
    from ..metrics import Protocol
    from ..modeling_aha import AhaExplainer


def add_running_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--local-files-only`, `--device` and `--dtype`."""
    group = parser.add_argument_group("model")
    group.add_argument("--local-files-only", action="store_true", help="use only files that are here; no network")
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: cuda if there is one, else cpu)"
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the classifier on perturbed images; auto takes bfloat16 where the machine has units for it "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--method-precision",
        choices=("auto", "float32", "bfloat16"),
        default="float32",
        help="of the passes that the methods themselves make, forward and backward (default: %(default)s)",
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the classifier for the perturbed images: sooner on many"
    )


def add_measuring_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the arguments of the images, of the metrics and of the output."""
    group = parser.add_argument_group("images")
    group.add_argument("--dataset", metavar="ID_OR_DIR", required=True, help="dataset of the Hub, or a folder")
    group.add_argument("--config", metavar="NAME", help="configuration of the dataset")
    group.add_argument("--dataset-revision", metavar="REV", help="commit, tag or branch of the dataset")
    group.add_argument("--split", default="validation", help="(default: %(default)s)")
    group.add_argument("--image-column", metavar="NAME", help="found by its type when left out")
    group.add_argument("--label-column", metavar="NAME", help="ground truth; found by its type when left out")
    group.add_argument("--mask-column", metavar="NAME", help="masks of the objects, for the metric localization")
    group.add_argument("--box-column", metavar="NAME", help="boxes instead: a list a photograph, or objects with bbox")
    group.add_argument(
        "--box-format",
        choices=("xyxy", "xywh"),
        help="of the boxes: left, top, right, bottom, or left, top, width, height, in pixels of the photograph",
    )
    group.add_argument("--images", type=_positive, metavar="N", help="how many, in random order (default: all)")
    group.add_argument("--skip", type=_count, default=0, metavar="N", help="leave out this many first (default: 0)")
    group.add_argument("--seed", type=_count, default=0, metavar="N", help="of the order of the images (default: 0)")
    group = parser.add_argument_group("numbers")
    group.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="NAME[:N]",
        help="metrics that no map was optimised for, or all; road:100 measures one on the first 100 images only "
        "(default: none)",
    )
    group.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images at a time (default: 8)")
    group.add_argument(
        "--max-batch", type=_positive, metavar="N", help="perturbed images in a pass (default: 10 on a CPU, else 128)"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help="(default: %(default)s)")
    group.add_argument("--resume", action="store_true", help="go on with what the folder holds")
    group.add_argument("--examples", type=_count, default=4, metavar="N", help="maps to draw (default: 4)")
    group.add_argument("--quiet", action="store_true", help="print only errors")


def find_protocols(
    names: Sequence[str], explainer: AhaExplainer, has_labels: bool
) -> tuple[list[Protocol], list[str]]:
    """The protocols of these names for this classifier's input, and notes on what `all` leaves out.

    Raises:
        CommandError: there is no such protocol (the message lists them), or one needs labels that are not there.
    """
    from ..metrics import get_protocol, protocol_names

    sizes = {"image_size": tuple(explainer.config.image_size), "patch_size": tuple(explainer.config.patch_size)}
    wanted = protocol_names() if "all" in names else names
    try:
        found = {protocol.name: protocol for name in wanted for protocol in get_protocol(name, **sizes)}
    except ValueError as error:
        raise CommandError(sentence(error)) from error
    needing = [one.name for one in found.values() if one.class_source == "label" or one.image_filter == "mda"]
    notes = []
    if needing and not has_labels:
        if "all" not in names:
            raise CommandError(
                f"the protocol {needing[0]!r} needs the ground truth, but the dataset has no labels that the "
                "classifier knows; name their column with --label-column, or choose another protocol."
            )
        notes.append(f"Not measured, for want of labels: {', '.join(needing)}.")
    return [one for one in found.values() if has_labels or one.name not in needing], notes


def find_metrics(words: Sequence[str], has_masks: bool = False) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """The metrics of these names, those that see the first images only, and notes on what `all` leaves out.

    Args:
        words: names of metrics, or `all`; each with a number of images behind a colon, or without.
        has_masks: a column with masks or boxes of the objects is named.

    Raises:
        CommandError: there is no such metric (the message lists them), it is named twice or its number is none, it
            needs masks of the objects and there are none, or there are masks and no metric of these needs them.
    """
    from ..benchmark.counts import counts_of
    from ..metrics.unoptimised import UNOPTIMISED, get_unoptimised

    try:
        counts = counts_of(words, "metric", "road:100")
    except ValueError as error:
        raise CommandError(sentence(error)) from error
    names = list(counts)
    masked = [name for name, metric in UNOPTIMISED.items() if metric.needs_masks]
    if has_masks:
        if not {"all", *masked} & set(names):
            raise CommandError(
                f"--mask-column and --box-column are for the metric {masked[0]}: name it with --metrics, or leave "
                "them out."
            )
        masked = []
    if "all" in names:
        found = {name: metric for name, metric in UNOPTIMISED.items() if name not in masked}
        left_out = [f"Not measured, for want of masks of the objects: {', '.join(masked)}."] if masked else []
        first = {name: counts.get(name, counts["all"]) for name in found}
        return found, {name: count for name, count in first.items() if count is not None}, left_out
    for name in names:
        if name in masked:
            raise CommandError(
                f"the metric {name!r} needs masks of the objects: name their column with --mask-column, or one of "
                "boxes with --box-column."
            )
    try:
        found = {name: get_unoptimised(name) for name in names}
    except ValueError as error:
        raise CommandError(sentence(error)) from error
    return found, {name: count for name, count in counts.items() if count is not None}, []


def _find_objects(arguments: argparse.Namespace) -> ObjectColumn | None:
    """The column that says where the objects are; None where none is named."""
    from ..benchmark import ObjectColumn

    masks, boxes, box_format = arguments.mask_column, arguments.box_column, arguments.box_format
    if masks is not None and boxes is not None:
        raise CommandError("give either --mask-column or --box-column, not both.")
    if (boxes is None) != (box_format is None):
        raise CommandError("--box-column and --box-format (xyxy or xywh) belong together: give both, or none.")
    return None if masks is None and boxes is None else ObjectColumn(masks or boxes, box_format)


def begin_processes(arguments: argparse.Namespace) -> None:
    """Join the other processes, if there are any, before a device is chosen; check the device."""
    from ..benchmark import processes

    processes(_find_device(arguments.device).type)


def run_measurement(
    arguments: argparse.Namespace,
    explainer: AhaExplainer,
    entries: Sequence[Entry],
    protocol_words: Sequence[str],
    classifier_name: str | None,
    classifier_revision: str | None,
) -> int:
    """Measure, write the report, and print the tables.

    Args:
        arguments: of `add_measuring_arguments` and `add_running_arguments`.
        explainer: gives the classifier, its image processor and its classes; need not be trained.
        entries: the methods.
        protocol_words: names of protocols, or `all`.
        classifier_name, classifier_revision: for the record.

    Returns:
        0, or 1 when an image could not be read or a map could not be used.

    Raises:
        CommandError: what is asked for does not exist, or the run cannot go on.
    """
    import torch

    from ..benchmark import (
        BenchmarkError,
        BenchmarkSettings,
        collect,
        measure,
        processes,
        select_images,
        write_examples,
        write_report,
    )
    from ..benchmark.runner import run_identity
    from ..metrics import ResultContext
    from ..metrics.passes import TargetPasses
    from ..perturbation import Normalization, perturbed_batch_size

    objects = _find_objects(arguments)
    metrics, metric_images, unmasked = find_metrics(arguments.metrics, objects is not None)
    find_protocols(protocol_words, explainer, has_labels=True)  # a wrong name is said before anything is loaded
    images, facts, notes = _told(
        lambda: select_images(
            arguments.dataset,
            explainer.image_processor,
            explainer.class_index,
            explainer.config.num_labels,
            split=arguments.split,
            images=arguments.images,
            skip=arguments.skip,
            seed=arguments.seed,
            config_name=arguments.config,
            revision=arguments.dataset_revision,
            image_column=arguments.image_column,
            label_column=arguments.label_column,
            objects=objects,
        )
    )
    protocols, more = find_protocols(protocol_words, explainer, images.has_labels)
    fingerprint = explainer.classifier.fingerprint()
    context = ResultContext(
        classifier=public_name(classifier_name),
        classifier_revision=classifier_revision,
        classifier_fingerprint=tuple(fingerprint),
        processor=_processor_settings(explainer),
        **facts,
    )
    normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
    max_batch = arguments.max_batch or perturbed_batch_size(explainer.device)
    try:
        settings = BenchmarkSettings(
            entries=entries,
            protocols=protocols,
            metrics=metrics,
            metric_images=metric_images,
            context=context,
            normalization=normalization,
            batch_size=arguments.batch_size,
            max_batch=max_batch,
            precision=arguments.precision,
            compiled=arguments.compile,
            method_precision=arguments.method_precision,
            seed=arguments.seed,
            examples=arguments.examples,
        )
        progress = False if arguments.quiet else None
        store = measure(
            explainer.classifier, images, settings, arguments.output, resume=arguments.resume, progress=progress
        )
    except torch.OutOfMemoryError as error:
        raise CommandError(
            f"memory ran out with --max-batch {max_batch}; give a smaller one and --resume, or --device cpu."
        ) from error
    except (BenchmarkError, ValueError) as error:
        raise CommandError(sentence(error)) from error
    except OSError as error:
        raise CommandError(f"the folder {arguments.output} cannot be written: {error.strerror or error}.") from error
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = _first_line(getattr(error, "inner_exception", error))
        raise CommandError(
            f"the classifier cannot be compiled here ({reason}); leave out --compile, or install what the "
            "compiler of torch needs, such as g++."
        ) from error
    if not processes(explainer.device.type).is_main_process:
        return 0
    identity = run_identity(
        settings, TargetPasses(explainer.classifier, arguments.precision, arguments.compile), objects
    )
    grid = explainer.classifier.grid(*explainer.config.image_size)
    passes = {entry.name: tuple(entry.method.passes(grid, explainer.classifier.hidden_size)) for entry in entries}
    run = {
        **identity,
        "machine": _machine(explainer.device),
        "command": _command(arguments.words),
        "notes": [*_trained_on(entries), *notes, *more, *unmasked],
    }
    id2label = explainer.classifier.id2label
    try:
        results = collect(store, settings, len(images), passes, run, tuple(explainer.config.image_size))
        results.save(arguments.output)
        written = write_report(results, id2label, arguments.output)
        sheet = write_examples(results, images, settings, store, id2label)
    except BenchmarkError as error:
        raise CommandError(sentence(error)) from error
    except OSError as error:
        raise CommandError(f"the folder {arguments.output} cannot be written: {error.strerror or error}.") from error
    return _answer(results, [*written, *([sheet] if sheet else [])], arguments.quiet)


def _trained_on(entries: Sequence[Entry]) -> list[str]:
    """What the explainers were optimised for, which makes some of the numbers no independent test."""
    notes = []
    for entry in entries:
        explainer = getattr(entry.method, "explainer", None)
        training = None if explainer is None else explainer.config.training
        settings = (training or {}).get("arguments", {})
        references = settings.get("references")
        if references:
            notes.append(
                f"{entry.method.title} was trained on deletion and insertion with the references "
                f"{' and '.join(references)}, so such curves measure what it was trained for."
            )
        if settings.get("pointing_weight"):
            notes.append(
                f"{entry.method.title} was trained to point into its class's photograph of a mosaic, so grid_pointing "
                "is no independent test of it."
            )
    return notes


def _answer(results: BenchmarkResults, written: Sequence[Path], quiet: bool) -> int:
    if not quiet:
        print(written[0].read_text(encoding="utf-8"))
        print("\n".join(f"-> {path}" for path in written))
    bad = {image for record in results.methods for image, _ in record.failed} | set(results.unreadable)
    if bad:
        print(
            f"{len(bad)} of {len(results.images)} images could not be read, or a method gave no usable map for them; "
            "the tables say which.",
            file=sys.stderr,
        )
    return 1 if bad else 0


def _told(action: Callable[[], Any]) -> Any:
    """Run what reads a dataset; its errors become one sentence."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return action()
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CommandError(f"the dataset cannot be used: {sentence(error)}") from error


def sentence(error: Exception) -> str:
    """The first line of an error, to stand after the name of the command.

    Example:
        >>> sentence(ValueError("There is no image."))
        'there is no image.'
    """
    line = _first_line(error)
    return f"{line[:1].lower()}{line[1:]}"


def public_name(name: str | None) -> str | None:
    """The name of a model without the folders of this machine.

    Example:
        >>> public_name("google/vit-base-patch16-224")
        'google/vit-base-patch16-224'
    """
    return Path(name).resolve().name if name is not None and Path(name).is_dir() else name


def _processor_settings(explainer: AhaExplainer) -> dict[str, Any]:
    kept = ("do_", "size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor")
    settings = explainer.image_processor.to_dict()
    return {key: value for key, value in sorted(settings.items()) if key.startswith(kept) and value is not None}


def _machine(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {os.environ.get('WORLD_SIZE', '1')} process(es)"
    return (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s) a process, "
        f"{os.environ.get('WORLD_SIZE', '1')} process(es)"
    )


def _command(words: Sequence[str]) -> str:
    """The command as another machine would run it: folders of this one by their last name."""
    kept = [word for word in words if word not in ("--resume", "--debug", "--quiet")]
    return shlex.join(["hf-aha", *(Path(word).name if Path(word).is_absolute() else word for word in kept)])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)
