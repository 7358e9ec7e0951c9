"""Steps with NaN or infinity: left out one by one, and the end of the run when too many come in a row."""

from __future__ import annotations

import warnings

import torch


class FiniteSteps:
    """Decides which optimiser steps may be taken.

    A step whose scores, loss or gradient are not finite must change neither weights nor optimiser nor average. The
    norm of the synchronised gradient decides, which is the same on every process, so that all of them leave out the
    same steps without asking each other. A process whose scores or loss are not finite therefore goes backward through
    `poisoned`, which makes the gradient NaN everywhere.

    Steps in a row are limited and not their sum: a run of days survives a rare bad batch, and one whose weights are
    lost ends soon. A gradient that overflows under the loss scaling of fp16 counts as well; scaling needs up to 16
    such steps at its start.

    Args:
        limit: steps in a row after which the run ends.
        announce: whether a warning names each step that is left out; for the main process.

    Attributes:
        skipped: steps left out so far.
        in_a_row: of these, the latest without a finite one in between.

    Example:
        >>> steps = FiniteSteps(limit=2, announce=False)
        >>> steps.take(0, torch.tensor(float("nan"))), steps.take(1, torch.tensor(1.0)), steps.skipped
        (False, True, 1)
    """

    def __init__(self, limit: int, announce: bool = True):
        self.limit, self.announce = limit, announce
        self.skipped = self.in_a_row = 0
        self._found: str | None = None

    def check(self, name: str, values: torch.Tensor) -> bool:
        """Whether `values`, of this process, are finite; `name` says what they are if they are not."""
        finite = bool(torch.isfinite(values).all())
        if not finite and self._found is None:
            self._found = name
        return finite

    def take(self, step: int, gradient_norm: torch.Tensor | float | None) -> bool:
        """Whether the optimiser may take the step that ends here.

        Args:
            step: its number, from 0.
            gradient_norm: over all parameters, synchronised; None where an engine (DeepSpeed) keeps it to itself and
                leaves out such steps on its own: then what this process saw is counted.

        Raises:
            FloatingPointError: it is the last of `limit` such steps in a row.
        """
        if gradient_norm is not None and self.check("gradient", torch.as_tensor(gradient_norm)):
            self._found = None
        found, self._found = self._found, None
        if found is None:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"NaN or infinity in the {found} at step {step}, the last of {self.in_a_row} such steps in a row; "
                "lower the learning rate or raise tau_end."
            )
        if self.announce:
            warnings.warn(
                f"Step {step} is left out because of NaN or infinity in the {found} ({self.in_a_row} in a row, "
                f"{self.skipped} in all; the run ends at {self.limit} in a row).",
                UserWarning,
                stacklevel=3,
            )
        return False


def poisoned(scores: torch.Tensor) -> torch.Tensor:
    """A loss () whose gradient is NaN for every parameter that `scores` depend on."""
    return scores.float().sum() * float("nan")


__all__ = ["FiniteSteps", "poisoned"]
