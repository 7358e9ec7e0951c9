from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    BeitImageProcessorPil,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    MobileNetV2ImageProcessorPil,
    PerceiverImageProcessorPil,
    SegformerImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from hf_aha.geometry import InputGeometry


def squash(height: int, width: int):
    return {"height": height, "width": width}


# Name, processor, sizes of photographs. Between them: squash, crop, squash then crop, no resize, limited longest edge,
# crops larger than the resized photograph along one axis and along both, and oblong inputs.
PROCESSORS = {
    "vit": ViTImageProcessorPil(size=squash(32, 32)),
    "vit, oblong": ViTImageProcessorPil(size=squash(24, 40)),
    "deit": DeiTImageProcessorPil(size=squash(37, 37), crop_size=squash(32, 32)),
    "beit": BeitImageProcessorPil(size=squash(40, 40), crop_size=squash(33, 32), do_center_crop=True),
    "bit": BitImageProcessorPil(size={"shortest_edge": 37}, crop_size=squash(32, 32)),
    "bit, oblong crop": BitImageProcessorPil(size={"shortest_edge": 36}, crop_size=squash(28, 44)),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=squash(32, 32)),
    "clip, crop larger than resized": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=squash(33, 33)),
    "longest edge": CLIPImageProcessorPil(
        size={"shortest_edge": 30, "longest_edge": 41}, crop_size=squash(32, 32), do_center_crop=True
    ),
    "longest edge without crop": CLIPImageProcessorPil(
        size={"shortest_edge": 30, "longest_edge": 41}, do_center_crop=False
    ),
    "siglip": SiglipImageProcessorPil(size=squash(32, 32)),
    "siglip, shortest edge without crop": SiglipImageProcessorPil(size={"shortest_edge": 31}),
    "mobilenet": MobileNetV2ImageProcessorPil(size={"shortest_edge": 40}, crop_size=squash(35, 35)),
    "no resize": ViTImageProcessorPil(do_resize=False),
    "crop only": DeiTImageProcessorPil(do_resize=False, crop_size=squash(31, 28)),
    "nothing": CLIPImageProcessorPil(do_resize=False, do_center_crop=False),
}
SIZES = [(60, 90), (91, 61), (37, 37), (40, 200), (173, 52), (32, 32), (19, 30), (7, 5)]


def pixels_after(processor, image: np.ndarray) -> np.ndarray:
    """What the real processor makes of an image (H, W, 3) uint8, as (h, w, 3) levels 0..255."""
    made = processor(Image.fromarray(image), do_rescale=False, do_normalize=False, return_tensors="np")
    return made["pixel_values"][0].transpose(1, 2, 0).astype(np.float64)


def ramp(length: int) -> tuple[np.ndarray, float]:
    """Levels (length, 3) from which a coordinate can be read, also after filtering, and the period of the last two.

    The first channel rises from 0 to 255, the others are the cosine and sine of a wave: a symmetric filter weakens a
    wave and leaves its phase, so that the phase gives the coordinate to a few hundredths of a pixel.
    """
    period = max(length / 4, 8.0)
    place = np.arange(length)
    angle = 2 * np.pi * place / period
    coarse = 255 * place / max(length - 1, 1)
    levels = np.stack([coarse, 127.5 + 127.5 * np.cos(angle), 127.5 + 127.5 * np.sin(angle)], axis=-1)
    return levels.round().astype(np.uint8), period


def coordinates(levels: np.ndarray, length: int, period: float) -> np.ndarray:
    coarse = levels[..., 0] / 255 * (length - 1)
    fine = np.arctan2(levels[..., 2] - 127.5, levels[..., 1] - 127.5) / (2 * np.pi) * period
    return fine + period * np.round((coarse - fine) / period)


def recovered_coordinates(processor, size: tuple[int, int], axis: int) -> np.ndarray:
    levels, period = ramp(size[axis])
    image = np.broadcast_to(levels[:, None] if axis == 0 else levels, (*size, 3))
    return coordinates(pixels_after(processor, np.ascontiguousarray(image)), size[axis], period)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_sizes_and_padding_are_those_of_the_processor(name, size):
    processor = PROCESSORS[name]
    geometry = InputGeometry.from_processor(processor, size)
    white = pixels_after(processor, np.full((*size, 3), 255, np.uint8))
    assert geometry.input_size == white.shape[:2]
    left, top, right, bottom = geometry.content_box
    expected = np.zeros(white.shape)
    expected[top:bottom, left:right] = 255
    assert np.array_equal(white, expected)


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_coordinates_come_back_to_their_place(name, size, axis):
    geometry = InputGeometry.from_processor(PROCESSORS[name], size)
    recovered = recovered_coordinates(PROCESSORS[name], size, axis)
    back = geometry.to_original(torch.from_numpy(recovered)).numpy()
    assert back.shape == size
    assert np.array_equal(np.isnan(back), ~geometry.covered.numpy())

    start, stop = (geometry.crop_box[i] for i in ((1, 3) if axis == 0 else (0, 2)))
    step = size[axis] / geometry.resized_size[axis]  # original pixels in one input pixel
    truth = np.broadcast_to(np.arange(size[axis])[:, None] if axis == 0 else np.arange(size[axis]), size)
    # At the border of the photograph or crop the filters see half of what they need: one pixel of either kind.
    low, high = max(start, 0) * step, min(stop, geometry.resized_size[axis]) * step
    away = geometry.covered.numpy() & (truth + 0.5 - low > max(2 * step, 2)) & (high - truth - 0.5 > max(2 * step, 2))
    if size != (7, 5):
        assert away.any()
    if not away.any():
        return
    error = (back - truth)[away]
    assert np.abs(error).max() < 0.25 * max(step, 1)
    assert abs(error.mean()) < 0.06 * max(step, 1)


def test_the_coordinate_test_can_fail():
    """A crop that is one input pixel off moves the recovered coordinates by more than the tolerance."""
    processor, size = PROCESSORS["bit"], (60, 90)
    geometry = InputGeometry.from_processor(processor, size)
    left, top, right, bottom = geometry.crop_box
    wrong = InputGeometry(size, geometry.resized_size, (left + 1, top, right + 1, bottom))
    recovered = torch.from_numpy(recovered_coordinates(processor, size, axis=1))
    middle = (30, 45)
    assert abs(geometry.to_original(recovered)[middle] - 45) < 0.1
    assert abs(wrong.to_original(recovered)[middle] - 45) > 1


@pytest.mark.parametrize("length", range(1, 12))
@pytest.mark.parametrize("crop", range(1, 12))
def test_centre_crop_of_every_parity(length, crop):
    processor = DeiTImageProcessorPil(do_resize=False, crop_size=squash(crop, 5))
    image = np.zeros((length, 5, 3), np.uint8)
    image += np.arange(1, length + 1, dtype=np.uint8)[:, None, None]
    rows = pixels_after(processor, image)[:, 0, 0]
    _, top, _, bottom = InputGeometry.from_processor(processor, (length, 5)).crop_box
    assert rows.tolist() == [row + 1 if 0 <= row < length else 0 for row in range(top, bottom)]


@pytest.mark.parametrize("longest", [None, 25, 40])
@pytest.mark.parametrize("size", [(10, 11), (1, 9), (33, 32), (20, 57), (57, 20), (299, 101), (3, 200)])
def test_shortest_edge_arithmetic(size, longest):
    edges = {"shortest_edge": 21} | ({} if longest is None else {"longest_edge": longest})
    processor = CLIPImageProcessorPil(size=edges, do_center_crop=False)
    if longest is not None and round(longest * min(size) / max(size)) == 0:
        with pytest.raises(ValueError, match="less extreme shape"):
            InputGeometry.from_processor(processor, size)
        return
    assert (
        InputGeometry.from_processor(processor, size).input_size
        == pixels_after(processor, np.zeros((*size, 3), np.uint8)).shape[:2]
    )


class TorchvisionBackend:
    """The settings and method names that matter, where torchvision itself is not installed."""

    do_resize = False
    do_center_crop = True

    def __init__(self, crop_size):
        self.crop_size = crop_size

    def resize(self): ...

    def center_crop(self): ...

    def _preprocess(self): ...


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("crop", range(1, 9))
def test_torchvision_backend_pads_the_odd_pixel_behind(length, crop):
    row = torch.arange(1, length + 1)
    if crop > length:
        expected = F.pad(row, ((crop - length) // 2, (crop - length + 1) // 2))
    else:
        expected = row[int((length - crop) / 2.0) :][:crop]
    left, _, right, _ = InputGeometry.from_processor(TorchvisionBackend(squash(1, crop)), (1, length)).crop_box
    assert expected.tolist() == [x + 1 if 0 <= x < length else 0 for x in range(left, right)]


def test_torchvision_backend_when_installed():
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=squash(33, 27), do_normalize=False)
    for size in [(60, 90), (91, 61), (20, 20), (19, 30)]:
        white = processor(Image.new("RGB", size[::-1], "white"), return_tensors="pt")["pixel_values"][0, 0]
        left, top, right, bottom = InputGeometry.from_processor(processor, size).content_box
        expected = torch.zeros_like(white)
        expected[top:bottom, left:right] = 1
        assert torch.equal(white, expected)


# Resampling


def whole(original: tuple[int, int], resized: tuple[int, int]) -> InputGeometry:
    return InputGeometry(original, resized, (0, 0, resized[1], resized[0]))


@pytest.mark.parametrize("original", [(40, 70), (33, 32), (100, 31), (16, 17)])
def test_enlarging_is_bilinear(original):
    scores = torch.randn(2, 3, 16, 17, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores, size=original, mode="bilinear", align_corners=False)
    torch.testing.assert_close(whole(original, (16, 17)).to_original(scores), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("original", [(5, 9), (15, 16), (1, 1), (40, 3), (2, 70)])
def test_shrinking_is_antialiased(original):
    scores = torch.randn(1, 1, 16, 17, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores, size=original, mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(whole(original, (16, 17)).to_original(scores), expected, rtol=0, atol=1e-5)


def test_a_crop_only_changes_pixels_near_its_border():
    scores = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    full = whole((80, 100), (20, 20)).to_original(scores)
    part = InputGeometry((80, 100), (20, 20), (4, 3, 15, 18)).to_original(scores[3:18, 4:15])
    assert part[12:72, 20:75].isfinite().all()
    assert torch.equal(part.isfinite(), F.pad(torch.ones(60, 55, dtype=torch.bool), (20, 25, 12, 8)))
    torch.testing.assert_close(part[14:70, 23:72], full[14:70, 23:72], rtol=0, atol=1e-6)


def test_scores_of_padding_are_left_out():
    geometry = InputGeometry((10, 10), (10, 10), (-3, -2, 12, 13))
    scores = torch.full((15, 15), 1e9)
    scores[2:12, 3:13] = 1.5
    assert geometry.content_box == (3, 2, 13, 12)
    assert torch.equal(geometry.to_original(scores), torch.full((10, 10), 1.5))


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3e8])
@pytest.mark.parametrize("original", [(333, 177), (7, 5), (50, 3)])
def test_constant_scores_stay_ties(value, original):
    geometry = InputGeometry.from_processor(PROCESSORS["bit"], original)
    back = geometry.to_original(torch.full((32, 32), value))
    assert back[geometry.covered].unique().tolist() == [torch.tensor(value).item()]


def test_identity():
    scores = torch.randn(3, 9, 8)
    assert torch.equal(whole((9, 8), (9, 8)).to_original(scores), scores)
    mask = torch.rand(9, 8) > 0.5
    assert torch.equal(whole((9, 8), (9, 8)).to_input(mask), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_dtype_and_leading_dimensions(dtype):
    scores = torch.arange(2 * 4 * 32 * 32).reshape(2, 4, 32, 32).remainder(7).to(dtype)
    back = InputGeometry.from_processor(PROCESSORS["bit"], (20, 61)).to_original(scores)
    assert back.dtype == torch.float32
    assert back.shape == (2, 4, 20, 61)


# Coverage


def test_covered_box_of_a_crop():
    geometry = InputGeometry((100, 300), (8, 24), (8, 0, 16, 8))
    assert geometry.covered_box == (100.0, 0.0, 200.0, 100.0)
    assert geometry.covered[:, 100:200].all()
    assert geometry.covered.sum() == 100 * 100


def test_covered_box_is_cut_to_the_photograph():
    geometry = InputGeometry.from_processor(PROCESSORS["clip, crop larger than resized"], (40, 50))
    assert geometry.covered_box == (0.0, 0.0, 50.0, 40.0)
    assert geometry.covered.all()


def test_pixels_belong_to_the_crop_by_their_centre():
    # 10 pixels become 4 of 2.5 each; the crop 2.5..7.5 holds the centres 2.5 (on its edge) to 6.5, not 7.5.
    geometry = InputGeometry((1, 10), (1, 4), (1, 0, 3, 1))
    assert geometry.covered_box == (2.5, 0.0, 7.5, 1.0)
    assert geometry.covered[0].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


def test_crop_between_two_pixel_centres():
    geometry = InputGeometry((1, 2), (1, 256), (127, 0, 129, 1))
    assert not geometry.covered.any()
    assert geometry.to_original(torch.ones(1, 2)).isnan().all()


# Masks


def test_mask_shares_are_exact():
    # Columns 1 and 2 of 5; input pixels are 2.5 wide: 1.5 of the first and 0.5 of the second.
    mask = torch.tensor([[0.0, 1, 1, 0, 0]])
    torch.testing.assert_close(whole((1, 5), (1, 2)).to_input(mask), torch.tensor([[0.6, 0.2]]))
    assert whole((1, 5), (1, 2)).to_input(mask.bool()).tolist() == [[True, False]]


def test_enlarged_masks_keep_sharp_edges():
    mask = torch.rand(4, 5) > 0.5
    expected = mask.repeat_interleave(3, 0).repeat_interleave(2, 1)
    assert torch.equal(whole((4, 5), (12, 10)).to_input(mask), expected)
    assert torch.equal(whole((4, 5), (12, 10)).to_input(mask.float()), expected.float())


def white_box(size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[size[0] // 4 : size[0] // 2 + 3, size[1] // 3 : size[1] // 2 + 2] = 255
    return mask


def centroid(values: np.ndarray) -> np.ndarray:
    return np.array([(np.indices(values.shape)[axis] * values).sum() / values.sum() for axis in (0, 1)])


@pytest.mark.parametrize("size", [(60, 90), (91, 64), (40, 200)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_mask_lies_where_the_processor_puts_a_white_box(name, size):
    mask = white_box(size)
    made = pixels_after(PROCESSORS[name], np.repeat(mask[..., None], 3, axis=-1))[..., 0]
    shares = InputGeometry.from_processor(PROCESSORS[name], size).to_input(torch.from_numpy(mask)).numpy()
    assert np.abs(centroid(shares) - centroid(made)).max() < 0.1
    assert shares.sum() == pytest.approx(made.sum(), rel=0.05)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_nearest_masks_are_those_of_the_real_processor(name, size):
    """Pillow's nearest filter takes the pixel under the centre as well, and either of two that are equally near."""
    mask = np.random.default_rng(0).random(size) < 0.5
    processor = copy.deepcopy(PROCESSORS[name])
    processor.resample = Image.Resampling.NEAREST
    image = np.repeat(np.uint8(255) * mask[..., None], 3, axis=2)
    geometry = InputGeometry.from_processor(processor, size)
    found = geometry.to_input(torch.from_numpy(mask), nearest=True)
    assert found.dtype == torch.bool
    left, top = geometry.crop_box[:2]
    clear = []
    for axis, start in enumerate((top, left)):
        centres = (np.arange(geometry.input_size[axis]) + start + 0.5) * size[axis] / geometry.resized_size[axis]
        clear.append(abs(centres - centres.round()) > 1e-9)
    sure = np.ix_(*clear)
    np.testing.assert_array_equal(found.numpy()[sure], (pixels_after(processor, image)[..., 0] > 0)[sure])


@pytest.mark.parametrize("name", ["vit", "bit", "clip, crop larger than resized"])
def test_mask_equals_the_processors_own_average(name):
    """Where a resize takes a whole number of pixels, PIL's box filter is their exact mean, rounded to 8 bits."""
    processor = PROCESSORS[name]
    height = 3 * (processor.size.height or processor.size.shortest_edge)
    mask = white_box((height, height))
    made = processor(
        Image.fromarray(np.repeat(mask[..., None], 3, axis=-1)),
        do_rescale=False,
        do_normalize=False,
        resample=Image.Resampling.BOX,
        return_tensors="np",
    )["pixel_values"][0, 0]
    shares = InputGeometry.from_processor(processor, (height, height)).to_input(torch.from_numpy(mask)).numpy()
    assert len(np.unique(made)) > 3  # the box cuts through input pixels
    assert np.abs(shares - made).max() <= 1


def test_mask_of_padding_is_empty():
    geometry = InputGeometry((10, 10), (10, 10), (-3, -2, 12, 13))
    assert torch.equal(geometry.to_input(torch.ones(2, 10, 10)), F.pad(torch.ones(2, 10, 10), (3, 2, 2, 3)))


# Failures


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (Siglip2ImageProcessorPil(), "has its own _preprocess"),
        (ConvNextImageProcessorPil(), "has its own resize"),
        (PerceiverImageProcessorPil(), "has its own center_crop"),
        (SegformerImageProcessorPil(), "has its own _preprocess"),
        (ViTImageProcessorPil(do_pad=True, pad_size=squash(300, 300)), r"pads images \(do_pad\)"),
        (ViTImageProcessorPil(size={"longest_edge": 30}), "has the size {'longest_edge': 30}"),
        (ViTImageProcessorPil(size={"max_height": 30, "max_width": 20}), "has the size"),
        (DeiTImageProcessorPil(crop_size={"shortest_edge": 30}), "has the crop_size {'shortest_edge': 30}"),
    ],
)
def test_unsupported_processors(processor, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        InputGeometry.from_processor(processor, (50, 60))
    assert type(processor).__name__ in str(caught.value)
    assert "supported are" in str(caught.value)


def test_size_setting_that_is_no_size():
    processor = ViTImageProcessorPil()
    processor.size = None
    with pytest.raises(ValueError, match="ViTImageProcessorPil has the size None"):
        InputGeometry.from_processor(processor, (50, 60))
    processor.size = 20
    assert InputGeometry.from_processor(processor, (50, 60)).input_size == (20, 20)


def test_wrong_shapes():
    geometry = whole((9, 8), (4, 4))
    with pytest.raises(ValueError, match=r"scores has shape \(9, 8\); its last two dimensions must be .* \(4, 4\)"):
        geometry.to_original(torch.zeros(9, 8))
    with pytest.raises(ValueError, match=r"mask has shape \(4,\); .* the original size \(9, 8\)"):
        geometry.to_input(torch.zeros(4))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (((0, 5), (4, 4), (0, 0, 4, 4)), r"original_size is \(0, 5\)"),
        (((5, 5), (4, 0), (0, 0, 4, 4)), r"resized_size is \(4, 0\)"),
        (((5, 5), (4, 4), (2, 0, 2, 4)), "left < right"),
        (((5, 5), (4, 4), (4, 0, 8, 4)), "lies outside the resized photograph"),
    ],
)
def test_impossible_geometry(fields, reason):
    with pytest.raises(ValueError, match=reason):
        InputGeometry(*fields)
    with pytest.raises(ValueError, match="original_size is"):
        InputGeometry.from_processor(PROCESSORS["vit"], (0, 5))
