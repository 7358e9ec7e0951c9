"""Running the demo's page: a free port, nothing that leaves this machine, and the Space."""

from __future__ import annotations

import errno
import os
import socket
import sys
import webbrowser
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .app import MAX_UPLOAD_BYTES, build_app, import_gradio
from .engine import DemoEngine


if TYPE_CHECKING:
    import gradio as gr

LOOPBACK = "127.0.0.1"
PORT = 7860
PORTS_TRIED = 100
SAMPLES = Path(__file__).parents[1] / "bundled" / "photographs"

# The browser is told to ask this server alone, whatever a version of Gradio would like to load from elsewhere.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'self'"
)

_Message = MutableMapping[str, Any]


class NoFreePortError(OSError):
    """No port can be listened on; the message says which were tried."""


def free_port(host: str, port: int, tries: int = PORTS_TRIED) -> int:
    """The first port from `port` on that nobody listens on.

    Raises:
        NoFreePortError: none of them is free, or the host is not an address of this machine.

    Example:
        >>> free_port("127.0.0.1", 0)  # the system chooses
        0
    """
    last = min(port + tries, 65536)
    for candidate in range(port, last):
        try:
            with socket.create_server((host, candidate), reuse_port=False):
                return candidate
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise NoFreePortError(f"the demo cannot listen on {host}: {error.strerror or error}.") from error
    raise NoFreePortError(f"no port of {host} from {port} to {last - 1} is free; give another with --port.")


def serve(app: gr.Blocks, *, host: str = LOOPBACK, port: int = PORT, share: bool = False) -> str:
    """Start the server in the background and return the page's address; `app.close()` ends it.

    Args:
        app: of `build_app`.
        host: address to listen on.
        port: a free one.
        share: also open a public tunnel through Gradio's servers, which carries the photographs of its visitors.

    Raises:
        OSError: the port is taken.
    """
    gr = import_gradio()
    from starlette.middleware import Middleware

    _without_proxy(host)
    _, local, shared = app.launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        max_file_size=MAX_UPLOAD_BYTES,
        state_session_capacity=200,
        app_kwargs={"middleware": [Middleware(_OnlyThisServer)]},
        **_looks(gr),
    )
    return shared or local


def open_browser(address: str) -> bool:
    """Open the page where there is a screen; returns whether a browser took it."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False  # a browser of the terminal would take the terminal
    try:
        return webbrowser.open(address)
    except webbrowser.Error:
        return False


def run_space(explainer: str, *, classifier: str | None = None) -> None:
    """The whole of a Space's `app.py`: load, build, serve.

    Args:
        explainer: Hub id, or name of a bundled explainer. A private one needs the secret `HF_TOKEN` in the Space.
        classifier: Hub id, where the explainer does not say it.
    """
    import torch

    from ..modeling_aha import AhaExplainer

    loaded = AhaExplainer.from_pretrained(explainer, classifier=classifier)
    loaded = loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    engine = DemoEngine(loaded)
    engine.warm_up()
    samples = sorted(SAMPLES.glob("*.jpg"))
    app = build_app(engine, name=explainer, samples=samples, record={"explainer": {"id": explainer}})
    gr = import_gradio()
    app.launch(
        ssr_mode=False,
        max_file_size=MAX_UPLOAD_BYTES,
        state_session_capacity=200,
        **_looks(gr),
    )


def _looks(gr: Any) -> dict[str, Any]:
    """Theme and style for `launch`: fonts of the system, as others would be fetched, and enough contrast to read."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
        checkbox_border_color_hover="*neutral_700",
        checkbox_border_color_hover_dark="*neutral_200",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )
    return {"theme": theme, "css_paths": [Path(__file__).parent / "style.css"]}


def _without_proxy(host: str) -> None:
    """Gradio asks its own server whether it is there, which a proxy of the network could not answer."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [entry for entry in os.environ.get(name, "").split(",") if entry]
        os.environ[name] = ",".join(dict.fromkeys([*known, "localhost", LOOPBACK, host]))


class _OnlyThisServer:
    """Adds the policy to every answer (ASGI)."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: _Message, receive: Any, send: Callable[[_Message], Awaitable[None]]) -> None:
        async def send_with_policy(message: _Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", _POLICY.encode("ascii"))]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)
