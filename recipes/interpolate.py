#!/usr/bin/env python
"""Weights between two explainers of one classifier, one of which was trained on from the other.

Training on for another aim (such as `pointing_weight`) gains there and loses elsewhere; weights on the straight line
between before and after often keep most of both, and need no training (https://arxiv.org/abs/2109.01903).

    python recipes/interpolate.py imagenette-demo runs/pointing/final --share 0.5 --output runs/between

OUTPUT is an explainer folder without the classifier; give the classifier again where the first explainer carries it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_aha import AhaExplainer
from hf_aha.classifier_aha import FINGERPRINT_TOLERANCE, fingerprint_distance


def interpolate(first: AhaExplainer, second: AhaExplainer, share: float) -> AhaExplainer:
    """`second` with the decoder weights (1 - share) * first + share * second; shares beyond 0 and 1 extrapolate.

    Args:
        first, second: explainers of one shape, the second trained on from the first.
        share: of the second.

    Returns:
        `second`, changed in place; its config's `training` says what was mixed.

    Raises:
        ValueError: the share is not finite, the explainers are of two classifiers, or their decoders have different
            weights, by name or shape.
    """
    if not math.isfinite(share):
        raise ValueError(f"share is {share}, but must be a finite number.")
    prints = first.classifier.fingerprint(), second.classifier.fingerprint()
    if len(prints[0]) != len(prints[1]) or fingerprint_distance(*prints) > FINGERPRINT_TOLERANCE:
        raise ValueError("The two explainers explain different classifiers; interpolate two of one classifier.")
    before, after = first.decoder.state_dict(), second.decoder.state_dict()
    shapes = [{name: tuple(tensor.shape) for name, tensor in weights.items()} for weights in (before, after)]
    if shapes[0] != shapes[1]:
        names = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
            f"The two decoders differ in {names[0]} and {len(names) - 1} other weights; interpolate explainers of "
            "which one was trained on from the other."
        )
    mixed = {name: torch.lerp(before[name].to(tensor), tensor, share) for name, tensor in after.items()}
    second.decoder.load_state_dict(mixed)
    second.config.training = {**(second.config.training or {}), "interpolation_share": share}
    return second


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="explainer before: Hub id, folder, or name of a bundled one")
    parser.add_argument("second", help="explainer after")
    parser.add_argument("--classifier", help="of both, where they do not find it themselves")
    parser.add_argument("--share", type=float, required=True, help="of the second; 0 is the first, 1 the second")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    given = {} if args.classifier is None else {"classifier": args.classifier}
    try:
        explainers = [AhaExplainer.from_pretrained(name, **given) for name in (args.first, args.second)]
        interpolate(*explainers, args.share).save_pretrained(args.output)
    except (OSError, ValueError) as error:
        sys.exit(f"Nothing was written: {error}")
    print(args.output)


if __name__ == "__main__":
    main()
