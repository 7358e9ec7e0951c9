"""Protocols: validation, names, counts and the JSON round trip."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from hf_aha.metrics import Protocol, get_protocol, protocol_names
from hf_aha.metrics.references import gkern, gkern_blur


def one(name: str, **sizes) -> Protocol:
    (protocol,) = get_protocol(name, **sizes)
    return protocol


@pytest.mark.parametrize("name", protocol_names())
def test_every_preset_survives_json_and_is_hashable(name):
    protocol = one(name)
    again = Protocol.from_dict(json.loads(json.dumps(protocol.to_dict())))
    assert again == protocol and hash(again) == hash(protocol)
    assert dataclasses.replace(protocol, version=2) != protocol
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocol.version = 2


def test_names_select_groups_and_single_protocols():
    assert [p.name for p in get_protocol("rise")] == ["rise/deletion", "rise/insertion"]
    assert [p.name for p in get_protocol("mda")] == [
        f"mda/{curve}" for curve in ("deletion", "insertion", "mas-deletion", "mas-insertion")
    ]
    assert len(get_protocol("hf_aha")) == 12 and len(get_protocol("hf_aha/pixel/blur")) == 2
    units = {p.unit for p in get_protocol("hf_aha", patch_size=14)}
    assert units == {"pixel", (4, 4), (14, 14)}
    assert (
        len(set(protocol_names()))
        == len(protocol_names())
        == sum(len(get_protocol(group)) for group in ("aha", "rise", "chefer", "mda", "hf_aha"))
    )


@pytest.mark.parametrize(
    ("name", "hint"), [("chefr", "'chefer'"), ("rise/insertoin", "'rise/insertion'"), ("ris", "'rise'")]
)
def test_a_misspelt_name_gets_a_suggestion_and_the_list(name, hint):
    with pytest.raises(ValueError, match=f"did you mean .*{hint}.*The presets are aha, chefer, hf_aha, mda, rise"):
        get_protocol(name)
    with pytest.raises(ValueError, match="Unknown protocol ''"):
        get_protocol("")


def test_directions():
    higher = {p.name for name in protocol_names() for p in get_protocol(name) if p.higher_is_better}
    assert higher == {name for name in protocol_names() if name.endswith(("insertion", "negative"))}


def test_counts_follow_the_rounding_of_each_preset():
    n = 224 * 224
    assert one("aha/deletion").counts(n) == tuple(round(0.05 * k * n) for k in range(21))
    # The released code rounds in float32; at 224 x 224 no count differs.
    released = (torch.linspace(0, 1, 21) * n).round().long()
    assert one("aha/deletion").counts(n) == tuple(released.tolist())
    assert one("chefer/positive").counts(n) == tuple(
        int(n * share) for share in [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    )
    assert one("rise/deletion").counts(n) == tuple(range(0, n + 1, 224)) and len(one("rise/deletion").fractions) == 225
    assert one("aha/deletion").counts(10)[:4] == (0, 0, 1, 2)  # 0.5, 1 and 1.5 pixels: half to even
    assert one("chefer/positive").counts(16) == (1, 3, 4, 6, 8, 9, 11, 12, 14)


def test_steps_follow_the_image_size_and_end_with_a_short_one():
    wide = one("mda/insertion", image_size=(3, 8))
    assert wide.counts(24) == (0, 8, 16, 24)
    uneven = dataclasses.replace(wide, step=10)
    assert uneven.counts(24) == (0, 10, 20, 24)
    with pytest.raises(ValueError, match=r"4 points in steps of 8, but 256 units need 33: make it for this size"):
        wide.counts(256)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounding": "ceil"}, "rounding is 'ceil' in protocol 'aha/deletion', but must be one of 'round', 'floor'"),
        ({"ties": "argsort"}, "ties is 'argsort'"),
        ({"higher_is_better": True}, "most_relevant_first on the image cannot have higher_is_better=True"),
        ({"order": "least_relevant_first"}, "least_relevant_first on the image cannot have higher_is_better=False"),
        ({"fractions": (0, 0.5, 0.5, 1)}, "fractions must ascend"),
        ({"fractions": (0, 0.5, 1.5)}, r"two or more values in 0\.\.1"),
        ({"fractions": (0.1, 0.9)}, "trapezoid_unit needs fractions from 0 to 1"),
        ({"step": 4}, "step is 4; give a positive integer with rounding 'step' and None without"),
        ({"rounding": "step"}, "step is None"),
        ({"rounding": "step", "step": 3, "fractions": (0, 0.3, 1)}, "needs evenly spaced fractions"),
        ({"unit": "patch"}, "unit is 'patch'"),
        ({"unit": (4, 0)}, r"unit is \(4, 0\)"),
        ({"score": "accuracy"}, "class_source must be 'label'"),
        ({"score": "magnitude_aligned"}, "needs map_values 'absolute'"),
        ({"image_filter": "mda", "class_source": "given"}, "class_source must be 'predicted'"),
        ({"tie_orders": 3}, "tie_orders is 3"),
        ({"tie_seed": -1}, "tie_seed is -1"),
        ({"version": 0}, "version is 0"),
        ({"name": ""}, "it has no name"),
        ({"space": "normalised"}, "'mean_rgb' is defined in space 'rgb'"),
        ({"reference_args": {}}, r"reference_args has \[\], but 'mean_rgb' needs \['rgb'\]"),
        ({"reference_args": {"rgb": (0.5, 0.5, 128)}}, r"reference_args has rgb=\(0.5, 0.5, 128\)"),
        ({"reference": "blur", "reference_args": {"recipe": "box"}}, "the blur has recipe 'box'"),
        (
            {"reference": "blur", "reference_args": {"recipe": "gkern", "kernel": 10, "sigma": 5, "padding": "zeros"}},
            "reference_args has kernel=10",
        ),
        (
            {"reference": "blur", "reference_args": {"recipe": "gaussian", "sigma_of_side": 0.1, "padding": "zeros"}},
            "reference_args has padding='zeros'",
        ),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(one("aha/deletion"), **change)


def test_unknown_and_missing_fields_are_refused():
    values = one("aha/deletion").to_dict()
    with pytest.raises(ValueError, match=r"missing fields \['auc'\], unknown fields \['area'\]"):
        Protocol.from_dict({("area" if key == "auc" else key): value for key, value in values.items()})
    with pytest.raises(ValueError, match="image_size is 0"):
        get_protocol("rise", image_size=0)


@pytest.mark.parametrize(("kernel", "sigma"), [(11, 5), (31, 31), (51, 50), (5, 0.7), (1, 3)])
def test_gkern_is_scipys_filtered_dirac(kernel, sigma):
    dirac = np.zeros((kernel, kernel))
    dirac[kernel // 2, kernel // 2] = 1
    expected = gaussian_filter(dirac, sigma)
    assert np.allclose(gkern(kernel, sigma).numpy(), expected, rtol=1e-6, atol=1e-9)
    assert gkern(kernel, sigma).sum().item() == pytest.approx(1, abs=1e-6)
    images = torch.randn(2, 3, 9, 13)
    weight = torch.from_numpy(expected).float()[None, None].repeat(3, 1, 1, 1)
    blurred = torch.nn.functional.conv2d(images, weight, padding=kernel // 2, groups=3)
    assert torch.allclose(gkern_blur(images, kernel, sigma), blurred, atol=1e-5)


def test_gkern_is_nearly_a_box():
    flat = gkern(11, 5) * 121
    assert flat.min().item() == pytest.approx(0.936, abs=5e-4) and flat.max().item() == pytest.approx(1.069, abs=5e-4)
    assert (gkern(31, 31) * 31**2 - 1).abs().max() < 3.5e-4
    with pytest.raises(ValueError, match="gkern needs an odd positive side"):
        gkern(10, 5)
