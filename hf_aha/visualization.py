"""Pictures of explanations: heatmaps, overlays and sheets.

Only the order of the scores matters to the metrics, so every picture shows ranks: the colour of a pixel tells which
share of the pixels is less important than it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .plots import plot_curves, plot_training


__all__ = [
    "comparison_sheet",
    "explanation_sheet",
    "heatmap",
    "overlay",
    "plot_curves",
    "plot_training",
    "rank_map",
]

Scores = Tensor | np.ndarray

COLORMAP = "inferno"
# What speaks against a class, and both ends of a map: colours that colour-blind people can tell apart as well.
NEGATIVE_COLORMAP = "Blues"
TWO_ENDED_COLORMAP = "PuOr_r"
SIGNS = {"positive": COLORMAP, "negative": NEGATIVE_COLORMAP, "both": TWO_ENDED_COLORMAP}

Sign = Literal["positive", "negative", "both"]

# Of a sheet: the caption of the map, and the ends of its colour bar.
_WORDS = {
    "positive": ("importance by rank", ("least", "most")),
    "negative": ("evidence against, by rank", ("least", "most")),
    "both": ("evidence by rank", ("against", "for")),
}

_MARGIN = 28
_GAP = 20
_COLOR_BAR_MIN_WIDTH = 180
_INK = (32, 33, 36)
_SOFT_INK = (95, 99, 104)
_OUTLINE = (245, 245, 245)
_NOT_SCORED = (222, 222, 222)
_NOT_SCORED_STRIPE = (240, 240, 240)
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def rank_map(scores: Scores) -> np.ndarray:
    """Return the share of the other scored pixels that each pixel outranks, in [0, 1]; 1 is the most important.

    Equal scores share the mean of their ranks, so that a constant map is 0.5 everywhere. This is a rule for drawing;
    the metrics break ties by their protocol.

    Args:
        scores: (H, W), higher = more important, any range; NaN marks pixels that were not scored.

    Returns:
        (H, W) float32; NaN where `scores` is NaN.

    Raises:
        ValueError: `scores` is not of shape (H, W), or has no pixel.

    Example:
        >>> rank_map(np.array([[5.0, -1.0, np.nan, 5.0, 7.0]])).tolist()
        [[0.5, 0.0, nan, 0.5, 1.0]]
    """
    values = _as_map(scores)
    ranks = np.full(values.shape, np.nan, dtype=np.float32)
    scored = ~np.isnan(values)
    flat = values[scored]
    order = np.argsort(flat)
    in_order = flat[order]
    # Where a new value begins; -0.0 and 0.0 are the same one.
    starts = np.flatnonzero(np.append(True, in_order[1:] != in_order[:-1])[: flat.size])
    counts = np.diff(starts, append=flat.size)
    mean_ranks = (starts + (counts - 1) / 2) / (flat.size - 1) if flat.size > 1 else np.full(len(starts), 0.5)
    flat[order] = np.repeat(mean_ranks, counts)
    ranks[scored] = flat
    return ranks


def heatmap(scores: Scores, colormap: str = COLORMAP) -> Image.Image:
    """Draw scores by rank as an RGB image of the same size.

    Pixels that were not scored (NaN) are light grey with diagonal stripes, a pattern that no colour map shows.

    Args:
        scores: (H, W), higher = more important.
        colormap: a name known to matplotlib; the default can be read by colour-blind people and in grey print.
    """
    return _draw_heatmap(rank_map(scores), colormap)


def overlay(
    image: Image.Image,
    scores: Scores,
    opacity: float = 0.6,
    colormap: str | None = None,
    *,
    sign: Sign = "positive",
) -> Image.Image:
    """Lay scores by rank over a photograph: colour where important, grey and darker where not.

    Pixels that were not scored (NaN) show the photograph dimmed, and a thin light line surrounds the scored part.

    Args:
        image: the photograph.
        scores: (H, W) of its pixels, higher = more important.
        opacity: 0 shows the photograph in grey only, 1 the colours in full.
        colormap: a name known to matplotlib; by the sign when left out.
        sign: `"positive"` colours the most important pixels, `"negative"` the least important ones, in blue, and
            `"both"` the most important ones in orange and the least important ones in violet.

    Raises:
        ValueError: the sizes of `image` and `scores` differ, `opacity` is outside [0, 1], or the sign is unknown.
    """
    values = _as_map_of(image, scores)
    colormap = _colormap_of(sign, colormap)
    return _draw_overlay(image.convert("RGB"), _signed_ranks(values, sign), opacity, colormap, sign == "both")


def explanation_sheet(
    image: Image.Image,
    scores: Scores,
    title: str = "",
    *,
    panel_height: int = 360,
    opacity: float = 0.6,
    colormap: str | None = None,
    sign: Sign = "positive",
) -> Image.Image:
    """Draw photograph, heatmap and overlay side by side under a title.

    Images of any size are scaled to panels of about `panel_height`; the scores are averaged to that size and then
    ranked.

    Args:
        image: the photograph.
        scores: (H, W) of its pixels, higher = more important; NaN where not scored.
        title: one line, such as the class and its probability.
        panel_height: height of the panels in pixels; a wide photograph gets lower ones.
        opacity, colormap, sign: as in `overlay`.

    Raises:
        ValueError: the sizes of `image` and `scores` differ, or the sign is unknown.
    """
    values = _as_map_of(image, scores)
    colormap = _colormap_of(sign, colormap)
    size = _fit(image.size, (panel_height * 3 // 2, panel_height))
    photograph = _scale_image(image.convert("RGB"), size)
    ranks = _signed_ranks(_scale_scores(values, size), sign)
    drawn = _draw_overlay(photograph, ranks, opacity, colormap, sign == "both")
    middle, ends = _WORDS[sign]
    captions = ["photograph", middle, "overlay"]
    panels = [photograph, _draw_heatmap(ranks, colormap), drawn]

    caption_font, title_font = _font(14), _font(21, bold=True)
    notes = ["striped: not seen by the model"] if np.isnan(ranks).any() else []
    column = max(size[0], *(_text_width(text, caption_font) for text in captions), _COLOR_BAR_MIN_WIDTH)
    width = max(3 * column + 2 * _GAP, _text_width(notes[0], caption_font) if notes else 0) + 2 * _MARGIN
    lines = _wrap(_one_line(title), title_font, width - 2 * _MARGIN, limit=2)
    top = _MARGIN + len(lines) * 30 + (14 if lines else 0)
    height = top + size[1] + 60 + 20 * len(notes) + _MARGIN // 2
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 30 * i), line, fill=_INK, font=title_font)
    below = top + size[1] + 10
    for i, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = _MARGIN + i * (column + _GAP)
        sheet.paste(panel, (left + (column - size[0]) // 2, top))
        draw.text((left + column / 2, below), caption, fill=_SOFT_INK, font=caption_font, anchor="ma")
    bar_width = min(max(size[0], _COLOR_BAR_MIN_WIDTH), 300)
    bar_left = _MARGIN + column + _GAP + (column - bar_width) // 2
    _paste_color_bar(sheet, bar_left, below + 26, bar_width, colormap, ends)
    for note in notes:
        draw.text((width / 2, below + 50), note, fill=_SOFT_INK, font=caption_font, anchor="ma")
    return sheet


def comparison_sheet(
    rows: Sequence[tuple[Image.Image, Mapping[str, Scores]]],
    *,
    title: str = "",
    row_titles: Sequence[str] | None = None,
    style: Literal["overlay", "heatmap"] = "overlay",
    panel_size: int = 200,
    opacity: float = 0.6,
    colormap: str = COLORMAP,
) -> Image.Image:
    """Draw several explanations of each photograph in a row, one column for each method.

    Args:
        rows: photographs, each with the scores (H, W) of some methods by name. Columns come in the order in which the
            names first appear; a row without a method leaves its place empty.
        title: one line above the sheet.
        row_titles: one line above each row, such as the class explained.
        style: whether the scores are laid over the photograph.
        panel_size: side of the square that each panel is fitted into, in pixels.
        opacity, colormap: as in `overlay`.

    Raises:
        ValueError: there is no row or no scores at all, the sizes of a photograph and its scores differ, or
            `row_titles` has another length than `rows`.
    """
    names = list(dict.fromkeys(name for _, by_name in rows for name in by_name))
    if not names:
        raise ValueError("There is nothing to compare; give at least one photograph with scores by name.")
    if row_titles is not None and len(row_titles) != len(rows):
        raise ValueError(f"row_titles has {len(row_titles)} entries for {len(rows)} rows; give one for each.")
    if style not in ("overlay", "heatmap"):
        raise ValueError(f"style is {style!r}; it must be 'overlay' or 'heatmap'.")

    header_font, row_font, title_font = _font(15, bold=True), _font(14), _font(21, bold=True)
    headers = [_wrap(_one_line(name), header_font, panel_size, limit=3) for name in ("photograph", *names)]
    width = 2 * _MARGIN + len(headers) * panel_size + (len(headers) - 1) * _GAP
    lines = _wrap(_one_line(title), title_font, width - 2 * _MARGIN, limit=2)
    header_top = _MARGIN + len(lines) * 30 + (14 if lines else 0)
    first_top = header_top + 20 * max(map(len, headers)) + 8
    step = panel_size + _GAP + (22 if row_titles is not None else 0)
    sheet = Image.new("RGB", (width, first_top + step * len(rows) - _GAP + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + 30 * i), line, fill=_INK, font=title_font)
    centers = [_MARGIN + i * (panel_size + _GAP) + panel_size // 2 for i in range(len(headers))]
    for center, header in zip(centers, headers, strict=True):
        for i, line in enumerate(header):
            draw.text((center, header_top + 20 * i), line, fill=_INK, font=header_font, anchor="ma")

    for i, (image, by_name) in enumerate(rows):
        top = first_top + i * step
        if row_titles is not None:
            line = _wrap(_one_line(row_titles[i]), row_font, width - 2 * _MARGIN, limit=1)
            draw.text((_MARGIN, top), line[0] if line else "", fill=_SOFT_INK, font=row_font)
            top += 22
        size = _fit(image.size, (panel_size, panel_size))
        photograph = _scale_image(image.convert("RGB"), size)
        panels = {centers[0]: photograph}
        for center, name in zip(centers[1:], names, strict=True):
            if name in by_name:
                ranks = rank_map(_scale_scores(_as_map_of(image, by_name[name]), size))
                drawn = style == "overlay" and _draw_overlay(photograph, ranks, opacity, colormap)
                panels[center] = drawn or _draw_heatmap(ranks, colormap)
            else:
                draw.text((center, top + panel_size / 2), "–", fill=_SOFT_INK, font=header_font, anchor="mm")
        for center, panel in panels.items():
            sheet.paste(panel, (center - size[0] // 2, top + (panel_size - size[1]) // 2))
    return sheet


def _as_map(scores: Scores) -> np.ndarray:
    values = scores.detach().cpu().float().numpy() if isinstance(scores, Tensor) else np.asarray(scores, np.float32)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"scores has shape {values.shape}; give the map of one image, of shape (H, W).")
    return values


def _as_map_of(image: Image.Image, scores: Scores) -> np.ndarray:
    values = _as_map(scores)
    if values.shape != image.size[::-1]:
        raise ValueError(
            f"scores has shape {values.shape} and the photograph {image.size[::-1]} (height, width); "
            "bring the scores to the photograph with InputGeometry.to_original."
        )
    return values


def _colors(ranks: np.ndarray, colormap: str) -> np.ndarray:
    from matplotlib import colormaps

    if colormap not in colormaps:
        raise ValueError(f"colormap is {colormap!r}, which matplotlib does not know; try 'inferno' or 'viridis'.")
    table = colormaps[colormap](np.arange(256))[:, :3].astype(np.float32)
    return table[(np.nan_to_num(ranks) * 255).round().astype(np.uint8)]


def _colormap_of(sign: str, colormap: str | None) -> str:
    if sign not in SIGNS:
        raise ValueError(f"sign is {sign!r}; it must be {', '.join(map(repr, SIGNS))}.")
    return SIGNS[sign] if colormap is None else colormap


def _signed_ranks(values: np.ndarray, sign: str) -> np.ndarray:
    return rank_map(-values if sign == "negative" else values)


def _to_image(levels: np.ndarray) -> Image.Image:
    return Image.fromarray((levels * 255).round().clip(0, 255).astype(np.uint8))


def _draw_heatmap(ranks: np.ndarray, colormap: str) -> Image.Image:
    levels = _colors(ranks, colormap)
    missing = np.isnan(ranks)
    if missing.any():
        period = max(min(ranks.shape) // 24, 6)
        rows, columns = np.ogrid[: ranks.shape[0], : ranks.shape[1]]
        striped = missing & ((rows + columns) % period < period // 2)
        levels[missing] = np.array(_NOT_SCORED) / 255
        levels[striped] = np.array(_NOT_SCORED_STRIPE) / 255
    return _to_image(levels)


def _draw_overlay(
    photograph: Image.Image, ranks: np.ndarray, opacity: float, colormap: str, two_ended: bool = False
) -> Image.Image:
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}; it must lie between 0 and 1.")
    result = photograph.copy()
    band = max(1_000_000 // photograph.width, 1)  # rows at a time, for the sake of memory
    for top in range(0, photograph.height, band):
        pixels = np.asarray(photograph.crop((0, top, photograph.width, min(top + band, photograph.height))))
        levels = _overlay_levels(pixels, ranks[top : top + band], opacity, colormap, two_ended)
        result.paste(_to_image(levels), (0, top))
    missing = np.isnan(ranks)
    if missing.any() and not missing.all():
        rows, columns = (np.flatnonzero((~missing).any(axis=axis)) for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1], rows[-1]]
        line = max(min(ranks.shape) // 250, 1)
        ImageDraw.Draw(result).rectangle([int(edge) for edge in box], outline=_OUTLINE, width=line)
    return result


def _overlay_levels(
    pixels: np.ndarray, ranks: np.ndarray, opacity: float, colormap: str, two_ended: bool
) -> np.ndarray:
    pixels = pixels.astype(np.float32) / 255
    grey = (pixels @ _LUMINANCE)[..., None]
    # How near a pixel lies to a coloured end.
    share = np.nan_to_num(np.abs(2 * ranks - 1) if two_ended else ranks)[..., None]
    background = (0.08 + 0.8 * grey) * (0.5 + 0.5 * share)
    # The hue tells the rank and the lightness shows the photograph, so that both can be read where they overlap.
    color = _colors(ranks, colormap)
    hue = color / np.maximum(color.max(axis=-1, keepdims=True), 0.01)
    weight = opacity * np.clip((share - 0.3) / 0.7, 0, 1)
    levels = (1 - weight) * background + weight * hue * (0.4 + 0.75 * grey**0.7)
    return np.where(np.isnan(ranks)[..., None], 0.4 * pixels, levels)


def _fit(size: tuple[int, int], limits: tuple[int, int]) -> tuple[int, int]:
    """Largest (width, height) of the same shape within `limits`; at least 4 pixels, so that a panel can be seen."""
    if min(limits) < 16:
        raise ValueError(f"A panel of {limits[0]} x {limits[1]} pixels is too small to show anything; use 16 or more.")
    scale = min(limits[0] / size[0], limits[1] / size[1])
    return max(round(size[0] * scale), 4), max(round(size[1] * scale), 4)


def _scale_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    # Much enlarged pixels stay visible as squares, as the model's input of a tiny image is hardly a photograph.
    enlarged = size[0] > 4 * image.width or size[1] > 4 * image.height
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS, reducing_gap=3.0)


def _scale_scores(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Average the scored pixels to (width, height) `size`; a pixel stays NaN where most of it was not scored."""
    enlarged = size[0] > 4 * values.shape[1] or size[1] > 4 * values.shape[0]
    resample = Image.Resampling.NEAREST if enlarged else Image.Resampling.BILINEAR
    scored = ~np.isnan(values)
    finite = np.nan_to_num(values, posinf=1e30, neginf=-1e30)
    np.clip(finite, -1e30, 1e30, out=finite)  # so that a sum of scores stays finite
    total = np.asarray(Image.fromarray(finite).resize(size, resample))
    if scored.all():
        return total
    share = np.asarray(Image.fromarray(scored.astype(np.float32)).resize(size, resample))
    if scored.any() and np.nanmin(values) == np.nanmax(values):
        total = share * 0  # equal scores must stay equal, which a division by the share would not promise
    return np.divide(total, share, out=np.full_like(total, np.nan), where=share >= 0.5)


def _paste_color_bar(
    sheet: Image.Image, left: int, top: int, width: int, colormap: str, ends: tuple[str, str]
) -> None:
    font = _font(12)
    draw = ImageDraw.Draw(sheet)
    start = left + _text_width(ends[0], font) + 8
    stop = left + width - _text_width(ends[1], font) - 8
    ramp = np.broadcast_to(np.linspace(0, 1, stop - start, dtype=np.float32), (12, stop - start))
    sheet.paste(_to_image(_colors(ramp, colormap)), (start, top + 2))
    draw.text((left, top + 8), ends[0], fill=_SOFT_INK, font=font, anchor="lm")
    draw.text((left + width, top + 8), ends[1], fill=_SOFT_INK, font=font, anchor="rm")


@lru_cache(maxsize=16)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # The font that matplotlib brings along, so that a sheet looks the same on every machine.
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def _one_line(text: str) -> str:
    """`text` without line breaks, control characters and lone surrogates, which a font cannot draw."""
    spaced = " ".join(str(text).split())
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in spaced)


def _text_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(np.ceil(font.getlength(text)))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, limit: int) -> list[str]:
    """Break `text` at spaces and after hyphens into at most `limit` lines no wider than `width`.

    An ellipsis stands for the rest.
    """
    lines: list[str] = []
    rest = text
    while rest:
        line = rest
        if _text_width(line, font) > width:
            breaks = [n for n in range(1, len(rest)) if rest[n] == " " or rest[n - 1] == "-"]
            fitting = [n for n in breaks if _text_width(rest[:n], font) <= width]
            if len(lines) + 1 == limit or not fitting:
                keep = next((n for n in range(len(rest) - 1, 0, -1) if _text_width(rest[:n] + "…", font) <= width), 0)
                return [*lines, rest[:keep].rstrip() + "…"]
            line = rest[: fitting[-1]]
        lines.append(line)
        rest = rest[len(line) :].lstrip()
    return lines
