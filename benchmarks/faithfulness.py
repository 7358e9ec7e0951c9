#!/usr/bin/env python
"""Hard deletion and insertion of an explainer beside random, centre, gradient x input and integrated gradients.

    python benchmarks/faithfulness.py measure --explainer ID --classifier ID --dataset ID --output results.jsonl
    python benchmarks/faithfulness.py report results.jsonl --output docs/results.md

`measure` appends one line per image and method to a JSONL file (both curves for every reference and granularity) and
goes on where it stopped. Work can be split into files by `--shard 0/2`, `--shard 1/2` and by `--methods`; give all
files of one classifier to `report`. Gradient methods are captum's (`pip install captum`).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_aha import AhaExplainer
from hf_aha.data import Photographs, ProcessorCrop, collate, load_photographs
from hf_aha.metrics.curves import FRACTIONS_21, deletion_insertion_curves
from hf_aha.perturbation import Normalization, reference_image


REFERENCES = ("blur", "mean")
METHODS = ("random", "centre", "gradient x input", "integrated gradients", "aha")
NAMES = {
    "random": "Random order",
    "centre": "Centre Gaussian",
    "gradient x input": "Gradient x input",
    "integrated gradients": "Integrated gradients, 16 steps, blurred baseline",
    "aha": "**AHA** (this explainer)",
}
PASSES = {
    "random": "0",
    "centre": "0",
    "gradient x input": "1 forward + 1 backward",
    "integrated gradients": "16 forward + 16 backward",
}


class Methods:
    """Every method as `(pixel_values (1, 3, H, W), target (1,)) -> scores (1, H, W)`, higher = more important."""

    def __init__(self, explainer: AhaExplainer):
        from captum.attr import InputXGradient, IntegratedGradients

        self.explainer = explainer
        self.normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
        self.perturbed_logits = self.logits
        self.input_x_gradient = InputXGradient(self.probability)
        self.integrated_gradients = IntegratedGradients(self.probability)

    def compile(self) -> None:
        """Run the perturbed images through a compiled bfloat16 copy of the classifier: the same curves, sooner."""
        torch._inductor.config.freezing = True
        copied = copy.deepcopy(self.explainer.classifier.model).to(torch.bfloat16)
        compiled = torch.compile(copied, dynamic=False)
        self.perturbed_logits = lambda pixel_values: compiled(pixel_values.to(torch.bfloat16)).logits

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixel_values.device.type, torch.bfloat16):
            return self.explainer.classifier(pixel_values).logits

    def probability(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.logits(pixel_values).float().softmax(-1)

    def reference(self, pixel_values: torch.Tensor, kind: str) -> torch.Tensor:
        return self.normalization.normalize(reference_image(self.normalization.denormalize(pixel_values), kind))

    def __call__(self, method: str, pixel_values: torch.Tensor, target: torch.Tensor, seed: int) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        if method == "random":
            return torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed))
        if method == "centre":
            y = (torch.arange(height) + 0.5) / height - 0.5
            x = (torch.arange(width) + 0.5) / width - 0.5
            return torch.exp(-(y[:, None] ** 2 + x[None] ** 2) / (2 * 0.25**2))[None]
        if method == "gradient x input":
            return self.input_x_gradient.attribute(pixel_values.requires_grad_(), target=target).detach().sum(1)
        if method == "integrated gradients":
            attribution = self.integrated_gradients.attribute(
                pixel_values,
                baselines=self.reference(pixel_values, "blur"),
                target=target,
                n_steps=16,
                internal_batch_size=8,
            )
            return attribution.detach().float().sum(1)
        with torch.no_grad(), torch.autocast(pixel_values.device.type, torch.bfloat16):
            return self.explainer(pixel_values, target).scores


def measure(args: argparse.Namespace) -> None:
    if args.explainer is None:
        if "aha" in args.methods:
            raise SystemExit("The method aha needs --explainer.")
        explainer = AhaExplainer.from_classifier(args.classifier)
    else:
        explainer = AhaExplainer.from_pretrained(args.explainer, classifier=args.classifier, dtype=torch.float32)
    methods = Methods(explainer.eval())
    if args.compile:
        methods.compile()
    rows, column = load_photographs(args.dataset, split=args.split)
    rows = rows.shuffle(seed=args.seed).select(range(args.skip, args.skip + args.images))
    photographs = Photographs(rows, column, ProcessorCrop(explainer.image_processor))
    output = Path(args.output)
    if not output.exists():
        output.write_text(json.dumps(describe(args, explainer)) + "\n")
    entries = [json.loads(line) for line in output.read_text().splitlines()[1:]]
    done = {(entry["image"], entry.get("method")) for entry in entries}
    part, parts = (int(number) for number in args.shard.split("/"))
    for index in tqdm(range(part, args.images, parts), mininterval=10):
        todo = [method for method in args.methods if (index, method) not in done]
        if not todo or (index, None) in done:
            continue
        batch = collate([photographs[index]])
        if batch.errors:
            found = [{"image": index, "error": batch.errors[0][1]}]
        else:
            found = measure_image(methods, batch.pixel_values, todo, args.seed + index, index < args.cell_images)
            found = [{"image": index, **entry} for entry in found]
        with output.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in found)


def measure_image(
    methods: Methods, pixel_values: torch.Tensor, names: Sequence[str], seed: int, with_cells: bool
) -> list[dict[str, object]]:
    with torch.no_grad():
        target = methods.logits(pixel_values).argmax(-1)
    references = {kind: methods.reference(pixel_values, kind) for kind in REFERENCES}
    levels: dict[str, tuple[int, int] | None] = {"pixel": None}
    if with_cells:
        levels["cells"] = methods.explainer.classifier.grid(*pixel_values.shape[-2:])
    entries = []
    for name in names:
        started = time.perf_counter()
        scores = methods(name, pixel_values.clone(), target, seed).float()
        seconds = round(time.perf_counter() - started, 4)
        measured = {}
        for kind, reference in references.items():
            for level, cells in levels.items():
                curves = deletion_insertion_curves(
                    methods.perturbed_logits, pixel_values, reference, scores, target, cells=cells, max_batch=8
                )
                measured[f"{kind}/{level}"] = {
                    "deletion": [round(value, 5) for value in curves.deletion[0].tolist()],
                    "insertion": [round(value, 5) for value in curves.insertion[0].tolist()],
                }
        entries.append({"method": name, "target": int(target), "seconds": seconds, "curves": measured})
    return entries


def describe(args: argparse.Namespace, explainer: AhaExplainer) -> dict[str, object]:
    """What the results page says about the run; folders of this machine are left out."""
    config = explainer.config
    return {
        "arguments": {
            name: getattr(args, name) for name in ("split", "images", "skip", "cell_images", "seed", "compile")
        },
        "dataset": Path(args.dataset).name,
        "explainer": None if args.explainer is None else args.name or Path(args.explainer).name,
        "classifier": Path(str(args.classifier or config.base_model_name_or_path)).name,
        "image_size": list(config.image_size),
        "patch_size": list(config.patch_size),
        "passes": config.passes_per_explanation,
        "decoder_parameters": sum(p.numel() for p in explainer.decoder.parameters()),
        "training": config.training,
        "versions": {name: version(name) for name in ("torch", "transformers", "captum", "numpy")},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s) a process",
    }


def read_lines(file: str) -> list[dict]:
    """Every line of a results file, `.jsonl` or `.jsonl.gz`; the first describes the run."""
    text = gzip.decompress(Path(file).read_bytes()).decode() if file.endswith(".gz") else Path(file).read_text()
    return [json.loads(line) for line in text.splitlines()]


def bootstrap(values: np.ndarray, seed: int, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and 95% percentile interval over images."""
    generator = np.random.default_rng(seed)
    means = values[generator.integers(len(values), size=(resamples, len(values)))].mean(1)
    return float(values.mean()), *(float(bound) for bound in np.percentile(means, [2.5, 97.5]))


def areas(entries: Sequence[dict], method: str, key: str) -> dict[str, np.ndarray]:
    """Trapezoid areas on [0, 1] of both curves, and their difference, per image in ascending order."""
    found = [entry["curves"][key] for entry in entries if entry["method"] == method and key in entry["curves"]]
    area = {
        name: torch.trapezoid(
            torch.tensor([curves[name] for curves in found]), torch.tensor(FRACTIONS_21), dim=1
        ).numpy()
        for name in ("deletion", "insertion")
    }
    return {**area, "difference": area["insertion"] - area["deletion"]}


def table(entries: Sequence[dict], names: Mapping[str, str], kind: str, level: str, seed: int) -> str:
    """Areas of the methods `names`, by title, on the photographs that all of them were measured on at this level."""
    lines = [
        "| method | deletion (lower is better) | insertion (higher is better) | insertion - deletion "
        "| AHA minus this, paired |",
        "|---|---|---|---|---|",
    ]
    ours = areas(entries, "aha", f"{kind}/{level}")["difference"]
    for method, title in names.items():
        found = areas(entries, method, f"{kind}/{level}")
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*bootstrap(found[name], seed)) for name in found]
        paired = (
            "-"
            if method == "aha"
            else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*bootstrap(ours - found["difference"], seed))
        )
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {paired} |")
    return "\n".join(lines)


def _passes_of(head: Mapping[str, object]) -> str:
    """What an explanation costs, of the first line of an explainer's file."""
    backward = (head.get("passes", 1) - 1) // 2
    return f"{1 + backward} forward + {backward} backward" if backward else "1 forward"


def section(files: Sequence[str]) -> str:
    """One classifier's part of the results page.

    Raises:
        SystemExit: the files were measured on different photographs.
    """
    heads, entries = [], []
    runs = [read_lines(file) for file in files]
    head = next(head for head, *_ in runs if head["explainer"] is not None)
    names, passes = dict(NAMES), PASSES | {"aha": _passes_of(head)}
    for other, *rest in runs:
        heads.append(other)
        name = other["explainer"]
        if name not in (None, head["explainer"]):
            # Another explainer of the same classifier is one more row.
            rest = [{**entry, "method": name} if entry.get("method") == "aha" else entry for entry in rest]
            names[name] = f"AHA ({name})"
            passes[name] = _passes_of(other)
        entries += rest
    protocol = {name: head["arguments"][name] for name in ("split", "images", "skip", "seed")}
    for other in heads:
        if any(other["arguments"][name] != value for name, value in protocol.items()):
            raise SystemExit(f"The files of {head['classifier']} were measured on different photographs.")
    failed = [entry for entry in entries if "error" in entry]
    entries = sorted((entry for entry in entries if "error" not in entry), key=lambda entry: entry["image"])
    measured = {method: {entry["image"] for entry in entries if entry["method"] == method} for method in names}
    # Methods are compared on the same photographs only.
    common = set.intersection(*measured.values())
    left_out = len(set.union(*measured.values())) - len(common)
    ours = {kind: areas(entries, "aha", f"{kind}/pixel")["difference"] for kind in REFERENCES}
    entries = [entry for entry in entries if entry["image"] in common]
    count = len(common)
    cells = [
        {entry["image"] for entry in entries if entry["method"] == method and "blur/cells" in entry["curves"]}
        for method in names
    ]
    with_cells = set.intersection(*cells)
    seed, last = protocol["seed"], protocol["skip"] + protocol["images"] - 1
    height, width = head["image_size"]
    training = head["training"] or {}
    parts = [
        f"## {head['explainer']}: explains {head['classifier']}",
        f"{count} photographs of the split `{protocol['split']}` of {head['dataset']} (shuffled with seed {seed}, "
        f"rows {protocol['skip']} to {last}; {len(failed)} unreadable, {left_out} left out because not every method "
        f"was measured on them), {height} x {width} px, the classifier's own processor, predicted class, softmax "
        f"probability. The decoder has {head['decoder_parameters']:,} weights and saw "
        f"{training.get('images_seen', 0):,} crops in its last training run.",
    ]
    if left_out:
        alone = ", ".join(
            "{:.3f} [{:.3f}, {:.3f}] with {}".format(*bootstrap(values, seed), kind) for kind, values in ours.items()
        )
        parts.append(f"AHA alone on all {len(ours['blur'])} photographs, pixels, insertion - deletion: {alone}.")
    for level, name, images in (
        ("pixel", "Pixels", common),
        ("cells", f"Patch cells ({head['patch_size'][0]} px)", with_cells),
    ):
        chosen = [entry for entry in entries if entry["image"] in images]
        for kind in REFERENCES:
            if images:
                title = f"### {name}, {kind} reference ({len(images)} photographs)"
                parts.append(f"{title}\n\n{table(chosen, names, kind, level, seed)}")
    seconds = {m: float(np.median([entry["seconds"] for entry in entries if entry["method"] == m])) for m in names}
    parts.append(
        "### Cost of one map\n\n| method | passes of the classifier | median seconds |\n|---|---|---|\n"
        + "\n".join(f"| {names[m]} | {passes[m]} | {seconds[m]:.3f} |" for m in names)
        + f"\n\nOne image at a time, bfloat16 autocast, {head['machine']}, on a busy machine; "
        + ", ".join(f"{name} {number}" for name, number in head["versions"].items())
        + "."
    )
    return "\n\n".join(parts)


INTRODUCTION = """# Results

Written by `python benchmarks/faithfulness.py report`; do not edit by hand. Deletion and insertion with hard masks, 21
points (0, 5, ..., 100 % of the pixels or cells), the most important first, equal scores by lowest index; areas by the
trapezoid rule on [0, 1]. References: *blur*, a Gaussian of sigma 5 % of the side; *mean*, the ImageNet mean colour.
Brackets hold 95 % percentile bootstrap intervals over images (2,000 resamples); the last column pairs the images.
Gradient methods are captum's and differentiate the class probability; channels are summed with their sign.

The explainers were trained on deletion and insertion with these two references, so these tables measure what they were
trained for, on photographs they did not see. Masks of single pixels also reward maps that look like noise; patch
cells do so less.
"""


def report(args: argparse.Namespace) -> None:
    groups: dict[str, list[str]] = {}
    for file in args.files:
        head = read_lines(file)[0]
        groups.setdefault(head["classifier"], []).append(file)
    text = "\n\n".join([INTRODUCTION.rstrip(), *(section(files) for files in groups.values())])
    if args.notes:
        text += "\n\n" + Path(args.notes).read_text().rstrip()
    Path(args.output).write_text(text + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("--explainer", help="needed by the method aha")
    one.add_argument("--classifier", help="default: the one the explainer names")
    one.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    one.add_argument("--name", help="what the results page calls the explainer")
    one.add_argument("--dataset", required=True)
    one.add_argument("--split", default="validation")
    one.add_argument("--images", type=int, default=500)
    one.add_argument("--skip", type=int, default=1000, help="the trainer validates on the first rows of this order")
    one.add_argument("--cell-images", type=int, default=100, help="patch cells are measured on this many images")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--compile", action="store_true", help="torch.compile the perturbed passes")
    one.add_argument("--shard", default="0/1")
    one.add_argument("--output", required=True)
    one.set_defaults(run=measure)
    two = commands.add_parser("report")
    two.add_argument("files", nargs="+")
    two.add_argument("--notes", help="Markdown appended to the page")
    two.add_argument("--output", required=True)
    two.set_defaults(run=report)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    args.run(args)


if __name__ == "__main__":
    main()
