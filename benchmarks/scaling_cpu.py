"""Images a second of a training run on one and on several CPU processes, one thread each, and the efficiency.

    python benchmarks/scaling_cpu.py --output benchmarks/results/scaling_cpu.json

How it is measured: `torchrun` starts the processes, gloo joins them. Each trains with the same batch (so that a step
of two processes holds twice the images), by `AhaTrainer.train()` with the settings of the bundled recipe on bundled
photographs: decoding, steps and synchronisation are included, validation and checkpoints are not. The speed is that of
`log.jsonl`, its first line left out. Runs of different numbers of processes take turns; the efficiency is the median
speed of N processes divided by N times the median speed of one. There must be as many idle cores as processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from bundled_training import RECIPE, bundled_arguments, bundled_explainer, bundled_photographs
from measuring import provenance, provenance_line, write_json

from hf_aha.trainer import AhaTrainer


def train(args: argparse.Namespace) -> None:
    """One run, in each of its processes; the speeds of its log go to `args.speeds`."""
    torch.set_num_threads(1)
    # The log writes a line every `log_steps`, the first of which pays for everything that is made once.
    lines = args.steps // args.log_steps
    settings = bundled_arguments(
        RECIPE,
        args.speeds.with_suffix(""),
        max_steps=lines * args.log_steps,
        image_size=args.image_size,
        per_device_batch_size=args.batch_size,
        dataloader_num_workers=0,
        log_steps=args.log_steps,
        save_steps=10**9,
        disable_tqdm=True,
    )
    explainer = bundled_explainer()
    rows, _ = bundled_photographs(args.speeds.parent, explainer, args.image_size, rows=args.rows)
    trainer = AhaTrainer(explainer, settings, rows)
    trainer.train()
    if trainer.accelerator.is_main_process:
        log = (args.speeds.with_suffix("") / "log.jsonl").read_text(encoding="utf-8").splitlines()
        speeds = [json.loads(line)["images_per_second"] for line in log]
        args.speeds.write_text(json.dumps(speeds[1:] or speeds), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(args: argparse.Namespace, processes: int, speeds: Path) -> list[float]:
    """Run `train` in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("steps", "log_steps", "batch_size")]
    words += [f"--image-size={args.image_size}", f"--rows={args.rows}", f"--speeds={speeds}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, __file__, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The run of {processes} process(es) failed:\n{done.stderr[-3000:]}")
    return json.loads(speeds.read_text(encoding="utf-8"))


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Median images a second for each number of processes, and the efficiency of the larger ones."""
    found: dict[int, list[float]] = {count: [] for count in args.processes}
    with tempfile.TemporaryDirectory() as folder:
        # Made here once, so that no run pays for it.
        bundled_photographs(Path(folder), bundled_explainer(), args.image_size, rows=args.rows)
        for turn in range(args.repeats):
            for count in args.processes if turn % 2 == 0 else args.processes[::-1]:
                found[count] += launch(args, count, Path(folder) / f"run-{count}-{turn}.json")
    speeds = {count: statistics.median(values) for count, values in found.items()}
    return {
        **provenance(__file__, args.argv, torch.device("cpu")),
        "threads": 1,
        "recipe": f"{RECIPE.parent.name}/{RECIPE.name}",
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "repeats": args.repeats,
        "images_per_second": {
            str(count): {"median": speeds[count], "min": min(values), "max": max(values)}
            for count, values in found.items()
        },
        "efficiency": {str(count): speeds[count] / (count * speeds[1]) for count in args.processes if count > 1},
    }


def table(result: dict[str, object]) -> str:
    """The result as Markdown, with the settings and the command under it."""
    rows = [
        f"| {count} | {speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f}) "
        f"| {100 * result['efficiency'].get(count, 1.0):.0f} % |"
        for count, speed in result["images_per_second"].items()
    ]
    return "\n".join(
        [
            "| Processes | Images a second | Efficiency |",
            "|---:|---:|---:|",
            *rows,
            "",
            f"Recipe {result['recipe']}, {result['image_size']} px, {result['batch_size']} images a process and step, "
            f"{result['repeats']} turns. {provenance_line(result)}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, object] | None:
    """Measure, print the table, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="must hold 1 (default: 1 2)")
    parser.add_argument("--steps", type=int, default=60, help="steps a run (default: 60)")
    parser.add_argument("--log-steps", type=int, default=10, help="steps between readings (default: 10)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a process and step (default: 16)")
    parser.add_argument("--image-size", type=int, default=112, help="side of a crop in pixels (default: 112)")
    parser.add_argument("--rows", type=int, default=400, help="rows of the dataset (default: 400)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    parser.add_argument("--speeds", type=Path, help=argparse.SUPPRESS)  # of a process that `launch` started
    args = parser.parse_args(argv)
    args.argv = argv
    if args.speeds is not None:
        train(args)
        return None
    if 1 not in args.processes or args.steps < args.log_steps:
        parser.error("--processes must hold 1, and --steps be at least --log-steps")
    result = measure(args)
    print(table(result))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
