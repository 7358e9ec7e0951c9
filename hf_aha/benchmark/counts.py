"""Words `NAME` or `NAME:IMAGES` of the command line: what is slow, on the first images only."""

from __future__ import annotations

from collections.abc import Sequence


def counts_of(words: Sequence[str], kind: str, example: str) -> dict[str, int | None]:
    """Number of images by name, None for all, in the order of the words.

    Args:
        words: as written by the user.
        kind: what a name is of, for the messages: `"method"`, `"metric"`.
        example: a right word, for the messages.

    Raises:
        ValueError: a count is not a positive integer, or a name stands there twice.

    Example:
        >>> counts_of(["road", "grid_pointing:96"], "metric", "road:100")
        {'road': None, 'grid_pointing': 96}
    """
    counts: dict[str, int | None] = {}
    for word in words:
        name, colon, count = word.partition(":")
        if colon and (not count.isdecimal() or int(count) < 1):
            raise ValueError(f"{word!r} must be a {kind}, or a {kind} and its number of images as in {example}.")
        if name in counts:
            raise ValueError(f"The {kind} {name!r} is named twice.")
        counts[name] = int(count) if colon else None
    return counts
