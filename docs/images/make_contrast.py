#!/usr/bin/env python
"""Draw the picture of docs/method.md on contrast: why a rather than b, and what speaks against a class.

python docs/images/make_contrast.py
"""

from __future__ import annotations

from pathlib import Path

from grid import grid
from PIL import Image

import hf_aha
from hf_aha import AhaExplainer


PHOTOGRAPHS = Path(hf_aha.__file__).parent / "bundled" / "photographs"
SIDE = 240


def beside(left: str, right: str) -> Image.Image:
    """The middle halves of two bundled photographs."""
    picture = Image.new("RGB", (SIDE, SIDE))
    for place, name in enumerate((left, right)):
        photograph = Image.open(PHOTOGRAPHS / f"{name}.jpg").convert("RGB")
        scale = SIDE / min(photograph.size)
        photograph = photograph.resize([round(scale * side) for side in photograph.size], Image.Resampling.BICUBIC)
        start, top = (photograph.width - SIDE // 2) // 2, (photograph.height - SIDE) // 2
        half = photograph.crop((start, top, start + SIDE // 2, top + SIDE))
        picture.paste(half, (place * SIDE // 2, 0))
    return picture


def main() -> None:
    explainer = AhaExplainer.from_pretrained("imagenette-demo")
    ball_and_truck, dog_and_parachute = beside("golf-ball", "garbage-truck"), beside("english-springer", "parachute")
    explain = explainer.explain
    sheets = [
        explain(ball_and_truck, "golf ball", against="garbage truck").sheet(),
        explain(dog_and_parachute, "English springer", against="parachute").sheet(),
        explain(ball_and_truck, "golf ball").sheet(),
        explain(ball_and_truck, "golf ball").sheet(sign="negative"),
    ]
    grid(sheets, 1300).save(Path(__file__).parent / "contrast.png", optimize=True)


if __name__ == "__main__":
    main()
