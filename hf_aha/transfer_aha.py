"""Transfer: the decoder of a new explainer starts from one that was trained for another classifier.

This file travels to the Hub as custom code, so it imports torch and its siblings only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .configuration_aha import AhaConfig


def start_decoder(
    decoder: nn.Module, config: AhaConfig, source: nn.Module, source_config: AhaConfig
) -> dict[str, list[str]]:
    """Copy into a new decoder every part of a trained one that fits, whole parts only; the rest stays as it is.

    A part fits where all its shapes agree. Parts of one name correspond. The projections of the tapped layers
    correspond by their order where there are as many, else by their depth relative to the last, and those that start
    from the same one share its weights, so that their sum stays what it was. Weights that read pixels are rewritten
    for the image mean and standard deviation of the new classifier, so that they see the same colours.

    The projections and the class modulation are copied wherever their shapes agree, although another classifier's
    channels mean something else unless it descends from the same weights: where it does, that is most of what there
    is to carry over; where it does not, they are as good a start as random ones (`docs/method.md` has the trial).

    A decoder that reads gradients starts from their scores. Where the trained one reads none, its own scores stay
    behind, because they would outweigh those; what computes them is copied.

    Args:
        decoder, config: of the new explainer; the decoder's weights are overwritten in place.
        source, source_config: of the trained one; only read.

    Returns:
        the names of the parts `"copied"` and of those left `"new"`, in the decoder's order.

    Example:
        >>> from hf_aha.decoder_aha import AttributionDecoder
        >>> sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
        >>> trained, fresh = AttributionDecoder(6, 1, 6, **sizes), AttributionDecoder(4, 1, 4, **sizes)
        >>> parts = start_decoder(fresh, AhaConfig(taps=[2]), trained, AhaConfig(taps=[4]))
        >>> parts["new"]
        ['taps.0', 'class']
    """
    own, theirs = _parts(decoder), _parts(source)
    places = dict(zip(range(len(config.taps)), _taps_from(config.taps, source_config.taps), strict=True))
    left = () if "gradient_stem" in theirs or "gradient_stem" not in own else ("grid_score", "pixel_score")
    copied, new = [], []
    with torch.no_grad():
        for part, tensors in own.items():
            start, share = part, 1.0
            if part.startswith("taps."):
                place = places[int(part.removeprefix("taps."))]
                start, share = f"taps.{place}", 1 / list(places.values()).count(place)
            found = theirs.get(start, {})
            if part in left or _shapes(found) != _shapes(tensors):
                new.append(part)
                continue
            found = _for_pixels_of(part, found, source_config, config)
            for name, tensor in tensors.items():
                tensor.copy_(found[name] * share if name.startswith("linear.") else found[name])
            copied.append(part)
    return {"copied": copied, "new": new}


def started_from(
    decoder: nn.Module, config: AhaConfig, source: nn.Module, source_config: AhaConfig, name: str | os.PathLike[str]
) -> dict[str, Any]:
    """Run `start_decoder`, and say what was done, for `AhaConfig.init_from`.

    Args:
        decoder, config, source, source_config: as there.
        name: of the source; of a folder only the last part is kept, because configs are shared.

    Returns:
        `explainer` and `base_model`, the source and its classifier, and the parts `copied` and `new`.

    Raises:
        ValueError: no part fits.
    """
    parts = start_decoder(decoder, config, source, source_config)
    if not parts["copied"]:
        sizes = ("grid_width", "quarter_width", "half_width")
        theirs, own = (", ".join(f"{size} {getattr(one, size)}" for size in sizes) for one in (source_config, config))
        raise ValueError(
            f"Nothing of the explainer {public_name(name)} ({theirs}) fits into a decoder of {own}: leave the sizes "
            "out, which takes them from it, or leave init_from out."
        )
    base = source_config.base_model_name_or_path
    return {"explainer": public_name(name), "base_model": None if base is None else public_name(base), **parts}


def settings_from(source: AhaConfig, names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are given, and for the other names those of the source."""
    return {name: getattr(source, name) for name in names} | dict(given)


def taps_from(source: AhaConfig, num_layers: int) -> list[int] | None:
    """The layers that the source reads, where they are those of a model of this depth; else None."""
    return list(source.taps) if max(source.taps) == num_layers else None


def public_name(name: str | os.PathLike[str]) -> str:
    """A Hub id as it is, and of a folder its last part.

    Example:
        >>> public_name("google/vit-base-patch16-224"), public_name("runs/demo/final/")
        ('google/vit-base-patch16-224', 'final')
    """
    text = os.fspath(name)
    is_id = not os.path.isabs(text) and text.count("/") <= 1 and not os.path.isdir(text)
    return text if is_id else os.path.basename(os.path.normpath(text))


def _parts(decoder: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> its tensors by name; each block of a list is a part, and so are both layers that read the class."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in decoder.state_dict().items():
        words = name.split(".")
        child = getattr(decoder, words[0])
        depth = 2 if isinstance(child, (nn.ModuleList, nn.Sequential)) else 1
        part, rest = ".".join(words[:depth]), ".".join(words[depth:])
        if words[0].startswith("class_"):
            part, rest = "class", name
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _taps_from(taps: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """Which of their tapped layers each of ours starts from."""
    if len(taps) == len(theirs):
        return list(range(len(taps)))
    # In units that keep whole numbers; of two layers equally near, the later one.
    depths = [tap * max(taps) for tap in theirs]
    wanted = [tap * max(theirs) for tap in taps]
    return [min(range(len(depths)), key=lambda place: (abs(depths[place] - depth), -place)) for depth in wanted]


def _for_pixels_of(
    part: str, tensors: Mapping[str, torch.Tensor], source: AhaConfig, config: AhaConfig
) -> Mapping[str, torch.Tensor]:
    """The same function of the colours, for pixels normalised by another mean and standard deviation."""
    if (source.image_mean, source.image_std) == (config.image_mean, config.image_std):
        return tensors
    weight, bias = (tensors.get(name) for name in ("weight", "bias"))
    mean, std, new_mean, new_std = (
        torch.tensor(values, dtype=torch.float64)
        for values in (source.image_mean, source.image_std, config.image_mean, config.image_std)
    )
    if part == "half_stem":
        # Old pixels are scale * new pixels + shift; four input channels a colour, the pixels of a 2 x 2 square.
        scale, shift = ((values / std).repeat_interleave(4)[:, None, None] for values in (new_std, new_mean - mean))
        shifted = (weight.double().cpu() * shift).sum(dim=(1, 2, 3))
        return {"weight": weight.double().cpu() * scale, "bias": bias.double().cpu() + shifted}
    return tensors


__all__ = ["public_name", "settings_from", "start_decoder", "started_from", "taps_from"]
