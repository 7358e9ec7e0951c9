"""The commands of `hf-aha`, one module each. Importing them is cheap; running them is not."""

from __future__ import annotations


class CommandError(Exception):
    """A command cannot go on. The message is the one sentence the user reads; the exit code is 2."""


__all__ = ["CommandError"]
