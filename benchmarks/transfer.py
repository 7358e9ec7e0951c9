"""Quality of an explainer against its training images: from scratch, and started from another target's explainer.

    python benchmarks/transfer.py --dataset DIR_OR_ID --recipe recipes/imagenette-demo/explainer.yaml \
        --pair imagenette-demo vit-s14-imagenette --pair DIR_OR_ID imagenette-demo --control \
        --steps 0 25 100 400 --output runs/transfer -- --image_size 112

A pair is a target and the explainer of another target to start from. The target is a classifier, or a bundled
explainer with its classifier. Every row is a run of the recipe of its own, with the whole schedule: a target, an arm,
a number of steps, a seed. The arms:

* scratch: a new decoder of the same sizes;
* transfer: `AhaExplainer.from_classifier(target, init_from=...)`;
* readers-new: the same, but the parts that read the classifier (projections of its layers, class modulation) are those
  of scratch also where their shapes agree.

`--control` adds to each target (a ViT) a copy whose channels are shuffled: it computes the same function, but what a
channel means is unrelated to the other target, even where both descend from the same weights.

The quality is the mean of insertion minus deletion area on the first rows of the validation split shuffled with seed
0. Differences to scratch are paired over the images. Rows that OUTPUT/rows.jsonl holds are not run again, a row that
was interrupted goes on from its last checkpoint, and OUTPUT/transfer.json and transfer.png are written after each row.
Words after `--` go to the recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType

import torch
from accelerate.utils import set_seed
from measuring import find_device, provenance, provenance_line, write_json
from recipe_runs import SETTINGS, held_out, interval, measure, prepare_classifier, recipe_script
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from hf_aha import AhaExplainer
from hf_aha.transfer_aha import public_name


ARMS = ("scratch", "transfer", "readers-new")
# Weights that read the classifier.
READERS = ("taps.", "class_")


@dataclass(frozen=True)
class Row:
    """One run: a point of a curve. Folders are named by their last part, because results are published."""

    target: str
    init_from: str
    arm: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """A folder name."""
        return "-".join(str(value).replace("/", "--") for value in asdict(self).values())


def with_shuffled_channels(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give the token channels of a ViT another order, in place; what it computes stays the same.

    Raises:
        ValueError: the model is no ViT, or has a parameter that is not known here.
    """
    if model.config.model_type != "vit":
        raise ValueError(f"Only the channels of a ViT can be shuffled, not those of a {model.config.model_type}.")
    order = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    writers, readers = ("o_proj", "fc2", "projection"), ("q_proj", "k_proj", "v_proj", "fc1", "classifier")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, kind = name.split(".")[-2:]
            if owner in writers or owner.startswith("layernorm"):
                dimension = 0
            elif kind in ("cls_token", "position_embeddings"):
                dimension = 2
            elif owner in readers and kind == "weight":
                dimension = 1
            elif owner in readers and kind == "bias":
                continue
            else:
                raise ValueError(f"The parameter {name} of this ViT is not known, so its channels stay as they are.")
            parameter.copy_(parameter.index_select(dimension, order))
    return model


def prepare_target(target: str, folder: Path, shuffled: bool) -> str:
    """A folder or id that the recipe takes as its classifier, with its image processor beside it."""
    plain = prepare_classifier(target, folder)
    if not shuffled:
        return plain
    found = folder / f"{Path(target).name}-shuffled"
    if not (found / "preprocessor_config.json").is_file():
        model = AutoModelForImageClassification.from_pretrained(plain, dtype=torch.float32)
        with_shuffled_channels(model).save_pretrained(found)
        # Last, because its presence says that the folder is whole.
        AutoImageProcessor.from_pretrained(plain).save_pretrained(found)
    return str(found)


def build(recipe: ModuleType, words: Sequence[str], arm: str, init_from: str) -> tuple[object, AhaExplainer]:
    """The recipe's arguments and the untrained explainer of an arm."""
    args = recipe.parse_yaml_and_command_line(recipe.RecipeArguments, [*words, "--init_from", init_from])
    set_seed(args.seed)
    transferred = recipe.build_explainer(args)
    if arm == "transfer":
        return args, transferred
    # With the settings and taps of the transfer, so that the arms differ in the weights alone.
    settings = {name: getattr(transferred.config, name) for name in (*args.DECODER_SETTINGS, "taps")}
    fresh_args = replace(args, init_from=None, **settings)
    set_seed(args.seed)
    fresh = recipe.build_explainer(fresh_args)
    if arm == "scratch":
        return fresh_args, fresh
    weights = transferred.decoder.state_dict()
    weights |= {name: tensor for name, tensor in fresh.decoder.state_dict().items() if name.startswith(READERS)}
    transferred.decoder.load_state_dict(weights)
    return args, transferred


def run_row(
    recipe: ModuleType, args: argparse.Namespace, row: Row, classifier: str, init_from: str
) -> dict[str, object]:
    """Train and measure one row."""
    folder = args.output / "runs" / row.name
    words = [str(args.recipe), "--classifier", classifier, "--dataset", args.dataset, "--seed", str(row.seed)]
    words += ["--output_dir", str(folder), "--validation_split", "", "--resume_from_checkpoint", "auto"]
    words += [*args.words, "--max_steps", str(max(row.steps, 1))]
    recipe_args, explainer = build(recipe, words, row.arm, init_from)
    started = explainer.config.init_from
    # No steps measure the start itself.
    if row.steps:
        trainer = recipe.AhaTrainer(explainer, recipe_args, *recipe.build_datasets(recipe_args, explainer))
        explainer = trainer.train()
    photographs = held_out(explainer, args.dataset, args.split)
    values = measure(explainer, photographs, min(args.eval_rows, len(photographs)), args.settings).mean_areas()
    shutil.rmtree(folder, ignore_errors=True)
    return {
        **asdict(row),
        "images_seen": explainer.config.training["images_seen"] if row.steps else 0,
        "copied": [] if started is None else started["copied"],
        "new": [] if started is None else started["new"],
        "values": [round(value, 5) for value in values.tolist()],
    }


def wanted_rows(args: argparse.Namespace) -> Iterator[tuple[Row, str, str]]:
    """Every row, short runs first, with the classifier and the explainer to start from as the recipe takes them."""
    kinds = (False, True) if args.control else (False,)
    for steps, seed, (target, init_from), shuffled, arm in product(
        sorted(set(args.steps)), args.seeds, args.pair, kinds, args.arms
    ):
        classifier = prepare_target(target, args.output / "classifiers", shuffled)
        name = f"{public_name(target)}{'-shuffled' if shuffled else ''}"
        yield Row(name, public_name(init_from), arm, steps, seed), classifier, init_from


def read_rows(path: Path, settings: str) -> list[dict[str, object]]:
    """The rows that are done; a line cut short by an interruption is left out.

    Raises:
        SystemExit: they were made with other settings.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    if any(row["settings"] != settings for row in rows):
        sys.exit(f"The rows in {path} were made with another recipe or other settings: choose another --output.")
    # A whole file again, so that the next row does not follow half a line.
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def summarise(rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Mean and interval of each point, the mean over seeds, and its paired difference to scratch."""
    points: dict[tuple, list[Mapping[str, object]]] = {}
    for row in rows:
        points.setdefault((row["target"], row["init_from"], row["steps"], row["arm"]), []).append(row)
    found = []
    for (target, init_from, steps, arm), of_seeds in sorted(points.items()):
        scratch = {row["seed"]: row for row in points.get((target, init_from, steps, "scratch"), ())}
        paired = [row for row in of_seeds if row["seed"] in scratch]
        entry = {"target": target, "init_from": init_from, "steps": steps, "arm": arm}
        entry |= {"images_seen": of_seeds[0]["images_seen"], "seeds": len(of_seeds)}
        entry["value"] = interval(torch.tensor([row["values"] for row in of_seeds]).mean(0))
        if arm != "scratch" and paired:
            differences = torch.tensor([row["values"] for row in paired])
            differences -= torch.tensor([scratch[row["seed"]]["values"] for row in paired])
            entry["minus_scratch"] = interval(differences.mean(0))
        found.append(entry)
    return found


def plot(points: Sequence[Mapping[str, object]], path: Path) -> None:
    """One panel a target, quality against training images, one line an arm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(point["target"] for point in points))
    figure = Figure(figsize=(4.2 * len(targets), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(targets), squeeze=False, sharey=True)[0]
    for axes, target in zip(panels, targets, strict=True):
        own = [point for point in points if point["target"] == target]
        for arm, colour in zip(ARMS, ("#7f7f7f", "#d95f02", "#1b9e77"), strict=True):
            line = [point for point in own if point["arm"] == arm]
            if not line:
                continue
            images, values = [point["images_seen"] for point in line], [point["value"] for point in line]
            means = [value["mean"] for value in values]
            # One photograph has no interval.
            bars = [
                [abs(value["mean"] - (value["mean"] if value[end] is None else value[end])) for value in values]
                for end in ("low", "high")
            ]
            axes.errorbar(images, means, bars, marker="o", capsize=3, color=colour, label=arm)
        seen = sorted({point["images_seen"] for point in own})
        axes.set_xscale("symlog", linthresh=min((count for count in seen if count), default=1))
        axes.set_xticks(seen, [f"{count:,}" for count in seen])
        axes.minorticks_off()
        axes.set_title(f"{target}\nfrom {own[0]['init_from']}", fontsize=10)
        axes.set_xlabel("training images")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("insertion - deletion")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def table(result: Mapping[str, object]) -> str:
    """The points as Markdown."""
    lines = ["| target | from | training images | arm | insertion - deletion | minus scratch, paired |"]
    lines.append("|---|---|---:|---|---|---|")
    for point in result["points"]:
        cells = [
            "-" if value is None else f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            for value in (point["value"], point.get("minus_scratch"))
        ]
        lines.append(
            f"| {point['target']} | {point['init_from']} | {point['images_seen']} | {point['arm']} | "
            f"{' | '.join(cells)} |"
        )
    return "\n".join([*lines, "", provenance_line(result)])


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Run what is missing, print the table, write JSON and plot, and return what the JSON holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="photographs: folder or Hub id")
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file of recipes/train_explainer.py")
    parser.add_argument(
        "--pair", nargs=2, action="append", required=True, metavar=("TARGET", "INIT_FROM"), help="repeat for more"
    )
    parser.add_argument("--control", action="store_true", help="each target also with its channels shuffled")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="(default: all)")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 25, 100, 400], help="(default: 0 25 100 400)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--split", default="validation", help="measured on (default: %(default)s)")
    parser.add_argument("--eval-rows", type=int, default=64, help="photographs measured on (default: 64)")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=["blur/pixel", "mean/cell"],
        metavar="REFERENCE/UNIT",
        help="how curves are made (default: blur/pixel mean/cell)",
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, required=True, help="folder of rows.jsonl, transfer.json, transfer.png")
    args = parser.parse_args(own)
    args.words = words
    if min(args.steps) < 0:
        parser.error("--steps must not be negative")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    # What must be the same for rows to be points of one curve.
    facts = [args.recipe.read_text(encoding="utf-8"), args.words, args.eval_rows, sorted(args.settings), args.split]
    settings = hashlib.sha256(json.dumps([*facts, Path(args.dataset).name]).encode()).hexdigest()[:16]
    rows = read_rows(args.output / "rows.jsonl", settings)
    done = {Row(**{key: row[key] for key in Row.__dataclass_fields__}) for row in rows}
    recipe = recipe_script()
    result: dict[str, object] = {}
    for row, classifier, init_from in wanted_rows(args):
        if row not in done:
            entry = {**run_row(recipe, args, row, classifier, init_from), "settings": settings}
            with open(args.output / "rows.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            rows.append(entry)
            done.add(row)
        result = {**provenance(__file__, argv, find_device("cpu")), "recipe": args.recipe.name}
        result |= {"dataset": Path(args.dataset).name, "eval_rows": args.eval_rows, "settings": list(args.settings)}
        result["parts"] = {
            f"{one['target']} from {one['init_from']}": {"copied": one["copied"], "new": one["new"]}
            for one in rows
            if one["arm"] == "transfer"
        }
        result["points"] = summarise(rows)
        write_json(args.output / "transfer.json", result)
        plot(result["points"], args.output / "transfer.png")
    print(table(result))
    return result


if __name__ == "__main__":
    main()
