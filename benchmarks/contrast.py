"""How a forward-only explainer should answer "why a rather than b": four ways and the plain map of a, compared.

    python benchmarks/contrast.py --dataset DIR_OR_ID --output benchmarks/results/contrast.json

Two kinds of image: mosaics, the middle halves of two photographs of different classes side by side, both photographs
correctly and confidently classified alone, asked about the more probable of the two classes rather than the other; and
single photographs, asked about the predicted class rather than the runner-up.

The number is the area under the insertion curve minus that under the deletion curve, both of p(a) - p(b)
(`deletion_insertion_curves(..., against=b)`), blurred and mean reference, pixels and patch cells. The first half of
the rows is there to choose a way, the second to report it; differences to the plain map are paired, with a bootstrap
interval over images. For mosaics it is also told where the most important quarter of the pixels lies (in a's half?)
and the least important one (in b's half?), and what removing the least important pixels does to p(a) - p(b).

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
from hf_aha.contrast_aha import contrast_scores
from hf_aha.data import Photographs, ProcessorCrop, collate, load_photographs
from hf_aha.metrics.curves import deletion_insertion_curves
from hf_aha.metrics.discrimination import runner_up
from hf_aha.metrics.passes import TargetPasses
from hf_aha.metrics.rank_maps import average_ranks
from hf_aha.metrics.results import bootstrap
from hf_aha.perturbation import Normalization, reference_image
from hf_aha.ranking import hard_masks


PLAIN = "plain map of a"
WAYS = (PLAIN, "standardised scores", "half of b", "ranks", "class vectors")
ELEVEN = tuple(step / 10 for step in range(11))
SETTINGS = ("blur/pixel", "blur/cell", "mean/pixel", "mean/cell")
CONFIDENT = 0.7
LOW_ENDS = (0.1, 0.2, 0.3)


@torch.no_grad()
def maps_of(explainer: AhaExplainer, pixel_values: torch.Tensor, pairs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every way's map (B, H, W) of the class pairs[:, 0] rather than pairs[:, 1]."""
    tokens, _ = explainer.features(pixel_values)
    features = explainer.decoder.encode(tokens, pixel_values)
    vectors = explainer.classifier.class_vectors(pairs)
    a, b = (explainer.decoder.decode(features, vectors[:, place]) for place in (0, 1))
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    ranks = [average_ranks(scores.flatten(1)).view_as(scores) for scores in (a, b)]
    contrast = contrast_scores(a, b)
    return {
        PLAIN: a,
        "standardised scores": contrast,
        # z(a) - z(b) / 2, because z(a) is the contrast with a flat map.
        "half of b": (contrast + contrast_scores(a, torch.zeros_like(a))) / 2,
        "ranks": ranks[0] - ranks[1],
        "class vectors": explainer.decoder.decode(features, unit[:, 0] - unit[:, 1]),
    }


def mosaic_pairs(predicted: torch.Tensor, probability: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, int]]:
    """Rows of correctly and confidently classified photographs in pairs of different classes, each used once."""
    left = ((predicted == labels) & (probability >= CONFIDENT)).nonzero()[:, 0].tolist()
    pairs = []
    while left:
        first = left.pop(0)
        second = next((row for row in left if labels[row] != labels[first]), None)
        if second is not None:
            left.remove(second)
            pairs.append((first, second))
    return pairs


def side_by_side(pixel_values: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(len(pairs), 3, H, W): the middle half of the first photograph left, that of the second right."""
    width = pixel_values.shape[-1]
    left, start = width // 2, width // 4
    first, second = (pixel_values[[pair[place] for pair in pairs]] for place in (0, 1))
    return torch.cat([first[..., start : start + left], second[..., start : start + width - left]], dim=-1)


def values_of(
    passes: TargetPasses,
    normalization: Normalization,
    pixel_values: torch.Tensor,
    pairs: torch.Tensor,
    scores: torch.Tensor,
    grid: tuple[int, int],
    settings: Sequence[str],
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(B,) insertion minus deletion area of each setting; and (B, len(LOW_ENDS)) what removing a low end does.

    The latter is p(a) - p(b) without the least important share of the pixels or cells, minus with it, the mean over
    the settings.
    """
    values, low = {}, []
    kept = [10 - round(10 * share) for share in LOW_ENDS]
    for setting in settings:
        kind, unit = setting.split("/")
        curves = deletion_insertion_curves(
            passes,
            pixel_values,
            normalization.normalize(reference_image(normalization.denormalize(pixel_values), kind)),
            scores,
            pairs[:, 0],
            against=pairs[:, 1],
            fractions=ELEVEN,
            cells=grid if unit == "cell" else None,
        )
        values[setting] = curves.insertion_auc - curves.deletion_auc
        low.append(curves.insertion[:, kept] - curves.insertion[:, -1:])
    return values, torch.stack(low).mean(0)


def halves(scores: torch.Tensor, left_is_a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) share of the top quarter of the pixels in the half of a, and of the bottom quarter in the half of b."""
    quarter = torch.tensor([scores[0].numel() // 4])
    shares = []
    for signed, wants_left in ((scores, left_is_a), (-scores, ~left_is_a)):
        mask = hard_masks(signed.flatten(1), quarter)[:, 0].view_as(scores)
        in_left = mask[..., : scores.shape[-1] // 2].sum((1, 2)) / mask.sum((1, 2))
        shares.append(torch.where(wants_left, in_left, 1 - in_left))
    return shares[0], shares[1]


def summary(values: torch.Tensor) -> dict[str, float | int | None]:
    """Mean and 95% bootstrap interval over images."""
    found = bootstrap(values.numpy(), 0, "contrast")
    return {"mean": found.mean, "low": found.low, "high": found.high, "images": found.images}


def measure_set(
    explainer: AhaExplainer,
    pixel_values: torch.Tensor,
    pairs: torch.Tensor,
    left_is_a: torch.Tensor | None,
    settings: Sequence[str],
) -> dict[str, object]:
    """Every way on one kind of image."""
    passes = TargetPasses(explainer.classifier)
    normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
    grid = explainer.classifier.grid(*pixel_values.shape[-2:])
    measured, ways = {}, {}
    for way, scores in maps_of(explainer, pixel_values, pairs).items():
        values, low_ends = values_of(passes, normalization, pixel_values, pairs, scores, grid, settings)
        # The mean of the settings is what a way is chosen by.
        values["mean"] = torch.stack(list(values.values())).mean(0)
        measured[way] = values
        ways[way] = {
            "value": {name: summary(each) for name, each in values.items()},
            "minus_plain": {name: summary(each - measured[PLAIN][name]) for name, each in values.items()},
            "without_low_end": {f"{share:g}": summary(low_ends[:, place]) for place, share in enumerate(LOW_ENDS)},
        }
        if left_is_a is not None:
            top, bottom = halves(scores, left_is_a)
            ways[way]["top_quarter_in_a"], ways[way]["bottom_quarter_in_b"] = summary(top), summary(bottom)
    with torch.no_grad():
        probability = torch.cat([passes(part).float().cpu() for part in pixel_values.split(40)]).softmax(-1)
    means = probability.gather(1, pairs.cpu()).mean(0).tolist()
    return {"images": len(pairs), "mean_probability": {"a": means[0], "b": means[1]}, "ways": ways}


def measure_part(
    explainer: AhaExplainer,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    singles: int,
    settings: Sequence[str],
) -> dict[str, object]:
    """Both kinds of image from one part of the rows."""
    passes = TargetPasses(explainer.classifier)
    with torch.no_grad():
        logits = torch.cat([passes(part).float().cpu() for part in pixel_values.split(40)])
    probability, predicted = logits.softmax(-1).max(-1)
    rows = mosaic_pairs(predicted, probability, labels)
    found = {}
    if rows:
        mosaics = side_by_side(pixel_values, rows)
        with torch.no_grad():
            logits_of_mosaics = torch.cat([passes(part).float().cpu() for part in mosaics.split(40)])
        pairs = labels[torch.tensor(rows)]
        asked = logits_of_mosaics.gather(1, pairs)
        left_is_a = asked[:, 0] >= asked[:, 1]
        pairs = torch.where(left_is_a[:, None], pairs, pairs.flip(1))
        found["mosaics"] = measure_set(explainer, mosaics, pairs, left_is_a, settings)
    pairs = torch.stack([predicted, runner_up(logits, predicted)], 1)[:singles]
    found["photographs"] = measure_set(explainer, pixel_values[:singles], pairs, None, settings)
    return found


def measure(args: argparse.Namespace) -> dict[str, object]:
    """The comparison on both parts of the rows."""
    explainer = AhaExplainer.from_pretrained(args.explainer, classifier=args.classifier).eval()
    if getattr(explainer.config, "gradient_features", 0):
        sys.exit("The class vectors of a gradient-informed explainer cannot be subtracted; give a single-pass one.")
    dataset, column = load_photographs(args.dataset, split=args.split)
    dataset = dataset.shuffle(seed=0).select(range(args.rows))
    photographs = Photographs(dataset, column, ProcessorCrop(explainer.image_processor), args.label_column)
    batch = collate([photographs[row] for row in range(len(photographs))])
    half = len(batch.pixel_values) // 2
    parts = {"choosing": slice(None, half), "reporting": slice(half, None)}
    return {
        "explainer": Path(args.explainer).name,
        "dataset": Path(args.dataset).name,
        "split": args.split,
        "rows": {name: len(range(*rows.indices(len(batch.pixel_values)))) for name, rows in parts.items()},
        "fractions": len(ELEVEN),
        "settings": list(args.settings),
        **{
            name: measure_part(explainer, batch.pixel_values[rows], batch.labels[rows], args.singles, args.settings)
            for name, rows in parts.items()
        },
    }


def table(result: Mapping[str, object]) -> str:
    """The reporting part as Markdown, with the choosing part's mean beside it."""

    def shown(entry: Mapping[str, float], sign: str = "") -> str:
        if entry["low"] is None:
            return f"{entry['mean']:{sign}.3f}"
        return f"{entry['mean']:{sign}.3f} [{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]"

    lines = []
    for kind in ("mosaics", "photographs"):
        if kind not in result["reporting"]:
            continue
        found = result["reporting"][kind]
        lines += [
            f"{found['images']} {kind}, mean probability {found['mean_probability']['a']:.2f} of a and "
            f"{found['mean_probability']['b']:.2f} of b:",
            "",
            "| way | insertion - deletion of p(a) - p(b) | minus plain, paired | the same on the rows to choose on | "
            "top quarter in a's half | bottom quarter in b's half | p(a) - p(b) without the lowest 20 % |",
            "|---|---|---|---|---|---|---|",
        ]
        for way, entry in found["ways"].items():
            chosen = result["choosing"].get(kind, {"ways": {}})["ways"].get(way)
            cells = [
                way,
                shown(entry["value"]["mean"]),
                "-" if way == PLAIN else shown(entry["minus_plain"]["mean"], "+"),
                "-" if way == PLAIN or chosen is None else shown(chosen["minus_plain"]["mean"], "+"),
                *(
                    shown(entry[name]) if name in entry else "-"
                    for name in ("top_quarter_in_a", "bottom_quarter_in_b")
                ),
                shown(entry["without_low_end"]["0.2"], "+"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, provenance_line(result)])


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Measure, print the tables, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--explainer", default="imagenette-demo", help="name, folder or Hub id (default: %(default)s)")
    parser.add_argument("--classifier", help="its classifier, where the explainer does not say")
    parser.add_argument("--dataset", required=True, help="labelled photographs of the classifier's classes")
    parser.add_argument("--split", default="validation", help="(default: %(default)s)")
    parser.add_argument("--label-column", default="label", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=200, help="rows taken, half of them to choose on (default: 200)")
    parser.add_argument("--singles", type=int, default=40, help="single photographs of each half (default: 40)")
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        default=SETTINGS,
        metavar="REFERENCE/UNIT",
        help=f"how curves are made (default: {' '.join(SETTINGS)})",
    )
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {**provenance(__file__, argv, find_device("cpu")), **measure(args)}
    print(table(result))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
