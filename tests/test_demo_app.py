"""The demo's page and server. What needs Gradio is skipped without it; `make demo-test` runs it."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_demo_engine import LABELS, Passes, photograph, small_explainer

import hf_aha
from hf_aha.cli import main
from hf_aha.demo import refining as refining_module
from hf_aha.demo.engine import DemoEngine
from hf_aha.demo.handlers import Handlers
from hf_aha.demo.server import NoFreePortError, free_port


PHOTOGRAPHS = Path(hf_aha.__file__).parent / "bundled" / "photographs"
DRAWING = ("overlay", 60, "inferno")
ASKING = (20, "deletion", "blur")
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")


class FakeGradio:
    """What the handlers use of Gradio."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def Warning(self, text: str) -> None:  # noqa: N802
        self.warnings.append(text)

    @staticmethod
    def update(**values: object) -> dict:
        return values

    @staticmethod
    def skip() -> str:
        return "skip"


@pytest.fixture
def engine() -> DemoEngine:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DemoEngine(small_explainer(), baselines=("centre",))


@pytest.fixture
def handlers(engine) -> Handlers:
    return Handlers(engine, FakeGradio(), {"explainer": {"id": "tiny"}})


@pytest.fixture
def picture(tmp_path) -> Path:
    photograph().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# ------------------------------------------------------------------------------------------------------- handlers


def test_a_visit_from_photograph_to_files(handlers, picture):
    session, status, page, top, other, *_, upload = handlers.open_upload(None, str(picture), *DRAWING)
    explanation = session.answer.explanation
    assert "1 pass of the classifier" in status and "<img" in page and not handlers.gr.warnings
    assert (
        top["value"] == explanation.target and len(top["choices"]) == 5 and other["value"] is None and upload is None
    )
    figure, readout, curves = handlers.perturb(session, *ASKING)
    assert "<img" in figure and explanation.label.split()[0] in readout and "polyline" not in curves
    assert handlers.measure(session, *ASKING).count("<polyline") == 2
    assert handlers.perturb(session, *ASKING)[2].count("<polyline") == 2
    files = handlers.files(session)
    assert [Path(file["value"]).suffix for file in files] == [".png", ".npy", ".json"]
    assert np.load(files[1]["value"]).shape == (40, 60)
    # Another class, then one class rather than another, then alone again.
    again = handlers.choose_top(session, (explanation.target + 1) % 5, *DRAWING)
    assert again[0] is session and session.answer.explanation.target == (explanation.target + 1) % 5
    handlers.choose_other(session, "Chain Saw", *DRAWING)
    values = handlers.choose_against(session, "tench", *DRAWING)
    assert session.answer.explanation.against_label == "tench" and values[6]["visible"]
    assert "3 passes" not in values[1] and "tench" in handlers.measure(session, *ASKING)
    handlers.choose_alone(session, *DRAWING)
    assert session.answer.explanation.against is None and session.answer.explanation.label == "chain saw"
    assert "<img" in handlers.draw(session, "map", 30, "viridis")


def test_bad_files_leave_what_was_shown(handlers, picture, tmp_path):
    session = handlers.open_upload(None, str(picture), *DRAWING)[0]
    before = session.answer
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    values = handlers.open_upload(session, str(tmp_path / "broken.jpg"), *DRAWING)
    assert values[0] is session and session.answer is before and values[2] == "skip" and values[-1] is None
    assert "Problem: " in values[1] and "broken.jpg" in values[1]
    # The place of the upload on the server is nobody's business.
    assert str(tmp_path) not in values[1] and str(tmp_path) not in handlers.gr.warnings[-1]
    handlers.engine.max_pixels = 100
    assert "more than the limit" in handlers.open_upload(None, str(picture), *DRAWING)[1]
    assert "did not arrive" in handlers.open_upload(None, None, *DRAWING)[1]


def test_a_large_photograph_works(handlers, tmp_path):
    Image.new("RGB", (8000, 5000), "teal").save(tmp_path / "large.jpg")
    session, status, *_ = handlers.open_upload(None, str(tmp_path / "large.jpg"), *DRAWING)
    assert "Explained" in status and max(session.answer.photograph.shown.size) == 768


def test_unknown_classes_are_named_and_the_controls_go_back(handlers, picture):
    session = handlers.open_upload(None, str(picture), *DRAWING)[0]
    values = handlers.choose_other(session, "chain sew", *DRAWING)
    assert "did you mean" in values[1] and handlers.gr.warnings
    assert values[3]["value"] == session.answer.explanation.target and values[4]["value"] is None
    values = handlers.choose_against(session, session.answer.explanation.label, *DRAWING)
    assert "compared with itself" in values[1] and values[5]["value"] is None
    assert "chain sew" not in handlers.choose_other(session, None, *DRAWING)[1]


def test_everything_without_a_photograph_says_so(handlers):
    for values in (
        handlers.choose_top(None, 0, *DRAWING),
        handlers.choose_other(None, "tench", *DRAWING),
        handlers.choose_against(None, "tench", *DRAWING),
        handlers.choose_alone(None, *DRAWING),
    ):
        assert values[0] is None and "no photograph yet" in values[1]
    assert handlers.perturb(None, *ASKING) == ("skip",) * 3 and handlers.measure(None, *ASKING) == "skip"
    assert handlers.files(None) == ("skip",) * 3 and handlers.draw(None, *DRAWING) == "skip"
    assert "no photograph yet" in next(handlers.refine(None, 3, *DRAWING))[0]
    assert "no photograph yet" in handlers.compare(None, *DRAWING)[0]
    assert "no refined map" in handlers.use_refined(None, True, *DRAWING)[0]


def test_refining_and_using_the_refined_map(handlers, picture):
    session = handlers.open_upload(None, str(picture), *DRAWING)[0]
    *_, last = handlers.refine(session, 2, *DRAWING)
    assert "passes of the classifier" in last[1] and last[1].count("<figure") == 2 and last[2]["interactive"]
    assert session.answer is session.plain
    assert "refined" in handlers.use_refined(session, True, *DRAWING)[0] and session.answer is session.refined
    assert handlers.use_refined(session, False, *DRAWING) and session.answer is session.plain
    assert "centre" in handlers.compare(session, *DRAWING)[1].lower()
    handlers.choose_top(session, 1, *DRAWING)
    assert session.refined is None


def test_a_refinement_that_is_left_does_not_answer_the_next_question(handlers, picture, monkeypatch):
    monkeypatch.setattr(refining_module, "_POLL_SECONDS", 0.01)
    session = handlers.open_upload(None, str(picture), *DRAWING)[0]
    steps = handlers.refine(session, 5000, *DRAWING)
    assert "Step 0 of 5000" in next(steps)[1]
    handlers.choose_top(session, (session.plain.explanation.target + 1) % 5, *DRAWING)
    *_, last = steps
    assert "left" in last[0] and session.refined is None
    steps = handlers.refine(session, 5000, *DRAWING)
    next(steps)
    steps.close()  # what a closed tab does
    for worker in [thread for thread in threading.enumerate() if thread.name.startswith("hf-aha-refine")]:
        worker.join(20)
        assert not worker.is_alive()
    assert "<img" in handlers.perturb(session, *ASKING)[0]


def test_a_refinement_is_stopped_and_says_so_itself(handlers, picture, monkeypatch):
    monkeypatch.setattr(refining_module, "_POLL_SECONDS", 0.01)
    session = handlers.open_upload(None, str(picture), *DRAWING)[0]
    steps = handlers.refine(session, 5000, *DRAWING)
    assert next(steps)[4]["interactive"]
    handlers.stop(session)
    *_, last = steps
    assert "stopped" in last[0] and last[1] == "" and session.refined is None
    assert last[3]["interactive"] and not last[4]["interactive"]
    *_, last = handlers.refine(session, 1, *DRAWING)
    assert session.refined is not None and last[1].count("<figure") == 2
    handlers.stop(None)


def test_a_late_answer_is_dropped(handlers, picture, monkeypatch):
    session = handlers.open_upload(None, str(picture), *DRAWING)[0]
    curves = handlers.engine.curves

    def slow(answer, reference):
        handlers.choose_top(session, (answer.explanation.target + 1) % 5, *DRAWING)
        return curves(answer, reference)

    monkeypatch.setattr(handlers.engine, "curves", slow)
    assert handlers.measure(session, *ASKING) == "skip"


def test_two_visitors_share_the_engine_and_nothing_else(handlers, picture, tmp_path):
    photograph(1).save(tmp_path / "other.png")
    passes = Passes(handlers.engine.explainer)
    first = handlers.open_upload(None, str(picture), *DRAWING)[0]
    second = handlers.open_upload(None, str(picture), *DRAWING)[0]
    assert passes.calls == 1 and first is not second and first.answer is second.answer
    handlers.open_upload(second, str(tmp_path / "other.png"), *DRAWING)
    assert first.answer is not second.answer and first.answer.photograph is not second.answer.photograph


# --------------------------------------------------------------------------------------------------------- server


def test_a_port_in_use_gives_the_next_one():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) > port
        with pytest.raises(NoFreePortError, match="--port"):
            free_port("127.0.0.1", port, tries=1)
    with pytest.raises(NoFreePortError, match="cannot listen on 203.0.113.1"):
        free_port("203.0.113.1", 7860)


def test_the_command_without_gradio_is_one_sentence(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "hf-aha demo: the demo needs Gradio, which is not installed: pip install 'hf-aha[demo]'\n"
    )


def test_the_command_with_an_unknown_explainer_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: SimpleNamespace())
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    assert main(["demo", "--explainer", "imagenette-dema", "--local-files-only"]) == 2
    error = capsys.readouterr().err
    assert "did you mean the bundled 'imagenette-demo'" in error and error.count("\n") == 1


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_the_command_refuses_a_port_that_is_none(port, capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--port", port])
    assert "is not a port" in capsys.readouterr().err


def test_help_imports_neither_torch_nor_gradio():
    code = (
        "import sys, contextlib\nfrom hf_aha.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['demo', '-h'])\n"
        "print(*(name for name in ('torch', 'gradio', 'numpy') if name in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--no-browser" in done.stdout and done.stderr.strip() == ""


@pytest.fixture(scope="module")
def served():
    """Address of a page on the tiny explainer."""
    pytest.importorskip("gradio")
    from hf_aha.demo.app import build_app
    from hf_aha.demo.server import serve

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        engine = DemoEngine(small_explainer(), baselines=("centre",))
    app = build_app(engine, name="tiny", samples=[PHOTOGRAPHS / "church.jpg"])
    yield serve(app, port=free_port("127.0.0.1", 17860)), app
    app.close(verbose=False)


@needs_gradio
def test_the_page_asks_no_other_host(served):
    import httpx

    address, app = served
    answer = httpx.get(address, trust_env=False)
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(https?:[^\"]+)\"", answer.text)
    assert not loaded
    theme = httpx.get(f"{address}theme.css", trust_env=False).text
    assert not re.search(r"@import|url\(['\"]?https?:", theme)
    assert not app.analytics_enabled


@needs_gradio
def test_every_control_has_an_id_of_its_own(served):
    _, app = served
    people_use = ("button", "radio", "dropdown", "slider", "checkbox", "file", "downloadbutton", "html")
    components = [block for block in app.blocks.values() if block.get_block_name() in people_use]
    ids = [block.elem_id for block in components]
    assert len(components) > 25 and None not in ids and len(ids) == len(set(ids))
    for block in components:
        assert block.get_block_name() in ("button", "downloadbutton", "html") or block.label


@needs_gradio
def test_the_endpoints_answer_two_visitors(served, picture, tmp_path):
    from gradio_client import Client, handle_file

    address, _ = served
    first, second = (Client(address, verbose=False, analytics_enabled=False) for _ in range(2))
    status = first.predict(handle_file(str(picture)), *DRAWING, api_name="/photograph")[0]
    assert "Explained" in status
    assert "whole photograph" in first.predict(*ASKING, api_name="/perturb")[1]
    assert "polyline" in first.predict(*ASKING, api_name="/photograph_curves")
    files = first.predict(api_name="/photograph_files")
    assert [Path(file["value"]).suffix for file in files] == [".png", ".npy", ".json"]
    # The second has no photograph yet, whatever the first has.
    assert "no photograph yet" in second.predict(*DRAWING, api_name="/alone")[0]
    assert "Explained" in first.predict(1, *DRAWING, api_name="/top_class")[0]
    assert "Explained" in second.predict(*DRAWING, api_name="/sample_church")[0]
    assert "did you mean" in second.predict("chain sew", *DRAWING, api_name="/other_class")[0]
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    broken = second.predict(handle_file(str(tmp_path / "broken.png")), *DRAWING, api_name="/photograph")[0]
    assert "Problem" in broken and "broken.png" in broken
    refined = first.predict(2, *DRAWING, api_name="/refine")
    assert "passes of the classifier" in refined[1]
    assert LABELS[0] in first.predict("tench", *DRAWING, api_name="/other_class")[0]


@needs_gradio
def test_a_left_refinement_frees_the_place_for_the_next(served, picture):
    """One refinement runs at a time; a visitor who leaves must not keep the others waiting."""
    from gradio_client import Client, handle_file

    address, _ = served
    first, second = (Client(address, verbose=False, analytics_enabled=False) for _ in range(2))
    for client in (first, second):
        client.predict(handle_file(str(picture)), *DRAWING, api_name="/photograph")
    job = first.submit(40, *DRAWING, api_name="/refine")
    next(iter(job))
    job.cancel()
    assert "passes of the classifier" in second.predict(1, *DRAWING, api_name="/refine")[1]
