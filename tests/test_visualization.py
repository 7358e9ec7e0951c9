from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata

from hf_aha import visualization
from hf_aha.visualization import comparison_sheet, explanation_sheet, heatmap, overlay, rank_map


@pytest.fixture
def photograph() -> Image.Image:
    rows, columns = np.mgrid[:60, :90]
    levels = np.stack([columns * 255 / 89, rows * 255 / 59, 255 - columns * 255 / 89], axis=-1)
    return Image.fromarray(levels.astype(np.uint8))


@pytest.fixture
def scores() -> torch.Tensor:
    """(60, 90), rising from the top left to the bottom right without ties."""
    return torch.arange(60 * 90).reshape(60, 90).float()


def with_border(scores: torch.Tensor) -> torch.Tensor:
    """`scores` with 15 columns on either side not scored."""
    scores = scores.clone()
    scores[:, :15] = scores[:, 75:] = torch.nan
    return scores


def levels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def colorfulness(image: Image.Image) -> np.ndarray:
    return np.ptp(levels(image), axis=-1)


# Ranks


def test_ranks_agree_with_scipy():
    values = np.random.default_rng(0).integers(0, 50, (17, 23)).astype(np.float32)
    expected = (rankdata(values, method="average") - 1) / (values.size - 1)
    np.testing.assert_allclose(rank_map(values), expected.reshape(values.shape), atol=1e-6)


def test_pixels_that_were_not_scored_take_no_rank(scores):
    ranks = rank_map(with_border(scores))
    assert np.isnan(ranks[:, :15]).all() and np.isnan(ranks[:, 75:]).all()
    np.testing.assert_allclose(ranks[:, 15:75], rank_map(scores[:, 15:75]))
    assert ranks.dtype == np.float32


@pytest.mark.parametrize("change", [lambda x: x * 1e-30, lambda x: x * 3 - 7e4, lambda x: (x / 500).exp()])
def test_only_the_order_matters(scores, change):
    shuffled = scores.flatten()[torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(0))].view(
        60, 90
    )
    assert np.array_equal(rank_map(shuffled), rank_map(change(shuffled)))


def test_ranks_of_special_maps():
    assert rank_map(torch.zeros(3, 4)).tolist() == [[0.5] * 4] * 3
    assert rank_map(torch.zeros(1, 1)).tolist() == [[0.5]]
    assert rank_map(np.array([[0.0, -0.0, 1.0]])).tolist() == [[0.25, 0.25, 1.0]]
    assert np.isnan(rank_map(torch.full((2, 2), torch.nan))).all()
    assert rank_map(np.array([[np.inf, -np.inf, 0, 1e38]])).tolist() == [
        [1.0, 0.0, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    ]


def test_every_kind_of_scores(scores):
    expected = rank_map(scores)
    assert np.array_equal(rank_map(scores.double().requires_grad_()), expected)
    assert np.array_equal(rank_map(scores.numpy().astype(int)), expected)
    assert np.array_equal(rank_map(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)), [[0.0, 1.0]])


@pytest.mark.parametrize("shape", [(1, 3, 4), (5,), (0, 3)])
def test_scores_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"give the map of one image, of shape \(H, W\)"):
        rank_map(torch.zeros(shape))


# Heatmap


def test_heatmap_shows_ranks_in_the_colors_of_the_map(scores):
    from matplotlib import colormaps

    image = heatmap(scores)
    assert image.size == (90, 60)
    for place, rank in [((0, 0), 0.0), ((89, 59), 1.0)]:
        expected = [round(255 * channel) for channel in colormaps["inferno"](rank)[:3]]
        assert list(image.getpixel(place)) == expected
    lightness = levels(image) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness.mean(axis=1)) > 0).all()
    assert heatmap(scores, "viridis").getpixel((0, 0)) != image.getpixel((0, 0))


def test_heatmap_of_pixels_that_were_not_scored(scores):
    picture = levels(heatmap(with_border(scores)))
    border = np.concatenate([picture[:, :15], picture[:, 75:]], axis=1)
    assert border.min() > 200
    assert np.ptp(border, axis=-1).max() == 0
    assert len(np.unique(border)) == 2  # grey and its stripes
    assert np.array_equal(picture[:, 15:75], levels(heatmap(scores[:, 15:75])))


# Overlay


def test_overlay_colors_what_is_important_and_greys_the_rest(photograph, scores):
    image = overlay(photograph, scores)
    assert image.size == photograph.size
    color = colorfulness(image)
    assert color[:15].max() <= 1
    assert color[45:].mean() > 60
    plain = levels(photograph) @ [0.299, 0.587, 0.114]
    assert (levels(image)[:15].mean(axis=-1) <= plain[:15] + 25).all()


def test_a_large_overlay_has_no_seams():
    """Large pictures are drawn in bands of rows; the result is that of drawing a part alone."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1400, 1500, 3), dtype=np.uint8))
    ranks = np.tile(np.linspace(0, 1, 1500, dtype=np.float32), (1400, 1))
    ranks[:, :9] = np.nan
    whole = visualization._draw_overlay(image, ranks, 0.6, "inferno")
    for top in (0, 640, 1300):
        part = visualization._draw_overlay(
            image.crop((0, top, 1500, top + 100)), ranks[top : top + 100], 0.6, "inferno"
        )
        inside = np.s_[10:90, 20:1480]  # without the outline
        assert np.array_equal(levels(whole)[top : top + 100][inside], levels(part)[inside])


def test_opacity(photograph, scores):
    assert colorfulness(overlay(photograph, scores, opacity=0)).max() <= 1
    means = [colorfulness(overlay(photograph, scores, opacity=opacity)).mean() for opacity in (0.2, 0.6, 1.0)]
    assert means == sorted(means)


def test_photograph_stays_legible_under_the_overlay(scores):
    """Where the ranks are equal, lighter pixels of the photograph stay lighter."""
    rows = np.repeat(np.linspace(0, 255, 90)[None], 60, axis=0).astype(np.uint8)
    image = overlay(Image.fromarray(rows).convert("RGB"), torch.zeros(60, 90), opacity=1.0)
    lightness = levels(image) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness.mean(axis=0)) >= 0).all()
    assert np.ptp(lightness) > 80


def test_overlay_of_pixels_that_were_not_scored(photograph, scores):
    picture = levels(overlay(photograph, with_border(scores)))
    expected = 0.4 * levels(photograph)
    assert np.abs(picture[:, :15] - expected[:, :15]).max() <= 1
    assert np.abs(picture[:, 75:] - expected[:, 75:]).max() <= 1
    for line in (picture[:, 15], picture[:, 74], picture[0, 15:75], picture[59, 15:75]):
        assert (line == 245).all()
    assert not (levels(overlay(photograph, scores)) == 245).all(axis=-1).any()


def test_overlay_does_not_change_its_arguments(photograph, scores):
    before, border = levels(photograph).copy(), with_border(scores)
    copy = border.clone()
    overlay(photograph, border)
    assert np.array_equal(levels(photograph), before)
    torch.testing.assert_close(border, copy, rtol=0, atol=0, equal_nan=True)


def test_overlay_refuses_what_does_not_fit(photograph, scores):
    with pytest.raises(ValueError, match=r"shape \(90, 60\) and the photograph \(60, 90\).*InputGeometry"):
        overlay(photograph, scores.T)
    for opacity in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="opacity is"):
            overlay(photograph, scores, opacity=opacity)
    with pytest.raises(ValueError, match="'jett', which matplotlib does not know"):
        overlay(photograph, scores, colormap="jett")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_photographs_of_every_mode(photograph, scores, mode):
    converted = photograph.convert(mode)
    assert np.array_equal(levels(overlay(converted, scores)), levels(overlay(converted.convert("RGB"), scores)))


# Sheets


def margins_are_blank(sheet: Image.Image, width: int = 10) -> bool:
    picture = levels(sheet)
    edges = (picture[:width], picture[-width:], picture[:, :width], picture[:, -width:])
    return all((edge == 255).all() for edge in edges)


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 1), (9, 7), (90, 60), (640, 480), (12, 900), (2000, 40), (3000, 2000)], ids=str
)
def test_sheet_at_any_size(size):
    image = Image.new("RGB", size, (200, 30, 30))
    values = torch.arange(size[0] * size[1]).reshape(size[::-1]).float()
    sheet = explanation_sheet(image, values, "English springer  98.7 %")
    assert margins_are_blank(sheet)
    assert sheet.height < 560
    assert sheet.width < 1750
    assert (levels(sheet) == [200, 30, 30]).all(axis=-1).any()


def test_sheet_of_48_megapixels():
    image = Image.new("RGB", (8000, 6000))
    values = np.broadcast_to(np.arange(8000, dtype=np.float32), (6000, 8000))
    assert explanation_sheet(image, values, "large").height < 560


def test_sheet_shows_photograph_map_and_overlay(photograph, scores):
    image = photograph.resize((540, 360))
    values = torch.arange(540 * 360).reshape(360, 540).float()
    sheet = explanation_sheet(image, values, "")
    panels = [sheet.crop((28 + i * 560, 28, 28 + i * 560 + 540, 388)) for i in range(3)]
    expected = [image, heatmap(values), overlay(image, values)]
    for panel, picture in zip(panels, expected, strict=True):
        assert np.array_equal(levels(panel), levels(picture))


@pytest.mark.parametrize(
    "title",
    [
        "虎 тигр νεράϊδα نمر 🐯",
        "$x_1$ <b> & \\frac{",
        "two\nlines\tand \x00 control \x1b[0m",
        "lone \ud800 surrogate",
        "word " * 200,
        "x" * 2000,
        "",
        " ",
    ],
)
def test_any_title_fits(photograph, scores, title):
    sheet = explanation_sheet(photograph, scores, title)
    assert margins_are_blank(sheet)
    assert sheet.size[0] == explanation_sheet(photograph, scores).size[0]


def test_title_is_drawn_in_at_most_two_lines(photograph, scores):
    heights = [explanation_sheet(photograph, scores, "word " * count).height for count in (0, 1, 40, 400)]
    assert heights[1] - heights[0] == 44
    assert heights[2] - heights[1] == heights[3] - heights[1] == 30


def test_sheet_explains_the_stripes_only_where_there_are_any(photograph, scores):
    assert explanation_sheet(photograph, with_border(scores)).height > explanation_sheet(photograph, scores).height


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7, 1e38])
def test_constant_scores_give_one_color_at_any_size(value):
    constant = torch.full((200, 300), value)
    for size in [(90, 60), (701, 433)]:
        assert np.unique(rank_map(visualization._scale_scores(constant.numpy(), size))).tolist() == [0.5]
        ranks = rank_map(visualization._scale_scores(with_border(constant).numpy(), size))
        assert np.unique(ranks[~np.isnan(ranks)]).tolist() == [0.5]
        assert np.isnan(ranks).any()


def test_scores_are_averaged_without_those_that_are_missing():
    values = np.full((40, 40), 5.0, np.float32)
    values[:, :20] = np.nan
    values[:20, 20:] = 1.0
    small = visualization._scale_scores(values, (10, 10))
    assert np.isnan(small[:, :5]).all()
    np.testing.assert_allclose(small[:4, 5:], 1.0, rtol=1e-6)
    np.testing.assert_allclose(small[6:, 5:], 5.0, rtol=1e-6)


def test_scaling_keeps_infinite_scores_in_order():
    values = np.zeros((8, 8), np.float32)
    values[0, 0], values[7, 7] = np.inf, -np.inf
    ranks = rank_map(visualization._scale_scores(values, (4, 4)))
    assert ranks[0, 0] == 1.0
    assert ranks[3, 3] == 0.0


def test_nothing_scored(photograph):
    nothing = torch.full((60, 90), torch.nan)
    assert margins_are_blank(explanation_sheet(photograph, nothing, "nothing"))
    assert np.abs(levels(overlay(photograph, nothing)) - 0.4 * levels(photograph)).max() <= 1


def test_sheet_refuses_what_does_not_fit(photograph, scores):
    with pytest.raises(ValueError, match=r"InputGeometry\.to_original"):
        explanation_sheet(photograph, scores[:30])
    with pytest.raises(ValueError, match="too small to show anything"):
        explanation_sheet(photograph, scores, panel_height=3)


# Comparison


def test_comparison_lays_out_rows_and_columns(photograph, scores):
    tall = photograph.rotate(90, expand=True)
    sheet = comparison_sheet(
        [
            (photograph, {"AHA": scores, "a method with a rather long name": with_border(scores)}),
            (tall, {"AHA": scores.T}),
        ],
        title="Two methods",
        row_titles=["English springer 98.7 %", "虎" * 200],
    )
    assert margins_are_blank(sheet)
    assert sheet.width == 2 * 28 + 3 * 200 + 2 * 20
    one_row = comparison_sheet([(photograph, {"AHA": scores})])
    assert one_row.width == 2 * 28 + 2 * 200 + 20
    assert sheet.height > one_row.height + 200


@pytest.mark.parametrize(("style", "draw"), [("heatmap", heatmap), ("overlay", overlay)])
def test_comparison_panels(style, draw):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8))
    values = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    sheet = levels(comparison_sheet([(image, {"AHA": values, "none": -values})], style=style, panel_size=100))
    top = sheet.shape[0] - 28 - 100
    for i, sign in enumerate([1, -1]):
        left = 28 + (i + 1) * 120
        expected = draw(sign * values) if style == "heatmap" else draw(image, sign * values)
        assert np.array_equal(sheet[top : top + 100, left : left + 100], levels(expected))
    assert np.array_equal(sheet[top : top + 100, 28:128], levels(image))


def test_comparison_refuses_what_does_not_fit(photograph, scores):
    for rows in ([], [(photograph, {})]):
        with pytest.raises(ValueError, match="nothing to compare"):
            comparison_sheet(rows)
    with pytest.raises(ValueError, match="row_titles has 2 entries for 1 rows"):
        comparison_sheet([(photograph, {"AHA": scores})], row_titles=["a", "b"])
    with pytest.raises(ValueError, match="style is 'map'"):
        comparison_sheet([(photograph, {"AHA": scores})], style="map")
    with pytest.raises(ValueError, match="InputGeometry"):
        comparison_sheet([(photograph, {"AHA": scores.T})])


# Imports


def test_matplotlib_is_loaded_only_when_something_is_drawn_and_pyplot_never():
    code = (
        "import sys, torch; from PIL import Image; from hf_aha import visualization as v;"
        "assert 'matplotlib' not in sys.modules;"
        "v.explanation_sheet(Image.new('RGB', (4, 4)), torch.rand(4, 4), 'x');"
        "v.plot_curves({'a': ([0, 1], [1, 0], None, None)});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_long_name_breaks_after_its_hyphens():
    from hf_aha.visualization import _font, _text_width, _wrap

    font, name = _font(15, bold=True), "AHA (imagenette-demo-gradient)"
    lines = _wrap(name, font, 140, limit=3)
    assert 1 < len(lines) <= 3 and all(_text_width(line, font) <= 140 for line in lines)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert _wrap(name, font, 140, limit=1)[0].endswith("…")
