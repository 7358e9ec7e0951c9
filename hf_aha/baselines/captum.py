"""Gradient and perturbation methods computed by captum (https://captum.ai)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..classifier_aha import FrozenClassifier
from .base import (
    BASELINE_IMAGES,
    OUTPUTS,
    ClassifierOutput,
    Method,
    Passes,
    baseline_image,
    check_choice,
    check_positive,
    check_share,
    import_library,
    patch_numbers,
    seeded,
)


@dataclass(frozen=True, kw_only=True)
class _CaptumMethod(Method):
    """A method of captum.

    Args:
        output: what is explained: `"probability"`, which the protocols measure, or `"logit"`.
    """

    library: ClassVar[str | None] = "captum"

    output: str = "probability"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("output", self.output, OUTPUTS)

    def _attributor(self, algorithm: str, classifier: FrozenClassifier) -> Any:
        """The algorithm of captum for this classifier."""
        attr = import_library("captum.attr", "captum", self.name)
        return getattr(attr, algorithm)(self._function(classifier))

    def _function(self, classifier: FrozenClassifier) -> Callable[[torch.Tensor], torch.Tensor]:
        return ClassifierOutput(classifier, self.output)


@dataclass(frozen=True, kw_only=True)
class Saliency(_CaptumMethod):
    """|d output / d pixel|, the largest of the three channels."""

    title: ClassVar[str] = "Saliency"
    source: ClassVar[str] = "https://arxiv.org/abs/1312.6034"
    signed: ClassVar[bool] = False
    name = "saliency"

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(1, 1)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        saliency = self._attributor("Saliency", classifier)
        with torch.enable_grad():
            return saliency.attribute(pixel_values.requires_grad_(), target=target, abs=True).amax(1)


@dataclass(frozen=True, kw_only=True)
class InputXGradient(_CaptumMethod):
    """Pixel value times gradient, summed over the channels; the value is the normalised one, zero the mean colour."""

    title: ClassVar[str] = "Input x gradient"
    source: ClassVar[str] = "https://arxiv.org/abs/1605.01713"
    name = "input-x-gradient"

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(1, 1)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        attributor = self._attributor("InputXGradient", classifier)
        with torch.enable_grad():
            return attributor.attribute(pixel_values.requires_grad_(), target=target).detach().sum(1)


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(_CaptumMethod):
    """(pixel - baseline) times the mean gradient on the straight path between them, summed over the channels.

    The scores of an image sum to output(image) - output(baseline), up to the error of the quadrature.

    Args:
        baseline: `"zero"` or `"blur"`, see `baseline_image`.
        steps: points of the Gauss-Legendre quadrature.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/1703.01365"
    one_by_one: ClassVar[bool] = True

    baseline: str = "zero"
    steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("baseline", self.baseline, BASELINE_IMAGES)
        check_positive("steps", self.steps)

    @property
    def name(self) -> str:
        return f"integrated-gradients-{self.baseline}"

    @property
    def title(self) -> str:
        return f"Integrated gradients, {'blurred' if self.baseline == 'blur' else 'zero'} baseline"

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(self.steps, self.steps)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        attribution = self._attributor("IntegratedGradients", classifier).attribute(
            pixel_values,
            baselines=baseline_image(pixel_values, self.baseline),
            target=target,
            n_steps=self.steps,
            internal_batch_size=self.max_batch,
        )
        return attribution.sum(1)


@dataclass(frozen=True, kw_only=True)
class SmoothGrad(_CaptumMethod):
    """The gradient averaged over noisy copies of the image, then as in `Saliency`.

    Args:
        samples: noisy copies.
        noise: standard deviation of the Gaussian noise as a share of the image's range of values; the paper
            recommends 0.1 to 0.2.
        seed: of the noise; every image gets the same.
    """

    title: ClassVar[str] = "SmoothGrad"
    source: ClassVar[str] = "https://arxiv.org/abs/1706.03825"
    signed: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = True
    name = "smoothgrad"

    samples: int = 50
    noise: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("samples", self.samples)
        check_share("noise", self.noise)

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(self.samples, self.samples)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        attr = import_library("captum.attr", "captum", self.name)
        tunnel = attr.NoiseTunnel(attr.Saliency(self._function(classifier)))
        with seeded(self.seed, pixel_values.device):
            gradient = tunnel.attribute(
                pixel_values,
                nt_type="smoothgrad",
                nt_samples=self.samples,
                nt_samples_batch_size=min(self.samples, self.max_batch),
                stdevs=self.noise * float(pixel_values.max() - pixel_values.min()),
                target=target,
                abs=False,
            )
        return gradient.detach().abs().amax(1)


@dataclass(frozen=True, kw_only=True)
class GradientSHAP(_CaptumMethod):
    """(pixel - baseline) times the gradient at a random point between them, averaged over random baselines.

    A baseline is the zero or the blurred image, each with the same probability; no noise is added to the image. captum
    has no limit on the batch here (captum#538), so the samples are drawn in blocks of `max_batch`.

    Args:
        samples: random points.
        seed: of the points and the choice; every image gets the same.
    """

    title: ClassVar[str] = "GradientSHAP"
    source: ClassVar[str] = "https://arxiv.org/abs/1705.07874"
    one_by_one: ClassVar[bool] = True
    name = "gradient-shap"

    samples: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("samples", self.samples)

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(self.samples, self.samples)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        shap = self._attributor("GradientShap", classifier)
        baselines = torch.cat([baseline_image(pixel_values, kind) for kind in BASELINE_IMAGES])
        total = torch.zeros_like(pixel_values[:, 0])
        with seeded(self.seed, pixel_values.device):
            for start in range(0, self.samples, self.max_batch):
                count = min(self.max_batch, self.samples - start)
                attribution = shap.attribute(pixel_values, baselines, n_samples=count, stdevs=0.0, target=target)
                total += count * attribution.detach().sum(1)
        return total / self.samples


@dataclass(frozen=True, kw_only=True)
class Occlusion(_CaptumMethod):
    """Drop of the output when a window of patches is covered, averaged over the windows that cover the pixel.

    Args:
        window: side of the window, in patches of the classifier; it moves by one patch.
        baseline: what covers, see `baseline_image`.
    """

    title: ClassVar[str] = "Occlusion"
    source: ClassVar[str] = "https://arxiv.org/abs/1311.2901"
    one_by_one: ClassVar[bool] = True
    name = "occlusion"

    window: int = 1
    baseline: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("window", self.window)
        check_choice("baseline", self.baseline, BASELINE_IMAGES)

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(1 + max(1, grid[0] - self.window + 1) * max(1, grid[1] - self.window + 1), 0)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        grid = classifier.grid(*pixel_values.shape[-2:])
        patch = classifier.patch_size
        window = tuple(min(self.window, cells) * side for cells, side in zip(grid, patch, strict=True))
        attribution = self._attributor("Occlusion", classifier).attribute(
            pixel_values,
            sliding_window_shapes=(3, *window),
            strides=(3, *patch),
            baselines=baseline_image(pixel_values, self.baseline),
            target=target,
            perturbations_per_eval=self.max_batch,
        )
        # A window covers all channels, so each holds the same number.
        return attribution[:, 0]


@dataclass(frozen=True, kw_only=True)
class KernelSHAP(_CaptumMethod):
    """Shapley values of the patches, estimated by a weighted regression on random sets of patches.

    captum fits it with scikit-learn. With fewer samples than patches the regression has no unique answer and the order
    is mostly chance.

    Args:
        samples: sets of patches, the full and the empty one among them.
        baseline: what an absent patch shows, see `baseline_image`.
        seed: of the sets; every image gets the same.
    """

    title: ClassVar[str] = "KernelSHAP on patches"
    source: ClassVar[str] = "https://arxiv.org/abs/1705.07874"
    one_by_one: ClassVar[bool] = True
    name = "kernel-shap"

    samples: int = 1000
    baseline: str = "zero"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("samples", self.samples)
        check_choice("baseline", self.baseline, BASELINE_IMAGES)

    def passes(self, grid: tuple[int, int] = (14, 14), width: int = 768) -> Passes:
        return Passes(self.samples, 0)

    def _scores(self, classifier: FrozenClassifier, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        import_library("sklearn", "scikit-learn", self.name)
        size = tuple(pixel_values.shape[-2:])
        numbers = patch_numbers(classifier.grid(*size), size).to(pixel_values.device)
        with seeded(self.seed, pixel_values.device):
            attribution = self._attributor("KernelShap", classifier).attribute(
                pixel_values,
                baselines=baseline_image(pixel_values, self.baseline),
                target=target,
                feature_mask=numbers[None, None],
                n_samples=self.samples,
                perturbations_per_eval=self.max_batch,
            )
        return attribution[:, 0]
