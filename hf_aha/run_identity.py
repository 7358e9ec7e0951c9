"""What makes a run this run: settings, classifier, decoder, data and processes, to be compared when it is resumed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sized
from dataclasses import fields
from pathlib import Path
from typing import Any

from .checkpoints import CheckpointError
from .classifier_aha import FINGERPRINT_TOLERANCE, fingerprint_distance
from .configuration_aha import AhaConfig
from .data import Photographs
from .modeling_aha import AhaExplainer
from .streaming import PhotographStream
from .training_args import MAY_CHANGE_ON_RESUME, AhaTrainingArguments


def describe_run(
    args: AhaTrainingArguments, explainer: AhaExplainer, dataset: Photographs | PhotographStream, processes: int
) -> dict[str, Any]:
    """What the weights after a given number of steps depend on, ready for JSON.

    Settings of a recipe beyond [`AhaTrainingArguments`] name places (a classifier, a dataset), which may move; what
    they lead to is described instead.

    Args:
        args: settings of the run.
        explainer: with its classifier attached.
        dataset: training rows or a stream of them; their `fingerprint()` tells them from others.
        processes: of the run.
    """
    config = explainer.config
    settings = {field.name: getattr(args, field.name) for field in fields(AhaTrainingArguments)}
    return {
        "settings": {name: value for name, value in settings.items() if name not in MAY_CHANGE_ON_RESUME},
        "max_steps": args.max_steps,
        "classifier": {
            "fingerprint": config.base_model_fingerprint or explainer.classifier.fingerprint(),
            "dtype": str(next(explainer.classifier.parameters()).dtype).removeprefix("torch."),
            "encoder": Path(config.encoder_name_or_path or "").name or None,
            "encoder_revision": config.encoder_revision,
        },
        "decoder": {
            **{name: getattr(config, name) for name in AhaConfig.__annotations__ if not _NO_DECODER.match(name)},
            "weights": {name: list(value.shape) for name, value in explainer.decoder.state_dict().items()},
        },
        "data": {
            "rows": len(dataset) if isinstance(dataset, Sized) else None,
            "fingerprint": dataset.fingerprint(),
        },
        "processes": processes,
    }


def check_same_run(checkpoint: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose run is another one than the present.

    `max_steps` may change, with a warning: learning rate and temperature follow it, so that the result is that of
    neither an undisturbed run of the former nor of the new length.

    Args:
        checkpoint: for the messages.
        then: `describe_run` as the checkpoint holds it.
        now: `describe_run` of the present run.

    Raises:
        CheckpointError: they differ in something that changes the result.
    """
    start_anew = "or choose another output_dir to start anew"
    if then["processes"] != now["processes"]:
        raise CheckpointError(
            f"The checkpoint {checkpoint} was written by {_count(then['processes'])}, but this run has "
            f"{now['processes']}, which would change batches and random numbers; start as many (torchrun "
            f"--nproc_per_node {then['processes']}), {start_anew}."
        )
    distance = fingerprint_distance(then["classifier"]["fingerprint"], now["classifier"]["fingerprint"])
    if distance > FINGERPRINT_TOLERANCE:
        raise CheckpointError(
            f"The checkpoint {checkpoint} belongs to another classifier (fingerprint distance {distance:.3f}, "
            f"tolerance {FINGERPRINT_TOLERANCE}); give the classifier that it was trained for, {start_anew}."
        )
    for part, found in (
        ("classifier or its encoder", _differences(then["classifier"], now["classifier"], besides="fingerprint")),
        ("decoder", _differences(then["decoder"], now["decoder"], besides="weights")),
        ("decoder", _differences(then["decoder"]["weights"], now["decoder"]["weights"])),
        ("dataset", _differences(then["data"], now["data"])),
        ("settings", _differences(then["settings"], now["settings"])),
    ):
        if found:
            verb = "have" if part == "settings" else "has"
            raise CheckpointError(
                f"The {part} {verb} changed since the checkpoint {checkpoint} ({found}); go back to what was, "
                f"{start_anew}."
            )
    if then["max_steps"] != now["max_steps"]:
        warnings.warn(
            f"max_steps was {then['max_steps']} and is {now['max_steps']} now: learning rate and temperature follow "
            f"the new length from the checkpoint {checkpoint} on, so the result is that of no undisturbed run.",
            UserWarning,
            stacklevel=2,
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], besides: str | None = None) -> str:
    """`name: THEN then, NOW now` of what differs, but for the name `besides`."""
    names = [name for name in {**then, **now} if name != besides]
    found = [
        f"{name}: {_shown(then.get(name))} then, {_shown(now.get(name))} now"
        for name in names
        if _plain(then.get(name)) != _plain(now.get(name))
    ]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more


def _plain(value: Any) -> Any:
    # JSON makes lists of tuples.
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:8]}..."
    return "not set" if value is None else str(value)


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


_NAMED = 5
_NO_DECODER = re.compile("base_model_|encoder_|model_type|init_from|includes_classifier|training")


__all__ = ["check_same_run", "describe_run"]
