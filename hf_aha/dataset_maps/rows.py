"""The photographs of a dataset on their way to the explainer: read, processed, and described row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from ..geometry import InputGeometry
from ..images import ImageReadError, read_image


# Columns whose values name a photograph, in the order of preference.
ID_COLUMNS = ("image_id", "file_name", "filename", "id", "__key__")

_DIGEST_ROWS = 16


class ExplainedRows(Dataset):
    """Rows of an image dataset as an explainer needs them, with what the record of a map says about its photograph.

    An item is a dict: `row` (its number in the split), `image_id` (text or None), `sha256` (of the stored file),
    `pixel_values` ((3, h, w) float32), `geometry` (`InputGeometry`) and `target` (the class asked about, or None for
    the predicted one, with `against` for the most probable other than it). A row that cannot be explained is
    `{"row", "image_id", "error"}` instead.

    Args:
        dataset: rows with an undecoded image column, as `hf_aha.data.load_photographs` returns them.
        image_column: its name.
        image_processor: the classifier's.
        limit: the first so many rows only.
        id_column: names the photographs; one of `ID_COLUMNS`, if there is one, when left out, and else the file name
            that the image column keeps.
        target: one class asked about in every photograph.
        label_column: column of class indices; the class asked about is the row's own.
        classes: the classifier's class of every value of that column, -1 where it has none; None for the values as
            they are.
        against: one class that the target of every photograph is compared with: "why the target rather than this".
        folder: of the dataset on this machine; file names are given from there, and never with folders above it.

    Raises:
        ValueError: there is no such column, it does not fit, there is no row or no image processor, both `target`
            and `label_column` are given, or `target` is `against`.

    Example:
        `ExplainedRows(dataset, "image", explainer.image_processor, limit=100)[0]["pixel_values"].shape`
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        image_processor: BaseImageProcessor,
        *,
        limit: int | None = None,
        id_column: str | None = None,
        target: int | None = None,
        label_column: str | None = None,
        classes: Sequence[int] | None = None,
        against: int | None = None,
        folder: Path | None = None,
    ) -> None:
        if image_processor is None:
            raise ValueError("The explainer has no image processor; give it with attach(..., image_processor=...).")
        if target is not None and label_column is not None:
            raise ValueError("Give either one target for all photographs or a label column, not both.")
        if against is not None and target == against:
            raise ValueError(f"The target and against are both class {target}, but must be two classes.")
        for column in (id_column, label_column):
            if column is not None and column not in dataset.column_names:
                raise ValueError(
                    f"The dataset has no column {column!r}; its columns are {', '.join(dataset.column_names)}."
                )
        if label_column is not None and "int" not in str(getattr(dataset.features[label_column], "dtype", "")):
            raise ValueError(
                f"The label column {label_column!r} must hold class indices, but it holds "
                f"{dataset.features[label_column]}."
            )
        if id_column is None:
            id_column = next((name for name in ID_COLUMNS if _is_text_or_number(dataset, name)), None)
        elif not _is_text_or_number(dataset, id_column):
            raise ValueError(
                f"The column {id_column!r} holds {dataset.features[id_column]}; names are text or numbers."
            )
        count = len(dataset) if limit is None else min(limit, len(dataset))
        if count < 1:
            raise ValueError("There is no photograph to explain: the split is empty.")
        wanted = dict.fromkeys(name for name in (image_column, id_column, label_column) if name is not None)
        self.dataset = dataset.select(range(count)).select_columns(list(wanted))
        self.image_column, self.id_column, self.label_column = image_column, id_column, label_column
        self.image_processor = image_processor
        self.target, self.against = target, against
        self.classes = None if classes is None else list(classes)
        self._folder = None if folder is None else Path(folder).resolve()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        cells = self.dataset[row]
        cell = cells[self.image_column] or {}
        found = {"row": row, "image_id": self._name(cells, cell)}
        try:
            target = self._target(cells)
            if target is not None and target == self.against:
                raise ImageReadError(f"Its class {target} is the one that the target is compared with.")
            content = _content(cell)
            photograph = read_image(content)
            geometry = InputGeometry.from_processor(self.image_processor, (photograph.height, photograph.width))
            pixel_values = self.image_processor([photograph], return_tensors="pt")["pixel_values"][0]
            if tuple(pixel_values.shape[-2:]) != geometry.input_size:
                raise ImageReadError(
                    f"The processor made {tuple(pixel_values.shape[-2:])} pixels of it where {geometry.input_size} "
                    "were expected."
                )
        except ValueError as error:  # an ImageReadError, or a shape that the processor refuses
            return {**found, "error": " ".join(str(error).split())}
        sha256 = hashlib.sha256(content).hexdigest()
        return {**found, "sha256": sha256, "pixel_values": pixel_values, "geometry": geometry, "target": target}

    def digest(self) -> str:
        """A few characters that change with the stored files of 16 rows spread over the dataset, on any machine."""
        total = hashlib.sha256()
        for place in range(min(_DIGEST_ROWS, len(self))):
            row = place * (len(self) - 1) // max(min(_DIGEST_ROWS, len(self)) - 1, 1)
            try:
                content = _content(self.dataset[row][self.image_column] or {})
            except ImageReadError:
                content = b""
            total.update(f"{row} {len(content)} ".encode() + content)
        return total.hexdigest()[:16]

    def _name(self, cells: dict[str, Any], cell: dict[str, Any]) -> str | None:
        if self.id_column is not None and cells[self.id_column] is not None:
            return str(cells[self.id_column])
        if not cell.get("path"):
            return None
        path = Path(cell["path"])
        if self._folder is not None and path.is_absolute() and path.resolve().is_relative_to(self._folder):
            return path.resolve().relative_to(self._folder).as_posix()
        return path.name

    def _target(self, cells: dict[str, Any]) -> int | None:
        if self.label_column is None:
            return self.target
        label = cells[self.label_column]
        if label is None or label < 0:
            raise ImageReadError("It has no label.")
        if self.classes is None:
            return label
        target = self.classes[label] if label < len(self.classes) else -1
        if target < 0:
            raise ImageReadError(f"Its label {label} is no class of the classifier.")
        return target


def collate_rows(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Stack the photographs of equal input size; most processors make only one size.

    Returns:
        `groups`, each `{"pixel_values": (B, 3, h, w), "records": [B dicts]}`, and `errors`, rows of `ExplainedRows`.
    """
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault(tuple(row["pixel_values"].shape), []).append(row)
    return {
        "groups": [
            {
                "pixel_values": torch.stack([row["pixel_values"] for row in same]),
                "records": [{key: value for key, value in row.items() if key != "pixel_values"} for row in same],
            }
            for same in groups.values()
        ],
        "errors": [row for row in rows if "error" in row],
    }


def _content(cell: dict[str, Any]) -> bytes:
    if cell.get("bytes") is not None:
        return cell["bytes"]
    if not cell.get("path"):
        raise ImageReadError("The image of this row is missing.")
    try:
        return Path(cell["path"]).read_bytes()
    except OSError as error:
        # Without the path: what is said here travels with the maps.
        raise ImageReadError(f"The file of this row cannot be read: {error.strerror or 'unknown reason'}.") from error


def _is_text_or_number(dataset: datasets.Dataset, column: str) -> bool:
    kind = str(getattr(dataset.features.get(column), "dtype", ""))
    return kind in ("string", "large_string") or kind.startswith(("int", "uint"))
