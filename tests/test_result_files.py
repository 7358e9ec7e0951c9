"""Result files become rows of a card: the numbers agree with those computed here from the files' own curves."""

from __future__ import annotations

import dataclasses
import gzip
import json

import numpy as np
import pytest

from hf_aha.benchmark import BenchmarkResults, MethodRecord
from hf_aha.card_results import CardResults, MeasuredValue, Validation
from hf_aha.metrics import Protocol, get_protocol
from hf_aha.metrics.results import ProtocolResult, ResultContext, paired_difference, summarise
from hf_aha.result_files import load_card_results, read_training_log, read_validation


POINTS = 5
VERSIONS = {"torch": "2.0", "numpy": "2.1"}


def head(explainer: str | None = "demo", **arguments: object) -> dict:
    chosen = {"split": "validation", "images": 8, "skip": 100, "cell_images": 4, "seed": 3, **arguments}
    return {
        "arguments": chosen,
        "dataset": "photos",
        "explainer": explainer,
        "classifier": "target",
        "image_size": [32, 48],
        "patch_size": [8, 8],
        "training": None,
        "versions": VERSIONS,
        "machine": "a machine",
    }


def entry(image: int, method: str, keys: tuple[str, ...] = ("blur/pixel",)) -> dict:
    rng = np.random.default_rng((image, len(method)))
    curves = {key: {name: rng.random(POINTS).round(4).tolist() for name in ("deletion", "insertion")} for key in keys}
    return {"image": image, "method": method, "target": 0, "seconds": float(image), "curves": curves}


def write(path, lines: list[dict]):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def area(curve: list[float]) -> float:
    return sum((a + b) / 2 for a, b in zip(curve, curve[1:], strict=False)) / (len(curve) - 1)


@pytest.fixture
def run(tmp_path):
    """A run in two files; the rival lacks photograph 5, photograph 7 cannot be read, cells on the first four."""
    both = ("blur/pixel", "black/cells")
    ours = [entry(i, "aha", both if i < 4 else both[:1]) for i in (2, 0, 1, 3, 5)] + [{"image": 7, "error": "broken"}]
    theirs = [entry(i, "rival", both if i < 4 else both[:1]) for i in (0, 1, 2, 3)]
    return [
        write(tmp_path / "aha.jsonl.gz", [head(), *ours]),
        write(tmp_path / "rival.jsonl", [head(None), *theirs]),
    ]


def test_a_faithfulness_run_gives_the_means_of_the_common_photographs(run):
    results = load_card_results(run, references=["blur", "mean"])
    pixels, cells = results.measurements
    assert (pixels.protocol, cells.protocol) == (
        "pixels, blur reference, 5 points",
        "patch cells (8 x 8 px), black reference, 5 points",
    )
    assert (pixels.trained_on, cells.trained_on) == (True, False)
    assert (pixels.dataset, pixels.split, pixels.image_size, pixels.seed) == ("photos", "validation", (32, 48), 3)
    assert pixels.selection == "shuffled with seed 3, rows 100 to 107"
    assert pixels.versions == VERSIONS and pixels.sources == ("aha.jsonl.gz", "rival.jsonl")
    found = {(value.method, value.metric): value for value in pixels.values}
    for method in ("aha", "rival"):
        curves = [entry(i, method, ("blur/pixel", "black/cells"))["curves"]["blur/pixel"] for i in range(4)]
        deletion = np.array([area(curve["deletion"]) for curve in curves])
        insertion = np.array([area(curve["insertion"]) for curve in curves])
        assert found[method, "deletion"].mean == pytest.approx(deletion.mean())
        assert found[method, "insertion - deletion"].mean == pytest.approx((insertion - deletion).mean())
        draws = insertion[np.random.default_rng(3).integers(0, 4, (2000, 4))].mean(1)
        assert (found[method, "insertion"].low, found[method, "insertion"].high) == pytest.approx(
            np.percentile(draws, [2.5, 97.5])
        )
    ours, theirs = found["aha", "deletion"], found["rival", "deletion"]
    assert ours.explainer and not theirs.explainer and not ours.higher_is_better
    assert theirs.paired[0] == pytest.approx(ours.mean - theirs.mean) and ours.paired is None
    # Photographs 5 (not by every method) and 7 (unreadable); cells were never tried on these.
    assert (ours.images, ours.left_out) == (4, 2)
    assert {(value.images, value.left_out) for value in cells.values} == {(4, 0)}
    assert {cost.method: cost.median_seconds for cost in results.costs} == {"aha": 2.0, "rival": 1.5}


def test_without_known_references_nothing_is_called_trained_on(run):
    assert {m.trained_on for m in load_card_results(run).measurements} == {None}


def test_runs_on_different_photographs_are_not_mixed(run, tmp_path):
    other = write(tmp_path / "other.jsonl", [head(seed=4), entry(0, "aha")])
    results = load_card_results([run[0], other, run[1]], references=["blur"])
    assert [m.sources for m in results.measurements] == [("aha.jsonl.gz", "rival.jsonl")] * 2 + [("other.jsonl",)]
    assert results.measurements[-1].values[0].low is None  # one photograph has no interval


def protocol_result(method: str, protocol: Protocol, seed: int) -> ProtocolResult:
    rng = np.random.default_rng(seed)
    numbers = rng.random((6, len(protocol.fractions))).astype(np.float32)
    return ProtocolResult(
        protocol=protocol,
        context=ResultContext(method=method, classifier="target", dataset="photos", split="test"),
        image_size=(32, 32),
        dtype="float32",
        versions=VERSIONS,
        image_ids=tuple("abcdef"),
        target=np.zeros(6, np.int64),
        labels=None,
        values=numbers.mean(1),
        curves=numbers,
        clean=numbers[:, 0],
        reference=numbers[:, -1],
        tie_fraction=np.zeros(6, np.float32),
        dropped=(("g", "broken"),),
    )


def test_protocol_results_are_grouped_by_preset_and_paired(tmp_path):
    made = {}
    for protocol in get_protocol("hf_aha/pixel/blur") + get_protocol("chefer/positive"):
        for seed, method in enumerate(("AHA", "rival")):
            result = protocol_result(method, protocol, seed)
            name = f"{method}-{protocol.name.replace('/', '-')}"
            made[method, protocol.name] = result
            result.save(tmp_path / name)
    results = load_card_results(sorted(tmp_path.glob("*.json")), references=["blur"])
    by_name = {m.protocol: m for m in results.measurements}
    assert by_name.keys() == {"hf_aha/pixel/blur", "chefer"}
    assert (by_name["hf_aha/pixel/blur"].trained_on, by_name["chefer"].trained_on) == (True, False)
    for value in by_name["hf_aha/pixel/blur"].values:
        name = f"hf_aha/pixel/blur/{value.metric}"
        summary = summarise(made[value.method, name])
        assert (value.mean, value.low, value.high) == pytest.approx((summary.mean, summary.low, summary.high))
        assert (value.images, value.left_out, value.explainer) == (6, 1, value.method == "AHA")
        if not value.explainer:
            difference = paired_difference(made["AHA", name], made["rival", name])
            assert value.paired == pytest.approx((difference.mean, difference.low, difference.high))


def test_what_was_saved_is_read_back_and_can_be_given_again(run, tmp_path):
    results = load_card_results(run, references=["blur"])
    path = results.save(tmp_path / "results.json")
    again = load_card_results([path])
    assert again.to_dict() == results.to_dict() == json.loads(path.read_text())
    assert again.measurements[0].values[0].mean == pytest.approx(results.measurements[0].values[0].mean, abs=1e-6)
    assert not CardResults() and again


def test_the_last_validation_of_a_log_is_taken(tmp_path):
    log = write(
        tmp_path / "log.jsonl",
        [
            {"step": 1, "loss": 0.5},
            {"step": 2, "validation/blur/deletion": 0.4},
            {"step": 4, "validation/blur/deletion": 0.25, "validation/blur/insertion": 0.75},
            {"step": 5, "loss": 0.1},
        ],
    )
    expected = Validation(4, {"validation/blur/deletion": 0.25, "validation/blur/insertion": 0.75}, "log.jsonl")
    assert read_validation(log) == expected == load_card_results([], training_log=log).validation
    assert len(read_training_log(log)) == 4
    assert read_validation(write(tmp_path / "other.jsonl", [{"step": 1, "loss": 0.5}])) is None


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.json", b"{}", "no result file"),
        ("a.json", b"[1]", "no object"),
        ("a.json", b"\xff", "no result file"),
        ("a.json", b'{"format": "other"}', "'other'"),
        ("a.jsonl", b'{"step": 1}\n{"step": 2}\n', "no faithfulness run"),
        ("a.jsonl.gz", b"not gzip", "no result file"),
        ("a.jsonl", json.dumps(head()).encode() + b'\n{"image": 0}\n', "damaged"),
        ("a.json", b'{"format": "hf_aha.card_results", "format_version": 1}', "damaged"),
        ("a.json", b'{"format": "hf_aha.card_results", "format_version": 2}', "of this version"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=named) as error:
        load_card_results([tmp_path / name])
    assert "\n" not in str(error.value)


def test_a_broken_log_names_its_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(ValueError, match="Line 2"):
        read_validation(tmp_path / "log.jsonl")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", True])
def test_numbers_must_be_finite_numbers(value):
    with pytest.raises(ValueError, match="'rival'"):
        MeasuredValue("rival", False, "deletion", False, value, None, None, 1, 0)


def test_a_benchmark_gives_its_protocols_its_metrics_and_its_costs(tmp_path):
    protocol = get_protocol("hf_aha/pixel/blur/deletion")[0]
    by_method = {"aha": protocol_result("AHA", protocol, 0), "random": protocol_result("Random order", protocol, 1)}
    context = {k: v for k, v in dataclasses.asdict(by_method["aha"].context).items() if k != "method"}
    run = {"context": context, "image_size": [32, 32], "versions": VERSIONS}
    ours = np.arange(7, dtype=np.float32) / 10
    theirs = np.array([0.5, np.nan, 0.25, 0.75, 0.5, 0.5, 0.5], np.float32)
    BenchmarkResults(
        run={**run, "device": "cpu", "precision": "bfloat16", "batch_size": 4},
        images=tuple("abcdefg"),
        unreadable={},
        predicted=dict.fromkeys("abcdefg", 0),
        labels=None,
        methods=(
            MethodRecord("aha", "AHA", (1, 0), 7, (0.25, 0.75), ()),
            MethodRecord("random", "Random order", (0, 0), 7, (), ()),
        ),
        protocols={protocol.name: by_method},
        metrics={"road": {"aha": ours, "random": theirs}, "road/morf": {"aha": ours, "random": theirs}},
        directions={"road": True, "road/morf": None},
    ).save(tmp_path)
    results = load_card_results([tmp_path / "results.json"], references=["blur"])
    curves, road = results.measurements
    assert (curves.protocol, curves.trained_on, road.protocol, road.trained_on) == (
        "hf_aha/pixel/blur",
        True,
        "road",
        False,
    )
    assert curves.sources == road.sources == (f"{tmp_path.name}/results.json",)
    first, second = road.values
    assert (first.explainer, first.images, first.left_out, second.images, second.left_out) == (True, 7, 0, 6, 1)
    kept = [0, 2, 3, 4, 5, 6]
    assert second.mean == pytest.approx(theirs[kept].mean())
    assert second.paired[0] == pytest.approx((ours[kept] - theirs[kept]).mean())
    (cost,) = results.costs
    assert (cost.method, cost.explainer, cost.median_seconds) == ("AHA", True, 0.5)
