"""`hf-aha explain PHOTO ...`: writes a picture, the raw scores and a record of every explanation."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from . import CommandError
from .loading import add_loading_arguments, describe_explainer, load_explainer


if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..modeling_aha import AhaExplainer

# In the order of writing: the record comes last, so that where it lies the other files are whole.
FORMATS = ("png", "npy", "json")
DEFAULT_FORMATS = ("png", "json")
LONGEST_NAME = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.add_argument("photographs", nargs="+", metavar="PHOTO", help="file, folder, glob pattern or http(s) URL")
    add_loading_arguments(parser)
    group = parser.add_argument_group("question")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--target",
        metavar="LABEL_OR_INDEX",
        help="the class to explain (default: the one the classifier predicts for each photograph)",
    )
    which.add_argument(
        "--top-k", type=_positive, default=1, metavar="N", help="explain the N most probable classes (default: 1)"
    )
    group.add_argument(
        "--against",
        metavar="LABEL_OR_INDEX",
        help="explain why the target rather than this class; without --target, why the most probable class other than "
        "this one",
    )
    group.add_argument(
        "--refine",
        type=_positive,
        default=0,
        metavar="N",
        help="improve each map by N steps on its own deletion and insertion curves; many more passes of the "
        "classifier (default: none)",
    )
    group.add_argument(
        "--adaptive",
        action="store_true",
        help="with --refine: spend the passes where they bring most, about half of them in all",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, default=Path("explanations"), metavar="DIR", help="folder (default: %(default)s)"
    )
    group.add_argument(
        "--format",
        dest="formats",
        action="extend",
        type=_formats,
        metavar="LIST",
        help="what to write: png (photograph, heatmap and overlay side by side), npy (float32 scores, NaN where the "
        "classifier does not look), json (what was used); repeat it or separate by commas "
        f"(default: {','.join(DEFAULT_FORMATS)})",
    )
    group.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="photographs a pass (default: 8)")
    group.add_argument("--quiet", action="store_true", help="print only errors")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Explain every readable photograph and name the others at the end.

    Returns:
        0, or 1 when a photograph could not be explained.

    Raises:
        CommandError: the explainer cannot be loaded, there is no such class, or the output cannot be written.
    """
    from tqdm import tqdm

    if arguments.adaptive and not arguments.refine:
        raise CommandError("--adaptive goes with --refine; give the number of steps, as in --refine 10 --adaptive.")
    output = arguments.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"the output folder {output} cannot be made: {error.strerror}.") from error
    sources, failures = _expand(arguments.photographs)
    if sources:
        explainer = load_explainer(arguments)
        record = {**describe_explainer(explainer, arguments), "versions": _versions()}
        target, against = _question(explainer, arguments)
        files = ExplanationFiles(
            output,
            [kind for kind in FORMATS if kind in (arguments.formats or DEFAULT_FORMATS)],
            record,
            name_class=target is not None or against is not None or arguments.top_k > 1,
            keep=[source for source in sources if isinstance(source, Path)],
        )
        # `disable=None` shows the bar on a terminal only.
        hidden = True if arguments.quiet or len(sources) == 1 else None
        with tqdm(total=len(sources), unit="photo", disable=hidden) as progress:
            for batch in _batches(sources, arguments.batch_size):
                found = _explain_batch(explainer, batch, target, against, arguments, failures)
                for source, explanations in found:
                    stem = files.stem(source)
                    for explanation in explanations:
                        line = _line(source, explanation, files.write(source, stem, explanation))
                        if not arguments.quiet:
                            tqdm.write(line, file=sys.stdout)
                progress.update(len(batch))
    if failures:
        print(f"{len(failures)} of {len({*sources, *failures})} inputs could not be explained:", file=sys.stderr)
        for reason in failures.values():
            print(f"  {reason}", file=sys.stderr)
    return 1 if failures else 0


class ExplanationFiles:
    """Names and writes the files of explanations; no two explanations of a run share a name.

    Args:
        output: an existing folder.
        formats: some of `FORMATS`, in that order.
        record: what every JSON record holds besides the explanation's own facts.
        name_class: put the class into the name, `photo.tench.png`, rather than `photo.png`.
        keep: photographs that must not be overwritten where they lie in `output` themselves.
    """

    def __init__(
        self, output: Path, formats: list[str], record: dict[str, Any], *, name_class: bool, keep: list[Path]
    ) -> None:
        self.output = output
        self.formats = formats
        self.record = record
        self.name_class = name_class
        self._stems: set[str] = set()
        self._names = {
            path.stem.casefold()
            for path in keep
            if path.suffix[1:].lower() in formats and path.resolve().parent == output.resolve()
        }

    def stem(self, source: Path | str) -> str:
        """A name for the files of one photograph that no other photograph of this run has."""
        if isinstance(source, Path):
            # The name of a file on this machine is a good name of a file already.
            wanted = source.stem
        else:
            wanted = _file_name(Path(urlsplit(source).path).stem) or "photograph"
        return _unused(wanted, self._stems)

    def write(self, source: Path | str, stem: str, explanation: Explanation) -> list[Path]:
        """Write the files of one explanation, each whole or not at all, and return their paths.

        Raises:
            CommandError: a file cannot be written.
        """
        from ..files import write_atomically

        if self.name_class:
            stem = f"{stem}.{_file_name(explanation.label) or f'class-{explanation.target}'}"
            if explanation.against is not None:
                other = _file_name(explanation.against_label) or f"class-{explanation.against}"
                stem = f"{stem}-rather-than-{other}"
        name = _unused(stem, self._names)
        paths = {kind: self.output / f"{name}.{kind}" for kind in self.formats}
        writers = {
            "png": lambda path: explanation.sheet().save(path, format="PNG"),
            "npy": lambda path: _write_scores(path, explanation),
            "json": lambda path: _write_json(path, self._describe(source, explanation, paths)),
        }
        for kind, path in paths.items():
            try:
                write_atomically(path, writers[kind])
            except OSError as error:
                raise CommandError(f"{path} cannot be written: {error.strerror or error}.") from error
        return list(paths.values())

    def _describe(self, source: Path | str, explanation: Explanation, paths: dict[str, Path]) -> dict[str, Any]:
        width, height = explanation.image.size
        return {
            "file": str(source),
            "image_size": {"width": width, "height": height},
            "label": explanation.label,
            "target": int(explanation.target),
            "probability": float(explanation.probability),
            **_against(explanation),
            "predicted_label": explanation.predicted_label,
            "predicted_probability": float(explanation.predicted_probability),
            **({} if explanation.refinement is None else {"refinement": explanation.refinement}),
            "written": [path.name for path in paths.values()],
            **self.record,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _expand(patterns: list[str]) -> tuple[list[Path | str], dict[Path | str, str]]:
    from ..images import ImageReadError, find_images

    sources: dict[Path | str, None] = {}
    failures: dict[Path | str, str] = {}
    for pattern in patterns:
        try:
            sources.update(dict.fromkeys(find_images([pattern])))
        except ImageReadError as error:
            failures[pattern] = str(error)
    return list(sources), failures


def _explain_batch(
    explainer: AhaExplainer,
    batch: list[Path | str],
    target: int | None,
    against: int | None,
    arguments: argparse.Namespace,
    failures: dict[Path | str, str],
) -> list[tuple[Path | str, list[Explanation]]]:
    import torch

    from ..images import ImageReadError, read_image

    images = {}
    for source in batch:
        try:
            images[source] = read_image(source)
        except ImageReadError as error:
            failures[source] = str(error)
    if not images:
        return []
    try:
        found = explainer.explain(
            list(images.values()),
            target,
            against=against,
            top_k=arguments.top_k,
            batch_size=arguments.batch_size,
            refine=arguments.refine,
            adaptive=arguments.adaptive,
        )
    except torch.OutOfMemoryError as error:
        raise CommandError(
            f"memory ran out with --batch-size {arguments.batch_size}; give a smaller one, or --device cpu."
        ) from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    return [
        (source, [result] if arguments.top_k == 1 else result) for source, result in zip(images, found, strict=True)
    ]


def _question(explainer: AhaExplainer, arguments: argparse.Namespace) -> tuple[int | None, int | None]:
    """Indices of the classes asked about and compared with."""
    try:
        target, against = (
            None if given is None else explainer.class_index(given) for given in (arguments.target, arguments.against)
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    if against is not None and target == against:
        raise CommandError(f"--target and --against both name {explainer.config.id2label[target]}; give two classes.")
    if against is not None and arguments.top_k > 1:
        raise CommandError("--against does not go with --top-k; give --target for another class than the predicted.")
    return target, against


def _against(explanation: Explanation) -> dict[str, Any]:
    if explanation.against is None:
        return {}
    return {
        "against": int(explanation.against),
        "against_label": explanation.against_label,
        "against_probability": float(explanation.against_probability),
    }


def _line(source: Path | str, explanation: Explanation, paths: list[Path]) -> str:
    name = source.name if isinstance(source, Path) else source
    answer = f"{explanation.label} {explanation.probability:.2f}"
    if explanation.against is not None:
        answer += f" rather than {explanation.against_label} {explanation.against_probability:.2f}"
    if explanation.label != explanation.predicted_label:
        answer += f" (predicted: {explanation.predicted_label} {explanation.predicted_probability:.2f})"
    if explanation.refinement is not None:
        answer += ", refined: insertion - deletion {initial_value:.3f} to {value:.3f} in {passes} passes".format(
            **explanation.refinement
        )
    return f"{name}: {answer} -> {paths[0]}"


def _write_scores(path: Path, explanation: Explanation) -> None:
    import numpy as np

    np.save(path, explanation.scores.astype(np.float32, copy=False), allow_pickle=False)


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from .. import __version__

    return {"hf_aha": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _batches(sources: list[Path | str], size: int) -> Iterator[list[Path | str]]:
    for start in range(0, len(sources), size):
        yield sources[start : start + size]


def _file_name(text: str) -> str:
    # Letters and digits of any script stay; dots and separators go, so no label can name another folder.
    return re.sub(r"[^\w-]+", "-", text).strip("-")[:LONGEST_NAME]


def _unused(wanted: str, taken: set[str]) -> str:
    # Without regard to case, as on the file systems of Windows and macOS.
    name, number = wanted, 1
    while name.casefold() in taken:
        number += 1
        name = f"{wanted}-{number}"
    taken.add(name.casefold())
    return name


def _formats(text: str) -> list[str]:
    kinds = [kind.strip().lower() for kind in text.split(",") if kind.strip()]
    for kind in kinds:
        if kind not in FORMATS:
            raise argparse.ArgumentTypeError(f"there is no format {kind!r}; choose from {', '.join(FORMATS)}")
    if not kinds:
        raise argparse.ArgumentTypeError(f"no format is named; choose from {', '.join(FORMATS)}")
    return kinds


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
