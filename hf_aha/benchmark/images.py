"""The images of a measurement: drawn from a split by a seed, named by their content, with the classifier's labels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from ..data import Photographs, ProcessorCrop, encoded_image, load_photographs
from ..geometry import InputGeometry
from ..images import read_image
from .masks import NoMaskError, ObjectColumn


class EvaluationImages(Dataset):
    """Some rows of an image dataset as the classifier sees them.

    An item is `{"id", "pixel_values", "label"}`, or `{"id", "error"}` where the row cannot be read. With `objects` it
    also holds `mask`, (h, w) bool on these pixels, or `no_mask`, the reason that there is none. The id is the number
    of the row in its split and the beginning of the SHA-256 of the stored file, `"17-9f86d081"`, so that results on
    other images of the same name cannot be paired.

    Args:
        dataset: rows with an undecoded image column, as `load_photographs` returns them.
        image_column: its name.
        rows: numbers of the rows, in the order in which they are measured.
        image_processor: the classifier's.
        label_column: column of the ground truth, or None.
        classes: the classifier's class of every value of that column, -1 where it has none; None for the values as
            they are.
        objects: the column of their masks or boxes.

    Raises:
        ValueError: no row is left, the column of the labels (see `Photographs`) or objects does not fit, or masks
            cannot follow the image processor (see `InputGeometry`).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        rows: Sequence[int],
        image_processor: BaseImageProcessor,
        label_column: str | None = None,
        classes: Sequence[int] | None = None,
        objects: ObjectColumn | None = None,
    ) -> None:
        if not len(rows):
            raise ValueError("There is no image to measure: the split is empty, or --skip leaves nothing of it.")
        self.rows = [int(row) for row in rows]
        chosen = dataset.select(self.rows)
        self._photographs = Photographs(chosen, image_column, ProcessorCrop(image_processor), label_column)
        self.objects = objects
        if objects is not None:
            self._object_rows = objects.rows(chosen, image_column)
            InputGeometry.from_processor(image_processor, (256, 256))  # what it refuses is said before the first image
        self._image_processor = image_processor
        self._image_column = image_column
        self._classes = None if classes is None else list(classes)
        self.has_labels = label_column is not None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = f"{self.rows[index]}-{self._content(index)}"
        row = self._photographs[index]
        if "error" in row:
            return {"id": name, "error": row["error"]}
        label = row["label"]
        if self._classes is not None and label >= 0:
            label = self._classes[label]
        found = {"id": name, "pixel_values": row["pixel_values"], "label": label}
        if self.objects is not None:
            try:
                found["mask"] = self._mask(index)
            except NoMaskError as error:
                found["no_mask"] = str(error)
        return found

    def _mask(self, index: int) -> torch.Tensor:
        photograph = read_image(encoded_image(self._photographs.dataset[index][self._image_column]))
        geometry = InputGeometry.from_processor(self._image_processor, (photograph.height, photograph.width))
        return self.objects.mask(self._object_rows[index][self.objects.name], geometry)

    def _content(self, index: int) -> str:
        cell = self._photographs.dataset[index][self._image_column] or {}
        content = cell.get("bytes")
        if content is None and cell.get("path") and Path(cell["path"]).is_file():
            content = Path(cell["path"]).read_bytes()
        return "missing" if content is None else hashlib.sha256(content).hexdigest()[:8]


def select_images(
    name: str,
    image_processor: BaseImageProcessor,
    class_index: Callable[[str], int],
    num_labels: int,
    *,
    split: str,
    images: int | None = None,
    skip: int = 0,
    seed: int = 0,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    objects: ObjectColumn | None = None,
) -> tuple[EvaluationImages, dict[str, Any], list[str]]:
    """Draw images from a split of a dataset.

    Args:
        name, split, config_name, revision, image_column: as in `load_photographs`.
        image_processor: the classifier's.
        class_index: a label's text -> the classifier's class; raises ValueError for an unknown one.
        num_labels: number of classes of the classifier.
        images: how many; all when left out.
        skip: leave out this many at the beginning of the order.
        seed: of the order.
        label_column: column of the ground truth; found by its type, if there is one only, when left out.
        objects: column of the masks or boxes of the objects.

    Returns:
        the images; what tells which they are (`dataset`, `dataset_revision`, `split`, `seed`), JSON values; and notes
        on what a reader of the numbers should know.

    Raises:
        ValueError: the dataset has no such column or no row, or a column does not fit (see `EvaluationImages`).
    """
    dataset, image_column = load_photographs(
        name,
        split=split,
        config_name=config_name,
        image_column=image_column,
        revision=revision,
        besides=() if objects is None else (objects.name,),
    )
    if not len(dataset):
        raise ValueError(f"The split {split!r} of the dataset {name} has no row.")
    rows = np.random.default_rng(seed).permutation(len(dataset))[skip:]
    notes = []
    if images is not None and images > len(rows):
        notes.append(f"{images} images were asked for, but only {len(rows)} are there.")
    rows = rows[:images]
    label_column = label_column or _only_class_column(dataset)
    classes = None
    if label_column is not None and isinstance(dataset.features.get(label_column), datasets.ClassLabel):
        classes, note = match_classes(dataset.features[label_column].names, class_index, num_labels)
        notes += [note] if note else []
        if classes is None:
            label_column = None
    elif label_column is None:
        notes.append("The dataset has no column of class labels, so what needs the ground truth is not measured.")
    found = EvaluationImages(dataset, image_column, rows, image_processor, label_column, classes, objects)
    # The folder of a local dataset is no name that others could use.
    local = Path(name).exists()
    facts = {
        "dataset": Path(name).resolve().name if local else name if config_name is None else f"{name}/{config_name}",
        "dataset_revision": revision or (None if local else _commit_in(dataset)),
        "split": split,
        "seed": seed,
    }
    return found, facts, notes


def match_classes(
    names: Sequence[str], class_index: Callable[[str], int], num_labels: int
) -> tuple[list[int] | None, str | None]:
    """The classifier's class of each of a dataset's labels, and a note where that is not by their names.

    Labels are matched by name. If none has a name that the classifier knows but both have equally many classes, they
    are taken in order; if some have none, these are -1; otherwise the labels are of no use, and None is returned.

    Example:
        >>> match_classes(["cat", "dog"], ["dog", "cat"].index, 2)
        ([1, 0], None)
    """
    found, unknown = [], []
    for name in names:
        try:
            found.append(class_index(name))
        except ValueError:
            found.append(-1)
            unknown.append(name)
    if not unknown:
        return found, None
    if len(unknown) < len(names):
        return found, (
            f"{len(unknown)} of the {len(names)} labels of the dataset name no class of the classifier "
            f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}); their images count as not labelled."
        )
    if len(names) == num_labels:
        return list(range(num_labels)), (
            "The labels of the dataset have other names than the classifier's classes and were matched by their order."
        )
    return None, (
        f"None of the dataset's {len(names)} labels names a class of the classifier, so what needs the ground truth "
        "is not measured."
    )


def _only_class_column(dataset: datasets.Dataset) -> str | None:
    found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    return found[0] if len(found) == 1 else None


def _commit_in(dataset: datasets.Dataset) -> str | None:
    """The commit that a dataset of the Hub was read from, if its download says so."""
    for address in dataset.info.download_checksums or {}:
        found = re.search(r"@([0-9a-f]{40})/", address)
        if found:
            return found[1]
    return None


def collate_images(rows: list[dict[str, Any]]) -> tuple[list[str], torch.Tensor | None, torch.Tensor, dict[str, str]]:
    """Ids (B,), pixel values (B, 3, H, W) or None, labels (B,) int64, and the reason of each row that cannot be read.

    A photograph that the processor leaves in another size than the first of the batch is one of the latter.
    """
    good, errors = [], {row["id"]: row["error"] for row in rows if "error" in row}
    for row in rows:
        if "error" in row:
            continue
        if good and row["pixel_values"].shape != good[0]["pixel_values"].shape:
            sizes = [" x ".join(map(str, one["pixel_values"].shape[1:])) for one in (row, good[0])]
            errors[row["id"]] = f"The processor made {sizes[0]} pixels of this image and {sizes[1]} of others."
        else:
            good.append(row)
    pixel_values = torch.stack([row["pixel_values"] for row in good]) if good else None
    labels = torch.tensor([row["label"] for row in good], dtype=torch.int64)
    return [row["id"] for row in good], pixel_values, labels, errors


def collate_masks(rows: list[dict[str, Any]], ids: Sequence[str]) -> tuple[torch.Tensor | None, dict[str, str]]:
    """Masks (B, h, w) bool of the images that `collate_images` kept, and the reason of each that has none.

    Such an image gets an empty mask, which no metric has a value for. None without masks in the rows.

    Args:
        rows: items of `EvaluationImages`.
        ids: of the images kept, at least one.
    """
    kept = {row["id"]: row for row in rows if row["id"] in ids}
    if not all("mask" in row or "no_mask" in row for row in kept.values()):
        return None, {}
    size = kept[ids[0]]["pixel_values"].shape[-2:]
    masks = [kept[name].get("mask", torch.zeros(size, dtype=torch.bool)) for name in ids]
    return torch.stack(masks), {name: kept[name]["no_mask"] for name in ids if "no_mask" in kept[name]}
