"""`AhaTrainer`: trains an explainer's decoder on Accelerate."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_cosine_schedule_with_warmup

from .batch_size import memory_errors_explained, with_fitting_batch_size
from .card_files import TRAINING_FOLDER, TRAINING_LOG, TRAINING_PLOT
from .checkpoints import clear_leftovers
from .data import Photographs, UnreadableDataError
from .differentiable_passes import DifferentiablePasses, enable_checkpointing
from .draws import StepDraws
from .files import folder_in_one_step, write_atomically
from .finite_steps import FiniteSteps, poisoned
from .hub import add_card
from .modeling_aha import AhaExplainer
from .mosaics import paste
from .objectives import FaithfulnessObjective, ObjectiveOutput
from .perturbation import Normalization
from .pointing_loss import pointing_loss
from .run_checkpoints import RunCheckpoints
from .run_files import write_config, write_environment
from .run_folder import from_main_process, locked_run_folder
from .scaling import WholeDecoder, make_accelerator, settle_batches, whole_tensor
from .stop_signals import StopSignals, TrainingStopped, lost_workers_explained
from .streaming import PhotographStream
from .tracking import ProgressLine, RunTrackers, check_trackers
from .training_args import AhaTrainingArguments
from .training_batches import TrainingBatches
from .training_classes import first_classes, second_classes
from .training_log import append_entries, read_whole_entries
from .training_state import TrainingState
from .training_uploads import TrainingUploads
from .validation import validation_areas


@dataclasses.dataclass(frozen=True)
class ScoredImages:
    """The images of a step as they are trained on, and what the decoder says of them.

    Attributes:
        pixel_values: (B, 3, H, W); twice as many as photographs with a second class.
        target: (B,) classes asked about.
        scores: (B, H, W).
        inside: (B, H, W) bool, true on pixels of photographs of the asked class; None where nothing depends on it.
    """

    pixel_values: torch.Tensor
    target: torch.Tensor
    scores: torch.Tensor
    inside: torch.Tensor | None


class AhaTrainer:
    """Trains the decoder of an explainer; the classifier and the encoder stay frozen and out of every checkpoint.

    The run folder holds `config.yaml` (every setting, as a recipe), `environment.json`, `log.jsonl` (a line every
    `log_steps` and every validation), `training.png`, `unreadable.jsonl` (rows that could not be read),
    `checkpoint-N/`, and the trained explainer in `final/`, in Hub layout with its card. With `push_to_hub` the
    explainer is uploaded as well; a failure of that is a warning.

    How many processes share the work is up to the launcher. What is drawn for an image depends on the seed, the step
    and the row alone, so that an equal global batch gives the same training however it is split.

    Args:
        explainer: with a classifier attached; moved to the device that Accelerate chooses.
        args: settings.
        train_dataset: rows with training crops, or a stream of them.
        eval_dataset: rows as the image processor makes them, or a stream, of which the first `eval_images` are kept;
            no validation without it.
        trackers: of Accelerate, made by the caller, besides those that `report_to` names.

    Raises:
        ValueError: the labels are to be explained, but the training dataset has no label column; the classifier cannot
            checkpoint, or there is no such backend to compile it.
        TrackerError: a tracker of `report_to` is not installed.
        BatchDoesNotFitError: with `auto_find_batch_size`, not even one image a batch fits into memory.

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
        train_dataset: Photographs | PhotographStream,
        eval_dataset: Photographs | PhotographStream | None = None,
        *,
        trackers: Sequence[GeneralTracker] = (),
    ):
        for name in ("target_classes", "second_class"):
            if getattr(args, name) == "label" and train_dataset.label_column is None:
                raise ValueError(f"{name} is 'label', but the training dataset has no label column; name one.")
        check_trackers(args.report_to or [])
        self.args = args
        self.output = Path(args.output_dir)
        self.accelerator = make_accelerator(args, trackers)
        set_seed(args.seed)
        self.explainer = explainer.to(self.accelerator.device)
        self.classifier = explainer.classifier
        self.objective = args.objective()
        self.normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
        if isinstance(eval_dataset, PhotographStream):
            eval_dataset = eval_dataset.first(args.eval_images)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._logits_of = DifferentiablePasses(
            self.classifier,
            self.accelerator.autocast,
            gradient_checkpointing=args.gradient_checkpointing,
            compile_backend=(args.torch_compile_backend or "inductor") if args.torch_compile else None,
        )
        if args.gradient_checkpointing:
            enable_checkpointing(explainer)
        self.step = 0
        if args.auto_find_batch_size:
            self.args = args = with_fitting_batch_size(args, self._try_batch, self.accelerator)
        settle_batches(self.accelerator, args)
        self.trackers = RunTrackers(self.accelerator, args)
        self.validated = 0  # step of the last validation
        self.images = 0
        self.uploads = TrainingUploads(args) if args.push_to_hub and self.accelerator.is_main_process else None

        self.source = TrainingBatches(
            train_dataset,
            args.per_device_batch_size,
            self.accelerator,
            num_workers=args.dataloader_num_workers,
            max_unreadable=args.max_unreadable,
            list_path=self.output / "unreadable.jsonl",
        )
        decay = [p for p in explainer.decoder.parameters() if p.ndim > 1]
        no_decay = [p for p in explainer.decoder.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": args.weight_decay}, {"params": no_decay, "weight_decay": 0.0}],
            lr=args.learning_rate,
            betas=(0.9, 0.99),
        )
        # The classifier and the encoder stay out: nothing of them is trained, averaged, synchronised or saved.
        self.whole = WholeDecoder(self.accelerator, explainer.decoder)
        self.decoder, self.optimizer = self.accelerator.prepare(explainer.decoder, optimizer)
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, math.ceil(args.warmup_share * args.max_steps), args.max_steps
        )
        self.average = None
        if args.ema_decay > 0:
            self.average = AveragedModel(self.whole.module, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
        state = TrainingState(
            self.accelerator, self.whole.module, self.decoder, self.optimizer, self.schedule, self.average
        )
        self.checkpoints = RunCheckpoints(args, state, explainer, train_dataset)
        limit = min(args.max_nonfinite_steps, args.max_steps)  # a run without any finite step is none
        self.finite_steps = FiniteSteps(limit, announce=self.accelerator.is_main_process)
        self.signals = StopSignals()

    def state_dict(self) -> dict[str, object]:
        """Where this process of the run stands, for checkpoints, beside what `TrainingState` saves."""
        return {
            "step": self.step,
            "validated": self.validated,
            "skipped_steps": (self.finite_steps.skipped, self.finite_steps.in_a_row),
            "images": self.images,
            "data": self.source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what `state_dict` gave."""
        self.step, self.validated = state["step"], state["validated"]
        self.finite_steps.skipped, self.finite_steps.in_a_row = state["skipped_steps"]
        self.images = state["images"]
        self.source.load_state_dict(state["data"])
        self.whole.update()

    def train(self) -> AhaExplainer:
        """Train to `max_steps`, and return the explainer with its final (averaged) weights.

        The first SIGTERM or SIGINT ends the run after the step on its way, with a checkpoint and exit code 0.

        Raises:
            UnreadableDataError: more than `max_unreadable` rows could not be read, or no row of a dataset.
            FloatingPointError: scores, loss or gradient were not finite for `max_nonfinite_steps` steps in a row.
            FileNotFoundError: the checkpoint to resume from does not exist.
            FileExistsError: the run folder holds checkpoints, and none is to be resumed.
            CheckpointError: the checkpoint is torn, corrupt or of another run, or already stands at `max_steps`.
            RunFolderError: the run folder is in use by another process or cannot be written.
            LostWorkerError: a process that reads the data died.
            OSError: the trained explainer, or the checkpoint after a signal, could not be written.
            TrainingStopped: a signal ended the run; a `SystemExit` with code 0.
        """
        with contextlib.ExitStack() as stack:
            from_main_process(self.accelerator, lambda: stack.enter_context(locked_run_folder(self.output)))
            state = self.checkpoints.resume()
            if state is not None:
                self.load_state_dict(state)
            if self.accelerator.is_main_process:
                self._start_files()
                if self.uploads is not None:
                    self.uploads.start()
            stack.callback(self.trackers.finish)
            from_main_process(self.accelerator, self.trackers.start)
            with lost_workers_explained("go on with resume_from_checkpoint='auto'"), StopSignals() as self.signals:
                self._train_to_the_end()
            self._finish()
        return self.explainer

    def _train_to_the_end(self) -> None:
        args = self.args
        progress = ProgressLine(args, self.accelerator, self.step)
        if self._is_due(args.eval_steps) and self.validated < self.step:  # a signal came before that validation
            self._validate()
        self.decoder.train()
        recent: list[ObjectiveOutput] = []  # since the last line of the log
        outputs: list[ObjectiveOutput] = []  # of the step on its way
        started, images = time.perf_counter(), 0
        # Closed at once when the run ends, however it does: the processes that read the data end with it.
        with contextlib.closing(iter(self.source)) as batches:
            for batch in batches:
                with self.accelerator.accumulate(self.decoder):
                    outputs.append(self.training_step(batch.pixel_values, batch.labels, batch.indices))
                    images += len(batch.pixel_values)
                    self.images += len(batch.pixel_values)
                if not self.accelerator.sync_gradients:
                    continue
                recent += [] if self.finite_steps.in_a_row else outputs
                outputs = []
                self.step += 1
                progress.advance()
                if recent and self._is_due(args.log_steps):
                    rate = images * self.accelerator.num_processes / (time.perf_counter() - started)
                    progress.show(self._log_training(recent, rate))
                    recent, images, started = [], 0, time.perf_counter()
                if self._is_due(args.eval_steps) and not self._stop_asked():
                    self._validate()
                    images, started = 0, time.perf_counter()
                    self.source.take_wait_share()
                if self.step == args.max_steps:
                    break
                if self._stop_asked():
                    self._stop()
                if self._is_due(args.save_steps):
                    self._save_checkpoint()
        progress.close()

    def _is_due(self, every: int) -> bool:
        return self.step > 0 and (self.step % every == 0 or self.step == self.args.max_steps)

    def _stop_asked(self) -> bool:
        """Whether a signal reached any process; all must ask together."""
        if self.accelerator.num_processes == 1:
            return self.signals.received is not None
        if self.signals.received is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _stop(self) -> None:
        self._save_checkpoint(must=True)
        message = (
            f"Stopped by {self.signals.received or 'a signal to another process'} at step {self.step} of "
            f"{self.args.max_steps}, with {self.output / f'checkpoint-{self.step}'} saved; go on with "
            "--resume_from_checkpoint auto."
        )
        if self.accelerator.is_main_process:
            print(message, file=sys.stderr)
        raise TrainingStopped(message)

    def training_step(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor
    ) -> ObjectiveOutput:
        """One forward and backward pass and, where gradients are synchronised, one optimiser step.

        Args:
            pixel_values: (B, 3, H, W) normalised crops.
            labels: (B,) classes, -1 where unknown.
            indices: (B,) rows of the dataset; what is drawn for an image depends on its own.

        Raises:
            BatchDoesNotFitError: the memory is exhausted.
        """
        points = self.objective.curve_points or self.objective.num_bins - 1
        perturbed = 2 * points * len(labels) * (1 if self.args.second_class == "none" else 2)
        with memory_errors_explained(len(labels), perturbed, self.step, self.accelerator.device):
            draws = StepDraws.of(self.args.seed, self.step, indices.tolist())
            scored = self._scores_of(self.decoder, pixel_values, labels, draws)
            if self.finite_steps.check("scores", scored.scores):
                output = self._objective_of(self.objective, scored, draws)
            else:
                output = ObjectiveOutput(*[poisoned(scored.scores)] * 4)
            loss = output.loss if self.finite_steps.check("loss", output.loss) else poisoned(scored.scores)
            self.accelerator.backward(loss)
        take = True
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.decoder.parameters(), self.args.max_grad_norm)
            take = self.finite_steps.take(self.step, whole_tensor(norm))
            if not take and self.accelerator.scaler is None:
                self.optimizer.zero_grad()  # without gradients the optimiser changes nothing
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.schedule.step()
            self.whole.update()
            if self.average is not None and take:
                self.average.update_parameters(self.whole.module)
        return output

    def _scores_of(
        self, decoder: Callable[..., torch.Tensor], pixel_values: torch.Tensor, labels: torch.Tensor, draws: StepDraws
    ) -> ScoredImages:
        """What the decoder answers on the images as they are trained on.

        With a second class the batch stands twice behind itself, but goes through the plain classifier once.
        """
        device = self.accelerator.device
        pasted = paste(pixel_values, self.args.mosaic_share, draws.images, self.args.mosaic_layout)
        images, inside = pasted.pixel_values.to(device), None
        with torch.no_grad(), self.accelerator.autocast():
            tokens, logits = self.explainer.features(images)
            logits, labels = logits.float(), labels.to(device)
            asks_alone = self.args.target_classes == "alone" or self.args.pointing_weight > 0
            alone = self.classifier(pixel_values.to(device)).logits.argmax(-1) if asks_alone else None
            target = first_classes(self.args.target_classes, logits, labels, draws.images, alone)
            if self.args.second_class != "none":
                target = torch.cat([target, second_classes(self.args.second_class, logits, labels, target)])
                images, tokens = torch.cat([images] * 2), [torch.cat([each] * 2) for each in tokens]
            if self.args.pointing_weight > 0:
                shown = alone[pasted.source.to(device)]  # the class that each pixel's photograph has alone
                inside = shown.repeat(len(target) // len(shown), 1, 1) == target[:, None, None]
            gradients = self.explainer.gradients(images, target)
        scores = decoder(tokens, images, self.classifier.class_vectors(target), gradients)
        return ScoredImages(images, target, scores, inside)

    def _objective_of(
        self, objective: FaithfulnessObjective, scored: ScoredImages, draws: StepDraws
    ) -> ObjectiveOutput:
        tau, scores = self.args.tau(self.step), scored.scores.float()
        if self.args.second_class != "none":
            draws = draws.times(2)
        output = objective(
            scores,
            scored.pixel_values,
            scored.target,
            self._logits_of,
            self.normalization,
            tau=tau,
            generator=draws,
        )
        if scored.inside is None:
            return output
        pointing = self.args.pointing_weight * pointing_loss(scores, scored.inside)
        return dataclasses.replace(output, loss=output.loss + pointing)

    def _try_batch(self, count: int) -> None:
        """Go through a step's passes with `count` images, without changing anything."""
        draws = StepDraws.of(self.args.seed, 0, range(count))
        size = getattr(getattr(self.train_dataset, "transform", None), "size", self.explainer.config.image_size)
        # As Accelerate will do with the decoder.
        decoder = self.accelerator.autocast()(self.explainer.decoder.train())
        try:
            for objective in self.objective.extremes():
                pixel_values, labels = torch.zeros(count, 3, *size), torch.zeros(count, dtype=torch.int64)
                scored = self._scores_of(decoder, pixel_values, labels, draws)
                self._objective_of(objective, scored, draws).loss.backward()
        finally:
            self.explainer.decoder.zero_grad()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Hard deletion and insertion areas on the first `eval_images` validation rows, at pixels and patch cells.

        Every process measures its own rows; the means are over all of them. The averaged weights are measured when
        there are any. Empty if a signal asks the run to end meanwhile.

        Raises:
            UnreadableDataError: none of these rows could be read.
        """
        areas = validation_areas(
            self.explainer,
            self._final_decoder().eval(),
            self.eval_dataset,
            self.args,
            self.accelerator,
            stopped=lambda: self.signals.received is not None,
        )
        if areas is None:
            raise UnreadableDataError("No row of the validation dataset could be read.")
        return areas

    def _validate(self) -> None:
        if self.eval_dataset is None:
            return
        measured = self.evaluate()
        if measured:
            self._log({"step": self.step, **measured})
            self.validated = self.step
        self.decoder.train()

    def _final_decoder(self) -> torch.nn.Module:
        return self.whole.module if self.average is None else self.average.module

    def _log_training(self, recent: list[ObjectiveOutput], rate: float) -> dict[str, float]:
        names = ("loss", "deletion", "insertion", "peak_penalty")
        means = torch.stack([torch.stack([getattr(o, name).detach() for o in recent]).mean() for name in names])
        means = self.accelerator.reduce(means, "mean").tolist()
        entry = {
            "step": self.step,
            **{name: round(mean, 4) for name, mean in zip(names, means, strict=True)},
            "tau": round(self.args.tau(self.step), 4),
            "learning_rate": self.schedule.get_last_lr()[0],
            "images_per_second": round(rate, 2),
            "data_wait_share": round(self.source.take_wait_share(), 4),
            **({"skipped_steps": self.finite_steps.skipped} if self.finite_steps.skipped else {}),
        }
        self._log(entry)
        return entry

    def _log(self, entry: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            append_entries(self.output / TRAINING_LOG, [entry])
            self.trackers.log(entry)

    def _save_checkpoint(self, must: bool = False) -> None:
        saved = self.checkpoints.save(self.step, self.state_dict(), must)
        if saved is not None and self.uploads is not None:
            self.uploads.checkpoint(self.explainer, self._final_decoder(), self._summary(), self.output / TRAINING_LOG)

    def _start_files(self) -> None:
        """Write settings and environment, and cut the files of an earlier run back to where this one starts."""
        clear_leftovers(self.output, self.step)
        write_config(self.output, self.args)
        write_environment(self.output, self.accelerator, self.step)
        entries = [e for e in read_whole_entries(self.output / TRAINING_LOG) if e["step"] <= self.step]
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        write_atomically(self.output / TRAINING_LOG, lambda path: path.write_text(lines))
        self.source.start_list()

    def _finish(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.average is not None:
            self.whole.module.load_state_dict(self.average.module.state_dict())
        # Takes off the autocast that Accelerate put around the decoder's forward.
        self.accelerator.unwrap_model(self.decoder, keep_fp32_wrapper=False)
        self.explainer.decoder = self.whole.module
        self.explainer.eval()
        self.explainer.config.training = self._summary()
        if self.accelerator.is_main_process:
            final, log = self.output / "final", self.output / TRAINING_LOG
            try:
                with folder_in_one_step(final) as folder:
                    self.explainer.save_pretrained(folder)
                    # Where its files will lie, so that a later push finds the log.
                    self.explainer.name_or_path = str(final)
                    name = self.args.repository_name()
                    add_card(
                        self.explainer, folder, repo_id=name, training_log=log, photographs=(), local_files_only=True
                    )
                shutil.copyfile(final / TRAINING_FOLDER / TRAINING_PLOT, self.output / TRAINING_PLOT)
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"The trained explainer could not be written to {final} ({error}); make room, then take the last "
                    "steps again with resume_from_checkpoint='auto'."
                ) from error
            if self.uploads is not None:
                self.uploads.finish(self.explainer, log)

    def _summary(self) -> dict[str, object]:
        """What the config and the card say of the run; a recipe's own settings may hold folders and stay out."""
        names = {field.name for field in dataclasses.fields(AhaTrainingArguments)}
        names = {name for name in names if not name.startswith("hub_")}
        names -= {"output_dir", "resume_from_checkpoint", "push_to_hub", "disable_tqdm"}
        names -= {"report_to", "run_name", "tracking_project"}
        return {
            "steps": self.step,
            "images_seen": self.images * self.accelerator.num_processes,
            **self.train_dataset.summary(),
            "unreadable_rows": self.source.unreadable_rows(),
            **({"skipped_steps": self.finite_steps.skipped} if self.finite_steps.skipped else {}),
            **_hub_source(self.train_dataset.dataset),
            "arguments": {k: v for k, v in self.args.to_dict().items() if v is not None and k in names},
        }


def _hub_source(dataset: datasets.Dataset | datasets.IterableDataset) -> dict[str, str]:
    """Id and commit of a dataset of the Hub; nothing for other data, whose names may be folders of this machine."""
    for url in dataset.info.download_checksums or {}:
        found = re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@([0-9a-f]{40})/", url)
        if found:
            return {"dataset": found[1], "dataset_revision": found[2]}
    return {}
