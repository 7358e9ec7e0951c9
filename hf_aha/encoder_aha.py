"""`FrozenEncoder`: a separate frozen vision transformer that gives the decoder its tokens, as in the paper."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .classifier_aha import UnsupportedClassifierError, blocks_name, run_recorded, vision_config


class FrozenEncoder(nn.Module):
    """Patch tokens of a vision backbone that is not the classifier.

    With a separate encoder the map depends on the image and the class only: randomising the classifier's weights
    cannot change it. `encoder=None` (the classifier's own tokens) is therefore the default of [`AhaExplainer`].

    Args:
        model: a vision transformer of transformers without a head (ViT, DeiT, BEiT, DINOv2, DINOv3, ...).
        image_mean, image_std: per-channel normalisation its images had in training.
        image_processor: where they come from; needed only to save the encoder.

    Raises:
        UnsupportedClassifierError: the model is no plain vision transformer.

    Reference: AHA (https://arxiv.org/abs/2604.05819) reads layers of a frozen DINOv3 ViT-L/16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        image_processor: BaseImageProcessor | None = None,
    ):
        super().__init__()
        model = getattr(model, "vision_model", model)
        config = vision_config(model)
        if not hasattr(config, "patch_size") or not hasattr(config, "num_hidden_layers"):
            raise UnsupportedClassifierError(
                f"{type(model).__name__} cannot serve as encoder: it is no plain vision transformer "
                "(its config has no patch_size or num_hidden_layers)."
            )
        self._blocks_name = blocks_name(model, model)
        self.model = model.requires_grad_(False).eval()
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.image_processor = image_processor

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str = "main",
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        dtype: torch.dtype | str = "auto",
        device_map: str | dict | None = None,
        attn_implementation: str | None = None,
    ) -> FrozenEncoder:
        """Load a backbone and its normalisation by Hub id or folder; arguments as in transformers."""
        hub = {
            "revision": revision,
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
        model = AutoModel.from_pretrained(name, dtype=dtype, device_map=device_map, **hub, **attention)
        processor = AutoImageProcessor.from_pretrained(name, **hub)
        return cls(model, *mean_and_std(processor), image_processor=processor)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Save the backbone and its image processor, for `from_pretrained`.

        Raises:
            ValueError: the encoder was built in memory without its image processor.
        """
        if self.image_processor is None:
            raise ValueError(
                "The encoder cannot be saved without its image processor: give image_processor=... to it."
            )
        self.model.save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Set the mode of this module; the wrapped model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return vision_config(self.model).hidden_size

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return vision_config(self.model).num_hidden_layers

    def forward(
        self,
        pixel_values: torch.Tensor,
        layers: Sequence[int],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> tuple[torch.Tensor, ...]:
        """Patch tokens after the asked blocks.

        Args:
            pixel_values: (B, 3, H, W) as the classifier's image processor makes them; resized to the next multiple of
                the encoder's patch where its patch differs from the classifier's.
            layers: blocks to read, from 1.
            image_mean, image_std: normalisation of `pixel_values`, undone and replaced by the encoder's own.

        Returns:
            one (B, gh, gw, hidden_size) per layer; `gh`, `gw` are the encoder's own grid.

        Raises:
            UnsupportedClassifierError: the blocks do not give one token a patch (hierarchical models).
        """
        config = vision_config(self.model)
        patch = config.patch_size
        patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=pixel_values.dtype, device=pixel_values.device)[:, None, None]
            for values in (image_mean, image_std, self.image_mean, self.image_std)
        )
        pixels = (pixel_values * std + mean - own_mean) / own_std
        height, width = (-(-s // p) * p for s, p in zip(pixels.shape[-2:], (patch_height, patch_width), strict=True))
        if (height, width) != tuple(pixels.shape[-2:]):
            pixels = nn.functional.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
        if not torch.is_autocast_enabled(pixels.device.type):
            pixels = pixels.to(self.model.dtype)
        # Backbones that interpolate by themselves have no such argument; the others need it off their native size.
        native = config.image_size
        native = (native, native) if isinstance(native, int) else tuple(native)
        accepts = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        flag = {"interpolate_pos_encoding": True} if accepts and native != (height, width) else {}
        _, states = run_recorded(self.model, self._blocks_name, layers, pixels, **flag)
        rows, columns = height // patch_height, width // patch_width
        for state in states.values():
            # Before the patches at most a class token, a distillation token and the registers.
            if not 0 <= state.shape[1] - rows * columns <= 2 + getattr(config, "num_register_tokens", 0):
                raise UnsupportedClassifierError(
                    f"{type(self.model).__name__} cannot serve as encoder: it gave {state.shape[1]} tokens for a "
                    f"{rows} x {columns} grid of patches; use a plain vision transformer."
                )
        return tuple(states[layer][:, -rows * columns :].unflatten(1, (rows, columns)) for layer in layers)


def mean_and_std(processor: BaseImageProcessor) -> tuple[list[float], list[float]]:
    """Per-channel mean and standard deviation that an image processor normalises RGB in [0, 1] with."""
    if not getattr(processor, "do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return [float(value) for value in processor.image_mean], [float(value) for value in processor.image_std]


__all__ = ["FrozenEncoder", "mean_and_std"]
