"""The grid pointing game, as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_aha.metrics.modules import reduce_values


_DESCRIPTION = """In a mosaic of several photographs, the share of the most important pixels that lies in the cell of
the photograph whose class was asked about; higher is better, 0 to 1, and one over the number of cells for a map that
knows nothing.
"""

_CITATION = """@inproceedings{rao2022better, title={Towards Better Understanding Attribution Methods},
  author={Rao, Sukrut and B{\\"o}hle, Moritz and Schiele, Bernt}, booktitle={CVPR}, year={2022}}
"""

_INPUTS = """
Args:
    predictions: the share of each image, 0 to 1 (`hf_aha.metrics.pointing.grid_pointing_shares` measures it).
    cells: number of cells of a mosaic.
    resamples, seed, confidence: of the percentile bootstrap over images.

Returns:
    `grid_pointing`, the mean; `low` and `high`, its interval (None with one image); `per_image`; `images`; `chance`;
    and `higher_is_better`.
"""


class GridPointing(evaluate.Metric):
    """`grid_pointing` as an `evaluate` metric; the computation is in `hf_aha.metrics.modules`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("float32")}),
        )

    def _compute(
        self,
        predictions: list[float],
        cells: int = 4,
        resamples: int = 2000,
        seed: int = 0,
        confidence: float = 0.95,
    ) -> dict[str, Any]:
        found = reduce_values("grid_pointing", predictions, resamples=resamples, seed=seed, confidence=confidence)
        return {**found, "chance": 1 / cells, "higher_is_better": True}
