#!/usr/bin/env python
"""Draw the figures of the documentation with the bundled explainer on bundled photographs.

python docs/make_figures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import hf_aha
from hf_aha import AhaExplainer, read_image
from hf_aha.metrics import deletion_insertion_curves
from hf_aha.perturbation import Normalization, deletion_images, insertion_images, reference_image
from hf_aha.ranking import QuantileRanker, hard_masks, standardize
from hf_aha.visualization import heatmap


IMAGES = Path(__file__).parent / "images"
PHOTOGRAPHS = Path(hf_aha.__file__).parent / "bundled" / "photographs"
EXPLAINER = "imagenette-demo"
SHARES = (0.05, 0.2, 0.5)
TEMPERATURES = (1.0, 0.3, 0.1)
CUT = 0.2
# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, INK = "#0072b2", "#d55e00", "#009e73", "#202124"


class Photograph:
    """One photograph as the classifier sees it, with its map and what a removed pixel becomes."""

    def __init__(self, explainer: AhaExplainer, name: str, reference: str = "mean") -> None:
        self.explainer = explainer
        self.normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
        image = read_image(PHOTOGRAPHS / name)
        self.pixels = explainer.image_processor([image], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = explainer(self.pixels)
        self.scores, self.target = output.scores, output.target
        self.label = explainer.config.id2label[int(self.target)]
        self.reference = self.reference_of(reference)

    def reference_of(self, kind: str) -> torch.Tensor:
        """(1, 3, H, W) normalised: what a removed pixel becomes."""
        return self.normalization.normalize(reference_image(self.normalization.denormalize(self.pixels), kind))

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, num_labels)."""
        with torch.no_grad():
            return self.explainer.classifier(pixels).logits

    def probability(self, pixels: torch.Tensor) -> list[float]:
        """Of the predicted class of the photograph, for (N, 3, H, W)."""
        return self.logits(pixels).softmax(-1)[:, int(self.target)].tolist()

    def picture(self, pixels: torch.Tensor) -> np.ndarray:
        """(1, 3, H, W) normalised -> (H, W, 3) RGB in [0, 1]."""
        return self.normalization.denormalize(pixels)[0].clamp(0, 1).permute(1, 2, 0).numpy()

    def masks(self, shares: tuple[float, ...]) -> torch.Tensor:
        """(1, S, H, W) of zeros and ones: the most important shares of the pixels."""
        flat = self.scores.flatten(1)
        counts = torch.tensor([round(share * flat.shape[1]) for share in shares])
        return hard_masks(flat, counts).unflatten(-1, self.scores.shape[-2:])


def draw_masks(explainer: AhaExplainer) -> Figure:
    """Deletion and insertion of one photograph at three shares, with the probability of its class."""
    photograph = Photograph(explainer, "english-springer.jpg")
    masks = photograph.masks(SHARES)
    figure, axes = plt.subplots(2, 1 + len(SHARES), figsize=(9, 5.2))
    show(axes[0, 0], photograph.picture(photograph.pixels), "photograph", photograph.probability(photograph.pixels)[0])
    show(axes[1, 0], np.asarray(heatmap(photograph.scores[0])), "importance by rank")
    for row, (name, make) in enumerate((("deletion", deletion_images), ("insertion", insertion_images))):
        perturbed = make(photograph.pixels, photograph.reference, masks)[0]
        values = photograph.probability(perturbed)
        for column, (share, value) in enumerate(zip(SHARES, values, strict=True), 1):
            done = "removed" if name == "deletion" else "shown"
            title = f"{name}: top {share:.0%} {done}"
            show(axes[row, column], photograph.picture(perturbed[column - 1 : column]), title, value)
    return figure


def draw_ranking(explainer: AhaExplainer) -> Figure:
    """Soft masks at three temperatures beside the hard one: as a function of the score, and on the photograph."""
    photograph = Photograph(explainer, "english-springer.jpg")
    flat = photograph.scores.flatten(1)
    standard, order = standardize(flat)[0].sort()
    masks = {
        f"soft, temperature {tau:g}": QuantileRanker()(flat, 100, torch.tensor([round(100 * CUT)]), tau=tau)[0, 0]
        for tau in TEMPERATURES
    }
    masks["hard"] = photograph.masks((CUT,))[0, 0].flatten()
    figure, axes = plt.subplots(
        1, 1 + len(masks), figsize=(10, 2.4), gridspec_kw={"width_ratios": [1.5, *[1] * len(masks)]}
    )
    for (name, mask), colour in zip(masks.items(), (BLUE, GREEN, ORANGE, INK), strict=True):
        axes[0].plot(standard, mask[order], color=colour, label=name, linewidth=1.6)
    axes[0].set(xlabel="standardised score of a pixel", ylabel="its mask", title=f"the top {CUT:.0%}")
    axes[0].legend(fontsize=7, loc="upper left", frameon=False)
    axes[0].spines[["top", "right"]].set_visible(False)
    for axis, (name, mask) in zip(axes[1:], masks.items(), strict=True):
        mask = mask.view(1, 1, *photograph.scores.shape[-2:])
        removed = deletion_images(photograph.pixels, photograph.reference, mask)[0]
        show(axis, photograph.picture(removed), name, photograph.probability(removed)[0])
    return figure


def draw_decoder(explainer: AhaExplainer) -> Figure:
    """The two parts that a score is the sum of: one from the patch grid, one that sees single pixels."""
    photograph = Photograph(explainer, "church.jpg")
    layer = explainer.decoder.grid_score
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    try:
        with torch.no_grad():
            for weight in layer.parameters():
                weight.zero_()
            fine = explainer(photograph.pixels, photograph.target).scores
    finally:
        layer.load_state_dict(kept)
    coarse = photograph.scores - fine
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.7))
    show(axes[0], photograph.picture(photograph.pixels), photograph.label)
    show(axes[1], np.asarray(heatmap(coarse[0])), "from the patch grid")
    show(axes[2], np.asarray(heatmap(fine[0])), "from features of the pixels")
    show(axes[3], np.asarray(heatmap(photograph.scores[0])), "their sum: the map")
    return figure


def draw_references(explainer: AhaExplainer) -> Figure:
    """The curves of one map under three references: the number depends on what a removed pixel becomes."""
    photograph = Photograph(explainer, "english-springer.jpg")
    figure = plt.figure(figsize=(8, 5.4))
    axes = figure.subplot_mosaic(
        [["deletion"] * 3 + ["insertion"] * 3, ["black"] * 2 + ["mean"] * 2 + ["blur"] * 2], height_ratios=[1, 1.05]
    )
    removed = photograph.masks((CUT,))
    for kind, colour in (("black", INK), ("mean", ORANGE), ("blur", BLUE)):
        reference = photograph.reference_of(kind)
        curves = deletion_insertion_curves(
            photograph.logits, photograph.pixels, reference, photograph.scores, photograph.target
        )
        for name in ("deletion", "insertion"):
            area = float(getattr(curves, f"{name}_auc"))
            label = f"{kind}: area {area:.2f}"
            axes[name].plot(curves.fractions, getattr(curves, name)[0], color=colour, label=label, linewidth=1.6)
        picture = deletion_images(photograph.pixels, reference, removed)[0]
        title = f"{kind}: top {CUT:.0%} removed"
        show(axes[kind], photograph.picture(picture), title, photograph.probability(picture)[0])
    for name, done in (("deletion", "removed"), ("insertion", "shown")):
        axes[name].set(title=f"{name} of one map", xlabel=f"share of the pixels {done}", ylim=(-0.02, 1.02))
        axes[name].legend(frameon=False)
        axes[name].spines[["top", "right"]].set_visible(False)
    axes["deletion"].set_ylabel(f"p({photograph.label})")
    return figure


def draw_refinement(explainer: AhaExplainer) -> Figure:
    """One map before and after ten steps of refinement, and the number that rose."""
    photograph = Photograph(explainer, "garbage-truck.jpg")
    refined = explainer.refine(photograph.pixels, steps=10)
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.8))
    show(axes[0], photograph.picture(photograph.pixels), photograph.label)
    show(axes[1], np.asarray(heatmap(photograph.scores[0])), f"one pass: {float(refined.initial_value):.2f}")
    title = f"{int(refined.passes):,} passes: {float(refined.value):.2f}"
    show(axes[2], np.asarray(heatmap(refined.scores[0])), title)
    return figure


def show(axis: plt.Axes, picture: np.ndarray, title: str, probability: float | None = None) -> None:
    """A picture without axes, its title above, the probability of the class below."""
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if probability is not None:
        axis.set_xlabel(f"p = {probability:.2f}", fontsize=9)


FIGURES = {
    "method-masks": draw_masks,
    "method-ranking": draw_ranking,
    "method-decoder": draw_decoder,
    "limits-references": draw_references,
    "refinement": draw_refinement,
}


def main() -> None:
    """Write every figure as a PNG beside the others of the documentation."""
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "figure.constrained_layout.use": True})
    explainer = AhaExplainer.from_pretrained(EXPLAINER).eval()
    for name, draw in FIGURES.items():
        figure = draw(explainer)
        # Without the version of matplotlib, so that the same picture is the same file.
        figure.savefig(IMAGES / f"{name}.png", dpi=130, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
