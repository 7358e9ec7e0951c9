"""One explainer for any reference? Explainers trained on each reference alone and on a mixture, tested on all of them.

    python benchmarks/reference_matrix.py measure --dataset DIR_OR_ID --threads 1 --output runs/references \
        --results benchmarks/results/reference_matrix.json
    python benchmarks/reference_matrix.py report benchmarks/results/reference_matrix.json \
        --output docs/references.md --figure docs/images/reference-matrix.png

The runs are those of ablation.yaml, of the same budget, with other references: black, mean, blur or noise alone, all
four mixed, and the recipe's own. Each is tested on the four and on one that none was trained on: another photograph,
the next one of the shuffled split, so that a removed pixel shows something real but unrelated.

The quality is insertion minus deletion area of the predicted class with eleven points a curve, the mean over pixels
and patch cells, with a 95 % bootstrap interval over photographs; differences to the mixture are paired. Rows,
interruptions, --rows and --shard are as in ablation.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from ablation import ROWS_FILE, Plan
from measuring import find_device, provenance, provenance_line, write_json
from recipe_runs import References, interval, plain_references, recipe_script, shown
from studies import Study, add_study_arguments, run_study, wanted

from hf_aha.data import Photographs, collate
from hf_aha.files import write_atomically
from hf_aha.perturbation import REFERENCES, Normalization


MIXTURE = "mixture"
OTHER = "another photograph"
# The most wanted first.
TRAINED_ON: Mapping[str, Mapping[str, object]] = {
    MIXTURE: {"references": list(REFERENCES)},
    **{kind: {"references": [kind]} for kind in REFERENCES},
    "recipe": {},
}
TESTED_ON = (*REFERENCES, OTHER)
UNITS = ("pixel", "cell")


def references_with_photographs(photographs: Photographs, normalization: Normalization) -> References:
    """`plain_references`, and the next photograph as the kind `another photograph`."""

    def references(kind: str, rgb: torch.Tensor, rows: range) -> torch.Tensor:
        if kind != OTHER:
            return plain_references(kind, rgb, rows)
        following = collate([photographs[(row + 1) % len(photographs)] for row in rows])
        return normalization.denormalize(following.pixel_values.to(rgb))

    return references


def summarise(found: Mapping[str, Mapping[str, object]]) -> list[dict[str, object]]:
    """A line an explainer: what it is worth on each reference, and less what the mixture is worth there."""

    def values(name: str, kind: str) -> torch.Tensor:
        return torch.tensor([found[name]["areas"][f"{kind}/{unit}"] for unit in UNITS]).mean(0)

    lines = []
    for name in TRAINED_ON:
        if name not in found:
            continue
        line: dict[str, object] = {"trained_on": name, "images_seen": found[name]["images_seen"]}
        line["quality"] = {kind: interval(values(name, kind)) for kind in TESTED_ON}
        line["minus_mixture"] = None
        if name != MIXTURE and MIXTURE in found:
            line["minus_mixture"] = {kind: interval(values(name, kind) - values(MIXTURE, kind)) for kind in TESTED_ON}
        line["roughness"] = interval(found[name]["roughness"])
        lines.append(line)
    return lines


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
        [f"{kind}/{unit}" for kind in TESTED_ON for unit in UNITS],
        args.output,
        args.words,
        references_with_photographs,
    )
    names = wanted(list(TRAINED_ON), args.rows, args.shard)
    recipe = recipe_script()

    def collect() -> dict[str, object]:
        # Other processes may have made rows meanwhile.
        rows = {name: study.row(name, overrides) for name, overrides in TRAINED_ON.items()}
        result = {**provenance(__file__, argv, find_device("cpu")), **study.facts(), "words": list(args.words)}
        result["rows"] = summarise({name: row for name, row in rows.items() if row is not None})
        result["missing"] = [name for name, row in rows.items() if row is None]
        write_json(args.results, result)
        return result

    result = collect()
    for name in names:
        if study.row(name, TRAINED_ON[name]) is None:
            study.run(recipe, name, TRAINED_ON[name])
            result = collect()
    print(page(result, None))
    return result


def draw(result: Mapping[str, object], path: Path) -> None:
    """The matrix as a heat-map, the best of each column framed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    lines = result["rows"]
    means = torch.tensor([[line["quality"][kind]["mean"] for kind in TESTED_ON] for line in lines])
    figure = Figure(figsize=(1.35 * len(TESTED_ON) + 2.2, 0.62 * len(lines) + 1.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(means.numpy(), cmap="viridis", aspect="auto")
    middle = (means.min() + means.max()) / 2
    for y, line in enumerate(lines):
        for x, kind in enumerate(TESTED_ON):
            entry = line["quality"][kind]
            text = f"{entry['mean']:.2f}"
            if entry["low"] is not None:
                text += f"\n[{entry['low']:.2f}, {entry['high']:.2f}]"
            colour = "black" if means[y, x] > middle else "white"
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=8)
    for x, y in enumerate(means.argmax(0).tolist()):
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor="#d95f02", linewidth=2.5))
    axes.set_xticks(range(len(TESTED_ON)), [kind.replace(" ", "\n") for kind in TESTED_ON])
    axes.set_yticks(range(len(lines)), [_trained_on(line["trained_on"]) for line in lines])
    axes.set_xlabel("tested on (the last one was in no training)")
    axes.set_ylabel("trained on")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="insertion - deletion")
    write_atomically(path, lambda file: figure.savefig(file, dpi=130))


INTRODUCTION = """# One explainer for any reference

What a removed pixel becomes is a choice, and a map that is faithful under one choice need not be under another. Here
explainers of equal budget are trained on each reference alone and on all four mixed, and each is tested on every one
of them and on one that no explainer was trained on: another photograph, of which the removed pixels show a part.
`report` of `benchmarks/reference_matrix.py` wrote this page from `benchmarks/results/reference_matrix.json`.

The numbers are areas, insertion minus deletion, the mean over pixels and patch cells, larger is better; in brackets 95
% bootstrap intervals over the photographs. They can be compared within a column, where everything but the explainer is
the same. One seed each: [the ablation](ablation.md) tells how far two seeds lie apart."""


def page(result: Mapping[str, object], figure: str | None) -> str:
    """The results as a page of Markdown.

    Args:
        result: of `measure_rows`.
        figure: link of the heat-map, where there is one.
    """
    settings = ", ".join(f"`{name}: {value}`" for name, value in result["common"].items())
    parts = [
        INTRODUCTION,
        f"Recipe `recipes/{result['recipe']}` with {settings}; target model {result['classifier']}; "
        f"{result['eval_rows']} photographs of the {result['split']} split of {result['dataset']}.",
    ]
    lines = result["rows"]
    if not lines:
        return "\n\n".join([*parts, "No run has been measured yet."]) + "\n"
    if figure is not None:
        parts.append(f"![Trained on against tested on, as a heat-map; the best of each column is framed]({figure})")
    head = [f"| trained on | {' | '.join(TESTED_ON)} | roughness |", f"|---|{'---|' * len(TESTED_ON)}---|"]
    table = [
        _line(line, line["quality"], ["-" if (rough := line["roughness"]["mean"]) is None else f"{rough:.3f}"])
        for line in lines
    ]
    parts.append("\n".join([*head, *table]))
    differences = [_line(line, line["minus_mixture"], [], "+") for line in lines if line["minus_mixture"] is not None]
    if differences:
        head = [f"| trained on | {' | '.join(TESTED_ON)} |", f"|---|{'---|' * len(TESTED_ON)}"]
        parts += ["## Less what the mixture is worth there, paired", "\n".join([*head, *differences])]
    if result["missing"]:
        parts.append(f"Not measured: {', '.join(_trained_on(name) for name in result['missing'])}.")
    return "\n\n".join([*parts, provenance_line(result)]) + "\n"


def _trained_on(name: str) -> str:
    return {MIXTURE: "all four mixed", "recipe": "blur and mean (the recipe)"}.get(name, name)


def _line(line: Mapping[str, object], entries: Mapping[str, object], more: Sequence[str], sign: str = "") -> str:
    cells = [_trained_on(line["trained_on"]), *(shown(entries[kind], sign) for kind in TESTED_ON), *more]
    return f"| {' | '.join(cells)} |"


def report(args: argparse.Namespace) -> str:
    """Write the page and the figure from a file of results, and return the page."""
    result = json.loads(args.results.read_text(encoding="utf-8"))
    link = None
    if args.figure is not None and result["rows"]:
        draw(result, args.figure)
        link = Path(args.figure).resolve().relative_to(args.output.resolve().parent).as_posix()
    text = page(result, link)
    write_atomically(args.output, lambda path: path.write_text(text, encoding="utf-8"))
    return text


def main(argv: Sequence[str] | None = None) -> dict[str, object] | str:
    """Measure and return the results, or report and return the page."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("measure")
    add_study_arguments(one, "runs/references", eval_rows=48)
    one.add_argument("--rows-file", type=Path, default=ROWS_FILE, help="recipe and common settings: ablation.yaml")
    one.add_argument("--results", type=Path, default=Path("benchmarks/results/reference_matrix.json"))
    two = commands.add_parser("report")
    two.add_argument("results", type=Path)
    two.add_argument("--output", type=Path, required=True, help="page to write")
    two.add_argument("--figure", type=Path, help="heat-map to write, in a folder of the page's")
    return run_study(parser, argv, measure_rows, report)


if __name__ == "__main__":
    main()
