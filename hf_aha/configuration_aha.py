"""`AhaConfig`: everything needed to rebuild an explainer and to find the classifier it explains."""
# ruff: noqa: I002
# `from __future__ import annotations` would turn the types below into strings, and `@strict` checks no string types.

import re
import warnings
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .references_aha import REFERENCES


# Far beyond any sensible decoder: a config from a stranger must not ask for all memory and time of the machine.
_LARGEST_SIZE = 2**16
_LARGEST_DEPTH = 2**10
_MOST_GRADIENT_POINTS = 2**10

# What transformers itself writes into a config.json or reads from it, beside the fields.
_OTHER_KEYS = {
    "_name_or_path",
    "auto_map",
    "custom_pipelines",
    "model_type",
    "num_labels",
    "output_attentions",
    "torch_dtype",
}


@strict
class AhaConfig(PreTrainedConfig):
    r"""Configuration of an [`AhaExplainer`].

    `AhaExplainer.from_classifier` derives every fact about the classifier; nobody has to type them in.

    Args:
        base_model_name_or_path (`str`, *optional*): Hub id or folder of the explained classifier.
        base_model_revision (`str`, *optional*): its commit, 40 hexadecimal digits, or `None` for a folder.
        base_model_fingerprint (`list[float]`, *optional*): how it behaves, see `FrozenClassifier.fingerprint`.
        base_model_type (`str`, defaults to `"vit"`): its model type.
        image_size (`list[int]`, defaults to `[224, 224]`): native input height and width in pixels.
        patch_size (`list[int]`, defaults to `[16, 16]`): height and width of one patch in pixels.
        image_mean, image_std (`list[float]`): per-channel normalisation of RGB in [0, 1].
        token_size (`int`, defaults to 768): width of the tapped tokens.
        class_vector_size (`int`, defaults to 768): width of one row of the classifier's head.
        taps (`list[int]`, defaults to `[3, 6, 9, 12]`): layers whose output the decoder reads, from 1.
        encoder_name_or_path (`str`, *optional*): a separate frozen backbone that gives the tokens, as in the paper;
            `None` reads the classifier's own.
        encoder_revision (`str`, *optional*): its commit.
        grid_width, grid_depth (`int`, default to 160 and 3): channels and blocks of the decoder on the patch grid.
        quarter_width (`int`, defaults to 48): channels at a quarter of the resolution.
        half_width (`int`, defaults to 16): channels at half of the resolution.
        gradient_features (`int`, defaults to 0): points between a reference and the image at which the decoder reads
            the classifier's gradient, for each of `gradient_references`; each costs a forward and a backward pass an
            explanation. 0 is the single-pass explainer.
        gradient_references (`list[str]`, defaults to `["blur"]`): kinds of reference, see `reference_image`.
        gradient_layers (`list[int]`, defaults to none): layers of the classifier, from 1, whose tokens' attributions
            along the same points the decoder reads on the patch grid, for no further pass; they take two points at
            least.
        gradient_detail (`bool`, defaults to `False`): the gradient's score of single pixels passes beside the filter
            that smooths all others. Deletion of single pixels falls, and maps are less smooth.
        init_from (`dict`, *optional*): the explainer of another classifier that the decoder started from: its name as
            `explainer`, its classifier as `base_model`, and which parts were `copied` and which were `new`.
        includes_classifier (`bool`, defaults to `False`): the classifier's weights lie in the subfolder `classifier`.
        training (`dict`, *optional*): summary of the training run, shown in the model card.

    Raises:
        StrictDataclassFieldValidationError: a field has the wrong type.
        StrictDataclassClassValidationError: the values do not fit together.

    Example:
        >>> from hf_aha import AhaConfig
        >>> AhaConfig(taps=[2, 4]).taps
        [2, 4]
    """

    model_type = "aha"

    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_fingerprint: list[float] | None = None
    base_model_type: str = "vit"
    image_size: list[int] | tuple[int, ...] = (224, 224)
    patch_size: list[int] | tuple[int, ...] = (16, 16)
    image_mean: list[float | int] | tuple[float | int, ...] = (0.5, 0.5, 0.5)
    image_std: list[float | int] | tuple[float | int, ...] = (0.5, 0.5, 0.5)
    token_size: int = 768
    class_vector_size: int = 768
    taps: list[int] | tuple[int, ...] = (3, 6, 9, 12)
    encoder_name_or_path: str | None = None
    encoder_revision: str | None = None
    grid_width: int = 160
    grid_depth: int = 3
    quarter_width: int = 48
    half_width: int = 16
    gradient_features: int = 0
    gradient_references: list[str] | tuple[str, ...] = ("blur",)
    gradient_layers: list[int] | tuple[int, ...] = ()
    gradient_detail: bool = False
    init_from: dict[str, Any] | None = None
    includes_classifier: bool = False
    training: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        for name in (
            "image_size",
            "patch_size",
            "image_mean",
            "image_std",
            "taps",
            "gradient_references",
            "gradient_layers",
        ):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    @property
    def num_gradient_maps(self) -> int:
        """Gradient maps an image and class: two for each point of each reference, or none."""
        return 2 * self.gradient_features * len(self.gradient_references)

    @property
    def num_gradient_token_maps(self) -> int:
        """Maps of tokens' attributions an image and class: one for each layer and reference."""
        return len(self.gradient_layers) * len(self.gradient_references)

    @property
    def passes_per_explanation(self) -> int:
        """Passes of the classifier one explanation costs; a backward pass to the pixels counts like a forward."""
        return 1 + 2 * self.gradient_features * len(self.gradient_references)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """As in transformers, but keys this version does not know are left out, with a warning.

        A newer version may have written them; and some keys that transformers obeys, such as the name of another file
        of weights, have no place in the config of an explainer.
        """
        known = {item.name for item in fields(cls)} | _OTHER_KEYS
        unknown = sorted(set(config_dict) - known)
        if unknown:
            warnings.warn(
                f"The explainer's config holds {', '.join(map(repr, unknown))}, which this version of hf_aha does not "
                "know and ignores; a newer version may use it.",
                UserWarning,
                stacklevel=2,
            )
        content = {key: value for key, value in config_dict.items() if key in known}
        for key in ("dtype", "torch_dtype"):
            value = content.get(key)
            if isinstance(value, str) and not isinstance(getattr(torch, value, None), torch.dtype):
                raise ValueError(f"{key} must be the name of a dtype of torch, but it is {value!r}.")
        return super().from_dict(content, **kwargs)

    def validate_revisions(self):
        """Class validator of `@strict`: models are pinned to commits, which never change."""
        for name in ("base_model_revision", "encoder_revision"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[0-9a-f]{40}", value):
                raise ValueError(f"{name} must be a commit of 40 hexadecimal digits or None, but it is {value!r}.")

    def validate_decoder(self):
        """Class validator of `@strict`: sizes are positive and the lists have the right lengths."""
        for name in ("token_size", "class_vector_size", "grid_width", "quarter_width", "half_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}.")
            if getattr(self, name) > _LARGEST_SIZE:
                raise ValueError(f"{name} must be at most {_LARGEST_SIZE}, but it is {getattr(self, name)}.")
        if self.grid_depth < 0:
            raise ValueError(f"grid_depth must not be negative, but it is {self.grid_depth}.")
        if self.grid_depth > _LARGEST_DEPTH:
            raise ValueError(f"grid_depth must be at most {_LARGEST_DEPTH}, but it is {self.grid_depth}.")
        if not 0 <= self.gradient_features <= _MOST_GRADIENT_POINTS:
            raise ValueError(
                f"gradient_features must lie in 0..{_MOST_GRADIENT_POINTS}, but it is {self.gradient_features}."
            )
        unknown = [kind for kind in self.gradient_references if kind not in REFERENCES]
        if (
            unknown
            or not self.gradient_references
            or len(set(self.gradient_references)) < len(self.gradient_references)
        ):
            raise ValueError(
                f"gradient_references must be some of {', '.join(REFERENCES)}, each once, but it is "
                f"{self.gradient_references}."
            )
        if self.gradient_detail and not self.gradient_features:
            raise ValueError("gradient_detail is true, but gradient_features is 0: give 1 or more, or leave it out.")
        if self.gradient_layers and (min(self.gradient_layers) < 1 or self.gradient_features < 2):
            raise ValueError(
                "gradient_layers must be counted from 1 and need gradient_features of at least 2, but they are "
                f"{self.gradient_layers} with gradient_features={self.gradient_features}."
            )
        if not self.taps or min(self.taps) < 1:
            raise ValueError(f"taps must name at least one layer, counted from 1, but it is {self.taps}.")
        for name, length in (("image_size", 2), ("patch_size", 2), ("image_mean", 3), ("image_std", 3)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} must hold {length} values, but it is {getattr(self, name)}.")
        for name in ("image_size", "patch_size", "image_std"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must hold positive values, but it is {getattr(self, name)}.")


__all__ = ["AhaConfig"]
