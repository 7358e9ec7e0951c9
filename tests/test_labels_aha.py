"""`class_index`: a class by index, label or synonym; `test_explanation.py` asks the same through an explainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_aha.labels_aha import class_index


LABELS = {0: "tench, Tinca tinca", 1: "English springer", 2: "crane", 3: "bird, crane", 4: "12", 5: "x", 6: "X"}


@pytest.mark.parametrize(
    ("target", "index"),
    [
        (0, 0),
        (np.int32(6), 6),
        (torch.tensor(5), 5),
        ("tinca TINCA", 0),
        (" Tench, Tinca tinca ", 0),
        ("crane", 2),  # a whole label before a synonym
        ("bird", 3),
        ("12", 4),  # a label before an index
        ("3", 3),
    ],
)
def test_a_class_is_found(target, index):
    assert class_index(target, LABELS) == index


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (7, r"class index 7 is out of range: the classifier has the classes 0\.\.6"),
        (-1, "class index -1 is out of range"),
        ("13", "class index 13 is out of range"),
        (True, "given by its index or label, not by True"),
        (None, "given by its index or label, not by None"),
        (0.0, "given by its index or label, not by 0.0"),
        ("x", "label 'x' names 2 classes of the classifier: give one of the indices 5, 6"),
        ("english sprnger", "has no label 'english sprnger'; did you mean 'English springer'"),
        ("zzz", r"has no label 'zzz'; its labels are tench, Tinca tinca, English springer, .*, \.\.\.$"),
    ],
)
def test_what_names_no_class_is_refused_in_one_sentence(target, message):
    with pytest.raises(ValueError, match=message) as refused:
        class_index(target, LABELS)
    assert "\n" not in str(refused.value)
