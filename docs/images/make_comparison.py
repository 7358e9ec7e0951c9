#!/usr/bin/env python
"""Draw the picture at the top of the README: photographs, and what four methods say of the predicted class.

.venv-bench/bin/python docs/images/make_comparison.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

import hf_aha
from hf_aha import AhaExplainer, read_image
from hf_aha.baselines import get_method
from hf_aha.visualization import heatmap


PHOTOGRAPHS = ("golf-ball.jpg", "english-springer.jpg", "church.jpg")
BASELINES = {
    "Integrated gradients": ("integrated-gradients-blur", {"steps": 16}),
    "Grad-CAM": ("grad-cam", {}),
}


def maps_of(explainer: AhaExplainer, name: str) -> tuple[str, list[tuple[str, object]]]:
    """The predicted label of a bundled photograph, and titled pictures of its map by every method."""
    image = read_image(Path(hf_aha.__file__).parent / "bundled" / "photographs" / name)
    pixels = explainer.image_processor([image], return_tensors="pt")["pixel_values"]
    output = explainer(pixels)
    found = [("AHA\n1 forward pass", output.scores[0].detach())]
    for title, (method_name, settings) in BASELINES.items():
        method = get_method(method_name, **settings)
        passes = method.passes()
        cost = f"{passes.forward} forward, {passes.backward} backward"
        found.append((f"{title}\n{cost}", method(explainer.classifier, pixels, output.target)[0]))
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    label = explainer.config.id2label[int(output.target[0])]
    return label, [("", square), *((title, heatmap(scores.numpy())) for title, scores in found)]


def main() -> None:
    """Write `comparison.png` beside this script."""
    matplotlib.use("Agg")
    explainer = AhaExplainer.from_pretrained("imagenette-demo", dtype="float32")
    rows = [maps_of(explainer, name) for name in PHOTOGRAPHS]
    columns = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), columns, figsize=(3 * columns, 3.3 * len(rows)), layout="constrained")
    for row, (label, pictures) in zip(axes, rows, strict=True):
        for axis, (title, picture) in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.axis("off")
            axis.set_title(title or label, fontsize=11)
    figure.savefig(Path(__file__).parent / "comparison.png", dpi=80)


if __name__ == "__main__":
    main()
