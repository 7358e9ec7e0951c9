"""The folder of a measurement: a small file a method and batch, each written whole, so that a kill loses one batch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from ..metrics.protocols import Protocol
from ..metrics.results import ProtocolResult, ResultContext


FORMAT = {"format": "hf_aha.benchmark", "format_version": 1}

MASKS = "masks"
"""Key of a run's identity that a later run may add: nothing that lies there already depends on masks."""

_ARRAYS = {
    "target": np.int64,
    "labels": np.int64,
    "values": np.float32,
    "curves": np.float32,
    "clean": np.float32,
    "reference": np.float32,
    "tie_fraction": np.float32,
}


class BenchmarkError(ValueError):
    """A measurement cannot go on; the message is one sentence for the user."""


class Store:
    """Reads and writes the folder of one measurement.

    `run.json` says what is measured on what, `parts/METHOD/00012.json` holds all numbers of one method on one batch,
    and `maps/METHOD/00000.npz` the maps of the first images.

    Args:
        folder: of the output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, identity: Mapping[str, Any], methods: Mapping[str, Any], resume: bool) -> None:
        """Begin a measurement, or go on with the one that lies here.

        Args:
            identity: JSON values that all numbers of this folder share.
            methods: identity of each method by name.
            resume: go on where the folder holds something.

        Raises:
            BenchmarkError: something lies here and `resume` is not set, or it was measured differently.
            OSError: the folder cannot be written.
        """
        path = self.folder / "run.json"
        wanted = json.loads(json.dumps({**FORMAT, **identity}))
        known: dict[str, Any] = {}
        if path.exists():
            if not resume:
                raise BenchmarkError(
                    f"the folder {self.folder} already holds a measurement; give --resume to go on with it, or "
                    "another --output."
                )
            found = json.loads(path.read_text(encoding="utf-8"))
            known = found.pop("methods", {})
            for one, other in ((found, wanted), (wanted, found)):
                if MASKS in other:
                    one.setdefault(MASKS, other[MASKS])
            differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            if differing:
                key = differing[0]
                raise BenchmarkError(
                    f"the folder {self.folder} holds another measurement, which differs in {', '.join(differing)} "
                    f"({key}: {_short(found.get(key))} there, {_short(wanted.get(key))} now); give another --output."
                )
        methods = json.loads(json.dumps(methods))
        changed = [name for name in methods if name in known and known[name] != methods[name]]
        if changed:
            raise BenchmarkError(
                f"the folder {self.folder} holds results of another method of the name {changed[0]!r} (other weights "
                "or settings); give another --output."
            )
        names = [file_name(name) for name in {**known, **methods}]
        if len(set(names)) != len(names):
            raise BenchmarkError(f"two of the methods {', '.join({**known, **methods})} would share their files.")
        record = json.dumps({**wanted, "methods": {**known, **methods}}, indent=2) + "\n"
        write_atomically(path, lambda file: file.write_text(record, encoding="utf-8"))

    def read(self, method: str, batch: int) -> dict[str, Any] | None:
        """The part of one method and batch, or None."""
        path = self._part(method, batch)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, method: str, batch: int, part: Mapping[str, Any]) -> None:
        """Write a part, whole or not at all."""
        text = json.dumps(part)
        write_atomically(self._part(method, batch), lambda file: file.write_text(text, encoding="utf-8"))

    def write_maps(self, method: str, batch: int, maps: Mapping[str, np.ndarray]) -> None:
        """Write maps (H, W) by image id."""
        write_atomically(self._maps(method, batch), lambda file: np.savez_compressed(file, **maps))

    def read_maps(self, method: str, batch: int) -> dict[str, np.ndarray]:
        """The maps of `write_maps`; none where none were written."""
        path = self._maps(method, batch)
        if not path.exists():
            return {}
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)

    def _part(self, method: str, batch: int) -> Path:
        return self.folder / "parts" / file_name(method) / f"{batch:05d}.json"

    def _maps(self, method: str, batch: int) -> Path:
        return self.folder / "maps" / file_name(method) / f"{batch:05d}.npz"


def file_name(text: str) -> str:
    """`text` as the name of a file or folder.

    Example:
        >>> file_name("hf_aha/pixel")
        'hf_aha-pixel'
    """
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.") or "unnamed"


def protocol_key(protocol: Protocol) -> str:
    """Name and version, under which a part keeps the numbers of a protocol."""
    return f"{protocol.name}@{protocol.version}"


def pack(result: ProtocolResult) -> dict[str, Any]:
    """The per-image numbers of a result as JSON values; float32 survives exactly."""
    arrays = {name: getattr(result, name) for name in _ARRAYS}
    return {
        "image_ids": list(result.image_ids),
        "dtype": result.dtype,
        "dropped": [list(pair) for pair in result.dropped],
        **{name: None if array is None else array.tolist() for name, array in arrays.items()},
    }


def unpack(
    packed: Mapping[str, Any],
    protocol: Protocol,
    context: ResultContext,
    image_size: tuple[int, int],
    versions: dict[str, str],
) -> ProtocolResult:
    """The result that `pack` took apart."""
    arrays = {name: None if packed[name] is None else np.array(packed[name], kind) for name, kind in _ARRAYS.items()}
    arrays["curves"] = arrays["curves"].reshape(-1, len(protocol.fractions))
    return ProtocolResult(
        protocol=protocol,
        context=context,
        image_size=image_size,
        dtype=packed["dtype"],
        versions=versions,
        image_ids=tuple(packed["image_ids"]),
        dropped=tuple((image, reason) for image, reason in packed["dropped"]),
        **arrays,
    )


def average(results: Sequence[ProtocolResult]) -> ProtocolResult:
    """Mean of several results on the same images, such as five random orders; dropped where any of them is.

    Example:
        `average([result])` equals `result`.
    """
    dropped: dict[str, str] = {}
    for result in results:
        dropped = {**dict(result.dropped), **dropped}
    measured = [image for image in results[0].image_ids if image not in dropped]
    kept = [replace(result.select(measured), dropped=tuple(dropped.items())) for result in results]
    means = {
        name: np.mean([getattr(result, name) for result in kept], axis=0, dtype=np.float64).astype(np.float32)
        for name in ("values", "curves", "tie_fraction")
    }
    return replace(kept[0], **means)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
