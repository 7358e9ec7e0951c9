"""Between a name and a loaded explainer: files are checked before they are used, and errors said in one sentence.

A repository may come from anybody, so nothing of it is run or unpickled: weights are read from safetensors only, the
config may not name other files, and its classifier is loaded without remote code. Every file is fetched here, before
transformers looks for it, so that all of them are of one commit and every failure is met in one place.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_peft_available

from .classifier_aha import supported_model_types
from .configuration_aha import AhaConfig
from .encoder_aha import FrozenEncoder
from .repository_aha import (
    WEIGHTS,
    ExplainerAccessError,
    ExplainerFilesError,
    Place,
    access_reason,
    fetch,
    fetch_optional,
    find_weights,
    first_sentence,
    pin,
    read_json,
)


CLASSIFIER_SUBFOLDER = "classifier"
ENCODER_SUBFOLDER = "encoder"

# Words of earlier drafts and of neighbouring libraries: `target` is always the class asked about here, never a model.
_OTHER_WORDS = {
    "target": "classifier",
    "load_target": "load_classifier",
    "include_target": "include_classifier",
    "allow_target_mismatch": "allow_classifier_mismatch",
}


def check_arguments(method: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that would be swallowed, or that would give a secret away.

    Raises:
        TypeError: the argument has another name here.
        ValueError: the token holds characters that would end up in the HTTP library's error; pickled weights are asked
            for.

    Example:
        >>> check_arguments("from_pretrained", {"load_target": False})
        Traceback (most recent call last):
        ...
        TypeError: from_pretrained() has no argument 'load_target'; give load_classifier=... instead.
    """
    for name in arguments:
        if name in _OTHER_WORDS:
            raise TypeError(f"{method}() has no argument {name!r}; give {_OTHER_WORDS[name]}=... instead.")
    token = arguments.get("token")
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ValueError("token=... is empty or holds a character that no access token has, such as a line break.")
    if arguments.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False is refused: pickled weights can run any code, so none are loaded.")


# ------------------------------------------------------------------------------------------------ reading an explainer


def read_config(place: Place, arguments: dict[str, Any]) -> tuple[Place, AhaConfig]:
    """The config of an explainer, and the place pinned to the commit it was read from.

    Args:
        place: of the explainer.
        arguments: of the caller. `config` is taken out and used instead of the file; those that name a field of the
            config are taken out and set.

    Raises:
        ExplainerAccessError: the place could not be read.
        ExplainerFilesError: it holds no explainer, or its config has values of wrong types.
    """
    path = fetch(place, "config.json")
    if path is not None:
        place = pin(place, path)
    _refuse_adapter(place)
    given = arguments.pop("config", None)
    # By its type's name: as custom code of a folder, the config comes from a second copy of its module.
    if getattr(given, "model_type", None) == AhaConfig.model_type:
        return place, given
    if given is not None:
        return place, AhaConfig.from_pretrained(given)
    if path is None:
        raise ExplainerFilesError(f"{place.title} is no explainer: it has no config.json.")
    content = read_json(place, path)
    model_type = content.get("model_type")
    if model_type != AhaConfig.model_type:
        hint = ""
        if model_type in supported_model_types():
            hint = f"; to explain that model, train one with AhaExplainer.from_classifier({place.name!r})"
        raise ExplainerFilesError(
            f"{place.title} is no explainer: its config.json describes a model of type {model_type!r}, not "
            f"{AhaConfig.model_type!r}{hint}."
        )
    names = {item.name for item in fields(AhaConfig)} - {"dtype"}
    changes = {name: arguments.pop(name) for name in list(arguments) if name in names}
    try:
        return place, AhaConfig.from_dict(content, **changes)
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
        # The errors of `@strict` name the field first and the kind of the error inside.
        reason = re.sub(r"^.*?\w+Error: ", "", first_sentence(place, error))
        raise ExplainerFilesError(f"{place.title} has an invalid config.json: {reason}.") from error


def check_weights(place: Place, paths: Sequence[str], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes in safetensors files with the tensors a model has, before any memory is taken for them.

    Raises:
        ExplainerFilesError: a file is damaged or cut short, or a tensor is missing or of another shape.
    """
    shapes: dict[str, list[int]] = {}
    for path in paths:
        with reading_weights(place, path), safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    missing = set(expected) - set(shapes)
    if missing:
        raise missing_weights(place, missing)
    for name, tensor in expected.items():
        if list(shapes[name]) != list(tensor.shape):
            raise ExplainerFilesError(
                f"{place.title} has weights {name} of shape {list(shapes[name])} where its config asks for "
                f"{list(tensor.shape)}: its files are damaged, or do not belong to its config."
            )


def missing_weights(place: Place, names: Iterable[str]) -> ExplainerFilesError:
    """The error to raise when the files lack weights of the decoder."""
    names = sorted(names)
    return ExplainerFilesError(
        f"{place.title} lacks {len(names)} of its decoder's weights ({names[0]}, ...): its files are damaged, or do "
        "not belong to its config."
    )


def check_finite_weights(place: Place, module: nn.Module) -> None:
    """Refuse a decoder with NaN or infinite weights, whose maps would say nothing.

    Raises:
        ExplainerFilesError: there are such weights.
    """
    for name, parameter in module.named_parameters():
        if not parameter.is_meta and not math.isfinite(float(parameter.detach().float().abs().sum())):
            raise ExplainerFilesError(
                f"{place.title} has weights {name} that are NaN or infinite: its files are damaged."
            )


@contextmanager
def reading_weights(place: Place, path: str = WEIGHTS) -> Iterator[None]:
    """Say in one sentence that a safetensors file is damaged."""
    try:
        yield
    except SafetensorError as error:
        raise ExplainerFilesError(
            f"{place.title} has a damaged {os.path.basename(path)}, changed or cut short on its way: load it again "
            f"with force_download=True, or get it anew from its author{place.advice}."
        ) from error


@contextmanager
def _understood(place: Place, filename: str = "config.json") -> Iterator[None]:
    try:
        yield
    except (ExplainerFilesError, torch.OutOfMemoryError):
        raise
    except HTTPError as error:
        raise ExplainerAccessError(
            f"{place.title} could not be loaded: {access_reason(place, filename, error)}{place.advice}."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise ExplainerFilesError(
            f"{place.title} could not be loaded from its files: {first_sentence(place, error)}{place.advice}."
        ) from error


# ------------------------------------------------------------------------------------------- loading what goes with it


def load_frozen_parts(
    place: Place,
    config: AhaConfig,
    classifier: PreTrainedModel | str | os.PathLike[str] | None,
    model_arguments: Mapping[str, Any],
) -> tuple[PreTrainedModel, FrozenEncoder | None, BaseImageProcessor | None]:
    """Load what an explainer needs beside its decoder: the classifier, the encoder if it has one, the image processor.

    Args:
        place: of the explainer. Only its `hub` arguments are used on other repositories: the explainer's revision says
            nothing about theirs, which the config pins by itself.
        config: of the explainer.
        classifier: to use instead of the one the config names: a loaded model, a Hub id or a folder.
        model_arguments: `dtype`, `device_map`, `attn_implementation` of the classifier and the encoder.

    Raises:
        ExplainerAccessError: one of them is not found, gated, or not reached.
        ExplainerFilesError: its files are damaged or pickled, or it is no image classifier of transformers.
    """
    own, included = f"the explainer {place.name}", config.includes_classifier
    if classifier is None:
        name = config.base_model_name_or_path
        if included:
            at = replace(place.inside(CLASSIFIER_SUBFOLDER), title=f"The classifier inside {own}")
        elif name is None:
            raise ExplainerAccessError(
                f"{place.title} was trained for a classifier built in memory; give that classifier with classifier=..."
            )
        else:
            advice = "; or give it with classifier=..., or load the decoder alone with load_classifier=False"
            at = Place(name, f"The classifier {name} of {own}", advice, config.base_model_revision, hub=place.hub)
        _, classifier = load_classifier(at, model_arguments)
    elif not isinstance(classifier, nn.Module):
        at = Place(str(classifier), title=f"The classifier {classifier}", hub=place.hub)
        _, classifier = load_classifier(at, model_arguments)
    encoder, name = None, config.encoder_name_or_path
    if name is not None:
        if included:
            at = replace(place.inside(ENCODER_SUBFOLDER), title=f"The encoder inside {own}")
        else:
            at = Place(name, f"The encoder {name} of {own}", revision=config.encoder_revision, hub=place.hub)
        _, encoder = load_encoder(at, model_arguments)
    return classifier, encoder, load_image_processor(place)


def load_classifier(place: Place, model_arguments: Mapping[str, Any]) -> tuple[Place, PreTrainedModel]:
    """Load an image classifier, from safetensors and without remote code; also gives the place at the commit loaded.

    Raises:
        ExplainerAccessError, ExplainerFilesError: as in `load_frozen_parts`.
    """
    place = _fetch_model(place)
    with _understood(place), reading_weights(place):
        return place, AutoModelForImageClassification.from_pretrained(
            place.name, use_safetensors=True, trust_remote_code=False, **place.arguments(), **model_arguments
        )


def load_encoder(place: Place, model_arguments: Mapping[str, Any]) -> tuple[Place, FrozenEncoder]:
    """Load a separate backbone, as `load_classifier` does a classifier."""
    place = _fetch_model(place)
    fetch_optional(place, "preprocessor_config.json")
    with _understood(place), reading_weights(place):
        return place, FrozenEncoder.from_pretrained(place.name, **place.arguments(), **model_arguments)


def load_image_processor(place: Place) -> BaseImageProcessor | None:
    """Load the image processor saved at a place; `None` when none is.

    Raises:
        ExplainerAccessError: the place could not be read.
        ExplainerFilesError: the file is damaged.
    """
    path = fetch_optional(place, "preprocessor_config.json")
    if path is None:
        return None
    read_json(place, path)
    with _understood(place, "preprocessor_config.json"):
        return AutoImageProcessor.from_pretrained(place.name, trust_remote_code=False, **place.arguments())


def _fetch_model(place: Place) -> Place:
    path = fetch(place, "config.json")
    if path is None:
        raise ExplainerFilesError(
            f"{place.title} has no config.json, so it is no model of transformers{place.advice}."
        )
    place = pin(place, path)
    _refuse_adapter(place)
    filename = read_json(place, path).get("transformers_weights")
    find_weights(place, filename=None if filename is None else str(filename))
    return place


def _refuse_adapter(place: Place) -> None:
    # With peft installed, transformers would load the adapter too, from pickled weights as well, and from wherever its
    # config says.
    if is_peft_available() and fetch_optional(place, "adapter_config.json"):
        raise ExplainerFilesError(f"{place.title} holds an adapter of PEFT, which is not supported{place.advice}.")


__all__ = [
    "CLASSIFIER_SUBFOLDER",
    "ENCODER_SUBFOLDER",
    "check_arguments",
    "check_finite_weights",
    "check_weights",
    "load_classifier",
    "load_encoder",
    "load_frozen_parts",
    "load_image_processor",
    "missing_weights",
    "read_config",
    "reading_weights",
]
