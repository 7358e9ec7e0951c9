"""`AhaConfig`: everything needed to rebuild an explainer and to find the classifier it explains."""
# ruff: noqa: I002
# `from __future__ import annotations` would turn the types below into strings, and `@strict` checks no string types.

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


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
    includes_classifier: bool = False
    training: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        for name in ("image_size", "patch_size", "image_mean", "image_std", "taps"):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)

    def validate_decoder(self):
        """Class validator of `@strict`: sizes are positive and the lists have the right lengths."""
        for name in ("token_size", "class_vector_size", "grid_width", "quarter_width", "half_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}.")
        if self.grid_depth < 0:
            raise ValueError(f"grid_depth must not be negative, but it is {self.grid_depth}.")
        if not self.taps or min(self.taps) < 1:
            raise ValueError(f"taps must name at least one layer, counted from 1, but it is {self.taps}.")
        for name, length in (("image_size", 2), ("patch_size", 2), ("image_mean", 3), ("image_std", 3)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} must hold {length} values, but it is {getattr(self, name)}.")
        for name in ("image_size", "patch_size", "image_std"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must hold positive values, but it is {getattr(self, name)}.")


__all__ = ["AhaConfig"]
