"""The folder of a dataset of maps: a parquet file for every so many photographs, each written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ..files import write_atomically
from .ranks import Quantisation


FORMAT = {"format": "hf_aha.dataset_maps", "format_version": 1}
RUN_FILE = "run.json"
CARD_FILE = "README.md"
UNREADABLE_FILE = "unreadable.jsonl"
LOCK_FILE = ".lock"

FEATURES = datasets.Features(
    {
        "row": datasets.Value("int64"),
        "image_id": datasets.Value("string"),
        "sha256": datasets.Value("string"),
        "place": datasets.Value("int32"),
        "target": datasets.Value("int32"),
        "label": datasets.Value("string"),
        "probability": datasets.Value("float32"),
        "predicted_target": datasets.Value("int32"),
        "predicted_label": datasets.Value("string"),
        "predicted_probability": datasets.Value("float32"),
        "ranks": datasets.Image(),
        "top_classes": datasets.Value("string"),
        "geometry": datasets.Value("string"),
        "made_by": datasets.Value("string"),
    }
)
"""Columns of the dataset; the last three hold JSON."""

CONTRAST_FEATURES = datasets.Features(
    {
        "against": datasets.Value("int32"),
        "against_label": datasets.Value("string"),
        "against_probability": datasets.Value("float32"),
    }
)
"""Columns that follow where the class asked about is compared with another."""

COLUMNS = {
    "row": "number of the photograph in its split, from 0",
    "image_id": "its name in the dataset, if it has one",
    "sha256": "of the stored file of the photograph",
    "place": "0, or with several maps a photograph 0 for the most probable class, 1 for the next",
    "target": "index of the class that the map explains",
    "label": "its name",
    "probability": "its softmax probability",
    "predicted_target": "index of the most probable class",
    "predicted_label": "its name",
    "predicted_probability": "its softmax probability",
    "ranks": "the map, a grey PNG on the classifier's input grid; white = most important",
    "top_classes": "JSON: the most probable classes, each with target, label and probability",
    "geometry": "JSON: sizes (height, width) and crop box (left, top, right, bottom) that lead back to the photograph",
    "made_by": "JSON: explainer, classifier, quantisation, precision and versions",
}
"""What each column holds, for the card."""

CONTRAST_COLUMNS = {
    "against": "index of the class that it is compared with: white pixels speak for the target rather than this one, "
    "black ones for this one rather than the target",
    "against_label": "its name",
    "against_probability": "its softmax probability",
}
"""Likewise of a comparison."""

_METADATA_KEY = b"hf_aha"
# As `datasets` writes datasets of images, so that a viewer can read a few rows without the rest.
_ROW_GROUP = 100


class MapsError(ValueError):
    """Maps cannot be written or read; the message is one sentence for the user."""


class MapsFolder:
    """Reads and writes the folder of one run.

    `run.json` says what was explained with what, `data/SPLIT-00012-of-00300.parquet` holds the maps of `shard_rows`
    photographs in their order, its metadata the photographs among them that could not be explained.

    Args:
        folder: of the output.
        split: name of the split in the new dataset.
        photographs: number of photographs.
        shard_rows: of them in each file.
        contrast: the class asked about is compared with another, which the rows name.
    """

    def __init__(self, folder: Path, split: str, photographs: int, shard_rows: int, contrast: bool = False) -> None:
        self.folder, self.split = Path(folder), split
        self.photographs, self.shard_rows = photographs, shard_rows
        self.features = datasets.Features({**FEATURES, **(CONTRAST_FEATURES if contrast else {})})
        self.shards = -(-photographs // shard_rows)

    @classmethod
    def existing(cls, folder: str | Path) -> MapsFolder:
        """The folder of an earlier run.

        Raises:
            MapsError: it holds none.
        """
        run = _read_run(Path(folder))
        contrast = run["identity"].get("against") is not None
        return cls(Path(folder), run["split"], run["photographs"], run["shard_rows"], contrast)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of this folder, which is created when missing; the lock ends with the process.

        Raises:
            MapsError: another run is at work here, or the folder holds files that are none of ours.
            OSError: the folder cannot be written.
        """
        if not (self.folder / RUN_FILE).exists() and self.folder.is_dir():
            found = sorted(one.name for one in self.folder.iterdir() if one.name != LOCK_FILE)
            if found:
                raise MapsError(
                    f"the folder {self.folder} holds other files already ({', '.join(found[:3])}); give an empty or a "
                    "new --output."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK_FILE)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise MapsError(
                f"the folder {self.folder} is in use by another run; wait for it to end, or give another --output."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def open(self, identity: Mapping[str, Any], resume: bool) -> None:
        """Begin a run, or go on with the one that lies here; call it inside `locked`.

        Args:
            identity: JSON values that all maps of this folder share.
            resume: go on where the folder holds something.

        Raises:
            MapsError: something lies here and `resume` is not set, or it was made differently.
            OSError: the folder cannot be written.
        """
        wanted = json.loads(json.dumps({**FORMAT, **self._sizes(), "identity": identity}))
        path = self.folder / RUN_FILE
        if not path.exists():
            text = json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
            write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
        elif not resume:
            raise MapsError(
                f"the folder {self.folder} holds maps already; give --resume to go on with them, or another --output."
            )
        else:
            found = _read_run(self.folder)
            difference = _difference(found, wanted)
            if difference:
                raise MapsError(f"the folder {self.folder} holds maps of {difference}; give another --output.")
        (self.folder / "data").mkdir(exist_ok=True)
        for left_over in (self.folder / "data").glob(".*.partial.parquet"):  # of a process that was killed
            left_over.unlink()

    def rows_of(self, shard: int) -> range:
        """Numbers of the photographs of one shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.photographs))

    def path_of(self, shard: int) -> Path:
        """The file of one shard."""
        return self.folder / "data" / f"{self.split}-{shard:05d}-of-{self.shards:05d}.parquet"

    def missing(self) -> list[int]:
        """Shards that are not there, or whose file is damaged."""
        return [shard for shard in range(self.shards) if self._metadata(shard) is None]

    def write(
        self,
        shard: int,
        maps: Sequence[Mapping[str, Any]],
        errors: Sequence[Mapping[str, Any]],
        quantisation: Quantisation,
    ) -> None:
        """Write a shard, whole or not at all.

        Args:
            shard: its number.
            maps: rows of `features`; `ranks` as PNG bytes.
            errors: `row`, `image_id` and `error` of each photograph without a map.
            quantisation: of the maps, for the metadata.
        """
        ordered = sorted(maps, key=lambda one: (one["row"], one["place"]))
        schema = self.features.arrow_schema
        record = {
            **FORMAT,
            "rows": [self.rows_of(shard).start, self.rows_of(shard).stop],
            "quantisation": describe_quantisation(quantisation),
            "unreadable": sorted(errors, key=lambda one: one["row"]),
        }
        metadata = {**schema.metadata, _METADATA_KEY: json.dumps(record, ensure_ascii=False).encode()}
        rows = [{**one, "ranks": {"bytes": one["ranks"], "path": None}} for one in ordered]
        table = pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata))
        # PNGs are compressed already, hashes cannot be.
        leaves = [*(name for name in self.features if name not in ("ranks", "sha256")), "ranks.path"]
        compression = {**dict.fromkeys(leaves, "zstd"), "ranks.bytes": "none", "sha256": "none"}

        def save(path: Path) -> None:
            with pq.ParquetWriter(path, table.schema, use_dictionary=leaves, compression=compression) as file:
                if len(table):  # `datasets` cannot read an empty group of rows, but no group at all
                    file.write_table(table, row_group_size=_ROW_GROUP)

        write_atomically(self.path_of(shard), save)

    def summary(self) -> tuple[int, int, list[dict[str, Any]]]:
        """Number of maps, bytes of their files, and the photographs without a map.

        Raises:
            MapsError: a shard is missing.
        """
        maps, size, errors = 0, 0, []
        for shard in range(self.shards):
            metadata = self._metadata(shard)
            if metadata is None:
                raise MapsError(
                    f"the folder {self.folder} lacks {len(self.missing())} of its {self.shards} files: the run is not "
                    "finished; go on with --resume."
                )
            maps += metadata.num_rows
            size += self.path_of(shard).stat().st_size
            errors += json.loads(metadata.metadata[_METADATA_KEY])["unreadable"]
        return maps, size, errors

    def _metadata(self, shard: int) -> pq.FileMetaData | None:
        try:
            metadata = pq.read_metadata(self.path_of(shard))
        except (FileNotFoundError, pa.ArrowInvalid):
            return None
        return metadata if _METADATA_KEY in (metadata.metadata or {}) else None

    def _sizes(self) -> dict[str, Any]:
        return {"split": self.split, "photographs": self.photographs, "shard_rows": self.shard_rows}


def describe_quantisation(quantisation: Quantisation) -> dict[str, Any]:
    """What a reader of the stored numbers must know, JSON values."""
    return {
        "dtype": quantisation.name,
        "levels": quantisation.levels,
        "meaning": "level / levels = (N - 1 - k) / (N - 1) for the pixel of hard rank k (0 = most important; equal "
        "scores in index order) among the N pixels of the map",
        "error_bound": quantisation.error_bound,
    }


def split_name(split: str) -> str:
    """A name for the new dataset's split, of the one that was explained.

    Example:
        >>> split_name("validation[:100]"), split_name("train+test"), split_name("all")
        ('validation', 'train_test', 'all_splits')
    """
    name = re.sub(r"\W+", "_", re.sub(r"\[[^]]*\]", "", split)).strip("_")
    return "all_splits" if name in ("", "all") else name


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MapsError(f"the folder {folder} holds no maps: it has no {RUN_FILE}.") from error
    except (OSError, ValueError) as error:
        raise MapsError(f"{path} cannot be read: it is damaged, or no file of ours.") from error
    if not isinstance(run, dict) or {key: run.get(key) for key in FORMAT} != FORMAT:
        raise MapsError(f"{path} is no record of maps that this version of hf_aha can read.")
    return run


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What the first difference of two records makes of the other run; None when there is none."""
    for key, there, now in _leaves(found, wanted):
        if there != now:
            part = key.split(".")[1] if key.startswith("identity.") else key
            subject = {
                "explainer": "another explainer",
                "classifier": "another classifier",
                "processor": "another image processor",
                "dataset": "another dataset, or one that has changed since",
                "photographs": "another number of photographs",
            }.get(part, "other settings")
            return f"{subject} ({key.removeprefix('identity.')}: {_short(there)} there, {_short(now)} now)"
    return None


def _leaves(found: Any, wanted: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if not (isinstance(found, Mapping) and isinstance(wanted, Mapping)):
        return [(prefix.removesuffix("."), found, wanted)]
    keys = dict.fromkeys([*wanted, *found])
    return [leaf for key in keys for leaf in _leaves(found.get(key), wanted.get(key), f"{prefix}{key}.")]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
