"""Explaining every photograph of a dataset, in one process or several, with readers and packers beside the passes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..benchmark.runner import processes
from ..geometry import InputGeometry
from ..metrics.passes import TargetPasses
from ..metrics.results import library_versions
from ..modeling_aha import AhaExplainer, AhaOutput
from .folder import MapsError, MapsFolder, describe_quantisation, split_name
from .ranks import QUANTISATIONS, Quantisation, quantised_ranks, ranks_to_png
from .rows import ExplainedRows, collate_rows


_TOP_CLASSES = 5


@dataclass(frozen=True)
class MapSettings:
    """What is made of each photograph, and how the work is cut.

    Args:
        top_k: maps a photograph, of the most probable classes; 1 where a target is given.
        quantisation: "uint8" or "uint16".
        map_size: (height, width) to which scores are averaged before they are ranked; the classifier's input size when
            left out, and at most that.
        precision: of the passes: "float32", the weights' own dtype; "bfloat16", autocast; "auto", bfloat16 where the
            machine has units for it.
        batch_size: photographs a pass.
        workers: processes that read photographs, and threads that pack maps; 0 reads between the passes.
        shard_rows: photographs a file; a killed process loses at most one file.

    Raises:
        ValueError: a number is out of range, or there is no such quantisation.
    """

    top_k: int = 1
    quantisation: str = "uint8"
    map_size: tuple[int, int] | None = None
    precision: str = "auto"
    batch_size: int = 16
    workers: int = 2
    shard_rows: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("batch_size", 1), ("workers", 0), ("shard_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}.")
        if self.quantisation not in QUANTISATIONS:
            raise ValueError(f"quantisation is {self.quantisation!r}, but must be one of {', '.join(QUANTISATIONS)}.")
        if self.map_size is not None and min(self.map_size) < 1:
            raise ValueError(f"map_size is {self.map_size}, but height and width must be at least 1.")


@dataclass(frozen=True)
class MapsSummary:
    """What a folder holds after a run, and what this run did.

    Attributes:
        folder: with all files.
        photographs: that were to be explained.
        maps: in the files.
        unreadable: `row`, `image_id` and `error` of the photographs without a map.
        bytes: of the files.
        explained: photographs that were explained, or tried, in this run, by all processes.
        seconds: that it took, reading and writing included.
        is_main_process: of several processes, only the main one knows the whole folder.
    """

    folder: MapsFolder
    photographs: int
    maps: int = 0
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0
    explained: int = 0
    seconds: float = 0.0
    is_main_process: bool = True


def explain_dataset(
    explainer: AhaExplainer,
    rows: ExplainedRows,
    settings: MapSettings,
    output: Path,
    *,
    names: Mapping[str, Any],
    resume: bool = False,
    progress: bool | None = None,
) -> MapsSummary:
    """Explain every photograph of `rows` and keep the maps in `output`.

    Files that lie there already are kept, so a run that was killed loses at most one file a process, and a finished
    one is not repeated. Started in several processes (with `accelerate launch` or `torchrun`), each takes every n-th
    missing file; they share the folder. The same rows give the same maps however many processes and readers there are.

    Args:
        explainer: with its classifier, on its device, in eval mode.
        rows: the photographs and the class asked about.
        settings: what is made of each.
        output: folder; created if it is missing.
        names: JSON values under `dataset` (with at least `split`), `explainer` and `classifier`, for the record; a
            resumed run must give the same.
        resume: go on where the folder holds something already.
        progress: show a bar; None for on a terminal only.

    Raises:
        MapsError: the folder holds something else.
        ValueError: the settings do not fit the explainer.
        torch.OutOfMemoryError: the batch is too large for the device.
        OSError: the folder cannot be written.

    Example:
        `explain_dataset(explainer, rows, MapSettings(), Path("maps"), names={"dataset": {"split": "train"}}).maps`
    """
    _check(explainer, rows, settings)
    passes = TargetPasses(explainer.classifier, settings.precision)
    split = split_name(names["dataset"]["split"])
    folder = MapsFolder(output, split, len(rows), settings.shard_rows, rows.against is not None)
    state = processes(explainer.device.type)
    hidden = True if progress is False or not state.is_main_process else None if progress is None else False
    quantisation = QUANTISATIONS[settings.quantisation]
    made_by = _made_by(explainer, quantisation, passes, names)
    job = _Job(explainer, settings, quantisation, passes.precision, made_by, rows.against)
    with folder.locked() if state.is_main_process else contextlib.nullcontext():
        if state.is_main_process:
            folder.open(run_identity(explainer, rows, settings, passes, names), resume)
        state.wait_for_everyone()
        missing = folder.missing()
        # All processes look before any of them writes, so that they cut the work alike.
        state.wait_for_everyone()
        started = time.perf_counter()
        shards = missing[state.process_index :: state.num_processes]
        with tqdm(total=sum(len(folder.rows_of(shard)) for shard in shards), unit="photo", disable=hidden) as bar:
            if shards:
                _explain_shards(job, rows, folder, shards, bar)
        state.wait_for_everyone()
        if not state.is_main_process:
            return MapsSummary(folder, len(rows), is_main_process=False)
        seconds = time.perf_counter() - started
        explained = sum(len(folder.rows_of(shard)) for shard in missing)
        maps, size, unreadable = folder.summary()
        return MapsSummary(folder, len(rows), maps, unreadable, size, explained, seconds)


def run_identity(
    explainer: AhaExplainer,
    rows: ExplainedRows,
    settings: MapSettings,
    passes: TargetPasses,
    names: Mapping[str, Any],
) -> dict[str, Any]:
    """What all maps of a folder share, JSON values; not how the work is cut into batches and processes."""
    made = {
        key: value for key, value in asdict(settings).items() if key not in ("batch_size", "workers", "shard_rows")
    }
    target: Any = {"label_column": rows.label_column} if rows.label_column is not None else rows.target
    dataset = {"image_column": rows.image_column, "id_column": rows.id_column, "digest": rows.digest()}
    return {
        "dataset": {**names["dataset"], **dataset},
        "explainer": {**names.get("explainer", {}), "weights": weights_digest(explainer)},
        "classifier": {**names.get("classifier", {}), "fingerprint": explainer.config.base_model_fingerprint},
        "processor": _processor_settings(explainer),
        "target": "predicted" if target is None else target,
        **({} if rows.against is None else {"against": rows.against}),
        **made,
        "precision": passes.precision,
        "dtype": str(explainer.dtype).removeprefix("torch."),
    }


def weights_digest(explainer: AhaExplainer) -> str:
    """The first 16 digits of the SHA-256 of the decoder's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(explainer.decoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Job:
    explainer: AhaExplainer
    settings: MapSettings
    quantisation: Quantisation
    precision: str
    made_by: str
    against: int | None

    @torch.no_grad()
    def forward(self, group: Mapping[str, Any]) -> AhaOutput:
        """Scores (B, M, h, w), logits (B, C) and target (B, M) of one batch, on the explainer's device."""
        device = self.explainer.device
        pixel_values = group["pixel_values"].to(device, non_blocking=True)
        target = [record["target"] for record in group["records"]]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            target = None if target[0] is None else torch.tensor(target, device=device)[:, None]
            if self.against is not None:
                return self._contrast(pixel_values, target)
            if target is not None:
                return self.explainer(pixel_values, target)
            if self.settings.top_k > 1:
                return self.explainer.explain_top(pixel_values, self.settings.top_k)
            output = self.explainer(pixel_values)
            return AhaOutput(scores=output.scores[:, None], logits=output.logits, target=output.target[:, None])

    def _contrast(self, pixel_values: torch.Tensor, target: torch.Tensor | None) -> AhaOutput:
        against = torch.full((len(pixel_values),), self.against, device=pixel_values.device)
        output = self.explainer(pixel_values, None if target is None else target[:, 0], against=against)
        return AhaOutput(scores=output.scores[:, None], logits=output.logits, target=output.target[:, None])

    @torch.no_grad()
    def pack(self, output: AhaOutput, records: list[dict[str, Any]]) -> tuple[list[dict], list[dict]]:
        """Rows of the dataset from one batch, and the photographs whose scores are no numbers."""
        scores = output.scores.float()
        if self.settings.map_size is not None:
            size = tuple(map(min, self.settings.map_size, scores.shape[-2:]))
            scores = F.adaptive_avg_pool2d(scores, size)
        finite = torch.isfinite(scores).flatten(1).all(1)
        levels = quantised_ranks(scores[finite].flatten(0, 1), self.quantisation)
        levels = iter(levels.reshape(-1, *scores.shape[1:]))
        probability = output.logits.float().softmax(-1).cpu()
        targets, finite = output.target.tolist(), finite.tolist()
        top = probability.topk(min(_TOP_CLASSES, probability.shape[1]), dim=-1)
        labels = self.explainer.config.id2label
        maps, errors = [], []
        for number, record in enumerate(records):
            if not finite[number]:
                reason = "The explainer's scores of this photograph are not finite."
                errors.append({"row": record["row"], "image_id": record["image_id"], "error": reason})
                continue
            best = list(zip(top.indices[number].tolist(), top.values[number].tolist(), strict=True))
            shared = {
                **{key: record[key] for key in ("row", "image_id", "sha256")},
                "predicted_target": best[0][0],
                "predicted_label": labels[best[0][0]],
                "predicted_probability": best[0][1],
                "top_classes": json.dumps(
                    [{"target": index, "label": labels[index], "probability": round(p, 6)} for index, p in best],
                    ensure_ascii=False,
                ),
                "geometry": json.dumps(_geometry(record["geometry"])),
                "made_by": self.made_by,
            }
            if self.against is not None:
                shared |= {
                    "against": self.against,
                    "against_label": labels[self.against],
                    "against_probability": float(probability[number, self.against]),
                }
            for place, (target, one) in enumerate(zip(targets[number], next(levels), strict=True)):
                own = {"place": place, "target": target, "label": labels[target], "ranks": ranks_to_png(one)}
                maps.append({**shared, **own, "probability": float(probability[number, target])})
        return maps, errors


def _explain_shards(job: _Job, rows: ExplainedRows, folder: MapsFolder, shards: list[int], bar: tqdm) -> None:
    """Explain and write whole shards, in order; readers fetch the next batches and packers finish the last ones."""
    settings = job.settings
    batches = [
        (shard, list(range(start, min(start + settings.batch_size, folder.rows_of(shard).stop))))
        for shard in shards
        for start in folder.rows_of(shard)[:: settings.batch_size]
    ]
    loader = DataLoader(
        rows,
        batch_sampler=[batch for _, batch in batches],
        collate_fn=collate_rows,
        num_workers=settings.workers,
        pin_memory=job.explainer.device.type == "cuda",
        prefetch_factor=2 if settings.workers else None,
    )
    packers = max(settings.workers, 1)
    packed: list[Future[tuple[list[dict], list[dict]]]] = []
    errors: list[dict[str, Any]] = []
    with ThreadPoolExecutor(packers) as pool:
        for number, batch in enumerate(loader):
            shard, numbers = batches[number]
            errors += batch["errors"]
            for group in batch["groups"]:
                packed.append(pool.submit(job.pack, job.forward(group), group["records"]))
                if len(packed) > 2 * packers:
                    packed[-2 * packers].result()  # else the scores of many batches would wait in memory
            bar.update(len(numbers))
            if number + 1 == len(batches) or batches[number + 1][0] != shard:
                results = [one.result() for one in packed]
                maps = [row for found, _ in results for row in found]
                errors += [row for _, bad in results for row in bad]
                folder.write(shard, maps, errors, job.quantisation)
                packed, errors = [], []


def _check(explainer: AhaExplainer, rows: ExplainedRows, settings: MapSettings) -> None:
    classes = explainer.config.num_labels
    if settings.top_k > classes:
        raise ValueError(f"top_k must lie in 1..{classes}, the number of classes, but it is {settings.top_k}.")
    if settings.top_k > 1 and (rows.target is not None or rows.label_column is not None):
        raise ValueError("Give either a target or top_k, not both.")
    if rows.against is not None:
        if settings.top_k > 1:
            raise ValueError("Give either against or top_k, not both.")
        if not 0 <= rows.against < classes:
            raise ValueError(f"against must lie in 0..{classes - 1}, the classes, but it is {rows.against}.")
    size = tuple(explainer.config.image_size)
    if settings.map_size is not None and any(map(int.__gt__, settings.map_size, size)):
        raise ValueError(
            f"map_size is {settings.map_size[0]} x {settings.map_size[1]}, but the explainer's maps have "
            f"{size[0]} x {size[1]} pixels; give at most that."
        )
    # A processor whose maps cannot be brought back is refused here, not photograph by photograph.
    InputGeometry.from_processor(explainer.image_processor, size)


def _made_by(
    explainer: AhaExplainer, quantisation: Quantisation, passes: TargetPasses, names: Mapping[str, Any]
) -> str:
    record = {
        "explainer": {**names.get("explainer", {}), "weights": weights_digest(explainer)},
        "classifier": {**names.get("classifier", {}), "fingerprint": explainer.config.base_model_fingerprint},
        "quantisation": describe_quantisation(quantisation),
        "precision": passes.precision,
        "device": explainer.device.type,
        "versions": library_versions(),
    }
    return json.dumps(record, ensure_ascii=False)


def _geometry(geometry: InputGeometry) -> dict[str, list[int]]:
    names = ("original_size", "resized_size", "crop_box")
    return {name: list(map(int, getattr(geometry, name))) for name in names}


def _processor_settings(explainer: AhaExplainer) -> dict[str, Any]:
    kept = ("do_", "size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor")
    settings = explainer.image_processor.to_dict()
    return {key: value for key, value in sorted(settings.items()) if key.startswith(kept) and value is not None}


__all__ = ["MapSettings", "MapsError", "MapsSummary", "explain_dataset", "run_identity", "weights_digest"]
