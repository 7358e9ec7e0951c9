"""Resident memory of a training run, from its first to its last step: it must not grow.

    python benchmarks/training_memory.py --output benchmarks/results/training_memory.json

How it is measured: `AhaTrainer.train()` runs with the settings of a recipe (the bundled explainer's, if none is given)
on the photographs that come with the package, with checkpoints and validations on the way. At every line of the log a
tracker reads the resident memory that is no file's (Linux: `RssAnon` of /proc/self/status), after the memory that is
free in the process was given back to the system (`malloc_trim` of glibc): photographs of many sizes leave holes, which
are no leak. The first tenth of the run, in which caches fill, is left out; through the rest goes a least-squares line,
whose slope is the growth a step. What the whole resident set (`VmRSS`) was before that is in the file beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.tracking import GeneralTracker
from bundled_training import RECIPE, bundled_arguments, bundled_explainer, bundled_photographs
from measuring import _resident_bytes, provenance, provenance_line, write_json

from hf_aha.trainer import AhaTrainer


WARM_UP = 0.1


class ResidentMemory(GeneralTracker):
    """Reads the memory at every line of the log."""

    name = "resident-memory"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.bytes: list[int] = []
        self.untrimmed: list[int] = []

    @property
    def tracker(self) -> ResidentMemory:
        return self

    def store_init_configuration(self, values: dict) -> None:
        """Nothing of the settings is needed."""

    def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
        """Read it, once a step."""
        if not self.steps or step != self.steps[-1]:
            self.steps.append(step)
            self.untrimmed.append(_resident_bytes("VmRSS"))
            gc.collect()
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)
            self.bytes.append(_resident_bytes("RssAnon"))


def growth(steps: Sequence[int], sizes: Sequence[int]) -> dict[str, float]:
    """Slope of the least-squares line after the warm-up, and what it comes to over the run.

    Example:
        >>> growth(range(0, 110, 10), [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9])["bytes_per_step"]
        0.0
    """
    kept = [(step, size) for step, size in zip(steps, sizes, strict=True) if step > WARM_UP * steps[-1]]
    at, size = np.array(kept, dtype=float).T
    slope = float(np.polyfit(at - at.mean(), size - size.mean(), 1)[0])
    return {
        "bytes_per_step": round(slope, 1),
        "bytes_over_the_run": round(slope * float(at[-1] - at[0])),
        "first_bytes": int(size[0]),
        "last_bytes": int(size[-1]),
        "largest_bytes": int(size.max()),
    }


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Train, and say how the memory went."""
    memory = ResidentMemory()
    with tempfile.TemporaryDirectory() as folder:
        settings = bundled_arguments(
            args.recipe,
            Path(folder) / "run",
            max_steps=args.steps,
            image_size=args.image_size,
            per_device_batch_size=args.batch_size,
            dataloader_num_workers=args.workers,
            log_steps=max(1, args.steps // 100),
            eval_steps=max(1, args.steps // 10),  # the first within the warm-up
            eval_images=4,
            save_steps=max(1, args.steps // 10),
            disable_tqdm=not sys.stderr.isatty(),
        )
        explainer = bundled_explainer()
        photographs = bundled_photographs(Path(folder), explainer, args.image_size, rows=args.rows)
        trainer = AhaTrainer(explainer, settings, *photographs, trackers=[memory])
        trainer.train()
    return {
        **provenance(__file__, args.argv, trainer.accelerator.device),
        "recipe": f"{args.recipe.parent.name}/{args.recipe.name}",
        "steps": args.steps,
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "warm_up": WARM_UP,
        **growth(memory.steps, memory.bytes),
        "readings": ["step", "RssAnon after malloc_trim", "VmRSS before"],
        "resident": [list(reading) for reading in zip(memory.steps, memory.bytes, memory.untrimmed, strict=True)],
    }


def table(result: dict[str, object]) -> str:
    """The result as Markdown, with the settings and the command under it."""
    megabytes = {name: result[f"{name}_bytes"] / 2**20 for name in ("first", "last", "largest")}
    return "\n".join(
        [
            "| Steps | After warm-up (MiB) | At the end (MiB) | Largest (MiB) | Bytes a step | Over the run (MiB) |",
            "|---:|---:|---:|---:|---:|---:|",
            f"| {result['steps']} | {megabytes['first']:.1f} | {megabytes['last']:.1f} | {megabytes['largest']:.1f} "
            f"| {result['bytes_per_step']:.0f} | {result['bytes_over_the_run'] / 2**20:.2f} |",
            "",
            f"Recipe {result['recipe']}, batch {result['batch_size']}, {result['image_size']} px. "
            f"{provenance_line(result)}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Measure, print the table, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps (default: 2000)")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="settings (default: of the bundled explainer)")
    parser.add_argument("--image-size", type=int, default=28, help="side of a crop in pixels (default: 28)")
    parser.add_argument("--batch-size", type=int, default=4, help="images a step (default: 4)")
    parser.add_argument("--rows", type=int, default=400, help="rows of the dataset (default: 400)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args(argv)
    args.argv = argv
    torch.set_num_threads(args.threads)
    if not sys.platform.startswith("linux"):
        sys.exit("The resident set is read from /proc, which this system does not have; run this on Linux.")
    result = measure(args)
    print(table(result))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
