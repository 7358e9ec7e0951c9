"""The demo's engine, without Gradio: it agrees with the library, keeps its answers, and serves several threads."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_classifier
from PIL import Image
from transformers import ViTImageProcessorPil

import hf_aha
from hf_aha import AhaExplainer, ImageReadError
from hf_aha.demo import refining as refining_module
from hf_aha.demo.cache import LruCache
from hf_aha.demo.curves_svg import curves_svg
from hf_aha.demo.engine import BASELINES, LEAST_SHOWN_SIDE, SHOWN_SIDE, DemoEngine
from hf_aha.demo.files import write_files
from hf_aha.demo.pictures import (
    comparison_figures,
    draw,
    explanation_figure,
    perturbed_figure,
    perturbed_readout,
    refinement_figures,
    status,
)
from hf_aha.metrics import deletion_insertion_curves
from hf_aha.perturbation import Normalization, reference_image
from hf_aha.refinement import refine


PHOTOGRAPHS = Path(hf_aha.__file__).parent / "bundled" / "photographs"
LABELS = ("tench", "English springer", '<b>"cassette" ${x}', "chain saw", "пёс")


def small_explainer() -> AhaExplainer:
    classifier = build_classifier("vit")
    classifier.config.id2label = dict(enumerate(LABELS))
    classifier.config.label2id = {label: index for index, label in enumerate(LABELS)}
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    return AhaExplainer.from_classifier(classifier, image_processor=processor, **sizes).eval()


@pytest.fixture(scope="module")
def bundled() -> AhaExplainer:
    return AhaExplainer.from_pretrained("imagenette-demo").eval()


@pytest.fixture
def engine() -> DemoEngine:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DemoEngine(small_explainer(), baselines=("centre", "attention-rollout"))


def photograph(seed: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Passes:
    """Counts the classifier's passes and their images."""

    def __init__(self, explainer: AhaExplainer) -> None:
        self.calls = self.images = 0
        self.handle = explainer.classifier.register_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple, output: object) -> None:
        self.calls += 1
        self.images += len(inputs[0])


# ------------------------------------------------------------------------------------------------------ agreement


def test_maps_and_probabilities_are_those_of_explain(bundled):
    engine = DemoEngine(bundled)
    path = PHOTOGRAPHS / "church.jpg"
    seen = engine.read(path)
    for target, against in ((None, None), ("golf ball", None), ("church", "golf ball"), (None, "church")):
        expected = bundled.explain(path, target, against=against)
        answer = engine.explain(seen, target, against=against)
        size = (expected.image.height, expected.image.width)
        np.testing.assert_array_equal(answer.photograph.to_size(answer.scores, size), expected.scores)
        assert answer.explanation.title == expected.title and answer.explanation.target == expected.target
        assert answer.explanation.probability == expected.probability
        assert answer.explanation.scores.shape == (seen.shown.height, seen.shown.width)
    found = engine.classify(seen)
    assert len(found) == 5 and found[0].label == "church"
    assert [c.probability for c in found] == sorted((c.probability for c in found), reverse=True)


@pytest.mark.parametrize("reference", ["blur", "black", "mean"])
@pytest.mark.parametrize("against", [None, "tench"])
def test_curves_and_perturbed_are_the_metric(engine, reference, against):
    explainer = engine.explainer
    answer = engine.explain(engine.read(photograph()), "пёс", against=against)
    pixels = explainer.image_processor([photograph()], return_tensors="pt")["pixel_values"]
    norm = Normalization(explainer.config.image_mean, explainer.config.image_std)
    blank = norm.normalize(reference_image(norm.denormalize(pixels), reference))
    target, other = torch.tensor([4]), None if against is None else torch.tensor([0])
    with torch.no_grad():
        scores = explainer(pixels, target, against=other).scores
        expected = deletion_insertion_curves(
            lambda batch: explainer.classifier(batch).logits, pixels, blank, scores, target, against=other
        )
    curves = engine.curves(answer, reference)
    torch.testing.assert_close(curves.deletion, expected.deletion)
    torch.testing.assert_close(curves.insertion, expected.insertion)
    for mode, step in (("deletion", 4), ("insertion", 3), ("deletion", 0), ("insertion", 20)):
        perturbed = engine.perturbed(answer, step / 20, mode, reference)
        assert perturbed.value == pytest.approx(float(getattr(curves, mode)[0, step]), abs=1e-4)


def test_the_perturbed_picture_shows_the_most_important_pixels_gone(engine):
    answer = engine.explain(engine.read(photograph()))
    shown = np.asarray(engine.perturbed(answer, 0.25, "insertion", "black").picture).any(axis=-1)
    most = (answer.scores.flatten() >= answer.scores.flatten().topk(32 * 32 // 4).values[-1]).view(32, 32).numpy()
    assert shown.sum() > 250 and not (shown & ~most).any()
    removed = np.asarray(engine.perturbed(answer, 0.25, "deletion", "black").picture).any(axis=-1)
    assert not (removed & most).any() and (removed & ~most).sum() > 700


def test_refined_maps_are_those_of_refine(engine):
    answer = engine.explain(engine.read(photograph()), 2)
    expected = refine(engine.explainer, answer.photograph.pixel_values, 2, steps=3)
    refined = engine.refine(answer, 3)
    torch.testing.assert_close(refined.scores, expected.scores[0])
    facts = refined.explanation.refinement
    assert facts["passes"] == int(expected.passes) and facts["steps"] == 3
    assert facts["value"] == pytest.approx(float(expected.value))
    assert facts["initial_value"] == pytest.approx(float(expected.initial_value))
    # Shown beside the plain one, which it does not replace.
    assert engine.explain(answer.photograph, 2).explanation.refinement is None


def test_other_methods_are_drawn_or_named(engine):
    answer = engine.explain(engine.read(photograph()))
    found = engine.compare(answer)
    assert [other.name for other in found.maps] == ["centre", "attention-rollout"] and not found.missing
    assert all(other.scores.shape == answer.explanation.scores.shape for other in found.maps)
    page = comparison_figures(answer, found, 0.6, "inferno", 1)
    assert page.count("<figure") == 3 and "AHA: 1 pass of the classifier" in page


@pytest.mark.bench
def test_integrated_gradients_and_grad_cam_are_drawn(engine):
    engine.baselines = BASELINES
    answer = engine.explain(engine.read(photograph()))
    found = engine.compare(answer)
    assert [other.name for other in found.maps] == list(BASELINES) and not found.missing
    assert all(np.isfinite(other.scores).all() and np.ptp(other.scores) > 0 for other in found.maps)
    assert comparison_figures(answer, found, 0.6, "inferno", 1).count("<figure") == 3


def test_missing_libraries_are_one_sentence_each(engine, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "captum", None)
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    engine.baselines = BASELINES
    answer = engine.explain(engine.read(photograph()))
    found = engine.compare(answer)
    assert not found.maps and len(found.missing) == 2
    assert all("pip install hf-aha[bench]" in sentence for sentence in found.missing)
    assert "pip install hf-aha[bench]" in comparison_figures(answer, found, 0.6, "inferno", 1)


# ---------------------------------------------------------------------------------------------------- cost and threads


def test_answers_are_kept_and_cost_no_pass(engine):
    passes = Passes(engine.explainer)
    source = photograph()
    answer = engine.explain(engine.read(source))
    assert passes.calls == 1
    engine.classify(answer.photograph)
    # The same photograph, read again.
    assert engine.explain(engine.read(source)) is answer
    assert engine.explain(answer.photograph, answer.explanation.label) is answer
    assert passes.calls == 1
    other = engine.explain(answer.photograph, (answer.explanation.target + 1) % 5)
    assert engine.explain(answer.photograph, other.explanation.target) is other and passes.calls == 2
    engine.curves(answer)
    before = passes.calls
    engine.curves(answer)
    assert passes.calls == before and engine.known_curves(answer, "blur") is engine.curves(answer)
    assert engine.known_curves(answer, "mean") is None
    engine.perturbed(answer, 0.3)
    assert passes.calls == before + 1
    refined = engine.refine(answer, 1)
    before = passes.calls
    assert engine.refine(answer, 1) is refined and passes.calls == before


def test_another_photograph_is_another_answer(engine):
    first, second = (engine.explain(engine.read(photograph(seed))) for seed in (0, 1))
    assert not torch.equal(first.scores, second.scores)
    # The same input out of photographs of two sizes is kept apart, since their maps differ in size.
    small = photograph(2, (32, 32))
    large = small.resize((64, 64), Image.Resampling.NEAREST)
    assert engine.read(small).digest != engine.read(large).digest


def test_threads_share_one_answer(engine):
    passes = Passes(engine.explainer)
    seen = engine.read(photograph())
    gate = threading.Barrier(4)

    def ask(_: int):
        gate.wait(10)
        return engine.explain(seen)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert all(answer is answers[0] for answer in answers) and passes.calls == 1


def test_threads_do_not_disturb_each_other(engine):
    """Different questions at the same time, a refinement among them, give what they give one after the other."""
    seen = [engine.read(photograph(seed)) for seed in range(4)]
    alone = DemoEngine(engine.explainer)
    expected = [alone.explain(one, 3).scores for one in seen]
    refined = alone.refine(alone.explain(seen[0], 3), 2).scores
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(lambda: engine.refine(engine.explain(seen[0], 3), 2).scores)
        maps = list(pool.map(lambda one: engine.explain(one, 3).scores, seen))
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    torch.testing.assert_close(first.result(), refined)


def test_a_closed_refinement_ends_and_leaves_the_engine_usable(engine, monkeypatch):
    monkeypatch.setattr(refining_module, "_POLL_SECONDS", 0.01)
    answer = engine.explain(engine.read(photograph()))
    hooks = len(engine.explainer.classifier._forward_pre_hooks)
    steps = engine.refining(answer, 10_000)
    assert isinstance(next(steps), int)
    steps.close()
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("hf-aha-refine")]
    for worker in workers:
        worker.join(20)
    assert not any(worker.is_alive() for worker in workers)
    assert len(engine.explainer.classifier._forward_pre_hooks) == hooks
    assert engine.refine(answer, 1).explanation.refinement["steps"] == 1


def test_refinement_counts_up(engine):
    answer = engine.explain(engine.read(photograph()))
    found = list(engine.refining(answer, 4))
    assert found[:-1] == sorted(found[:-1]) and all(0 <= done <= 4 for done in found[:-1])
    assert found[-1].explanation.refinement["steps"] == 4


def test_bfloat16_is_used_for_perturbed_images_only():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        explainer = small_explainer()
    exact, fast = DemoEngine(explainer, bfloat16=False), DemoEngine(explainer, bfloat16=True)
    answers = [engine.explain(engine.read(photograph())) for engine in (exact, fast)]
    assert torch.equal(answers[0].scores, answers[1].scores)
    a, b = (engine.perturbed(answer, 0.5).probability for engine, answer in zip((exact, fast), answers, strict=True))
    assert a != b and a == pytest.approx(b, abs=0.05)


@pytest.mark.parametrize(
    ("float32", "bfloat16", "wanted"), [(0.01, 0.001, False), (0.4, 0.1, True), (0.4, 0.39, False)]
)
def test_bfloat16_is_chosen_where_float32_is_too_slow(engine, monkeypatch, float32, bfloat16, wanted):
    monkeypatch.setattr(engine, "_seconds_a_pass", lambda images: bfloat16 if engine.bfloat16 else float32)
    engine.warm_up()
    assert engine.bfloat16 is wanted
    told = DemoEngine(engine.explainer, bfloat16=False)
    monkeypatch.setattr(told, "_seconds_a_pass", lambda images: 1.0)
    told.warm_up()
    assert told.bfloat16 is False


# -------------------------------------------------------------------------------------------------------- bad input


def test_reading_says_what_is_wrong(engine, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0" + b"x" * 100)
    (tmp_path / "text.png").write_text("no picture")
    for name in ("broken.jpg", "text.png", "absent.png"):
        with pytest.raises(ImageReadError, match=name):
            engine.read(tmp_path / name)
    engine.max_pixels = 100
    with pytest.raises(ImageReadError, match="60 x 40 pixels, more than the limit of 100"):
        engine.read(photograph())


def test_questions_say_what_is_wrong(engine):
    seen = engine.read(photograph())
    with pytest.raises(ValueError, match="did you mean 'chain saw'"):
        engine.explain(seen, "chain sew")
    with pytest.raises(ValueError, match="out of range"):
        engine.explain(seen, 5)
    with pytest.raises(ValueError, match="compared with itself"):
        engine.explain(seen, "tench", against=0)
    answer = engine.explain(seen)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            engine.perturbed(answer, share)
    with pytest.raises(ValueError, match="mode"):
        engine.perturbed(answer, 0.1, "removal")
    with pytest.raises(ValueError, match="reference"):
        engine.curves(answer, "noise")
    for steps in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="steps"):
            engine.refine(answer, steps)


def test_an_engine_needs_a_classifier_and_known_methods():
    with pytest.raises(RuntimeError, match="with its classifier"):
        DemoEngine(AhaExplainer.from_pretrained("imagenette-demo", load_classifier=False))
    with pytest.raises(ValueError, match="grad-camp"):
        DemoEngine(small_explainer(), baselines=("grad-camp",))


def test_a_failed_answer_is_not_kept():
    cache = LruCache(2)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_make("a", lambda: 1 / 0)
    assert "a" not in cache and cache.get_or_make("a", lambda: 2) == 2 and cache.get("b") is None
    cache.put("b", 3)
    cache.get("a")
    cache.put("c", 4)
    assert "b" not in cache and "a" in cache
    with pytest.raises(ValueError, match="size is 0"):
        LruCache(0)


# --------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [(3000, 20), (5, 4), (900, 700)])
def test_photographs_of_any_size_are_drawn(engine, size):
    answer = engine.explain(engine.read(photograph(0, size)))
    assert LEAST_SHOWN_SIDE <= max(answer.photograph.shown.size) <= SHOWN_SIDE
    for view in ("overlay", "map", "original"):
        assert draw(answer.explanation, view).size == answer.photograph.shown.size
    with pytest.raises(ValueError, match="view"):
        draw(answer.explanation, "heatmap")


def test_every_picture_has_a_text_and_labels_stay_text(engine):
    answer = engine.explain(engine.read(photograph()), 2, against=1)
    perturbed = engine.perturbed(answer, 0.2)
    refined = engine.refine(answer, 1)
    pages = [
        explanation_figure(answer, "overlay"),
        perturbed_figure(answer, perturbed, 0.2, "deletion", "blur"),
        perturbed_readout(answer, perturbed),
        refinement_figures(answer, refined, 0.6, "inferno"),
        curves_svg(
            engine.curves(answer),
            share=0.2,
            value=perturbed.value,
            mode="deletion",
            label=LABELS[2],
            against_label="b",
        ),
        status("<b>", "problem"),
    ]
    for page in pages:
        assert "<b>" not in page and '"cassette"' not in page
        assert all(re.search(r'alt="[^"]{10,}"', image) for image in re.findall(r"<img[^>]*>", page))
    assert (
        'role="img"' in pages[4] and "Area under the deletion curve" in pages[4] and pages[4].count("<polyline") == 2
    )


def test_the_files_hold_the_map_in_the_photographs_pixels(engine, tmp_path, monkeypatch):
    answer = engine.explain(engine.read(photograph()), "tench")
    paths = write_files(answer, {"explainer": {"id": "x"}}, tmp_path)
    scores = np.load(paths["npy"])
    np.testing.assert_array_equal(scores, engine.explainer.explain(photograph(), "tench").scores)
    record = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert record["label"] == "tench" and record["map_size"] == {"width": 60, "height": 40}
    assert record["explainer"] == {"id": "x"} and record["refinement"] is None
    with Image.open(paths["png"]) as sheet:
        assert sheet.width > sheet.height > 100
    monkeypatch.setattr("hf_aha.demo.files.MAX_MAP_PIXELS", 600)
    paths = write_files(answer, {}, tmp_path)
    assert np.load(paths["npy"]).shape == (20, 30)
    assert json.loads(paths["json"].read_text())["map_size"] == {"width": 30, "height": 20}
