"""The demo of one explainer as a Space; `hf-aha push-space` wrote this file."""

from __future__ import annotations

from hf_aha.demo.server import run_space


if __name__ == "__main__":
    run_space("imagenette-demo")
