"""Faithfulness metrics: what happens to the class probability when pixels go or come in the order of a map.

A number is measured by a named `Protocol` (`get_protocol`, `evaluate_maps`), kept per image in a `ProtocolResult`, and
compared only with numbers of the same protocol.

What no explainer was trained for is measured by the metrics of `UNOPTIMISED` (ROAD, grid pointing, localization,
randomization, sensitivity, class discrimination, legibility), each also a plain function.
"""

from __future__ import annotations

from .bands import curve_band
from .curves import Curves, deletion_insertion_curves
from .discrimination import Discrimination, class_discrimination, runner_up
from .evaluation import MeasuredImages, evaluate_maps
from .imputation import linear_imputation, noisy_linear_imputation
from .legibility import edge_alignment, total_variation
from .localization import Localization, boxes_to_masks, localization_shares
from .modules import load
from .passes import TargetPasses
from .pointing import GridPointing, choose_groups, grid_pointing_shares, make_mosaics
from .protocols import Protocol, get_protocol, protocol_names
from .randomization import Randomization, cascading_randomization, randomization_stages
from .rank_maps import average_ranks, rank_correlation, rank_map, top_share
from .reduction import curve_areas
from .results import (
    ProtocolResult,
    ResultContext,
    Summary,
    merge_results,
    paired_difference,
    results_table,
    summarise,
)
from .road import Road, RoadWithControl, blurred_copy, road_curves, road_with_control
from .sensitivity import MaxSensitivity, max_sensitivity
from .subject import Subject
from .unoptimised import UNOPTIMISED, UnoptimisedMetric, get_unoptimised


__all__ = [
    "UNOPTIMISED",
    "Curves",
    "Discrimination",
    "GridPointing",
    "Localization",
    "MaxSensitivity",
    "MeasuredImages",
    "Protocol",
    "ProtocolResult",
    "Randomization",
    "ResultContext",
    "Road",
    "RoadWithControl",
    "Subject",
    "Summary",
    "TargetPasses",
    "UnoptimisedMetric",
    "average_ranks",
    "blurred_copy",
    "boxes_to_masks",
    "cascading_randomization",
    "choose_groups",
    "class_discrimination",
    "curve_areas",
    "curve_band",
    "deletion_insertion_curves",
    "edge_alignment",
    "evaluate_maps",
    "get_protocol",
    "get_unoptimised",
    "grid_pointing_shares",
    "linear_imputation",
    "load",
    "localization_shares",
    "make_mosaics",
    "max_sensitivity",
    "merge_results",
    "noisy_linear_imputation",
    "paired_difference",
    "protocol_names",
    "randomization_stages",
    "rank_correlation",
    "rank_map",
    "results_table",
    "road_curves",
    "road_with_control",
    "runner_up",
    "summarise",
    "top_share",
    "total_variation",
]
