"""The live demo: `engine` answers without Gradio, `app` is the page, `server` runs it (extra `demo`).

Nothing is imported here, so that the command line can look at the package for free.
"""

from __future__ import annotations
