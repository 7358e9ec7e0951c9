"""Writing files so that a reader, or a run that was killed, never meets half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path


PARTIAL = "partial-"
"""How the names of folders begin that are being written, or that a killed run left behind."""


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file in the folder of `path`, then put it in the place of `path` in one step.

    Other processes see the old file or the new one, never a part; after a power cut the same holds, as the data reach
    the disk before the name does. Folders on the way are created. A symbolic link is followed, and an existing file's
    permissions are kept. If anything fails, `path` is as it was and the temporary file is gone.

    Args:
        path: the file to create or replace.
        write: called once with the temporary path, which ends like `path` (so that a library that picks its format by
            the suffix picks the right one) and exists, empty; it must leave a file there.

    Returns:
        `path` as a `Path`.

    Raises:
        FileNotFoundError: `write` left no file behind.
        IsADirectoryError: `path` is a folder.
        OSError: the folder cannot be created or written to. Whatever `write` raises is passed on.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder) / "notes" / "a.txt", lambda file: file.write_text("done")).read_text()
        'done'
    """
    path = Path(path)
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file.")
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.parent / f".{secrets.token_hex(8)}.partial{place.suffix}"
    # Unlike a file of `tempfile`, which only its owner may read, this one gets the permissions of any new file.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        write(temporary)
        if not temporary.is_file():
            raise FileNotFoundError(f"{path} was not written: the writer left no file at its temporary path.")
        if place.exists():
            os.chmod(temporary, stat.S_IMODE(place.stat().st_mode))
        flush_to_disk(temporary)
        os.replace(temporary, place)
    except BaseException:  # also on Ctrl-C; raised again below
        temporary.unlink(missing_ok=True)
        raise
    flush_to_disk(place.parent)
    return path


@contextlib.contextmanager
def folder_in_one_step(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder to fill, then put it in the place of `folder` in one step.

    A run that is killed on the way leaves a folder `partial-NAME` beside it, which the next call for `NAME` removes.
    What stood in the place of `folder` is removed only when the new one is complete on the disk. If anything fails,
    `folder` is as it was and the temporary folder is gone.

    Args:
        folder: to create or replace; its parent is created when missing.

    Raises:
        OSError: the folder cannot be written. Whatever the body raises is passed on.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with folder_in_one_step(Path(place) / "final") as folder:
        ...         _ = (folder / "a.txt").write_text("done")
        ...     [str(path.relative_to(place)) for path in Path(place).rglob("*.txt")]
        ['final/a.txt']
    """
    folder = Path(folder)
    partial, old = (folder.with_name(f"{PARTIAL}{kind}{folder.name}") for kind in ("", "old-"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        for leftover in (partial, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            flush_to_disk(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except BaseException:  # also on Ctrl-C; raised again
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    flush_to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's data, or a folder's names, are on the disk."""
    if path.is_dir() and os.name != "posix":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
