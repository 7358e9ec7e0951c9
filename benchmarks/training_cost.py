"""What training an explainer costs on paper: FLOPs and memory of its parts, and hours of an ImageNet epoch.

    python benchmarks/training_cost.py --output training_cost.json

How it is taken: the parts of `AhaTrainer.training_step` run under `FlopCounterMode` of torch, the classifier's on the
meta device, where nothing is computed; it counts matrix products and convolutions, forward and backward. Memory is
what the backward pass of one perturbed image needs, by `saved_tensors_hooks`: every tensor kept by autograd in
bfloat16, once, weights left out, with and without the attention matrices, which fused attention does not keep. Hours
are FLOPs over `--peak` times `--utilisation` and count no communication: its size stands beside them. They are
estimates; nothing here was measured on a GPU.

The published recipe is the released code of the paper: 16 points a curve for two classes, deletion and insertion, that
is 64 perturbed images for each photograph, with the same classifier and without its separate encoder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import provenance, provenance_line, write_json
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from hf_aha import AttributionDecoder
from hf_aha.objectives import FaithfulnessObjective


IMAGENET = 1_281_167
GPUS = (1, 8, 64)
PUBLISHED_PASSES = 64
SIZES = {
    "ViT-B/16": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "ViT-L/16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
GIGA, TERA, MIB = 1e9, 1e12, 2**20


def flops_of(call) -> int:
    """FLOPs of the matrix products and convolutions in `call()`."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def build(name: str) -> tuple[ViTForImageClassification, AttributionDecoder]:
    """A frozen classifier of 1,000 classes at 224 px, without storage, and the default decoder for it."""
    config = ViTConfig(image_size=224, patch_size=16, num_labels=1000, **SIZES[name])
    with torch.device("meta"):
        # Eager attention, because the counter does not see into the fused kind on the meta device.
        classifier = ViTForImageClassification._from_config(config, attn_implementation="eager").eval()
    # Autocast, which the decoder switches off for its last step, knows no meta device.
    decoder = AttributionDecoder(config.hidden_size, 4, config.hidden_size)
    return classifier.requires_grad_(False), decoder


def perturbed_pass(classifier: ViTForImageClassification) -> None:
    """Forward and backward of one perturbed image, to its pixels."""
    pixels = torch.empty(1, 3, 224, 224, device="meta", requires_grad=True)
    classifier(pixels).logits.sum().backward()


def decoder_step(decoder: AttributionDecoder) -> None:
    """Forward and backward of the decoder for one image."""
    width = decoder.class_norm.normalized_shape[0]
    tokens = [torch.zeros(1, 14, 14, width)] * len(decoder.taps)
    pixels, vectors = torch.zeros(1, 3, 224, 224), torch.zeros(1, width)
    decoder(tokens, pixels, vectors).sum().backward()


def kept_bytes(classifier: ViTForImageClassification) -> tuple[int, int]:
    """Bytes that the backward pass of one perturbed image keeps in bfloat16: all, and without attention matrices."""
    weights = {id(parameter) for parameter in classifier.parameters()}
    tokens = classifier.vit.embeddings.position_embeddings.shape[1]
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in weights and id(tensor._base) not in weights:
            kept[id(tensor)] = tensor  # holding it keeps its id from being given again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pixels = torch.empty(1, 3, 224, 224, device="meta", dtype=torch.bfloat16, requires_grad=True)
        classifier.bfloat16()(pixels).logits.sum()
    classifier.float()
    attention = sum(t.nbytes for t in kept.values() if t.shape[-2:] == (tokens, tokens))
    total = sum(t.nbytes for t in kept.values())
    return total, total - attention


def cost(name: str, points: int) -> dict[str, object]:
    """FLOPs a photograph of every part of a step with `points` points a curve, bytes and weights."""
    classifier, decoder = build(name)
    pixels = torch.empty(1, 3, 224, 224, device="meta")
    forward = flops_of(lambda: classifier(pixels))
    both = flops_of(lambda: perturbed_pass(classifier))
    total, fused = kept_bytes(classifier)
    return {
        "features": forward,
        "decoder": flops_of(lambda: decoder_step(decoder)),
        "perturbed": 2 * points * both,
        "published": forward + PUBLISHED_PASSES * both,
        "perturbed_images": 2 * points,
        "perturbed_pass": both,
        "kept_bytes": total,
        "kept_bytes_fused_attention": fused,
        "decoder_weights": sum(parameter.numel() for parameter in decoder.parameters()),
    }


def epoch_hours(flops: float, gpus: int, args: argparse.Namespace) -> float:
    """Hours of one pass over ImageNet at `flops` a photograph."""
    return IMAGENET * flops / (gpus * args.peak * args.utilisation * TERA) / 3600


def table(result: dict[str, object], args: argparse.Namespace) -> str:
    """The result as Markdown."""
    lines = [
        f"| target | features (GFLOP) | decoder | {2 * result['points']} perturbed images | a photograph | decoder's "
        "share | the published recipe's |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in result["targets"].items():
        total = one["features"] + one["decoder"] + one["perturbed"]
        lines.append(
            f"| {name} | {one['features'] / GIGA:.1f} | {one['decoder'] / GIGA:.1f} | {one['perturbed'] / GIGA:.0f} "
            f"| {total / GIGA:.0f} | {one['decoder'] / total:.1%} | {one['published'] / GIGA:.0f} "
            f"({one['published'] / total:.1f} times) |"
        )
    lines += ["", "| target | " + " | ".join(f"{gpus} H100" for gpus in GPUS) + " | published recipe, 1 H100 |"]
    lines.append("|---|" + "---:|" * (len(GPUS) + 1))
    for name, one in result["targets"].items():
        total = one["features"] + one["decoder"] + one["perturbed"]
        hours = [epoch_hours(total, gpus, args) for gpus in GPUS] + [epoch_hours(one["published"], 1, args)]
        lines.append(f"| {name} | " + " | ".join(f"{60 * one_time:.1f} min" for one_time in hours) + " |")
    lines += ["", "| target | kept for a perturbed image | with fused attention | decoder's weights | its gradient |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, one in result["targets"].items():
        lines.append(
            f"| {name} | {one['kept_bytes'] / MIB:.0f} MiB | {one['kept_bytes_fused_attention'] / MIB:.0f} MiB "
            f"| {one['decoder_weights'] / 1e6:.2f} M | {4 * one['decoder_weights'] / MIB:.1f} MiB |"
        )
    lines += [
        "",
        f"An epoch is {IMAGENET:,} photographs, an H100 {args.peak:.0f} TFLOP/s in bfloat16, of which "
        f"{args.utilisation:.0%} are taken to be reached. {provenance_line(result)}",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Count, print the tables, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curve-points", type=int, help="points a curve (default: the objective's)")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of a GPU in bfloat16 (default: an H100's)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of it that is reached (default: 0.4)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    args = parser.parse_args(argv)
    points = args.curve_points or FaithfulnessObjective().curve_points
    result = {
        **provenance(__file__, argv, torch.device("cpu")),
        "points": points,
        "peak_tflops": args.peak,
        "utilisation": args.utilisation,
        "targets": {name: cost(name, points) for name in SIZES},
    }
    print(table(result, args))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
