"""Lines of JSON that a run appends to its files: whole ones only, and never at the cost of the run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append_entries(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Append one line of JSON an entry; a full disk costs these lines and a warning, and leaves no half of one.

    Args:
        path: the file, created when missing.
        entries: to be written in one piece.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     append_entries(Path(run) / "log.jsonl", [{"step": 1}, {"step": 2}])
        ...     read_whole_entries(Path(run) / "log.jsonl")
        [{'step': 1}, {'step': 2}]
    """
    rest = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    try:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        warnings.warn(
            f"A line of {path} could not be written ({error.strerror or error}); the training goes on without it.",
            UserWarning,
            stacklevel=3,
        )


def read_whole_entries(path: Path) -> list[dict[str, Any]]:
    """Entries of such a file; a line that a power cut left half-written is passed over.

    Returns:
        a dictionary a line; none if there is no file.
    """
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # torn
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


__all__ = ["append_entries", "read_whole_entries"]
