"""What test-time refinement brings: ten steps against the plain map, and the adaptive run against the full one.

    python benchmarks/refinement.py tune --dataset DIR_OR_ID --output benchmarks/results/refinement.json
    python benchmarks/refinement.py measure --dataset DIR_OR_ID --output benchmarks/results/refinement.json
    python benchmarks/refinement.py report benchmarks/results/refinement.json --page docs/refine.md \
        --figure docs/images/refinement-passes.png

`tune` chooses on photographs of the training split: the gain of full runs with several learning rates for each scope,
and what adaptive runs with several tolerances keep of it. The winners are `LEARNING_RATES` and `ADAPTIVE_TOLERANCE` of
`hf_aha/refinement.py`.

`measure` takes photographs that neither a training nor its validation saw (those of `faithfulness.py`). Each is
refined with one or more references, in full and adaptively, with the defaults. Its maps are then measured by other
code than the refinement's (`hf_aha.metrics`), with every reference, on pixels and on patch cells, at 21 points of
which refinement knew nine, and by ROAD and total variation, which it does not know at all. It ends with an error if a
value that was climbed fell for any photograph. After every batch the file is written; a run goes on where it stopped.

`report` writes the tables between the two markers of the page, and the figure.

On a CPU with bfloat16 units, everything runs in autocast to bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from measuring import find_device, provenance, write_json
from refinement_page import MARKERS, figure, page, tuning_table, with_section
from tqdm.auto import tqdm

from hf_aha import AhaExplainer
from hf_aha.data import Photographs, ProcessorCrop, collate, load_photographs
from hf_aha.metrics.curves import FRACTIONS_21, deletion_insertion_curves
from hf_aha.metrics.legibility import total_variation
from hf_aha.metrics.passes import TargetPasses
from hf_aha.metrics.road import road_curves
from hf_aha.perturbation import Normalization, reference_image
from hf_aha.refinement import ADAPTIVE_TOLERANCE, LEARNING_RATES, SCOPES, RefinementOutput


PLAIN, FULL, ADAPTIVE = "plain", "full", "adaptive"
UNITS = ("pixel", "cell")
RATES: Mapping[str, tuple[float, ...]] = {
    "scores": (0.1, 0.2, 0.4, 0.8),
    "latent": (0.025, 0.05, 0.1, 0.2),
    "decoder": (0.01, 0.02, 0.04, 0.08),
}
TOLERANCES = (1e-4, 2e-4, 4e-4, 6e-4, 8e-4)
# A fall of a value that both sides measured in their own batches, beyond what bfloat16 may round.
ROUNDING = 0.01


class Refining:
    """An explainer, its classifier's passes, and photographs of one split in a fixed order."""

    def __init__(self, args: argparse.Namespace, split: str) -> None:
        self.explainer = AhaExplainer.from_pretrained(args.explainer, classifier=args.classifier).eval()
        self.passes = TargetPasses(self.explainer.classifier)
        config = self.explainer.config
        self.normalization = Normalization(config.image_mean, config.image_std)
        dataset, column = load_photographs(args.dataset, split=split)
        self.photographs = Photographs(dataset.shuffle(seed=0), column, ProcessorCrop(self.explainer.image_processor))

    def pixel_values(self, rows: Sequence[int]) -> torch.Tensor:
        """(len(rows), 3, H, W); an unreadable photograph ends the run, since rows are reported by their numbers."""
        batch = collate([self.photographs[row] for row in rows])
        if batch.errors:
            sys.exit(f"The photograph {batch.errors[0][0]} cannot be read: {batch.errors[0][1]}.")
        return batch.pixel_values.to(self.passes.device)

    def refine(self, pixel_values: torch.Tensor, **settings: object) -> RefinementOutput:
        """`AhaExplainer.refine` in the precision of the passes."""
        with torch.autocast(self.passes.device.type, torch.bfloat16, enabled=self.passes.precision == "bfloat16"):
            return self.explainer.refine(pixel_values, **settings)

    def reference(self, pixel_values: torch.Tensor, kind: str) -> torch.Tensor:
        """(B, 3, H, W) normalised: what a removed pixel becomes."""
        return self.normalization.normalize(reference_image(self.normalization.denormalize(pixel_values), kind))

    def areas(
        self, pixel_values: torch.Tensor, scores: torch.Tensor, target: torch.Tensor, kind: str, unit: str
    ) -> list[dict[str, float]]:
        """Of each image: both areas at 21 points, and their difference at the eleven of refinement (ends included)."""
        cells = self.explainer.classifier.grid(*pixel_values.shape[-2:]) if unit == "cell" else None
        curves = deletion_insertion_curves(
            self.passes, pixel_values, self.reference(pixel_values, kind), scores, target, cells=cells
        )
        eleven = torch.trapezoid(
            curves.insertion[:, ::2] - curves.deletion[:, ::2], torch.tensor(FRACTIONS_21[::2]), dim=1
        )
        found = {"deletion": curves.deletion_auc, "insertion": curves.insertion_auc, "climbed": eleven}
        return _by_image(found)

    def unseen(
        self, pixel_values: torch.Tensor, scores: torch.Tensor, target: torch.Tensor, with_road: Sequence[bool]
    ) -> list[dict[str, float | None]]:
        """Of each image: total variation of its rank map, and ROAD where asked for."""
        road = torch.full((len(scores),), torch.nan)
        some = torch.tensor(list(with_road))
        if bool(some.any()):
            curves = road_curves(self.passes, pixel_values[some], scores[some], target[some], self.normalization)
            road[some] = curves.value
        return _by_image({"total variation": total_variation(scores).cpu(), "ROAD": road})


def _by_image(values: Mapping[str, torch.Tensor]) -> list[dict[str, float | None]]:
    columns = {name: each.tolist() for name, each in values.items()}
    return [
        {name: None if column[row] != column[row] else round(column[row], 5) for name, column in columns.items()}
        for row in range(len(next(iter(columns.values()))))
    ]


# ---------------------------------------------------------------------------------------------------- tune


def tune(args: argparse.Namespace) -> dict[str, object]:
    """Gains on photographs of the training split, for every learning rate and tolerance."""
    refining = Refining(args, args.split)
    batches = torch.arange(args.photographs).split(args.batch_size)

    def run(**settings: object) -> dict[str, float]:
        gains, passes = [], []
        for rows in tqdm(batches, desc=str(settings), mininterval=10):
            found = refining.refine(
                refining.pixel_values(rows.tolist()), reference=args.reference, steps=args.steps, **settings
            )
            gains += found.gain.tolist()
            passes += found.passes.tolist()
        return {"gain": sum(gains) / len(gains), "passes": sum(passes) / len(passes)}

    rates = {
        scope: [{"learning_rate": rate, **run(scope=scope, learning_rate=rate)} for rate in RATES[scope]]
        for scope in args.scopes
    }
    best = {scope: max(found, key=lambda entry: entry["gain"])["learning_rate"] for scope, found in rates.items()}
    # Of the default scope, with the rate that has just been found.
    tolerances = []
    if "scores" in args.scopes:
        full = max(rates["scores"], key=lambda entry: entry["gain"])
        for tolerance in TOLERANCES:
            found = run(scope="scores", learning_rate=best["scores"], adaptive=True, tolerance=tolerance)
            shares = {f"share_of_{name}": found[name] / full[name] for name in ("gain", "passes")}
            tolerances.append({"tolerance": tolerance, **found, **shares})
    return {
        "explainer": Path(args.explainer).name,
        "dataset": Path(args.dataset).name,
        "split": args.split,
        "photographs": args.photographs,
        "reference": args.reference,
        "steps": args.steps,
        "precision": refining.passes.precision,
        "rates": rates,
        "best": best,
        "tolerances": tolerances,
    }


# ---------------------------------------------------------------------------------------------------- measure


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Every photograph before and after, by every way of measuring; goes on from what `args.output` holds."""
    refining = Refining(args, args.split)
    result = {"made_with": _made_with(args, refining), "photographs": _measured_already(args, refining)}
    done = {entry["row"] for entry in result["photographs"]}
    todo = [row for row in range(args.skip, args.skip + args.photographs) if row not in done]
    for start in tqdm(range(0, len(todo), args.batch_size), mininterval=10):
        rows = todo[start : start + args.batch_size]
        result["photographs"] += measure_batch(refining, args, rows)
        _store(args.output, "measured", _name(args), {**args.provenance, **result})
    falls = [entry["row"] for entry in result["photographs"] if fell(entry)]
    if falls:
        sys.exit(f"Refinement lowered the value that it climbs for the photographs {falls}, which must not happen.")
    return result


def measure_batch(refining: Refining, args: argparse.Namespace, rows: Sequence[int]) -> list[dict[str, object]]:
    """One entry a photograph."""
    pixel_values = refining.pixel_values(rows)
    maps, runs = {}, {}
    for kind in args.refine_with:
        for name in (FULL, ADAPTIVE):
            found = refining.refine(
                pixel_values, reference=kind, steps=args.steps, scope=args.scope, adaptive=name == ADAPTIVE
            )
            maps[PLAIN], target = found.initial_scores, found.target
            maps[f"{kind}/{name}"] = found.scores
            runs[f"{kind}/{name}"] = found
    with_road = [row < args.skip + args.road for row in rows]
    entries = [{"row": row, "target": int(target[place]), "runs": {}, "maps": {}} for place, row in enumerate(rows)]
    for place, entry in enumerate(entries):
        for name, found in runs.items():
            entry["runs"][name] = {
                "steps": int(found.steps_taken[place]),
                "passes": int(found.passes[place]),
                "best_values": [round(value, 6) for value in found.best_values[place].tolist()],
                "best_passes": found.best_passes[place].tolist(),
            }
    for name, scores in maps.items():
        unseen = refining.unseen(pixel_values, scores, target, with_road)
        measured = {
            f"{kind}/{unit}": refining.areas(pixel_values, scores, target, kind, unit)
            for kind in args.references
            for unit in args.units
        }
        for place, entry in enumerate(entries):
            entry["maps"][name] = {setting: found[place] for setting, found in measured.items()} | unseen[place]
    return entries


def fell(entry: Mapping[str, object]) -> bool:
    """Whether a value fell that refinement climbed: by its own account, or by the metrics' code beyond rounding."""
    for name, run in entry["runs"].items():
        setting = f"{name.split('/')[0]}/pixel"
        if run["best_values"][-1] < run["best_values"][0]:
            return True
        before, after = (entry["maps"][each].get(setting) for each in (PLAIN, name))
        if before is not None and after["climbed"] < before["climbed"] - ROUNDING:
            return True
    return False


def _name(args: argparse.Namespace) -> str:
    return args.name or Path(args.explainer).name


def _made_with(args: argparse.Namespace, refining: Refining) -> dict[str, object]:
    """What must be the same for a run to go on, and for a reader to know; folders of this machine are left out."""
    config = refining.explainer.config
    return {
        "explainer": Path(args.explainer).name,
        "classifier": Path(str(args.classifier or config.base_model_name_or_path)).name,
        "image_size": list(config.image_size),
        "passes_per_explanation": config.passes_per_explanation,
        "dataset": Path(args.dataset).name,
        "split": args.split,
        "skip": args.skip,
        "steps": args.steps,
        "scope": args.scope,
        "learning_rate": LEARNING_RATES[args.scope],
        "adaptive_tolerance": ADAPTIVE_TOLERANCE,
        "refined_with": list(args.refine_with),
        "references": list(args.references),
        "units": list(args.units),
        "road": args.road,
        "precision": refining.passes.precision,
    }


def _measured_already(args: argparse.Namespace, refining: Refining) -> list[dict[str, object]]:
    """Photographs of an earlier run with the same settings.

    Raises:
        SystemExit: the file holds a run of this name with other settings.
    """
    found = _read(args.output).get("measured", {}).get(_name(args))
    if found is None:
        return []
    if found["made_with"] != _made_with(args, refining):
        sys.exit(f"{args.output} holds {_name(args)} measured with other settings: give another --name or --output.")
    last = args.skip + args.photographs
    return [entry for entry in found["photographs"] if entry["row"] < last]


# ---------------------------------------------------------------------------------------------------- the file


def _read(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _store(path: Path, part: str, name: str, entry: Mapping[str, object]) -> None:
    """Put one entry into the file; the others stay."""
    held = _read(path)
    write_json(path, {**held, part: {**held.get(part, {}), name: entry}})


def report(args: argparse.Namespace) -> None:
    """Write the section of the page and the figure."""
    result = _read(args.results)
    if not result.get("measured"):
        sys.exit(f"{args.results} holds no measurement; run `measure` first.")
    text = args.page.read_text(encoding="utf-8")
    if any(text.count(marker) != 1 for marker in MARKERS):
        sys.exit(f"{args.page} must hold each of the lines {' and '.join(MARKERS)} once.")
    picture = Path("images", args.figure.name).as_posix()
    figure(result["measured"], args.figure)
    args.page.write_text(with_section(text, page(result, picture)), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the three commands."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="task")
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--explainer", default="imagenette-demo", help="name, folder or Hub id (default: %(default)s)")
    both.add_argument("--classifier", help="its classifier, where the explainer does not say")
    both.add_argument("--dataset", required=True, help="photographs: folder or Hub id")
    both.add_argument("--steps", type=int, default=10, help="(default: %(default)s)")
    both.add_argument("--batch-size", type=int, default=8, help="photographs at a time (default: %(default)s)")
    both.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    both.add_argument("--output", type=Path, required=True, help="JSON file; what it holds besides stays")
    one = commands.add_parser("tune", parents=[both])
    one.add_argument("--split", default="train", help="(default: %(default)s)")
    one.add_argument("--photographs", type=int, default=24, help="(default: %(default)s)")
    one.add_argument("--reference", default="blur", help="(default: %(default)s)")
    one.add_argument("--scopes", nargs="+", choices=SCOPES, default=SCOPES, help="(default: all)")
    two = commands.add_parser("measure", parents=[both])
    two.add_argument("--split", default="validation", help="(default: %(default)s)")
    two.add_argument("--photographs", type=int, default=100, help="(default: %(default)s)")
    two.add_argument("--skip", type=int, default=1000, help="the trainer validates on the first rows of this order")
    two.add_argument("--scope", choices=SCOPES, default="scores", help="(default: %(default)s)")
    two.add_argument("--refine-with", nargs="+", default=["blur", "mean"], help="references (default: blur mean)")
    two.add_argument("--references", nargs="+", default=["blur", "mean"], help="to measure with (default: blur mean)")
    two.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS), help="(default: both)")
    two.add_argument("--road", type=int, default=24, help="ROAD on this many photographs (default: %(default)s)")
    two.add_argument("--name", help="what the page calls the run (default: the explainer's name)")
    three = commands.add_parser("report")
    three.add_argument("results", type=Path)
    three.add_argument("--page", type=Path, required=True)
    three.add_argument("--figure", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.task == "report":
        report(args)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    args.provenance = provenance(__file__, argv, find_device("cpu"))
    if args.task == "tune":
        found = tune(args)
        print(tuning_table(found))
        _store(args.output, "tuned", Path(args.explainer).name, {**args.provenance, **found})
    else:
        found = measure(args)
        print(f"{len(found['photographs'])} photographs in {args.output.name}; no value that was climbed fell.")


if __name__ == "__main__":
    main()
