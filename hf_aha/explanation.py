"""From photographs to explanations in the photographs' own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .geometry import InputGeometry
from .images import ImageSource, read_image
from .modeling_aha import AhaExplainer, AhaOutput
from .visualization import explanation_sheet, heatmap, overlay


# Compared by identity: arrays have no single truth value.
@dataclass(frozen=True, eq=False)
class Explanation:
    """Why the classifier gave one class to one photograph.

    Attributes:
        image: the photograph, upright, RGB.
        target: index of the class explained.
        label: its name.
        probability: its softmax probability, 0..1.
        predicted_target, predicted_label, predicted_probability: the same of the most probable class.
        scores: (H, W) float32 in the photograph's own pixels; higher = more important, only the order counts; NaN
            where the classifier did not look (outside its crop).
        refinement: None, or what test-time refinement did to the map: `steps`, `passes` of the classifier, `value`
            (insertion area minus deletion area) and `initial_value` without it, and `gain`, their difference.
    """

    image: Image.Image
    target: int
    label: str
    probability: float
    predicted_target: int
    predicted_label: str
    predicted_probability: float
    scores: np.ndarray
    refinement: dict[str, int | float] | None = None

    @property
    def title(self) -> str:
        """Class and probability, and the predicted class where another one is explained."""
        title = f"{self.label}  {self.probability:.1%}"
        if self.target != self.predicted_target:
            title += f"  (predicted: {self.predicted_label}  {self.predicted_probability:.1%})"
        return title

    def heatmap(self) -> Image.Image:
        """The map alone, coloured by rank, at the photograph's size."""
        return heatmap(self.scores)

    def overlay(self, opacity: float = 0.6) -> Image.Image:
        """The map over the photograph, at the photograph's size."""
        return overlay(self.image, self.scores, opacity=opacity)

    def sheet(self) -> Image.Image:
        """Photograph, map and overlay side by side under the title."""
        return explanation_sheet(self.image, self.scores, self.title)


@torch.no_grad()
def explain(
    explainer: AhaExplainer,
    images: ImageSource | Sequence[ImageSource],
    target: int | str | Sequence[int | str] | torch.Tensor | None = None,
    *,
    top_k: int = 1,
    batch_size: int = 8,
    refine: int = 0,
) -> Explanation | list[Explanation] | list[list[Explanation]]:
    """The work behind [`AhaExplainer.explain`], where arguments, results and errors are described."""
    if explainer.image_processor is None:
        raise RuntimeError(
            "The explainer has no image processor; give it with attach(classifier, image_processor=...)."
        )
    single = not isinstance(images, (list, tuple))
    sources = [images] if single else list(images)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but it is {batch_size}.")
    if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
        raise ValueError(f"refine must be a number of steps, 0 or more, but it is {refine!r}.")
    if not 1 <= top_k <= explainer.config.num_labels:
        raise ValueError(
            f"top_k must lie in 1..{explainer.config.num_labels}, the number of classes, but it is {top_k}."
        )
    if top_k > 1 and target is not None:
        raise ValueError("Give either target or top_k, not both.")
    targets = _targets(explainer, target, len(sources))
    results: list[Any] = []
    for start in range(0, len(sources), batch_size):
        photographs = [read_image(source) for source in sources[start : start + batch_size]]
        wanted = None if targets is None else targets[start : start + batch_size]
        results += _explain_batch(explainer, photographs, wanted, top_k, refine)
    if top_k == 1:
        results = [explanations[0] for explanations in results]
    return results[0] if single else results


def _explain_batch(
    explainer: AhaExplainer, photographs: list[Image.Image], targets: list[int] | None, top_k: int, refine: int
) -> list[list[Explanation]]:
    # One by one: processors that keep the aspect ratio give inputs of several sizes, which no batch can hold.
    inputs = [explainer.image_processor([image], return_tensors="pt")["pixel_values"] for image in photographs]
    if len({pixel_values.shape for pixel_values in inputs}) > 1:
        return [
            _explain_batch(explainer, [image], None if targets is None else [targets[row]], top_k, refine)[0]
            for row, image in enumerate(photographs)
        ]
    pixel_values = torch.cat(inputs).to(explainer.device)
    refinements: list[dict[str, int | float] | None] = [None] * (len(pixel_values) * top_k)
    if refine:
        target = None if targets is None else torch.tensor(targets, device=explainer.device)
        output, refinements = refined_maps(explainer, pixel_values, target, top_k, refine)
    elif targets is not None:
        output = explainer(pixel_values, torch.tensor(targets, device=explainer.device)[:, None])
    elif top_k == 1:
        output = explainer(pixel_values)
        output.scores, output.target = output.scores[:, None], output.target[:, None]
    else:
        output = explainer.explain_top(pixel_values, top_k)
    probability = output.logits.float().softmax(-1).cpu()
    classes, scores = output.target.cpu(), output.scores.float().cpu()
    return [
        [
            _explanation(
                explainer,
                photograph,
                int(index),
                probability[row],
                scores[row, place],
                refinements[row * top_k + place],
            )
            for place, index in enumerate(classes[row])
        ]
        for row, photograph in enumerate(photographs)
    ]


def refined_maps(
    explainer: AhaExplainer, pixel_values: torch.Tensor, target: torch.Tensor | None, top_k: int, steps: int
) -> tuple[AhaOutput, list[dict[str, int | float]]]:
    """Refined maps, and for each of the B * top_k maps, image by image, what refinement did.

    Args:
        explainer: with a classifier attached.
        pixel_values: (B, 3, h, w) as the classifier's image processor makes them.
        target: (B,) classes; left out, the `top_k` most probable ones of each image.
        top_k: 1 where `target` is given.
        steps: most updates a map.

    Returns:
        scores (B, top_k, h, w), logits (B, C) and target (B, top_k); and the facts `steps`, `passes`, `value`,
        `initial_value` and `gain` of [`RefinementOutput`].
    """
    if top_k > 1:
        target = explainer.explain_top(pixel_values, top_k).target.flatten()
        pixel_values = pixel_values.repeat_interleave(top_k, dim=0)
    refined = explainer.refine(pixel_values, target, steps=steps)
    facts = {"steps": refined.steps_taken, "passes": refined.passes, "value": refined.value}
    facts |= {"initial_value": refined.initial_value, "gain": refined.gain}
    scores, target = (tensor.unflatten(0, (-1, top_k)) for tensor in (refined.scores, refined.target))
    output = AhaOutput(scores=scores, logits=refined.logits[::top_k], target=target)
    return output, [{name: fact[row].item() for name, fact in facts.items()} for row in range(len(pixel_values))]


def _explanation(
    explainer: AhaExplainer,
    photograph: Image.Image,
    target: int,
    probability: torch.Tensor,
    scores: torch.Tensor,
    refinement: dict[str, int | float] | None,
) -> Explanation:
    geometry = InputGeometry.from_processor(explainer.image_processor, (photograph.height, photograph.width))
    predicted = int(probability.argmax())
    labels = explainer.config.id2label
    return Explanation(
        image=photograph,
        target=target,
        label=labels[target],
        probability=float(probability[target]),
        predicted_target=predicted,
        predicted_label=labels[predicted],
        predicted_probability=float(probability[predicted]),
        scores=geometry.to_original(scores).numpy(),
        refinement=refinement,
    )


def _targets(explainer: AhaExplainer, target: Any, count: int) -> list[int] | None:
    """One class index an image, or None for the predicted classes."""
    if target is None:
        return None
    if isinstance(target, (torch.Tensor, np.ndarray)):
        target = target.tolist()
    if isinstance(target, str) or not isinstance(target, Sequence):
        target = [target] * count
    if len(target) != count:
        raise ValueError(f"target lists {len(target)} classes for {count} images; give one for all, or one an image.")
    return [explainer.class_index(item) for item in target]
