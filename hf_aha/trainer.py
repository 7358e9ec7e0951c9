"""`AhaTrainer`: trains an explainer's decoder on Accelerate."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, ProjectConfiguration, set_seed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from .card_files import TRAINING_FOLDER, TRAINING_LOG, TRAINING_PLOT
from .data import Batch, Photographs, collate, mosaic
from .hub import add_card
from .metrics.curves import deletion_insertion_curves
from .modeling_aha import AhaExplainer
from .objectives import ObjectiveOutput
from .perturbation import Normalization, reference_image
from .training_args import AhaTrainingArguments
from .training_uploads import TrainingUploads


class UnreadableDataError(ValueError):
    """Too many rows of the dataset cannot be read."""


class AhaTrainer:
    """Trains the decoder of an explainer; the classifier and the encoder stay frozen and out of every checkpoint.

    The run folder holds `arguments.json`, `log.jsonl` (a line every `log_steps` and every validation),
    `training.png`, `unreadable.jsonl` (rows that could not be read), `checkpoint-N/`, and the trained explainer in
    `final/`, in Hub layout with its card. With `push_to_hub` the explainer is uploaded as well; a failure of that is a
    warning.

    Args:
        explainer: with a classifier attached; moved to the device that Accelerate chooses.
        args: settings.
        train_dataset: rows with training crops.
        eval_dataset: rows as the image processor makes them; no validation without it.

    Raises:
        ValueError: the labels are to be explained, but the training dataset has no label column.

    Example:

    ```python
    explainer = AhaExplainer.from_classifier("google/vit-base-patch16-224")
    AhaTrainer(explainer, AhaTrainingArguments(output_dir="run"), train_dataset).train()
    ```
    """

    def __init__(
        self,
        explainer: AhaExplainer,
        args: AhaTrainingArguments,
        train_dataset: Photographs,
        eval_dataset: Photographs | None = None,
    ):
        if args.target_classes == "label" and train_dataset.label_column is None:
            raise ValueError("target_classes is 'label', but the training dataset has no label column; name one.")
        self.args = args
        self.output = Path(args.output_dir)
        self.accelerator = Accelerator(
            # Every optimiser step takes the same number of batches, also across the end of an epoch.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            mixed_precision=args.mixed_precision,
            # The order of the rows then depends on the seed and the epoch alone, so that a resumed run sees it again.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
            project_config=ProjectConfiguration(project_dir=str(self.output)),
        )
        set_seed(args.seed)
        self.explainer = explainer.to(self.accelerator.device)
        self.classifier = explainer.classifier
        self.objective = args.objective()
        self.normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        # Every process draws its own references, grids and points.
        self.generator = torch.Generator().manual_seed(args.seed + 1000 * self.accelerator.process_index)
        self.step = 0
        self.batches = 0  # taken from the loader, also those without a readable row
        self.images = 0
        self.errors: list[tuple[int, str]] = []
        self.uploads = TrainingUploads(args) if args.push_to_hub and self.accelerator.is_main_process else None

        loader = DataLoader(
            train_dataset,
            args.per_device_batch_size,
            shuffle=True,
            drop_last=len(train_dataset) >= args.per_device_batch_size,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
        )
        decay = [p for p in explainer.decoder.parameters() if p.ndim > 1]
        no_decay = [p for p in explainer.decoder.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": args.weight_decay}, {"params": no_decay, "weight_decay": 0.0}],
            lr=args.learning_rate,
            betas=(0.9, 0.99),
        )
        self.decoder, self.optimizer, self.loader = self.accelerator.prepare(explainer.decoder, optimizer, loader)
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, math.ceil(args.warmup_share * args.max_steps), args.max_steps
        )
        self.average = None
        if args.ema_decay > 0:
            self.average = AveragedModel(explainer.decoder, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
            self.accelerator.register_for_checkpointing(self.average)
        self.accelerator.register_for_checkpointing(self.schedule, self)

    # Accelerate checkpoints this object beside the decoder and the optimiser.
    def state_dict(self) -> dict[str, object]:
        """Where the run stands, for checkpoints."""
        return {
            "step": self.step,
            "batches": self.batches,
            "images": self.images,
            "errors": self.errors,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` gave."""
        self.step, self.batches, self.images = state["step"], state["batches"], state["images"]
        self.errors = list(state["errors"])
        self.generator.set_state(state["generator"])

    def train(self) -> AhaExplainer:
        """Train to `max_steps`, and return the explainer with its final (averaged) weights.

        Raises:
            UnreadableDataError: more than `max_unreadable` rows could not be read, or no row of a dataset.
            FloatingPointError: the scores or the loss are not finite.
            FileNotFoundError: the checkpoint to resume from does not exist.
            FileExistsError: the run folder holds checkpoints, and none is to be resumed.
            ValueError: the checkpoint already stands at `max_steps`.
        """
        args = self.args
        self._resume()
        if self.accelerator.is_main_process:
            self._start_files()
            if self.uploads is not None:
                self.uploads.start()
        self.accelerator.wait_for_everyone()
        progress = tqdm(
            total=args.max_steps, initial=self.step, disable=not self.accelerator.is_local_main_process, mininterval=5
        )
        self.decoder.train()
        recent: list[ObjectiveOutput] = []
        started, images = time.perf_counter(), 0
        for batch in self._batches():
            with self.accelerator.accumulate(self.decoder):
                output = self.training_step(batch.pixel_values, batch.labels)
                recent.append(output)
                images += len(batch.pixel_values)
                self.images += len(batch.pixel_values)
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            progress.update()
            if self.step % args.log_steps == 0 or self.step == args.max_steps:
                rate = images * self.accelerator.num_processes / (time.perf_counter() - started)
                entry = self._log_training(recent, rate)
                progress.set_postfix(deletion=entry["deletion"], insertion=entry["insertion"], refresh=False)
                recent, images, started = [], 0, time.perf_counter()
            if self.eval_dataset is not None and (self.step % args.eval_steps == 0 or self.step == args.max_steps):
                self._log({"step": self.step, **self.evaluate()})
                self.decoder.train()
                images, started = 0, time.perf_counter()
            if self.step % args.save_steps == 0 and self.step < args.max_steps:
                self._save_checkpoint()
            if self.step == args.max_steps:
                break
        progress.close()
        self._finish()
        return self.explainer

    def training_step(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> ObjectiveOutput:
        """One forward and backward pass and, where gradients are synchronised, one optimiser step."""
        device = self.accelerator.device
        pixel_values = mosaic(pixel_values, self.args.mosaic_share, self.generator).to(device)
        with torch.no_grad(), self.accelerator.autocast():
            tokens, logits = self.explainer.features(pixel_values)
        target = self._training_target(logits.float(), labels.to(device))
        scores = self.decoder(tokens, pixel_values, self.classifier.class_vectors(target))
        self._check_finite("scores", scores)
        output = self.objective(
            scores.float(),
            pixel_values,
            target,
            self._logits_of,
            self.normalization,
            tau=self.args.tau(self.step),
            generator=self.generator,
        )
        self._check_finite("loss", output.loss)
        self.accelerator.backward(output.loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.decoder.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.explainer.decoder)
        return output

    def _check_finite(self, name: str, values: torch.Tensor) -> None:
        if not torch.isfinite(values).all():
            raise FloatingPointError(
                f"NaN or infinity in the {name} at step {self.step}; lower the learning rate or raise tau_end."
            )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Hard deletion and insertion areas on the first `eval_images` validation rows, at pixels and patch cells.

        Every process measures its own rows; the means are over all of them. The averaged weights are measured when
        there are any.

        Raises:
            UnreadableDataError: none of these rows could be read.
        """
        decoder = self._final_decoder().eval()
        rows = list(range(min(self.args.eval_images, len(self.eval_dataset))))
        rows = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = {
            f"validation/{kind}{suffix}/{name}": 0.0
            for kind in self.args.eval_references
            for suffix in ("", "/cells")
            for name in ("deletion", "insertion")
        }
        count = 0
        for start in range(0, len(rows), 8):
            batch = collate([self.eval_dataset[row] for row in rows[start : start + 8]])
            if batch.pixel_values is None:
                continue
            pixel_values = batch.pixel_values.to(self.accelerator.device)
            with self.accelerator.autocast():
                tokens, logits = self.explainer.features(pixel_values)
                target = logits.argmax(-1)
                scores = decoder(tokens, pixel_values, self.classifier.class_vectors(target)).float()
            rgb = self.normalization.denormalize(pixel_values)
            generator = torch.Generator().manual_seed(self.args.seed)
            for kind in self.args.eval_references:
                reference = reference_image(rgb, kind, blur_sigma=self.objective.blur_sigma, generator=generator)
                reference = self.normalization.normalize(reference)
                for suffix, cells in (("", None), ("/cells", self.classifier.grid(*pixel_values.shape[-2:]))):
                    curves = deletion_insertion_curves(
                        self._logits_of, pixel_values, reference, scores, target, fractions=_ELEVEN, cells=cells
                    )
                    for name, area in (("deletion", curves.deletion_auc), ("insertion", curves.insertion_auc)):
                        sums[f"validation/{kind}{suffix}/{name}"] += float(area.sum())
            count += len(pixel_values)
        names = sorted(sums)
        totals = torch.tensor([count, *(sums[name] for name in names)], device=self.accelerator.device)
        totals = self.accelerator.reduce(totals, "sum").tolist()
        if totals[0] == 0:
            raise UnreadableDataError("No row of the validation dataset could be read.")
        return {name: round(total / totals[0], 4) for name, total in zip(names, totals[1:], strict=True)}

    def _logits_of(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.classifier(pixel_values).logits

    def _training_target(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.args.target_classes == "label":
            return labels
        if self.args.target_classes == "sampled":
            return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=self.generator)[:, 0].to(logits.device)
        return logits.argmax(-1)

    def _batches(self) -> Iterator[Batch]:
        """Batches without end, from where the run stands; unreadable rows are noted and left out."""
        per_epoch = len(self.loader)
        epoch, skip = divmod(self.batches, per_epoch)
        while True:
            self.train_dataset.epoch = epoch
            self.loader.set_epoch(epoch)
            loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
            readable = skip > 0
            for batch in loader:
                self.batches += 1
                self._note_errors(batch)
                if batch.pixel_values is not None:
                    readable = True
                    yield batch
            if not readable:
                raise UnreadableDataError("No row of the training dataset could be read.")
            epoch, skip = epoch + 1, 0

    def _note_errors(self, batch: Batch) -> None:
        if not batch.errors:
            return
        known = {row for row, _ in self.errors}
        fresh = [error for error in batch.errors if error[0] not in known]
        self.errors += fresh
        self._write_errors(fresh)
        if len(self.errors) > self.args.max_unreadable:
            row, reason = self.errors[-1]
            raise UnreadableDataError(
                f"{len(self.errors)} rows of the training dataset could not be read, more than max_unreadable="
                f"{self.args.max_unreadable}; the last was row {row}: {reason}"
            )

    def _write_errors(self, errors: list[tuple[int, str]]) -> None:
        if errors:
            with open(self.output / "unreadable.jsonl", "a") as file:
                file.writelines(json.dumps({"row": row, "reason": reason}) + "\n" for row, reason in errors)

    def _final_decoder(self) -> torch.nn.Module:
        return self.explainer.decoder if self.average is None else self.average.module

    def _log_training(self, recent: list[ObjectiveOutput], rate: float) -> dict[str, float]:
        means = {
            name: round(float(torch.stack([getattr(o, name).detach() for o in recent]).mean()), 4)
            for name in ("loss", "deletion", "insertion", "peak_penalty")
        }
        entry = {
            "step": self.step,
            **means,
            "tau": round(self.args.tau(self.step), 4),
            "learning_rate": self.schedule.get_last_lr()[0],
            "images_per_second": round(rate, 2),
        }
        self._log(entry)
        return entry

    def _log(self, entry: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with open(self.output / TRAINING_LOG, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def _save_checkpoint(self) -> None:
        # Under another name until it is complete: a run killed here must not leave half a checkpoint to resume from.
        partial, folder = self.output / "partial-checkpoint", self.output / f"checkpoint-{self.step}"
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            for old in _checkpoints(self.output)[: -self.args.save_total_limit]:
                shutil.rmtree(old)
            if self.uploads is not None:
                self.uploads.checkpoint(
                    self.explainer, self._final_decoder(), self._summary(), self.output / TRAINING_LOG
                )

    def _resume(self) -> None:
        wanted, found = self.args.resume_from_checkpoint, _checkpoints(self.output)
        if wanted is None and found:
            raise FileExistsError(
                f"The folder {self.output} holds {found[-1].name} of another run; resume it with "
                "resume_from_checkpoint='auto', or choose another output_dir."
            )
        if wanted is None or (wanted == "auto" and not found):
            return
        folder = found[-1] if wanted == "auto" else Path(wanted)
        if not folder.is_dir():
            raise FileNotFoundError(f"The checkpoint {folder} does not exist; use 'auto' for the newest one.")
        self.accelerator.load_state(str(folder))
        if self.step >= self.args.max_steps:
            raise ValueError(
                f"The checkpoint {folder} stands at step {self.step}, so max_steps={self.args.max_steps} leaves "
                "nothing to train; raise max_steps or choose another output_dir."
            )

    def _start_files(self) -> None:
        """Write the arguments, and cut the logs of an earlier run back to where this one starts."""
        self.output.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self.args.to_dict(), indent=2)
        (self.output / "arguments.json").write_text(settings + "\n")
        entries = [entry for entry in self._read_log() if entry["step"] <= self.step]
        (self.output / TRAINING_LOG).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        (self.output / "unreadable.jsonl").unlink(missing_ok=True)
        self._write_errors(self.errors)

    def _read_log(self) -> list[dict[str, float]]:
        path = self.output / TRAINING_LOG
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _finish(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.average is not None:
            self.explainer.decoder.load_state_dict(self.average.module.state_dict())
        # Takes off the autocast that Accelerate put around the decoder's forward.
        self.accelerator.unwrap_model(self.decoder, keep_fp32_wrapper=False)
        self.explainer.eval()
        self.explainer.config.training = self._summary()
        if self.accelerator.is_main_process:
            final, log = self.output / "final", self.output / TRAINING_LOG
            self.explainer.save_pretrained(final)
            # Where its files lie now, so that a later push finds the log.
            self.explainer.name_or_path = str(final)
            name = self.args.repository_name()
            add_card(self.explainer, final, repo_id=name, training_log=log, photographs=(), local_files_only=True)
            shutil.copyfile(final / TRAINING_FOLDER / TRAINING_PLOT, self.output / TRAINING_PLOT)
            if self.uploads is not None:
                self.uploads.finish(self.explainer, log)

    def _summary(self) -> dict[str, object]:
        """What the config and the card say of the run; a recipe's own settings may hold folders and stay out."""
        names = {field.name for field in dataclasses.fields(AhaTrainingArguments)}
        names = {name for name in names if not name.startswith("hub_")}
        names -= {"output_dir", "resume_from_checkpoint", "push_to_hub"}
        return {
            "steps": self.step,
            "images_seen": self.images * self.accelerator.num_processes,
            "train_rows": len(self.train_dataset),
            "unreadable_rows": len(self.errors),
            **_hub_source(self.train_dataset.dataset),
            "arguments": {k: v for k, v in self.args.to_dict().items() if v is not None and k in names},
        }


def _hub_source(dataset: datasets.Dataset) -> dict[str, str]:
    """Id and commit of a dataset of the Hub; nothing for other data, whose names may be folders of this machine."""
    for url in dataset.info.download_checksums or {}:
        found = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@([0-9a-f]{40})/", url)
        if found:
            return {"dataset": found[1], "dataset_revision": found[2]}
    return {}


_ELEVEN = tuple(step / 10 for step in range(11))


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))
