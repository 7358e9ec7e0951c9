"""Test-time refinement that says how far it is and can be left at any time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet

import torch

from ..modeling_aha import AhaExplainer
from ..refinement import RefinementOutput


CURVE_POINTS = 9
# Between two yields; a generator can be closed at none other.
_POLL_SECONDS = 0.2


class RefinementStopped(Exception):
    """Raised in the refining thread once nobody waits for its result."""


def refining(
    explainer: AhaExplainer,
    pixel_values: torch.Tensor,
    target: int,
    against: int | None = None,
    *,
    steps: int,
) -> Iterator[int | RefinementOutput]:
    """Refine the map of one image in a thread; yields the number of updates made so far, and last the result.

    Closing the generator ends the work before the classifier's next pass; other threads may use the explainer
    meanwhile.

    Args:
        explainer: with a classifier attached.
        pixel_values: (1, 3, h, w).
        target, against: classes.
        steps: most updates.

    Raises:
        ValueError: as in [`refine`][hf_aha.refinement.refine].
    """
    stop = threading.Event()
    images = 0

    def work() -> RefinementOutput:
        own = threading.get_ident()

        def count(module: torch.nn.Module, inputs: tuple) -> None:
            nonlocal images
            if threading.get_ident() != own:
                return
            if stop.is_set():
                raise RefinementStopped
            images += len(inputs[0])

        handle = explainer.classifier.register_forward_pre_hook(count)
        try:
            return explainer.refine(
                pixel_values, target, against=against, steps=steps, reference="blur", curve_points=CURVE_POINTS
            )
        finally:
            handle.remove()

    executor = ThreadPoolExecutor(1, thread_name_prefix="hf-aha-refine")
    try:
        future = executor.submit(work)
        while True:
            try:
                result = future.result(_POLL_SECONDS)
                break
            except NotYet:
                if future.done():  # the work itself timed out
                    raise
                # The plain map is measured once before the first update.
                yield min(max(images // (2 * CURVE_POINTS) - 1, 0), steps)
        yield result
    finally:
        stop.set()
        # Without waiting: whoever closes the generator may be the thread that serves everybody.
        executor.shutdown(wait=False)
