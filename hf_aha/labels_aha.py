"""Class labels: which class is meant by an index or a name.

This file travels to the Hub as custom code, so it imports the standard library only.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Mapping


def class_index(target: int | str, id2label: Mapping[int, str]) -> int:
    """The index of a class given by index or label; labels match without regard to case.

    A label of ImageNet lists synonyms ("tench, Tinca tinca"); each of them names the class too. Digits that are no
    label ("42") are read as an index.

    Args:
        target: an index in 0 .. `len(id2label)` - 1, of any integer type, or a label.
        id2label: name of each class, as in the config.

    Raises:
        ValueError: no such class (near labels are suggested), or the label names several classes.

    Example:
        >>> class_index("Tench", {0: "tench, Tinca tinca", 1: "church"})
        0
    """
    if isinstance(target, str):
        return _index_of_label(target, id2label)
    if isinstance(target, bool):
        raise ValueError(f"A class is given by its index or label, not by {target}.")
    try:
        index = operator.index(target)
    except TypeError as error:
        raise ValueError(f"A class is given by its index or label, not by {target!r}.") from error
    if not 0 <= index < len(id2label):
        raise ValueError(
            f"The class index {index} is out of range: the classifier has the classes 0..{len(id2label) - 1}."
        )
    return index


def _index_of_label(label: str, id2label: Mapping[int, str]) -> int:
    wanted = label.strip().casefold()
    # Whole labels come before synonyms.
    whole: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for index, text in id2label.items():
        whole.setdefault(text.strip().casefold(), []).append(int(index))
        for synonym in dict.fromkeys(part.strip().casefold() for part in text.split(",")):
            synonyms.setdefault(synonym, []).append(int(index))
    found = whole.get(wanted) or synonyms.get(wanted) or []
    if len(found) > 1:
        raise ValueError(
            f"The label {label!r} names {len(found)} classes of the classifier: give one of the indices "
            f"{', '.join(map(str, found))}."
        )
    if found:
        return found[0]
    if re.fullmatch(r"-?[0-9]+", wanted):
        return class_index(int(wanted), id2label)
    names = {name: indices[0] for name, indices in (synonyms | whole).items()}
    near = difflib.get_close_matches(wanted, names, n=3)
    if near:
        suggestions = dict.fromkeys(repr(id2label[names[name]]) for name in near)
        hint = f"did you mean {' or '.join(suggestions)}?"
    else:
        hint = f"its labels are {', '.join(list(id2label.values())[:5])}{', ...' if len(id2label) > 5 else '.'}"
    raise ValueError(f"The classifier has no label {label!r}; {hint}")


__all__ = ["class_index"]
