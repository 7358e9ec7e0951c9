"""`hf-aha demo`: opens a page in the browser on which an explainer can be tried on photographs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import threading

from . import CommandError
from .loading import add_loading_arguments, describe_explainer, load_explainer


PORT = 7860


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of this command."""
    parser.description += " Photographs stay on this machine unless --share is given. Ctrl-C ends it."
    add_loading_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--port", type=_port, default=PORT, metavar="N", help="the next free one if taken (default: %(default)s)"
    )
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="to listen on; 0.0.0.0 lets everybody on your network in (default: this machine only)",
    )
    group.add_argument(
        "--share", action="store_true", help="also open a public address, a tunnel through Gradio's servers"
    )
    group.add_argument("--no-browser", action="store_true", help="only print the address")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C, and return 0.

    Raises:
        CommandError: Gradio is not installed, the explainer cannot be loaded, or no port is free.
    """
    if importlib.util.find_spec("gradio") is None:
        raise CommandError("the demo needs Gradio, which is not installed: pip install 'hf-aha[demo]'")
    # Read when the libraries are imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if arguments.local_files_only:
        os.environ["HF_HUB_OFFLINE"] = "1"
    explainer = load_explainer(arguments)

    from .. import __version__
    from ..demo.app import build_app
    from ..demo.engine import DemoEngine
    from ..demo.server import SAMPLES, NoFreePortError, free_port, open_browser, serve

    engine = DemoEngine(explainer)
    record = {**describe_explainer(explainer, arguments), "versions": {"hf_aha": __version__}}
    app = build_app(engine, name=arguments.explainer, samples=sorted(SAMPLES.glob("*.jpg")), record=record)
    try:
        port = free_port(arguments.host, arguments.port)
        if port != arguments.port:
            print(f"Port {arguments.port} is in use; taking {port}.", flush=True)
        engine.warm_up()
        address = serve(app, host=arguments.host, port=port, share=arguments.share)
    except NoFreePortError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"the demo could not start on {arguments.host}:{port}: {error}") from error
    print(f"The demo runs on {address} (Ctrl-C ends it).", flush=True)
    if not arguments.no_browser and not open_browser(address):
        print("No browser was found here; open the address in one.", flush=True)
    try:
        _wait_for_the_end()
    finally:
        app.close(verbose=False)
    return 0


def _wait_for_the_end() -> None:
    """Return on Ctrl-C or when the process is asked to end."""
    ended = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        # In slices, because on Windows a wait without an end hears no Ctrl-C.
        while not ended.wait(0.5):
            pass
    except KeyboardInterrupt:
        print(flush=True)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number from 1 to 65535")
    return int(text)
