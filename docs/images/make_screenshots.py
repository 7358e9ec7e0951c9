#!/usr/bin/env python
"""Photograph the live demo in the system's Chromium, for docs/demo.md and the README.

.venv-demo/bin/python docs/images/make_screenshots.py

The picture of the comparison needs the extra `bench` in the same environment, and is left as it is without.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING


os.environ["HF_HUB_OFFLINE"] = "1"

from PIL import Image  # noqa: E402

from hf_aha import AhaExplainer  # noqa: E402
from hf_aha.demo.app import build_app  # noqa: E402
from hf_aha.demo.engine import DemoEngine  # noqa: E402
from hf_aha.demo.server import SAMPLES, free_port, serve  # noqa: E402


if TYPE_CHECKING:
    from playwright.sync_api import Page

EXPLAINER = "imagenette-demo"
SAMPLE = "english-springer"
SHARE = 30
STEPS = 10
WIDTH, MARGIN = 1180, 10
MAX_BYTES = 400_000
PATIENCE_MILLISECONDS = 300_000


def main() -> None:
    """Write the pictures beside this file."""
    from playwright.sync_api import sync_playwright

    engine = DemoEngine(AhaExplainer.from_pretrained(EXPLAINER).eval())
    app = build_app(engine, name=EXPLAINER, samples=sorted(SAMPLES.glob("*.jpg")))
    address = serve(app, port=free_port("127.0.0.1", 17960))
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    try:
        with sync_playwright() as playwright:
            flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
            browser = playwright.chromium.launch(executable_path=chromium, args=flags)
            page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
            page.set_default_timeout(PATIENCE_MILLISECONDS)
            page.goto(address)
            photograph(page)
            browser.close()
    finally:
        app.close(verbose=False)


def photograph(page: Page) -> None:
    """Visit the page once, from the sample to the comparison."""
    page.click(f"#sample-{SAMPLE}")
    set_slider(page, "share", SHARE)
    page.wait_for_selector("#curves polyline")
    page.wait_for_selector(f"#perturbed figcaption:has-text('important {SHARE}% removed')")
    page.wait_for_selector("#download-json:not([disabled])")
    keep(
        page, "demo-explained.png", ["title", "photograph", "rather-than", "picture", "download-png", "download-json"]
    )
    keep(page, "demo-slider.png", ["test-title", "share", "curves", "perturbed"])
    set_slider(page, "refine-steps", STEPS)
    page.click("#refine")
    page.wait_for_selector("#refined figure")
    keep(page, "demo-refined.png", ["refine-title", "refine-steps", "use-refined", "refined"])
    if all(importlib.util.find_spec(name) for name in ("captum", "pytorch_grad_cam")):
        page.click("#compare")
        page.wait_for_selector("#comparison figure")
        keep(page, "demo-compared.png", ["compare-title", "compare", "comparison"])
    else:
        print("demo-compared.png stays as it is: captum and grad-cam are not installed (extra bench).")


def set_slider(page: Page, name: str, value: int) -> None:
    """Write a value beside a slider, and wait until it counts."""
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def keep(page: Page, name: str, parts: Sequence[str]) -> None:
    """Write the part of the page that holds these elements, in fewer colours where the file would be large."""
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)  # the end of what fades or slides
    boxes = [page.locator(f"#{part}").bounding_box() for part in parts]
    scrolled = page.evaluate("window.scrollY")
    left = min(box["x"] for box in boxes) - MARGIN
    top = min(box["y"] for box in boxes) + scrolled - MARGIN
    right = max(box["x"] + box["width"] for box in boxes) + MARGIN
    bottom = max(box["y"] + box["height"] for box in boxes) + scrolled + MARGIN
    clip = {"x": max(left, 0), "y": max(top, 0), "width": right - max(left, 0), "height": bottom - max(top, 0)}
    with Image.open(BytesIO(page.screenshot(full_page=True, clip=clip))) as shot:
        picture = shot.convert("RGB")
    path = Path(__file__).parent / name
    picture.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        picture.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{name}: {picture.width} x {picture.height} pixels, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
