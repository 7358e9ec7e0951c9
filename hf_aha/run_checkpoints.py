"""The checkpoints of one run: saved at any cost but the training itself, resumed only by the same run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from .checkpoints import CheckpointError, find_checkpoint, keep_newest, list_checkpoints, write_checkpoint
from .data import Photographs
from .files import PARTIAL
from .modeling_aha import AhaExplainer
from .run_folder import from_main_process
from .run_identity import check_same_run, describe_run
from .streaming import PhotographStream
from .training_args import AhaTrainingArguments
from .training_state import ENGINE, TrainingState, read_state


class RunCheckpoints:
    """Saves `checkpoint-N` folders of a run and goes on from one of them.

    Args:
        args: settings of the run.
        state: what is saved.
        explainer, dataset: what is trained on what, recorded in each checkpoint and compared on resuming.

    Example:

    ```python
    checkpoints = RunCheckpoints(args, state, explainer, dataset)
    own = checkpoints.resume()
    ...
    checkpoints.save(step, {"step": step})
    ```
    """

    def __init__(
        self,
        args: AhaTrainingArguments,
        state: TrainingState,
        explainer: AhaExplainer,
        dataset: Photographs | PhotographStream,
    ):
        self.args, self.state, self.explainer, self.dataset = args, state, explainer, dataset
        self.output = Path(args.output_dir)
        self._identity: dict[str, object] = {}

    def resume(self) -> dict[str, object] | None:
        """Load the checkpoint that the settings ask for; every process must call it, before the first `save`.

        Returns:
            what `save` got as `own` from this process, or None at the beginning of a run.

        Raises:
            FileExistsError, FileNotFoundError, CheckpointError: see `find_checkpoint` and `check_same_run`; or the
                checkpoint already stands at `max_steps`. Nothing is loaded or changed then.
        """
        folder = from_main_process(self.state.accelerator, self._find)
        return None if folder is None else self.state.restore(folder)

    def _find(self) -> Path | None:
        folder = find_checkpoint(self.args.resume_from_checkpoint, self.output)
        processes = self.state.accelerator.num_processes
        self._identity = describe_run(self.args, self.explainer, self.dataset, processes)
        if folder is None:
            return None
        then = read_state(folder)["common"]
        if then["step"] >= self.args.max_steps:
            raise CheckpointError(
                f"The checkpoint {folder} stands at step {then['step']}, so max_steps={self.args.max_steps} leaves "
                "nothing to train; raise max_steps or choose another output_dir."
            )
        check_same_run(folder, then["run"], self._identity)
        return folder

    def save(self, step: int, own: Mapping[str, object], must: bool = False) -> Path | None:
        """Save a checkpoint and remove the oldest beyond `save_total_limit`; every process must call it.

        Args:
            step: that the run has taken.
            own: of this process, to be given back by `resume`: tensors and plain Python.
            must: whether the run ends with it. Otherwise a full disk costs this checkpoint and a warning only.

        Returns:
            the folder, on the main process, if it could be written.

        Raises:
            OSError: it could not be written, but must.
        """
        files = self.state.collect({"step": step, "run": self._identity}, own)
        engine = self.state.save_engine(self.output / f"{PARTIAL}{ENGINE}")
        if not self.state.accelerator.is_main_process:
            return None
        folder = self.output / f"checkpoint-{step}"
        try:
            write_checkpoint(folder, files, {ENGINE: engine} if engine else {})
            keep_newest(self.output, self.args.save_total_limit)
        except OSError as error:
            found = list_checkpoints(self.output)
            kept = f"{found[-1].name} is still there" if found else "there is no earlier one"
            problem = f"The checkpoint {folder} could not be written ({error.strerror or error}); {kept}"
            if must:
                raise OSError(f"{problem}, and the run has ended.") from error
            warnings.warn(f"{problem}, and the training goes on.", UserWarning, stacklevel=2)
            return None
        return folder


__all__ = ["RunCheckpoints"]
