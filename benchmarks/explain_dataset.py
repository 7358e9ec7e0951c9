"""Photographs a second of `hf-aha explain-dataset`, against `explainer(x)` on pixels that are ready, and memory.

    python benchmarks/explain_dataset.py --dataset DIR_OR_ID --split validation --photographs 3000 --output maps.json

How it is measured: the engine behind the command reads, explains, ranks, packs and writes all photographs; the bare
loop calls `explainer(x)` as often, on batches of the same size and in the same precision, of `--decoded` photographs
that were read before. The two take turns in one process, `--turns` each with an equal share of the photographs. Three
ratios of throughput, bare = 1; the last two are of CPU time, which other programs on the machine disturb less:

- `wall`: by the clock, with all the cores that the process may use;
- `readers_apart`: CPU time of the process that makes the passes, which also ranks, packs and writes, but not of the
  readers, which are processes of their own: what the clock would show on an idle machine with a core for them;
- `one_core`: CPU time of all of them: what the clock would show if everything shared one core.

On CUDA only the first is measured, as the CPU's time is not the passes'.

Memory is the resident set of this process, every `--sample` seconds while the engine runs: all of it, the anonymous
part (without files that are mapped), and the anonymous part of the readers, most of which they share with it. The file
has the mean of every tenth of the run.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import _resident_bytes, _wait, find_device, provenance, provenance_line, write_json

from hf_aha import AhaExplainer
from hf_aha.data import load_photographs
from hf_aha.dataset_maps import ExplainedRows, MapSettings, explain_dataset
from hf_aha.metrics.passes import TargetPasses


MIB = 2**20


class MemorySamples:
    """Resident bytes of this process and its children while the `with` block runs (Linux)."""

    def __init__(self, every: float) -> None:
        self.every = every
        self.resident: list[int] = []
        self.anonymous: list[int] = []
        self.readers: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemorySamples:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.resident.append(_resident_bytes("VmRSS"))
            self.anonymous.append(_resident_bytes("RssAnon"))
            self.readers.append(sum(map(_anonymous_bytes, _children())))
            self._stop.wait(self.every)


def _children() -> list[int]:
    pids: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            pids += map(int, (task / "children").read_text(encoding="ascii").split())
        except FileNotFoundError:  # a thread that has ended
            continue
    return pids


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):  # a reader that has ended
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))


def tenths(samples: Sequence[float]) -> list[float]:
    """Mean of every tenth of the samples, in MiB.

    Example:
        >>> tenths([MIB] * 20)
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    parts = min(10, len(samples))
    edges = [round(part * len(samples) / parts) for part in range(parts + 1)]
    return [round(statistics.mean(samples[a:b]) / MIB, 2) for a, b in zip(edges, edges[1:], strict=False)]


def bare(explainer: AhaExplainer, pixels: torch.Tensor, count: int, batch: int, precision: str) -> None:
    """`explainer(x)` on `count` photographs, going round in `pixels`."""
    device = explainer.device
    batches = pixels[: len(pixels) // batch * batch].split(batch)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        for number in range(-(-count // batch)):
            size = min(batch, count - number * batch)
            explainer(batches[number % len(batches)][:size].to(device))
    _wait(device)


def timed(call: object, device: torch.device) -> tuple[float, float, float]:
    """Seconds by the clock, CPU seconds of this process, and of children that ended in the meantime."""
    _wait(device)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    _wait(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, cpu, after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run the turns and gather the numbers."""
    device = find_device(args.device)
    explainer = AhaExplainer.from_pretrained(args.explainer).to(device).eval()
    dataset, column = load_photographs(args.dataset, split=args.split)
    precision = TargetPasses(explainer.classifier, args.precision).precision
    settings = MapSettings(
        quantisation=args.quantisation,
        precision=args.precision,
        batch_size=args.batch_size,
        workers=args.workers,
        shard_rows=args.shard_rows,
    )
    if args.photographs > len(dataset):
        sys.exit(f"{args.photographs} photographs were asked for, but the split has {len(dataset)}.")
    share = args.photographs // args.turns
    first = ExplainedRows(dataset, column, explainer.image_processor, limit=max(args.decoded, args.batch_size))
    decoded = [item["pixel_values"] for item in (first[row] for row in range(len(first))) if "error" not in item]
    pixels = torch.stack(decoded)
    bare(explainer, pixels, 2 * args.batch_size, args.batch_size, precision)
    seconds: dict[str, list[tuple[float, float, float]]] = {"bare": [], "engine": []}
    memory: dict[str, list[int]] = {"resident": [], "anonymous": [], "readers": []}
    size = maps = 0
    with tempfile.TemporaryDirectory() as place:

        def engine(turn: int) -> None:
            nonlocal size, maps
            part = dataset.select(range(turn * share, (turn + 1) * share))
            rows = ExplainedRows(part, column, explainer.image_processor)
            names = {"dataset": {"split": args.split}}
            with MemorySamples(args.sample) as samples:
                made = explain_dataset(explainer, rows, settings, Path(place) / str(turn), names=names, progress=False)
            for name, found in memory.items():
                found += getattr(samples, name)
            size, maps = size + made.bytes, maps + made.maps

        for turn in range(args.turns):
            calls = {
                "bare": lambda: bare(explainer, pixels, share, args.batch_size, precision),
                "engine": lambda turn=turn: engine(turn),
            }
            # Every second turn goes backwards, so that neither always follows the other.
            for name in list(calls) if turn % 2 else reversed(calls):
                seconds[name].append(timed(calls[name], device))
    turns = list(zip(seconds["bare"], seconds["engine"], strict=True))
    ratios = {
        "wall": [a[0] / b[0] for a, b in turns],
        "readers_apart": [a[1] / b[1] for a, b in turns],
        "one_core": [a[1] / (b[1] + b[2]) for a, b in turns],
    }
    per_second = {name: share * args.turns / sum(one[0] for one in found) for name, found in seconds.items()}
    photographs = share * args.turns
    return {
        "photographs": photographs,
        "turns": args.turns,
        "batch_size": args.batch_size,
        "workers": args.workers,
        "precision": precision,
        "quantisation": args.quantisation,
        "image_size": explainer.config.image_size,
        "cores": len(os.sched_getaffinity(0)),
        "photographs_per_second": per_second,
        "throughput": {
            name: {"median": statistics.median(found), "min": min(found), "max": max(found)}
            for name, found in ratios.items()
            if name == "wall" or device.type != "cuda"
        },
        "cpu_ms_per_photograph": {
            "bare": 1e3 * sum(one[1] for one in seconds["bare"]) / photographs,
            "engine": 1e3 * sum(one[1] for one in seconds["engine"]) / photographs,
            "readers": 1e3 * sum(one[2] for one in seconds["engine"]) / photographs,
        },
        "bytes_per_map": size / max(maps, 1),
        "memory_mib": {
            **{name: tenths(found) for name, found in memory.items()},
            "peak": round(max(memory["resident"]) / MIB, 2),
            "samples": len(memory["resident"]),
        },
    }


def table(result: dict[str, object]) -> str:
    """The numbers as Markdown, with the command under them."""
    kinds = ("resident", "anonymous", "readers")
    rate, cpu, memory = (result[key] for key in ("photographs_per_second", "cpu_ms_per_photograph", "memory_mib"))

    titles = {
        "wall": f"by the clock on {result['cores']} core(s)",
        "readers_apart": "by CPU time, readers on a core of their own",
        "one_core": "by CPU time, everything on one core",
    }
    ratios = {titles[name]: found for name, found in result["throughput"].items()}

    lines = [
        "| | bare `explainer(x)` | `explain-dataset` |",
        "|---|---:|---:|",
        f"| photographs a second | {rate['bare']:.1f} | {rate['engine']:.1f} |",
        f"| CPU time of the passes' process, ms a photograph | {cpu['bare']:.2f} | {cpu['engine']:.2f} |",
        f"| CPU time of the readers, ms a photograph | - | {cpu['readers']:.2f} |",
        *(
            f"| throughput, {title} | 1 | {one['median']:.3f} ({one['min']:.3f} to {one['max']:.3f}) |"
            for title, one in ratios.items()
        ),
        "",
        f"{result['photographs']:,} photographs at {result['image_size'][0]} x {result['image_size'][1]}, batches of "
        f"{result['batch_size']}, {result['workers']} reader(s), {result['precision']}, "
        f"{result['bytes_per_map'] / 1e3:.1f} kB a map ({result['quantisation']}). MiB in every tenth of the run: "
        + "; ".join(f"{name} {', '.join(f'{one:.0f}' for one in memory[name])}" for name in kinds)
        + ".",
        "",
        provenance_line(result),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Measure, print the table, write the JSON, and return what it holds."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, help="folder or Hub id")
    parser.add_argument("--split", default="validation", help="(default: %(default)s)")
    parser.add_argument("--explainer", default="imagenette-demo", help="(default: %(default)s)")
    parser.add_argument("--photographs", type=int, default=3000, help="in all turns together (default: 3000)")
    parser.add_argument("--turns", type=int, default=3, help="(default: 3)")
    parser.add_argument("--decoded", type=int, default=256, help="photographs read for the bare loop (default: 256)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: 16)")
    parser.add_argument("--workers", type=int, default=1, help="readers (default: 1)")
    parser.add_argument("--shard-rows", type=int, default=500, help="photographs a file (default: 500)")
    parser.add_argument("--quantisation", choices=("uint8", "uint16"), default="uint8", help="(default: uint8)")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: auto)")
    parser.add_argument("--sample", type=float, default=0.25, help="seconds between looks at memory (default: 0.25)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {**provenance(__file__, argv, find_device(args.device)), **measure(args)}
    print(table(result))
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
