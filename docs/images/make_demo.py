#!/usr/bin/env python
"""Draw the README's picture: bundled photographs explained by the bundled explainer.

python docs/images/make_demo.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import hf_aha
from hf_aha import AhaExplainer


PHOTOGRAPHS = Path(hf_aha.__file__).parent / "bundled" / "photographs"


def main() -> None:
    explainer = AhaExplainer.from_pretrained("imagenette-demo")
    sheets = [explanation.sheet() for explanation in explainer.explain(sorted(PHOTOGRAPHS.glob("*.jpg"))[:4])]
    columns = 2
    width, height = max(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets)
    rows = -(-len(sheets) // columns)
    picture = Image.new("RGB", (columns * width, rows * height), "white")
    for place, sheet in enumerate(sheets):
        picture.paste(sheet, (place % columns * width, place // columns * height))
    picture.thumbnail((1600, 1600))
    picture.save(Path(__file__).parent / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
