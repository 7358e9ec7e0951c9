"""What a faithfulness number means: every choice that changes it, frozen in a `Protocol`, and the named presets."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..perturbation import IMAGENET_MEAN_RGB


CHOICES = {
    "rounding": ("round", "floor", "step"),
    "order": ("most_relevant_first", "least_relevant_first"),
    "start": ("image", "reference"),
    "reference": ("mean_rgb", "black", "zero", "blur"),
    "space": ("rgb", "normalised"),
    "score": ("probability", "logit", "accuracy", "normalised_monotone", "magnitude_aligned"),
    "class_source": ("predicted", "label", "given"),
    "image_filter": (None, "mda"),
    "auc": ("trapezoid_unit", "trapezoid_x100", "mean_interval"),
    "ties": ("stable_index", "random_mean"),
    "map_values": ("signed", "absolute"),
}
"""Allowed values of the fields of a `Protocol` that hold a word."""

_BLUR_ARGUMENTS = {
    "gkern": {"kernel", "sigma", "padding"},
    "gkern_adaptive": {"first", "stride", "last", "probability", "padding"},
    "gaussian": {"sigma_of_side", "padding"},
}
# The only border each recipe is defined with; it is recorded because copies of the metrics differ in it.
_BLUR_PADDING = {"gkern": "zeros", "gkern_adaptive": "zeros", "gaussian": "reflect"}

ADAPTIVE_BLUR = {"first": 31, "stride": 2, "last": 101, "probability": 0.01}
"""MDA's search for a blur that removes the class: gkern(k, k) for k = 31, 33, .., 101, the first with p <= 0.01."""

Unit = str | tuple[int, int]


@dataclass(frozen=True)
class Protocol:
    """One curve and its area, defined without anything left open; equal protocols give comparable numbers.

    Attributes:
        name: preset and curve, as `"aha/deletion"`, or a name of your own.
        version: raised with every change of meaning.
        fractions: shares of perturbed units, ascending in 0..1; the ends are measured points only if they are in it.
        rounding: units perturbed at share p of n: `"round"` round(p n), half to even; `"floor"` int(p n); `"step"`
            `step` units a point, the last one fewer.
        order: `"least_relevant_first"` ranks the negated scores.
        start: `"image"` removes units from the image, `"reference"` reveals them on the reference.
        reference: what a removed unit shows: `"mean_rgb"` one colour, `"black"` RGB 0, `"zero"` 0 in normalised space
            (the mean of the image processor), `"blur"` a blurred copy.
        reference_args: options of the reference as sorted (name, value) pairs; a mapping is accepted. `"mean_rgb"`
            has `rgb`; `"blur"` has a `recipe`, its numbers and `padding`: `"gkern"` (RISE), `"gkern_adaptive"` (MDA)
            or `"gaussian"` (`hf_aha.perturbation.reference_image`).
        space: where the reference is made.
        score: `"probability"` (softmax) or `"logit"` of the scored class; `"accuracy"`, 1 where the label is the
            largest logit; `"normalised_monotone"`, (p - p_ref) / |p_clean - p_ref| clipped to 0..1, then the running
            minimum (start image) or maximum (start reference); `"magnitude_aligned"`, that plus (image) or minus
            (reference) its distance to the share of the map's sum not yet removed or already revealed, clipped, then
            stretched to 0..1.
        class_source: the scored class: the classifier's prediction on the clean image, the label, or the class the
            map was asked about.
        image_filter: `"mda"` keeps images with prediction = label, p >= 0.6, a map that is not all zero, and a blur of
            `ADAPTIVE_BLUR` that removes the class. MDA's other two rules (colour images only, at most
            ceil(images / 1000) per class) concern the choice of images and are the caller's.
        auc: `"trapezoid_unit"`, trapezoid on [0, 1]; `"trapezoid_x100"`, 100 times the trapezoid over the fractions
            with the score of the start put before them at 0 (not divided by the last fraction);
            `"mean_interval"`, (sum - half of both ends) / (points - 1).
        ties: equal scores go by lowest index first, or the value and the curve are means over random orders of them.
        higher_is_better: must agree with `order` and `start`.
        unit: `"pixel"`, or (height, width) in pixels of the cells that are ranked (by their mean score) and perturbed;
            where they do not divide the image, those at the right and the lower border are smaller.
        step: units a point, with rounding `"step"` only.
        map_values: `"absolute"` takes the magnitude of the scores first and so forgets their sign.
        tie_orders, tie_seed: number and seed of the random orders; the same orders serve every image.

    Raises:
        ValueError: a value is unknown, or two fields contradict each other.

    Example:
        >>> deletion, insertion = get_protocol("aha")
        >>> deletion.counts(224 * 224)[1], deletion.higher_is_better
        (2509, False)
        >>> Protocol.from_dict(deletion.to_dict()) == deletion
        True
    """

    name: str
    version: int
    fractions: tuple[float, ...]
    rounding: str
    order: str
    start: str
    reference: str
    reference_args: tuple[tuple[str, Any], ...]
    space: str
    score: str
    class_source: str
    image_filter: str | None
    auc: str
    ties: str
    higher_is_better: bool
    unit: Unit = "pixel"
    step: int | None = None
    map_values: str = "signed"
    tie_orders: int = 1
    tie_seed: int = 0

    def __post_init__(self) -> None:
        arguments = self.reference_args
        pairs = arguments.items() if isinstance(arguments, Mapping) else arguments
        object.__setattr__(self, "reference_args", tuple(sorted((key, _frozen(value)) for key, value in pairs)))
        object.__setattr__(self, "fractions", tuple(float(fraction) for fraction in self.fractions))
        object.__setattr__(self, "unit", _frozen(self.unit))
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r} in protocol {self.name!r}, but must be one of "
                    f"{', '.join(map(repr, allowed))}."
                )
        for problem in self._problems():
            raise ValueError(f"Protocol {self.name!r} is inconsistent: {problem}.")

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of a unit in pixels."""
        return (1, 1) if self.unit == "pixel" else self.unit

    def counts(self, units: int) -> tuple[int, ...]:
        """Number of perturbed units at every fraction, for an image of `units` pixels or cells.

        Raises:
            ValueError: rounding is `"step"` and this many units do not give this many points.
        """
        if self.rounding == "round":
            return tuple(round(fraction * units) for fraction in self.fractions)
        if self.rounding == "floor":
            return tuple(int(fraction * units) for fraction in self.fractions)
        points = math.ceil(units / self.step) + 1
        if points != len(self.fractions):
            raise ValueError(
                f"Protocol {self.name!r} has {len(self.fractions)} points in steps of {self.step}, but {units} units "
                f"need {points}: make it for this size with get_protocol({self.name!r}, image_size=...)."
            )
        return tuple(min(index * self.step, units) for index in range(points))

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values; tuples become lists, `reference_args` a dictionary."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**{key: _thawed(value) for key, value in values.items()}, "reference_args": self._arguments_thawed()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """The protocol that `to_dict` wrote.

        Raises:
            ValueError: a field is missing, unknown or not allowed. Unknown fields are not ignored, since they may
                change the meaning of the numbers.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise ValueError(
                f"This is not a protocol of this version of hf_aha: missing fields {sorted(known - set(values))}, "
                f"unknown fields {sorted(set(values) - known)}."
            )
        return cls(**values)

    def _arguments_thawed(self) -> dict[str, Any]:
        return {key: _thawed(value) for key, value in self.reference_args}

    def _problems(self) -> list[str]:
        """What contradicts what, first the most basic."""
        shares, problems = self.fractions, []
        if not isinstance(self.name, str) or not self.name:
            problems.append("it has no name")
        if not _is_count(self.version):
            problems.append(f"version is {self.version!r}, but must be an integer from 1")
        if len(shares) < 2 or not all(0 <= share <= 1 for share in shares):
            problems.append(f"fractions need two or more values in 0..1, not {shares}")
        elif any(a >= b for a, b in zip(shares, shares[1:], strict=False)):
            problems.append(f"fractions must ascend, but they are {shares}")
        elif self.auc == "trapezoid_unit" and (shares[0] != 0 or shares[-1] != 1):
            problems.append(
                f"trapezoid_unit needs fractions from 0 to 1, but they run from {shares[0]} to {shares[-1]}"
            )
        elif self.rounding == "step" and shares != _even_fractions(len(shares) - 1):
            problems.append("rounding 'step' needs evenly spaced fractions from 0 to 1")
        if (self.rounding == "step") != (self.step is not None) or (
            self.step is not None and not _is_count(self.step)
        ):
            problems.append(f"step is {self.step!r}; give a positive integer with rounding 'step' and None without")
        if self.unit != "pixel" and not (_is_pair(self.unit) and all(_is_count(side) for side in self.unit)):
            problems.append(f"unit is {self.unit!r}, but must be 'pixel' or (height, width) of a cell in pixels")
        if self.higher_is_better is not ((self.order == "most_relevant_first") == (self.start == "reference")):
            problems.append(f"{self.order} on the {self.start} cannot have higher_is_better={self.higher_is_better!r}")
        if self.image_filter == "mda" and self.class_source != "predicted":
            problems.append("the filter 'mda' is about the prediction, so class_source must be 'predicted'")
        if self.score == "accuracy" and self.class_source != "label":
            problems.append("accuracy is scored against the label, so class_source must be 'label'")
        if self.score == "magnitude_aligned" and self.map_values != "absolute":
            problems.append("magnitude_aligned needs map_values 'absolute', as shares of a signed sum mean nothing")
        if not _is_count(self.tie_orders) or (self.ties == "stable_index" and self.tie_orders != 1):
            problems.append(f"tie_orders is {self.tie_orders!r}, but must be from 1, and 1 with ties 'stable_index'")
        if isinstance(self.tie_seed, bool) or not isinstance(self.tie_seed, int) or self.tie_seed < 0:
            problems.append(f"tie_seed is {self.tie_seed!r}, but must be an integer from 0")
        return problems + self._reference_problems()

    def _reference_problems(self) -> list[str]:
        arguments, wanted = dict(self.reference_args), set()
        own_space = {"mean_rgb": "rgb", "black": "rgb", "zero": "normalised"}.get(self.reference, self.space)
        if self.space != own_space:
            return [f"the reference {self.reference!r} is defined in space {own_space!r}, not {self.space!r}"]
        if self.reference == "mean_rgb":
            wanted = {"rgb"}
        elif self.reference == "blur":
            recipe = arguments.get("recipe")
            if recipe not in _BLUR_ARGUMENTS:
                return [f"the blur has recipe {recipe!r}, but must be one of {', '.join(map(repr, _BLUR_ARGUMENTS))}"]
            wanted = {"recipe", *_BLUR_ARGUMENTS[recipe]}
        if set(arguments) != wanted:
            return [f"reference_args has {sorted(arguments)}, but {self.reference!r} needs {sorted(wanted)}"]
        return [
            f"reference_args has {key}={value!r}" for key, value in arguments.items() if not self._fits(key, value)
        ]

    def _fits(self, key: str, value: Any) -> bool:
        if key == "recipe":
            return True
        if key == "padding":
            return value == _BLUR_PADDING[dict(self.reference_args)["recipe"]]
        if key == "rgb":
            return isinstance(value, tuple) and len(value) == 3 and all(_is_share(channel) for channel in value)
        if key in ("kernel", "first", "last"):  # an even kernel would not keep the size of the image
            return _is_count(value) and value % 2 == 1
        if key == "stride":
            return _is_count(value) and value % 2 == 0
        if key == "probability":
            return _is_share(value)
        return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < math.inf


def get_protocol(
    name: str, *, image_size: int | tuple[int, int] = 224, patch_size: int | tuple[int, int] = 16
) -> tuple[Protocol, ...]:
    """The protocols of a preset, or those whose names start with `name` at a slash.

    `get_protocol("rise")` gives `rise/deletion` and `rise/insertion`, `get_protocol("rise/deletion")` only the first.
    `protocol_names()` lists all.

    Args:
        name: `"aha"`, `"rise"`, `"chefer"`, `"mda"`, `"hf_aha"`, or a longer name.
        image_size: side, or height and width, of the classifier's input. `rise` and `mda` perturb one row of pixels a
            step (224 at 224 x 224, hence 225 points); the others do not depend on it.
        patch_size: side, or height and width, of a patch; the cells of `hf_aha/patch`.

    Raises:
        ValueError: no protocol has this name, or a size is not positive.

    Example:
        >>> [protocol.name for protocol in get_protocol("chefer")]
        ['chefer/positive', 'chefer/negative']

    Reference: aha https://arxiv.org/abs/2604.05819; rise https://arxiv.org/abs/1806.07421; chefer
    https://arxiv.org/abs/2012.09838 with the area of https://github.com/hila-chefer/Transformer-Explainability/issues/31;
    mda https://openreview.net/forum?id=rGP2jbWt0l; each as its released code computes it, except that ties are stable.
    """
    height, width = _sizes("image_size", image_size)
    every = _presets(height, width, _sizes("patch_size", patch_size))
    found = tuple(protocol for protocol in every if f"{protocol.name}/".startswith(f"{name}/"))
    if not found or not name:
        groups = sorted({protocol.name.split("/")[0] for protocol in every})
        near = difflib.get_close_matches(str(name), [*groups, *(protocol.name for protocol in every)], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"Unknown protocol {name!r}: {hint}The presets are {', '.join(groups)}.")
    return found


def protocol_names() -> tuple[str, ...]:
    """The name of every protocol of every preset.

    Example:
        >>> protocol_names()[:2]
        ('aha/deletion', 'aha/insertion')
    """
    return tuple(protocol.name for protocol in _presets(224, 224, (16, 16)))


def _presets(height: int, width: int, patch: tuple[int, int]) -> tuple[Protocol, ...]:
    common = {"version": 1, "ties": "stable_index", "image_filter": None}
    probability = {**common, "score": "probability", "class_source": "predicted"}
    removal = {"order": "most_relevant_first", "start": "image", "higher_is_better": False}
    reversed_removal = {"order": "least_relevant_first", "start": "image", "higher_is_better": True}
    revealing = {"order": "most_relevant_first", "start": "reference", "higher_is_better": True}
    mean = {"reference": "mean_rgb", "reference_args": {"rgb": IMAGENET_MEAN_RGB}, "space": "rgb"}
    zero = {"reference": "zero", "reference_args": {}, "space": "normalised"}
    black = {"reference": "black", "reference_args": {}, "space": "rgb"}
    gkern = {"recipe": "gkern", "kernel": 11, "sigma": 5.0, "padding": "zeros"}
    adaptive = {"recipe": "gkern_adaptive", **ADAPTIVE_BLUR, "padding": "zeros"}
    gaussian = {"recipe": "gaussian", "sigma_of_side": 0.05, "padding": "reflect"}
    gkern_blur = {"reference": "blur", "reference_args": gkern, "space": "normalised"}
    adaptive_blur = {"reference": "blur", "reference_args": adaptive, "space": "normalised"}
    our_blur = {"reference": "blur", "reference_args": gaussian, "space": "rgb"}

    points_21 = {"fractions": _even_fractions(20), "rounding": "round", "auc": "trapezoid_unit"}
    rows = {"fractions": _even_fractions(height), "rounding": "step", "step": width, "auc": "mean_interval"}
    tenths = {"fractions": tuple(tenth / 10 for tenth in range(1, 10)), "rounding": "floor", "auc": "trapezoid_x100"}
    accuracy = {**common, **tenths, **black, "score": "accuracy", "class_source": "label"}
    mda = {**common, **rows, "class_source": "predicted", "image_filter": "mda", "map_values": "absolute"}
    monotone, aligned = {"score": "normalised_monotone"}, {"score": "magnitude_aligned"}
    named = [
        ("aha/deletion", {**probability, **points_21, **mean, **removal}),
        # Released as the deletion curve of the negated map.
        ("aha/insertion", {**probability, **points_21, **mean, **reversed_removal}),
        ("rise/deletion", {**probability, **rows, **zero, **removal}),
        ("rise/insertion", {**probability, **rows, **gkern_blur, **revealing}),
        ("chefer/positive", {**accuracy, **removal}),
        ("chefer/negative", {**accuracy, **reversed_removal}),
        ("mda/deletion", {**mda, **monotone, **zero, **removal}),
        ("mda/insertion", {**mda, **monotone, **adaptive_blur, **revealing}),
        ("mda/mas-deletion", {**mda, **aligned, **zero, **removal}),
        ("mda/mas-insertion", {**mda, **aligned, **adaptive_blur, **revealing}),
    ]
    for level, unit in (("pixel", "pixel"), ("cell4", (4, 4)), ("patch", patch)):
        for kind, reference in (("blur", our_blur), ("mean", mean)):
            for curve, direction in (("deletion", removal), ("insertion", revealing)):
                name = f"hf_aha/{level}/{kind}/{curve}"
                named.append((name, {**probability, **points_21, **reference, **direction, "unit": unit}))
    return tuple(Protocol(name=name, **values) for name, values in named)


def _even_fractions(steps: int) -> tuple[float, ...]:
    return tuple(index / steps for index in range(steps + 1))


def _sizes(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if not _is_pair(pair) or not all(_is_count(side) for side in pair):
        raise ValueError(f"{name} is {size!r}, but must be a positive integer or two.")
    return pair


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= 1


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
