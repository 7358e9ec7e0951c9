"""The task "visual-attribution": the same answers as `explain`, in batches, streams and workers."""

from __future__ import annotations

import importlib
import json
import logging

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, ViTImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

import hf_aha.pipelines
from hf_aha import AhaExplainer, ImageReadError, VisualAttributionPipeline, pipeline
from hf_aha.visualization import overlay, rank_map


LABELS = {0: "tench, Tinca tinca", 1: "English springer", 2: "cassette player", 3: "church", 4: "French horn"}
SQUASH = ViTImageProcessor(size={"height": 32, "width": 32})
CROP = BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
FREE = CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
SHAPES = ((40, 56), (33, 20), (32, 32), (25, 70), (48, 24))


def make_photograph(height, width, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


PHOTOGRAPHS = [make_photograph(*shape, seed) for seed, shape in enumerate(SHAPES)]


@pytest.fixture
def make_explainer(make_classifier):
    def make(processor=SQUASH, family="vit"):
        model = make_classifier(family)
        model.config.id2label = dict(LABELS)
        sizes = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
        return AhaExplainer.from_classifier(model, image_processor=processor, **sizes).eval()

    return make


@pytest.fixture
def explainer(make_explainer):
    return make_explainer()


@pytest.fixture
def attribute(explainer):
    return pipeline("visual-attribution", model=explainer)


@pytest.fixture
def folder(explainer, tmp_path):
    """A saved explainer that needs nothing else."""
    explainer.save_pretrained(tmp_path / "explainer", include_classifier=True)
    return tmp_path / "explainer"


def assert_same(found, wanted):
    """A pipeline's dict against an Explanation or another dict."""
    if not isinstance(wanted, dict):
        wanted = {
            "label": wanted.label,
            "score": wanted.probability,
            "target": wanted.target,
            "scores": wanted.scores,
        }
    assert (found["label"], found["target"]) == (wanted["label"], wanted["target"])
    assert found["score"] == pytest.approx(wanted["score"], abs=1e-5)
    assert found["scores"].dtype == np.float32
    np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("processor", [SQUASH, CROP], ids=["squash", "crop"])
@pytest.mark.parametrize("question", [{}, {"target": "church"}, {"target": 2}, {"top_k": 3}], ids=str)
def test_agrees_with_explain(make_explainer, processor, question):
    explainer = make_explainer(processor)
    found = pipeline(model=explainer)(PHOTOGRAPHS, batch_size=3, **question)
    wanted = explainer.explain(PHOTOGRAPHS, **question)
    assert len(found) == len(wanted) == len(PHOTOGRAPHS)
    for one, other, photograph in zip(found, wanted, PHOTOGRAPHS, strict=True):
        answers, expected = (one, other) if "top_k" in question else ([one], [other])
        assert len(answers) == question.get("top_k", 1)
        for answer, explanation in zip(answers, expected, strict=True):
            assert_same(answer, explanation)
            assert answer["scores"].shape == (photograph.height, photograph.width)


def test_adaptive_refinement_is_that_of_refine(explainer):
    (answer,) = pipeline(model=explainer)(PHOTOGRAPHS[:1], refine=2, adaptive=True, overlay=False)
    (wanted,) = explainer.explain(PHOTOGRAPHS[:1], refine=2, adaptive=True)
    (plain,) = explainer.explain(PHOTOGRAPHS[:1], refine=2)
    assert_same(answer, wanted)
    assert answer["refinement"]["passes"] == wanted.refinement["passes"] != plain.refinement["passes"]
    assert wanted.refinement["value"] >= wanted.refinement["initial_value"]


@pytest.mark.parametrize("question", [{"target": "church", "against": 4}, {"against": "cassette player"}], ids=str)
@pytest.mark.parametrize("refine", [0, 1])
def test_a_class_is_compared_with_another_as_in_explain(explainer, question, refine):
    found = pipeline(model=explainer)(PHOTOGRAPHS[:3], batch_size=2, refine=refine, **question)
    wanted = explainer.explain(PHOTOGRAPHS[:3], **question, refine=refine)
    for answer, explanation in zip(found, wanted, strict=True):
        assert_same(answer, explanation)
        assert (answer["against"], answer["against_label"]) == (explanation.against, explanation.against_label)
        assert answer["against_score"] == pytest.approx(explanation.against_probability, abs=1e-5)
        assert answer["overlay"].tobytes() == overlay(explanation.image, answer["scores"], sign="both").tobytes()
        assert ("refinement" in answer) == bool(refine)


def test_a_call_with_another_question_replaces_the_whole_question(explainer):
    attribute = pipeline(model=explainer, target="church", against="tench")
    assert [attribute(PHOTOGRAPHS[0])[key] for key in ("label", "against")] == ["church", 0]
    assert "against" not in attribute(PHOTOGRAPHS[0], target=1)
    assert attribute(PHOTOGRAPHS[0], target=1, against=2)["against_label"] == "cassette player"
    assert attribute(PHOTOGRAPHS[0])["against"] == 0


def test_pictures_show_the_ranks_of_the_photographs_pixels(make_explainer):
    photograph = PHOTOGRAPHS[3]
    found = pipeline(model=make_explainer(CROP))(photograph)
    assert set(found) == {"label", "score", "target", "scores", "mask", "overlay"}
    seen = ~np.isnan(found["scores"])
    assert 0 < seen.sum() < seen.size
    mask = np.asarray(found["mask"])
    assert found["mask"].mode == "L" and found["mask"].size == found["overlay"].size == photograph.size
    assert not mask[~seen].any()
    np.testing.assert_allclose(mask[seen] / 255, rank_map(found["scores"])[seen], atol=0.5 / 255 + 1e-6)
    assert (mask[seen].min(), mask[seen].max()) == (0, 255)
    assert found["overlay"].tobytes() == overlay(photograph, found["scores"]).tobytes()


def test_every_photograph_of_a_batch_gets_its_own_overlay(attribute):
    for photograph, found in zip(PHOTOGRAPHS, attribute(PHOTOGRAPHS, batch_size=4), strict=True):
        assert found["overlay"].tobytes() == overlay(photograph, found["scores"]).tobytes()


def test_the_overlay_can_be_left_out(explainer):
    assert "overlay" not in pipeline(model=explainer)(PHOTOGRAPHS[0], overlay=False)
    without = pipeline(model=explainer, overlay=False)
    assert "overlay" not in without(PHOTOGRAPHS[0]) and "mask" in without(PHOTOGRAPHS[0])
    assert "overlay" in without(PHOTOGRAPHS[0], overlay=True)


@pytest.mark.parametrize("processor", [SQUASH, CROP, FREE], ids=["squash", "crop", "free"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_batch_size_changes_nothing(make_explainer, processor, top_k):
    # One of these processors keeps the aspect ratio, so that the sides must stay multiples of the patch.
    shapes = ((32, 48), (64, 32), (64, 64), (32, 64), (96, 144)) if processor is FREE else SHAPES
    photographs = [make_photograph(*shape, seed) for seed, shape in enumerate(shapes)]
    attribute = pipeline(model=make_explainer(processor), top_k=top_k)
    one_by_one = [attribute(photograph) for photograph in photographs]
    for batch_size in (1, 2, 4):
        for found, wanted in zip(attribute(photographs, batch_size=batch_size), one_by_one, strict=True):
            answers, expected = ([found], [wanted]) if top_k == 1 else (found, wanted)
            for answer, other in zip(answers, expected, strict=True):
                assert_same(answer, other)
                assert answer["overlay"].size == other["overlay"].size


def test_the_batch_size_reaches_the_explainer(attribute, monkeypatch):
    sizes = []
    forward = attribute.model.forward
    monkeypatch.setattr(attribute.model, "forward", lambda p, *rest: sizes.append(len(p)) or forward(p, *rest))
    attribute(PHOTOGRAPHS, batch_size=2)
    assert sizes == [2, 2, 1]


def test_no_gradient_is_recorded_and_the_mode_is_left_alone(explainer):
    explainer.train()
    attribute = pipeline(model=explainer)
    outputs = attribute.forward(attribute.preprocess(PHOTOGRAPHS[0]))
    assert not outputs["logits"].requires_grad and not outputs["scores"][0].requires_grad
    assert explainer.training


# -------------------------------------------------------------------------------------------------------------- inputs


def test_every_kind_of_input_is_read(attribute, tmp_path):
    photograph = PHOTOGRAPHS[0]
    photograph.save(tmp_path / "photo.png")
    wanted = attribute(photograph)
    path = tmp_path / "photo.png"
    array = np.asarray(photograph)
    for source in (path, str(path), path.read_bytes(), array, torch.tensor(array).permute(2, 0, 1)):
        assert_same(attribute(source), wanted)
    for sources in ([photograph, path], (photograph, str(path))):
        found = attribute(sources, batch_size=2)
        assert isinstance(found, list) and len(found) == 2
        for one in found:
            assert_same(one, wanted)
    assert attribute([]) == attribute(()) == []


def test_a_generator_is_read_as_results_are_taken(attribute):
    read = []

    def photographs():
        for number, photograph in enumerate(PHOTOGRAPHS):
            read.append(number)
            yield photograph

    stream = attribute(photographs())
    assert len(read) <= 1
    for number, wanted in enumerate(PHOTOGRAPHS):
        found = next(stream) if number else next(iter(stream))
        assert read == list(range(number + 1))
        assert found["overlay"].size == wanted.size
    with pytest.raises(StopIteration):
        next(stream)


def test_an_iterable_streams_in_batches(attribute):
    read = []

    class Photographs:
        def __iter__(self):
            for photograph in PHOTOGRAPHS:
                read.append(photograph)
                yield photograph

    stream = iter(attribute(Photographs(), batch_size=2))
    wanted = attribute(PHOTOGRAPHS[:3])
    for other in wanted:
        assert_same(next(stream), other)
    assert len(read) == 4


def test_a_column_of_a_dataset(attribute):
    rows = datasets.Dataset.from_dict({"image": PHOTOGRAPHS}, features=datasets.Features({"image": datasets.Image()}))
    wanted = attribute(PHOTOGRAPHS)
    streamed = rows.to_iterable_dataset()
    for column in (rows["image"], list(rows["image"]), KeyDataset(rows, "image"), streamed["image"]):
        found = attribute(column, batch_size=2)
        assert isinstance(found, list) == isinstance(column, list)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    with pytest.raises(ImageReadError, match=r"A row \(image\) is no image; give the column"):
        next(iter(attribute(rows)))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_worker_gives_the_same(attribute, batch_size):
    wanted = attribute(PHOTOGRAPHS[:3], num_workers=0)
    found = attribute(PHOTOGRAPHS[:3], num_workers=1, batch_size=batch_size)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)
        assert one["overlay"].size == other["overlay"].size


# ----------------------------------------------------------------------------------------------------------- questions


def test_a_label_and_its_index_ask_the_same(attribute):
    photograph = PHOTOGRAPHS[0]
    wanted = attribute(photograph, target=0)
    assert (wanted["label"], wanted["target"]) == (LABELS[0], 0)
    for target in ("tench", "TENCH, tinca tinca", np.int64(0), "0"):
        assert_same(attribute(photograph, target=target), wanted)
    other = attribute(photograph, target=3)
    assert not np.allclose(other["scores"], wanted["scores"])


def test_top_k_goes_from_the_most_probable_class_down(attribute):
    found = attribute(PHOTOGRAPHS[0], top_k=5)
    probabilities = [answer["score"] for answer in found]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert [answer["label"] for answer in found] == [LABELS[answer["target"]] for answer in found]
    assert sorted(answer["target"] for answer in found) == list(LABELS)


@pytest.mark.parametrize("processor", [SQUASH, FREE], ids=["squash", "free"])
@pytest.mark.parametrize("question", [{}, {"target": "church"}, {"top_k": 2}], ids=str)
def test_refinement_is_that_of_explain_at_any_batch_size(make_explainer, processor, question):
    shapes = ((32, 48), (64, 32), (32, 48)) if processor is FREE else SHAPES[:3]
    photographs = [make_photograph(*shape, seed) for seed, shape in enumerate(shapes)]
    explainer = make_explainer(processor)
    attribute = pipeline(model=explainer)
    wanted = explainer.explain(photographs, refine=1, batch_size=1, **question)
    plain = explainer.explain(photographs, **question)
    for batch_size in (1, 2):
        found = attribute(photographs, refine=1, batch_size=batch_size, overlay=False, **question)
        for answers, expected, before in zip(found, wanted, plain, strict=True):
            if "top_k" not in question:
                answers, expected, before = [answers], [expected], [before]
            for answer, explanation, unrefined in zip(answers, expected, before, strict=True):
                assert_same(answer, explanation)
                assert answer["refinement"].keys() == explanation.refinement.keys()
                for name, value in explanation.refinement.items():
                    assert answer["refinement"][name] == pytest.approx(value, abs=1e-5), name
                assert answer["refinement"]["steps"] == 1 and answer["refinement"]["gain"] >= 0
                if answer["refinement"]["gain"] > 1e-4:
                    assert not np.allclose(answer["scores"], unrefined.scores)
    assert "refinement" not in attribute(photographs[0])
    assert "refinement" in pipeline(model=explainer, refine=1)(photographs[0])
    assert "refinement" not in pipeline(model=explainer, refine=1)(photographs[0], refine=0)


def test_a_call_replaces_the_question_of_the_constructor(explainer):
    photograph = PHOTOGRAPHS[0]
    predicted = explainer.explain(photograph).target
    other = (predicted + 1) % 5
    attribute = pipeline(model=explainer, target=other, overlay=False)
    assert attribute(photograph)["target"] == other
    assert attribute(photograph, target=predicted)["target"] == predicted
    assert attribute(photograph, top_k=1)["target"] == predicted
    assert [answer["target"] for answer in attribute(photograph, top_k=2)][0] == predicted
    assert attribute(photograph)["target"] == other
    assert pipeline(model=explainer, top_k=3)(photograph, target=other)["target"] == other


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"target": "churhc"}, ValueError, "has no label 'churhc'; did you mean 'church'"),
        ({"target": 5}, ValueError, r"class index 5 is out of range: the classifier has the classes 0\.\.4"),
        ({"target": [0, 1]}, ValueError, r"given by its index or label, not by \[0, 1\]"),
        ({"target": 1, "top_k": 2}, ValueError, "either target or top_k, not both"),
        ({"top_k": 0}, ValueError, r"top_k must lie in 1\.\.5, the number of classes, but it is 0"),
        ({"top_k": 6}, ValueError, "but it is 6"),
        ({"top_k": True}, ValueError, "but it is True"),
        ({"refine": -1}, ValueError, "refine must be a number of steps, 0 or more, but it is -1"),
        ({"adaptive": True}, ValueError, "adaptive is about refinement, but refine is 0"),
        ({"refine": 1, "adaptive": "yes"}, ValueError, "adaptive must be True or False, but it is 'yes'"),
        ({"refine": True}, ValueError, "refine must be a number of steps, 0 or more, but it is True"),
        ({"refine": 1.5}, ValueError, "but it is 1.5"),
        ({"overlay": "yes"}, ValueError, "overlay must be True or False, but it is 'yes'"),
        ({"targt": 1}, TypeError, "visual-attribution has no parameter 'targt'; it has target, against, top_k"),
        ({"target": 1, "against": "English springer"}, ValueError, r"Class 1 \(English springer\) is compared with"),
        ({"against": "cassete player"}, ValueError, "has no label 'cassete player'; did you mean 'cassette player'"),
        ({"against": 1, "top_k": 2}, ValueError, "Give either against or top_k, not both."),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused_by_call_and_constructor(explainer, parameters, error, message):
    with pytest.raises(error, match=message) as refused:
        pipeline(model=explainer)(iter(PHOTOGRAPHS), **parameters)
    assert "\n" not in str(refused.value)
    with pytest.raises(error, match=message):
        pipeline(model=explainer, **parameters)


def test_bad_images_are_refused(attribute, tmp_path):
    with pytest.raises(ImageReadError, match="missing.jpg does not exist"):
        attribute(str(tmp_path / "missing.jpg"))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no photograph")
    with pytest.raises(ImageReadError, match="broken.jpg"):
        attribute([PHOTOGRAPHS[0], tmp_path / "broken.jpg"], batch_size=2)
    with pytest.raises(TypeError, match="An image must be a PIL image, .* not int"):
        attribute(3)


# ------------------------------------------------------------------------------------------------- building and saving


def test_transformers_knows_the_task(explainer, folder):
    wanted = explainer.explain(PHOTOGRAPHS[0], target="church")
    for model in (explainer, folder, str(folder)):
        attribute = transformers.pipeline("visual-attribution", model=model, device="cpu", target="church")
        assert type(attribute) is VisualAttributionPipeline
        assert_same(attribute(PHOTOGRAPHS[0]), wanted)
    assert "VisualAttributionPipeline" in repr(attribute)
    # transformers hands this one on to the pipeline as well.
    transformers.pipeline("visual-attribution", model=str(folder), local_files_only=True)
    with pytest.raises(TypeError, match="no parameter 'targt'"):
        transformers.pipeline("visual-attribution", model=explainer, targt=1)


def test_a_second_import_registers_nothing_twice(caplog, monkeypatch):
    before = PIPELINE_REGISTRY.check_task("visual-attribution")[1]
    assert (before["impl"], before["type"]) == (VisualAttributionPipeline, "image")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    names = dict(vars(hf_aha.pipelines))
    try:
        with caplog.at_level(logging.WARNING):
            importlib.reload(hf_aha.pipelines)
    finally:
        vars(hf_aha.pipelines).update(names)
    assert not caplog.records
    assert PIPELINE_REGISTRY.check_task("visual-attribution")[1] is before


def test_names_are_those_of_from_pretrained(folder, monkeypatch):
    photograph = PHOTOGRAPHS[0]
    monkeypatch.setattr("hf_aha.modeling_aha._bundled_path", lambda name: str(folder) if name == "demo" else str(name))
    for model in (folder, str(folder), "demo"):
        assert_same(
            pipeline("visual-attribution", model=model, device="cpu")(photograph), pipeline(model=folder)(photograph)
        )
    with pytest.raises(OSError):
        pipeline(model="nowhere", local_files_only=True)


def test_a_separate_classifier_reaches_the_loading(explainer, tmp_path, make_classifier):
    explainer.save_pretrained(tmp_path)
    model = make_classifier("vit")
    found = pipeline(model=tmp_path, classifier=model)
    assert found.model.classifier.model is model
    assert_same(found(PHOTOGRAPHS[0], target=1), explainer.explain(PHOTOGRAPHS[0], target=1))


@pytest.mark.parametrize("make", [pipeline, transformers.pipeline])
def test_bfloat16(folder, make):
    attribute = make("visual-attribution", model=str(folder), dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in attribute.model.parameters()} == {torch.bfloat16}
    found = attribute(PHOTOGRAPHS, batch_size=4, target=1)
    for one, other in zip(found, attribute.model.explain(PHOTOGRAPHS, target=1, batch_size=4), strict=True):
        assert one["scores"].dtype == np.float32
        # Batches of another size round differently in bfloat16.
        np.testing.assert_allclose(one["scores"], other.scores, atol=0.05 * np.abs(other.scores).max())
        assert one["score"] == pytest.approx(other.probability, abs=0.02)


def test_a_loaded_explainer_is_neither_moved_nor_cast(explainer):
    before = {name: (p.data_ptr(), p.device, p.dtype) for name, p in explainer.named_parameters()}
    attribute = pipeline(model=explainer, dtype=torch.float32)
    assert attribute.model is explainer and attribute.device == torch.device("cpu")
    with pytest.raises(ValueError, match="in torch.float32, not torch.bfloat16; cast it"):
        pipeline(model=explainer, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="revision applies to an explainer given by name"):
        pipeline(model=explainer, revision="main")
    attribute(PHOTOGRAPHS[0])
    assert {name: (p.data_ptr(), p.device, p.dtype) for name, p in explainer.named_parameters()} == before


def test_the_device_argument_moves_the_explainer(explainer):
    assert pipeline(model=explainer, device="meta").device.type == "meta"
    assert {p.device.type for p in explainer.parameters()} == {"meta"}
    # Left out, it moves nothing, not even to an accelerator.
    assert pipeline(model=explainer).device.type == "meta"
    assert {p.device.type for p in explainer.parameters()} == {"meta"}


def test_other_tasks_and_models_are_refused(make_classifier, explainer):
    with pytest.raises(
        ValueError, match="only task of hf_aha.pipeline is 'visual-attribution', not 'depth-estimation'"
    ):
        pipeline("depth-estimation")
    with pytest.raises(TypeError, match=r"needs an AhaExplainer, not ViTForImageClassification; .*from_classifier"):
        pipeline(model=make_classifier("vit"))
    explainer.image_processor = None
    with pytest.raises(RuntimeError, match="no image processor; give it with attach"):
        pipeline(model=explainer)


def test_saving_saves_the_explainer_and_no_code(explainer, tmp_path):
    pipeline(model=explainer).save_pretrained(tmp_path, include_classifier=True)
    assert not list(tmp_path.rglob("*.py"))
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    loaded = transformers.pipeline("visual-attribution", model=str(tmp_path))
    assert_same(loaded(PHOTOGRAPHS[0]), explainer.explain(PHOTOGRAPHS[0]))
