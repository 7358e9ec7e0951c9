#!/usr/bin/env python
"""Draw the README's picture: bundled photographs explained by the bundled explainer.

python docs/images/make_demo.py
"""

from __future__ import annotations

from pathlib import Path

from grid import grid

import hf_aha
from hf_aha import AhaExplainer


PHOTOGRAPHS = Path(hf_aha.__file__).parent / "bundled" / "photographs"


def main() -> None:
    explainer = AhaExplainer.from_pretrained("imagenette-demo")
    sheets = [explanation.sheet() for explanation in explainer.explain(sorted(PHOTOGRAPHS.glob("*.jpg"))[:4])]
    grid(sheets, 1600).save(Path(__file__).parent / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
