"""Time and memory of one explanation, logits included, against the classifier alone.

    python benchmarks/explainer_cost.py --classifier vit-b16-random DIR_OR_ID --batch-size 1 8 --output cost.json

`vit-b16-random` is a ViT-B/16 for 224 px and 1,000 classes with random weights, built from its config. The explainer
is untrained: its cost does not depend on the values of its weights.

How it is measured: the target is `classifier(x).logits`, the explainer `explainer(x)`, which gives scores for the
predicted class and the same logits; both get the same pixels, the same weights in `--dtype`, and no gradient. They
take turns in one process; the time ratio is the median of the ratios of the same turn. Memory is the peak of a fresh
process for each case over three passes, weights included, over what the process held before the model was built but
after a pass of a tiny one, so that the libraries' own code and buffers are in neither number (see `PeakMemory`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import (
    PeakMemory,
    can_measure_memory,
    find_device,
    paired_ratio,
    provenance,
    provenance_line,
    timed_in_turns,
    write_json,
)
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor

from hf_aha import AhaExplainer


RANDOM_VIT_B = "vit-b16-random"
DTYPES = ("bfloat16", "float32", "float16")
PASSES_FOR_MEMORY = 3
MIB = 2**20


def build_explainer(classifier: str, attn_implementation: str | None) -> AhaExplainer:
    """An untrained explainer of `classifier`, float32, on the CPU."""
    if classifier != RANDOM_VIT_B:
        return AhaExplainer.from_classifier(classifier, attn_implementation=attn_implementation).eval()
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = AutoModelForImageClassification.from_config(ViTConfig(num_labels=1000), **attention)
    return AhaExplainer.from_classifier(model, image_processor=ViTImageProcessor()).eval()


def pixels_for(explainer: AhaExplainer, batch: int) -> torch.Tensor:
    """Random pixels of the classifier's size, as a batch of its dtype on its device."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, *explainer.config.image_size, generator=generator)
    return pixels.to(explainer.device, explainer.dtype)


def measure_time(explainer: AhaExplainer, batch: int, repeats: int) -> dict[str, object]:
    """Median seconds of target and explainer, and the ratio of the same turn."""
    pixels = pixels_for(explainer, batch)
    model = explainer.classifier.model
    calls = {"target": lambda: model(pixels).logits, "explainer": lambda: explainer(pixels)}
    with torch.no_grad():
        seconds = timed_in_turns(calls, repeats, explainer.device)
    return {
        "target_s": statistics.median(seconds["target"]),
        "explainer_s": statistics.median(seconds["explainer"]),
        "time_ratio": paired_ratio(seconds["explainer"], seconds["target"]),
    }


def peak_bytes(case: str, args: argparse.Namespace) -> int:
    """Peak of `case`, `"target"` or `"explainer"`, in this process; meant for a fresh one."""
    device = find_device(args.device)
    tiny = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=64)
    warm_up = AhaExplainer.from_classifier(
        AutoModelForImageClassification.from_config(tiny), image_processor=ViTImageProcessor(), taps=[1]
    )
    warm_up.to(getattr(torch, args.dtype)).to(device)
    with torch.no_grad():
        warm_up(torch.zeros(1, 3, 64, 64, device=device))
    del warm_up
    peak = PeakMemory(device)
    # Both cases are built the same way, so that whatever building leaves behind is in both.
    explainer = build_explainer(args.classifier[0], args.attn_implementation)
    explainer.to(getattr(torch, args.dtype)).to(device)
    pixels = pixels_for(explainer, args.batch_size[0])
    model = explainer if case == "explainer" else explainer.classifier.model
    del explainer
    peak.start()
    with torch.no_grad():
        for _ in range(PASSES_FOR_MEMORY):
            output = model(pixels)
            del output
        return peak.read()


def measure_memory(classifier: str, batch: int, args: argparse.Namespace) -> dict[str, object]:
    """Peak bytes of target and explainer, each in a fresh process, and their ratio; None where not measured."""
    if args.no_memory or not can_measure_memory(torch.device(args.device)):
        return {"target_bytes": None, "explainer_bytes": None, "memory_ratio": None}
    found = {}
    for case in ("target", "explainer"):
        command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", case, "--classifier", classifier]
        command += ["--batch-size", str(batch), "--dtype", args.dtype, "--device", args.device]
        command += ["--threads", str(torch.get_num_threads())]
        if args.attn_implementation:
            command += ["--attn-implementation", args.attn_implementation]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"The memory of {classifier} could not be measured:\n{done.stderr}")
        found[f"{case}_bytes"] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "memory_ratio": found["explainer_bytes"] / found["target_bytes"]}


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each classifier and batch size."""
    device = find_device(args.device)
    rows = []
    for classifier in args.classifier:
        explainer = build_explainer(classifier, args.attn_implementation)
        explainer.to(getattr(torch, args.dtype)).to(device)
        name = classifier if classifier == RANDOM_VIT_B else Path(classifier).name
        facts = {
            "classifier": name,
            "model_type": explainer.config.base_model_type,
            "image_size": explainer.config.image_size,
            "classifier_parameters": sum(p.numel() for p in explainer.classifier.parameters()),
            "decoder_parameters": sum(p.numel() for p in explainer.decoder.parameters()),
        }
        for batch in args.batch_size:
            rows.append({**facts, "batch_size": batch, **measure_time(explainer, batch, args.repeats)})
        # The processes that measure memory get the machine to themselves.
        del explainer
        for row in rows[-len(args.batch_size) :]:
            row.update(measure_memory(classifier, row["batch_size"], args))
    return rows


def table(result: dict[str, object]) -> str:
    """The rows as Markdown, with the settings and the command under them."""
    lines = [
        "| Classifier | Batch | Target (ms) | Explainer (ms) | Time ratio "
        "| Target (MiB) | Explainer (MiB) | Memory ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        ratio = row["time_ratio"]
        times = f"{1e3 * row['target_s']:.1f} | {1e3 * row['explainer_s']:.1f}"
        spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        memory = "n/a | n/a | n/a"
        if row["memory_ratio"] is not None:
            sizes = f"{row['target_bytes'] / MIB:.0f} | {row['explainer_bytes'] / MIB:.0f}"
            memory = f"{sizes} | {row['memory_ratio']:.2f}"
        lines.append(f"| {row['classifier']} | {row['batch_size']} | {times} | {spread} | {memory} |")
    settings = f"Weights in {result['dtype']}, {result['repeats']} turns, attention {result['attn_implementation']}. "
    return "\n".join([*lines, "", settings + provenance_line(result)])


def main(argv: Sequence[str] | None = None) -> dict[str, object] | None:
    """Measure, print the table, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--classifier", nargs="+", default=[RANDOM_VIT_B], help=f"folders, Hub ids, or {RANDOM_VIT_B} (the default)"
    )
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="images a pass (default: 1 8)")
    parser.add_argument("--repeats", type=int, default=20, help="counted turns (default: 20)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of all weights (default: bfloat16)")
    parser.add_argument("--attn-implementation", choices=("sdpa", "eager"), help="default: the library's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    parser.add_argument("--memory-of", choices=("target", "explainer"), help="print one peak of this process only")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_bytes(args.memory_of, args))
        return None
    result = {
        **provenance(__file__, argv, find_device(args.device)),
        "dtype": args.dtype,
        "repeats": args.repeats,
        "attn_implementation": args.attn_implementation or "default",
        "rows": measure(args),
    }
    print(table(result))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
