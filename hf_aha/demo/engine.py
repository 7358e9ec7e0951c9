"""The demo without its page: one explainer, asked by several people at once, every answer kept for a while."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ..baselines import METHODS, MissingLibraryError
from ..classifier_aha import UnsupportedClassifierError
from ..explanation import Explanation
from ..geometry import InputGeometry
from ..images import ImageSource, read_image
from ..metrics.curves import Curves, deletion_insertion_curves
from ..modeling_aha import AhaExplainer
from ..perturbation import Normalization, deletion_images, insertion_images, reference_image
from ..ranking import hard_ranks
from ..refinement import RefinementOutput
from .answers import MODES, Answer, ClassProbability, Comparison, Mode, OtherMap, Perturbed, Photograph
from .cache import LruCache
from .refining import refining


REFERENCES = ("blur", "black", "mean")
BASELINES = ("integrated-gradients-zero", "grad-cam")

LEAST_SHOWN_SIDE, SHOWN_SIDE = 512, 768
"""Least and greatest longer side, in pixels, of the photographs and maps that the demo draws."""

MAX_PIXELS = 50_000_000
"""Largest photograph taken, height x width: those of cameras fit, and decoding one needs 150 MB for a moment."""

# bfloat16 is tried for the perturbed images where one pass in float32 takes longer than this, and kept where it takes
# at most this share of the time.
_SLOW_PASS_SECONDS = 0.1
_WORTHWHILE = 0.7


class DemoEngine:
    """Answers the demo's questions about one explainer; several threads may ask at once.

    Maps are computed in the explainer's precision and equal those of `AhaExplainer.explain`. Questions that were
    answered before cost no pass of the classifier, except for `perturbed`, which always takes one.

    Args:
        explainer: with classifier and image processor, in eval mode.
        bfloat16: run the passes on perturbed images in bfloat16. `"auto"` decides in `warm_up`, by the clock, and only
            where float32 is too slow for a slider; until then, and for small models, they run as the maps do.
        cache_size: answers kept.
        max_pixels: largest photograph, height x width.
        baselines: names of the methods that `compare` shows.

    Raises:
        RuntimeError: the explainer has no classifier or no image processor.
        ValueError: there is no such method.

    Example:
        >>> engine = DemoEngine(AhaExplainer.from_pretrained("imagenette-demo"))  # doctest: +SKIP
        >>> photograph = engine.read("photo.jpg")  # doctest: +SKIP
        >>> answer = engine.explain(photograph)  # doctest: +SKIP
        >>> engine.perturbed(answer, 0.2).probability  # without the most important fifth  # doctest: +SKIP
        0.13
    """

    def __init__(
        self,
        explainer: AhaExplainer,
        *,
        bfloat16: bool | Literal["auto"] = "auto",
        cache_size: int = 48,
        max_pixels: int = MAX_PIXELS,
        baselines: Sequence[str] = BASELINES,
    ) -> None:
        if explainer.classifier is None or explainer.image_processor is None:
            raise RuntimeError(
                "The demo needs an explainer with its classifier and image processor; load it with "
                "AhaExplainer.from_pretrained, or attach them."
            )
        for name in baselines:
            if name not in METHODS:
                raise ValueError(f"Unknown method {name!r}; the methods are {', '.join(METHODS)}.")
        self.explainer = explainer
        self.max_pixels = max_pixels
        self.baselines = tuple(baselines)
        self.bfloat16 = bfloat16 is True
        self._decide = bfloat16 == "auto"
        self._normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
        self._first_looks: LruCache[tuple[torch.Tensor, Answer]] = LruCache(cache_size)
        self._answers: LruCache[Answer] = LruCache(cache_size)
        self._curves: LruCache[Curves] = LruCache(4 * cache_size)
        self._references: LruCache[torch.Tensor] = LruCache(cache_size)
        self._comparisons: LruCache[Comparison] = LruCache(cache_size)

    @property
    def labels(self) -> list[str]:
        """The classifier's labels by class index."""
        return [self.explainer.config.id2label[index] for index in range(self.explainer.config.num_labels)]

    def warm_up(self) -> None:
        """Answer about a grey picture, so that the first visitor does not pay for what is loaded on first use."""
        answer = self.explain(self.read(Image.new("RGB", (64, 64), "grey")))
        self.perturbed(answer, 0.5)
        answer.explanation.overlay()
        if not self._decide or self.explainer.device.type != "cpu":
            return
        seconds = self._seconds_a_pass(answer.photograph.pixel_values)
        if seconds > _SLOW_PASS_SECONDS:
            self.bfloat16 = True
            self.bfloat16 = self._seconds_a_pass(answer.photograph.pixel_values) <= _WORTHWHILE * seconds

    # ----------------------------------------------------------------------------------------------------- questions

    def read(self, source: ImageSource) -> Photograph:
        """Read and prepare a photograph; of the original only what the classifier sees is kept.

        Raises:
            ImageReadError: it is no image, damaged, or larger than `max_pixels`.
        """
        image = read_image(source, max_pixels=self.max_pixels)
        pixel_values = self.explainer.image_processor([image], return_tensors="pt")["pixel_values"]
        size = (image.height, image.width)
        geometry = InputGeometry.from_processor(self.explainer.image_processor, size)
        shown = image
        if not LEAST_SHOWN_SIDE <= max(size) <= SHOWN_SIDE:
            scale = (SHOWN_SIDE if max(size) > SHOWN_SIDE else LEAST_SHOWN_SIDE) / max(size)
            shown_size = tuple(max(round(side * scale), 1) for side in image.size)
            shown = image.resize(shown_size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        digest = hashlib.sha256(np.ascontiguousarray(pixel_values.numpy()))
        digest.update(f"{size} {tuple(pixel_values.shape)}".encode())
        return Photograph(digest.hexdigest(), shown, pixel_values.to(self.explainer.device), geometry)

    def classify(self, photograph: Photograph, top: int = 5) -> list[ClassProbability]:
        """The most probable classes, the first one first; all of them if there are fewer than `top`."""
        probability, _ = self._first_look(photograph)
        best = probability.topk(min(top, len(probability)))
        return [
            ClassProbability(index, self.explainer.config.id2label[index], value)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def explain(
        self, photograph: Photograph, target: int | str | None = None, *, against: int | str | None = None
    ) -> Answer:
        """The map of a class, or of one class rather than another.

        Args:
            photograph: of `read`.
            target: index or label; the predicted class when left out, or with `against` the most probable class other
                than that.
            against: index or label of the class to compare with.

        Raises:
            ValueError: there is no such class (near labels are suggested), or it is compared with itself.
        """
        target, against = (None if given is None else self.explainer.class_index(given) for given in (target, against))
        if target is not None and target == against:
            raise ValueError(f"The class {self.labels[target]!r} is compared with itself: choose two classes.")
        _, predicted = self._first_look(photograph)
        if against is None and target in (None, predicted.explanation.target):
            return predicted
        if target is None:
            target = next(found.index for found in self.classify(photograph, 2) if found.index != against)
        key = (photograph.digest, target, against, 0)
        return self._answers.get_or_make(key, lambda: self._explain(photograph, target, against)[1])

    @torch.no_grad()
    def perturbed(self, answer: Answer, share: float, mode: Mode = "deletion", reference: str = "blur") -> Perturbed:
        """The photograph without its most important pixels, or with only these, and the probability left.

        Pixels are those of the classifier's input, as in the curves and the metrics: `round(share * pixels)` of them,
        ties by index. The picture shows the same input.

        Args:
            answer: of `explain` or `refine`.
            share: of the pixels, 0..1.
            mode: `"deletion"` removes them, `"insertion"` shows only them.
            reference: what a removed pixel becomes: `"blur"`, `"black"` or `"mean"`.

        Raises:
            ValueError: the share, mode or reference is none of these.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie between 0 and 1, but it is {share}.")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
        blank = self._reference(answer.photograph, reference)
        image = answer.photograph.pixel_values
        mask = (answer.ranks < round(share * len(answer.ranks))).view(1, 1, *answer.scores.shape).to(image.dtype)
        perturb = deletion_images if mode == "deletion" else insertion_images
        pixels = perturb(image, blank, mask)[:, 0]
        probability = self._logits(pixels).softmax(-1)[0].tolist()
        against = answer.explanation.against
        rgb = self._normalization.denormalize(pixels[0].float().cpu()).clamp(0, 1)
        picture = Image.fromarray((rgb * 255).round().byte().permute(1, 2, 0).numpy())
        return Perturbed(
            picture,
            probability[answer.explanation.target],
            None if against is None else probability[against],
        )

    def curves(self, answer: Answer, reference: str = "blur") -> Curves:
        """Both curves at 21 shares: of the probability, or of its lead over the class compared with.

        Raises:
            ValueError: there is no such reference.
        """
        blank = self._reference(answer.photograph, reference)
        device = answer.photograph.pixel_values.device
        target, against = (
            None if index is None else torch.tensor([index], device=device)
            for index in (answer.explanation.target, answer.explanation.against)
        )
        return self._curves.get_or_make(
            (answer.key, reference),
            lambda: deletion_insertion_curves(
                self._logits,
                answer.photograph.pixel_values,
                blank,
                answer.scores[None].to(device),
                target,
                against=against,
            ),
        )

    def known_curves(self, answer: Answer, reference: str) -> Curves | None:
        """What `curves` would answer at once, or None where it would have to measure."""
        return self._curves.get((answer.key, reference))

    def refine(self, answer: Answer, steps: int = 10) -> Answer:
        """The refined map; its `explanation.refinement` says what it gained and cost.

        Raises:
            ValueError: the number of steps is not positive.
        """
        *_, refined = self.refining(answer, steps)
        return refined

    def refining(self, answer: Answer, steps: int = 10) -> Iterator[int | Answer]:
        """As `refine`, but yields the number of updates made so far, several times a second, and last the answer.

        Closing the generator ends the work.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, but it is {steps!r}.")
        question = answer.explanation
        key = (answer.photograph.digest, question.target, question.against, steps)
        refined = self._answers.get(key)
        if refined is None:
            pixel_values = answer.photograph.pixel_values
            for found in refining(self.explainer, pixel_values, question.target, question.against, steps=steps):
                if isinstance(found, int):
                    yield found
                else:
                    refined = self._refined(answer, found, steps)
            self._answers.put(key, refined)
        yield refined

    def compare(self, answer: Answer) -> Comparison:
        """The same class explained by other methods, and a sentence for each that cannot be had here."""
        key = (answer.photograph.digest, answer.explanation.target)
        found = self._comparisons.get(key)
        if found is None or found.missing:  # what was missing may have been installed
            found = self._compare(answer)
            self._comparisons.put(key, found)
        return found

    # ---------------------------------------------------------------------------------------------------------- work

    def _first_look(self, photograph: Photograph) -> tuple[torch.Tensor, Answer]:
        """Probabilities (C,), float32 on the CPU, and the map of the predicted class: both from one forward."""
        return self._first_looks.get_or_make(photograph.digest, lambda: self._explain(photograph, None, None))

    @torch.no_grad()
    def _explain(self, photograph: Photograph, target: int | None, against: int | None) -> tuple[torch.Tensor, Answer]:
        output = self.explainer(photograph.pixel_values, target, against=against)
        probability = output.logits[0].float().softmax(-1).cpu()
        classes = int(output.target[0]), against
        return probability, self._answer(photograph, output.scores[0], probability, classes)

    def _answer(
        self,
        photograph: Photograph,
        scores: torch.Tensor,
        probability: torch.Tensor,
        classes: tuple[int, int | None],
        refinement: dict[str, int | float] | None = None,
        steps: int = 0,
    ) -> Answer:
        (target, against), predicted, labels = classes, int(probability.argmax()), self.labels
        scores = scores.detach().float()
        explanation = Explanation(
            image=photograph.shown,
            target=target,
            label=labels[target],
            probability=float(probability[target]),
            predicted_target=predicted,
            predicted_label=labels[predicted],
            predicted_probability=float(probability[predicted]),
            scores=photograph.to_shown(scores.cpu()),
            against=against,
            against_label=None if against is None else labels[against],
            against_probability=None if against is None else float(probability[against]),
            refinement=refinement,
        )
        key = (photograph.digest, target, against, steps)
        return Answer(photograph, explanation, scores.cpu(), hard_ranks(scores.flatten()[None])[0], key)

    def _refined(self, answer: Answer, found: RefinementOutput, steps: int) -> Answer:
        facts = {"steps": found.steps_taken, "passes": found.passes, "value": found.value}
        facts |= {"initial_value": found.initial_value, "gain": found.gain}
        return self._answer(
            answer.photograph,
            found.scores[0],
            found.logits[0].float().softmax(-1).cpu(),
            (answer.explanation.target, answer.explanation.against),
            {name: fact[0].item() for name, fact in facts.items()},
            steps,
        )

    def _seconds_a_pass(self, images: torch.Tensor) -> float:
        """The least of three, since others may keep the machine busy; the first one may also compile."""
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            self._logits(images)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def _compare(self, answer: Answer) -> Comparison:
        classifier, photograph = self.explainer.classifier, answer.photograph
        target = torch.tensor([answer.explanation.target], device=photograph.pixel_values.device)
        maps, missing = [], []
        for name in self.baselines:
            method = METHODS[name]
            passes = method.passes(classifier.grid(*answer.scores.shape), classifier.hidden_size)
            start = time.perf_counter()
            try:
                scores = method(classifier, photograph.pixel_values, target)[0]
            except (MissingLibraryError, UnsupportedClassifierError) as error:
                missing.append(str(error))
                continue
            seconds = time.perf_counter() - start
            maps.append(OtherMap(name, method.title, photograph.to_shown(scores.cpu()), *passes, seconds))
        return Comparison(tuple(maps), tuple(missing))

    def _reference(self, photograph: Photograph, kind: str) -> torch.Tensor:
        """(1, 3, h, w), normalised."""
        if kind not in REFERENCES:
            raise ValueError(f"reference is {kind!r}; it must be one of {', '.join(REFERENCES)}.")

        def make() -> torch.Tensor:
            rgb = self._normalization.denormalize(photograph.pixel_values.float())
            return self._normalization.normalize(reference_image(rgb, kind)).to(photograph.pixel_values.dtype)

        return self._references.get_or_make((photograph.digest, kind), make)

    @torch.no_grad()
    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        """(N, C) float32 of perturbed images."""
        device = images.device.type
        context = torch.autocast(device, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()
        with context:
            return self.explainer.classifier(images).logits.float()
