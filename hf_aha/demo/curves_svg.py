"""Deletion and insertion curves as SVG: drawn in a millisecond, sharp at any size, in the colours of the page."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ..metrics.curves import Curves
from ..plots import PALETTE


_WIDTH, _HEIGHT = 560, 348
_LEFT, _TOP, _RIGHT, _BOTTOM = 48, 40, 28, 76
_STYLE = {"insertion": (PALETTE[0], ""), "deletion": (PALETTE[1], ' stroke-dasharray="7 4"')}


def curves_svg(
    curves: Curves | None,
    *,
    share: float,
    value: float | None,
    mode: str,
    label: str,
    against_label: str | None = None,
) -> str:
    """Both curves of one map, with a mark where the slider stands.

    Args:
        curves: of one image; None while they are being measured.
        share: of perturbed pixels, 0..1, where the mark stands.
        value: height of the mark; None for no mark.
        mode: the curve that the mark is on, drawn thicker.
        label, against_label: the class, and the one it is compared with.

    Returns:
        an `<svg>` that text describes, for those who cannot see it.
    """
    low = -1.0 if against_label is not None else 0.0
    what = f"probability of {label}"
    if against_label is not None:
        what += f" minus that of {against_label}"
    parts = [_axes(low, what)]
    texts = [f"Deletion and insertion curves: {what} against the share of pixels."]
    if curves is not None:
        areas = {"insertion": float(curves.insertion_auc[0]), "deletion": float(curves.deletion_auc[0])}
        for name, area in areas.items():
            values = getattr(curves, name)[0].tolist()
            color, dashes = _STYLE[name]
            points = " ".join(
                f"{_x(x):.1f},{_y(y, low):.1f}" for x, y in zip(curves.fractions.tolist(), values, strict=True)
            )
            width = 3.5 if name == mode else 2
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}"{dashes}/>')
            texts.append(f"Area under the {name} curve {area:.3f}.")
        parts.append(_legend(areas))
    if value is not None:
        x, y = _x(share), _y(value, low)
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="currentColor" '
            'stroke-dasharray="2 4" opacity="0.7"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{_STYLE[mode][0]}" stroke="currentColor" '
            'stroke-width="1.5"/>'
        )
        texts.append(f"The slider stands at {share:.0%}: {value:.3f} in {mode}.")
    described = html.escape(" ".join(texts))
    return (
        f'<svg class="aha-curves" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{described}" '
        f'font-family="inherit" font-size="13">{"".join(parts)}</svg>'
    )


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, low: float) -> float:
    return _TOP + (1 - value) / (1 - low) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(low: float, what: str) -> str:
    lines = []
    for level in _levels(low):
        y = _y(level, low)
        lines.append(
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="currentColor" '
            f'opacity="{0.5 if level == 0 else 0.15}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="currentColor">{level:g}</text>'
        )
    for percent in (0, 25, 50, 75, 100):
        lines.append(
            f'<text x="{_x(percent / 100):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle" '
            f'fill="currentColor">{percent}%</text>'
        )
    shown = what if len(what) <= 60 else f"{what[:59]}…"
    lines.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 34}" text-anchor="middle" fill="currentColor">'
        "pixels removed or shown, most important first</text>"
        f'<text x="{_LEFT - 8}" y="{_TOP - 20}" fill="currentColor">{html.escape(shown)}</text>'
    )
    return "".join(lines)


def _levels(low: float) -> Sequence[float]:
    return (0, 0.25, 0.5, 0.75, 1) if low == 0 else (-1, -0.5, 0, 0.5, 1)


def _legend(areas: dict[str, float]) -> str:
    items = []
    y = _HEIGHT - 10
    for place, (name, area) in enumerate(areas.items()):
        color, dashes = _STYLE[name]
        x = _LEFT + 40 + place * (_WIDTH - _LEFT - _RIGHT) // 2
        items.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 32}" y2="{y - 4}" stroke="{color}" stroke-width="3"{dashes}/>'
            f'<text x="{x + 40}" y="{y}" fill="currentColor">{name}, area {area:.3f}</text>'
        )
    return "".join(items)
