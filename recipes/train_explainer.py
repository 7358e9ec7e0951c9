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
from typing import Any

import torch
from accelerate.utils import set_seed
from PIL import Image

from hf_aha import AhaExplainer
from hf_aha.arguments import parse_yaml_and_command_line
from hf_aha.batch_size import BatchDoesNotFitError
from hf_aha.checkpoints import CheckpointError
from hf_aha.data import (
    Photographs,
    ProcessorCrop,
    RandomCrop,
    UnreadableDataError,
    find_label_column,
    load_photographs,
)
from hf_aha.stop_signals import LostWorkerError
from hf_aha.streaming import PhotographStream, stream_photographs
from hf_aha.tracking import TrackerError
from hf_aha.trainer import AhaTrainer
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
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the images; found by its type if there is one only."}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "Column of class numbers; found if there is one only, where a setting asks for label."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the dataset while training instead of storing it first."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Streaming: rows that every worker holds to shuffle them; 0 for none."}
    )
    cache_size: int | None = field(
        default=None,
        metadata={"help": "Store every photograph once, with this shorter side in pixels, and train on the copies."},
    )
    encoder: str | None = field(default=None, metadata={"help": "Separate frozen backbone for the tokens."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa or eager; eager trains faster on CPUs."}
    )
    classifier_dtype: str = field(
        default="float32",
        metadata={"help": "float32 or bfloat16; bfloat16 weights spare a cast in every pass, 12 to 18 % on CPUs."},
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Explainer to start from: of the same classifier, to train it further, or of another, of whose "
            "decoder every part that fits is taken over."
        },
    )
    taps: list[int] | None = None
    grid_width: int | None = None
    grid_depth: int | None = None
    quarter_width: int | None = None
    half_width: int | None = None
    gradient_features: int | None = field(
        default=None, metadata={"help": "Points a reference at which the decoder is given the classifier's gradient."}
    )
    gradient_references: list[str] | None = None
    gradient_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Layers whose tokens the gradients attribute to, from 1, for two points and more."},
    )
    gradient_detail: bool | None = field(
        default=None, metadata={"help": "The gradient's score of single pixels passes beside the smoothing filter."}
    )
    local_files_only: bool = False

    CLASSIFIER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    DECODER_SETTINGS = (
        "grid_width",
        "grid_depth",
        "quarter_width",
        "half_width",
        "gradient_features",
        "gradient_references",
        "gradient_layers",
        "gradient_detail",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("classifier", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give it in the YAML file or as --{name}.")
        if self.shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must not be negative, but it is {self.shuffle_buffer}; 0 is for none.")
        if self.cache_size is not None and self.cache_size < 1:
            raise ValueError(f"cache_size must be at least 1 pixel, but it is {self.cache_size}.")
        if self.streaming and self.cache_size is not None:
            raise ValueError(
                f"cache_size={self.cache_size} stores copies of the whole split, which streaming never holds; leave "
                "one of the two out."
            )
        if self.classifier_dtype not in self.CLASSIFIER_DTYPES:
            raise ValueError(f"classifier_dtype must be float32 or bfloat16, but it is {self.classifier_dtype!r}.")
        if self.classifier_dtype == "bfloat16" and self.mixed_precision != "bf16":
            raise ValueError(
                f"classifier_dtype bfloat16 goes with mixed_precision bf16 only, but that is {self.mixed_precision!r}."
            )


def build_explainer(args: RecipeArguments) -> AhaExplainer:
    hub = {"local_files_only": args.local_files_only}
    attention = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    settings = {name: getattr(args, name) for name in args.DECODER_SETTINGS}
    explainer = AhaExplainer.from_classifier(
        args.classifier,
        init_from=args.init_from,
        revision=args.classifier_revision,
        encoder=args.encoder,
        taps=args.taps,
        **{name: value for name, value in settings.items() if value is not None},
        **attention,
        **hub,
    )
    # After loading, so that the fingerprint of a new explainer is that of full precision.
    explainer.classifier.model.to(args.CLASSIFIER_DTYPES[args.classifier_dtype])
    return explainer


def start_line(start: dict[str, Any]) -> str:
    """What `config.init_from` holds, as a sentence of the log."""
    copied, new = (", ".join(start[which]) or "nothing" for which in ("copied", "new"))
    return f"The decoder starts from {start['explainer']} of {start['base_model']}: copied {copied}; new {new}."


def build_datasets(
    args: RecipeArguments, explainer: AhaExplainer
) -> tuple[Photographs | PhotographStream, Photographs | PhotographStream | None]:
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
    load = stream_photographs if args.streaming else load_photographs
    common = {"config_name": args.dataset_config, "image_column": args.image_column}
    rows, column = load(args.dataset, split=args.train_split, **common)
    labels = args.label_column
    if labels is None and "label" in (args.target_classes, args.second_class):
        labels = find_label_column(rows.features)
    if args.streaming:
        train = PhotographStream(rows, column, crop, labels, seed=args.seed, shuffle_buffer=args.shuffle_buffer)
    else:
        copies = {"cache_size": args.cache_size, "cache_processes": args.dataloader_num_workers}
        train = Photographs(rows, column, crop, labels, seed=args.seed, **copies)
    if not args.validation_split:
        return train, None
    rows, column = load(args.dataset, split=args.validation_split, **common)
    as_users_see = ProcessorCrop(explainer.image_processor)
    if args.streaming:
        return train, PhotographStream(rows, column, as_users_see, labels, args.seed, args.shuffle_buffer)
    # Rows of a class often stand together, so a plain prefix would hold one class only.
    rows = rows.shuffle(seed=args.seed)
    return train, Photographs(rows, column, as_users_see, labels)


def main(argv: list[str] | None = None) -> AhaExplainer:
    args = parse_yaml_and_command_line(RecipeArguments, sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)  # the weights of a new decoder
    try:
        explainer = build_explainer(args)
        trainer = AhaTrainer(explainer, args, *build_datasets(args, explainer))
    except (OSError, ValueError, BatchDoesNotFitError) as error:
        raise SystemExit(f"The training cannot start: {error}") from error
    if explainer.config.init_from is not None:
        trainer.accelerator.print(start_line(explainer.config.init_from))
    try:
        return trainer.train()
    except (
        OSError,
        CheckpointError,
        FloatingPointError,
        LostWorkerError,
        UnreadableDataError,
        BatchDoesNotFitError,
        TrackerError,
    ) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
