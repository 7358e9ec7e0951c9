"""From photographs to explanations in the photographs' own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from .geometry import InputGeometry
from .images import ImageSource, read_image
from .modeling_aha import AhaExplainer, AhaOutput
from .visualization import explanation_sheet, heatmap, overlay, rank_map


Sign = Literal["positive", "negative", "both"]


# Compared by identity: arrays have no single truth value.
@dataclass(frozen=True, eq=False)
class Explanation:
    """Why the classifier gave one class to one photograph, or gave it that class rather than another.

    Attributes:
        image: the photograph, upright, RGB.
        target: index of the class explained.
        label: its name.
        probability: its softmax probability, 0..1.
        predicted_target, predicted_label, predicted_probability: the same of the most probable class.
        scores: (H, W) float32 in the photograph's own pixels; higher = more important, only the order counts; NaN
            where the classifier did not look (outside its crop).
        against, against_label, against_probability: None, or the class it was compared with. High scores then speak
            for `target` rather than this class, low ones for this class rather than `target`.
        refinement: None, or what test-time refinement did to the map: `steps`, `passes` of the classifier, `value`
            (insertion area minus deletion area) and `initial_value` without it, and `gain`, their difference.

    Example:
        >>> from hf_aha import AhaExplainer
        >>> explainer = AhaExplainer.from_pretrained("imagenette-demo")  # doctest: +SKIP
        >>> explanation = explainer.explain("photo.jpg", "golf ball", against="parachute")  # doctest: +SKIP
        >>> explanation.title  # doctest: +SKIP
        'golf ball  92.1% rather than parachute  4.0%'
        >>> explanation.overlay(sign="both").save("rather-than.png")  # doctest: +SKIP
    """

    image: Image.Image
    target: int
    label: str
    probability: float
    predicted_target: int
    predicted_label: str
    predicted_probability: float
    scores: np.ndarray
    against: int | None = None
    against_label: str | None = None
    against_probability: float | None = None
    refinement: dict[str, int | float] | None = None

    @property
    def title(self) -> str:
        """Class and probability, the class it is compared with, and the predicted class where another is explained."""
        title = f"{self.label}  {self.probability:.1%}"
        if self.against is not None:
            title += f" rather than {self.against_label}  {self.against_probability:.1%}"
        if self.target != self.predicted_target:
            title += f"  (predicted: {self.predicted_label}  {self.predicted_probability:.1%})"
        return title

    def heatmap(self) -> Image.Image:
        """The map alone, coloured by rank, at the photograph's size."""
        return heatmap(self.scores)

    def overlay(self, opacity: float = 0.6, sign: Sign = "positive") -> Image.Image:
        """The map over the photograph, at the photograph's size.

        Args:
            opacity: 0 shows the photograph in grey only, 1 the colours in full.
            sign: `"positive"` colours what speaks for the class, `"negative"` the other end of the map, what speaks
                against it, and `"both"` both ends in two colours.
        """
        return overlay(self.image, self.scores, opacity=opacity, sign=sign)

    def sheet(self, sign: Sign | None = None) -> Image.Image:
        """Photograph, map and overlay side by side under the title.

        Args:
            sign: as in `overlay`; left out, `"both"` where the class is compared with another, else `"positive"`.
        """
        if sign is None:
            sign = "positive" if self.against is None else "both"
        return explanation_sheet(self.image, self.scores, self.title, sign=sign)

    def evidence_for(self, share: float = 0.1) -> np.ndarray:
        """(H, W) bool: the most important share of the pixels that the classifier saw; with equal scores, fewer.

        Raises:
            ValueError: the share is not within 0..1.
        """
        return self._end(self.scores, share)

    def evidence_against(self, share: float = 0.1) -> np.ndarray:
        """(H, W) bool: the least important share of the pixels that the classifier saw; with equal scores, fewer.

        The low end of the map: pixels that, shown last, add least to the class's probability or take from it. Where
        the class is compared with another (`against`), they are what speaks for that one rather than this one. The
        map is an order and not an amount, so there is such an end also where nothing speaks against the class.

        Raises:
            ValueError: the share is not within 0..1.
        """
        return self._end(-self.scores, share)

    @staticmethod
    def _end(scores: np.ndarray, share: float) -> np.ndarray:
        if not 0 < share < 1:
            raise ValueError(f"share must lie between 0 and 1, but it is {share}.")
        # Comparing with NaN is False.
        return rank_map(scores) > 1 - share


@torch.no_grad()
def explain(
    explainer: AhaExplainer,
    images: ImageSource | Sequence[ImageSource],
    target: int | str | Sequence[int | str] | torch.Tensor | None = None,
    *,
    against: int | str | Sequence[int | str] | torch.Tensor | None = None,
    top_k: int = 1,
    batch_size: int = 8,
    refine: int = 0,
    adaptive: bool = False,
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
    check_refinement(refine, adaptive)
    if not 1 <= top_k <= explainer.config.num_labels:
        raise ValueError(
            f"top_k must lie in 1..{explainer.config.num_labels}, the number of classes, but it is {top_k}."
        )
    if top_k > 1 and target is not None:
        raise ValueError("Give either target or top_k, not both.")
    if top_k > 1 and against is not None:
        raise ValueError("Give either against or top_k, not both.")
    targets = _classes(explainer, "target", target, len(sources))
    others = _classes(explainer, "against", against, len(sources))
    for row, (one, other) in enumerate(zip(targets or (), others or (), strict=False)):
        if one == other:
            raise ValueError(
                f"Class {one} ({explainer.config.id2label[one]}) of image {row} is compared with itself: target and "
                "against must be two classes."
            )
    results: list[Any] = []
    for start in range(0, len(sources), batch_size):
        photographs = [read_image(source) for source in sources[start : start + batch_size]]
        rows = slice(start, start + batch_size)
        wanted, compared = (None if classes is None else classes[rows] for classes in (targets, others))
        results += _explain_batch(explainer, photographs, wanted, compared, top_k, refine, adaptive)
    if top_k == 1:
        results = [explanations[0] for explanations in results]
    return results[0] if single else results


def _explain_batch(
    explainer: AhaExplainer,
    photographs: list[Image.Image],
    targets: list[int] | None,
    others: list[int] | None,
    top_k: int,
    refine: int,
    adaptive: bool,
) -> list[list[Explanation]]:
    # One by one: processors that keep the aspect ratio give inputs of several sizes, which no batch can hold.
    inputs = [explainer.image_processor([image], return_tensors="pt")["pixel_values"] for image in photographs]
    if len({pixel_values.shape for pixel_values in inputs}) > 1:
        return [
            _explain_batch(
                explainer,
                [image],
                *(None if classes is None else [classes[row]] for classes in (targets, others)),
                top_k,
                refine,
                adaptive,
            )[0]
            for row, image in enumerate(photographs)
        ]
    pixel_values = torch.cat(inputs).to(explainer.device)
    refinements: list[dict[str, int | float] | None] = [None] * (len(pixel_values) * top_k)
    target, against = (
        None if classes is None else torch.tensor(classes, device=explainer.device) for classes in (targets, others)
    )
    if refine:
        output, refinements = refined_maps(
            explainer, pixel_values, target, top_k, refine, against=against, adaptive=adaptive
        )
    else:
        output = plain_maps(explainer, pixel_values, target, top_k, against=against)
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
                None if output.against is None else int(output.against[row, place]),
                refinements[row * top_k + place],
            )
            for place, index in enumerate(classes[row])
        ]
        for row, photograph in enumerate(photographs)
    ]


def check_refinement(refine: int, adaptive: bool) -> None:
    """Raises ValueError: no number of steps, or `adaptive` without any."""
    if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
        raise ValueError(f"refine must be a number of steps, 0 or more, but it is {refine!r}.")
    if not isinstance(adaptive, bool):
        raise ValueError(f"adaptive must be True or False, but it is {adaptive!r}.")
    if adaptive and not refine:
        raise ValueError("adaptive is about refinement, but refine is 0; give the number of steps, as in refine=10.")


def plain_maps(
    explainer: AhaExplainer,
    pixel_values: torch.Tensor,
    target: torch.Tensor | None,
    top_k: int,
    *,
    against: torch.Tensor | None = None,
) -> AhaOutput:
    """Maps without refinement; arguments and result as in `refined_maps`."""
    if top_k > 1:
        return explainer.explain_top(pixel_values, top_k)
    # Where no other class is meant, the forward of a repository's older code will do.
    output = explainer(pixel_values, target, **({} if against is None else {"against": against}))
    others = None if against is None else output.against[:, None]
    return AhaOutput(
        scores=output.scores[:, None], logits=output.logits, target=output.target[:, None], against=others
    )


def refined_maps(
    explainer: AhaExplainer,
    pixel_values: torch.Tensor,
    target: torch.Tensor | None,
    top_k: int,
    steps: int,
    *,
    against: torch.Tensor | None = None,
    adaptive: bool = False,
) -> tuple[AhaOutput, list[dict[str, int | float]]]:
    """Refined maps, and for each of the B * top_k maps, image by image, what refinement did.

    Args:
        explainer: with a classifier attached.
        pixel_values: (B, 3, h, w) as the classifier's image processor makes them.
        target: (B,) classes; left out, the `top_k` most probable ones of each image.
        top_k: 1 where `target` or `against` is given.
        steps: most updates a map.
        against: (B,) classes to compare with.
        adaptive: as in [`refine`].

    Returns:
        scores (B, top_k, h, w), logits (B, C), target (B, top_k) and against, of that shape; and the facts `steps`,
        `passes`, `value`, `initial_value` and `gain` of [`RefinementOutput`].
    """
    if top_k > 1:
        target = explainer.explain_top(pixel_values, top_k).target.flatten()
        pixel_values = pixel_values.repeat_interleave(top_k, dim=0)
    refined = explainer.refine(pixel_values, target, against=against, steps=steps, adaptive=adaptive)
    facts = {"steps": refined.steps_taken, "passes": refined.passes, "value": refined.value}
    facts |= {"initial_value": refined.initial_value, "gain": refined.gain}
    scores, target = (tensor.unflatten(0, (-1, top_k)) for tensor in (refined.scores, refined.target))
    against = None if refined.against is None else refined.against[:, None]
    output = AhaOutput(scores=scores, logits=refined.logits[::top_k], target=target, against=against)
    return output, [{name: fact[row].item() for name, fact in facts.items()} for row in range(len(pixel_values))]


def _explanation(
    explainer: AhaExplainer,
    photograph: Image.Image,
    target: int,
    probability: torch.Tensor,
    scores: torch.Tensor,
    against: int | None,
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
        against=against,
        against_label=None if against is None else labels[against],
        against_probability=None if against is None else float(probability[against]),
        refinement=refinement,
    )


def _classes(explainer: AhaExplainer, name: str, classes: Any, count: int) -> list[int] | None:
    """One class index an image, or None where none is given."""
    if classes is None:
        return None
    if isinstance(classes, (torch.Tensor, np.ndarray)):
        classes = classes.tolist()
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        classes = [classes] * count
    if len(classes) != count:
        raise ValueError(f"{name} lists {len(classes)} classes for {count} images; give one for all, or one an image.")
    return [explainer.class_index(item) for item in classes]
