"""Reading a dataset of maps, and bringing its maps back to the photographs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..explanation import Explanation
from ..geometry import InputGeometry
from ..images import ImageSource, read_image
from .folder import CONTRAST_FEATURES, FEATURES, MapsError, MapsFolder
from .ranks import ranks_from_png


def load_maps(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset:
    """The maps that `hf-aha explain-dataset` made, one row a map, in the order of the photographs.

    Args:
        source: the folder it wrote, or the dataset on the Hub.
        split: slices allowed; the only split when left out.
        revision, token, cache_dir: as in `datasets.load_dataset`.

    Returns:
        a dataset with the columns of `FEATURES`, and of `CONTRAST_FEATURES` where a class is compared with another;
        give a row to [`StoredMap.from_row`].

    Raises:
        MapsError: the folder's run is not finished, or it holds no such maps.
        OSError: the dataset is not found, or cannot be reached.

    Example:
        `StoredMap.from_row(load_maps("maps")[0]).ranks`
    """
    name = os.fspath(source)
    if Path(name).is_dir():
        folder = MapsFolder.existing(name)
        if folder.summary()[0] == 0:
            raise MapsError(f"the folder {name} holds no map: none of its photographs could be explained.")
        split = split or folder.split
    found = datasets.load_dataset(name, split=split, revision=revision, token=token, cache_dir=cache_dir)
    if isinstance(found, datasets.DatasetDict):
        if len(found) != 1:
            raise MapsError(f"the dataset {name} has the splits {', '.join(found)}; name one with split=...")
        found = next(iter(found.values()))
    missing = [column for column in FEATURES if column not in found.column_names]
    if missing:
        raise MapsError(f"the dataset {name} holds no maps of hf_aha: it has no column {missing[0]!r}.")
    return found


# Compared by identity: arrays have no single truth value.
@dataclass(frozen=True, eq=False)
class StoredMap:
    """One map of such a dataset, and how it lies in its photograph.

    Attributes:
        row: number of the photograph in its split.
        image_id, sha256: its name in the dataset, or None, and the hash of its stored file.
        target, label, probability: the class that the map explains.
        predicted_target, predicted_label, predicted_probability: the most probable one.
        input_ranks: (h, w) float32 in [0, 1] as stored, 1 = most important; the classifier's input, unless a smaller
            size was asked for.
        geometry: from the photograph to the classifier's input.
        made_by: explainer, classifier, quantisation (with `error_bound`, the largest error of a rank), versions.
        against, against_label, against_probability: None, or the class that `target` is compared with; high ranks then
            speak for `target` rather than this class, low ones for this class rather than `target`.

    Example:
        >>> maps = load_maps("maps")  # doctest: +SKIP
        >>> one = StoredMap.from_row(maps[0])  # doctest: +SKIP
        >>> one.label, one.ranks.shape  # doctest: +SKIP
        ('tench', (480, 640))
        >>> one.explanation("photo.jpg").overlay().save("overlay.png")  # doctest: +SKIP
    """

    row: int
    image_id: str | None
    sha256: str
    target: int
    label: str
    probability: float
    predicted_target: int
    predicted_label: str
    predicted_probability: float
    input_ranks: np.ndarray
    geometry: InputGeometry
    made_by: dict[str, Any]
    against: int | None = None
    against_label: str | None = None
    against_probability: float | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> StoredMap:
        """Read one row of [`load_maps`].

        Args:
            row: with the map decoded or as bytes, as `datasets` gives it either way.

        Raises:
            ValueError: the map is no PNG of ours, or a column is missing.
        """
        names = ("row", "image_id", "sha256", "target", "label", "probability")
        names += ("predicted_target", "predicted_label", "predicted_probability")
        if "against" in row:  # only in the rows of a comparison
            names += tuple(CONTRAST_FEATURES)
        missing = [name for name in (*names, "ranks", "geometry", "made_by") if name not in row]
        if missing:
            raise ValueError(f"The row has no {missing[0]!r}; give a whole row of load_maps(...).")
        png = row["ranks"]
        sizes = {name: tuple(value) for name, value in json.loads(row["geometry"]).items()}
        return cls(
            **{name: row[name] for name in names},
            input_ranks=ranks_from_png(png if isinstance(png, Image.Image) else png["bytes"]),
            geometry=InputGeometry(**sizes),
            made_by=json.loads(row["made_by"]),
        )

    @cached_property
    def ranks(self) -> np.ndarray:
        """(H, W) float32 in [0, 1] in the photograph's own pixels; NaN where the classifier did not look.

        The stored ranks are interpolated as [`AhaExplainer.explain`] interpolates scores, so each value is within
        `made_by["quantisation"]["error_bound"]` of what exact ranks would give.
        """
        ranks = torch.from_numpy(self.input_ranks)
        size = self.geometry.input_size
        if tuple(ranks.shape) != size:
            ranks = F.interpolate(ranks[None, None], size=size, mode="bilinear")[0, 0]
        return self.geometry.to_original(ranks).numpy()

    def explanation(self, photograph: ImageSource) -> Explanation:
        """The map with its photograph, for overlays and sheets, as `explain` would give it.

        Args:
            photograph: the one of this row; whatever `read_image` reads.

        Raises:
            ValueError: the photograph has another size.
            ImageReadError: it cannot be read.
        """
        image = read_image(photograph)
        height, width = self.geometry.original_size
        if image.size != (width, height):
            raise ValueError(
                f"The photograph has {image.width} x {image.height} pixels, but the one of row {self.row} has "
                f"{width} x {height}; give that one."
            )
        return Explanation(
            image=image,
            target=self.target,
            label=self.label,
            probability=self.probability,
            predicted_target=self.predicted_target,
            predicted_label=self.predicted_label,
            predicted_probability=self.predicted_probability,
            scores=self.ranks,
            against=self.against,
            against_label=self.against_label,
            against_probability=self.against_probability,
        )


__all__ = ["StoredMap", "load_maps"]
