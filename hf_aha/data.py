"""Photographs for training and evaluation: datasets of the Hub or of a folder as batches of normalised pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from .images import ImageReadError, read_image
from .resized_copies import resized_copies


class UnreadableDataError(ValueError):
    """Too many rows of a dataset cannot be read, or none can, or its files cannot."""


def load_photographs(
    name: str,
    *,
    split: str,
    config_name: str | None = None,
    image_column: str | None = None,
    revision: str | None = None,
    besides: Collection[str] = (),
) -> tuple[datasets.Dataset, str]:
    """Load one split of an image dataset without decoding its images.

    Args:
        name: a dataset id of the Hub, a folder of parquet files, or an image folder.
        split: a split, slices allowed (`"train[:100]"`).
        config_name: configuration of a Hub dataset.
        image_column: column of the images; found by its type, if there is one only, when left out.
        revision: commit, tag or branch of a Hub dataset.
        besides: image columns that hold something else, such as masks.

    Returns:
        the dataset, with the image column as encoded bytes, and the name of that column.

    Raises:
        ValueError: the dataset has no image column, several and none named, or not the named one, or that one holds
            no images; or the split has no row.
    """
    dataset = datasets.load_dataset(name, config_name, split=split, revision=revision)
    image_column = find_image_column(dataset.features, name, image_column, besides)
    try:
        return dataset.cast_column(image_column, datasets.Image(decode=False)), image_column
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"The column {image_column!r} of the dataset {name} holds no images but {dataset.features[image_column]}."
        ) from error


def find_image_column(
    features: datasets.Features, name: str, image_column: str | None = None, besides: Collection[str] = ()
) -> str:
    """The column of the images: the named one if it exists, else the only one of that type.

    Args:
        features: types of the columns.
        name: of the dataset, for the messages.
        image_column: name given by the user.
        besides: image columns that hold something else.

    Raises:
        ValueError: no image column, several and none named, or no column of that name.

    Example:
        >>> find_image_column(datasets.Features({"jpg": datasets.Image(), "cls": datasets.Value("int64")}), "shards")
        'jpg'
    """
    if image_column is not None:
        if image_column not in features:
            raise ValueError(
                f"The dataset {name} has no column {image_column!r}; its columns are {', '.join(features)}."
            )
        return image_column
    images = [
        column for column, feature in features.items() if isinstance(feature, datasets.Image) and column not in besides
    ]
    if len(images) != 1:
        found = f"has {len(images)} image columns ({', '.join(images)})" if images else "has no image column"
        raise ValueError(
            f"The dataset {name} {found} among its columns {', '.join(features)}; name one with image_column."
        )
    return images[0]


def find_label_column(features: datasets.Features) -> str:
    """The only column of classes: of the type `ClassLabel`, or integers named `label` or, in webdataset shards, `cls`.

    Raises:
        ValueError: there is none, or several.

    Example:
        >>> find_label_column(datasets.Features({"jpg": datasets.Image(), "cls": datasets.Value("int64")}))
        'cls'
    """
    found = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not found:
        found = [column for column in ("label", "cls") if column in features and _holds_integers(features[column])]
    if len(found) != 1:
        what = f"{len(found)} columns of classes ({', '.join(found)})" if found else "no column of classes"
        raise ValueError(
            f"The dataset has {what} among its columns {', '.join(features)}; name one with label_column."
        )
    return found[0]


def check_label_column(features: datasets.Features, label_column: str) -> None:
    """Raise a ValueError unless there is such a column and it holds integers."""
    if label_column not in features:
        raise ValueError(f"The dataset has no column {label_column!r}; its columns are {', '.join(features)}.")
    if not _holds_integers(features[label_column]):
        kind = getattr(features[label_column], "dtype", "a structure")
        raise ValueError(f"The label column {label_column!r} must hold class indices, but it holds {kind}.")


def _holds_integers(feature: object) -> bool:
    return "int" in getattr(feature, "dtype", "a structure")


@dataclass
class RandomCrop:
    """A random crop of a photograph, mirrored half of the time, resized and normalised.

    Explainers are trained on crops so that they meet objects at many places and sizes.

    Args:
        size: (height, width) of the result.
        mean, std: per-channel normalisation of RGB in [0, 1].
        scale: range of the crop's share of the image area; the aspect ratio is that of `size` times 3/4 to 4/3, and
            further from it only where the image is too narrow for such a crop.
        resample: a PIL resampling filter.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.35, 1.0)
    resample: int = Image.Resampling.BICUBIC

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> torch.Tensor:
        """Return float32 pixels (3, height, width) of one random crop of `image`."""
        width, height = image.size
        aspect = self.size[1] / self.size[0] * np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        area = generator.uniform(*self.scale) * width * height
        crop_height = min(height, (area / aspect) ** 0.5)
        crop_width = min(width, area / crop_height)
        crop_height = min(height, area / crop_width)
        left = generator.uniform(0, width - crop_width)
        top = generator.uniform(0, height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        pixels = np.asarray(image.resize(self.size[::-1], self.resample, box=box), dtype=np.float32) / 255
        if generator.random() < 0.5:
            pixels = pixels[:, ::-1]
        pixels = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@dataclass
class ProcessorCrop:
    """The target's own image processor: what a user's photograph goes through."""

    image_processor: BaseImageProcessor

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> torch.Tensor:
        """Return float32 pixels (3, height, width) of `image`; `generator` is not used."""
        return self.image_processor(image, return_tensors="pt")["pixel_values"][0]


class Photographs(Dataset):
    """Rows of an image dataset as `{"pixel_values": (3, H, W) float32, "index": int, "label": int}`.

    A row that cannot be read becomes `{"index": int, "error": str}`, so that one broken file does not end a run of a
    million; `collate` sets such rows aside and the trainer counts them.

    Args:
        dataset: rows with an undecoded image column, as `load_photographs` returns them.
        image_column: its name.
        transform: `RandomCrop` or `ProcessorCrop`.
        label_column: a column of class indices; rows carry label -1 without it, or where it is empty.
        seed: seeds the crops; row i of epoch e always gets the same crop.
        cache_size: shorter side, in pixels, of a resized copy of every photograph that is made once and read from then
            on (see `resized_copies`); none without it.
        cache_processes: processes that make the copies.

    Raises:
        ValueError: there is no such label column, or it does not hold integers; the copies would be smaller than a
            crop.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        transform: RandomCrop | ProcessorCrop,
        label_column: str | None = None,
        seed: int = 0,
        cache_size: int | None = None,
        cache_processes: int = 1,
    ):
        if label_column is not None:
            check_label_column(dataset.features, label_column)
        columns = [image_column] if label_column is None else [image_column, label_column]
        self.dataset = dataset.select_columns(columns)
        if cache_size is not None:
            side = max(getattr(transform, "size", (1,)))
            if cache_size < side:
                raise ValueError(
                    f"cache_size={cache_size} is less than the {side} pixels of a crop; give at least that, or none."
                )
            self.dataset = resized_copies(self.dataset, image_column, cache_size, processes=cache_processes)
        self.cache_size = cache_size
        self.image_column = image_column
        self.transform = transform
        self.label_column = label_column
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        generator = np.random.default_rng((self.seed, self.epoch, index))
        label = None if self.label_column is None else row[self.label_column]
        return read_row(row[self.image_column], label, index, self.transform, generator)

    def fingerprint(self) -> str:
        """A hexadecimal digest of the number of rows, the columns' types and 64 rows spread over the dataset.

        It depends on the data alone: neither on where they lie nor on when they were downloaded.
        """
        places = np.unique(np.linspace(0, len(self) - 1, min(64, len(self))).astype(int))
        rows = (self.dataset[int(place)] for place in places)
        return digest([len(self), self.dataset.features], rows, self.image_column)

    def summary(self) -> dict[str, object]:
        """What a run's summary says of its data."""
        copies = {} if self.cache_size is None else {"cache_size": self.cache_size}
        return {"train_rows": len(self), **copies}


def read_row(
    cell: Mapping[str, Any] | None,
    label: int | None,
    index: int,
    transform: RandomCrop | ProcessorCrop,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Decode and transform one photograph.

    Args:
        cell: an undecoded image: `bytes`, or a `path` or URL.
        label: class, None where unknown.
        index: number that the row goes by.
        transform: of the image; draws from `generator`.

    Returns:
        `pixel_values`, `index` and `label`, or, for an image that cannot be read, `index` and `error`.
    """
    try:
        image = read_image(encoded_image(cell))
    except ImageReadError as error:
        return {"index": index, "error": str(error)}
    return {"pixel_values": transform(image, generator), "index": index, "label": -1 if label is None else label}


def encoded_image(cell: Mapping[str, Any] | None) -> bytes | Path:
    """The bytes of an undecoded image, or its path if it is a file of this machine.

    Raises:
        ImageReadError: there is neither, or a remote file cannot be read.
    """
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        raise ImageReadError("The image of this row is missing.")
    if cell.get("bytes") is not None:
        return cell["bytes"]
    if "://" not in cell["path"]:
        return Path(cell["path"])
    # Streamed image folders of the Hub name their files like this: hf://datasets/ID@COMMIT/train/a.jpg
    try:
        with fsspec.open(cell["path"], "rb") as file:
            return file.read()
    except OSError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageReadError(f"The image {cell['path']} cannot be fetched: {reason}") from error


def digest(facts: list[object], rows: Iterable[Mapping[str, Any]], image_column: str) -> str:
    """SHA-256 over the text of `facts` and the content of `rows`; an image file counts with its name and size."""
    total = hashlib.sha256(repr([str(fact) for fact in facts]).encode())
    for row in rows:
        cell = row[image_column] or {}
        content = cell.get("bytes")
        if content is None and cell.get("path"):
            path = Path(cell["path"])
            content = f"{path.name} {path.stat().st_size if path.is_file() else ''}".encode()
        others = sorted((name, str(value)) for name, value in row.items() if name != image_column)
        total.update(hashlib.sha256(content or b"").digest() + repr(others).encode())
    return total.hexdigest()


@dataclass
class Batch:
    """Readable rows stacked, unreadable ones listed.

    Attributes:
        pixel_values: (B, 3, H, W) float32, normalised; None when no row could be read.
        labels: (B,) int64, -1 where unknown.
        indices: (B,) int64, row numbers; of a stream, shard number times 2**32 plus the row's number in it.
        errors: (row number, reason) of each row that could not be read; of a stream, (shard, row and key, reason).
        position: of a stream, where its reader stands after this batch.
    """

    pixel_values: torch.Tensor | None
    labels: torch.Tensor
    indices: torch.Tensor
    errors: list[tuple[int | str, str]] = field(default_factory=list)
    position: dict[str, int] | None = None


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Stack the rows of `Photographs`, or of a stream, into a `Batch`."""
    good = [row for row in rows if "error" not in row]
    return Batch(
        pixel_values=torch.stack([row["pixel_values"] for row in good]) if good else None,
        labels=torch.tensor([row["label"] for row in good], dtype=torch.int64),
        indices=torch.tensor([row["index"] for row in good], dtype=torch.int64),
        errors=[(row.get("name", row["index"]), row["error"]) for row in rows if "error" in row],
    )
