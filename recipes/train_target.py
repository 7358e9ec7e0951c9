#!/usr/bin/env python
"""Fine-tune an image classifier where a user has none to explain yet.

    python recipes/train_target.py recipes/imagenette-demo/target.yaml --dataset DIR_OR_ID --teacher DIR_OR_ID

The model starts from `model` (any `AutoModelForImageClassification`), or, with `keep_layers`, from a shallower copy of
a ViT `teacher`; with a teacher the loss is the cross-entropy plus the Kullback-Leibler divergence to the teacher's
probabilities on the same crop (Hinton et al., https://arxiv.org/abs/1503.02531) and, with `token_weight`, the distance
of the last tokens to the teacher's, which carries far more signal than ten probabilities.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
)

from hf_aha.arguments import parse_yaml_and_command_line
from hf_aha.data import Photographs, ProcessorCrop, RandomCrop, collate, load_photographs


@dataclass
class TargetArguments:
    """Everything that decides the trained classifier."""

    dataset: str = field(metadata={"help": "Dataset id of the Hub or a local folder."})
    output_dir: str = field(metadata={"help": "Where the classifier, its processor and the log are written."})
    model: str | None = field(default=None, metadata={"help": "Classifier to start from; not with keep_layers."})
    teacher: str | None = field(default=None, metadata={"help": "Classifier whose probabilities are distilled."})
    keep_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers of a ViT teacher to start a shallower student from."}
    )
    image_size: int = field(default=224, metadata={"help": "Side of the input in pixels."})
    train_split: str = "train"
    validation_split: str = "validation"
    image_column: str | None = None
    label_column: str = "label"
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 2e-4
    weight_decay: float = 0.05
    warmup_share: float = 0.1
    label_smoothing: float = 0.05
    distillation_weight: float = field(default=0.8, metadata={"help": "Share of the teacher in the loss, 0 to 1."})
    distillation_temperature: float = 2.0
    token_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the distance of the last tokens to the teacher's; same widths needed."},
    )
    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])
    mixed_precision: str = "bf16"
    num_workers: int = 1
    seed: int = 0
    final_image_size: int | None = field(
        default=None, metadata={"help": "Side the trained ViT is saved for: positions are interpolated to it."}
    )
    final_resize: int | None = field(
        default=None, metadata={"help": "Shortest edge before the final centre crop; final_image_size when left out."}
    )
    model_dtype: str = field(default="float16", metadata={"help": "Precision of the saved weights."})

    def __post_init__(self):
        if (self.model is None) == (self.keep_layers is None):
            raise ValueError("Give exactly one of model (a classifier id) and keep_layers (with a ViT teacher).")
        if self.final_image_size is not None and self.keep_layers is None:
            raise ValueError("final_image_size needs keep_layers: only positions of a ViT are interpolated.")
        if self.token_weight > 0 and self.teacher is None:
            raise ValueError("token_weight needs a teacher.")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}.")


def shallower_copy(
    teacher: ViTForImageClassification, layers: list[int], image_size: int
) -> ViTForImageClassification:
    """A ViT of the teacher's given layers, counted from 0, with its position table resized to `image_size`."""
    depth = teacher.config.num_hidden_layers
    if len(set(layers)) != len(layers) or not all(0 <= layer < depth for layer in layers):
        raise ValueError(f"keep_layers must be different layers of the teacher's 0..{depth - 1}, but it is {layers}.")
    if image_size % teacher.config.patch_size:
        raise ValueError(
            f"image_size must be a multiple of the teacher's patch of {teacher.config.patch_size} pixels, but it is "
            f"{image_size}."
        )
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.image_size = len(layers), image_size
    student = ViTForImageClassification(config)
    weights = teacher.state_dict()
    positions = next(name for name in weights if name.endswith("position_embeddings"))
    grid = image_size // config.patch_size
    tokens = torch.empty(1, 1 + grid * grid, config.hidden_size)
    weights[positions] = teacher.vit.embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    for name in [name for name in weights if ".layers." in name]:
        head, _, tail = name.partition(".layers.")
        index, _, rest = tail.partition(".")
        tensor = weights.pop(name)
        if int(index) in layers:
            weights[f"{head}.layers.{layers.index(int(index))}.{rest}"] = tensor
    student.load_state_dict(weights)
    return student


def finished_copy(model: PreTrainedModel, args: TargetArguments) -> PreTrainedModel:
    """The model as it is measured and saved, for images of `final_image_size`.

    Random crops show objects larger than whole photographs do, so a size above that of training suits photographs
    better (Touvron et al., https://arxiv.org/abs/1906.06423).
    """
    if args.final_image_size in (None, args.image_size):
        return copy.deepcopy(model)
    return shallower_copy(model, list(range(model.config.num_hidden_layers)), args.final_image_size)


def distillation_loss(
    logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor | None, args: TargetArguments
) -> torch.Tensor:
    loss = F.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
    if teacher_logits is None:
        return loss
    temperature = args.distillation_temperature
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, -1),
        F.log_softmax(teacher_logits / temperature, -1),
        log_target=True,
        reduction="batchmean",
    )
    return (1 - args.distillation_weight) * loss + args.distillation_weight * temperature**2 * divergence


def logits_and_tokens(model: torch.nn.Module, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the backbone's last hidden state, from one forward."""
    tokens = []
    hook = model.base_model.register_forward_hook(lambda module, inputs, output: tokens.append(output[0]))
    try:
        return model(pixel_values=pixel_values, interpolate_pos_encoding=True).logits.float(), tokens[0].float()
    finally:
        hook.remove()


def token_distance(tokens: torch.Tensor, teacher_tokens: torch.Tensor) -> torch.Tensor:
    """Mean squared distance in units of the teacher's variance: 0 is equal, 1 as good as a constant."""
    return F.mse_loss(tokens, teacher_tokens) / teacher_tokens.var()


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    model.eval()
    right = total = 0
    for batch in loader:
        if batch.pixel_values is None:
            continue
        with accelerator.autocast():
            predicted = model(pixel_values=batch.pixel_values.to(accelerator.device)).logits.argmax(-1).cpu()
        right += int((predicted == batch.labels).sum())
        total += len(batch.labels)
    if total == 0:
        raise SystemExit("No row of the validation split could be read.")
    return right / total


def build_models(
    args: TargetArguments, rows: datasets.Dataset
) -> tuple[PreTrainedModel, PreTrainedModel | None, BaseImageProcessor]:
    """The model to train, the frozen teacher if there is one, and the processor of photographs for both."""
    teacher = None
    if args.teacher is not None:
        teacher = AutoModelForImageClassification.from_pretrained(args.teacher, dtype=torch.float32)
        teacher = teacher.eval().requires_grad_(False)
    if args.keep_layers is not None:
        if not isinstance(teacher, ViTForImageClassification):
            raise ValueError("keep_layers needs a teacher of class ViTForImageClassification.")
        model = shallower_copy(teacher, args.keep_layers, args.image_size)
    else:
        config = AutoConfig.from_pretrained(args.model)
        if getattr(config, "image_size", None) not in (None, args.image_size):
            raise ValueError(
                f"{args.model} takes images of {config.image_size} pixels: give image_size {config.image_size}."
            )
        names = getattr(rows.features.get(args.label_column), "names", None) or list(config.id2label.values())
        # A head for other classes is replaced by a new one; a fitting head is kept with its own labels.
        head = {} if len(names) == config.num_labels else {"id2label": dict(enumerate(names))}
        head |= {"label2id": {name: index for index, name in enumerate(names)}} if head else {}
        model = AutoModelForImageClassification.from_pretrained(
            args.model, dtype=torch.float32, ignore_mismatched_sizes=bool(head), **head
        )
    if teacher is not None and teacher.config.num_labels != model.config.num_labels:
        raise ValueError(
            f"The teacher has {teacher.config.num_labels} classes and the model {model.config.num_labels}; "
            "distillation needs the same classes."
        )
    processor = AutoImageProcessor.from_pretrained(args.teacher if args.keep_layers is not None else args.model)
    size = args.final_image_size or args.image_size
    side = {"height": size, "width": size}
    processor.crop_size = side
    cropped = getattr(processor, "do_center_crop", False)
    processor.size = {"shortest_edge": args.final_resize or size} if cropped else side
    return model, teacher, processor


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_yaml_and_command_line(TargetArguments, sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    try:
        train_rows, column = load_photographs(args.dataset, split=args.train_split, image_column=args.image_column)
        validation_rows, _ = load_photographs(args.dataset, split=args.validation_split, image_column=column)
        if len(train_rows) < args.batch_size:
            raise ValueError(
                f"The training split has {len(train_rows)} rows, fewer than batch_size={args.batch_size}."
            )
        model, teacher, processor = build_models(args, train_rows)
        crop = RandomCrop(
            (args.image_size, args.image_size),
            tuple(processor.image_mean),
            tuple(processor.image_std),
            scale=tuple(args.crop_scale),
        )
        train = Photographs(train_rows, column, crop, args.label_column, seed=args.seed)
        validation = Photographs(validation_rows, column, ProcessorCrop(processor), args.label_column)
    except (OSError, ValueError) as error:
        raise SystemExit(f"The training cannot start: {error}") from error
    if teacher is not None:
        teacher = teacher.to(accelerator.device)

    loader = DataLoader(
        train, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate, num_workers=args.num_workers
    )
    validation_loader = DataLoader(validation, 64, collate_fn=collate, num_workers=args.num_workers)

    decay = [p for p in model.parameters() if p.ndim > 1]
    no_decay = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": no_decay, "weight_decay": 0.0}],
        lr=args.learning_rate,
    )
    steps = args.epochs * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(args.warmup_share * steps), steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    log = []
    progress = tqdm(total=steps, disable=not accelerator.is_local_main_process, mininterval=10)
    for epoch in range(args.epochs):
        train.epoch = epoch
        model.train()
        started, losses, unreadable = time.time(), [], 0
        for batch in loader:
            unreadable += len(batch.errors)
            progress.update()
            if batch.pixel_values is None:
                continue
            pixel_values = batch.pixel_values.to(accelerator.device)
            labels = batch.labels.to(accelerator.device)
            with accelerator.autocast():
                teacher_logits = None
                if teacher is not None:
                    with torch.no_grad():
                        teacher_logits, teacher_tokens = logits_and_tokens(teacher, pixel_values)
                if args.token_weight > 0:
                    logits, tokens = logits_and_tokens(model, pixel_values)
                else:
                    logits = model(pixel_values=pixel_values).logits.float()
            loss = distillation_loss(logits, labels, teacher_logits, args)
            if args.token_weight > 0:
                loss = loss + args.token_weight * token_distance(tokens, teacher_tokens)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        if not losses:
            raise SystemExit("No row of the training split could be read.")
        finished = finished_copy(accelerator.unwrap_model(model), args).to(accelerator.device)
        entry = {
            "epoch": epoch + 1,
            "loss": round(sum(losses) / len(losses), 4),
            "unreadable_rows": unreadable,
            "validation_accuracy": round(accuracy(finished, validation_loader, accelerator), 4),
            "seconds": round(time.time() - started, 1),
        }
        log.append(entry)
        accelerator.print(json.dumps(entry))
        if accelerator.is_main_process:
            (output / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
            finished.to(getattr(torch, args.model_dtype)).save_pretrained(output)
            processor.save_pretrained(output)
    return log[-1]


if __name__ == "__main__":
    main()
