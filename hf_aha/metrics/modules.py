"""The `evaluate` modules of this package, thin shells around the functions here; loaded by name or path, offline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .protocols import Protocol, get_protocol
from .reduction import curve_areas
from .results import bootstrap


if TYPE_CHECKING:
    from evaluate import EvaluationModule

MODULES = ("deletion_auc", "grid_pointing", "insertion_auc", "negative_perturbation", "positive_perturbation")
"""The modules that `load` knows, each a folder beside this file."""


def load(name: str, **options: Any) -> EvaluationModule:
    """Load one of our `evaluate` modules, as `evaluate.load` does for those of the Hub, without any network.

    Args:
        name: one of `MODULES`.
        **options: of `evaluate.load`, such as `experiment_id`, `num_process` and `process_id`.

    Returns:
        an `evaluate` module with `add`, `add_batch` and `compute`.

    Raises:
        ValueError: there is no such module; the message lists them.

    Example:
        >>> metric = load("deletion_auc")  # doctest: +SKIP
        >>> metric.compute(predictions=[[0.9, 0.5, 0.1]], protocol=my_protocol)["deletion_auc"]  # doctest: +SKIP
        0.5
    """
    if name not in MODULES:
        raise ValueError(f"There is no evaluate module {name!r} here; there are {', '.join(MODULES)}.")
    import evaluate

    return evaluate.load(str(Path(__file__).parent / name), **options)


def find_curve_protocol(
    protocol: Protocol | str, points: int, *, start: str, order: str | None = None, accuracy: bool = False
) -> Protocol:
    """The protocol of this name, made for curves of so many points, if it is of the kind a module is about.

    Args:
        protocol: a name such as `"aha/deletion"`, or your own.
        points: of a curve; `rise` and `mda` have one a row of pixels and one more.
        start: `"image"` or `"reference"`, see `Protocol`; `"aha/insertion"`, released as the removal of the least
            important pixels, counts as `"reference"`.
        order: `"most_relevant_first"` or `"least_relevant_first"`.
        accuracy: whether the protocol must score accuracy.

    Raises:
        ValueError: there is no such protocol, or it is of another kind, or several have this name.
    """
    if isinstance(protocol, str):
        side = max(points - 1, 1)
        found = get_protocol(protocol, image_size=side if protocol.split("/")[0] in ("rise", "mda") else 224)
        if len(found) != 1:
            names = ", ".join(one.name for one in found)
            raise ValueError(f"{protocol!r} names {len(found)} protocols; choose one of {names}.")
        protocol = found[0]
    own = "reference" if protocol.higher_is_better and not accuracy else protocol.start
    if own != start or (protocol.score == "accuracy") != accuracy or order not in (None, protocol.order):
        raise ValueError(f"Protocol {protocol.name!r} is of another kind than this module; see its description.")
    return protocol


def reduce_curves(
    name: str,
    predictions: Sequence[Sequence[float]],
    protocol: Protocol,
    clean: Sequence[float] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """What a module returns for curves: the mean area under `name`, its interval, the areas, and what they mean.

    Raises:
        ValueError: the curves do not have the protocol's points, or a number is not finite.
    """
    lengths = {len(curve) for curve in predictions}
    if lengths != {len(protocol.fractions)}:
        raise ValueError(
            f"Protocol {protocol.name!r} has {len(protocol.fractions)} points a curve, but these have "
            f"{', '.join(map(str, sorted(lengths))) or 'none'}."
        )
    areas = curve_areas(np.asarray(predictions, np.float32), protocol, clean).numpy()
    facts = {"protocol": protocol.name, "protocol_version": protocol.version}
    return {**reduce_values(name, areas, resamples=resamples, seed=seed, confidence=confidence), **facts} | {
        "higher_is_better": protocol.higher_is_better
    }


def reduce_values(
    name: str, values: Sequence[float] | np.ndarray, *, resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> dict[str, Any]:
    """Mean of one value an image under `name`, its bootstrap interval (None with one image), and all values.

    Raises:
        ValueError: there is no value, or one is not finite.

    Example:
        >>> found = reduce_values("grid_pointing", [0.25, 0.75])
        >>> found["grid_pointing"], found["images"]
        (0.5, 2)
    """
    array = np.asarray(values, np.float64)
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise ValueError(
            f"The value of image {wrong[0]} is {array[wrong[0]]}; leave out such images yourself, and say how many."
        )
    found = bootstrap(array, 0, name, resamples, seed, confidence)
    return {
        name: found.mean,
        "low": found.low,
        "high": found.high,
        "confidence": confidence,
        "images": found.images,
        "per_image": array.tolist(),
    }
