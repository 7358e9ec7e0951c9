"""Accuracy while the most important pixels are removed, as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_aha.metrics.modules import find_curve_protocol, reduce_curves
from hf_aha.metrics.protocols import Protocol


_DESCRIPTION = """100 times the area under the top-1 accuracy while the most important pixels become black;
lower is better.
"""

_CITATION = """@inproceedings{chefer2021transformer,
  title={Transformer Interpretability Beyond Attention Visualization},
  author={Chefer, Hila and Gur, Shir and Wolf, Lior}, booktitle={CVPR}, year={2021}}
"""

_INPUTS = """
Args:
    predictions: one curve an image, 1 where the label is still predicted and 0 where not, at every fraction of the
        protocol.
    references: the score of each untouched image, 1 where its label is predicted and 0 where not.
    protocol: name or `hf_aha.metrics.Protocol` that the curves were measured by (default 'chefer/positive'); it
        fixes the fractions and the rule of the area.
    resamples, seed, confidence: of the percentile bootstrap over images.

Returns:
    `positive_perturbation`, the mean; `low` and `high`, its interval (None with one image); `per_image`;
    `images`; and `protocol`, `protocol_version`, `higher_is_better`.
"""


class PositivePerturbation(evaluate.Metric):
    """`positive_perturbation` as an `evaluate` metric; the computation is in `hf_aha.metrics.modules`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("float32"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        references: list[float],
        protocol: Protocol | str = "chefer/positive",
        resamples: int = 2000,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> dict[str, Any]:
        points = len(predictions[0]) if len(predictions) else 0
        found = find_curve_protocol(protocol, points, start="image", order="most_relevant_first", accuracy=True)
        return reduce_curves(
            "positive_perturbation",
            predictions,
            found,
            references,
            resamples=resamples,
            seed=seed,
            confidence=confidence,
        )
