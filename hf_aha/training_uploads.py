"""Uploads of a training run: at its end, or at every checkpoint as well; none of them can cost the run anything."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import torch
from torch import nn

from .hub import explain_hub_error, hub_api, push_explainer
from .modeling_aha import AhaExplainer
from .training_args import AhaTrainingArguments


class TrainingUploads:
    """Pushes the explainer of a run to `hub_model_id`.

    Checkpoints go up in the background, one at a time: while one is on its way the next is left out. Whatever goes
    wrong with the Hub or the network becomes a warning, without the token, and the run goes on.

    Args:
        args: settings; `hub_model_id`, `hub_strategy`, `hub_private_repo` and `hub_token` are used.

    Example:
        `TrainingUploads(AhaTrainingArguments("run", push_to_hub=True)).finish(explainer, Path("run/log.jsonl"))`
    """

    def __init__(self, args: AhaTrainingArguments):
        self.repo_id = args.repository_name()
        self.every_save = args.hub_strategy == "every_save"
        self.private, self.token = args.hub_private_repo, args.hub_token
        self._running: Thread | None = None
        self._failure: Exception | None = None

    def start(self) -> None:
        """Make the repository, so that a wrong token or name is known in the first minute and not in the last."""

        def make() -> None:
            self.repo_id = hub_api(self.token).create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id

        self._attempt(make, "the training goes on, and tries again at its end")

    def checkpoint(self, explainer: AhaExplainer, decoder: nn.Module, summary: dict, log: Path) -> None:
        """Upload the weights of `decoder` in the background, if every checkpoint is to be uploaded.

        Args:
            explainer: of the run; only its config and image processor are used.
            decoder: with the weights to share, copied before this returns.
            summary: of the run so far, for the card.
            log: `log.jsonl` of the run.
        """
        if not self.every_save or (self._running is not None and self._running.is_alive()):
            return
        self._collect()

        def begin() -> None:
            snapshot = _snapshot(explainer, decoder, summary)
            # A copy, since the run goes on writing.
            place = TemporaryDirectory()
            copy = Path(shutil.copy(log, place.name))
            message = f"Training in progress, step {summary['steps']}"

            def push() -> None:
                try:
                    self._push(snapshot, copy, message)
                except Exception as error:  # told by the run's own thread
                    self._failure = error
                finally:
                    place.cleanup()

            # A daemon, which does not hold up a run that a signal ends.
            self._running = Thread(target=push, name="upload", daemon=True)
            self._running.start()

        self._attempt(begin, "the training goes on")

    def finish(self, explainer: AhaExplainer, log: Path) -> None:
        """Wait for an upload on its way, then upload the trained explainer."""
        self._collect()
        self._attempt(
            lambda: self._push(explainer, log, "End of training"),
            "the trained explainer lies in the folder `final` of the run; upload it with `hf-aha push`",
        )

    def _push(self, explainer: AhaExplainer, log: Path, message: str) -> None:
        push_explainer(
            explainer,
            self.repo_id,
            commit_message=message,
            private=self.private,
            token=self.token,
            training_log=log,
        )

    def _collect(self) -> None:
        """Wait for an upload on its way, and tell how it failed."""
        if self._running is None:
            return
        self._running.join()
        failure, self._running, self._failure = self._failure, None, None

        def tell() -> None:
            if failure is not None:
                raise failure

        self._attempt(tell, "the training goes on")

    def _attempt(self, work: Callable[[], object], consequence: str) -> None:
        try:
            work()
        # Everything: hours of training must not end because of an upload, whichever library failed in it.
        except Exception as error:
            reason = explain_hub_error(error, self.repo_id, self.token).rstrip(".")
            warnings.warn(f"{reason} ({consequence}).", UserWarning, stacklevel=3)


def _snapshot(explainer: AhaExplainer, decoder: nn.Module, summary: dict) -> AhaExplainer:
    """An explainer of its own with a copy of the decoder on the CPU, without a classifier."""
    config = copy.deepcopy(explainer.config)
    config.training, config.includes_classifier = summary, False
    # The initial weights are overwritten, and drawing them must not shift the random numbers of the run.
    with torch.random.fork_rng(devices=[]):
        snapshot = AhaExplainer(config)
    snapshot.decoder.load_state_dict(decoder.state_dict())
    snapshot.image_processor = explainer.image_processor
    return snapshot


__all__ = ["TrainingUploads"]
