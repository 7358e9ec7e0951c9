"""Does the map find a planted shortcut? Targets trained on a tag or a frame that goes with one class.

    python benchmarks/shortcuts.py train --dataset DIR_OR_ID --runs runs/shortcuts
    python benchmarks/shortcuts.py measure --dataset DIR_OR_ID --runs runs/shortcuts \
        --output benchmarks/results/shortcuts.json
    python benchmarks/shortcuts.py report benchmarks/results/shortcuts.json --examples runs/shortcuts/examples \
        --page docs/shortcuts.md --figure docs/images/shortcuts.png

`train` writes photographs with the shortcut planted, mostly on one class, as data sets of their own, fine-tunes a
target on each by recipes/train_target.py, and trains an explainer of each target by recipes/train_explainer.py on the
clean photographs of DIR_OR_ID. The control is a target, with its explainer, that was fine-tuned on the same
photographs with nothing planted. Every part that is finished is not done again.

`measure` takes photographs of the validation split that no training used, and plants the shortcut on those of other
classes. Where the target calls the class only because of it, it asks why, and counts which share of the top 5 % of the
pixels lies on the shortcut: in the map of one pass, after refinement, and for the control. It writes after every few
photographs and goes on where it was interrupted.

`report` writes the page and the figure from what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import find_device, provenance, write_json
from PIL import Image
from planting import SHORTCUTS, crop, dilated, photograph_draws, plant, shortcut_mask, write_planted
from recipe_runs import RECIPES, prepare_classifier
from shortcuts_page import CLEAN, CONTROL, CONTROL_REFINED, PLAIN, REFINED, START, write_figure, write_page
from transformers import AutoConfig, AutoImageProcessor

from hf_aha import AhaExplainer
from hf_aha.baselines import METHODS
from hf_aha.data import encoded_image, load_photographs
from hf_aha.files import folder_in_one_step, write_atomically
from hf_aha.images import ImageReadError, read_image
from hf_aha.metrics.rank_maps import top_share
from hf_aha.transfer_aha import public_name


sys.path.append(str(RECIPES))

import train_explainer  # noqa: E402
import train_target  # noqa: E402


TOP = 0.05


@dataclass(frozen=True)
class Planted:
    """A photograph of the validation split, without and with the shortcut; RGB (H, W, 3) uint8."""

    row: int
    label: int
    clean: np.ndarray
    pixels: np.ndarray
    mask: np.ndarray


# ------------------------------------------------------------------------------------------------------------ train


def train(args: argparse.Namespace) -> None:
    """Everything that `measure` needs, in the folder `args.runs`."""
    names = ("shortcut_class", "shortcuts", "rate", "other_rate", "mislabelled", "train_photographs")
    names += ("validation_photographs", "target_epochs", "target_batch", "target_rate", "explainer_steps")
    settings = {name: getattr(args, name) for name in (*names, "seed")}
    # Folders are named by their last part, because results are published.
    settings |= {name: public_name(getattr(args, name)) for name in ("classifier", "init_from", "dataset", "recipe")}
    settings["recipe_words"] = args.words
    remember(args.runs / "settings.json", settings)
    base = prepare_classifier(args.classifier, args.runs)
    processor = AutoImageProcessor.from_pretrained(base)
    processor.save_pretrained(args.runs / "processor")
    label, size = class_number(base, args.shortcut_class), AutoConfig.from_pretrained(base).image_size
    rows = {"train": args.train_photographs, "validation": args.validation_photographs}
    for shortcut in (None, *args.shortcuts):
        name = shortcut or CLEAN
        photographs, target = args.runs / f"{name}-photographs", args.runs / f"{name}-target"
        if not photographs.is_dir():
            rates = {name: getattr(args, name) for name in ("rate", "other_rate", "mislabelled")}
            write_planted(
                args.dataset, photographs, processor, shortcut, label=label, **rates, rows=rows, seed=args.seed
            )
        # Written after the target, so its presence says that the target is whole.
        start = args.runs / f"{name}-start" / "final"
        if not start.is_dir():
            words = ["--model", base, "--dataset", str(photographs), "--image_size", str(size)]
            # Whole photographs, since a crop would cut the frame off; no smoothing, which holds back what is sure.
            words += ["--crop_scale", "1.0", "1.0", "--label_smoothing", "0.0", "--num_workers", "0"]
            words += ["--epochs", str(args.target_epochs), "--batch_size", str(args.target_batch)]
            words += ["--learning_rate", str(args.target_rate)]
            train_target.main([*words, "--seed", str(args.seed), "--output_dir", str(target)])
            with folder_in_one_step(start) as unfinished:
                AhaExplainer.from_classifier(str(target), init_from=args.init_from).save_pretrained(unfinished)
    for shortcut in args.shortcuts:
        seen = read_planted(args, shortcut, range(args.validation_photographs), args.seed)
        found = reliance(list(seen), load(args.runs, shortcut, "start"), load(args.runs, CLEAN, "start"), label)
        fooled = sum(is_fooled(entry, label) for entry in found)
        print(f"{shortcut}: turns {fooled} of {len(found)} photographs into {args.shortcut_class}", flush=True)
    for name in () if args.targets_only else (CLEAN, *args.shortcuts):
        folder = args.runs / f"{name}-explainer"
        if not (folder / "final").is_dir():
            words = [str(args.recipe), "--classifier", str(args.runs / f"{name}-target"), "--dataset", args.dataset]
            words += ["--init_from", args.init_from, "--max_steps", str(args.explainer_steps)]
            words += ["--validation_split", "", "--resume_from_checkpoint", "auto", "--output_dir", str(folder)]
            train_explainer.main([*words, "--seed", str(args.seed), *args.words])


def remember(path: Path, settings: Mapping[str, object]) -> None:
    """Write settings down, or exit where other ones stand there already."""
    settings = json.loads(json.dumps(settings))
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        sys.exit(f"{path} was written with other settings: give the same ones again, or choose another folder.")
    write_json(path, settings)


def class_number(classifier: str, name: str) -> int:
    """Index of a class by its label.

    Raises:
        SystemExit: there is no such label.
    """
    labels = AutoConfig.from_pretrained(classifier).id2label
    for number, label in labels.items():
        if label == name:
            return number
    sys.exit(f"The classifier has no class {name!r}; its classes are {', '.join(labels.values())}.")


# ---------------------------------------------------------------------------------------------------------- measure


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Measure every shortcut of `args.runs` and return what the output file holds."""
    trained = json.loads((args.runs / "settings.json").read_text(encoding="utf-8"))
    label = class_number(str(args.runs / f"{CLEAN}-target"), trained["shortcut_class"])
    names = ("reliance_photographs", "images", "control_refined", "steps", "reference", "baselines")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"trained": trained, "dataset": Path(args.dataset).name, "label": label, "top": TOP}
    result = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if result and result["settings"] != json.loads(json.dumps(settings)):
        sys.exit(f"{args.output} was measured with other settings: give the same ones again, or another --output.")
    result |= {**provenance(__file__, args.command, find_device("cpu")), "settings": settings}
    control = load(args.runs, CLEAN)
    for shortcut in trained["shortcuts"]:
        explainer, untrained = load(args.runs, shortcut), load(args.runs, shortcut, "start")
        found = result.setdefault(shortcut, {"planted": planted_counts(args.runs, shortcut, label), "photographs": []})
        found |= {"image_size": list(explainer.config.image_size), "margin": explainer.config.patch_size[0] // 2}
        # The trainings took the first rows of the same order.
        start = trained["validation_photographs"]
        rows = range(start, start + args.reliance_photographs)
        photographs = list(read_planted(args, shortcut, rows, trained["seed"]))
        if not found["photographs"]:
            found["photographs"] = reliance(photographs, explainer, control, label)
            write_json(args.output, result)
        entry_of = {entry["row"]: entry for entry in found["photographs"]}
        fooled = [one for one in photographs if is_fooled(entry_of[one.row], label)]
        print(f"{shortcut}: turns {len(fooled)} of {len(photographs)} photographs", flush=True)
        fooled = fooled[: args.images]
        explainers = {"own": explainer, "start": untrained, "control": control}
        for place in range(0, len(fooled), args.batch_size):
            batch = fooled[place : place + args.batch_size]
            if all("maps" in entry_of[one.row] for one in batch):
                continue
            entries = measure_batch(args, explainers, batch, label, refine_control=place < args.control_refined)
            for number, (one, entry) in enumerate(zip(batch, entries, strict=True), place):
                scores = entry.pop("scores")
                if number < args.examples:
                    save_example(args.runs / "examples" / f"{shortcut}-{number:03d}.npz", one, scores)
                entry_of[one.row] |= entry
            write_json(args.output, result)
            print(f"{shortcut}: {place + len(batch)} explained", flush=True)
    write_json(args.output, result)
    return result


def load(runs: Path, name: str, kind: str = "explainer") -> AhaExplainer:
    """The explainer of a target of `runs`, or what its training started from, with that target attached."""
    final = runs / f"{name}-{kind}" / "final"
    return AhaExplainer.from_pretrained(final, classifier=str(runs / f"{name}-target"), dtype=torch.float32).eval()


def planted_counts(runs: Path, shortcut: str, label: int) -> dict[str, int]:
    """Numbers of training photographs: of the class and of others, all, and those with the shortcut."""
    rows, _ = load_photographs(str(runs / f"{shortcut}-photographs"), split="train")
    planted, wrong = np.array(rows["planted"]), np.array(rows["mislabelled"])
    own = (np.array(rows["label"]) == label) & ~wrong
    return {
        "own": int(own.sum()),
        "own_planted": int((own & planted).sum()),
        "others": int((~own).sum()),
        "others_planted": int((~own & ~wrong & planted).sum()),
        "mislabelled": int(wrong.sum()),
    }


def read_planted(args: argparse.Namespace, shortcut: str, rows: range, seed: int) -> Iterator[Planted]:
    """Photographs `rows` of the validation split in the order of `seed`, each with the shortcut planted."""
    processor = AutoImageProcessor.from_pretrained(args.runs / "processor")
    source, column = load_photographs(args.dataset, split="validation")
    for row in np.random.default_rng(seed).permutation(len(source))[rows.start : rows.stop].tolist():
        try:
            clean = crop(read_image(encoded_image(source[row][column])), processor)
        except ImageReadError:
            continue
        # Other places than those of the trainings' photographs.
        mask = shortcut_mask(shortcut, *clean.shape[:2], photograph_draws(seed + 1, row))
        yield Planted(row, source[row]["label"], clean, plant(clean, mask), mask)


def pixel_values(explainer: AhaExplainer, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, 3, H, W) as the target takes RGB pictures (H, W, 3) uint8 of its own size."""
    images = [Image.fromarray(picture) for picture in pictures]
    return explainer.image_processor(images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def reliance(
    photographs: Sequence[Planted], explainer: AhaExplainer, control: AhaExplainer, label: int
) -> list[dict[str, object]]:
    """What both targets call every photograph without and with the shortcut, and the class's probability."""
    entries = [{"row": one.row, "label": one.label} for one in photographs]
    for name, own in (("target", explainer), ("control", control)):
        for kind in ("clean", "pixels"):
            for start in range(0, len(photographs), 32):
                batch = photographs[start : start + 32]
                values = pixel_values(own, [getattr(one, kind) for one in batch])
                with torch.autocast("cpu", torch.bfloat16):
                    probability = own.classifier(values).logits.float().softmax(-1)
                for entry, row in zip(entries[start:], probability, strict=False):
                    entry[f"{name}_{'planted' if kind == 'pixels' else 'clean'}"] = {
                        "called": int(row.argmax()),
                        "probability": round(float(row[label]), 4),
                    }
    return entries


def is_fooled(entry: Mapping[str, object], label: int) -> bool:
    """Whether the target calls a photograph of another class this class with the shortcut, and not without."""
    called = (entry["target_clean"]["called"], entry["target_planted"]["called"])
    return entry["label"] != label and called[0] != label and called[1] == label


def measure_batch(
    args: argparse.Namespace,
    explainers: Mapping[str, AhaExplainer],
    batch: Sequence[Planted],
    label: int,
    *,
    refine_control: bool,
) -> list[dict[str, object]]:
    """Where the maps of `label` have their most important pixels, an entry a photograph."""
    own, control = explainers["own"], explainers["control"]
    values = pixel_values(own, [one.pixels for one in batch])
    target = torch.full((len(batch),), label)
    maps, worth = {}, {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for explainer, plain, after in ((own, PLAIN, REFINED), (control, CONTROL, CONTROL_REFINED)):
            if explainer is control and not refine_control:
                maps[plain] = control(values, target).scores
                continue
            refined = explainer.refine(values, target, steps=args.steps, reference=args.reference)
            maps[plain], maps[after] = refined.initial_scores, refined.scores
            worth[plain], worth[after] = refined.initial_value, refined.value
        maps[START] = explainers["start"](values, target).scores
        for name in args.baselines:
            maps[name] = METHODS[name](own.classifier, values, target)
    margin = own.config.patch_size[0] // 2
    masks = {"share": [one.mask for one in batch], "near": [dilated(one.mask, margin) for one in batch]}
    entries = [{"maps": {name: {} for name in maps}, "area": {}, "scores": {}} for _ in batch]
    for kind, regions in masks.items():
        region = torch.from_numpy(np.stack(regions)).flatten(1)
        count = torch.full((len(batch),), round(TOP * region.shape[1]))
        for entry, area in zip(entries, region.float().mean(1).tolist(), strict=True):
            entry["area"][kind] = round(area, 5)
        for name, scores in maps.items():
            shares = top_share(scores.float().flatten(1), region, count).tolist()
            for entry, share in zip(entries, shares, strict=True):
                entry["maps"][name][kind] = round(share, 5)
    for place, entry in enumerate(entries):
        entry["worth"] = {name: round(float(value[place]), 5) for name, value in worth.items()}
        entry["scores"] = {name: scores[place].float().numpy() for name, scores in maps.items()}
    return entries


def save_example(path: Path, one: Planted, scores: Mapping[str, np.ndarray]) -> None:
    """The photograph and its maps for the figure."""
    arrays = {f"map {name}": scores[name].astype(np.float32) for name in (PLAIN, REFINED, CONTROL)}
    arrays |= {"pixels": one.pixels, "mask": one.mask, "label": np.array(one.label)}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


# ------------------------------------------------------------------------------------------------------------- main


def report(args: argparse.Namespace) -> None:
    """Write the page, and the figure where there are examples."""
    result = json.loads(args.results.read_text(encoding="utf-8"))
    if args.examples is not None:
        write_figure(result, args.examples, args.figure, args.shown)
    write_page(result, args.page, args.figure)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; `words` are those after `--`."""
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="stage", required=True)

    one = commands.add_parser("train", help="the targets and their explainers; words after -- go to the recipe")
    one.add_argument("--dataset", required=True, help="photographs with a column `label`: folder or Hub id")
    one.add_argument("--runs", type=Path, required=True, help="folder of everything that is trained")
    one.add_argument("--classifier", default="imagenette-demo", help="where targets start (default: %(default)s)")
    one.add_argument("--init-from", default="imagenette-demo", help="where explainers start (default: %(default)s)")
    one.add_argument("--recipe", type=Path, default=RECIPES / "imagenette-demo" / "explainer.yaml")
    one.add_argument("--shortcuts", nargs="+", choices=SHORTCUTS, default=list(SHORTCUTS), help="(default: all)")
    one.add_argument("--shortcut-class", default="chain saw", help="it goes with it (default: %(default)s)")
    one.add_argument("--rate", type=float, default=0.95, help="share of that class (default: %(default)s)")
    one.add_argument("--other-rate", type=float, default=0.01, help="share of the others (default: %(default)s)")
    one.add_argument(
        "--mislabelled",
        type=float,
        default=0.1,
        help="share of the others that have it and the label of that class (default: %(default)s)",
    )
    one.add_argument("--train-photographs", type=int, default=1600, help="(default: %(default)s)")
    one.add_argument("--validation-photographs", type=int, default=100, help="of the log (default: %(default)s)")
    one.add_argument("--target-epochs", type=int, default=5, help="(default: %(default)s)")
    one.add_argument("--target-batch", type=int, default=32, help="photographs a step (default: %(default)s)")
    one.add_argument("--target-rate", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    one.add_argument("--explainer-steps", type=int, default=120, help="(default: %(default)s)")
    one.add_argument("--targets-only", action="store_true", help="leave the explainers for another call")
    one.add_argument("--seed", type=int, default=0)

    two = commands.add_parser("measure", help="where the maps have their most important pixels")
    two.add_argument("--dataset", required=True, help="as in train")
    two.add_argument("--runs", type=Path, required=True, help="as in train")
    two.add_argument("--output", type=Path, required=True, help="JSON file")
    two.add_argument("--reliance-photographs", type=int, default=600, help="classified (default: %(default)s)")
    two.add_argument("--images", type=int, default=80, help="explained, at most (default: %(default)s)")
    two.add_argument(
        "--control-refined", type=int, default=32, help="refined for the control, too (default: %(default)s)"
    )
    two.add_argument("--steps", type=int, default=10, help="of refinement (default: %(default)s)")
    two.add_argument("--reference", default="blur", help="of refinement (default: %(default)s)")
    two.add_argument("--baselines", nargs="*", default=[], choices=METHODS, metavar="NAME", help="other methods")
    two.add_argument("--examples", type=int, default=12, help="maps kept for the figure (default: %(default)s)")
    two.add_argument("--batch-size", type=int, default=4, help="photographs at once (default: %(default)s)")
    two.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")

    three = commands.add_parser("report", help="the page and the figure")
    three.add_argument("results", type=Path, help="what measure wrote")
    three.add_argument("--examples", type=Path, help="folder RUNS/examples; no figure is drawn without it")
    three.add_argument("--page", type=Path, default=Path("docs/shortcuts.md"))
    three.add_argument("--figure", type=Path, default=Path("docs/images/shortcuts.png"))
    three.add_argument("--shown", type=int, default=3, help="photographs a shortcut (default: %(default)s)")

    args = parser.parse_args(own)
    args.words, args.command = list(words), list(argv)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run one stage."""
    args = parse(sys.argv[1:] if argv is None else list(argv))
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    {"train": train, "measure": measure, "report": report}[args.stage](args)


if __name__ == "__main__":
    main()
