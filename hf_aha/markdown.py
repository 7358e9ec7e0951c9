"""Text that others chose (labels, ids, licences, methods) inside Markdown: shown as it is, never obeyed."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence


LONGEST = 200

# Everything that can begin or end a construct of Markdown, HTML, jinja or a link of the Hub inside a line.
_SPECIAL = frozenset('\\`*[]{}<>|&~$#@:!"')
# Marks that reorder or hide the text around them. The joiners U+200C and U+200D stay: several scripts need them.
_INVISIBLE = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")


class Markdown(str):
    """Markdown of our own making, which a template takes as it is; every other text is escaped."""

    __slots__ = ()


def clean_text(text: object, limit: int = LONGEST) -> str:
    """`text` as one line of visible characters, at most `limit` of them.

    Example:
        >>> clean_text("tench\\n---\\nlicense: mit")
        'tench --- license: mit'
    """
    line = " ".join(str(text).split())
    visible = "".join("\ufffd" if unicodedata.category(c) == "Cs" else c for c in _INVISIBLE.sub("", line))
    visible = "".join(c for c in visible if unicodedata.category(c) != "Cc")
    return visible if len(visible) <= limit else f"{visible[: limit - 1].rstrip()}…"


def escape_markdown(text: object, limit: int = LONGEST) -> Markdown:
    """`text` for the running text, a heading, a table cell or the alternative text of a picture.

    Special characters become numeric entities rather than getting a backslash: these are read the same way in all four
    places, and also where a table is split at its bars before anything else.

    Example:
        >>> escape_markdown("<b>{{ 7*7 }}|")
        '&#60;b&#62;&#123;&#123; 7&#42;7 &#125;&#125;&#124;'
        >>> escape_markdown("vit_base, patch 16")
        'vit_base, patch 16'
    """
    line = clean_text(text, limit)
    parts = []
    for place, character in enumerate(line):
        around = line[max(place - 1, 0) : place], line[place + 1 : place + 2]
        # An underscore inside a word means nothing in Markdown, and ids are full of them.
        loose = character == "_" and not all(side.isalnum() for side in around)
        parts.append(f"&#{ord(character)};" if character in _SPECIAL or loose else character)
    # A bare host name would become a link.
    return Markdown(re.sub(r"(?i)\b(www)\.", r"\1&#46;", "".join(parts)))


def code_string(text: object) -> Markdown:
    """`text` as a string literal of Python, for a fenced block of code.

    Example:
        >>> code_string('a"b')
        '"a\\\\"b"'
    """
    return Markdown(json.dumps(clean_text(text), ensure_ascii=False))


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markdown:
    """A table of GitHub's Markdown; cells that are not [`Markdown`] are escaped.

    Example:
        >>> print(table(["class", "photographs"], [["a|b", 3]]))
        | class | photographs |
        |---|---|
        | a&#124;b | 3 |
    """
    lines = [header, *rows]
    text = ["| " + " | ".join(as_markdown(cell) for cell in line) + " |" for line in lines]
    return Markdown("\n".join([text[0], "|---" * len(header) + "|", *text[1:]]))


def as_markdown(value: object) -> str:
    """[`Markdown`] as it is, `None` as nothing, anything else escaped."""
    if value is None:
        return ""
    return value if isinstance(value, Markdown) else escape_markdown(value)


__all__ = ["Markdown", "as_markdown", "clean_text", "code_string", "escape_markdown", "table"]
