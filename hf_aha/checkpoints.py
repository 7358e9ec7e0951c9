"""Checkpoint folders that are whole or absent: written aside, sealed by a manifest, verified before they are read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

from .files import PARTIAL, folder_in_one_step


MANIFEST = "manifest.json"
FORMAT = "hf_aha.checkpoint"
VERSION = 1
SET_ASIDE = "set-aside-"


class CheckpointError(ValueError):
    """A checkpoint is torn, corrupt, or of another run."""


def write_checkpoint(
    folder: str | os.PathLike[str], files: Mapping[str, bytes], folders: Mapping[str, Path] | None = None
) -> Path:
    """Write a checkpoint so that it appears complete, on the disk, or not at all.

    The files go to a folder with another name beside it; the manifest with the SHA-256 and the size of each comes
    last; everything is flushed to the disk before the folder gets its name.

    Args:
        folder: `checkpoint-N` of a run; one that stands there is replaced.
        files: name -> content.
        folders: name -> a folder on the same file system that is moved into the checkpoint.

    Returns:
        `folder` as a `Path`.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing of the new checkpoint is left then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     folder = write_checkpoint(Path(run) / "checkpoint-7", {"state.json": b"{}"})
        ...     verify_checkpoint(folder)
        ...     sorted(path.name for path in folder.iterdir())
        ['manifest.json', 'state.json']
    """
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    with folder_in_one_step(folder) as partial:
        for name, data in files.items():
            (partial / name).write_bytes(data)
        for name, source in (folders or {}).items():
            source.rename(partial / name)
            for path in sorted(path for path in (partial / name).rglob("*") if path.is_file()):
                listed[path.relative_to(partial).as_posix()] = {"sha256": _sha256(path), "size": path.stat().st_size}
        manifest = {"format": FORMAT, "version": VERSION, "files": listed}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def verify_checkpoint(folder: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: the manifest or a file is missing or not what was written, or the format is a newer one.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known, version = manifest["format"] == FORMAT, manifest["version"]
        listed = {name: (entry["sha256"], entry["size"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"the checkpoint {folder} has no {MANIFEST}, so it was torn or comes from an earlier version of hf_aha"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the {MANIFEST} of the checkpoint {folder} is damaged") from error
    if not known or not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"the checkpoint {folder} has format {manifest['format']!r} version {version!r}, but this hf_aha reads "
            f"{FORMAT!r} up to version {VERSION}"
        )
    for name, (digest, size) in listed.items():
        path = folder / name
        try:
            found = path.stat().st_size
            same = found == size and _sha256(path) == digest
        except OSError as error:
            raise CheckpointError(
                f"the file {name} of the checkpoint {folder} cannot be read ({error.strerror})"
            ) from error
        if found != size:
            raise CheckpointError(f"the file {name} of the checkpoint {folder} has {found} bytes instead of {size}")
        if not same:
            raise CheckpointError(f"the file {name} of the checkpoint {folder} is not what was written (SHA-256)")


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders of a run by step, oldest first, whole or not."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name.

    Example:
        >>> step_of(Path("run/checkpoint-20"))
        20
    """
    return int(checkpoint.name.rpartition("-")[2])


def find_checkpoint(wanted: str | None, output: Path) -> Path | None:
    """The verified checkpoint that a run starts from, or None where it starts from the beginning.

    Args:
        wanted: None for a new run; `"auto"` for the newest checkpoint of `output` that verifies, each newer one being
            named in a warning; or a checkpoint folder.
        output: the run folder.

    Raises:
        FileExistsError: `output` holds checkpoints, but none of them is wanted.
        FileNotFoundError: the checkpoint does not exist.
        CheckpointError: the checkpoint, or every one of `output`, does not verify.
    """
    found = list_checkpoints(output)
    if wanted == "auto":
        return _newest_whole(found, output)
    if wanted is None and not found:
        return None
    folder = None if wanted is None else Path(wanted)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"The checkpoint {folder} does not exist; use 'auto' for the newest one.")
    if found and (folder is None or folder.resolve().parent != output.resolve()):
        raise FileExistsError(
            f"The folder {output} holds {found[-1].name} of another run; resume it with "
            "resume_from_checkpoint='auto', or choose another output_dir."
        )
    try:
        verify_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"The run cannot go on, because {error}; resume_from_checkpoint='auto' takes the newest whole one."
        ) from error
    return folder


def _newest_whole(found: list[Path], output: Path) -> Path | None:
    reasons = []
    for folder in reversed(found):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        if reasons:
            warnings.warn(
                f"The run goes on from {folder.name}, the newest whole checkpoint, because {' and '.join(reasons)}.",
                UserWarning,
                stacklevel=2,
            )
        return folder
    if reasons:
        raise CheckpointError(
            f"None of the {len(found)} checkpoints in {output} can be used, because {' and '.join(reasons)}; choose "
            "another output_dir to start again."
        )
    return None


def keep_newest(output: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints of a run."""
    for old in list_checkpoints(output)[:-count]:
        # Under another name first: a run killed here must not leave half a checkpoint with a checkpoint's name.
        doomed = old.with_name(f"{PARTIAL}{old.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        shutil.rmtree(old.rename(doomed))


def clear_leftovers(output: Path, step: int) -> None:
    """Prepare a run folder for a run that stands at `step`.

    What a killed run left half-written is removed. Checkpoints of later steps (corrupt ones that were passed over, or
    those behind an earlier one that was asked for) belong to a past that will not come again: they are renamed to
    `set-aside-checkpoint-N`, so that neither `auto` nor `keep_newest` takes them for the newest.
    """
    for leftover in output.glob(f"{PARTIAL}*"):
        if re.fullmatch(rf"{PARTIAL}(old-)?(checkpoint-\d+|final|engine)", leftover.name):
            shutil.rmtree(leftover)
    for later in list_checkpoints(output):
        if step_of(later) > step:
            aside = later.with_name(f"{SET_ASIDE}{later.name}")
            if aside.exists():
                shutil.rmtree(aside)
            later.rename(aside)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


__all__ = [
    "CheckpointError",
    "clear_leftovers",
    "find_checkpoint",
    "keep_newest",
    "list_checkpoints",
    "step_of",
    "verify_checkpoint",
    "write_checkpoint",
]
