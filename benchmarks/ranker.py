"""Time, memory and exactness of the rankers at pixel resolution, against unrolled log-domain Sinkhorn iterations.

Run ``python benchmarks/ranker.py --output ranker.json``; it prints a Markdown table. The default sizes are those of a
224 x 224 image: 50,176 elements, 32 bins, batch 4.

How it is measured: times are the fastest of ``--repeats`` runs, the methods taking turns, of the ranking and of its
backward pass with a given gradient of all the masks. Memory (Linux only) is the growth of the peak resident set of a
fresh process that runs one forward and backward pass after a warm-up at a tiny size, in units of one float32 plan
(batch x bins x elements); it includes the masks returned and excludes the incoming gradient, which exists before. The
mass error is the largest deviation of the mass between two neighbouring masks from its share, relative to that share,
over all images; "mixed" is a batch of normal, three-valued, heavy-tailed and constant scores.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_aha.ranking import QuantileRanker, TransportRanker, standardize  # noqa: E402


TAUS = (1.0, 0.1, 0.01)
TIMED_TAU = 0.1


def unrolled_sinkhorn(scores: Tensor, num_bins: int, tau: float, iterations: int = 20) -> Tensor:
    """Masks ``(B, K, n)`` after plain log-domain iterations that end with every element's mass at 1."""
    anchors = torch.linspace(1, -1, num_bins, dtype=scores.dtype)
    log_plan = standardize(scores)[:, None, :] * anchors[:, None] / tau
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(dim=2, keepdim=True) + math.log(scores.shape[1] / num_bins)
        log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True)
    return log_plan.exp().cumsum(dim=1)


METHODS: dict[str, Callable[[Tensor, int, float], Tensor]] = {
    "Sinkhorn, 20 unrolled": unrolled_sinkhorn,
    "TransportRanker": lambda scores, bins, tau: TransportRanker()(scores, bins, tau=tau),
    "TransportRanker, straight through": lambda scores, bins, tau: TransportRanker(True)(scores, bins, tau=tau),
    "QuantileRanker": lambda scores, bins, tau: QuantileRanker()(scores, bins, tau=tau),
    "TransportRanker, 4 steps": lambda scores, bins, tau: TransportRanker()(scores, bins, four(bins), tau=tau),
    "QuantileRanker, 4 steps": lambda scores, bins, tau: QuantileRanker()(scores, bins, four(bins), tau=tau),
}
BASELINE = "Sinkhorn, 20 unrolled"


def four(num_bins: int) -> Tensor:
    """Four steps spread over the curve, as a training step asks for."""
    return torch.linspace(1, max(num_bins - 1, 1), 4).round().long()


def normal_scores(batch: int, elements: int) -> Tensor:
    return torch.randn(batch, elements, generator=torch.Generator().manual_seed(0))


def mixed_scores(batch: int, elements: int) -> Tensor:
    base = normal_scores(batch, elements)
    base[1::4] = base[1::4].sign() * (base[1::4].abs() > 0.5)
    base[2::4] = torch.tan(math.pi * (torch.special.ndtr(base[2::4]).clamp(1e-4, 1 - 1e-4) - 0.5))
    base[3::4] = 0.1
    return base


def run_once(method: str, scores: Tensor, num_bins: int, tau: float, gradient: Tensor) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    scores = scores.clone().requires_grad_()
    start = time.perf_counter()
    masks = METHODS[method](scores, num_bins, tau)
    middle = time.perf_counter()
    masks.backward(gradient)
    return middle - start, time.perf_counter() - middle


def gradient_for(method: str, batch: int, num_bins: int, elements: int) -> Tensor:
    steps = 4 if method.endswith("4 steps") else num_bins
    return torch.randn(batch, steps, elements, generator=torch.Generator().manual_seed(1))


def mass_error(method: str, scores: Tensor, num_bins: int, tau: float) -> float:
    """Largest relative error of the mass between two neighbouring masks returned."""
    with torch.no_grad():
        total = METHODS[method](scores, num_bins, tau).double().sum(dim=2)
    steps = four(num_bins) if method.endswith("4 steps") else torch.arange(1, num_bins + 1)
    wanted = torch.diff(steps, prepend=torch.zeros(1, dtype=torch.int64)) * scores.shape[1] / num_bins
    held = torch.diff(total, dim=1, prepend=torch.zeros(len(scores), 1, dtype=torch.float64))
    return float((held / wanted - 1).abs().max())


def peak_growth(method: str, batch: int, num_bins: int, elements: int) -> int:
    """Bytes by which one pass raises this process's resident set at its peak; meant for a fresh process on Linux."""
    scores, gradient = normal_scores(batch, elements), gradient_for(method, batch, num_bins, elements)
    run_once(method, scores[:1, :500], num_bins, TIMED_TAU, gradient[:1, :, :500])
    # Writing 5 sets the recorded peak back to the present size.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_bytes("VmRSS")
    run_once(method, scores, num_bins, TIMED_TAU, gradient)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def measure(args: argparse.Namespace) -> dict[str, object]:
    scores, mixed = normal_scores(args.batch, args.elements), mixed_scores(args.batch, args.elements)
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for _ in range(args.repeats + 1):
        for method in METHODS:
            gradient = gradient_for(method, args.batch, args.bins, args.elements)
            times[method].append(run_once(method, scores, args.bins, TIMED_TAU, gradient))
    rows = []
    plan_bytes = args.batch * args.bins * args.elements * 4
    for method in METHODS:
        # The first turn pays for the allocator and the thread pool.
        forward, backward = min(times[method][1:], key=sum)
        growth = math.nan
        command = [sys.executable, __file__, "--memory-of", method, "--elements", str(args.elements)]
        command += ["--bins", str(args.bins), "--batch", str(args.batch), "--threads", str(args.threads)]
        if sys.platform == "linux":
            growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(
            {
                "method": method,
                "forward_s": forward,
                "backward_s": backward,
                "peak_plans": None if math.isnan(growth) else growth / plan_bytes,
                "mass_error": {str(tau): mass_error(method, scores, args.bins, tau) for tau in TAUS},
                "mass_error_mixed": {str(tau): mass_error(method, mixed, args.bins, tau) for tau in TAUS},
            }
        )
    baseline = next(row["forward_s"] + row["backward_s"] for row in rows if row["method"] == BASELINE)
    for row in rows:
        row["speedup"] = baseline / (row["forward_s"] + row["backward_s"])
    return {
        "elements": args.elements,
        "bins": args.bins,
        "batch": args.batch,
        "tau_timed": TIMED_TAU,
        "threads": args.threads,
        "repeats": args.repeats,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }


def table(result: dict[str, object]) -> str:
    lines = [
        f"N = {result['elements']:,}, K = {result['bins']}, batch {result['batch']}, {result['threads']} thread(s), "
        f"torch {result['torch']}; times and memory at tau {result['tau_timed']}, mass errors at tau 1 / 0.1 / 0.01.",
        "",
        "| Method | Forward (ms) | Backward (ms) | Speed-up | Peak (plans) | Mass error, normal | Mass error, mixed |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    for row in result["rows"]:
        times = f"{1e3 * row['forward_s']:.1f} | {1e3 * row['backward_s']:.1f} | {row['speedup']:.1f}"
        peak = "n/a" if row["peak_plans"] is None else f"{row['peak_plans']:.2f}"
        normal, mixed = (
            " / ".join(f"{row[key][str(tau)]:.1e}" for tau in TAUS) for key in ("mass_error", "mass_error_mixed")
        )
        lines.append(f"| {row['method']} | {times} | {peak} | {normal} | {mixed} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=50176, help="scores per image")
    parser.add_argument("--bins", type=int, default=32, help="steps of the curve")
    parser.add_argument("--batch", type=int, default=4, help="images")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per method; the fastest counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, help="write the measurements as JSON")
    parser.add_argument("--memory-of", choices=sorted(METHODS), help="measure one method's peak in this process only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_growth(args.memory_of, args.batch, args.bins, args.elements))
        return
    result = measure(args)
    print(table(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
