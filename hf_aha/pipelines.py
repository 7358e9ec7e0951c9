"""The task "visual-attribution" of `transformers.pipeline`, which knows it once this module is imported."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .explanation import check_refinement, plain_maps, refined_maps
from .geometry import InputGeometry
from .images import ImageReadError, ImageSource, read_image
from .modeling_aha import AhaExplainer, AhaOutput
from .visualization import overlay as draw_overlay
from .visualization import rank_map


TASK = "visual-attribution"
_OUTPUTS = ("logits", "target", "scores", "photograph")
_REFINEMENT = "refinement"
_AGAINST = "against"


class VisualAttributionPipeline(Pipeline):
    """Explains photographs, singly or in streams, with the batching and the workers of transformers' pipelines.

    Args:
        model: the explainer, with its classifier and image processor.
        device: moves the explainer there; it stays where it is when left out.
        dtype: what the explainer is in; another one is refused, not cast.
        local_files_only: `transformers.pipeline` hands it on after the loading; no effect here.
        **parameters: defaults for every call, as there: `target`, `against`, `top_k`, `refine`, `adaptive`,
            `overlay`, `batch_size`, `num_workers`.

    Raises:
        TypeError: the model is no explainer; a parameter does not exist.
        ValueError: the explainer is in another dtype; and as in a call.
        RuntimeError: the explainer has no image processor.

    Example:
        >>> from transformers import pipeline
        >>> import hf_aha.pipelines
        >>> attribute = pipeline("visual-attribution", model="path/to/explainer")  # doctest: +SKIP
        >>> result = attribute("photo.jpg", target="church")  # doctest: +SKIP
        >>> result["label"], result["scores"].shape  # doctest: +SKIP
        ('church', (480, 640))
    """

    # The explainer brings its own image processor.
    _load_processor = _load_image_processor = _load_feature_extractor = _load_tokenizer = False

    def __init__(
        self,
        model: AhaExplainer,
        *,
        device: int | str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        local_files_only: bool = False,
        **parameters: Any,
    ):
        # By its config, because an explainer loaded as custom code of the Hub is of another class.
        if getattr(getattr(model, "config", None), "model_type", None) != "aha":
            raise TypeError(
                f"The task {TASK} needs an AhaExplainer, not {type(model).__name__}; "
                "train one for a classifier with AhaExplainer.from_classifier(...)."
            )
        if model.image_processor is None:
            raise RuntimeError("The explainer has no image processor; give it with attach(..., image_processor=...).")
        if str(dtype).removeprefix("torch.") not in ("None", "auto", str(model.dtype).removeprefix("torch.")):
            raise ValueError(
                f"The explainer is in {model.dtype}, not {dtype}; cast it with explainer.to(...), "
                "or give the name of an explainer, which is then loaded in that dtype."
            )
        if device is None and getattr(model, "hf_device_map", None) is None:
            device = model.device
        parameters = {"task": TASK, **parameters}
        super().__init__(model=model, image_processor=model.image_processor, device=device, **parameters)

    def __call__(self, inputs: ImageSource | Iterable[ImageSource], **parameters: Any) -> Any:
        """Explain one photograph, a list of them, or a stream.

        Args:
            inputs: whatever `read_image` reads, or a list or tuple of that, a column of a `datasets` dataset, a torch
                dataset such as `KeyDataset`, or any iterator.
            **parameters: `target`, class index or label to explain in all photographs, the predicted class of each
                when left out; `against`, class index or label: explain why the target rather than this class, or,
                without a target, why the most probable class other than this one; `top_k`, explain this many of the
                most probable classes instead; `refine`, steps of test-time refinement on each map, which cost many
                more passes (default: 0); `adaptive`, with `refine`: spend these passes where they bring most (default:
                False); `overlay`, draw the map over the photograph (default: True); `batch_size`,
                photographs a forward pass (default: 1); `num_workers`, processes that read and prepare them
                (default: 0). A `target`, `against` or `top_k` given here replaces all three of the constructor's.

        Returns:
            for one photograph one dict, or with `top_k` > 1 a list of them, most probable class first; for a list or
            tuple a list of these; for everything else an iterator, which reads as it goes. The dicts hold `label`,
            `score` (the class's softmax probability), `target` (its index), `scores` ((H, W) float32 in the
            photograph's own pixels, higher = more important, NaN where the classifier did not look), `mask` (a grey
            PIL image of the ranks: white = most important, black also where not looked at) and `overlay` (an RGB one);
            with `against` also `against` (its index), `against_label` and `against_score`, and an overlay of both ends
            of the map; with `refine` also `refinement` (the `steps` and `passes` it took, the `value` of the map,
            insertion minus deletion area, the `initial_value` of the plain one, and the `gain`).

        Raises:
            ImageReadError: an image cannot be read.
            TypeError: an input is no image at all; a parameter does not exist.
            ValueError: an unknown label (near ones are suggested), a number out of range, `top_k` beside `target` or
                `against`, a class compared with itself.
        """
        inputs = _streamable(inputs)
        # The base class looks at the first entry.
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **parameters)

    def _sanitize_parameters(
        self,
        target: int | str | None = None,
        against: int | str | None = None,
        top_k: int | None = None,
        refine: int | None = None,
        adaptive: bool | None = None,
        overlay: bool | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            known = "target, against, top_k, refine, adaptive, overlay, batch_size and num_workers"
            raise TypeError(f"The task {TASK} has no parameter {min(unknown)!r}; it has {known}.")
        classes = self.model.config.num_labels
        if top_k is not None and (isinstance(top_k, (bool, float, str)) or not 1 <= top_k <= classes):
            raise ValueError(f"top_k must lie in 1..{classes}, the number of classes, but it is {top_k!r}.")
        for name, given in (("target", target), ("against", against)):
            if given is not None and top_k not in (None, 1):
                raise ValueError(f"Give either {name} or top_k, not both.")
        if refine is not None or adaptive is not None:
            # The constructor, which has no defaults yet, comes through here as well.
            steps = getattr(self, "_forward_params", {}).get("refine", 0) if refine is None else refine
            check_refinement(steps, False if adaptive is None else adaptive)
        if overlay not in (None, True, False):
            raise ValueError(f"overlay must be True or False, but it is {overlay!r}.")
        forward = {}
        if target is not None or against is not None or top_k is not None:
            # All, so that a call which asks another question than the constructor replaces all of it.
            target, against = (None if given is None else self.model.class_index(given) for given in (target, against))
            if target is not None and target == against:
                raise ValueError(
                    f"Class {target} ({self.model.config.id2label[target]}) is compared with itself: target and "
                    "against must be two classes."
                )
            forward = {"target": target, "against": against, "top_k": top_k or 1}
        if refine is not None:
            forward["refine"] = refine
        if adaptive is not None:
            forward["adaptive"] = adaptive
        return {}, forward, {} if overlay is None else {"overlay": overlay}

    def preprocess(self, input_: ImageSource) -> dict[str, list[Any]]:
        """Read one photograph: its pixel values (1, 3, h, w), and itself, each as the only entry of a list."""
        if isinstance(input_, Mapping):
            fields = ", ".join(map(str, input_))
            raise ImageReadError(f"A row ({fields}) is no image; give the column with images, as in rows['image'].")
        photograph = read_image(input_)
        pixel_values = self.image_processor([photograph], return_tensors="pt")["pixel_values"]
        # In lists, because transformers would concatenate tensors, which may differ in size. The photograph stays a
        # PIL image, because transformers would send its tensor to the device and back.
        return {"pixel_values": [pixel_values], "photograph": [photograph]}

    def _forward(
        self,
        input_tensors: dict[str, list[Any]],
        target: int | None = None,
        against: int | None = None,
        top_k: int = 1,
        refine: int = 0,
        adaptive: bool = False,
    ) -> dict[str, torch.Tensor | list[Any] | None]:
        inputs = input_tensors["pixel_values"]
        # As it left `preprocess` at batch size 1, else one such list an image.
        batched = isinstance(inputs[0], list)
        if batched:
            inputs = [pixel_values for entry in inputs for pixel_values in entry]
        if len({pixel_values.shape for pixel_values in inputs}) == 1:
            inputs = [torch.cat(inputs)]
        outputs, facts = [], []
        for pixel_values in inputs:
            output, refinements = self._explain(pixel_values, target, against, top_k, refine, adaptive)
            outputs.append(output)
            facts += [refinements[start : start + top_k] for start in range(0, len(refinements), top_k)]
        logits, targets = (torch.cat([output[key] for output in outputs]) for key in ("logits", "target"))
        scores = [scores for output in outputs for scores in output.scores]
        # transformers takes the size of the batch from the first entry, and splits all of them along it.
        result = dict(zip(_OUTPUTS, (logits, targets, scores, input_tensors["photograph"]), strict=True))
        result[_AGAINST] = None if against is None else torch.cat([output.against for output in outputs])
        return result | {_REFINEMENT: ([[fact] for fact in facts] if batched else facts) or None}

    def _explain(
        self,
        pixel_values: torch.Tensor,
        target: int | None,
        against: int | None,
        top_k: int,
        refine: int,
        adaptive: bool,
    ) -> tuple[AhaOutput, list[dict[str, int | float]]]:
        target, against = (
            None if given is None else torch.full((len(pixel_values),), given, device=pixel_values.device)
            for given in (target, against)
        )
        if refine:
            return refined_maps(self.model, pixel_values, target, top_k, refine, against=against, adaptive=adaptive)
        return plain_maps(self.model, pixel_values, target, top_k, against=against), []

    def postprocess(
        self, model_outputs: dict[str, torch.Tensor | list[Any] | None], overlay: bool = True
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Bring the scores of one photograph back to its pixels: one dict a class, and no list around a single one."""
        logits, targets, maps, photograph = (model_outputs[key][0] for key in _OUTPUTS)
        refinements = model_outputs[_REFINEMENT]
        refinements = [None] * len(targets) if refinements is None else refinements[0]
        others = model_outputs[_AGAINST]
        others = [None] * len(targets) if others is None else others[0].tolist()
        geometry = InputGeometry.from_processor(self.image_processor, (photograph.height, photograph.width))
        probability = logits.float().softmax(-1)
        results = []
        originals = geometry.to_original(maps).numpy()
        for target, other, scores, refinement in zip(targets.tolist(), others, originals, refinements, strict=True):
            ranks = np.nan_to_num(rank_map(scores))
            result = {
                "label": self.model.config.id2label[target],
                "score": float(probability[target]),
                "target": target,
                "scores": scores,
                "mask": Image.fromarray((255 * ranks).round().astype(np.uint8)),
            }
            if other is not None:
                result[_AGAINST], result["against_label"] = other, self.model.config.id2label[other]
                result["against_score"] = float(probability[other])
            if overlay:
                result["overlay"] = draw_overlay(photograph, scores, sign="positive" if other is None else "both")
            if refinement is not None:
                result[_REFINEMENT] = refinement
            results.append(result)
        return results[0] if len(results) == 1 else results

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save the explainer; the arguments are those of [`AhaExplainer.save_pretrained`]."""
        # The base class would also copy this file and mark the folder as one that needs `trust_remote_code`.
        self.model.save_pretrained(save_directory, **kwargs)


def _streamable(inputs: Any) -> Any:
    """`inputs` as what transformers takes for one image, a list, or a stream."""
    if isinstance(inputs, tuple):
        return list(inputs)
    one_image = (Image.Image, str, bytes, os.PathLike, np.ndarray, torch.Tensor, Mapping)
    if isinstance(inputs, (*one_image, list, Dataset, GeneratorType)) or not isinstance(inputs, Iterable):
        return inputs
    # A column of a dataset is a sequence; as a torch dataset it is read item by item, by several workers if wanted.
    return Subset(inputs, range(len(inputs))) if isinstance(inputs, Sequence) else (item for item in inputs)


def pipeline(
    task: str = TASK,
    model: str | os.PathLike[str] | AhaExplainer = "imagenette-demo",
    *,
    device: int | str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    **parameters: Any,
) -> VisualAttributionPipeline:
    """Build a [`VisualAttributionPipeline`]; unlike `transformers.pipeline`, this knows the bundled explainers.

    Args:
        task: "visual-attribution".
        model: a loaded explainer, a folder, a Hub id, or the name of a bundled explainer.
        device: where to run; when left out, the first accelerator (else the CPU) for an explainer given by name, and
            where it is for a loaded one.
        dtype: what to load the explainer in.
        **parameters: for the loading `classifier`, `revision`, `token` and `local_files_only`, as in
            [`AhaExplainer.from_pretrained`]; the others are those of [`VisualAttributionPipeline`].

    Raises:
        ValueError: another task.
        TypeError: a parameter of the loading is given for a loaded explainer.
        (Others: as in [`AhaExplainer.from_pretrained`] and [`VisualAttributionPipeline`].)

    Example:
        >>> from hf_aha import pipeline
        >>> attribute = pipeline("visual-attribution", model="imagenette-demo")  # doctest: +SKIP
        >>> attribute("photo.jpg")["label"]  # doctest: +SKIP
        'tench'
    """
    if task != TASK:
        raise ValueError(f"The only task of hf_aha.pipeline is {TASK!r}, not {task!r}; see transformers.pipeline.")
    names = ("classifier", "revision", "token", "local_files_only")
    loading = {name: parameters.pop(name) for name in names if name in parameters}
    if isinstance(model, (str, os.PathLike)):
        model = AhaExplainer.from_pretrained(model, **loading, **({} if dtype is None else {"dtype": dtype}))
        # 0 is what the base class takes for the first accelerator, and for the CPU where there is none.
        device = 0 if device is None else device
    elif loading:
        raise TypeError(f"{min(loading)} applies to an explainer given by name, but this one is loaded already.")
    return VisualAttributionPipeline(model, device=device, dtype=dtype, **parameters)


# Not a second time where the module is reloaded: transformers would warn of overwriting.
if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(TASK, VisualAttributionPipeline, pt_model=AhaExplainer, type="image")
