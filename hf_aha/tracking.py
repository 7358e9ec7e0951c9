"""Watching a run: a line on the terminal, and the trackers of Accelerate."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from tqdm.auto import tqdm

from .training_args import TRACKERS, AhaTrainingArguments


TRACKING_FOLDER = "tracking"
"""Folder of a run for the trackers that write files, such as TensorBoard."""

# What each tracker calls the name of a run, where Accelerate passes one on (`accelerate/tracking.py`).
_RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
}


class TrackerError(ValueError):
    """A tracker that was asked for cannot be used."""


class RunTrackers:
    """Sends settings and log entries to the trackers that `report_to` names, and to those given to the trainer.

    Entries go out from the main process. A tracker that fails while the run is on its way costs a warning and is left
    out from then on; one that cannot even start ends the run before it begins.

    Args:
        accelerator: made by `make_accelerator` of the same settings.
        args: settings of the run.

    Example:

    ```python
    trackers = RunTrackers(accelerator, args)
    trackers.start()
    trackers.log({"step": 10, "loss": 0.2})
    trackers.finish()
    ```
    """

    def __init__(self, accelerator: Accelerator, args: AhaTrainingArguments):
        self.accelerator, self.args = accelerator, args

    def start(self) -> None:
        """Open a run in every tracker and send the settings; for the main process.

        Raises:
            TrackerError: a tracker cannot be started.
        """
        if not self.accelerator.log_with:
            return
        name = self.args.run_name or self.args.repository_name()
        names = {tracker: {argument: name} for tracker, argument in _RUN_NAMES.items()}
        try:
            self.accelerator.init_trackers(self.args.tracking_project, flat_settings(self.args), names)
        # Whatever the library of a tracker raises: no network, no login, a full disk.
        except Exception as error:
            names = ", ".join(getattr(tracker, "name", str(tracker)) for tracker in self.accelerator.log_with)
            raise TrackerError(
                f"The trackers {names} cannot be started ({_one_line(error)}); mend that, or leave them out of "
                "report_to."
            ) from error

    def log(self, entry: Mapping[str, float]) -> None:
        """Send one entry of the log; `training/` is put before names without a group."""
        values = {
            name if "/" in name else f"training/{name}": value for name, value in entry.items() if name != "step"
        }
        for tracker in list(self.accelerator.trackers):
            try:
                tracker.log(values, step=entry["step"])
            # Days of training must not end because of a tracker, whatever its library raises.
            except Exception as error:
                self._leave_out(tracker, error)

    def finish(self) -> None:
        """Close the run in every tracker."""
        # Not `Accelerator.end_training`, which would also end the process group that the caller may still need.
        for tracker in list(self.accelerator.trackers):
            try:
                tracker.finish()
            except Exception as error:  # as above
                self._leave_out(tracker, error)
        self.accelerator.trackers.clear()

    def _leave_out(self, tracker: object, error: Exception) -> None:
        self.accelerator.trackers.remove(tracker)
        warnings.warn(
            f"The tracker {tracker.name} failed ({_one_line(error)}); the training goes on without it, and log.jsonl "
            "has every entry.",
            UserWarning,
            stacklevel=3,
        )


def check_trackers(names: list[str]) -> None:
    """Make sure that the trackers of these names are installed.

    Raises:
        TrackerError: one is not; the message names the package to install.
    """
    available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise TrackerError(
                f"The tracker {name} is not installed; run `pip install {TRACKERS[name]}`, or leave it out of "
                "report_to."
            )


def flat_settings(args: AhaTrainingArguments) -> dict[str, str | int | float | bool]:
    """The settings as trackers take them: no token, nothing unset, lists as JSON text."""
    settings = args.to_dict()
    return {
        name: value if isinstance(value, (str, int, float, bool)) else json.dumps(value, default=str)
        for name, value in settings.items()
        if value is not None
    }


class ProgressLine:
    """One line on the terminal of the main process: steps, time left, and the latest log entry.

    Args:
        args: `max_steps` and `disable_tqdm` are used.
        accelerator: of the run.
        step: where the run stands.
    """

    def __init__(self, args: AhaTrainingArguments, accelerator: Accelerator, step: int):
        quiet = args.disable_tqdm or not accelerator.is_main_process
        self._bar = tqdm(
            total=args.max_steps, initial=step, disable=quiet, mininterval=5, unit="step", dynamic_ncols=True
        )

    def advance(self) -> None:
        """Count a step."""
        self._bar.update()

    def show(self, entry: Mapping[str, float]) -> None:
        """Show deletion, insertion and speed of a training entry of the log."""
        shown = {
            "deletion": entry["deletion"],
            "insertion": entry["insertion"],
            "images/s": entry["images_per_second"],
        }
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Leave the line as it stands."""
        self._bar.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


__all__ = ["ProgressLine", "RunTrackers", "TrackerError", "check_trackers", "flat_settings"]
