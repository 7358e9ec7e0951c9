"""Kill a training at random moments, resume it, and compare its weights with those of an undisturbed run.

    python benchmarks/kill_and_resume.py --kills 20 --output benchmarks/results/kill_and_resume.json

How it is tested: the bundled explainer is trained on for a few dozen tiny steps on the CPU, on crops of the bundled
photographs (or on `--dataset`, a folder of parquet files or an image folder), once undisturbed for each number of data
loader workers. Each kill is a run of its own in a fresh process: it begins in an empty folder, gets SIGKILL, is
started again with `resume_from_checkpoint="auto"` in another fresh process, and runs to its end. Half of the kills
come a random time after a random step, the other half as soon as the folder of a checkpoint appears that is being
written. A resume is exact if the final weights and, bit for bit, the files of the last checkpoints and every line of
the log (but for times) are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import provenance, write_json
from safetensors.torch import load_file


BATCH, SAVE_STEPS, SIDE = 4, 2, 56
PHOTOGRAPHS = 22  # five batches and a rest: some checkpoints stand at the end of an epoch, most do not
TIMES = ("images_per_second", "data_wait_share", "eta_seconds")


def write_photographs(folder: Path) -> Path:
    """Write a parquet dataset of crops of the bundled photographs."""
    import datasets
    from PIL import Image

    import hf_aha

    rng = random.Random(0)
    files = sorted((Path(hf_aha.__file__).parent / "bundled" / "photographs").glob("*.jpg"))
    cells = []
    for number in range(PHOTOGRAPHS):
        image = Image.open(files[number % len(files)]).convert("RGB")
        left, top = rng.randrange(image.width // 3), rng.randrange(image.height // 3)
        cells.append(image.crop((left, top, left + 2 * image.width // 3, top + 2 * image.height // 3)))
    table = datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": datasets.Image()}))
    folder.mkdir(parents=True)
    table.to_parquet(folder / "train.parquet")
    return folder


def train(args: argparse.Namespace) -> None:
    """The run that is killed: the body of the fresh processes."""
    from hf_aha import AhaExplainer, AhaTrainer, AhaTrainingArguments
    from hf_aha.data import Photographs, RandomCrop, load_photographs

    torch.manual_seed(args.seed)
    explainer = AhaExplainer.from_pretrained("imagenette-demo", dtype="float32")
    rows, column = load_photographs(str(args.dataset), split="train")
    config = explainer.config
    crop = RandomCrop((SIDE, SIDE), tuple(config.image_mean), tuple(config.image_std))
    settings = AhaTrainingArguments(
        str(args.train),
        max_steps=args.steps,
        per_device_batch_size=BATCH,
        save_steps=SAVE_STEPS,
        log_steps=1,
        mixed_precision="no",
        dataloader_num_workers=args.workers[0],
        grid_range=[2, 4],
        target_classes="sampled",
        references=["blur", "noise"],
        noise=0.5,
        mosaic_share=0.5,
        seed=args.seed,
        resume_from_checkpoint="auto",
    )
    AhaTrainer(explainer, settings, Photographs(rows, column, crop, seed=args.seed)).train()


def start(run: Path, args: argparse.Namespace, workers: int, dataset: Path) -> subprocess.Popen:
    """Start a training in a fresh process, its output in a file beside the run folder."""
    command = [sys.executable, __file__, "--train", str(run), "--dataset", str(dataset), "--steps", str(args.steps)]
    command += ["--workers", str(workers), "--seed", str(args.seed)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(run.parent / "cache"), "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(run.parent / f"{run.name}.txt", "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def finish(process: subprocess.Popen, run: Path) -> None:
    """Wait for a run that must end well."""
    if process.wait() != 0:
        sys.exit(f"A run failed:\n{(run.parent / f'{run.name}.txt').read_text()[-3000:]}")


def steps_logged(run: Path) -> int:
    """Steps that the log of a run shows."""
    log = run / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill(process: subprocess.Popen, run: Path, kind: str, step: int, delay: float) -> dict[str, object]:
    """Send SIGKILL once the run has taken `step` steps: `delay` seconds later, or within the next save."""
    while process.poll() is None:
        if steps_logged(run) >= step:
            if kind == "anywhere":
                time.sleep(delay)
                break
            if any(run.glob("partial-checkpoint-*")):
                break
        time.sleep(0.001)
    ended = process.poll() is not None
    if not ended:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return {
        "after_step": steps_logged(run),
        "ended_before_the_kill": ended,
        "left_half_a_checkpoint": any(run.glob("partial-checkpoint-*")),
        "resumed_from_step": max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=0),
    }


def differences(run: Path, undisturbed: Path) -> list[str]:
    """What of a finished run differs from the undisturbed one."""
    found = []
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (run, undisturbed)]
    same = weights[0].keys() == weights[1].keys()
    if not same or any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[1]):
        found.append("weights")
    checkpoints = [sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (run, undisturbed)]
    if checkpoints[0] != checkpoints[1]:
        found.append("checkpoints")
    for name in set(checkpoints[0]) & set(checkpoints[1]):
        for file in ("model.safetensors", "average.safetensors", "optimizer.pt", "process-0.pt"):
            # Their bytes: no tensor, counter or random state may differ.
            if (run / name / file).read_bytes() != (undisturbed / name / file).read_bytes():
                found.append(f"{name}/{file}")
    logs = [
        [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in (folder / "log.jsonl").open()]
        for folder in (run, undisturbed)
    ]
    return found + (["log"] if logs[0] != logs[1] else [])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Kill and resume `args.kills` times."""
    dataset = args.dataset or write_photographs(folder / "photographs")
    undisturbed, step_seconds = {}, 0.0
    for workers in sorted(set(args.workers)):
        undisturbed[workers] = run = folder / f"undisturbed-{workers}" / "run"
        process, first = start(run, args, workers, dataset), None
        while process.poll() is None:
            if first is None and steps_logged(run):
                first = time.perf_counter()
            time.sleep(0.01)
        finish(process, run)
        step_seconds = max(step_seconds, (time.perf_counter() - first) / args.steps)
    kills = []
    for number in range(args.kills):
        rng = random.Random(1000 * args.seed + number)
        kind, workers = ("anywhere", "saving")[number % 2], args.workers[number // 2 % len(args.workers)]
        run = folder / f"killed-{number}" / "run"
        # A save must still be to come: the last one is before the last step.
        step = rng.randrange(1, args.steps - SAVE_STEPS - 1)
        record = {"kind": kind, "workers": workers, "wanted_after_step": step}
        record |= kill(start(run, args, workers, dataset), run, kind, step, rng.uniform(0, 2 * step_seconds))
        finish(start(run, args, workers, dataset), run)
        record["different"] = differences(run, undisturbed[workers])
        record["exact"] = not record["different"] and not record["ended_before_the_kill"]
        kills.append(record)
        print(json.dumps(record), flush=True)
    return {
        **provenance(__file__, args.argv, torch.device("cpu")),
        "steps": args.steps,
        "save_steps": SAVE_STEPS,
        "batches_per_epoch": PHOTOGRAPHS // BATCH if args.dataset is None else None,
        "kills": kills,
        "exact_resumes": sum(record["exact"] for record in kills),
        "killed_within_a_save": sum(record["left_half_a_checkpoint"] for record in kills),
    }


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24, help="of each run, at least 8")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="data loader workers, in turns")
    parser.add_argument("--dataset", type=Path, help="folder of a dataset instead of the bundled photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.kills < 1 or args.steps < 8:
        parser.error(f"--kills must be at least 1 and --steps at least 8, but they are {args.kills} and {args.steps}")
    args.argv = list(argv)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Run the benchmark and return its result."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print(
        f"{result['exact_resumes']} of {args.kills} resumes exact; "
        f"{result['killed_within_a_save']} kills fell within a save."
    )
    write_json(args.output, result)
    return result


if __name__ == "__main__":
    if "--train" in sys.argv:
        train(parse_args(sys.argv[1:]))
    else:
        main()
