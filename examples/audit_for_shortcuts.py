#!/usr/bin/env python
"""Look for shortcuts: photographs whose most important pixels lie where they should not.

    hf-aha explain-dataset my-photographs --explainer imagenette-demo --split validation --output maps
    python examples/audit_for_shortcuts.py maps

A classifier that reads a watermark, a frame or a caption puts its most important pixels near the border, or far
from where the class usually has them. For every map two numbers are computed from its top share of the pixels (5 %
by default):

- `border`: the share of them that lies in the outer tenth of the picture on each side. Pixels at random have 0.36
  there.
- `oddity`: how unlike the rest of its class the map is: 1 minus the overlap of the top pixels' coarse places (8 x
  8) with the mean of the other maps of the class. 0 is the usual place, 1 a place that no other map of the class
  has. Missing for a class with fewer than `--least` maps.

The photographs with the largest numbers are listed, and written to a JSON file. **This is a list of photographs to
look at and no verdict.** A subject at the border has the same numbers as a watermark there; a shortcut in the
middle of every picture has unsuspicious ones. What looks like a shortcut has to be tested: cover it, and ask the
classifier again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hf_aha.dataset_maps import StoredMap, load_maps


BORDER = 0.1  # of each side
CELLS = 8


@dataclass
class Finding:
    """One map, and how its most important pixels lie.

    Attributes:
        row, image_id: the photograph.
        label: the class that the map explains.
        border: share of the top pixels in the outer tenth on each side, 0..1.
        oddity: distance of their places from the usual ones of the class, 0..1; None where there are too few maps.
    """

    row: int
    image_id: str | None
    label: str
    border: float
    oddity: float | None = None


def top_pixels(ranks: np.ndarray, share: float) -> np.ndarray:
    """(h, w) bool: the share of the pixels with the highest ranks (h, w)."""
    return ranks >= np.quantile(ranks, 1 - share)


def border_share(top: np.ndarray) -> float:
    """Share of the marked pixels that lie in the outer tenth of the picture on each side."""
    height, width = (max(1, round(BORDER * side)) for side in top.shape)
    inner = top[height:-height, width:-width].sum()
    return float(1 - inner / top.sum())


def places(top: np.ndarray) -> np.ndarray:
    """(CELLS, CELLS) share of the marked pixels in each cell of a coarse grid; they sum to 1."""
    rows, columns = np.nonzero(top)
    height, width = top.shape
    cells = np.zeros((CELLS, CELLS))
    np.add.at(cells, (rows * CELLS // height, columns * CELLS // width), 1)
    return cells / len(rows)


def audit(maps: Sequence[StoredMap], share: float = 0.05, least: int = 5) -> list[Finding]:
    """A finding for every map, in their order.

    Args:
        maps: of a data set.
        share: of the pixels of each map that are looked at.
        least: maps that a class needs for the usual place to mean anything.
    """
    tops = [top_pixels(one.input_ranks, share) for one in maps]
    findings = [
        Finding(one.row, one.image_id, one.label, round(border_share(top), 4))
        for one, top in zip(maps, tops, strict=True)
    ]
    of_class: dict[int, list[int]] = defaultdict(list)
    for number, one in enumerate(maps):
        of_class[one.target].append(number)
    for numbers in of_class.values():
        if len(numbers) < max(least, 2):
            continue
        spread = np.stack([places(tops[number]) for number in numbers])
        total = spread.sum(axis=0)
        for number, own in zip(numbers, spread, strict=True):
            # The other maps only: every map is like itself.
            usual = (total - own) / (len(numbers) - 1)
            findings[number].oddity = round(float(1 - np.minimum(own, usual).sum()), 4)
    return findings


def main(argv: Sequence[str] | None = None) -> list[Finding]:
    """Read the maps, print the photographs to look at, write all findings, and return them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", help="folder or data set that hf-aha explain-dataset wrote")
    parser.add_argument("--share", type=float, default=0.05, help="of the pixels of a map (default: %(default)s)")
    parser.add_argument("--least", type=int, default=5, help="maps that a class needs (default: %(default)s)")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="photographs to list (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("audit.json"), metavar="FILE")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.share < 1:
        parser.error(f"--share must lie between 0 and 1, but it is {arguments.share}.")

    findings = audit([StoredMap.from_row(row) for row in load_maps(arguments.maps)], arguments.share, arguments.least)
    arguments.output.write_text(json.dumps([asdict(one) for one in findings], indent=1) + "\n", encoding="utf-8")
    for name, meaning in (("border", "nearest to the border"), ("oddity", "least like their class")):
        known = [one for one in findings if getattr(one, name) is not None]
        print(f"The {min(arguments.show, len(known))} of {len(known)} photographs whose top pixels are {meaning}:")
        for one in sorted(known, key=lambda one: -getattr(one, name))[: arguments.show]:
            print(f"  {getattr(one, name):.2f}  {one.label}  row {one.row}  {one.image_id or ''}")
    print("Look at them: the numbers do not know a watermark from a subject at the border.")
    return findings


if __name__ == "__main__":
    main()
