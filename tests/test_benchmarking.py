"""The measurement behind `hf-aha evaluate` and `hf-aha benchmark`: numbers, resuming, broken input, reports."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from dataclasses import dataclass
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
from conftest import build_classifier
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_aha.baselines import Method, Passes, get_method
from hf_aha.baselines.random_and_centre import RandomOrder
from hf_aha.benchmark import (
    BenchmarkError,
    BenchmarkResults,
    BenchmarkSettings,
    Entry,
    EvaluationImages,
    LearnedExplainer,
    Store,
    collect,
    markdown,
    measure,
    parse_entries,
    select_images,
    write_examples,
    write_report,
)
from hf_aha.benchmark.cost import measured_cost
from hf_aha.benchmark.images import match_classes
from hf_aha.benchmark.store import average, file_name
from hf_aha.classifier_aha import FrozenClassifier
from hf_aha.commands import CommandError
from hf_aha.commands.measuring import _trained_on, find_metrics
from hf_aha.metrics import (
    ResultContext,
    evaluate_maps,
    get_protocol,
    get_unoptimised,
    paired_difference,
    results_table,
)
from hf_aha.metrics.bands import curve_band
from hf_aha.metrics.passes import TargetPasses
from hf_aha.metrics.results import bootstrap
from hf_aha.perturbation import Normalization


SIZE = 32
LABELS = ["tench", "church", "parachute", "golf ball", "chain saw"]
PROCESSOR = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class Made(Method):
    """A method whose maps a test chooses: `kind` says how they are wrong."""

    title: ClassVar[str] = "made up"
    source: ClassVar[str] = "none"
    kind: str = "gradient"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "calls", [])  # no field: settings make the method's identity

    @property
    def name(self):
        return f"made-{self.kind}"

    def passes(self, grid=(14, 14), width=768):
        return Passes(2, 1)

    def __call__(self, classifier, pixel_values, target):
        scores = super().__call__(classifier, pixel_values, target)
        return scores[:, :4, :4] if self.kind == "small" else scores

    def _scores(self, classifier, pixel_values, target):
        self.calls.append(len(pixel_values))
        if self.kind == "raises":
            raise ValueError("no map\ntoday")
        scores = pixel_values.mean(1)
        if self.kind == "constant":
            scores[0] = 0
        if self.kind == "nan":
            scores[0, 0, 0] = torch.nan
        return scores


def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def photographs(count: int = 7, broken: tuple[int, ...] = ()) -> datasets.Dataset:
    rows = [
        {"image": {"bytes": b"no image" if row in broken else encoded(row), "path": None}, "label": row % 5}
        for row in range(count)
    ]
    columns = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=LABELS)}
    return datasets.Dataset.from_list(rows, features=datasets.Features(columns))


def images_of(dataset: datasets.Dataset, labels: bool = True) -> EvaluationImages:
    return EvaluationImages(dataset, "image", range(len(dataset)), PROCESSOR, "label" if labels else None)


@pytest.fixture(scope="module")
def classifier() -> FrozenClassifier:
    return FrozenClassifier(build_classifier("vit"))


def settings_of(*entries, protocols=("aha",), metrics=(), **changes) -> BenchmarkSettings:
    found = [one for name in protocols for one in get_protocol(name, image_size=SIZE, patch_size=8)]
    values = {
        "entries": [entry if isinstance(entry, Entry) else Entry(entry) for entry in entries],
        "protocols": found,
        "metrics": {name: get_unoptimised(name) for name in metrics},
        "context": ResultContext(classifier="tiny", dataset="noise", split="test", seed=0),
        "normalization": HALF,
        "batch_size": 3,
        "precision": "float32",
        "examples": 2,
        **changes,
    }
    return BenchmarkSettings(**values)


def results_of(classifier, images, settings, output, **options) -> BenchmarkResults:
    store = measure(classifier, images, settings, output, progress=False, **options)
    passes = {entry.name: tuple(entry.method.passes()) for entry in settings.entries}
    run = {
        **json.loads((output / "run.json").read_text()),
        "machine": "a test",
        "command": "hf-aha benchmark",
        "notes": ["a note"],
    }
    return collect(store, settings, len(images), passes, run, (SIZE, SIZE))


# ------------------------------------------------------------------------------------------------------- the numbers


def test_the_numbers_are_those_of_each_protocol_alone(classifier, tmp_path):
    images = images_of(photographs())
    names = ("aha", "chefer", "mda", "hf_aha/pixel", "hf_aha/patch/mean")
    found = results_of(classifier, images, settings_of(Made(), protocols=names), tmp_path)
    rows = [images[index] for index in range(7)]
    pixels = torch.stack([row["pixel_values"] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    passes = TargetPasses(classifier, "float32")
    with torch.no_grad():
        target = classifier(pixels).logits.argmax(-1)
    assert len(found.protocols) == 2 + 2 + 4 + 4 + 2
    for name, by_method in found.protocols.items():
        (protocol,) = get_protocol(name, image_size=SIZE, patch_size=8)
        ids = [row["id"] for row in rows]
        options = {"normalization": HALF, "labels": labels, "image_ids": ids}
        alone = evaluate_maps(passes, pixels, pixels.mean(1), target, protocol, **options)
        result = by_method["made-gradient"]
        assert result.image_ids == alone.image_ids and dict(result.dropped) == dict(alone.dropped)
        np.testing.assert_allclose(result.curves, alone.curves, atol=1e-5)
        np.testing.assert_allclose(result.values, alone.values, atol=1e-3 if "chefer" in name else 1e-5)


def test_protocols_that_perturb_alike_share_their_passes(classifier, tmp_path):
    images, seen = images_of(photographs(3)), []
    handle = classifier.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    counted = []
    for names in (
        ("aha/deletion",),
        ("aha/deletion", "hf_aha/pixel/mean/deletion"),
        ("aha/deletion", "aha/insertion"),
    ):
        seen.clear()
        settings = settings_of(get_method("centre"), protocols=names)
        measure(classifier, images, settings, tmp_path / str(len(counted)), progress=False)
        counted.append(sum(seen))
    handle.remove()
    ends, inner = 2 * 3, 19 * 3
    assert counted == [ends + inner, ends + inner, ends + 2 * inner]


def test_random_orders_are_averaged_image_by_image(classifier, tmp_path):
    images = images_of(photographs(4))
    found = results_of(classifier, images, settings_of(RandomOrder(), metrics=("total_variation",)), tmp_path)
    each = []
    for method in RandomOrder().repeats():
        name = tmp_path / str(method.seed)
        each.append(results_of(classifier, images, settings_of(_Single(seed=method.seed)), name))
    values = [one.protocols["aha/deletion"]["random"].values for one in each]
    np.testing.assert_allclose(found.protocols["aha/deletion"]["random"].values, np.mean(values, 0), atol=1e-6)
    assert len({tuple(value) for value in values}) == 5
    assert found.metrics["total_variation"]["random"] == pytest.approx(np.ones(4), abs=0.05)


class _Single(RandomOrder):
    """One random order instead of five."""

    def repeats(self):
        return (self,)


def test_metrics_come_with_their_parts_and_directions(classifier, tmp_path):
    settings = settings_of(Made(), protocols=(), metrics=("road", "randomization"))
    found = results_of(classifier, images_of(photographs(4)), settings, tmp_path)
    assert found.directions["road"] is True and found.directions["road/blurred_copy"] is None
    assert found.directions["randomization"] is False
    # The map does not look at the classifier, so that random weights cannot change it.
    assert found.metrics["randomization"]["made-gradient"] == pytest.approx(np.ones(4))
    text = markdown(found, dict(enumerate(LABELS)))
    assert "| method | road ↑ | randomization ↓ |" in text and "road/blurred_copy" in text


def test_a_slow_metric_sees_the_first_images_only(classifier, tmp_path):
    images, metrics = images_of(photographs(8, broken=(1,))), ("road", "total_variation")
    some = settings_of(Made(), Entry(get_method("centre"), 2), metrics=metrics, metric_images={"road": 4})
    found = results_of(classifier, images, some, tmp_path / "some")
    whole = results_of(classifier, images, settings_of(Made(), metrics=metrics), tmp_path / "whole")
    made, centre = found.methods
    for name in ("road", "road/blurred_copy"):
        assert len(found.readable(made, name)) == 3 and len(found.readable(centre, name)) == 1
        np.testing.assert_array_equal(found.metrics[name][made.name], whole.metrics[name][made.name][:3])
        assert len(found.metrics[name]["centre"]) == 1
    assert len(found.metrics["total_variation"][made.name]) == 7
    # The batch of images 6 and 7 was not measured, and can be.
    parts = [json.loads(path.read_text()) for path in sorted((tmp_path / "some").glob("parts/made*/*.json"))]
    assert ["road" in part["metrics"] for part in parts] == [True, True, False]
    text = markdown(found, dict(enumerate(LABELS)))
    assert "| method | road ↑ (first 4 images) | total_variation ↓ |" in text
    found.save(tmp_path / "some")
    again = BenchmarkResults.load(tmp_path / "some")
    assert again.metric_images == {"road": 4} and markdown(again, dict(enumerate(LABELS))) == text
    shutil.rmtree(tmp_path / "some" / "parts")
    more = results_of(classifier, images, settings_of(Made(), metrics=metrics), tmp_path / "some", resume=True)
    for name, by_method in whole.metrics.items():
        np.testing.assert_array_equal(more.metrics[name][made.name], by_method[made.name])


def test_metrics_are_named_with_their_number_of_images():
    found, first, _ = find_metrics(["road", "grid_pointing:96"])
    assert [*found] == ["road", "grid_pointing"] and first == {"grid_pointing": 96}
    found, first, _ = find_metrics(["all:10", "road:5"])
    assert first == {name: 5 if name == "road" else 10 for name in found}
    for words, message in (
        (["road:0"], "'road:0' must be a metric, or a metric and its number of images as in road:100"),
        (["road", "road:3"], "metric 'road' is named twice"),
        (["raod:3"], "did you mean 'road'"),
    ):
        with pytest.raises(CommandError, match=message):
            find_metrics(words)


def test_what_an_explainer_was_trained_for_is_noted():
    from hf_aha import AhaExplainer

    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    explainer = AhaExplainer.from_classifier(build_classifier("vit"), image_processor=PROCESSOR, **sizes)
    entries = [Entry(LearnedExplainer(explainer=explainer, label="aha")), Entry(get_method("centre"))]
    assert _trained_on(entries) == []
    explainer.config.training = {"arguments": {"references": ["blur", "mean"], "pointing_weight": 0.5}}
    curves, game = _trained_on(entries)
    assert "AHA was trained on deletion and insertion with the references blur and mean" in curves
    assert "grid_pointing is no independent test" in game
    explainer.config.training["arguments"]["pointing_weight"] = 0.0
    assert _trained_on(entries) == [curves]


# ------------------------------------------------------------------------------------------------- resuming, growing


def test_a_killed_run_loses_one_batch_at_most(classifier, tmp_path, monkeypatch):
    images, method = images_of(photographs()), Made()
    settings = settings_of(method, Entry(get_method("centre")))
    whole = results_of(classifier, images, settings, tmp_path / "whole")
    method.calls.clear()

    from hf_aha.benchmark import runner

    original, written = runner.Store.write, []

    def killed(store, name, batch, part):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append((name, batch))
        original(store, name, batch, part)

    monkeypatch.setattr(runner.Store, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(classifier, images, settings, tmp_path / "killed", progress=False)
    monkeypatch.undo()
    before = list(method.calls)
    resumed = results_of(classifier, images, settings, tmp_path / "killed", resume=True)
    assert before == [3, 3] and method.calls == [3, 3, 1]  # what was written is not measured again
    for protocol, by_method in whole.protocols.items():
        for name, result in by_method.items():
            assert resumed.protocols[protocol][name] == result


def test_a_finished_run_grows(classifier, tmp_path):
    images, method = images_of(photographs()), Made()
    measure(classifier, images, settings_of(Entry(method, 3)), tmp_path, progress=False)
    assert method.calls == [3]
    asked = {"protocols": ("aha", "chefer"), "metrics": ("total_variation",)}
    more = settings_of(method, get_method("centre"), **asked)
    found = results_of(classifier, images, more, tmp_path, resume=True)
    assert method.calls == [3, 3, 3, 1]
    assert {len(result) for by in found.protocols.values() for result in by.values()} == {7}
    fresh = results_of(classifier, images, more, tmp_path / "fresh")
    for protocol, by_method in fresh.protocols.items():
        for name, result in by_method.items():
            assert found.protocols[protocol][name] == result
    values = [one.metrics["total_variation"]["centre"] for one in (found, fresh)]
    np.testing.assert_array_equal(*values)


@pytest.mark.parametrize("labels", [True, False])
def test_a_run_of_which_only_the_results_were_kept_goes_on(classifier, tmp_path, labels):
    dataset = photographs(8, broken=(1,))
    images, method = images_of(dataset, labels), Made(kind="nan")
    metrics = ("road", "total_variation")
    some = settings_of(method, Entry(get_method("centre"), 4), metrics=metrics)
    few = images_of(dataset.select(range(6)), labels)
    before = results_of(classifier, few, some, tmp_path / "kept")
    before.save(tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept" / "parts")
    shutil.rmtree(tmp_path / "kept" / "maps")
    method.calls.clear()
    more = settings_of(method, get_method("centre"), metrics=metrics)
    grown = results_of(classifier, images, more, tmp_path / "kept", resume=True)
    assert method.calls == [2]  # the third batch alone
    fresh = results_of(classifier, images, more, tmp_path / "fresh")
    for protocol, by_method in fresh.protocols.items():
        for name, result in by_method.items():
            assert grown.protocols[protocol][name] == result
    for name, by_method in fresh.metrics.items():
        for one, values in by_method.items():
            np.testing.assert_array_equal(grown.metrics[name][one], values)
    assert [one.failed for one in grown.methods] == [one.failed for one in fresh.methods]
    assert grown.unreadable == fresh.unreadable and grown.labels == fresh.labels
    assert grown.methods[0].seconds[:2] == before.methods[0].seconds


def test_results_without_the_numbers_of_single_images_are_not_gone_on_with(classifier, tmp_path):
    images, settings = images_of(photographs(3)), settings_of(Made())
    results_of(classifier, images, settings, tmp_path).save(tmp_path)
    shutil.rmtree(tmp_path / "parts")
    (tmp_path / "per_image.parquet").unlink()
    with pytest.raises(BenchmarkError, match="results.json without its per_image.parquet"):
        measure(classifier, images, settings, tmp_path, resume=True, progress=False)


def test_nothing_is_overwritten_or_mixed(classifier, tmp_path):
    images = images_of(photographs(3))
    measure(classifier, images, settings_of(Made()), tmp_path, progress=False)
    with pytest.raises(BenchmarkError, match="already holds a measurement; give --resume"):
        measure(classifier, images, settings_of(Made()), tmp_path, progress=False)
    for change, named in (
        ({"context": ResultContext(classifier="another", dataset="noise", split="test", seed=0)}, "context"),
        ({"batch_size": 2}, "batch_size: 3 there, 2 now"),
        ({"precision": "bfloat16"}, "precision"),
        ({"method_precision": "bfloat16"}, "method_precision"),
        ({"seed": 1}, "seed"),
    ):
        with pytest.raises(BenchmarkError, match=f"another measurement, which differs in .*{named}"):
            measure(classifier, images, settings_of(Made(), **change), tmp_path, resume=True, progress=False)
    other = Made(max_batch=3)
    measure(classifier, images, settings_of(other), tmp_path, resume=True, progress=False)  # changes no number
    with pytest.raises(BenchmarkError, match="another method of the name 'random'"):
        measure(classifier, images, settings_of(RandomOrder()), tmp_path, resume=True, progress=False)
        measure(classifier, images, settings_of(RandomOrder(seed=7)), tmp_path, resume=True, progress=False)


def test_another_image_under_the_same_name_has_another_id(tmp_path):
    first, second = images_of(photographs(3)), images_of(photographs(4).select([0, 1, 3]))
    ids = [[images[index]["id"] for index in range(3)] for images in (first, second)]
    assert ids[0][:2] == ids[1][:2] and ids[0][2] != ids[1][2]
    assert all(one.split("-")[0] == str(index) for index, one in enumerate(ids[0]))


def test_results_are_read_back_as_they_were_written(classifier, tmp_path):
    images = images_of(photographs(5, broken=(1,)))
    asked = {"protocols": ("aha", "mda/deletion"), "metrics": ("edge_alignment",)}
    settings = settings_of(Made(kind="nan"), Entry(get_method("centre"), 3), **asked)
    found = results_of(classifier, images, settings, tmp_path)
    found.save(tmp_path)
    loaded = BenchmarkResults.load(tmp_path)
    assert loaded.protocols == found.protocols and loaded.methods == found.methods
    assert (loaded.images, loaded.unreadable, loaded.predicted) == (found.images, found.unreadable, found.predicted)
    assert (loaded.labels, loaded.directions, loaded.run) == (found.labels, found.directions, found.run)
    for method, values in found.metrics["edge_alignment"].items():
        np.testing.assert_array_equal(loaded.metrics["edge_alignment"][method], values)
    with pytest.raises(BenchmarkError, match="holds no results.json"):
        BenchmarkResults.load(tmp_path / "nowhere")


# --------------------------------------------------------------------------------------------- bad input, all listed


def test_a_broken_row_is_listed_and_the_others_are_measured(classifier, tmp_path):
    found = results_of(classifier, images_of(photographs(7, broken=(4,))), settings_of(Made()), tmp_path)
    (broken,) = found.unreadable
    assert broken.startswith("4-")
    result = found.protocols["aha/deletion"]["made-gradient"]
    assert len(result) == 6 and dict(result.dropped)[broken].startswith("the image cannot be read: ")
    assert found.images.index(broken) == 4
    assert broken in markdown(found, dict(enumerate(LABELS)))


def test_a_batch_without_a_readable_row_does_not_end_the_run(classifier, tmp_path):
    dataset = photographs(4, broken=(0, 1, 2))
    found = results_of(classifier, images_of(dataset), settings_of(Made(), metrics=("edge_alignment",)), tmp_path)
    assert len(found.unreadable) == 3 and len(found.protocols["aha/insertion"]["made-gradient"]) == 1
    text = markdown(found, dict(enumerate(LABELS)))
    assert "(one image, no interval)" in text


@pytest.mark.parametrize(
    ("kind", "measured", "listed"),
    [
        ("nan", 2, "the map holds NaN or infinite values"),
        ("small", 0, "the method gave scores of 3 x 4 x 4 where 3 x 32 x 32 are needed"),
        ("raises", 0, "the method failed: ValueError: no map today"),
    ],
)
def test_unusable_maps_are_counted_and_named(kind, measured, listed, classifier, tmp_path):
    images = images_of(photographs(3))
    settings = settings_of(Made(kind=kind), Entry(get_method("centre")), metrics=("total_variation",))
    found = results_of(classifier, images, settings, tmp_path)
    result = found.protocols["aha/deletion"][f"made-{kind}"]
    assert len(result) == measured and len(result) + len(result.dropped) == 3
    (record, _) = found.methods
    assert len(record.failed) == 3 - measured and {why for _, why in record.failed} == {listed}
    text = markdown(found, dict(enumerate(LABELS)))
    assert listed in text and all(image in text for image, _ in record.failed)
    assert ("no image" in text) == (measured == 0)
    write_report(found, dict(enumerate(LABELS)), tmp_path)
    assert write_examples(found, images, settings, Store(tmp_path), dict(enumerate(LABELS))).is_file()


def test_constant_maps_are_measured_and_named(classifier, tmp_path):
    found = results_of(classifier, images_of(photographs(3)), settings_of(Made(kind="constant")), tmp_path)
    result = found.protocols["aha/deletion"]["made-constant"]
    assert len(result) == 3 and result.tie_fraction[0] == 1
    assert found.methods[0].constant == (found.images[0],)
    assert "1 constant maps, whose pixels went by lowest index first" in markdown(found, dict(enumerate(LABELS)))


def test_a_method_that_failed_is_tried_again(classifier, tmp_path):
    images, method = images_of(photographs(3)), Made(kind="raises")
    for _ in range(2):
        measure(classifier, images, settings_of(method), tmp_path, resume=True, progress=False)
    assert method.calls == [3, 3]


def test_memory_that_runs_out_for_a_batch_is_tried_image_by_image(classifier, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Greedy(Made):
        def _scores(self, classifier, pixel_values, target):
            if len(pixel_values) > 1:
                raise torch.OutOfMemoryError("too much")
            return super()._scores(classifier, pixel_values, target)

    found = results_of(classifier, images_of(photographs(3)), settings_of(Greedy()), tmp_path)
    assert len(found.protocols["aha/deletion"]["made-gradient"]) == 3 and not found.methods[0].failed


def test_unknown_labels_are_left_out_where_they_are_needed(classifier, tmp_path):
    dataset = photographs(3)
    classes = [-1, 1, 2, 3, 4]
    images = EvaluationImages(dataset, "image", range(3), PROCESSOR, "label", classes)
    found = results_of(
        classifier, images, settings_of(Made(), protocols=("aha/deletion", "chefer/positive")), tmp_path
    )
    assert len(found.protocols["aha/deletion"]["made-gradient"]) == 3
    positive = found.protocols["chefer/positive"]["made-gradient"]
    assert dict(positive.dropped) == {found.images[0]: "the label of the image is not known"}


def test_classes_never_predicted_are_named(classifier, tmp_path):
    found = results_of(classifier, images_of(photographs(3)), settings_of(Made()), tmp_path)
    never = found.never_predicted(5)
    assert never and set(never) == set(range(5)) - set(found.predicted.values())
    assert f"Classes never predicted: {len(never)} of 5" in markdown(found, dict(enumerate(LABELS)))


def test_an_empty_selection_is_refused():
    with pytest.raises(ValueError, match="no image to measure"):
        EvaluationImages(photographs(2), "image", [], PROCESSOR)


# ------------------------------------------------------------------------------------------------- tables and plots


def test_methods_on_fewer_images_are_paired_on_those(classifier, tmp_path):
    images = images_of(photographs())
    settings = settings_of(Made(), Entry(get_method("centre"), 4))
    found = results_of(classifier, images, settings, tmp_path)
    ours, theirs = (found.protocols["aha/deletion"][name] for name in ("made-gradient", "centre"))
    assert len(ours) == 7 and len(theirs) == 4
    text = markdown(found, dict(enumerate(LABELS)))
    expected = paired_difference(ours.select(found.images[:4]), theirs)
    assert f"{expected.mean:+.3f} [{expected.low:+.3f}, {expected.high:+.3f}]" in text
    with pytest.raises(ValueError, match="different images cannot be paired"):
        paired_difference(ours, theirs)


def test_results_of_other_targets_and_protocols_are_not_tabulated(classifier, tmp_path):
    found = results_of(classifier, images_of(photographs(3)), settings_of(Made()), tmp_path)
    deletion, insertion = (found.protocols[f"aha/{curve}"]["made-gradient"] for curve in ("deletion", "insertion"))
    with pytest.raises(ValueError, match="different protocols"):
        results_table([deletion, insertion])
    prints = [tuple(np.random.default_rng(seed).normal(size=16)) for seed in (0, 1)]

    def with_context(**changes):
        return dataclasses.replace(deletion, context=dataclasses.replace(deletion.context, **changes))

    with pytest.raises(ValueError, match="different target models cannot be compared: the fingerprints"):
        results_table([with_context(classifier_fingerprint=one) for one in prints])
    # The same behaviour under another name is the same target model, up to the rounding of another machine.
    near = tuple(value * (1 + 1e-6) for value in prints[0])
    copied = with_context(classifier="copy", classifier_fingerprint=near)
    assert "made up" in results_table([with_context(classifier_fingerprint=prints[0]), copied])
    with pytest.raises(ValueError, match="different seed cannot be compared"):
        results_table([deletion, with_context(seed=1)])


def test_the_report_names_what_its_numbers_are_of(classifier, tmp_path):
    images = images_of(photographs(4))
    settings = settings_of(Made(), Entry(get_method("centre")), protocols=("aha", "chefer"))
    found = results_of(classifier, images, settings, tmp_path)
    found.save(tmp_path)
    written = write_report(found, dict(enumerate(LABELS)), tmp_path)
    names = {path.name for path in written}
    assert names == {"results.md", "curves-aha.png", "cost-aha.png", "curves-chefer.png", "cost-chefer.png"}
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    for needed in ("tiny", "noise", "`test`", "seed 0", "float32", "aha/deletion ↓", "Version 1", "a note", "torch"):
        assert needed in text
    stored = json.loads((tmp_path / "results.json").read_text())
    summary = stored["protocols"]["aha/insertion"]["methods"]["centre"]["summary"]
    result = found.protocols["aha/insertion"]["centre"]
    again = bootstrap(result.values, 0, "aha/insertion")
    assert (summary["mean"], summary["low"], summary["high"]) == (again.mean, again.low, again.high)
    assert stored["protocols"]["aha/insertion"]["definition"] == result.protocol.to_dict()
    sheet = write_examples(found, images, settings, Store(tmp_path), dict(enumerate(LABELS)))
    with Image.open(sheet) as picture:
        assert picture.height > 2 * 200


def test_the_band_of_a_curve_is_the_bootstrap_of_each_point(classifier, tmp_path):
    found = results_of(classifier, images_of(photographs()), settings_of(Made()), tmp_path)
    result = found.protocols["aha/deletion"]["made-gradient"]
    fractions, mean, low, high = curve_band(result, resamples=4000)
    np.testing.assert_allclose(mean, result.curves.mean(0), atol=1e-6)
    assert fractions.tolist() == list(result.protocol.fractions)
    point = bootstrap(result.curves[:, 10], 0, "point", resamples=4000)
    assert (low[10], high[10]) == (pytest.approx(point.low, abs=0.01), pytest.approx(point.high, abs=0.01))
    assert curve_band(result.select(result.image_ids[:1]))[2:] == (None, None)
    with pytest.raises(ValueError, match="No image has a curve"):
        curve_band(result.select([]))


# ------------------------------------------------------------------------------------------------------ small pieces


def test_images_are_drawn_by_seed_and_labels_matched_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    photographs(9).cast_column("image", datasets.Image()).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    known = {name: number for number, name in enumerate(reversed(LABELS))}

    def class_index(name):
        if name not in known:
            raise ValueError(name)
        return known[name]

    def draw(**changes):
        options = {"split": "test", "images": 4, "seed": 0, **changes}
        return select_images(str(tmp_path / "data"), PROCESSOR, class_index, 5, **options)

    images, facts, notes = draw()
    assert facts == {"dataset": "data", "dataset_revision": None, "split": "test", "seed": 0} and not notes
    order = np.random.default_rng(0).permutation(9)
    assert images.rows == order[:4].tolist() and draw(skip=4)[0].rows == order[4:8].tolist()
    assert draw(seed=1)[0].rows != images.rows
    assert images[0]["label"] == 4 - order[0] % 5
    assert len(draw(images=None)[0]) == 9
    assert "only 9 are there" in draw(images=20)[2][0]
    with pytest.raises(ValueError, match="no image to measure"):
        draw(skip=9)


def test_labels_without_a_class():
    def class_index(name):
        return ["a", "b"].index(name)

    assert match_classes(["b", "a"], class_index, 2) == ([1, 0], None)
    found, note = match_classes(["b", "c"], class_index, 2)
    assert found == [1, -1] and "1 of the 2 labels" in note
    found, note = match_classes(["c", "d"], class_index, 2)
    assert found == [0, 1] and "by their order" in note
    found, note = match_classes(["c", "d", "e"], class_index, 2)
    assert found is None and "not measured" in note


def test_entries_are_named_with_their_number_of_images():
    entries = {entry.name: entry.images for entry in parse_entries(["all", "rise:100"])}
    assert entries["rise"] == 100 and entries["random"] is None and "score-cam" in entries
    for words, message in (
        (["rise:x"], "number of images as in rise:100"),
        (["rise:0"], "number of images"),
        (["rise", "rise:3"], "named twice"),
        (["risee"], "did you mean 'rise'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_entries(words)


def test_an_explainer_is_a_method_of_any_classifier(classifier):
    from hf_aha import AhaExplainer

    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    explainer = AhaExplainer.from_classifier(build_classifier("vit"), image_processor=PROCESSOR, **sizes).eval()
    method = LearnedExplainer(explainer=explainer, label="aha")
    pixels, target = torch.rand(2, 3, SIZE, SIZE), torch.tensor([0, 1])
    with torch.no_grad():
        expected = explainer(pixels, target).scores
    own = explainer.classifier
    assert torch.equal(method(own, pixels, target), expected)
    other = FrozenClassifier(build_classifier("vit", seed=1))
    assert not torch.equal(method(other, pixels, target), expected) and explainer.classifier is own
    first = Entry(method).identity()
    assert first == Entry(LearnedExplainer(explainer=explainer, label="b")).identity()
    with torch.no_grad():
        next(explainer.decoder.parameters()).add_(1)
    assert Entry(method).identity() != first


def test_the_peak_counts_what_is_allocated_and_freed():
    with measured_cost(torch.device("cpu")) as cost:
        torch.ones(32, 2**20 // 4).sum()
    assert cost.seconds > 0
    assert cost.peak_mib is None or 28 < cost.peak_mib < 200


def test_methods_run_in_the_precision_that_is_asked_for(classifier, tmp_path):
    images = images_of(photographs(3))
    maps, texts = {}, {}
    for precision in ("float32", "bfloat16"):
        settings = settings_of(get_method("rise", masks=8), method_precision=precision, metrics=("sensitivity",))
        found = results_of(classifier, images, settings, tmp_path / precision)
        maps[precision] = Store(tmp_path / precision).read_maps("rise", 0)
        texts[precision] = markdown(found, dict(enumerate(LABELS)))
        assert found.run["precision"] == "float32"
    assert "those of the methods: float32" in texts["float32"]
    assert "those of the methods: bfloat16" in texts["bfloat16"]
    assert "method_precision" not in json.loads((tmp_path / "float32" / "run.json").read_text())
    for image, exact in maps["float32"].items():
        rough = maps["bfloat16"][image]
        assert not np.array_equal(rough, exact) and np.corrcoef(rough.ravel(), exact.ravel())[0, 1] > 0.99


def test_precision_is_asked_for_and_reported(classifier):
    pixels = torch.rand(2, 3, SIZE, SIZE)
    plain, fast = TargetPasses(classifier, "float32"), TargetPasses(classifier, "bfloat16")
    assert plain(pixels).dtype == torch.float32 and fast(pixels).dtype == torch.bfloat16
    assert (plain.precision, fast.precision, fast.images) == ("float32", "bfloat16", 2)
    assert next(classifier.parameters()).dtype == torch.float32
    with pytest.raises(ValueError, match="precision is 'int8', but must be one of auto, float32, bfloat16"):
        TargetPasses(classifier, "int8")


def test_names_become_file_names():
    assert file_name("grad-cam++") == "grad-cam++" and file_name("../x y") == "x-y" and file_name("..") == "unnamed"


def test_the_average_drops_what_any_repeat_drops(classifier, tmp_path):
    found = results_of(classifier, images_of(photographs(3)), settings_of(Made()), tmp_path)
    result = found.protocols["aha/deletion"]["made-gradient"]
    partial = dataclasses.replace(result.select(result.image_ids[1:]), dropped=((result.image_ids[0], "gone"),))
    mean = average([result, partial])
    assert mean.image_ids == result.image_ids[1:] and mean.dropped == ((result.image_ids[0], "gone"),)
    np.testing.assert_allclose(mean.values, result.values[1:])
    assert average([result]) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entries": []}, "no method to measure"),
        ({"entries": [Entry(Made()), Entry(Made())]}, "Two methods have one name"),
        ({"protocols": []}, "nothing to measure"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_that_measure_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings_of(Made()), **change)


@pytest.mark.slow
def test_two_processes_share_the_batches(classifier, tmp_path):
    from accelerate import debug_launcher

    images, settings = images_of(photographs()), settings_of(Made(), get_method("centre"))
    alone = results_of(classifier, images, settings, tmp_path / "alone")

    def run():
        measure(classifier, images, settings, tmp_path / "shared", progress=False)

    debug_launcher(run, num_processes=2)
    shared = results_of(classifier, images, settings, tmp_path / "shared", resume=True)
    for protocol, by_method in alone.protocols.items():
        for name, result in by_method.items():
            assert shared.protocols[protocol][name] == result
