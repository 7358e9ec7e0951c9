"""Time and memory of one piece of work, measured where it happens."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


_MIB = 2**20


@dataclass
class Cost:
    """What a `with measured_cost(device)` block took.

    Attributes:
        seconds: wall time, with everything the device still had to do.
        peak_mib: highest memory above what was in use before, in MiB: of the CUDA allocator, or on Linux of the
            process; None elsewhere.
    """

    seconds: float = float("nan")
    peak_mib: float | None = None


@contextmanager
def measured_cost(device: torch.device) -> Iterator[Cost]:
    """Measure the time and the peak memory of the block.

    On a CPU the peak is that of the process as Linux counts it, reset before the block; memory that the process had
    freed but kept is given back first, so that its reuse is counted too.

    Example:
        >>> with measured_cost(torch.device("cpu")) as cost:
        ...     _ = torch.ones(1000).sum()
        >>> cost.seconds > 0
        True
    """
    cost = Cost()
    before = _begin(device)
    start = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cost.seconds = time.perf_counter() - start
    if before is not None:
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
        cost.peak_mib = max(peak - before, 0) / _MIB


def _begin(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    reset = Path("/proc/self/clear_refs")
    if device.type != "cpu" or not sys.platform.startswith("linux") or not reset.exists():
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # of glibc; other libraries give memory back by themselves
        library.malloc_trim(0)
    try:
        reset.write_text("5")
    except OSError:  # some containers do not allow it
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    """A line of the process's status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no line {name}, so that memory cannot be measured here.")
