"""Our `evaluate` modules: loaded by name and by path without a network, equal to the functions they stand for."""

from __future__ import annotations

import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

import hf_aha.metrics
from hf_aha.metrics import evaluate_maps, get_protocol
from hf_aha.metrics.modules import MODULES, load, reduce_values
from hf_aha.metrics.reduction import curve_areas
from hf_aha.perturbation import Normalization


FOLDER = Path(hf_aha.metrics.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """The modules are copied into a cache; not into the user's. The package of copies is imported once from there."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
            del sys.modules[name]

    folder = tmp_path_factory.mktemp("evaluate")
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr("evaluate.loading.HF_MODULES_CACHE", str(folder / "modules"), raising=False)
        patch.setattr("evaluate.config.HF_EVALUATE_CACHE", str(folder / "cache"))
        patch.setattr("evaluate.config.HF_METRICS_CACHE", folder / "metrics")
        yield
    forget()


@pytest.fixture(scope="module")
def measured():
    """Results of each kind on random maps and a linear classifier, whose areas differ from image to image."""
    size, generator = 16, torch.Generator().manual_seed(0)
    weights = 0.1 * torch.randn(4, 3, size, size, generator=generator)
    pixels, scores = (
        torch.randn(5, 3, size, size, generator=generator),
        torch.randn(5, size, size, generator=generator),
    )

    def logits_of(images):
        return torch.einsum("bchw,kchw->bk", images, weights)

    def measure(name):
        (protocol,) = get_protocol(name, image_size=size)
        labels = logits_of(pixels).argmax(-1)
        options = {"normalization": Normalization((0.5,) * 3, (0.5,) * 3), "labels": labels}
        return evaluate_maps(logits_of, pixels, scores, labels, protocol, **options)

    return measure


@pytest.mark.parametrize("name", MODULES)
def test_every_module_loads_by_name_and_by_path_and_describes_itself(name):
    for module in (load(name), evaluate.load(str(FOLDER / name))):
        assert module.name == name
        assert "better" in module.description and "@inproceedings" in module.citation
        assert "protocol" in module.inputs_description or name == "grid_pointing"
    assert [path.name for path in (FOLDER / name).glob("*.py")] == [f"{name}.py"]


@pytest.mark.parametrize(
    ("module", "protocol"),
    [
        ("deletion_auc", "aha/deletion"),
        ("deletion_auc", "rise/deletion"),
        ("insertion_auc", "aha/insertion"),
        ("insertion_auc", "hf_aha/pixel/blur/insertion"),
        ("positive_perturbation", "chefer/positive"),
        ("negative_perturbation", "chefer/negative"),
    ],
)
def test_a_module_gives_what_the_protocol_measured(module, protocol, measured):
    result = measured(protocol)
    more = {"references": result.clean.tolist()} if "perturbation" in module else {}
    found = load(module).compute(predictions=result.curves.tolist(), **more, protocol=protocol)
    assert found["per_image"] == pytest.approx(result.values.tolist(), abs=1e-6)
    assert found[module] == pytest.approx(float(result.values.mean()), rel=1e-5)
    assert found["low"] <= found[module] <= found["high"] and found["images"] == 5
    assert (found["protocol"], found["protocol_version"]) == (protocol, 1)
    assert found["higher_is_better"] is result.protocol.higher_is_better


def test_batches_add_up_and_the_default_protocol_is_named(measured):
    result = measured("aha/deletion")
    metric = load("deletion_auc")
    for rows in (slice(0, 2), slice(2, 5)):
        metric.add_batch(predictions=result.curves[rows].tolist())
    found = metric.compute(seed=3)
    assert found["protocol"] == "aha/deletion"
    assert found["deletion_auc"] == pytest.approx(float(result.values.mean()), abs=1e-6)


def test_grid_pointing_is_a_mean_with_its_chance():
    found = load("grid_pointing").compute(predictions=[0.2, 0.4, 0.9], cells=9)
    assert found["grid_pointing"] == pytest.approx(0.5) and found["chance"] == pytest.approx(1 / 9)
    assert found["higher_is_better"] is True


def test_one_image_has_no_interval():
    found = reduce_values("grid_pointing", [0.25])
    assert (found["grid_pointing"], found["low"], found["high"], found["images"]) == (0.25, None, None, 1)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("deletion_auc", {"predictions": [[0.5] * 20]}, "has 21 points a curve, but these have 20"),
        ("deletion_auc", {"predictions": [[float("nan")] * 21]}, "The value of image 0 is nan"),
        ("deletion_auc", {"predictions": [[0.5] * 21], "protocol": "aha/insertion"}, "of another kind"),
        ("deletion_auc", {"predictions": [[0.5] * 9], "protocol": "chefer/positive"}, "of another kind"),
        (
            "insertion_auc",
            {"predictions": [[0.5] * 21], "protocol": "aha"},
            "names 2 protocols; choose one of",
        ),
        ("insertion_auc", {"predictions": [[0.5] * 21], "protocol": "ahah"}, "did you mean 'aha'"),
        (
            "negative_perturbation",
            {"predictions": [[1.0] * 9], "references": [1.0], "protocol": "chefer/positive"},
            "of another kind",
        ),
        ("grid_pointing", {"predictions": [0.5, float("nan")]}, "The value of image 1 is nan"),
    ],
)
def test_what_a_module_cannot_reduce_is_refused(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(module).compute(**arguments)


def test_an_unknown_module_lists_the_known_ones():
    with pytest.raises(ValueError, match="'deletion'.* there are deletion_auc, grid_pointing"):
        load("deletion")


def test_areas_are_refused_without_what_they_need():
    positive = get_protocol("chefer/positive")[0]
    assert curve_areas([[1.0] * 9, [0.0] * 9], positive, [1.0, 0.0]).tolist() == [pytest.approx(90.0), 0.0]
    with pytest.raises(ValueError, match="2 curves need as many scores in `clean`"):
        curve_areas(np.ones((2, 9)), positive)
    with pytest.raises(ValueError, match=r"shape \(2, 8\), but protocol 'chefer/positive' has 9 points"):
        curve_areas(np.ones((2, 8)), positive)
