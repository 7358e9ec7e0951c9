"""Writing files so that a reader, or a run that was killed, never meets half of one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path


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
        _flush_to_disk(temporary, os.O_RDWR)
        os.replace(temporary, place)
    except BaseException:  # also on Ctrl-C; raised again below
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _flush_to_disk(place.parent, os.O_RDONLY)
    return path


def _flush_to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
