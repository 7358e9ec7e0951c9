"""Class activation maps computed by pytorch-grad-cam (https://github.com/jacobgil/pytorch-grad-cam)."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..classifier_aha import FrozenClassifier, UnsupportedClassifierError, blocks_name
from .base import ClassifierOutput, Method, Passes, import_library
from .copies import private_copy


@dataclass(frozen=True, kw_only=True)
class _CamMethod(Method):
    """A method of pytorch-grad-cam on the patch tokens of the last block, after its first normalisation.

    That layer is the one the library's examples take for vision transformers: the tokens after the last block carry no
    gradient where the head reads the class token alone. The grid and the number of prefix tokens come from the
    classifier. The library clips scores at zero, scales each map to [0, 1] and enlarges it bilinearly.
    """

    library: ClassVar[str | None] = "grad-cam"
    signed: ClassVar[bool] = False
    algorithm: ClassVar[str]
    with_gradient: ClassVar[bool] = True

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(1, 1 if self.with_gradient else 0)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        library = import_library("pytorch_grad_cam", "grad-cam", self.name)
        targets = import_library("pytorch_grad_cam.utils.model_targets", "grad-cam", self.name)
        grid, prefix = classifier.grid(*pixel_values.shape[-2:]), classifier.num_prefix_tokens

        def channels_first(tokens: torch.Tensor) -> torch.Tensor:
            """(B, T, D) -> (B, D, gh, gw), float32 because numpy, to which the library goes next, has no bfloat16."""
            return tokens[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2).float()

        # The library hooks what it is given, switches its mode and clears its gradients: it is given a copy.
        copied = private_copy(classifier)
        cam = getattr(library, self.algorithm)(
            model=ClassifierOutput(copied), target_layers=[_last_norm(copied)], reshape_transform=channels_first
        )
        cam.batch_size = self.max_batch
        wanted = [targets.ClassifierOutputTarget(label) for label in target.tolist()]
        # Used without its `with`, which would print and swallow an IndexError; Score-CAM shows a bar for every image.
        with torch.set_grad_enabled(self.with_gradient), contextlib.redirect_stderr(io.StringIO()):
            scores = cam(input_tensor=pixel_values.requires_grad_(self.with_gradient), targets=wanted)
        return torch.from_numpy(scores).to(pixel_values.device)


@dataclass(frozen=True, kw_only=True)
class GradCam(_CamMethod):
    """Token channels weighted by the mean gradient of the class logit over the patches."""

    title: ClassVar[str] = "Grad-CAM"
    source: ClassVar[str] = "https://arxiv.org/abs/1610.02391"
    algorithm: ClassVar[str] = "GradCAM"
    name = "grad-cam"


@dataclass(frozen=True, kw_only=True)
class GradCamPlusPlus(_CamMethod):
    """Grad-CAM whose mean gradient is weighted by higher powers of the positive gradients."""

    title: ClassVar[str] = "Grad-CAM++"
    source: ClassVar[str] = "https://arxiv.org/abs/1710.11063"
    algorithm: ClassVar[str] = "GradCAMPlusPlus"
    name = "grad-cam++"


@dataclass(frozen=True, kw_only=True)
class LayerCam(_CamMethod):
    """Token channels weighted patch by patch by the positive gradient of the class logit."""

    title: ClassVar[str] = "LayerCAM"
    source: ClassVar[str] = "https://doi.org/10.1109/TIP.2021.3089943"
    algorithm: ClassVar[str] = "LayerCAM"
    name = "layer-cam"


@dataclass(frozen=True, kw_only=True)
class ScoreCam(_CamMethod):
    """Token channels weighted by the softmax of the class logits of the image shown through each channel.

    One forward pass for each of the D channels: the slowest of these methods.
    """

    title: ClassVar[str] = "Score-CAM"
    source: ClassVar[str] = "https://arxiv.org/abs/1910.01279"
    algorithm: ClassVar[str] = "ScoreCAM"
    with_gradient: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = True
    name = "score-cam"

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(1 + width, 0)


@dataclass(frozen=True, kw_only=True)
class EigenCam(_CamMethod):
    """The first principal component of the tokens, without gradients, the same for every class.

    The sign of a principal component is arbitrary, so that a map may show the object's complement.
    """

    title: ClassVar[str] = "Eigen-CAM"
    source: ClassVar[str] = "https://arxiv.org/abs/2008.00299"
    class_specific: ClassVar[bool] = False
    algorithm: ClassVar[str] = "EigenCAM"
    with_gradient: ClassVar[bool] = False
    name = "eigen-cam"


def _last_norm(classifier: FrozenClassifier) -> nn.Module:
    """The normalisation before the attention of the last block."""
    model = classifier.model
    block = model.get_submodule(blocks_name(model, model))[-1]
    for module in block.children():
        if isinstance(module, nn.LayerNorm):
            return module
    raise UnsupportedClassifierError(
        f"The last block of {type(model).__name__} (model type {classifier.model_type!r}) has no LayerNorm of its "
        "own, so there is no layer for a class activation map: choose another method."
    )
