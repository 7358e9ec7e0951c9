"""`per_image.parquet`: the numbers of every image, one row group a measure and method, handled one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ..files import write_atomically


PER_IMAGE = ("target", "labels", "values", "curves", "clean", "reference", "tie_fraction")

_KINDS = {name: pa.float32() for name in PER_IMAGE} | {
    "target": pa.int64(),
    "labels": pa.int64(),
    "curves": pa.list_(pa.float32()),
}
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("measure", "method", "image_id")),
        *((name, _KINDS[name]) for name in PER_IMAGE),
    ]
)

# Floats hardly repeat, but their sign and exponent do: split into bytes and compressed they take two thirds.
_COMPACT = {
    "compression": "zstd",
    "use_dictionary": ["measure", "method", "image_id"],
    "use_byte_stream_split": ["values", "clean", "reference", "tie_fraction", "curves.list.element"],
    "write_statistics": False,
}

Group = tuple[str, str, list[str], Mapping[str, np.ndarray | None]]
"""Measure, method, image ids, and the columns of `PER_IMAGE` that there are."""


def write_groups(path: Path, groups: Iterable[Group], metadata: Mapping[str, Any]) -> None:
    """Write the groups, whole or not at all; groups without an image are left out.

    Args:
        path: of the file.
        groups: in the order of the file.
        metadata: JSON values, kept with the schema under `hf_aha`.

    Raises:
        OSError: the file cannot be written.
    """

    def write(file: Path) -> None:
        schema = _SCHEMA.with_metadata({"hf_aha": json.dumps(metadata)})
        with parquet.ParquetWriter(file, schema, **_COMPACT) as writer:
            for measure, method, image_ids, arrays in groups:
                if image_ids:
                    count = len(image_ids)
                    named = [pa.array([text] * count, pa.string()) for text in (measure, method)]
                    columns = [_column(arrays.get(name), _KINDS[name], count) for name in PER_IMAGE]
                    table = pa.table([*named, pa.array(image_ids, pa.string()), *columns], schema=schema)
                    writer.write_table(table, row_group_size=count)

    write_atomically(path, write)


def read_groups(path: Path) -> Iterator[Group]:
    """The groups of `write_groups`, one in memory at a time."""
    with parquet.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number).combine_chunks()
            arrays = {name: _array(group[name]) for name in PER_IMAGE}
            yield group["measure"][0].as_py(), group["method"][0].as_py(), group["image_id"].to_pylist(), arrays


def _column(array: np.ndarray | None, kind: pa.DataType, count: int) -> pa.Array:
    if array is None:
        return pa.nulls(count, kind)
    if array.ndim == 1:
        return pa.array(array, kind)
    offsets = np.arange(0, array.size + 1, array.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(array.reshape(-1)))


def _array(column: pa.ChunkedArray) -> np.ndarray | None:
    chunk = column.chunk(0)
    if chunk.null_count == len(chunk):
        return None
    if pa.types.is_list(chunk.type):
        return chunk.flatten().to_numpy().reshape(len(chunk), -1)
    return chunk.to_numpy()
