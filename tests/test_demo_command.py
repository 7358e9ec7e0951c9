"""`hf-aha demo` from the shell to a page that answers; skipped without Gradio."""

from __future__ import annotations

import importlib.util
import json
import socket
import urllib.request

import pytest
from demo_browser import DemoServer


pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")


def get(address: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=60) as answer:
        return answer.read().decode("utf-8")


def test_a_port_in_use_a_machine_without_a_browser_and_the_end():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with DemoServer("--port", str(port)) as server:
            said, address = server.lines[0], server.address
            assert said.startswith(f"Port {port} is in use; taking ") and address is not None, server.lines
            assert f":{said.rpartition(' ')[2].rstrip('.')}/" in address and f":{port}/" not in address
            assert address.startswith("http://127.0.0.1:")
            assert "Which pixels made it say that?" in get(address)
            assert json.loads(get(f"{address}config"))["title"] == "AHA: which pixels?"
            assert server.end() == 0
    assert "No browser was found here; open the address in one." in server.lines
    assert not [line for line in server.lines if "Traceback" in line]


@pytest.mark.parametrize(
    ("words", "environment", "sentence"),
    [
        (("--explainer", "imagenette-dema"), {}, "did you mean the bundled 'imagenette-demo'"),
        (("--explainer", "somebody/explainer"), {}, "somebody/explainer"),
        pytest.param(
            ("--explainer", "somebody/explainer"),
            {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
            "the connection to http://127.0.0.1:9 failed",
            marks=pytest.mark.slow,  # it is tried several times
        ),
    ],
    ids=["unknown", "offline", "no-network"],
)
def test_an_explainer_that_cannot_be_had_is_one_sentence(words, environment, sentence, tmp_path):
    with DemoServer(*words, HF_HOME=str(tmp_path), **environment) as server:
        assert server.address is None and server.end() == 2
    errors = [line for line in server.lines if line.startswith("hf-aha demo: ")]
    assert len(errors) == 1 and sentence in errors[0], server.lines
    assert not [line for line in server.lines if "Traceback" in line]
