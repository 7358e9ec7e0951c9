"""Results: storage, joining, intervals, pairing, and refusals to compare."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy import stats

from hf_aha.metrics import (
    ProtocolResult,
    ResultContext,
    evaluate_maps,
    get_protocol,
    merge_results,
    paired_difference,
    results_table,
    summarise,
)
from hf_aha.perturbation import Normalization


CONTEXT = ResultContext(
    method="aha",
    classifier="tiny-vit",
    classifier_revision="0a1b2c",
    dataset="photos",
    split="validation",
    processor={"size": (16, 16), "image_mean": (0.5, 0.5, 0.5)},
)


def made(values, method="aha", *, ids=None, dropped=(), target=None, **context) -> ProtocolResult:
    values = np.asarray(values, np.float32)
    count = len(values)
    return ProtocolResult(
        protocol=get_protocol("aha/deletion")[0],
        context=dataclasses.replace(CONTEXT, method=method, **context),
        image_size=(16, 16),
        dtype="float32",
        versions={"torch": "2.13"},
        image_ids=tuple(map(str, range(count))) if ids is None else tuple(ids),
        target=np.zeros(count, np.int64) if target is None else np.asarray(target),
        labels=None,
        values=values,
        curves=np.repeat(values[:, None], 21, 1),
        clean=np.ones(count, np.float32),
        reference=np.zeros(count, np.float32),
        tie_fraction=np.full(count, 0.25, np.float32),
        dropped=tuple(dropped),
    )


def measured(name: str, count: int = 4, **options) -> ProtocolResult:
    weights = 0.1 * torch.randn(3, 3, 16, 16)
    pixels, scores = torch.randn(count, 3, 16, 16), torch.randn(count, 16, 16)
    scores[-1] = torch.nan
    logits_of = lambda x: torch.einsum("bchw,kchw->bk", x, weights)  # noqa: E731
    (protocol,) = get_protocol(name, image_size=16)
    return evaluate_maps(
        logits_of,
        pixels,
        scores,
        logits_of(pixels).argmax(-1),
        protocol,
        normalization=Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        context=CONTEXT,
        **options,
    )


@pytest.mark.parametrize("name", ["aha/insertion", "rise/insertion", "chefer/negative", "hf_aha/cell4/mean/deletion"])
@pytest.mark.parametrize("count", [1, 4])
def test_a_result_is_reloaded_equal_with_its_protocol(tmp_path, name, count):
    result = measured(name, count, labels=torch.arange(count) % 3)
    path = result.save(tmp_path / "results" / "vit-s14.v2")
    assert path.name == "vit-s14.v2.json" and path.with_name("vit-s14.v2.parquet").is_file()
    assert len(result) == count - 1, "the NaN map is left out, also where it is the only one"
    for given in (path, tmp_path / "results" / "vit-s14.v2"):
        again = ProtocolResult.load(given)
        assert again == result and again.protocol == get_protocol(name, image_size=16)[0]
        assert again.dropped == ((str(count - 1), "the map holds NaN or infinite values"),)
        assert again.context == CONTEXT and again.curves.shape == result.curves.shape
        assert again.curves.dtype == np.float32 and again.target.dtype == np.int64
    assert json.loads(path.read_text())["protocol"]["name"] == name
    assert set(result.versions) == {"hf-aha", "torch", "transformers", "numpy"}


def test_equality_sees_every_part():
    result = made([0.1, 0.2])
    for change in (
        {"values": result.values + 1},
        {"curves": result.curves * 2},
        {"labels": np.zeros(2, np.int64)},
        {"image_ids": ("a", "b")},
        {"dropped": (("c", "zero"),)},
        {"context": dataclasses.replace(CONTEXT, dataset="others")},
    ):
        assert dataclasses.replace(result, **change) != result
    assert dataclasses.replace(result) == result != "result"


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    made([0.1, 0.2]).save(tmp_path / "a")
    made([0.1, 0.2], dataset="others").save(tmp_path / "b")
    (tmp_path / "b.parquet").replace(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="are of two different results"):
        ProtocolResult.load(tmp_path / "a")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a stored result"):
        ProtocolResult.load(tmp_path / "a")


def test_batches_merge_to_the_whole():
    whole = measured("aha/deletion", 4, image_ids="abcd")
    assert whole.dropped[0][0] == "d"
    parts = [
        dataclasses.replace(
            whole,
            image_ids=whole.image_ids[rows],
            dropped=whole.dropped if rows.stop else (),
            **{
                name: getattr(whole, name)[rows]
                for name in ("target", "values", "curves", "clean", "reference", "tie_fraction")
            },
        )
        for rows in (slice(0, 2), slice(2, None))
    ]
    assert merge_results(parts) == whole
    with pytest.raises(ValueError, match="The image 'a' occurs twice"):
        merge_results([parts[0], parts[0]])
    with pytest.raises(ValueError, match="different methods"):
        merge_results([made([1], ids="x"), made([1], "other", ids="y")])
    with pytest.raises(ValueError, match="no result to merge"):
        merge_results([])


def test_the_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).gamma(2, size=60)
    summary = summarise(made(values), resamples=4000, seed=3)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", random_state=np.random.default_rng(3)
    ).confidence_interval
    assert summary.mean == pytest.approx(values.mean(), abs=1e-6)
    assert (summary.low, summary.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert summary.high - summary.low == pytest.approx(2 * 1.96 * values.std() / 60**0.5, rel=0.1)
    assert (summary.seed, summary.resamples, summary.confidence, summary.images) == (3, 4000, 0.95, 60)
    assert (
        summarise(made(values), resamples=4000, seed=3) == summary != summarise(made(values), resamples=4000, seed=4)
    )
    narrow = summarise(made(values), confidence=0.5)
    assert summary.low < narrow.low < narrow.high < summary.high


def test_many_images_are_resampled_in_blocks():
    values = np.random.default_rng(0).random(30_000)
    summary = summarise(made(values), resamples=150)
    assert summary.low < values.mean() < summary.high and summary.high - summary.low < 0.01


def test_one_image_has_no_interval_and_none_has_no_mean():
    summary = summarise(made([0.25]))
    assert (summary.mean, summary.low, summary.high) == (0.25, None, None)
    assert str(summary) == "0.250 (one image, no interval)"
    with pytest.raises(ValueError, match="No image has a value of aha/deletion: all 2 were left out"):
        summarise(made([], dropped=[("a", "NaN"), ("b", "NaN")]))
    with pytest.raises(ValueError, match="resamples is 0"):
        summarise(made([0.1, 0.2]), resamples=0)


def test_differences_are_paired_by_image_in_whatever_order():
    generator = np.random.default_rng(0)
    easy = generator.random(40) * 10
    first = made(easy + 0.1 + 0.01 * generator.standard_normal(40))
    order = generator.permutation(40)
    second = made(easy[order], "random", ids=map(str, order))
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(0.1, abs=0.01) and 0.08 < difference.low < difference.high < 0.12
    assert summarise(first).high - summarise(first).low > 1, "unpaired, the images' own spread hides it"
    assert paired_difference(second, first).mean == pytest.approx(-difference.mean)
    close = paired_difference(first, first)
    assert (close.mean, close.low, close.high) == (0, 0, 0)


def test_an_image_dropped_by_one_method_is_counted_not_paired():
    first = made([0.1, 0.2, 0.4], ids="abc")
    second = made([0.5, 0.1], "random", ids="ca", dropped=[("b", "the map is zero everywhere")])
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx((0.0 - 0.1) / 2, abs=1e-6)
    assert (difference.images, difference.left_out) == (2, 1)


@pytest.mark.parametrize("compare", [paired_difference, lambda a, b: results_table([b, a])])
def test_results_that_do_not_compare_are_refused(compare):
    first = made([0.1, 0.2])
    other = {
        "of different protocols cannot be compared: 'aha/deletion' and 'aha/insertion' differ in name, order": (
            dataclasses.replace(first, protocol=get_protocol("aha/insertion")[0])
        ),
        "differ in version": dataclasses.replace(first, protocol=dataclasses.replace(first.protocol, version=2)),
        "different classifier cannot be compared: 'tiny-vit' and 'dino'": made([0.1, 0.2], classifier="dino"),
        "different classifier revision": made([0.1, 0.2], classifier_revision=None),
        "different dataset cannot": made([0.1, 0.2], dataset="others"),
        "different split": made([0.1, 0.2], split="train"),
        "different processor": made([0.1, 0.2], processor={"size": [32, 32]}),
        r"images of \(16, 16\) and \(32, 32\) pixels": dataclasses.replace(first, image_size=(32, 32)),
        "1 images are only in the first, 0 only in the second": made([0.1]),
        "image '1' was explained for class 0 in the first and 7 in the second": made([0.1, 0.2], target=[0, 7]),
    }
    for message, second in other.items():
        with pytest.raises(ValueError, match=message):
            compare(first, second)


def test_the_table_shows_direction_interval_pairs_and_losses():
    first = made([0.1, 0.2, 0.3])
    second = made([0.5, 0.6], "random", dropped=[("2", "NaN")])
    lines = results_table([first, second], resamples=500, seed=2).splitlines()
    assert lines[0].startswith("| method | aha/deletion ↓ | minus aha, paired |")
    assert lines[2].startswith("| aha | 0.200 [") and lines[2].endswith("| - | 1.000 | 0.000 | 0.250 | 3 | 0 |")
    assert "| random | 0.550 [" in lines[3] and "| 0.400 [0.400, 0.400] |" in lines[3]
    assert lines[3].endswith("| 2 | 1 |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "version 1; ↓ lower is better" in lines[-1] and "500 resamples, seed 2" in lines[-1]
    up = dataclasses.replace(first, protocol=get_protocol("aha/insertion")[0])
    assert "aha/insertion ↑" in results_table([up])
    with pytest.raises(ValueError, match="no result to tabulate"):
        results_table([])
