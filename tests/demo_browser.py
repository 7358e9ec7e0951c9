"""The live demo as its visitors meet it: `hf-aha demo` in a process of its own, and a tab of the system's Chromium."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

import hf_aha


if TYPE_CHECKING:
    from playwright.sync_api import Download, Locator, LocatorAssertions, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A root of a container has no sandbox, and nothing here may look for updates.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE_SECONDS = 120
PHOTOGRAPHS = Path(hf_aha.__file__).parent / "bundled" / "photographs"
# The roles in Chromium's accessibility tree of what can be used.
CONTROLS = {
    *("button", "checkbox", "combobox", "link", "listbox", "option"),
    *("radio", "radiogroup", "searchbox", "slider", "spinbutton", "switch", "textbox"),
}


def missing() -> str | None:
    """Why no browser can be driven here, or None."""
    for module, name in (("gradio", "Gradio"), ("playwright", "Playwright")):
        if importlib.util.find_spec(module) is None:
            return f"{name} is not installed (make demo-test sets both up)"
    return None if CHROMIUM else "no Chromium was found (apt-get install chromium)"


class DemoServer:
    """`hf-aha demo` with some more words, offline. Use it in a `with` statement, which ends it by Ctrl-C.

    Attributes:
        lines: what it printed, standard error included.
        address: of its page; None where it ended instead.
    """

    def __init__(self, *words: str, **environment: str) -> None:
        self.lines: list[str] = []
        self.address: str | None = None
        self._answered = threading.Event()
        quiet = {"HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hf_aha.cli", "demo", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **quiet, **environment},
            # What runs in the background of a shell has Ctrl-C switched off, and so have its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> DemoServer:
        if not self._answered.wait(PATIENCE_SECONDS):
            self.end()
            raise AssertionError(f"hf-aha demo did not answer: {self.lines}")
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> int:
        """Press Ctrl-C, and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # prints where every thread is
            self.process.wait()
            self._reader.join()
            raise AssertionError("\n".join(["hf-aha demo did not end:", *self.lines])) from None
        finally:
            self._reader.join(PATIENCE_SECONDS)

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if found := re.match(r"The demo runs on (http\S+) ", line):
                self.address = found[1]
                self._answered.set()
        self._answered.set()


class Visit:
    """One tab on the demo's page, whose parts are named by their element ids.

    Attributes:
        page: of Playwright.
        errors: exceptions that the page's scripts did not catch.
        hosts: whatever the page asked for something, as `host:port`.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.update(re.findall(r"^(?:http|ws)s?://([^/]+)", request.url)))
        page.set_default_timeout(1000 * PATIENCE_SECONDS)
        page.goto(address)
        page.wait_for_selector("#sample-church")
        # The page is alive once its script has named the groups.
        page.wait_for_selector("#view[aria-label]")

    def part(self, name: str) -> Locator:
        """The component of that element id."""
        return self.page.locator(f"#{name}")

    def text(self, name: str) -> str:
        """The visible words of a component."""
        return " ".join(self.part(name).inner_text().split())

    @contextmanager
    def changing(self, *names: str) -> Iterator[None]:
        """Wait at the end until the contents of all these components are others than at the beginning."""
        contents = "name => document.querySelector(`#${name} .html-container`).innerHTML"
        before = {name: self.page.evaluate(contents, name) for name in names}
        yield
        for name, content in before.items():
            self.page.wait_for_function(
                "([name, content]) => document.querySelector(`#${name} .html-container`).innerHTML !== content",
                arg=[name, content],
            )

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Wait until a new question is answered with its map, slider, curves and files."""
        with self.changing("status", "picture", "perturbed"):
            yield
        self.page.wait_for_selector("#curves polyline", state="attached")
        self.page.wait_for_selector("#download-json:not([disabled])")

    def sample(self, name: str) -> None:
        """Pick a sample, and wait for all of its explanation."""
        with self.asking():
            self.part(f"sample-{name}").click()

    def give(self, path: Path) -> None:
        """Choose a file to upload; does not wait."""
        self.page.set_input_files("#photograph input[type=file]", path)

    def upload(self, path: Path) -> None:
        """Upload a photograph, and wait for all of its explanation."""
        with self.asking():
            self.give(path)

    def choose(self, group: str, label: str) -> None:
        """Press a radio button."""
        self.part(group).get_by_label(label).check()

    def type_into(self, name: str, text: str) -> None:
        """Type into a box of classes, and press Enter."""
        box = self.part(name).get_by_role("combobox")
        box.click()
        box.fill(text)
        box.press("Enter")

    def slide(self, name: str, value: int) -> None:
        """Write a value beside a slider."""
        box = self.part(name).get_by_role("spinbutton")
        box.fill(str(value))
        box.press("Tab")

    def share(self, value: int) -> float:
        """Set the slider of important pixels, and return the probability that is left."""
        with self.changing("perturbed", "probability", "curves"):
            self.slide("share", value)
        return self.probability()

    def probability(self, row: int = 0) -> float:
        """What stands in large beside the slider, 0..1."""
        return percent(self.part("probability").locator("strong").nth(row).inner_text())

    def tab_to(self, selector: str) -> None:
        """Press Tab until the focus is on that element, or inside it."""
        for _ in range(80):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("selector => document.activeElement.closest(selector) !== null", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    def image(self, name: str, place: int = 0) -> np.ndarray:
        """The picture of a component, uint8 of shape (H, W, 3)."""
        source = self.part(name).locator("img").nth(place).get_attribute("src")
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            return np.asarray(image.convert("RGB"))

    def alt(self, name: str, place: int = 0) -> str:
        """The words that stand for a picture."""
        return self.part(name).locator("img").nth(place).get_attribute("alt")

    def download(self, kind: str) -> Path:
        """Press a button for a file, and return where that lies."""
        with self.page.expect_download() as started:
            self.part(f"download-{kind}").click()
        download: Download = started.value
        assert download.suggested_filename.endswith(f".{kind}")
        return download.path()

    def record(self) -> dict:
        """The downloaded record."""
        return json.loads(self.download("json").read_text(encoding="utf-8"))

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader meets, as Chromium computes them."""
        session = self.page.context.new_cdp_session(self.page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        session.detach()
        return [
            (node["role"]["value"], node.get("name", {}).get("value", "").strip())
            for node in nodes
            if not node["ignored"]
        ]


def percent(text: str) -> float:
    """The first percentage of a text, as a number of 0..1."""
    return float(re.search(r"(\d+(?:\.\d+)?)%", text)[1]) / 100


def expect(locator: Locator) -> LocatorAssertions:
    """Playwright's `expect`, which waits, with our patience."""
    from playwright.sync_api import expect as playwright_expect

    playwright_expect.set_options(timeout=1000 * PATIENCE_SECONDS)
    return playwright_expect(locator)


def save_photograph(path: Path, name: str, size: tuple[int, int]) -> Path:
    """A bundled photograph in another size (width, height)."""
    with Image.open(PHOTOGRAPHS / f"{name}.jpg") as image:
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(path)
    return path
