"""Where a training run gets its batches: without end, counted, timed, and from any place of the data on."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from .checkpoints import CheckpointError
from .data import Batch, Photographs, UnreadableDataError, collate
from .stop_signals import outlive_stop_signals
from .streaming import PhotographStream, Position, StreamReader
from .training_log import append_entries


class TrainingBatches:
    """Endless batches of a dataset or a stream, beginning where the run stands.

    Rows that cannot be read are left out, counted, and listed once each; batches without a readable row are counted
    and not given. Whatever was fetched ahead but not given yet does not count, so a run that goes on from
    `state_dict()` sees the rows that it would have seen undisturbed, in the same order.

    Args:
        dataset: `Photographs` (any map-style dataset of such rows) or a `PhotographStream`.
        batch_size: rows a batch and process.
        accelerator: says which of how many processes this is. For a map-style dataset it divides the batches, whose
            order depends on its `data_seed` and the epoch.
        num_workers: processes that read and decode; 0 for none.
        max_unreadable: rows that may be unreadable, a process.
        list_path: a file for one JSON line a row that cannot be read (`row`, `reason`); none without it.

    Attributes:
        batches: taken by this process so far.
        errors: (row, reason) of each row that this process could not read.

    Example:

    ```python
    source = TrainingBatches(photographs, 16, Accelerator(), num_workers=2)
    for batch in source:
        ...  # break at the last step
    ```
    """

    def __init__(
        self,
        dataset: Dataset | PhotographStream,
        batch_size: int,
        accelerator: Accelerator,
        *,
        num_workers: int = 0,
        max_unreadable: int = 100,
        list_path: Path | None = None,
    ):
        self.dataset = dataset
        self.accelerator = accelerator
        self.max_unreadable = max_unreadable
        self.list_path = list_path
        kind = _StreamFeed if isinstance(dataset, PhotographStream) else _RowFeed
        self.feed = kind(dataset, batch_size, accelerator, num_workers)
        self.batches = 0
        self.errors: list[tuple[int | str, str]] = []
        self._earlier: list[tuple[int | str, str]] = []  # of other processes, before the run was resumed
        self._waited, self._since = 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[Batch]:
        """Batches with at least one row, without end.

        Raises:
            UnreadableDataError: more than `max_unreadable` rows cannot be read, no row of an epoch can, or a file of a
                stream cannot.
        """
        self.take_wait_share()
        while True:
            readable = not self.feed.at_start
            for batch in self._timed(self.feed.epoch()):
                self.batches += 1
                self._note(batch.errors)
                if batch.pixel_values is not None:
                    readable = True
                    yield batch
            if not readable:
                raise UnreadableDataError("No row of the training dataset could be read.")

    def take_wait_seconds(self) -> float:
        """Seconds spent waiting for data since this or `take_wait_share` was called last."""
        waited, self._waited, self._since = self._waited, 0.0, time.perf_counter()
        return waited

    def take_wait_share(self) -> float:
        """Share, 0..1, of the wall time since the last call that was spent waiting for data."""
        elapsed = time.perf_counter() - self._since
        return min(1.0, self.take_wait_seconds() / elapsed) if elapsed > 0 else 0.0

    def state_dict(self) -> dict[str, object]:
        """Where the data stand, ready for JSON, for every process; all processes must call this together."""
        own = {"position": self.feed.position(), "batches": self.batches, "errors": [list(e) for e in self.errors]}
        return {**self.feed.settings, "processes": gather_object([own])}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from where `state_dict` was called; what was counted since is forgotten.

        Raises:
            CheckpointError: the position is of another number of processes, batch size, or kind of data, or of a
                stream with another number of workers or another buffer; nothing has changed then.
        """
        count = self.accelerator.num_processes
        if len(state["processes"]) != count:
            raise CheckpointError(
                f"The checkpoint's place in the data is that of {len(state['processes'])} process(es), but this run "
                f"has {count}; start it with as many."
            )
        for name, value in self.feed.settings.items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"The checkpoint's place in the data was counted with {name}={state.get(name)}, but this run has "
                    f"{value}; set it back."
                )
        index = self.accelerator.process_index
        own = state["processes"][index]
        self.feed.go_to(own["position"])
        self.batches = own["batches"]
        self.errors = [tuple(error) for error in own["errors"]]
        others = [part["errors"] for number, part in enumerate(state["processes"]) if number != index]
        self._earlier = [tuple(error) for errors in others for error in errors]

    def start_list(self) -> None:
        """Begin the file of unreadable rows, with those known where the run stands; for the main process alone."""
        if self.list_path is not None:
            self.list_path.unlink(missing_ok=True)
            self._append(list(dict.fromkeys(self._earlier + self.errors)))

    def unreadable_rows(self) -> int:
        """Number of different rows that could not be read, by all processes if they share the file that lists them."""
        rows = {row for row, _ in self._earlier + self.errors}
        if self.list_path is not None and self.list_path.exists():
            rows |= {json.loads(line)["row"] for line in self.list_path.read_text().splitlines()}
        return len(rows)

    def fingerprint(self) -> str:
        """A hexadecimal digest of the data, to notice that they changed (`Photographs.fingerprint`)."""
        return self.dataset.fingerprint()

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            # A loader draws a seed at its start, also when it starts anew to go on: the run's own numbers stay as they
            # are.
            with torch.random.fork_rng(devices=[]):
                batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _note(self, errors: list[tuple[int | str, str]]) -> None:
        if not errors:
            return
        known = {row for row, _ in self.errors}
        fresh = [error for error in errors if error[0] not in known]
        self.errors += fresh
        self._append(fresh)
        if len(self.errors) > self.max_unreadable:
            row, reason = self.errors[-1]
            raise UnreadableDataError(
                f"{len(self.errors)} rows of the training dataset could not be read, more than max_unreadable="
                f"{self.max_unreadable}; the last was row {row}: {reason}"
            )

    def _append(self, errors: list[tuple[int | str, str]]) -> None:
        if errors and self.list_path is not None:
            append_entries(self.list_path, ({"row": row, "reason": reason} for row, reason in errors))


class _RowFeed:
    """Epochs of a map-style dataset; the position is the number of batches taken."""

    def __init__(self, dataset: Photographs, batch_size: int, accelerator: Accelerator, num_workers: int):
        self.dataset, self.accelerator = dataset, accelerator
        self.taken = 0
        self.settings = {"data": "rows", "batch_size": batch_size}
        loader = DataLoader(
            dataset,
            batch_size,
            shuffle=True,
            drop_last=len(dataset) >= batch_size,
            collate_fn=collate,
            num_workers=num_workers,
            worker_init_fn=outlive_stop_signals,
        )
        self.loader = accelerator.prepare_data_loader(loader)

    @property
    def at_start(self) -> bool:
        return self.taken % len(self.loader) == 0

    def position(self) -> int:
        return self.taken

    def go_to(self, position: int) -> None:
        self.taken = position

    def epoch(self) -> Iterator[Batch]:
        """The rest of the epoch."""
        epoch, skip = divmod(self.taken, len(self.loader))
        self.dataset.epoch = epoch
        self.loader.set_epoch(epoch)
        loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
        for batch in loader:
            self.taken += 1
            yield batch


class _StreamFeed:
    """Epochs of a stream; the position is that of every worker, and whose turn it is."""

    def __init__(self, stream: PhotographStream, batch_size: int, accelerator: Accelerator, num_workers: int):
        self.stream, self.batch_size, self.num_workers = stream, batch_size, num_workers
        self.process = (accelerator.process_index, accelerator.num_processes)
        self.number, self.turn = 0, 0
        self.positions: dict[int, Position] = {}
        self.settings = {
            "data": "stream",
            "batch_size": batch_size,
            "dataloader_num_workers": max(1, num_workers),
            "shuffle_buffer": stream.shuffle_buffer,
            "seed": stream.seed,
        }
        shards, readers = stream.dataset.num_shards, max(1, num_workers) * accelerator.num_processes
        if shards < readers and accelerator.is_main_process:
            warnings.warn(
                f"The streamed dataset has {shards} shard(s) for {accelerator.num_processes} process(es) of "
                f"{max(1, num_workers)} worker(s): some of them read the same files and keep every n-th row.",
                UserWarning,
                stacklevel=4,
            )

    @property
    def at_start(self) -> bool:
        return not self.positions

    def position(self) -> dict[str, object]:
        workers = {str(worker): asdict(position) for worker, position in self.positions.items()}
        return {"epoch": self.number, "turn": self.turn, "workers": workers}

    def go_to(self, position: dict[str, object]) -> None:
        self.number, self.turn = position["epoch"], position["turn"]
        self.positions = {int(worker): Position(**place) for worker, place in position["workers"].items()}

    def epoch(self) -> Iterator[Batch]:
        """The rest of the epoch."""
        reader = StreamReader(self.stream, self.batch_size, self.process, self.number, dict(self.positions), self.turn)
        # Not prepared by Accelerate, which would let the first process read for all.
        loader = DataLoader(
            reader,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=outlive_stop_signals,
        )
        for batch in loader:
            if isinstance(batch, UnreadableDataError):
                raise batch
            worker = batch.position.pop("worker")
            self.positions[worker] = Position(**batch.position)
            self.turn = (worker + 1) % max(1, self.num_workers)
            yield batch
        self.number, self.turn, self.positions = self.number + 1, 0, {}


def _as_it_is(batch: Batch) -> Batch:
    return batch
