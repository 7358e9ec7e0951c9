"""What the benchmarks share: turns of timed calls, peak memory, and the record of where a number comes from."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers

import hf_aha


def timed_in_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` each, the calls taking turns so that a change of the machine's speed meets all.

    Every second turn goes backwards, so that no call always follows the same other one. The first `warm_up` turns pay
    for allocators, thread pools and compiled kernels and are not counted.

    Args:
        calls: name -> what to time.
        repeats: counted turns, at least 1.
        device: waited for before the clock is read.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, but it is {repeats}.")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name in list(calls) if turn % 2 else reversed(calls):
            _wait(device)
            start = time.perf_counter()
            calls[name]()
            _wait(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the ratios of the same turn.

    Example:
        >>> paired_ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
        {'median': 2.0, 'min': 1.5, 'max': 4.0}
    """
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def can_measure_memory(device: torch.device) -> bool:
    """Whether `PeakMemory` works here: on CUDA, and on Linux for the CPU."""
    return device.type == "cuda" or (device.type == "cpu" and os.access("/proc/self/clear_refs", os.W_OK))


class PeakMemory:
    """Peak memory that a process comes to need after this object is made; meant for a fresh process.

    On CUDA it is `torch.cuda.max_memory_allocated`. On the CPU it is the growth of the resident set (Linux: `VmHWM` of
    /proc/self/status, set back by writing 5 to /proc/self/clear_refs) over its size when the object was made; memory
    that is free then is given back to the system first, so that building the model leaves no mark.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free()
        self._before = 0 if device.type == "cuda" else _resident_bytes("VmRSS")

    def start(self) -> None:
        """Forget every peak so far."""
        self._free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def read(self) -> int:
        """Bytes at the peak since `start`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_bytes("VmHWM") - self._before

    def _free(self) -> None:
        gc.collect()
        _wait(self.device)
        libc = ctypes.CDLL(None) if self.device.type == "cpu" else None
        # Of glibc; without it the freed memory of the building may stay with the process and hide a small peak.
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def provenance(script: str, argv: Sequence[str], device: torch.device) -> dict[str, object]:
    """Command, date, versions, threads and machine, ready for JSON.

    Absolute paths in the command lose their folders: a result file must not name the machine it was made on.
    """
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *words]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "hf_aha": hf_aha.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "machine": {
            "cpu": _cpu_name(),
            "logical_cpus": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }


def provenance_line(record: Mapping[str, object]) -> str:
    """One line of Markdown under a table."""
    machine, versions = record["machine"], record["versions"]
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return (
        f"{machine['cpu']} ({machine['logical_cpus']} logical CPUs){device}, {record['threads']} thread(s), "
        f"torch {versions['torch']}, transformers {versions['transformers']}.\n\n`{record['command']}`"
    )


def write_json(path: Path | None, result: Mapping[str, object]) -> None:
    """Write `result` where `path` is given; its folder is made when missing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def find_device(name: str) -> torch.device:
    """The device, or a one-sentence exit where it cannot be used."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"The device {name!r} was asked for, but this torch finds no CUDA device; leave --device out.")
    return device


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
