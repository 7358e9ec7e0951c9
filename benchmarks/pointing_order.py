"""How much deletion and insertion care whether a map points into the photograph of its class.

    python benchmarks/pointing_order.py --dataset DIR_OR_ID --output benchmarks/results/pointing_order.json

Mosaics of four confidently classified photographs of different classes, as in the grid pointing game, each asked about
all of its four classes. Every explainer's map is measured as it is, smoothed, and with one standard deviation of its
scores added inside the asked photograph's cell, which only an oracle can do: where the areas hardly change, training
on them cannot teach pointing. Intervals are over mosaics.

The rows are the first of the split shuffled with seed 0, so that others stay unseen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from measuring import find_device, provenance, provenance_line, write_json

from hf_aha import AhaExplainer
from hf_aha.data import Photographs, ProcessorCrop, collate, load_photographs
from hf_aha.markdown import Markdown, table
from hf_aha.metrics import choose_groups, make_mosaics
from hf_aha.metrics.curves import deletion_insertion_curves
from hf_aha.metrics.passes import TargetPasses
from hf_aha.metrics.pointing import MIN_PROBABILITY
from hf_aha.metrics.rank_maps import top_share
from hf_aha.metrics.results import bootstrap
from hf_aha.perturbation import Normalization, gaussian_blur, reference_image
from hf_aha.ranking import standardize


REFERENCES = ("blur", "mean")
ELEVEN = tuple(step / 10 for step in range(11))
CELLS = 4


def inside_cells(size: Sequence[int], mosaics: int) -> torch.Tensor:
    """(4 * mosaics, H, W) bool: the asked photograph's cell, of all four questions to each mosaic."""
    rows, columns = (torch.arange(side) * 2 // side for side in size)
    cells = 2 * rows[:, None] + columns
    return (cells == torch.arange(CELLS)[:, None, None]).repeat(mosaics, 1, 1)


def variants(scores: torch.Tensor, inside: torch.Tensor, sigma: float) -> dict[str, torch.Tensor]:
    """The maps that are compared."""
    scores = standardize(scores.flatten(1)).view_as(scores)
    return {
        "as it is": scores,
        "smoothed": gaussian_blur(scores[:, None], sigma)[:, 0],
        "own cell raised": scores + inside,
    }


def share_inside(scores: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """(B,) share of the top quarter of the pixels that lies in the cell."""
    inside = inside.flatten(1)
    return top_share(scores.flatten(1), inside, inside.sum(1))


def measure_map(
    passes: TargetPasses,
    mosaics: torch.Tensor,
    target: torch.Tensor,
    scores: torch.Tensor,
    inside: torch.Tensor,
    normalization: Normalization,
    grid: tuple[int, int],
) -> dict[str, dict[str, float | None]]:
    """Pointing and areas of one map a question; means over the four questions of a mosaic and both references."""
    found = {"pointing": share_inside(scores, inside)}
    for unit, cells in (("pixels", None), ("patches", grid)):
        curves = [
            deletion_insertion_curves(
                passes,
                mosaics,
                normalization.normalize(reference_image(normalization.denormalize(mosaics), reference)),
                scores,
                target,
                fractions=ELEVEN,
                cells=cells,
            )
            for reference in REFERENCES
        ]
        found[f"{unit}, deletion"] = torch.stack([one.deletion_auc for one in curves]).mean(0)
        found[f"{unit}, insertion"] = torch.stack([one.insertion_auc for one in curves]).mean(0)
    means = {name: values.float().cpu().view(-1, CELLS).mean(1).numpy() for name, values in found.items()}
    summaries = {name: bootstrap(values, 0, name) for name, values in means.items()}
    return {name: {"mean": one.mean, "low": one.low, "high": one.high} for name, one in summaries.items()}


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, object]:
    """All maps of all explainers on the same mosaics."""
    try:
        explainers = {
            name: AhaExplainer.from_pretrained(name, classifier=args.classifier).eval() for name in args.explainers
        }
        dataset, column = load_photographs(args.dataset, split=args.split)
    except (OSError, ValueError) as error:
        sys.exit(f"Nothing was measured: {error}")
    host = next(iter(explainers.values()))
    dataset = dataset.shuffle(seed=0).select(range(min(args.rows, len(dataset))))
    photographs = Photographs(dataset, column, ProcessorCrop(host.image_processor))
    pixel_values = collate([photographs[row] for row in range(len(photographs))]).pixel_values
    if pixel_values is None:
        sys.exit(f"None of the {len(photographs)} photographs can be read.")
    passes = TargetPasses(host.classifier, compiled=args.compile)
    probability, predicted = torch.cat([passes(part) for part in pixel_values.split(20)]).float().softmax(-1).max(-1)
    groups = choose_groups(predicted, probability, min_probability=args.min_probability)[: args.mosaics]
    if not len(groups):
        sys.exit(
            f"No four of {len(pixel_values)} photographs are confidently put into different classes; give more --rows."
        )
    mosaics = make_mosaics(pixel_values, groups).repeat_interleave(CELLS, 0)
    target, size = predicted[groups].flatten(), mosaics.shape[-2:]
    inside, sigma = inside_cells(size, len(groups)), args.smoothing * size[1]
    grid = host.classifier.grid(*size)
    norm = Normalization(host.config.image_mean, host.config.image_std)
    found = {}
    for name, explainer in explainers.items():
        batches = zip(mosaics.split(16), target.split(16), strict=True)
        scores = torch.cat([explainer(images, classes).scores for images, classes in batches])
        found[Path(name).name] = {
            kind: measure_map(passes, mosaics, target, varied, inside, norm, grid)
            for kind, varied in variants(scores, inside, sigma).items()
        }
    return {
        "dataset": Path(args.dataset).name,
        "split": args.split,
        "mosaics": len(groups),
        "smoothing_sigma": sigma,
        "fractions": len(ELEVEN),
        "explainers": found,
    }


def results_table(result: Mapping[str, object]) -> str:
    """The measurements as Markdown."""
    rows = []
    for name, by_kind in result["explainers"].items():
        for kind, entry in by_kind.items():
            cells = [f"{one['mean']:.3f}" for one in entry.values()]
            if entry["pointing"]["low"] is not None:
                cells[0] += f" [{entry['pointing']['low']:.3f}, {entry['pointing']['high']:.3f}]"
            rows.append([name, kind, *map(Markdown, cells)])
    columns = next(iter(next(iter(result["explainers"].values())).values()))
    head = f"{result['mosaics']} mosaics, {CELLS * result['mosaics']} questions; both references:"
    return f"{head}\n\n{table(['explainer', 'map', *columns], rows)}\n\n{provenance_line(result)}"


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Measure, print the table, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--explainers",
        nargs="+",
        default=["imagenette-demo", "imagenette-demo-gradient"],
        metavar="ID",
        help="of one classifier (default: %(default)s)",
    )
    parser.add_argument("--classifier", help="of all, where they do not find it themselves")
    parser.add_argument("--dataset", required=True, help="photographs of the classifier's classes")
    parser.add_argument("--split", default="validation", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=200, help="photographs to choose from (default: 200)")
    parser.add_argument("--mosaics", type=int, default=8, help="at most (default: 8)")
    parser.add_argument(
        "--min-probability",
        type=float,
        default=MIN_PROBABILITY,
        help="of a photograph alone (default: %(default)s)",
    )
    parser.add_argument(
        "--smoothing", type=float, default=0.12, help="sigma of the smoothed map, share of the width (default: 0.12)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the classifier's passes")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {**provenance(__file__, argv, find_device("cpu")), **measure(args)}
    print(results_table(result))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
