"""`AttributionDecoder`: tokens of a frozen transformer, pixels and a class become one score a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer


class ConvBlock(GradientCheckpointingLayer):
    """Residual block: 7 x 7 or smaller depthwise convolution, norm, two-layer perceptron over channels.

    GroupNorm with one group normalises each image by itself, so a map does not depend on its batch (BatchNorm would).
    In training its activations can be computed again instead of kept (gradient checkpointing of transformers).
    """

    def __init__(self, width: int, kernel: int, expansion: int = 2):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.expand = nn.Conv2d(width, expansion * width, 1)
        self.reduce = nn.Conv2d(expansion * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(_gelu(self.expand(self.norm(self.depthwise(x))))).add_(x)


class TokenProjection(nn.Module):
    """One tapped layer's tokens, normalised here because families differ in whether theirs already are."""

    def __init__(self, token_size: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(token_size)
        self.linear = nn.Linear(token_size, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(tokens))


class MeanOfChannels(nn.Conv2d):
    """1 x 1 convolution that starts as the mean of some of its channels, or as zero for none of them.

    Args:
        in_channels, out_channels: as in `Conv2d`.
        start: first and last + 1 of the channels averaged before any training.
    """

    def __init__(self, in_channels: int, out_channels: int = 1, start: tuple[int, int] = (0, 0)):
        super().__init__(in_channels, out_channels, 1)
        self.start = start

    def start_weight(self) -> torch.Tensor:
        """The weight of before training; the bias is zero then."""
        first, end = self.start
        weight = torch.zeros_like(self.weight)
        weight[:, first:end] = 1 / max(end - first, 1)
        return weight


@dataclass(frozen=True)
class GradientFeatures:
    """What a `GradientStem` gives the decoder.

    Attributes:
        grid: (B, grid_width, gh, gw), to be added to the tokens.
        half: (B, half_width, h, w), to be added to the pixels' features.
        coarse: (B, 1, gh, gw) float32 score of every patch.
        fine: (B, 1, H, W) float32 score of every pixel.
    """

    grid: torch.Tensor
    half: torch.Tensor
    coarse: torch.Tensor
    fine: torch.Tensor


class GradientStem(nn.Module):
    """Gradient maps at several scales, as features of the patch grid and of half the resolution, and as scores.

    A single pixel's gradient is noisy. Its mean over a neighbourhood says where the evidence lies, and the decoder
    learns how much of each to trust. Every map is divided by its own root mean square over the image.

    Args:
        num_maps: maps of pixels an image; each point of each reference gives two, see `gradient_maps`.
        num_token_maps: maps an image that are constant over a patch, after those.
        grid_width, half_width: channels of the features.
    """

    WINDOWS = (1, 5, 15)

    def __init__(self, num_maps: int, num_token_maps: int, grid_width: int, half_width: int):
        super().__init__()
        self.num_maps = num_maps
        channels = num_maps * len(self.WINDOWS)
        self.to_grid = nn.Conv2d(num_maps + num_token_maps, grid_width, 1)
        self.to_half = nn.Conv2d(4 * channels, half_width, 3, padding=1)
        # Before any training the scores are integrated gradients, of the tokens for patches and of the pixels within.
        self.to_coarse = MeanOfChannels(num_maps + num_token_maps, start=(num_maps, num_maps + num_token_maps))
        self.to_fine = MeanOfChannels(channels, start=(0, num_maps // 2))

    def forward(self, maps: torch.Tensor, grid: tuple[int, int], half: tuple[int, int]) -> GradientFeatures:
        """Maps (B, num_maps + num_token_maps, H, W) -> features on these grids, and scores."""
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps.float()
            patches = _unit(F.adaptive_avg_pool2d(maps, grid))
            pixels = maps[:, : self.num_maps]
            pixels = torch.cat([_unit(_local_mean(pixels, window)) for window in self.WINDOWS], dim=1)
            coarse, fine = (
                _mix_channels_float32(layer, x).permute(0, 3, 1, 2)
                for layer, x in ((self.to_coarse, patches), (self.to_fine, pixels))
            )
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, 2 * half[1] - width, 0, 2 * half[0] - height))
        dtype = self.to_grid.weight.dtype
        return GradientFeatures(
            self.to_grid(patches.to(dtype)), self.to_half(F.pixel_unshuffle(pixels, 2).to(dtype)), coarse, fine
        )


class GradientDetail(nn.Module):
    """How much of the gradient's score of single pixels passes beside the decoder's filter: one weight, 1 at first.

    The filter forbids patterns of neighbouring pixels, which a decoder would learn whatever the image shows. What
    differs from pixel to pixel in the gradient's score is the classifier's own, so it may pass; deletion of single
    pixels gains by it, and smoothness pays.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, fine: torch.Tensor) -> torch.Tensor:
        """Scores of pixels (B, 1, H, W) -> what the filter takes from them, weighed, float32."""
        return self.weight.float() * (fine - _smooth(fine))


@dataclass(frozen=True)
class DecoderFeatures:
    """What does not depend on the class asked about, computed once an image.

    Attributes:
        grid: (B, grid_width, gh, gw) projected tokens.
        quarter: (B, quarter_width, h, w) pixel features, with h = ceil(H/4) and w = ceil(W/4).
        half: (B, half_width, 2h, 2w) pixel features.
        size: (H, W) of the input.
    """

    grid: torch.Tensor
    quarter: torch.Tensor
    half: torch.Tensor
    size: tuple[int, int]

    def repeat(self, times: int) -> DecoderFeatures:
        """The same features `times` times an image, for as many classes: batch B becomes B * times."""
        # Indexing keeps the channels last, `repeat_interleave` does not.
        rows = torch.arange(self.grid.shape[0], device=self.grid.device).repeat_interleave(times)
        return self.rows(rows)

    def rows(self, rows: torch.Tensor | slice) -> DecoderFeatures:
        """The features of some images."""
        return DecoderFeatures(self.grid[rows], self.quarter[rows], self.half[rows], self.size)


class AttributionDecoder(nn.Module):
    """Light decoder from frozen tokens to a dense score map.

    Tokens of several layers are projected, summed and modulated by the class vector; blocks on the patch grid compare
    patches; two upsampling stages merge the result with features of the pixels themselves, so that maps follow object
    boundaries finer than a patch. Everything at full resolution is folded into channels at half resolution
    (`pixel_unshuffle`), which costs a quarter and loses no pixel.

    Args:
        token_size: width of the tokens.
        num_taps: number of tapped layers.
        class_vector_size: width of the class vectors.
        grid_width, grid_depth: channels and blocks on the patch grid.
        quarter_width: channels at a quarter of the resolution.
        half_width: channels at half of the resolution.
        num_gradient_maps: gradient maps an image; 0 for the decoder that reads the forward pass alone.
        num_gradient_token_maps: gradient maps beside these that are constant over a patch.
        gradient_detail: a `GradientDetail` beside the filter, with gradient maps only.

    Example:
        >>> decoder = AttributionDecoder(8, 1, 8, grid_width=8, grid_depth=1, quarter_width=8, half_width=8)
        >>> decoder([torch.randn(2, 3, 2, 8)], torch.randn(2, 3, 24, 16), torch.randn(2, 8)).shape
        torch.Size([2, 24, 16])

    Reference: the paper (https://arxiv.org/abs/2604.05819) decodes a separate DINOv3 encoder with a DPT head and a
    learned embedding of 1,000 classes; reading the classifier's own tokens and the rows of its head is our variant.
    """

    def __init__(
        self,
        token_size: int,
        num_taps: int,
        class_vector_size: int,
        *,
        grid_width: int = 160,
        grid_depth: int = 3,
        quarter_width: int = 48,
        half_width: int = 16,
        num_gradient_maps: int = 0,
        num_gradient_token_maps: int = 0,
        gradient_detail: bool = False,
    ):
        super().__init__()
        self.taps = nn.ModuleList(TokenProjection(token_size, grid_width) for _ in range(num_taps))
        self.class_norm = nn.LayerNorm(class_vector_size)
        self.class_modulation = nn.Linear(class_vector_size, 2 * grid_width)
        self.grid_blocks = nn.Sequential(*(ConvBlock(grid_width, 7 if i == 0 else 3) for i in range(grid_depth)))
        self.grid_score = nn.Conv2d(grid_width, 1, 1)
        self.half_stem = nn.Conv2d(3 * 4, half_width, 3, padding=1)
        self.quarter_stem = nn.Conv2d(half_width, quarter_width, 3, stride=2, padding=1)
        self.grid_to_quarter = nn.Conv2d(grid_width, quarter_width, 1)
        self.quarter_block = ConvBlock(quarter_width, 5)
        self.quarter_to_half = nn.Conv2d(quarter_width, half_width, 1)
        self.half_block = ConvBlock(half_width, 5)
        self.pixel_score = nn.Conv2d(half_width, 4, 1)
        self.gradient_stem = self.gradient_detail = None
        if num_gradient_maps:
            # Training starts from the stem's scores, which are good already.
            self.grid_score = MeanOfChannels(grid_width)
            self.pixel_score = MeanOfChannels(half_width, 4)
            self.gradient_stem = GradientStem(num_gradient_maps, num_gradient_token_maps, grid_width, half_width)
            self.gradient_detail = GradientDetail() if gradient_detail else None

    def encode(self, tokens: Sequence[torch.Tensor], pixel_values: torch.Tensor) -> DecoderFeatures:
        """Compute what serves every class.

        Args:
            tokens: one (B, gh, gw, token_size) per tapped layer.
            pixel_values: (B, 3, H, W) normalised pixels.
        """
        if len(tokens) != len(self.taps):
            raise ValueError(f"The decoder reads {len(self.taps)} layers, but tokens of {len(tokens)} were given.")
        height, width = pixel_values.shape[-2:]
        dtype = self.half_stem.weight.dtype
        if -height % 4 or -width % 4:
            pixel_values = F.pad(pixel_values, (0, -width % 4, 0, -height % 4), mode="replicate")
        grid = sum(tap(token.to(dtype)) for tap, token in zip(self.taps, tokens, strict=True)).permute(0, 3, 1, 2)
        # Channels last throughout: the tokens arrive in that order, and convolutions on CPUs are faster in it.
        pixels = pixel_values.to(dtype, memory_format=torch.channels_last)
        # The stem reads 2 x 2 pixels folded into channels; unfolding its small kernel instead of the image is cheaper.
        half = _gelu(F.conv2d(pixels, F.pixel_shuffle(self.half_stem.weight, 2), self.half_stem.bias, 2, 2))
        return DecoderFeatures(grid, self.quarter_stem(half), half, (height, width))

    def decode(
        self, features: DecoderFeatures, class_vectors: torch.Tensor, gradients: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scores (B, H, W) in float32, higher = more important, for one class an image.

        Args:
            features: of `encode`.
            class_vectors: (B, class_vector_size).
            gradients: (B, num_gradient_maps + num_gradient_token_maps, H, W) for the same classes, of
                `gradient_maps`; for a decoder with a gradient stem only.
        """
        if (gradients is None) != (self.gradient_stem is None):
            raise ValueError(
                "The decoder reads gradient maps: give them as gradients=..."
                if gradients is None
                else "The decoder reads no gradient maps: leave gradients out."
            )
        scale, shift = self.class_modulation(self.class_norm(class_vectors.to(self.class_norm.weight.dtype))).chunk(
            2, dim=-1
        )
        grid = features.grid * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        half, gradient = features.half, None
        if gradients is not None:
            gradient = self.gradient_stem(gradients, grid.shape[-2:], half.shape[-2:])
            grid, half = grid + gradient.grid, half + gradient.half
        grid = self.grid_blocks(grid)
        quarter = _resize(self.grid_to_quarter(grid), features.quarter.shape[-2:]).add_(features.quarter)
        quarter = self.quarter_block(quarter)
        half = _resize(self.quarter_to_half(quarter), half.shape[-2:]).add_(half)
        half = self.half_block(half)
        # Scores are ranked: in bfloat16 thousands of pixels would tie, so the last step is float32 under any autocast.
        with torch.autocast(half.device.type, enabled=False):
            pixel = _mix_channels_float32(self.pixel_score, half)
            coarse = _mix_channels_float32(self.grid_score, grid).permute(0, 3, 1, 2)
            height, width = features.size
            # Four channels become 2 x 2 pixels.
            pixel = pixel.unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)
            pixel = pixel[:, None, :height, :width]
            if gradient is not None:
                pixel, coarse = pixel + gradient.fine, coarse + gradient.coarse
            pixel = _smooth(pixel)
            if self.gradient_detail is not None:
                pixel = pixel + self.gradient_detail(gradient.fine)
            return _resize(coarse, features.size).add_(pixel)[:, 0]

    def forward(
        self,
        tokens: Sequence[torch.Tensor],
        pixel_values: torch.Tensor,
        class_vectors: torch.Tensor,
        gradients: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`decode(encode(tokens, pixel_values), class_vectors, gradients)`: scores (B, H, W), float32."""
        return self.decode(self.encode(tokens, pixel_values), class_vectors, gradients)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    # On CPUs GELU takes twice the time on channels-last maps; seen with the channels last, they are plain contiguous.
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _smooth(scores: torch.Tensor) -> torch.Tensor:
    """Binomial filter [1 2 1]/4 along both sides of (B, 1, H, W), borders replicated.

    It is zero at the period of two pixels. Without it the decoder learns to dither: revealing every other pixel keeps
    an object recognisable, which the metrics reward although it explains nothing.
    """
    x = F.pad(scores, (1, 1, 1, 1), mode="replicate")
    # Summing neighbours twice makes the kernel [1 2 1].
    for _ in range(2):
        x = x[..., 1:, :] + x[..., :-1, :]
        x = x[..., 1:] + x[..., :-1]
    return x / 16


def _local_mean(x: torch.Tensor, window: int) -> torch.Tensor:
    window = min(window, *(side - 1 + side % 2 for side in x.shape[-2:]))
    return F.avg_pool2d(x, window, stride=1, padding=window // 2, count_include_pad=False) if window > 1 else x


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Each map of (B, C, H, W) divided by its root mean square; zero maps stay zero."""
    size = x.square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return x / size.clamp_min(torch.finfo(x.dtype).tiny)


def _mix_channels_float32(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution of (B, C, H, W) to (B, H, W, C') in float32, as the product of matrices it is."""
    return F.linear(x.permute(0, 2, 3, 1).float(), layer.weight.flatten(1).float(), layer.bias.float())


__all__ = ["AttributionDecoder", "DecoderFeatures"]
