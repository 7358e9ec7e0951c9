"""Trains in every process that torchrun starts; run by test_distributed.py.

torchrun --standalone --nproc_per_node 2 tests/distributed_training.py FOLDER PROCESSES
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from conftest import build_classifier
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTImageProcessorPil

from hf_aha import AhaExplainer
from hf_aha.data import Photographs, ProcessorCrop, RandomCrop, load_photographs
from hf_aha.trainer import AhaTrainer
from hf_aha.training_args import AhaTrainingArguments


GLOBAL_BATCH = 8
CASES = {
    "default": {},
    "every draw": {
        "target_classes": "sampled",
        "mosaic_share": 0.6,
        "references": ["noise", "blur", "black"],
        "noise": 0.5,
        "ema_decay": 0.0,
    },
    "accumulated": {"gradient_accumulation_steps": 2, "mosaic_share": 0.6},
}


def settings(case: str, folder: Path, processes: int) -> AhaTrainingArguments:
    """Those of a case, with the same number of images a step for any number of processes."""
    changes = CASES[case]
    batch = GLOBAL_BATCH // processes // changes.get("gradient_accumulation_steps", 1)
    return AhaTrainingArguments(
        str(folder / case),
        **{
            "max_steps": 5,
            "per_device_batch_size": batch,
            "mixed_precision": "no",
            "dataloader_num_workers": 0,
            "log_steps": 1,
            "eval_steps": 5,
            "eval_images": 5,
            "save_steps": 3,
            "grid_range": [2, 4],
            "learning_rate": 0.01,
            "warmup_share": 0.2,
            "disable_tqdm": True,
            **changes,
        },
    )


def new_explainer() -> AhaExplainer:
    """The same in every process."""
    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    sizes = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    return AhaExplainer.from_classifier(build_classifier("vit"), image_processor=processor, **sizes)


def photographs(folder: Path, processor) -> tuple[Photographs, Photographs]:
    """Training and validation rows."""
    rows, column = load_photographs(str(folder / "photographs"), split="train")
    crop = RandomCrop((32, 32), (0.5,) * 3, (0.5,) * 3)
    return Photographs(rows, column, crop), Photographs(rows, column, ProcessorCrop(processor))


def train(folder: Path, processes: int) -> dict[str, dict[str, torch.Tensor]]:
    """Final weights of every case; `folder/CASE` holds the runs."""
    fresh, weights = new_explainer(), {}
    for case in CASES:
        AcceleratorState._reset_state(reset_partial_state=False)
        explainer = copy.deepcopy(fresh)
        trainer = AhaTrainer(explainer, settings(case, folder, processes), *photographs(folder, fresh.image_processor))
        check_what_is_shared(trainer, processes)
        before = {name: value.clone() for name, value in explainer.classifier.state_dict().items()}
        weights[case] = trainer.train().decoder.state_dict()
        after = explainer.classifier.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    return weights


def check_what_is_shared(trainer: AhaTrainer, processes: int) -> None:
    """DDP wraps the decoder alone; the classifier is frozen, in evaluation mode, and unknown to Accelerate."""
    assert trainer.accelerator.num_processes == processes
    assert isinstance(trainer.decoder, DistributedDataParallel) == (processes > 1)
    prepared = {id(p) for model in trainer.accelerator._models for p in model.parameters()}
    assert prepared == {id(p) for p in trainer.explainer.decoder.parameters()}
    trainer.decoder.train()
    for module in trainer.explainer.classifier.model.modules():
        assert not module.training
    assert not any(p.requires_grad for p in trainer.explainer.classifier.parameters())


def main() -> None:
    torch.set_num_threads(1)
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    weights = train(folder, processes)
    rank = torch.distributed.get_rank()
    torch.save(weights, folder / f"weights-{rank}.pt")
    (folder / f"settings-{rank}.json").write_text(
        json.dumps(dataclasses.asdict(settings("default", folder, processes)))
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
