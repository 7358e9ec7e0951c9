"""Random numbers of a training step that do not depend on how its images are spread over batches and processes."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch


Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a whole batch (None: PyTorch's own), or one for each of its images."""


@dataclass(frozen=True)
class StepDraws:
    """The generators of one optimiser step.

    The numbers of an image follow from the seed, the step and its row of the dataset alone, and what the images of a
    step share follows from the seed and the step. So the same global batch is perturbed alike as one batch, as several
    that are accumulated, and on any number of processes; and nothing of it has to be saved to resume a run.

    Attributes:
        shared: what all images of the step have in common (the grid that is ranked).
        images: everything else; one generator an image, or one for all of them.

    Example:
        >>> both, second = (StepDraws.of(0, 7, rows) for rows in ([3, 5], [5]))
        >>> torch.equal(torch.rand(2, generator=both.images[1]), torch.rand(2, generator=second.images[0]))
        True
    """

    shared: torch.Generator
    images: torch.Generator | Sequence[torch.Generator]

    @classmethod
    def of(cls, seed: int, step: int, rows: Iterable[int]) -> StepDraws:
        """The generators of optimiser step `step`, for a batch of these rows of the dataset."""
        return cls(_generator(seed, step), tuple(_generator(seed, step, row) for row in rows))

    def times(self, count: int) -> StepDraws:
        """For a batch that stands `count` times behind itself; an image's generator goes on from one to the next."""
        one = count == 1 or isinstance(self.images, torch.Generator)
        return self if one else StepDraws(self.shared, tuple(self.images) * count)


def draw_rows(
    draw: Callable[[Sequence[int], torch.Generator | None], torch.Tensor], shape: Sequence[int], generator: Generators
) -> torch.Tensor:
    """`draw(shape, generator)`, row by row where every row has a generator of its own.

    Args:
        draw: makes a tensor of a shape with one generator.
        shape: of the result, one row an image.
        generator: one for all rows, or one a row.

    Raises:
        ValueError: there are not as many generators as rows.

    Example:
        >>> rows = [torch.Generator().manual_seed(seed) for seed in (1, 2, 1)]
        >>> drawn = draw_rows(lambda shape, generator: torch.rand(shape, generator=generator), (3, 4), rows)
        >>> torch.equal(drawn[0], drawn[2]), torch.equal(drawn[0], drawn[1])
        (True, False)
    """
    if generator is None or isinstance(generator, torch.Generator):
        return draw(shape, generator)
    if len(generator) != shape[0]:
        raise ValueError(f"There are {len(generator)} generators for {shape[0]} images; give one an image, or one.")
    return torch.stack([draw(shape[1:], own) for own in generator])


def uniform(shape: Sequence[int], generator: Generators) -> torch.Tensor:
    """Uniform numbers in [0, 1), float32, by `draw_rows`."""
    return draw_rows(lambda shape, own: torch.rand(tuple(shape), generator=own), shape, generator)


def _generator(*key: int) -> torch.Generator:
    # PyTorch's generator looks at 32 bits of its seed only, and near seeds start alike: the digest spreads every key.
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


__all__ = ["Generators", "StepDraws", "draw_rows", "uniform"]
