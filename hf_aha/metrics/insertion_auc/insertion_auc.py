"""Area under the insertion curve, as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_aha.metrics.modules import find_curve_protocol, reduce_curves
from hf_aha.metrics.protocols import Protocol


_DESCRIPTION = """Area under the probability of the class while the most important pixels are shown;
higher is better, 0 to 1.
"""

_CITATION = """@inproceedings{petsiuk2018rise,
  title={RISE: Randomized Input Sampling for Explanation of Black-box Models},
  author={Petsiuk, Vitali and Das, Abir and Saenko, Kate}, booktitle={BMVC}, year={2018}}
"""

_INPUTS = """
Args:
    predictions: one curve an image, the probability of the class at every fraction of the protocol.
    protocol: name or `hf_aha.metrics.Protocol` that the curves were measured by (default 'aha/insertion'); it
        fixes the fractions and the rule of the area.
    resamples, seed, confidence: of the percentile bootstrap over images.

Returns:
    `insertion_auc`, the mean; `low` and `high`, its interval (None with one image); `per_image`;
    `images`; and `protocol`, `protocol_version`, `higher_is_better`.
"""


class InsertionAUC(evaluate.Metric):
    """`insertion_auc` as an `evaluate` metric; the computation is in `hf_aha.metrics.modules`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[float]],
        protocol: Protocol | str = "aha/insertion",
        resamples: int = 2000,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> dict[str, Any]:
        points = len(predictions[0]) if len(predictions) else 0
        found = find_curve_protocol(protocol, points, start="reference")
        return reduce_curves(
            "insertion_auc", predictions, found, resamples=resamples, seed=seed, confidence=confidence
        )
