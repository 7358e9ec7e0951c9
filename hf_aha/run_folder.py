"""The run folder belongs to one run at a time."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout


LOCK, OWNER = "run.lock", "run.pid"

Result = TypeVar("Result")


class RunFolderError(OSError):
    """The run folder is in use by another process, or cannot be written."""


@contextlib.contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is created when missing.

    The lock is one of the operating system (`flock` on POSIX), which ends with the process that holds it: a run that
    was killed blocks nobody. `run.pid` names the owner while it runs.

    Raises:
        RunFolderError: another process holds the lock, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run, locked_run_folder(Path(run)):
        ...     (Path(run) / "run.pid").read_text().split()[1] == str(os.getpid())
        True
    """
    lock, owner = FileLock(folder / LOCK), folder / OWNER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The children of a run that was killed may hold its lock until they notice, some seconds later.
        lock.acquire(timeout=_SECONDS_FOR_ORPHANS if _is_dead(_read(owner)) else 0)
        owner.write_text(f"pid {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except Timeout as error:
        raise RunFolderError(
            f"The run folder {folder} is in use by another process ({_read(owner) or 'of unknown pid'}); wait for it "
            "to end, stop it, or choose another output_dir."
        ) from error
    except OSError as error:
        lock.release()
        raise RunFolderError(
            f"The run folder {folder} cannot be written ({error.strerror or error}); choose another output_dir."
        ) from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def from_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do `work` on the main process alone; every process gets its result, or raises the error that it raised.

    Files are read and judged once this way, and no process waits for another that has already given up.

    Args:
        accelerator: of the run.
        work: returns something that can be pickled.

    Raises:
        OSError, ValueError: as `work` raised them.
    """
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except (OSError, ValueError) as error:
            failure = error
    result, failure = broadcast_object_list([result, failure])
    if failure is not None:
        raise failure
    return result


def _read(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8").strip()
    except OSError:  # nobody runs, or has just begun or ended
        return ""


def _is_dead(owner: str) -> bool:
    """Whether `pid N on HOST` is a process of this machine that has ended."""
    found = re.fullmatch(r"pid (\d+) on (.+)", owner)
    if found is None or found[2] != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's
        pass
    return False


_SECONDS_FOR_ORPHANS = 15


__all__ = ["RunFolderError", "from_main_process", "locked_run_folder"]
