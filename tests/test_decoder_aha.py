"""`AttributionDecoder`: shapes, independence of batch and class, precision, and how light it is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from hf_aha import AttributionDecoder


def make_decoder(token_size=12, num_taps=2, class_vector_size=10, **sizes):
    sizes = {"grid_width": 16, "grid_depth": 2, "quarter_width": 8, "half_width": 8} | sizes
    decoder = AttributionDecoder(token_size, num_taps, class_vector_size, **sizes)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return decoder.eval()


def make_inputs(batch=2, grid=(4, 4), size=(32, 32), token_size=12, num_taps=2, class_vector_size=10):
    tokens = [torch.randn(batch, *grid, token_size) for _ in range(num_taps)]
    return tokens, torch.randn(batch, 3, *size), torch.randn(batch, class_vector_size)


@pytest.mark.parametrize(
    "grid, size",
    [
        ((4, 4), (32, 32)),
        ((2, 3), (16, 24)),
        ((3, 3), (42, 42)),
        ((3, 5), (42, 70)),
        ((7, 5), (49, 35)),
        ((1, 1), (14, 14)),
        ((1, 1), (1, 1)),
        ((2, 2), (3, 5)),
        ((16, 16), (32, 32)),
        ((32, 32), (32, 32)),
    ],
)
def test_scores_have_the_size_of_the_pixels(grid, size):
    scores = make_decoder()(*make_inputs(grid=grid, size=size))
    assert scores.shape == (2, *size)
    assert scores.dtype == torch.float32
    assert bool(torch.isfinite(scores).all())


def test_every_input_matters_at_every_place():
    decoder = make_decoder()
    tokens, pixels, vectors = make_inputs()
    base = decoder(tokens, pixels, vectors)
    for changed in (
        decoder([tokens[0] + torch.randn_like(tokens[0]), tokens[1]], pixels, vectors),
        decoder([tokens[0], tokens[1] + torch.randn_like(tokens[1])], pixels, vectors),
        decoder(tokens, pixels + torch.randn_like(pixels), vectors),
        decoder(tokens, pixels, vectors + torch.randn_like(vectors)),
    ):
        assert (changed != base).float().mean() > 0.99


@pytest.mark.parametrize("size", [(32, 32), (30, 29), (42, 42)])
def test_the_last_rows_and_columns_follow_the_pixels(size):
    decoder = make_decoder(grid_depth=0)
    tokens, pixels, vectors = make_inputs(size=size, grid=(3, 3))
    other = pixels.clone()
    other[..., -1, -1] += 3
    difference = (decoder(tokens, other, vectors) - decoder(tokens, pixels, vectors)).abs()
    assert difference[:, -1, -1].min() > 0
    # Far from the pixel the image's own norms still see it, but only a little.
    assert (difference[:, -1, -1] > 5 * difference[:, 0, 0]).all()


def test_a_coarse_map_is_the_grid_resized_to_the_pixels_whatever_their_size():
    decoder = make_decoder(grid_depth=0)
    with torch.no_grad():
        decoder.pixel_score.weight.zero_()
        decoder.pixel_score.bias.zero_()
    tokens, pixels, vectors = make_inputs(grid=(3, 3), size=(42, 42))
    features = decoder.encode(tokens, pixels)
    scale, shift = decoder.class_modulation(decoder.class_norm(vectors)).chunk(2, dim=-1)
    grid = features.grid * (1 + scale[..., None, None]) + shift[..., None, None]
    expected = F.interpolate(decoder.grid_score(grid), size=(42, 42), mode="bilinear")[:, 0]
    torch.testing.assert_close(decoder.decode(features, vectors), expected)


def test_a_map_alone_is_the_map_in_a_batch():
    decoder = make_decoder()
    tokens, pixels, vectors = make_inputs(batch=5)
    together = decoder(tokens, pixels, vectors)
    for row in range(5):
        alone = decoder([t[row : row + 1] for t in tokens], pixels[row : row + 1], vectors[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)


def test_mode_changes_nothing():
    decoder = make_decoder()
    inputs = make_inputs()
    assert torch.equal(decoder.train()(*inputs), decoder.eval()(*inputs))


def test_features_are_computed_once_for_several_classes():
    decoder = make_decoder()
    tokens, pixels, _ = make_inputs(batch=3)
    vectors = torch.randn(3, 4, 10)
    calls = []
    decoder.quarter_stem.register_forward_hook(lambda *_: calls.append(1))
    features = decoder.encode(tokens, pixels)
    parts = ("grid", "quarter", "half")
    before = [getattr(features, name).clone() for name in parts]
    scores = decoder.decode(features.repeat(4), vectors.flatten(0, 1)).unflatten(0, (3, 4))
    assert len(calls) == 1
    assert features.repeat(4).half.is_contiguous(memory_format=torch.channels_last)
    for place in range(4):
        expected = decoder(tokens, pixels, vectors[:, place])
        torch.testing.assert_close(scores[:, place], expected, atol=1e-4, rtol=1e-4)
    for name, copy in zip(parts, before, strict=True):
        assert torch.equal(getattr(features, name), copy), f"decode changed {name} in place"


def test_the_wrong_number_of_layers_is_refused():
    tokens, pixels, vectors = make_inputs()
    with pytest.raises(ValueError, match="reads 2 layers, but tokens of 1 were given"):
        make_decoder()(tokens[:1], pixels, vectors)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_gives_float32_scores_with_few_ties(how):
    decoder = make_decoder(token_size=64, grid_width=64, quarter_width=32, half_width=16)
    inputs = make_inputs(batch=1, grid=(8, 8), size=(128, 128), token_size=64)
    reference = decoder(*inputs)
    if how == "weights":
        scores = decoder.bfloat16()(*inputs)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = decoder(*inputs)
    assert scores.dtype == torch.float32
    assert scores.unique().numel() > 0.95 * scores.numel()
    assert torch.corrcoef(torch.stack([scores.flatten(), reference.flatten()]))[0, 1] > 0.99


def test_gradients_reach_every_weight_and_no_input_that_is_frozen():
    decoder = make_decoder()
    tokens, pixels, vectors = make_inputs()
    decoder(tokens, pixels, vectors).square().mean().backward()
    # A constant added to every score changes no order, but it does change this loss.
    assert [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(tensor.grad is None for tensor in (*tokens, pixels, vectors))


def test_the_decoder_is_light_beside_vit_base():
    decoder = AttributionDecoder(768, 4, 768)
    with torch.device("meta"):
        classifier = ViTForImageClassification._from_config(
            ViTConfig(num_labels=1000, image_size=224, patch_size=16), attn_implementation="eager"
        )
        pixels = torch.zeros(1, 3, 224, 224)
    size = sum(p.numel() for p in classifier.parameters())
    assert size == pytest.approx(86.6e6, rel=0.01)
    assert sum(p.numel() for p in decoder.parameters()) <= 0.03 * size
    with FlopCounterMode(display=False) as of_classifier, torch.no_grad():
        classifier(pixels)
    with FlopCounterMode(display=False) as of_decoder, torch.no_grad():
        decoder([torch.zeros(1, 14, 14, 768)] * 4, torch.zeros(1, 3, 224, 224), torch.zeros(1, 768))
    assert of_classifier.get_total_flops() > 30e9, "the counter has missed the classifier"
    assert 0 < of_decoder.get_total_flops() <= 0.1 * of_classifier.get_total_flops()


def test_scores_cannot_dither():
    """Patterns with a period of two pixels, which the metrics reward, are filtered out; flat ones are kept."""
    from hf_aha.decoder_aha import _smooth

    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(10), indexing="ij")
    for pattern in (rows % 2, columns % 2, (rows + columns) % 2):
        smoothed = _smooth(pattern.float()[None, None])[0, 0, 1:-1, 1:-1]
        assert torch.allclose(smoothed, torch.full_like(smoothed, 0.5))
    assert torch.equal(_smooth(torch.full((1, 1, 3, 5), 2.0)), torch.full((1, 1, 3, 5), 2.0))


def make_gradients(batch=2, maps=4, size=(32, 32)):
    return torch.randn(batch, maps, *size)


def test_gradient_maps_matter_and_their_scale_does_not():
    decoder = make_decoder(num_gradient_maps=4)
    inputs, gradients = make_inputs(), make_gradients()
    scores = decoder(*inputs, gradients)
    assert (decoder(*inputs, make_gradients()) != scores).float().mean() > 0.99
    scales = torch.tensor([1e-6, 3.0, 0.1, 1e6])[None, :, None, None]
    torch.testing.assert_close(decoder(*inputs, gradients * scales), scores, atol=1e-3, rtol=1e-3)
    assert torch.isfinite(decoder(*inputs, torch.zeros_like(gradients))).all()


@pytest.mark.parametrize("size", [(30, 29), (42, 42), (7, 9), (1, 1)])
def test_gradient_maps_of_any_size(size):
    decoder = make_decoder(num_gradient_maps=2)
    scores = decoder(*make_inputs(size=size, grid=(2, 2)), make_gradients(maps=2, size=size))
    assert scores.shape == (2, *size) and bool(torch.isfinite(scores).all())


def test_gradient_maps_are_demanded_or_refused():
    with pytest.raises(ValueError, match="The decoder reads gradient maps: give them"):
        make_decoder(num_gradient_maps=4)(*make_inputs())
    with pytest.raises(ValueError, match="reads no gradient maps: leave gradients out"):
        make_decoder()(*make_inputs(), make_gradients())
