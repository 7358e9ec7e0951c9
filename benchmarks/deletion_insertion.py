"""Time of pixel-level deletion and insertion against a plain loop, quantus, and the target's passes alone.

    python benchmarks/deletion_insertion.py --classifier DIR_OR_ID --images 4 --output deletion_insertion.json

Six ways to the same two curves of random maps without ties, blurred reference, class probability:

* ours: `MeasuredImages.measure` with `hf_aha/pixel/blur/deletion` and `/insertion`, 21 points, the ends shared: 40
  passes an image;
* compiled: the same with the passes of `--compile`, see `TargetPasses`;
* bare: as many passes in the same batches and precision of images that lie ready;
* loop: what one would write first; for each image and curve, for each of 21 shares, blend and ask: 42 passes, one
  image each, in the same precision;
* quantus: `PixelFlipping` for deletion, and the same with the reference as the image and the image as the baseline for
  insertion, as many steps as its rules allow (21 at 224 px), all images in one call, float32 as it always passes;
* quantus (same passes): as before with the target called in our precision.

They take turns in one process; each ratio is the median of the ratios of the same turn. Before, the areas of ours and
of the loop are compared, and the largest difference is reported. Memory is the peak of a fresh process that measures
`--memory-images` images in blocks of four, for both numbers given.

quantus is in `.venv-bench` (`make bench-env`); leave it out with `--no-quantus`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
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
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_aha import FrozenClassifier
from hf_aha.metrics import get_protocol
from hf_aha.metrics.evaluation import MeasuredImages
from hf_aha.metrics.passes import PRECISIONS, TargetPasses
from hf_aha.perturbation import Normalization, reference_image


POINTS = 21
BLOCK = 4  # images measured at a time where memory is
MIB = 2**20


class Setting:
    """One classifier with random images and maps, and the six ways to measure them."""

    def __init__(self, args: argparse.Namespace, images: int) -> None:
        device = find_device(args.device)
        model = AutoModelForImageClassification.from_pretrained(args.classifier, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(args.classifier)
        self.classifier = FrozenClassifier(model.to(device))
        self.normalization = Normalization(processor.image_mean, processor.image_std)
        self.passes = TargetPasses(self.classifier, args.precision)
        self.max_batch = args.max_batch
        height, width = self.classifier.image_size
        generator = torch.Generator().manual_seed(0)
        self.rgb = torch.rand(images, 3, height, width, generator=generator).to(device)
        self.pixel_values = self.normalization.normalize(self.rgb)
        # Ranks, so that no two scores are equal.
        orders = [torch.randperm(height * width, generator=generator) for _ in range(images)]
        self.scores = torch.stack(orders).view(images, height, width).float().to(device)
        self.target = self.passes(self.pixel_values).argmax(-1)

    def ours(self) -> tuple[np.ndarray, np.ndarray]:
        """Areas (B,) of deletion and insertion."""
        return self.ours_of(slice(None), self.passes)

    def compiled(self) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        """A call of `ours` through compiled passes; its first one compiles."""
        passes = TargetPasses(self.classifier, self.passes.precision, compiled=True)
        return lambda: self.ours_of(slice(None), passes)

    def ours_of(self, rows: slice, passes: TargetPasses) -> tuple[np.ndarray, np.ndarray]:
        measured = MeasuredImages(
            passes, self.pixel_values[rows], normalization=self.normalization, max_batch=self.max_batch
        )
        protocols = get_protocol("hf_aha/pixel/blur", image_size=self.classifier.image_size)
        deletion, insertion = measured.measure(self.scores[rows], self.target[rows], protocols)
        return deletion.values, insertion.values

    def bare(self) -> None:
        """The passes that `ours` needs, of images that lie ready: both ends, and the points between of two curves."""
        total = len(self.pixel_values) * (2 + 2 * (POINTS - 2))
        ready = self.pixel_values[:1].expand(self.max_batch, -1, -1, -1).contiguous()
        for start in range(0, total, self.max_batch):
            self.passes(ready[: min(self.max_batch, total - start)])

    def loop(self) -> tuple[np.ndarray, np.ndarray]:
        """Two curves, one image at a time; areas as `ours`."""
        areas = []
        for row in range(len(self.rgb)):
            image = self.pixel_values[row]
            reference = self.normalization.normalize(reference_image(self.rgb[row : row + 1], "blur"))[0]
            order = self.scores[row].flatten().argsort(descending=True, stable=True)
            for start, finish in ((image, reference), (reference, image)):
                curve = []
                for point in range(POINTS):
                    chosen = order[: round(point / (POINTS - 1) * len(order))]
                    shown = start.flatten(1).clone()
                    shown[:, chosen] = finish.flatten(1)[:, chosen]
                    logits = self.passes(shown.view_as(image)[None]).float()
                    curve.append(float(logits.softmax(-1)[0, self.target[row]]))
                areas.append(float(np.trapezoid(curve, dx=1 / (POINTS - 1))))
        return np.array(areas[::2]), np.array(areas[1::2])

    def quantus(self, same_passes: bool) -> Callable[[], None]:
        """A call of quantus for both curves, made ready."""
        import quantus

        reference = self.normalization.normalize(reference_image(self.rgb, "blur"))
        images, references = self.pixel_values.cpu().numpy(), reference.cpu().numpy()
        model = _Module(self.passes if same_passes else TargetPasses(self.classifier, "float32")).eval()

        def flip(start: np.ndarray, finish: np.ndarray) -> None:
            filling = finish.reshape(len(finish), -1)

            def perturb(arr: np.ndarray, indices: np.ndarray, **kwargs: object) -> np.ndarray:
                np.put_along_axis(arr, indices, np.take_along_axis(filling, indices, 1), 1)
                return arr

            metric = quantus.PixelFlipping(
                features_in_step=quantus_features(*images.shape[-2:]),
                normalise=False,
                perturb_func=perturb,
                disable_warnings=True,
            )
            metric(
                model=model,
                x_batch=start,
                y_batch=self.target.cpu().numpy(),
                a_batch=self.scores[:, None].cpu().numpy(),
                softmax=True,
                channel_first=True,
                device=str(self.passes.device),
                batch_size=len(images),
            )

        def both() -> None:
            flip(images, references)
            flip(references, images)

        return both


class _Module(torch.nn.Module):
    """What quantus takes as a model."""

    def __init__(self, passes: TargetPasses) -> None:
        super().__init__()
        self.passes = passes

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.passes(pixel_values).float()


def quantus_features(height: int, width: int) -> int:
    """Features (channels of pixels) a step for 21 steps, or the next more that quantus allows.

    It must divide height x width, of which there are three times as many features: the steps are three times the
    divisor's counterpart.
    """
    area = height * width
    parts = next(parts for parts in range(POINTS // 3, area + 1) if area % parts == 0)
    return area // parts


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Seconds and ratios of every way."""
    setting = Setting(args, args.images)
    ours, loop = setting.ours(), setting.loop()
    calls = {"ours": setting.ours, "bare": setting.bare, "loop": setting.loop}
    if args.compile:
        calls["compiled"] = setting.compiled()
    if not args.no_quantus:
        calls["quantus"] = setting.quantus(same_passes=False)
        calls["quantus (same passes)"] = setting.quantus(same_passes=True)
    seconds = timed_in_turns(calls, args.repeats, setting.passes.device)
    height, width = setting.classifier.image_size
    return {
        "classifier": Path(args.classifier).name,
        "image_size": [height, width],
        "images": args.images,
        "max_batch": args.max_batch,
        "precision": setting.passes.precision,
        "repeats": args.repeats,
        "quantus_steps": None if args.no_quantus else 3 * height * width // quantus_features(height, width),
        "largest_difference_of_areas": max(float(np.abs(a - b).max()) for a, b in zip(ours, loop, strict=True)),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": ratios_to("ours", seconds),
        "ratios_to_compiled": ratios_to("compiled", seconds) if args.compile else None,
    }


def ratios_to(mine: str, seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times as long as `mine` the others take; for `bare`, the other way round."""
    return {
        name: paired_ratio(seconds[mine], values) if name == "bare" else paired_ratio(values, seconds[mine])
        for name, values in seconds.items()
        if name not in ("ours", mine)
    }


def peak_bytes(args: argparse.Namespace, images: int) -> int:
    """Peak of measuring so many images in blocks, in this process; meant for a fresh one."""
    device = find_device(args.device)
    setting = Setting(args, BLOCK)
    peak = PeakMemory(device)
    peak.start()
    for _ in range(0, images, BLOCK):
        setting.ours()
    return peak.read()


def measure_memory(args: argparse.Namespace) -> dict[str, int] | None:
    """Peak bytes for each number of images, each in a fresh process; None where it is not measured."""
    if args.no_memory or not can_measure_memory(torch.device(args.device)):
        return None
    found = {}
    for images in args.memory_images:
        command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", str(images)]
        command += ["--classifier", args.classifier, "--device", args.device, "--precision", args.precision]
        command += ["--max-batch", str(args.max_batch), "--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"The memory of {images} images could not be measured:\n{done.stderr}")
        found[str(images)] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(result: dict[str, object]) -> str:
    """The measurements as Markdown, with the settings and the command under them."""
    columns = [result["ratios"]] + [result["ratios_to_compiled"]] * bool(result["ratios_to_compiled"])
    heads = ["Way", "Seconds an image", "Against ours", "Against compiled"][: 2 + len(columns)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for name, seconds in result["seconds"].items():
        cells = [_shown(ratios.get(name), name) for ratios in columns]
        lines.append(f"| {name} | {seconds / result['images']:.3f} | {' | '.join(cells)} |")
    size = " x ".join(map(str, result["image_size"]))
    settings = (
        f"{result['images']} images of {size} px, {result['precision']} passes of up to {result['max_batch']} images, "
        f"{result['repeats']} turns; quantus takes {result['quantus_steps']} steps. The areas of ours and the loop "
        f"differ by {result['largest_difference_of_areas']:.1e} at most."
    )
    if result["memory_bytes"]:
        peaks = [f"{int(size) / MIB:.0f} MiB for {images}" for images, size in result["memory_bytes"].items()]
        settings += f" Peak memory over the loaded classifier by number of images: {', '.join(peaks)}."
    return "\n".join([*lines, "", f"{settings} {provenance_line(result)}"])


def _shown(ratio: dict[str, float] | None, name: str) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
    return f"it takes {text} of these" if name == "bare" else text


def main(argv: Sequence[str] | None = None) -> dict[str, object] | None:
    """Measure, print the table, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classifier", required=True, help="folder or Hub id, with its image processor")
    parser.add_argument("--images", type=int, default=4, help="images a turn (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, help="counted turns (default: 5)")
    parser.add_argument("--max-batch", type=int, default=10, help="images a pass of ours (default: 10)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of the passes (default: auto)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--compile", action="store_true", help="measure compiled passes as well")
    parser.add_argument("--no-quantus", action="store_true", help="leave quantus out")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument(
        "--memory-images", type=int, nargs="+", default=[4, 32], help="images whose peaks are compared (default: 4 32)"
    )
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    parser.add_argument("--memory-of", type=int, help="print the peak of this process for so many images only")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_bytes(args, args.memory_of))
        return None
    result = {**provenance(__file__, argv, find_device(args.device)), **measure(args)}
    result["memory_bytes"] = measure_memory(args)
    print(table(result))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
