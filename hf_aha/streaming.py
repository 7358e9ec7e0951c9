"""Photographs read as they arrive: datasets too large to copy, divided among readers, in an order that can be resumed.

`datasets` reads the files; what stands here is the order. Its own shuffle buffer is lost when a run resumes
(`IterableDataset.state_dict`), and its division of shards among processes reads every file everywhere unless their
number divides (`split_dataset_by_node`). Here a reader owns whole shards and shuffles its rows block by block, so a
few integers say where it stands, and resuming reads one block again instead of the epoch.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import torch

from .data import (
    Batch,
    Photographs,
    ProcessorCrop,
    RandomCrop,
    UnreadableDataError,
    check_label_column,
    collate,
    digest,
    find_image_column,
    read_row,
)


# Damaged files: the rest of the shard is given up. Failures of the disk or the network are none of these.
_DAMAGED = (tarfile.TarError, zlib.error, EOFError, UnicodeDecodeError, pa.ArrowInvalid)


def stream_photographs(
    name: str,
    *,
    split: str,
    config_name: str | None = None,
    image_column: str | None = None,
    revision: str | None = None,
) -> tuple[datasets.IterableDataset, str]:
    """Open one split of an image dataset for streaming, without decoding its images.

    Args:
        name: a dataset id of the Hub, or a folder, of parquet files, images or webdataset shards (`.tar`).
        split: a whole split.
        config_name, image_column, revision: as in `load_photographs`.

    Returns:
        the dataset, with the image column as encoded bytes or paths, and the name of that column.

    Raises:
        ValueError: there is no such split, it has no row, or the columns do not fit (see `load_photographs`).
    """
    # What `load_dataset(streaming=True)` does, except that the builder still knows the files.
    builder = datasets.load_dataset_builder(name, config_name, revision=revision)
    splits = builder.as_streaming_dataset()
    if split not in splits:
        slices = "; a part of a split cannot be streamed" if "[" in split else ""
        raise ValueError(f"The dataset {name} has no split {split!r} to stream, only {', '.join(splits)}{slices}.")
    dataset = splits[split]
    if dataset.features is None:
        raise ValueError(
            f"The dataset {name} does not tell its columns before it is read; stream it as parquet, webdataset shards "
            "or an image folder."
        )
    image_column = find_image_column(dataset.features, name, image_column)
    feature = dataset.features[image_column]
    if not isinstance(feature, datasets.Image) and feature != datasets.Value("binary"):
        raise ValueError(f"The column {image_column!r} of the dataset {name} holds no images but {feature}.")
    # `decode` also takes off the threads that decode streamed image folders of the Hub.
    dataset = dataset.decode(False).cast_column(image_column, datasets.Image(decode=False))
    if next(iter(dataset), None) is None:
        raise ValueError(f"The split {split!r} of the dataset {name} has no row.")
    # As for a dataset that was downloaded: the files that the rows come from.
    files = (builder.config.data_files or {}).get(split, ())
    dataset.info.download_checksums = {str(file): {"num_bytes": None, "checksum": None} for file in files}
    return dataset, image_column


@dataclass(frozen=True)
class Share:
    """What one of several readers reads in an epoch.

    Attributes:
        shards: numbers of its shards, in its order.
        step, offset: it keeps the rows `offset`, `offset + step`, ... of each of them.
        reader: its number among all readers of all processes.
    """

    shards: tuple[int, ...]
    step: int
    offset: int
    reader: int


@dataclass(frozen=True)
class Position:
    """Where a reader stands in its epoch.

    Attributes:
        shard: place, in `Share.shards`, of the shard in which the current block of the shuffle begins.
        row: number, in that shard, of the first row of the block.
        block: number of the block.
        taken: rows of the block that were handed out.
        batches: batches handed out in this epoch.
    """

    shard: int = 0
    row: int = 0
    block: int = 0
    taken: int = 0
    batches: int = 0


@dataclass
class StreamedRow:
    """One undecoded row.

    Attributes:
        place: place of its shard in `Share.shards`.
        shard, row: number of the shard in the dataset, of the row in the shard.
        cells: the columns, None where the rest of the shard is damaged.
        damage: the reason then.
    """

    place: int
    shard: int
    row: int
    cells: dict[str, Any] | None
    damage: str | None = None


class PhotographStream:
    """Rows of a streamed image dataset for training: which of them in which order, and how they are decoded.

    Every epoch has its own order of the shards, and a reader shuffles its rows in blocks of `shuffle_buffer`: within a
    block the order is random, and while a block is handed out the next one takes its place in memory. A buffer much
    smaller than a stretch of rows of one class leaves the classes together.

    Args:
        dataset: with an undecoded image column, as `stream_photographs` returns it.
        image_column: its name.
        transform: `RandomCrop` or `ProcessorCrop`.
        label_column: a column of class indices; rows carry label -1 without it, or where it is empty.
        seed: seeds order and crops; a row of epoch e always gets the same crop.
        shuffle_buffer: rows that a reader holds to shuffle them, 0 for the order of the files.

    Raises:
        ValueError: there is no such label column, it does not hold integers, or the buffer is negative.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        image_column: str,
        transform: RandomCrop | ProcessorCrop,
        label_column: str | None = None,
        seed: int = 0,
        shuffle_buffer: int = 1000,
    ):
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must not be negative, but it is {shuffle_buffer}; 0 is for none.")
        if label_column is not None:
            check_label_column(dataset.features, label_column)
        kept = [name for name in (image_column, label_column, "__key__") if name in dataset.features]
        self.dataset = dataset.select_columns(kept)
        self.image_column = image_column
        self.transform = transform
        self.label_column = label_column
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer

    def share(self, epoch: int, process: tuple[int, int] = (0, 1), worker: tuple[int, int] = (0, 1)) -> Share:
        """The share of one worker of one process, each given as (number, how many).

        Whole shards go to processes, and those of a process to its workers; where there are too few, the readers
        concerned all read the same ones and each keeps every n-th row.
        """
        # Without a buffer the shards too stay in the order of the files.
        count = self.dataset.num_shards
        shards = np.random.default_rng((self.seed, epoch)).permutation(count) if self.shuffle_buffer else range(count)
        shards, step, offset = [int(shard) for shard in shards], 1, 0
        for number, parts in (process, worker):
            if len(shards) >= parts:
                shards = shards[number::parts]
            else:
                step, offset = step * parts, offset + step * number
        return Share(tuple(shards), step, offset, reader=process[0] * worker[1] + worker[0])

    def rows(self, share: Share, shard: int = 0, row: int = 0) -> Iterator[StreamedRow]:
        """The rows of a share from a place on, in the order of its shards and files.

        Raises:
            UnreadableDataError: the disk or the network failed.
        """
        for place in range(shard, len(share.shards)):
            number = share.shards[place]
            rows = self.dataset.shard(num_shards=self.dataset.num_shards, index=number)
            if row:
                rows = rows.skip(row)
            try:
                # Unlike `iter(rows)`, this does not divide the shard among the workers of a DataLoader once more.
                for cells in rows.iter(batch_size=1):
                    # The first shard's remainder must not always fall to the same reader.
                    if (row + place) % share.step == share.offset:
                        yield StreamedRow(place, number, row, {name: values[0] for name, values in cells.items()})
                    row += 1
            except _DAMAGED as error:
                if share.offset == place % share.step:  # one reader lists it
                    yield StreamedRow(place, number, row, None, f"the rest of the shard is damaged: {_reason(error)}")
            except OSError as error:
                raise UnreadableDataError(
                    f"Shard {number} of the training dataset cannot be read beyond row {row}: {_reason(error)}"
                ) from error
            row = 0

    def shuffled(self, share: Share, epoch: int, start: Position) -> Iterator[tuple[StreamedRow, Position]]:
        """The rows of a share in the order of an epoch, each with the position after it.

        The iterator that begins at such a position gives what this one gives from there on.
        """
        rows = self.rows(share, start.shard, start.row)
        block, number, taken = list(islice(rows, max(1, self.shuffle_buffer))), start.block, start.taken
        while block:
            shard, row = block[0].place, block[0].row
            order = np.random.default_rng((self.seed, epoch, share.reader, number)).permutation(len(block))
            following = []
            for count, index in enumerate(order, start=1):
                chosen, block[index] = block[index], None
                following += islice(rows, 1)
                if count > taken:
                    yield chosen, Position(shard, row, number, count, start.batches)
            block, number, taken = following, number + 1, 0

    def read(self, row: StreamedRow, epoch: int) -> dict[str, Any]:
        """Decode one row: like a row of `Photographs`, and its `name` where it cannot be read."""
        index = (row.shard << 32) + row.row
        name = f"shard {row.shard} row {row.row}"
        if row.cells is None:
            return {"index": index, "name": name, "error": row.damage}
        cell = row.cells[self.image_column]
        label = None if self.label_column is None else row.cells[self.label_column]
        generator = np.random.default_rng((self.seed, epoch, index))
        read = read_row(cell, label, index, self.transform, generator)
        if "error" in read:
            key = row.cells.get("__key__") or (cell or {}).get("path")
            read["name"] = f"{name} ({key})" if key else name
        return read

    def first(self, count: int) -> Photographs:
        """The first `count` rows of the shuffled stream, held in memory: to validate on."""
        rows = [row for row, _ in islice(self.shuffled(self.share(0), 0, Position()), count)]
        cells = [row.cells for row in rows if row.cells is not None]
        kept = datasets.Dataset.from_list(cells, features=self.dataset.features)
        return Photographs(kept, self.image_column, self.transform, self.label_column, self.seed)

    def fingerprint(self) -> str:
        """A hexadecimal digest of the shards' number and names, the columns' types, and rows of two shards.

        It depends on the data alone, neither on the place they lie in nor on the commit.
        """
        names = [file.rsplit("/", 1)[-1] for file in self.dataset.info.download_checksums or {}]
        ends = dict.fromkeys((0, self.dataset.num_shards - 1))
        rows = (row.cells for end in ends for row in islice(self.rows(Share((end,), 1, 0, 0)), 8) if row.cells)
        return digest([self.dataset.num_shards, names, self.dataset.features], rows, self.image_column)

    def summary(self) -> dict[str, object]:
        """What a run's summary says of its data; how many rows a stream has is not known."""
        return {"streaming": True, "shuffle_buffer": self.shuffle_buffer}


class StreamReader(torch.utils.data.IterableDataset):
    """The batches of one process in one epoch of a stream, from given positions on; each carries its position.

    Where a file cannot be read, it gives the error as the last item: one raised in a worker would reach the user
    inside a traceback.

    Args:
        stream: what to read.
        batch_size: rows a batch. Fewer at the end of a reader's epoch are left out, unless they are all it has.
        process: (number, how many).
        epoch: number of the epoch.
        positions: of each worker; the start where there is none.
        turn: the worker whose batch comes first.
    """

    def __init__(
        self,
        stream: PhotographStream,
        batch_size: int,
        process: tuple[int, int],
        epoch: int,
        positions: dict[int, Position],
        turn: int,
    ):
        self.stream, self.batch_size, self.process = stream, batch_size, process
        self.epoch, self.positions, self.turn = epoch, positions, turn

    def __iter__(self) -> Iterator[Batch | UnreadableDataError]:
        info = torch.utils.data.get_worker_info()
        workers = 1 if info is None else info.num_workers
        if info is not None:
            # Locks of file systems do not survive a fork; https://github.com/fsspec/gcsfs/issues/379
            fsspec.asyn.reset_lock()
        # A DataLoader always begins with its first worker, so the workers trade places instead.
        worker = (self.turn + (0 if info is None else info.id)) % workers
        start = self.positions.get(worker, Position())
        share = self.stream.share(self.epoch, self.process, (worker, workers))
        rows, batches = self.stream.shuffled(share, self.epoch, start), start.batches
        try:
            while chunk := list(islice(rows, self.batch_size)):
                if len(chunk) < self.batch_size and batches:
                    return
                batches += 1
                batch = collate([self.stream.read(row, self.epoch) for row, _ in chunk])
                batch.position = {**asdict(chunk[-1][1]), "batches": batches, "worker": worker}
                yield batch
        except UnreadableDataError as error:
            yield error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
