"""What each choice of the training is worth: runs of equal budget that differ in one setting each.

    python benchmarks/ablation.py measure --dataset DIR_OR_ID --threads 1 --output runs/ablation \
        --results benchmarks/results/ablation.json
    python benchmarks/ablation.py report benchmarks/results/ablation.json --output docs/ablation.md

The rows stand in ablation.yaml, each with the settings in which it differs from the recipe. Every row sees as many
training crops, but for those that say otherwise; what a step costs is told beside it, so that rows can be compared at
equal time as well. Decoders start from scratch.

The quality is insertion minus deletion area of the predicted class with eleven points a curve, the mean over blurred
and mean reference, pixels and patch cells, on the first rows of the validation split shuffled with seed 0. Differences
are paired over these photographs, with a 95 % bootstrap interval; what another seed does is told beside them, because
the interval does not know it.

Rows run in the order of their priority. Those that --output holds are not run again, a row that was interrupted goes
on from its last checkpoint, and --results is written after every row, with the names of those that are missing. Two
processes share the work with --shard 0/2 and --shard 1/2, or with --rows. Words after `--` go to the recipe, before a
row's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import torch
import yaml
from measuring import find_device, provenance, provenance_line, write_json
from recipe_runs import RECIPES, SETTINGS, interval, recipe_script, shown
from studies import Study, add_study_arguments, run_study, wanted

from hf_aha.files import write_atomically


ROWS_FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Row:
    """A run of the table.

    Attributes:
        name: of its file and its line.
        why: what it is there to tell, one line.
        overrides: in which settings it differs from the first row.
        against: the row that the difference is taken to; the first one where it is None.
        repeats: the first row with another seed.
        priority: lower ones run first; rows of the same one in the order of the file.
    """

    name: str
    why: str
    overrides: Mapping[str, object] = field(default_factory=dict)
    against: str | None = None
    repeats: bool = False
    priority: int = 1


@dataclass(frozen=True)
class Group:
    """Rows of one subject, and what was decided by them."""

    title: str
    rows: tuple[Row, ...]
    decided: str | None = None


@dataclass(frozen=True)
class Plan:
    """A file of rows."""

    recipe: Path
    common: Mapping[str, object]
    groups: tuple[Group, ...]

    @property
    def rows(self) -> list[Row]:
        """All rows as they stand in the file; the first one is the default."""
        return [row for group in self.groups for row in group.rows]

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a file of rows.

        Raises:
            SystemExit: it has an unknown key, a name twice, or a difference to a row that there is not.
        """
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        try:
            groups = tuple(
                Group(**{**group, "rows": tuple(Row(**row) for row in group["rows"])}) for group in content["groups"]
            )
            plan = cls(RECIPES / content["recipe"], content["common"], groups)
        except (KeyError, TypeError) as error:
            sys.exit(f"{path.name} is no file of rows ({error}); ablation.yaml shows what one looks like.")
        names = [row.name for row in plan.rows]
        for name in names:
            if names.count(name) > 1:
                sys.exit(f"{path.name} has the row {name} {names.count(name)} times; give each a name of its own.")
        for row in plan.rows:
            if row.against is not None and row.against not in names:
                sys.exit(f"The row {row.name} of {path.name} is taken against {row.against!r}, but there is none.")
        return plan


def summarise(plan: Plan, found: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """The lines of the table from the rows that are there, how far seeds lie apart, and what is missing."""
    first = plan.rows[0].name
    areas = {name: torch.tensor(list(each["areas"].values())) for name, each in found.items()}
    lines = []
    for row in plan.rows:
        if row.name not in found:
            continue
        made, control = found[row.name], row.against or first
        line = {**asdict(row), "against": control}
        line |= {name: made[name] for name in ("steps", "images_seen", "seconds_per_step")}
        settings = list(made["areas"])
        line["quality"] = _by_setting(settings, areas[row.name])
        line["minus"] = None
        if control in areas and control != row.name:
            line["minus"] = _by_setting(settings, areas[row.name] - areas[control])
        line["roughness"] = interval(made["roughness"])
        lines.append(line)
    seeds = [
        areas[row.name].mean().item() for row in plan.rows if row.name in found and (row.repeats or row.name == first)
    ]
    spread = max((abs(one - other) for one, other in combinations(seeds, 2)), default=None)
    missing = [{"name": row.name, "why": row.why} for row in plan.rows if row.name not in found]
    return {"runs_of_the_default": len(seeds), "seed_spread": spread, "rows": lines, "missing": missing}


def _by_setting(settings: Sequence[str], values: torch.Tensor) -> dict[str, object]:
    """Intervals of (settings, images) values, and of their mean over the settings."""
    each = {setting: interval(of_one) for setting, of_one in zip(settings, values, strict=True)}
    return {"mean": interval(values.mean(0)), **each}


def reads_as(line: Mapping[str, object], spread: float | None) -> str:
    """What the difference of a row says, in a word or two."""
    minus = line["minus"] and line["minus"]["mean"]
    if not minus or minus["low"] is None:
        return "-"
    if minus["low"] <= 0 <= minus["high"]:
        return "no difference seen"
    word = "better" if minus["mean"] > 0 else "worse"
    if spread is None or abs(minus["mean"]) > spread:
        return f"**{word}**"
    return f"{word}, within what a seed does"


def measure_rows(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, object]:
    """Run what is missing, writing the results after each row, and return what they hold."""
    plan = Plan.read(args.rows_file)
    study = Study(
        plan.recipe,
        plan.common,
        args.classifier,
        args.dataset,
        args.split,
        args.eval_rows,
        SETTINGS,
        args.output,
        args.words,
    )
    by_name = {row.name: row for row in sorted(plan.rows, key=lambda row: row.priority)}
    in_reach = [name for name, row in by_name.items() if args.priority is None or row.priority <= args.priority]
    names = wanted(in_reach, args.rows, args.shard)
    recipe = recipe_script()

    def collect() -> dict[str, object]:
        # Other processes may have made rows meanwhile.
        rows = {name: study.row(name, row.overrides) for name, row in by_name.items()}
        found = {name: row for name, row in rows.items() if row is not None}
        result = {**provenance(__file__, argv, find_device("cpu")), **study.facts()}
        result |= {"words": list(args.words), **summarise(plan, found)}
        write_json(args.results, result)
        return result

    result = collect()
    for name in names:
        if study.row(name, by_name[name].overrides) is None:
            study.run(recipe, name, by_name[name].overrides)
            result = collect()
    print(page(result, plan))
    return result


INTRODUCTION = """# What each choice is worth

Every line is one training of an explainer from scratch that differs from the first in the settings named, and in
nothing else. What decided a default stands under its group; rows that lost stay here. `report` of
`benchmarks/ablation.py` wrote this page from `benchmarks/results/ablation.json`; the rows stand in
`benchmarks/ablation.yaml`.

How to read it: the numbers are areas, insertion minus deletion, larger is better, on photographs that were not trained
on; in brackets 95 % bootstrap intervals over the photographs. *Difference* is paired over the photographs, to the
default or to the run named. *Roughness* is the total variation of the rank map, 1 for pixel noise: lower is more
legible. *Core s* are seconds of one core a step, without decoding: rows that cost twice as much would see half of the
crops in equal time. These are short runs, so a choice that pays off late cannot show here."""


def page(result: Mapping[str, object], plan: Plan) -> str:
    """The results as a page of Markdown."""
    done, missing = result["rows"], result["missing"]
    parts = [INTRODUCTION, _setup(result)]
    by_name = {line["name"]: line for line in done}
    for group in plan.groups:
        lines = [by_name[row.name] for row in group.rows if row.name in by_name]
        if not lines:
            continue
        parts.append(f"## {group.title}")
        parts.append("\n".join([*_head(result["settings"]), *(_line(line, result) for line in lines)]))
        if group.decided:
            parts.append(group.decided)
    if missing:
        parts.append("## Not measured")
        parts.append("\n".join(f"- `{row['name']}`: {row['why']}" for row in missing))
    if done:
        parts.append(provenance_line(result))
    return "\n\n".join(parts) + "\n"


def _setup(result: Mapping[str, object]) -> str:
    settings = ", ".join(f"`{name}: {value}`" for name, value in result["common"].items())
    text = (
        f"Recipe `recipes/{result['recipe']}` with {settings}; target model {result['classifier']}; "
        f"{result['eval_rows']} photographs of the {result['split']} split of {result['dataset']}."
    )
    if not result["rows"]:
        return f"{text}\n\nNo run has been measured yet."
    if result["seed_spread"] is None:
        return f"{text} What another seed does has not been measured."
    return (
        f"{text} {result['runs_of_the_default']} runs of the default that differ in their seed alone lie up to "
        f"{result['seed_spread']:.3f} apart: smaller differences are not to be read, whatever their interval."
    )


def _head(settings: Sequence[str]) -> list[str]:
    names = ["run", "mean of all", "difference", *settings, "roughness", "crops", "core s", "reads as"]
    return [f"| {' | '.join(names)} |", f"|---|---|---|{'---|' * len(settings)}---|---:|---:|---|"]


def _line(line: Mapping[str, object], result: Mapping[str, object]) -> str:
    changed = ", ".join(f"{name}: {value}" for name, value in line["overrides"].items())
    what = f"**{line['name']}**, {line['why']}" + (f" (`{changed}`)" if changed else "")
    minus = "-" if line["minus"] is None else shown(line["minus"]["mean"], "+")
    if line["minus"] is not None and line["against"] != result["rows"][0]["name"]:
        minus += f" to {line['against']}"
    quality, seconds = line["quality"], line["seconds_per_step"]
    cells = [what, shown(quality["mean"]), minus]
    cells += [f"{quality[setting]['mean']:.3f}" for setting in result["settings"]]
    cells += ["-" if line["roughness"]["mean"] is None else f"{line['roughness']['mean']:.3f}"]
    cells += [f"{line['images_seen']:,}", "-" if seconds is None else f"{seconds:.2f}"]
    return f"| {' | '.join([*cells, reads_as(line, result['seed_spread'])])} |"


def report(args: argparse.Namespace) -> str:
    """Write the page from a file of results, and return it."""
    result = json.loads(args.results.read_text(encoding="utf-8"))
    text = page(result, Plan.read(args.rows_file))
    write_atomically(args.output, lambda path: path.write_text(text, encoding="utf-8"))
    return text


def main(argv: Sequence[str] | None = None) -> dict[str, object] | str:
    """Measure and return the results, or report and return the page."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("measure")
    add_study_arguments(one, "runs/ablation")
    one.add_argument("--priority", type=int, metavar="N", help="leave out the rows of a later priority than N")
    one.add_argument("--results", type=Path, default=Path("benchmarks/results/ablation.json"))
    two = commands.add_parser("report")
    two.add_argument("results", type=Path)
    two.add_argument("--output", type=Path, required=True, help="page to write")
    for command in (one, two):
        command.add_argument("--rows-file", type=Path, default=ROWS_FILE, help="(default: ablation.yaml beside it)")
    return run_study(parser, argv, measure_rows, report)


if __name__ == "__main__":
    main()
