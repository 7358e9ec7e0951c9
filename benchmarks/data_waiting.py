"""Share of the time that training waits for its data, on the bundled recipe at 224 pixels with two workers.

    python benchmarks/data_waiting.py --classifier bundled DIR_OR_ID --dataset DIR_OR_ID --output waiting.json

How it is measured: explainer, dataset, crops and trainer are those of `recipes/train_explainer.py` with the settings
of the recipe given, but for the size of the crops and the number of workers. Then the trainer's own source of batches
and its own step take turns, as in `AhaTrainer.train` between two lines of the log: waiting is the time from asking for
a batch to getting it, and its share is that of the wall time of the counted steps. The first steps, which start the
workers, are not counted. Beside it stands what the workers give when nothing else runs, in the same process: how much
faster the steps may become before they wait. `--streaming` reads the dataset as a stream.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch
from measuring import provenance, provenance_line, write_json

import hf_aha
from hf_aha import AhaTrainer
from hf_aha.arguments import parse_yaml_and_command_line


ROOT = Path(__file__).resolve().parents[1]
BUNDLED = Path(hf_aha.__file__).parent / "bundled" / "imagenette-demo" / "classifier"


def load_recipe() -> ModuleType:
    """`recipes/train_explainer.py` as a module."""
    spec = importlib.util.spec_from_file_location("train_explainer", ROOT / "recipes" / "train_explainer.py")
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe  # dataclasses look their module up there
    spec.loader.exec_module(recipe)
    return recipe


def build_trainer(args: argparse.Namespace, classifier: str, output_dir: str) -> AhaTrainer:
    """The trainer of the recipe for a classifier, with crops of the size asked for and without validation."""
    recipe = load_recipe()
    words = {
        "classifier": BUNDLED if classifier == "bundled" else classifier,
        "dataset": args.dataset,
        "image_size": args.image_size,
        "dataloader_num_workers": args.workers,
        "streaming": args.streaming,
        "output_dir": output_dir,
    }
    if classifier == "bundled":
        words["init_from"] = BUNDLED.parent.name  # its image processor lies with the explainer
    if args.batch_size is not None:
        words["per_device_batch_size"] = args.batch_size
    argv = [str(args.recipe), *(word for name, value in words.items() for word in (f"--{name}", str(value)))]
    settings = parse_yaml_and_command_line(recipe.RecipeArguments, [*argv, "--validation_split", ""])
    explainer = recipe.build_explainer(settings)
    return AhaTrainer(explainer, settings, *recipe.build_datasets(settings, explainer))


def measure_steps(trainer: AhaTrainer, steps: int, warm_up: int) -> dict[str, float]:
    """Seconds, share of waiting and rate of `steps` training steps after `warm_up` uncounted ones."""
    trainer.decoder.train()
    images = 0
    for taken, batch in enumerate(trainer.source, start=1):
        with trainer.accelerator.accumulate(trainer.decoder):
            trainer.training_step(batch.pixel_values, batch.labels, batch.indices)
        if taken > warm_up:
            images += len(batch.pixel_values)
        if taken == warm_up:
            trainer.source.take_wait_seconds()
            started = time.perf_counter()
        if taken == warm_up + steps:
            break
    seconds, waited = time.perf_counter() - started, trainer.source.take_wait_seconds()
    return {
        "seconds": seconds,
        "waited_s": waited,
        "data_wait_share": waited / seconds,
        "images_per_second": images / seconds,
    }


def measure_loader(trainer: AhaTrainer, batches: int, warm_up: int) -> float:
    """Images a second that the workers give while nothing else runs."""
    source = iter(trainer.source)
    # What was fetched ahead does not count: more than the workers hold in advance.
    for _ in islice(source, warm_up):
        pass
    started, images = time.perf_counter(), 0
    for batch in islice(source, batches):
        images += len(batch.pixel_values)
    return images / (time.perf_counter() - started)


def measure(args: argparse.Namespace, classifier: str) -> dict[str, object]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, classifier, folder)
        settings = trainer.args
        found = measure_steps(trainer, args.steps, args.warm_up)
        ahead = 2 * max(1, args.workers) + 2
        alone = measure_loader(trainer, args.loader_batches, ahead)
    # `Path` would lose the leading dots of a folder beside this one.
    shown = classifier if classifier == "bundled" else os.path.basename(os.path.normpath(classifier))
    return {
        "classifier": shown,
        "image_size": settings.image_size,
        "batch_size": settings.per_device_batch_size,
        "curve_points": settings.curve_points,
        "mixed_precision": settings.mixed_precision,
        **found,
        "loader_alone_images_per_second": alone,
    }


def table(result: dict[str, object]) -> str:
    """The result as Markdown, with the settings and the command under it."""
    lines = [
        "| Classifier | Side | Batch | Steps | Waiting | Images/s | Workers alone, images/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['classifier']} | {row['image_size']} | {row['batch_size']} | {result['steps']} "
            f"| {row['data_wait_share']:.2%} | {row['images_per_second']:.2f} "
            f"| {row['loader_alone_images_per_second']:.0f} |"
        )
    kind = "streamed" if result["streaming"] else "stored"
    note = f" {result['note']}." if result["note"] else ""
    cores = f"{result['usable_cpus']} CPU(s) for the training and {result['workers']} worker(s)"
    return "\n".join([*lines, "", f"Dataset {result['dataset']}, {kind}; {cores}.{note} {provenance_line(result)}"])


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Measure, print the table, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classifier", nargs="+", default=["bundled"], help="bundled, folders or Hub ids")
    parser.add_argument("--dataset", required=True, help="folder or Hub id with a split named train")
    parser.add_argument(
        "--recipe", type=Path, default=ROOT / "recipes" / "imagenette-demo" / "explainer.yaml", help="settings"
    )
    parser.add_argument("--image-size", type=int, default=224, help="side of the crops in pixels (default: 224)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default: 2)")
    parser.add_argument("--batch-size", type=int, help="images a step (default: the recipe's)")
    parser.add_argument("--steps", type=int, default=30, help="counted steps (default: 30)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--loader-batches", type=int, default=30, help="batches of the workers alone (default: 30)")
    parser.add_argument("--streaming", action="store_true", help="read the dataset as a stream")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--note", default="", help="a remark on the machine, kept in the result")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args(argv)
    if args.warm_up < 1 or args.steps < 1:
        parser.error(f"--warm-up and --steps must be at least 1, but they are {args.warm_up} and {args.steps}")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [measure(args, classifier) for classifier in args.classifier]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result = {
        **provenance(__file__, argv, torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "note": args.note,
        "dataset": os.path.basename(os.path.normpath(args.dataset)),
        "streaming": args.streaming,
        "recipe": args.recipe.name if args.recipe.is_absolute() else str(args.recipe),
        "workers": args.workers,
        "usable_cpus": usable,
        "steps": args.steps,
        "rows": rows,
    }
    print(table(result))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
