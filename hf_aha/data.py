"""Photographs for training and evaluation: datasets of the Hub or of a folder as batches of normalised pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from .images import ImageReadError, read_image


def load_photographs(
    name: str,
    *,
    split: str,
    config_name: str | None = None,
    image_column: str | None = None,
    revision: str | None = None,
) -> tuple[datasets.Dataset, str]:
    """Load one split of an image dataset without decoding its images.

    Args:
        name: a dataset id of the Hub, a folder of parquet files, or an image folder.
        split: a split, slices allowed (`"train[:100]"`).
        config_name: configuration of a Hub dataset.
        image_column: column of the images; found by its type, if there is one only, when left out.
        revision: commit, tag or branch of a Hub dataset.

    Returns:
        the dataset, with the image column as encoded bytes, and the name of that column.

    Raises:
        ValueError: the dataset has no image column, several and none named, or not the named one, or that one holds
            no images; or the split has no row.
    """
    dataset = datasets.load_dataset(name, config_name, split=split, revision=revision)
    images = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if image_column is None:
        if len(images) != 1:
            found = f"has {len(images)} image columns ({', '.join(images)})" if images else "has no image column"
            raise ValueError(
                f"The dataset {name} {found} among its columns {', '.join(dataset.column_names)}; "
                "name one with image_column."
            )
        image_column = images[0]
    elif image_column not in dataset.column_names:
        raise ValueError(
            f"The dataset {name} has no column {image_column!r}; its columns are {', '.join(dataset.column_names)}."
        )
    try:
        return dataset.cast_column(image_column, datasets.Image(decode=False)), image_column
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"The column {image_column!r} of the dataset {name} holds no images but {dataset.features[image_column]}."
        ) from error


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

    Raises:
        ValueError: there is no such label column, or it does not hold integers.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        transform: RandomCrop | ProcessorCrop,
        label_column: str | None = None,
        seed: int = 0,
    ):
        if label_column is not None:
            if label_column not in dataset.column_names:
                raise ValueError(
                    f"The dataset has no column {label_column!r}; its columns are {', '.join(dataset.column_names)}."
                )
            kind = getattr(dataset.features[label_column], "dtype", "a structure")
            if "int" not in kind:
                raise ValueError(f"The label column {label_column!r} must hold class indices, but it holds {kind}.")
        columns = [image_column] if label_column is None else [image_column, label_column]
        self.dataset = dataset.select_columns(columns)
        self.image_column = image_column
        self.transform = transform
        self.label_column = label_column
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        try:
            image = read_image(_encoded(row[self.image_column]))
        except ImageReadError as error:
            return {"index": index, "error": str(error)}
        generator = np.random.default_rng((self.seed, self.epoch, index))
        label = None if self.label_column is None else row[self.label_column]
        label = -1 if label is None else label
        return {"pixel_values": self.transform(image, generator), "index": index, "label": label}


def _encoded(cell: Mapping[str, Any] | None) -> bytes | Path:
    if cell is None or (cell.get("bytes") is None and not cell.get("path")):
        raise ImageReadError("The image of this row is missing.")
    return cell["bytes"] if cell.get("bytes") is not None else Path(cell["path"])


@dataclass
class Batch:
    """Readable rows stacked, unreadable ones listed.

    Attributes:
        pixel_values: (B, 3, H, W) float32, normalised; None when no row could be read.
        labels: (B,) int64, -1 where unknown.
        indices: (B,) int64, row numbers.
        errors: (row number, reason) of each row that could not be read.
    """

    pixel_values: torch.Tensor | None
    labels: torch.Tensor
    indices: torch.Tensor
    errors: list[tuple[int, str]] = field(default_factory=list)


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Stack the rows of `Photographs` into a `Batch`."""
    good = [row for row in rows if "error" not in row]
    return Batch(
        pixel_values=torch.stack([row["pixel_values"] for row in good]) if good else None,
        labels=torch.tensor([row["label"] for row in good], dtype=torch.int64),
        indices=torch.tensor([row["index"] for row in good], dtype=torch.int64),
        errors=[(row["index"], row["error"]) for row in rows if "error" in row],
    )


def mosaic(pixel_values: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Replace one side of a share of the images by the same side of their neighbour in the batch.

    Two objects in one image make the classes compete, so that the explainer learns to tell their evidence apart.

    Args:
        pixel_values: (B, 3, H, W); not changed.
        share: of the images to change, drawn independently.
        generator: CPU generator.
    """
    if share == 0 or len(pixel_values) < 2:
        return pixel_values
    mixed, neighbours = pixel_values.clone(), pixel_values.roll(1, dims=0)
    height, width = pixel_values.shape[-2:]
    for row in range(len(pixel_values)):
        drawn, axis, where = torch.rand(3, generator=generator).tolist()
        if drawn >= share:
            continue
        where = 0.3 + 0.4 * where
        if axis < 0.5:
            mixed[row, :, : round(where * height)] = neighbours[row, :, : round(where * height)]
        else:
            mixed[row, :, :, : round(where * width)] = neighbours[row, :, :, : round(where * width)]
    return mixed
