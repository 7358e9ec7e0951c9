"""Ending a run in order: the signals that ask for it, and the loss of a process that reads the data."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class TrainingStopped(SystemExit):
    """A signal ended the run after a checkpoint; not caught, it ends the process with exit code 0.

    Args:
        message: what happened and how to go on.
    """

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


class LostWorkerError(RuntimeError):
    """A process that reads the data died."""


class StopSignals:
    """While active, the first SIGTERM or SIGINT only sets `received`; a later one acts as it did before.

    Launchers pass on signals that the terminal already sent to every process, so those that come within
    `same_within` seconds of the first count as the same.

    In a thread other than the main one, where Python allows no handlers, nothing is changed.

    Example:
        >>> with StopSignals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     signals.received
        'SIGTERM'
    """

    same_within = 2.0

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > self.same_within:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def outlive_stop_signals(worker: int) -> None:
    """`worker_init_fn` of a data loader: signals to the whole process group leave its workers time for the last step.

    Without it they die at once, and the trainer, which then waits for a batch in vain, could not end in order. They do
    not outlive the trainer: torch ends them with it, and after SIGTERM a timer does so at the latest.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_LAST_STEP_SECONDS))


@contextlib.contextmanager
def lost_workers_explained(how_to_go_on: str) -> Iterator[None]:
    """Turn torch's report of a dead data loader worker into one sentence.

    Args:
        how_to_go_on: end of that sentence.

    Raises:
        LostWorkerError: a worker died.
    """
    try:
        yield
    except RuntimeError as error:
        # torch has no type for it; errors inside a worker's code read differently and are passed on.
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise LostWorkerError(
            f"A process that reads the data was lost ({reason}), as happens when memory runs out; lower "
            f"dataloader_num_workers or free memory, then {how_to_go_on}."
        ) from error


_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_STEP_SECONDS = 25


__all__ = ["LostWorkerError", "StopSignals", "TrainingStopped", "lost_workers_explained", "outlive_stop_signals"]
