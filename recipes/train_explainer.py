#!/usr/bin/env python
"""Train an explainer for an image classifier.

    accelerate launch recipes/train_explainer.py recipes/vit-s14-imagenette/explainer.yaml --classifier DIR_OR_ID \
        --dataset DIR_OR_ID

Any setting of the YAML file can be overridden on the command line. The trained explainer lies in OUTPUT_DIR/final, in
Hub layout.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from accelerate.utils import set_seed
from PIL import Image

from hf_aha import AhaExplainer
from hf_aha.arguments import parse_yaml_and_command_line
from hf_aha.data import Photographs, ProcessorCrop, RandomCrop, load_photographs
from hf_aha.trainer import AhaTrainer, UnreadableDataError
from hf_aha.training_args import AhaTrainingArguments


@dataclass
class RecipeArguments(AhaTrainingArguments):
    """Settings of the trainer, and what is trained on what."""

    classifier: str | None = field(default=None, metadata={"help": "Classifier to explain: Hub id or folder."})
    classifier_revision: str | None = None
    dataset: str | None = field(default=None, metadata={"help": "Photographs: Hub id or folder."})
    dataset_config: str | None = None
    train_split: str = "train"
    validation_split: str | None = field(default="validation", metadata={"help": "Empty for no validation."})
    image_column: str | None = None
    label_column: str | None = None
    encoder: str | None = field(default=None, metadata={"help": "Separate frozen backbone for the tokens."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa or eager; eager trains faster on CPUs."}
    )
    classifier_dtype: str = field(
        default="float32",
        metadata={"help": "float32 or bfloat16; bfloat16 weights spare a cast in every pass, 12 to 18 % on CPUs."},
    )
    init_from: str | None = field(
        default=None, metadata={"help": "Explainer of the same classifier whose decoder training goes on."}
    )
    taps: list[int] | None = None
    grid_width: int | None = None
    grid_depth: int | None = None
    quarter_width: int | None = None
    half_width: int | None = None
    local_files_only: bool = False

    CLASSIFIER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    DECODER_SIZES = ("grid_width", "grid_depth", "quarter_width", "half_width")

    def __post_init__(self):
        super().__post_init__()
        for name in ("classifier", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give it in the YAML file or as --{name}.")
        if self.classifier_dtype not in self.CLASSIFIER_DTYPES:
            raise ValueError(f"classifier_dtype must be float32 or bfloat16, but it is {self.classifier_dtype!r}.")
        if self.classifier_dtype == "bfloat16" and self.mixed_precision != "bf16":
            raise ValueError(
                f"classifier_dtype bfloat16 goes with mixed_precision bf16 only, but that is {self.mixed_precision!r}."
            )
        if self.init_from is not None:
            for name in ("classifier_revision", "encoder", "taps", *self.DECODER_SIZES):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} does not go with init_from, whose explainer settles it; leave it out.")


def build_explainer(args: RecipeArguments) -> AhaExplainer:
    hub = {"local_files_only": args.local_files_only}
    attention = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    if args.init_from is not None:
        explainer = AhaExplainer.from_pretrained(
            args.init_from, classifier=args.classifier, dtype="float32", **attention, **hub
        )
    else:
        sizes = {name: getattr(args, name) for name in args.DECODER_SIZES}
        explainer = AhaExplainer.from_classifier(
            args.classifier,
            revision=args.classifier_revision,
            encoder=args.encoder,
            taps=args.taps,
            **{name: size for name, size in sizes.items() if size is not None},
            **attention,
            **hub,
        )
    # After loading, so that the fingerprint of a new explainer is that of full precision.
    explainer.classifier.model.to(args.CLASSIFIER_DTYPES[args.classifier_dtype])
    return explainer


def build_datasets(args: RecipeArguments, explainer: AhaExplainer) -> tuple[Photographs, Photographs | None]:
    common = {"config_name": args.dataset_config, "image_column": args.image_column}
    rows, column = load_photographs(args.dataset, split=args.train_split, **common)
    config = explainer.config
    size = (args.image_size, args.image_size) if args.image_size else tuple(config.image_size)
    resample = getattr(explainer.image_processor, "resample", None)
    crop = RandomCrop(
        size,
        tuple(config.image_mean),
        tuple(config.image_std),
        scale=tuple(args.crop_scale),
        resample=Image.Resampling.BICUBIC if resample is None else int(resample),
    )
    train = Photographs(rows, column, crop, args.label_column, seed=args.seed)
    if not args.validation_split:
        return train, None
    rows, column = load_photographs(args.dataset, split=args.validation_split, **common)
    # Rows of a class often stand together, so a plain prefix would hold one class only.
    rows = rows.shuffle(seed=args.seed)
    return train, Photographs(rows, column, ProcessorCrop(explainer.image_processor), args.label_column)


def main(argv: list[str] | None = None) -> AhaExplainer:
    args = parse_yaml_and_command_line(RecipeArguments, sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)  # the weights of a new decoder
    try:
        explainer = build_explainer(args)
        trainer = AhaTrainer(explainer, args, *build_datasets(args, explainer))
    except (OSError, ValueError) as error:
        raise SystemExit(f"The training cannot start: {error}") from error
    try:
        return trainer.train()
    except (FileExistsError, FileNotFoundError, FloatingPointError, UnreadableDataError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
