"""A study: rows that are runs of one recipe with different overrides, measured alike, each in a file of its own."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from recipe_runs import References, held_out, measure, plain_references, prepare_classifier, train

from hf_aha.data import Photographs
from hf_aha.files import write_atomically
from hf_aha.perturbation import Normalization


def as_words(settings: Mapping[str, object]) -> list[str]:
    """Settings of a recipe as words of its command line.

    Example:
        >>> as_words({"taps": [1, 5], "noise": 0.5})
        ['--taps', '1', '5', '--noise=0.5']
    """
    words: list[str] = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, (list, tuple)) else [f"--{name}={value}"]
    return words


def digest(*facts: object) -> str:
    """Sixteen hexadecimal digits of what must be the same for numbers to be compared."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """Runs of one recipe that are measured alike, a JSON file each: what is there already is not run again.

    Several processes may share a folder as long as they run different rows.

    Attributes:
        recipe: YAML file of recipes/train_explainer.py.
        common: settings of all runs, over the recipe's.
        classifier: a classifier, or the name of a bundled explainer that has one.
        dataset: photographs, folder or Hub id.
        split: measured on.
        eval_rows: photographs measured on.
        settings: REFERENCE/UNIT, see `measure`.
        output: folder of the rows and of runs on their way.
        words: more words of the recipe's command line, over `common`.
        references: makes the references of `settings`, from the photographs measured on.
    """

    recipe: Path
    common: Mapping[str, object]
    classifier: str
    dataset: str
    split: str
    eval_rows: int
    settings: Sequence[str]
    output: Path
    words: Sequence[str] = ()
    references: Callable[[Photographs, Normalization], References] = lambda *_: plain_references

    def row(self, name: str, overrides: Mapping[str, object]) -> dict[str, object] | None:
        """What the file of a row holds, or None where there is none.

        Raises:
            SystemExit: it was made with other settings.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["made_with"] != self._made_with(overrides):
            sys.exit(
                f"The row {name} in {self.output} was made with another recipe or other settings: remove rows/{name}"
                ".json there, or choose another --output."
            )
        return found

    def run(self, recipe: ModuleType, name: str, overrides: Mapping[str, object]) -> dict[str, object]:
        """Train and measure a row, write its file, and return what it holds.

        Raises:
            SystemExit: a setting is refused; a signal ended the run, with a checkpoint to go on from (code 0).
        """
        folder = self.output / "runs" / name
        words = [str(self.recipe), "--classifier", prepare_classifier(self.classifier, self.output / "classifiers")]
        words += ["--dataset", self.dataset, "--output_dir", str(folder), "--validation_split", ""]
        trained = train(recipe, [*words, *as_words(self.common), *self.words, *as_words(overrides)])
        explainer = trained.explainer
        photographs = held_out(explainer, self.dataset, self.split)
        normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
        references = self.references(photographs, normalization)
        rows = min(self.eval_rows, len(photographs))
        measured = measure(explainer, photographs, rows, self.settings, references=references)
        made = {
            "name": name,
            "made_with": self._made_with(overrides),
            "steps": explainer.config.training["steps"],
            "images_seen": explainer.config.training["images_seen"],
            "seconds_per_step": trained.seconds_per_step,
            "areas": {setting: [round(value, 5) for value in each] for setting, each in measured.areas.items()},
            "roughness": [None if math.isnan(value) else round(value, 5) for value in measured.roughness],
        }
        text = json.dumps(made) + "\n"
        write_atomically(self._path(name), lambda path: path.write_text(text, encoding="utf-8"))
        shutil.rmtree(folder, ignore_errors=True)
        return made

    def facts(self) -> dict[str, object]:
        """What a result file says of all runs; without folders of this machine."""
        return {
            "recipe": f"{self.recipe.parent.name}/{self.recipe.name}",
            "common": dict(self.common),
            "classifier": Path(self.classifier).name,
            "dataset": Path(self.dataset).name,
            "split": self.split,
            "eval_rows": self.eval_rows,
            "settings": list(self.settings),
        }

    def _path(self, name: str) -> Path:
        return self.output / "rows" / f"{name}.json"

    def _made_with(self, overrides: Mapping[str, object]) -> str:
        return digest(self.facts(), list(self.words), dict(overrides), self.recipe.read_text(encoding="utf-8"))


def add_study_arguments(parser: argparse.ArgumentParser, output: str, eval_rows: int = 64) -> None:
    """The options that every study of rows has."""
    parser.add_argument("--dataset", required=True, help="photographs: folder or Hub id")
    parser.add_argument(
        "--classifier", default="imagenette-demo", help="classifier, or bundled explainer (default: %(default)s)"
    )
    parser.add_argument("--split", default="validation", help="measured on (default: %(default)s)")
    parser.add_argument(
        "--eval-rows", type=int, default=eval_rows, help="photographs measured on (default: %(default)s)"
    )
    parser.add_argument("--rows", nargs="*", metavar="NAME", help="run these rows only (default: all)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="run every N-th of them, from the I-th on")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of the rows (default: %(default)s)")


def run_study(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    measure_rows: Callable[[argparse.Namespace, Sequence[str]], dict[str, object]],
    report: Callable[[argparse.Namespace], str],
) -> dict[str, object] | str:
    """Obey the command line of a study: words after `--` go to the recipe.

    Args:
        parser: with the commands `measure` and `report`.
        argv: words of the command line.
        measure_rows, report: what the commands do.
    """
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    if args.command == "report":
        return report(args)
    args.words = list(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    return measure_rows(args, argv)


def wanted(names: Sequence[str], chosen: Sequence[str] | None, shard: str) -> list[str]:
    """The names that this process runs, in their order.

    Raises:
        SystemExit: an unknown name, or no such shard.

    Example:
        >>> wanted(["a", "b", "c", "d"], ["d", "b", "a"], "0/2")
        ['a', 'd']
    """
    unknown = [name for name in chosen or () if name not in names]
    if unknown:
        sys.exit(f"There is no row {unknown[0]!r}; the rows are {', '.join(names)}.")
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        sys.exit(f"--shard must be I/N with I in 0..N-1, but it is {shard!r}.")
    return [name for name in names if chosen is None or name in chosen][int(part) :: int(parts)]
