"""The demo's pictures as HTML, each with a text for those who cannot see it; no file is written for them."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from PIL import Image

from ..explanation import Explanation
from ..visualization import COLORMAP, heatmap, overlay
from .answers import Answer, Comparison, Mode, Perturbed
from .refining import CURVE_POINTS


VIEWS = ("overlay", "map", "original")
COLORMAPS = ("inferno", "viridis", "cividis", "magma")
"""All of even steps in lightness, so that they can be told apart without colour; the first is the default."""

_REMOVED = {"blur": "blurred", "black": "black", "mean": "one mean colour"}
_LEAST_SIDE = 384


def figure(image: Image.Image, alt: str, caption: str = "") -> str:
    """A `<figure>` that carries the picture itself.

    Args:
        image: RGB.
        alt: what the picture shows.
        caption: one line below it; escaped.
    """
    buffer = io.BytesIO()
    # A third of the size of PNG and a tenth of the time; colours are not halved in resolution.
    image.save(buffer, format="JPEG", quality=88, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="aha-figure"><img src="data:image/jpeg;base64,{data}" alt="{html.escape(alt)}" '
        f'width="{image.width}" height="{image.height}">{below}</figure>'
    )


def draw(explanation: Explanation, view: str, opacity: float = 0.6, colormap: str = COLORMAP) -> Image.Image:
    """The photograph, its map, or the map over it.

    Args:
        explanation: of an answer.
        view: one of `VIEWS`.
        opacity: of the overlay's colours, 0..1.
        colormap: one of `COLORMAPS`; where two classes are compared, both ends of the map have their own colours and
            this is not used.

    Raises:
        ValueError: there is no such view.
    """
    sign = "positive" if explanation.against is None else "both"
    colors = colormap if sign == "positive" else "PuOr_r"
    if view == "original":
        return explanation.image
    if view == "map":
        return heatmap(explanation.scores, colors)
    if view == "overlay":
        return overlay(explanation.image, explanation.scores, opacity, colors, sign=sign)
    raise ValueError(f"view is {view!r}; it must be one of {', '.join(VIEWS)}.")


def explanation_figure(answer: Answer, view: str, opacity: float = 0.6, colormap: str = COLORMAP) -> str:
    """The main picture."""
    explanation = answer.explanation
    asked = f"{explanation.label}, {explanation.probability:.1%}"
    if explanation.against is not None:
        asked += f", rather than {explanation.against_label}, {explanation.against_probability:.1%}"
    where = f"The most important tenth of the pixels lies {_place(explanation.evidence_for(0.1))}."
    alts = {
        "original": f"The photograph, classified as {explanation.predicted_label}.",
        "map": f"Map of the pixels that speak for {asked}. {where}",
        "overlay": f"The photograph with the pixels coloured that speak for {asked}. {where}",
    }
    if explanation.against is not None and view != "original":
        caption = f"{explanation.title}: orange speaks for the first, violet for the second"
    else:
        caption = explanation.title
    if explanation.refinement is not None:
        caption += ", refined"
    return figure(draw(explanation, view, opacity, colormap), alts[view], caption)


def perturbed_figure(answer: Answer, perturbed: Perturbed, share: float, mode: Mode, reference: str) -> str:
    """The perturbed input, enlarged so that its pixels stay squares."""
    picture = perturbed.picture
    factor = max(1, -(-_LEAST_SIDE // min(picture.size)))
    height, width = answer.scores.shape
    done = "removed" if mode == "deletion" else "shown"
    caption = (
        f"What the classifier sees ({width} x {height} pixels): the most important {share:.0%} {done}; "
        f"removed pixels are {_REMOVED[reference]}"
    )
    enlarged = picture.resize((factor * picture.width, factor * picture.height), Image.Resampling.NEAREST)
    return figure(enlarged, f"{caption}. {perturbed_sentence(answer, perturbed)}", caption)


def perturbed_sentence(answer: Answer, perturbed: Perturbed) -> str:
    """The probability left, beside that of the whole photograph."""
    explanation = answer.explanation
    text = f"{explanation.label}: {perturbed.probability:.1%} (whole photograph: {explanation.probability:.1%})"
    if explanation.against is not None:
        text += (
            f"; {explanation.against_label}: {perturbed.against_probability:.1%} "
            f"(whole photograph: {explanation.against_probability:.1%})"
        )
    return f"{text}."


def perturbed_readout(answer: Answer, perturbed: Perturbed) -> str:
    """The same in large, with a bar."""
    explanation = answer.explanation
    rows = [(explanation.label, perturbed.probability, explanation.probability)]
    if explanation.against is not None:
        rows.append((explanation.against_label, perturbed.against_probability, explanation.against_probability))
    bars = "".join(
        f'<p class="aha-probability"><span class="aha-label">{html.escape(label)}</span> '
        f'<strong>{now:.1%}</strong> <span class="aha-soft">whole photograph: {whole:.1%}</span></p>'
        f'<div class="aha-bar" aria-hidden="true"><span style="width:{100 * now:.1f}%"></span></div>'
        for label, now, whole in rows
    )
    return bars


def refinement_figures(before: Answer, after: Answer, opacity: float, colormap: str) -> str:
    """Both maps side by side, and what the second gained and cost."""
    facts = after.explanation.refinement
    panels = "".join(
        figure(
            draw(answer.explanation, "overlay", opacity, colormap),
            f"Map {name} refinement for {after.explanation.label}.",
            f"{name}: insertion - deletion {facts[key]:.3f}",
        )
        for name, answer, key in (("before", before, "initial_value"), ("after", after, "value"))
    )
    return f'<div class="aha-panels">{panels}</div><p>{html.escape(refinement_sentence(after))}</p>'


def refinement_sentence(after: Answer) -> str:
    """What refinement did, in one sentence."""
    facts = after.explanation.refinement
    steps = f"{facts['steps']} step{'' if facts['steps'] == 1 else 's'}"
    return (
        f"{steps} took the insertion area minus the deletion area from {facts['initial_value']:.3f} to "
        f"{facts['value']:.3f} (blurred reference, {CURVE_POINTS} points inside) and cost {facts['passes']} passes of "
        "the classifier."
    )


def comparison_figures(answer: Answer, comparison: Comparison, opacity: float, colormap: str, passes: int) -> str:
    """Our map and those of other methods side by side, and what is missing.

    Args:
        answer: the class explained; of a comparison of two classes only the first is shown.
        comparison: what the others say.
        opacity, colormap: as in `draw`.
        passes: of the classifier for our map.
    """
    explanation = answer.explanation
    ours = overlay(explanation.image, explanation.scores, opacity, colormap)
    panels = [figure(ours, f"AHA for {explanation.label}.", f"AHA: {_passes(passes)}")]
    for other in comparison.maps:
        drawn = overlay(explanation.image, other.scores, opacity, colormap)
        cost = f"{other.title}: {_passes(other.forward_passes + other.backward_passes)}"
        panels.append(figure(drawn, f"{other.title} for {explanation.label}.", cost))
    missing = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in comparison.missing)
    return f'<div class="aha-panels">{"".join(panels)}</div>{missing}'


def status(text: str, kind: str = "note") -> str:
    """One line on what happened; `kind` is "note" or "problem"."""
    mark = "Problem: " if kind == "problem" else ""
    return f'<p class="aha-status aha-{kind}">{html.escape(mark + text)}</p>'


def _passes(count: int) -> str:
    """Forward and backward passes of the classifier, counted alike."""
    return f"{count:,} pass{'' if count == 1 else 'es'} of the classifier"


def _place(mask: np.ndarray) -> str:
    """Where the middle of a mask lies, in words, for texts that stand for a picture."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return "nowhere in particular"
    vertical = ("at the top", "in the middle", "at the bottom")[min(int(3 * rows.mean() / mask.shape[0]), 2)]
    horizontal = ("on the left", "", "on the right")[min(int(3 * columns.mean() / mask.shape[1]), 2)]
    return f"{vertical} {horizontal}".strip()
