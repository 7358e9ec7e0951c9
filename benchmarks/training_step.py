"""Time of one training step against the classifier's own forward and backward passes on as many perturbed images.

    python benchmarks/training_step.py --classifier DIR_OR_ID --batch-size 16 --output step.json

How it is measured: a step is `AhaTrainer.training_step` with the default objective: features of the clean images,
decoder, ranking, perturbation, the classifier on the perturbed images, the backward pass through all of it, clipping,
optimiser and averaged weights. The bare pass is the same classifier, under the same autocast, forward and backward to
the pixels on `batch size x 2 curves x curve points` ready-made images. Nobody can train on these curves for less, so
the ratio says what everything else costs. Both take turns in one process; the ratio is the median of the ratios of the
same turn. Data loading is not included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measuring import paired_ratio, provenance, provenance_line, timed_in_turns, write_json

from hf_aha import AhaExplainer, AhaTrainer, AhaTrainingArguments


def build_trainer(args: argparse.Namespace, output_dir: str) -> AhaTrainer:
    """A trainer that will be called step by step and writes nothing."""
    explainer = AhaExplainer.from_classifier(args.classifier, attn_implementation=args.attn_implementation)
    settings = AhaTrainingArguments(
        output_dir=output_dir,
        per_device_batch_size=args.batch_size,
        curve_points=args.curve_points,
        mixed_precision=args.mixed_precision,
        dataloader_num_workers=0,
    )
    # The loader is built but never asked: the steps below get their batch directly.
    trainer = AhaTrainer(explainer, settings, [{"index": 0, "error": "not read"}] * args.batch_size)
    trainer.decoder.train()
    return trainer


def bare_pass(trainer: AhaTrainer, images: torch.Tensor) -> None:
    """Forward and backward of the frozen classifier from a class probability to the pixels."""
    images = images.detach().requires_grad_()
    with trainer.accelerator.autocast():
        logits = trainer.classifier(images).logits
    logits.float().softmax(-1)[:, 0].mean().backward()


def profile_table(step: Callable[[], object], rows: int = 10) -> str:
    """The operators of one step that take most of the time, by their own share, as Markdown."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
    total = sum(event.self_cpu_time_total for event in events)
    lines = ["| operator | calls | share of the step |", "|---|---:|---:|"]
    lines += [
        f"| `{event.key}` | {event.count} | {event.self_cpu_time_total / total:.1%} |" for event in events[:rows]
    ]
    return "\n".join([*lines, ""])


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Median seconds of a step and of the bare pass, and the ratio of the same turn."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, folder)
        height, width = (args.image_size, args.image_size) if args.image_size else trainer.explainer.config.image_size
        points = trainer.objective.curve_points or trainer.objective.num_bins - 1
        device = trainer.accelerator.device
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(args.batch_size, 3, height, width, generator=generator).to(device)
        labels, indices = torch.full((args.batch_size,), -1), torch.arange(args.batch_size)
        perturbed = pixels.repeat(2 * points, 1, 1, 1)
        calls = {
            "bare": lambda: bare_pass(trainer, perturbed),
            "step": lambda: trainer.training_step(pixels, labels, indices),
        }
        seconds = timed_in_turns(calls, args.repeats, device, warm_up=2)
        if args.profile:
            print(profile_table(calls["step"]))
        return {
            **provenance(__file__, args.argv, device),
            "classifier": Path(args.classifier).name,
            "attn_implementation": args.attn_implementation or "default",
            "mixed_precision": args.mixed_precision,
            "batch_size": args.batch_size,
            "image_size": [height, width],
            "ranker": trainer.objective.ranker,
            "curve_points": points,
            "perturbed_images": len(perturbed),
            "repeats": args.repeats,
            "bare_s": statistics.median(seconds["bare"]),
            "step_s": statistics.median(seconds["step"]),
            "time_ratio": paired_ratio(seconds["step"], seconds["bare"]),
        }


def table(result: dict[str, object]) -> str:
    """The result as Markdown, with the settings and the command under it."""
    ratio = result["time_ratio"]
    size = "x".join(map(str, result["image_size"]))
    return "\n".join(
        [
            "| Classifier | Side | Batch | Points a curve | Perturbed images | Bare passes (s) | Step (s) | Ratio |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
            f"| {result['classifier']} | {size} | {result['batch_size']} | {result['curve_points']} "
            f"| {result['perturbed_images']} | {result['bare_s']:.3f} | {result['step_s']:.3f} "
            f"| {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |",
            "",
            f"Precision {result['mixed_precision']}, ranker {result['ranker']}, {result['repeats']} turns, attention "
            f"{result['attn_implementation']}. {provenance_line(result)}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Measure, print the table, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classifier", required=True, help="folder or Hub id")
    parser.add_argument("--batch-size", type=int, default=16, help="clean images a step (default: 16)")
    parser.add_argument("--curve-points", type=int, help="points a curve and image (default: the objective's)")
    parser.add_argument("--image-size", type=int, help="side in pixels (default: the classifier's)")
    parser.add_argument("--attn-implementation", choices=("sdpa", "eager"), help="default: the library's")
    parser.add_argument("--mixed-precision", choices=("bf16", "no", "fp16"), default="bf16", help="default: bf16")
    parser.add_argument("--repeats", type=int, default=10, help="counted turns (default: 10)")
    parser.add_argument("--profile", action="store_true", help="print which operators take the time of a step")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args(argv)
    args.argv = argv
    if args.threads:
        torch.set_num_threads(args.threads)
    result = measure(args)
    print(table(result))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
