#!/usr/bin/env python
"""Train an explainer for a classifier and share it, in Python from beginning to end.

    python examples/train_and_push.py google/vit-base-patch16-224 my-photographs YOUR_NAME/aha-vit-b16

The classifier is an id of the Hub or a folder, the photographs an image folder, a folder of parquet files or a
data set of the Hub; they need no labels. Log in with `hf auth login` first. `recipes/train_explainer.py` does the
same from a YAML file, with more settings; without REPO_ID nothing is uploaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import disable_progress_bars

from hf_aha import AhaExplainer, AhaTrainer, AhaTrainingArguments, push_explainer
from hf_aha.data import Photographs, ProcessorCrop, RandomCrop, load_photographs


def main(argv: Sequence[str] | None = None) -> AhaExplainer:
    """Train, upload, and return the trained explainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", help="the model to explain: Hub id or folder")
    parser.add_argument("dataset", help="photographs of the kind it sees: folder or Hub id")
    parser.add_argument("repo_id", nargs="?", help="where to share it; nowhere when left out")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--output", default="runs/example", metavar="DIR", help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that decode photographs (default: %(default)s)"
    )
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16", "fp16"), help="(default: %(default)s)")
    parser.add_argument("--validation-split", default="validation", help="'' for none (default: %(default)s)")
    arguments = parser.parse_args(argv)
    disable_progress_bars()

    explainer = AhaExplainer.from_classifier(arguments.classifier)
    config = explainer.config
    crop = RandomCrop(tuple(config.image_size), tuple(config.image_mean), tuple(config.image_std))
    rows, column = load_photographs(arguments.dataset, split="train")
    training, validation = Photographs(rows, column, crop), None
    if arguments.validation_split:
        rows, column = load_photographs(arguments.dataset, split=arguments.validation_split)
        # Validation looks at whole photographs, as those who use the explainer will.
        validation = Photographs(rows.shuffle(seed=0), column, ProcessorCrop(explainer.image_processor))

    settings = AhaTrainingArguments(
        output_dir=arguments.output,
        max_steps=arguments.steps,
        per_device_batch_size=arguments.batch_size,
        dataloader_num_workers=arguments.workers,
        mixed_precision=arguments.precision,
    )
    explainer = AhaTrainer(explainer, settings, training, validation).train()
    print(f"The explainer lies in {arguments.output}/final.")
    if arguments.repo_id:
        commit = push_explainer(explainer, arguments.repo_id, private=arguments.private or None)
        print(f"It is shared as {arguments.repo_id}: {commit.commit_url}")
    return explainer


if __name__ == "__main__":
    main()
