"""`AhaExplainer.explain` and `Explanation`: from photographs to maps in the photographs' own pixels."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, ViTImageProcessor

from hf_aha import AhaExplainer, Explanation, ImageReadError
from hf_aha.decoder_aha import DecoderFeatures


LABELS = {
    0: "tench, Tinca tinca",
    1: "English springer, English springer spaniel",
    2: "cassette player",
    3: "church, church building",
    4: "French horn, horn",
}
SQUASH = ViTImageProcessor(size={"height": 32, "width": 32})
CROP = BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
FREE = CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
SIZES = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}


def make_photograph(height, width, seed=0):
    """Smooth noise, so that resizing keeps something of it."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def make_explainer(make_classifier):
    def make(processor=SQUASH, family="vit", labels=LABELS):
        model = make_classifier(family)
        model.config.id2label = dict(labels)
        return AhaExplainer.from_classifier(model, image_processor=processor, **SIZES).eval()

    return make


@pytest.fixture
def explainer(make_explainer):
    return make_explainer()


class Coordinate(torch.nn.Module):
    """In place of a decoder: the score of a pixel is its row (dim 0) or column (dim 1) in the model input."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        # The device and dtype of a model are those of its parameters.
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, tokens, pixel_values):
        return DecoderFeatures(pixel_values, pixel_values, pixel_values, tuple(pixel_values.shape[-2:]))

    def decode(self, features, class_vectors, gradients):
        height, width = features.size
        places = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")[self.dim]
        return places.float().expand(len(class_vectors), -1, -1)


def places_in_input(size, processor):
    """By hand: where the centres of a photograph's rows and columns lie in the input of 32 x 32."""
    resized = (32, 32) if processor is SQUASH else [int(40 * side / min(size)) for side in size]
    return [(np.arange(side) + 0.5) * new / side - (new - 32) // 2 for side, new in zip(size, resized, strict=True)]


# ---------------------------------------------------------------------------------------------------- what comes back


def test_an_explanation_agrees_with_forward(explainer):
    photograph = make_photograph(32, 32)
    found = explainer.explain(photograph)
    output = explainer(explainer.image_processor(photograph, return_tensors="pt")["pixel_values"])
    assert isinstance(found, Explanation)
    predicted = int(output.target)
    assert (found.target, found.label) == (predicted, LABELS[predicted])
    assert (found.predicted_target, found.predicted_label) == (predicted, LABELS[predicted])
    assert found.probability == found.predicted_probability
    assert found.probability == pytest.approx(output.logits.softmax(-1)[0, predicted].item(), abs=1e-6)
    assert found.scores.dtype == np.float32
    assert found.image.mode == "RGB"
    # At the input's own size nothing is resampled.
    np.testing.assert_array_equal(found.scores, output.scores[0].detach().numpy())


def test_another_class_is_told_beside_the_predicted_one(explainer):
    photograph = make_photograph(20, 30)
    predicted = explainer.explain(photograph)
    other = next(index for index in LABELS if index != predicted.target)
    found = explainer.explain(photograph, other)
    assert (found.target, found.label) == (other, LABELS[other])
    assert found.predicted_target == predicted.target
    assert found.probability < found.predicted_probability
    assert f"predicted: {predicted.label}" in found.title and "predicted" not in predicted.title
    assert not np.array_equal(found.scores, predicted.scores)
    np.testing.assert_array_equal(explainer.explain(photograph, predicted.target).scores, predicted.scores)


def test_no_gradient_is_kept_and_the_mode_is_left_alone(explainer):
    explainer.train()
    explainer.explain(make_photograph(20, 20))
    assert explainer.training
    assert all(p.grad is None for p in explainer.parameters())


def test_pictures_have_the_photographs_size(explainer):
    found = explainer.explain(make_photograph(45, 60))
    assert found.heatmap().size == found.overlay().size == (60, 45)
    assert found.sheet().width > 3 * 60
    assert found.overlay(opacity=0.2).tobytes() != found.overlay().tobytes()


def test_explanations_can_be_compared_copied_and_pickled(explainer):
    found = explainer.explain(make_photograph(20, 20))
    assert found == found and found != copy.deepcopy(found)
    assert len({found, found}) == 1
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).scores, found.scores)
    with pytest.raises(AttributeError):
        found.target = 3


# -------------------------------------------------------------------------------------------------------------- images


def test_every_kind_of_image_gives_the_same(explainer, tmp_path):
    photograph = make_photograph(24, 36)
    photograph.save(tmp_path / "photo.png")
    buffer = io.BytesIO()
    photograph.save(buffer, "png")
    array = np.asarray(photograph)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = explainer.explain(photograph).scores
    assert expected.shape == (24, 36)
    for source in (tmp_path / "photo.png", str(tmp_path / "photo.png"), buffer.getvalue(), array, tensor):
        np.testing.assert_array_equal(explainer.explain(source).scores, expected)


def test_lists_and_tuples_give_lists(explainer):
    images = [make_photograph(20 + 3 * i, 30, seed=i) for i in range(3)]
    found = explainer.explain(images)
    assert isinstance(found, list) and [e.scores.shape for e in found] == [(20, 30), (23, 30), (26, 30)]
    assert [e.image.size for e in explainer.explain(tuple(images))] == [(30, 20), (30, 23), (30, 26)]
    assert len(explainer.explain(images[:1])) == 1
    assert explainer.explain([]) == []


@pytest.mark.parametrize("processor", [SQUASH, CROP])
def test_batch_size_does_not_change_the_results(make_explainer, processor):
    explainer = make_explainer(processor)
    images = [make_photograph(30 + 4 * i, 50 - 3 * i, seed=i) for i in range(5)]
    targets = [4, "horn", 0, 2, 1]
    expected = [explainer.explain(image, target) for image, target in zip(images, targets, strict=True)]
    for batch_size in (1, 2, 8):
        found = explainer.explain(images, targets, batch_size=batch_size)
        for a, b in zip(found, expected, strict=True):
            assert (a.target, a.label, a.predicted_target) == (b.target, b.label, b.predicted_target)
            np.testing.assert_allclose(a.scores, b.scores, atol=1e-4, rtol=1e-4)
            assert a.probability == pytest.approx(b.probability, abs=1e-5)


def test_photographs_that_give_inputs_of_several_sizes(make_explainer):
    explainer = make_explainer(FREE)
    images = [make_photograph(32, 48), make_photograph(64, 32, seed=1), make_photograph(32, 48, seed=2)]
    found = explainer.explain(images, [0, 1, 2])
    for image, target, explanation in zip(images, (0, 1, 2), found, strict=True):
        assert explanation.target == target
        np.testing.assert_allclose(explanation.scores, explainer.explain(image, target).scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 7), (1, 60), (60, 2)])
def test_the_smallest_photographs(make_explainer, size):
    found = make_explainer().explain(make_photograph(*size))
    assert found.scores.shape == size
    assert np.isfinite(found.scores).all()
    assert found.overlay().size == size[::-1]


def test_a_large_photograph(explainer):
    found = explainer.explain(make_photograph(1000, 1500))
    assert found.scores.shape == (1000, 1500)
    assert np.isfinite(found.scores).all()


def test_a_photograph_is_turned_upright(explainer, tmp_path):
    upright = make_photograph(24, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    found = explainer.explain(tmp_path / "turned.png")
    assert found.image.size == (40, 24)
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(upright))
    np.testing.assert_array_equal(found.scores, explainer.explain(upright).scores)


def test_what_is_no_image_is_refused(explainer, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    for source in (tmp_path / "notes.txt", tmp_path / "absent.jpg", b"no image", "ftp://example.org/a.jpg"):
        with pytest.raises(ImageReadError) as caught:
            explainer.explain(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="not dict"):
        explainer.explain({"image": 1})
    with pytest.raises(ImageReadError):
        explainer.explain([make_photograph(20, 20), tmp_path / "absent.jpg"])


# ---------------------------------------------------------------------------------------------------- where scores lie


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("processor", [SQUASH, CROP])
@pytest.mark.parametrize("size", [(50, 90), (90, 50), (20, 20), (33, 47)])
def test_scores_lie_where_the_pixels_came_from(make_explainer, processor, size, dim):
    explainer = make_explainer(processor)
    explainer.decoder = Coordinate(dim)
    scores = explainer.explain(make_photograph(*size), 0).scores
    places = places_in_input(size, processor)
    inside = [(centres >= 0) & (centres < 32) for centres in places]
    np.testing.assert_array_equal(np.isfinite(scores), inside[0][:, None] & inside[1])
    assert inside[0].all() and inside[1].all() if processor is SQUASH else not (inside[0].all() and inside[1].all())

    lines = scores[np.ix_(*inside)]
    lines = lines if dim == 1 else lines.T
    assert (np.diff(lines, axis=1) >= 0).all()
    assert (np.ptp(lines, axis=0) < 1e-4).all(), "the other coordinate leaks in"
    centres = places[dim][inside[dim]]
    # At the border it is repeated: within half a pixel, or half the width of the antialiasing filter.
    step = max(1.0, places[dim][1] - places[dim][0])
    middle = (centres > step) & (centres < 32 - step)
    assert middle.sum() > 10
    np.testing.assert_allclose(lines[0][middle], centres[middle] - 0.5, atol=0.1)


def test_the_middle_is_scored_and_the_rest_is_not_a_number(make_explainer):
    scores = make_explainer(CROP).explain(make_photograph(40, 80)).scores
    seen = np.isfinite(scores)
    assert seen.mean() == pytest.approx(32 * 32 / (40 * 80))
    assert seen[4:36, 24:56].all()
    assert np.isfinite(make_explainer(SQUASH).explain(make_photograph(40, 80)).scores).all()


def test_scores_of_the_crop_do_not_depend_on_what_is_outside(make_explainer):
    explainer = make_explainer(CROP)
    array = np.asarray(make_photograph(40, 80)).copy()
    before = explainer.explain(array, 1).scores
    array[:, :10] = 255 - array[:, :10]
    np.testing.assert_array_equal(explainer.explain(array, 1).scores, before)


# ------------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    "target, index",
    [
        (3, 3),
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        ("3", 3),
        ("church, church building", 3),
        ("CHURCH", 3),
        (" Church Building ", 3),
        ("Tinca tinca", 0),
        ("horn", 4),
        ("cassette player", 2),
    ],
)
def test_a_class_by_index_or_label(explainer, target, index):
    assert explainer.class_index(target) == index
    assert explainer.explain(make_photograph(20, 20), target).target == index


@pytest.mark.parametrize(
    "target, message",
    [
        ("chruch", r"no label 'chruch'; did you mean 'church, church building'\?"),
        ("english springr", r"did you mean 'English springer, English springer spaniel'\?"),
        ("zebra", "no label 'zebra'; its labels are tench, Tinca tinca, "),
        ("", "no label ''"),
        ("5", "class index 5 is out of range: the classifier has the classes 0..4"),
        ("-1", "class index -1 is out of range"),
        ("²", "no label '²'"),
        ("--1", "no label '--1'"),
        (5, "class index 5 is out of range"),
        (-1, "class index -1 is out of range"),
        (1.5, "by its index or label, not by 1.5"),
        (True, "by its index or label, not by True"),
        ([[1]], r"by its index or label, not by \[1\]"),
    ],
)
def test_classes_that_are_refused(explainer, target, message):
    with pytest.raises(ValueError, match=message) as caught:
        explainer.explain(make_photograph(20, 20), target)
    assert "\n" not in str(caught.value)


def test_a_whole_label_goes_before_a_synonym_and_an_index(make_explainer):
    explainer = make_explainer(labels={0: "bird, crane", 1: "crane", 2: "7", 3: "0", 4: "x"})
    assert explainer.class_index("crane") == 1
    assert explainer.class_index("7") == 2
    assert explainer.class_index("0") == 3
    assert explainer.class_index(0) == 0


@pytest.mark.parametrize("labels", [("crane", "crane"), ("bird, crane", "machine, crane")])
def test_a_label_of_two_classes_is_refused(make_explainer, labels):
    explainer = make_explainer(labels={0: "a", 1: labels[0], 2: labels[1], 3: "b", 4: "c"})
    with pytest.raises(ValueError, match="'crane' names 2 classes of the classifier: give one of the indices 1, 2"):
        explainer.class_index("crane")


def test_one_class_an_image(explainer):
    images = [make_photograph(20, 20, seed=i) for i in range(3)]
    for targets in ([0, "horn", 2], (0, 4, 2), torch.tensor([0, 4, 2]), np.array([0, 4, 2])):
        assert [e.target for e in explainer.explain(images, targets)] == [0, 4, 2]
    assert [e.target for e in explainer.explain(images, "horn")] == [4, 4, 4]
    assert explainer.explain(images[0], [4]).target == 4
    for wrong in ([0, 1], torch.tensor([1]), []):
        with pytest.raises(ValueError, match=rf"target lists {len(wrong)} classes for 3 images"):
            explainer.explain(images, wrong)


def test_the_most_probable_classes(explainer):
    images = [make_photograph(20, 25, seed=i) for i in range(3)]
    calls = []
    explainer.classifier.model.register_forward_hook(lambda *_: calls.append(1))
    found = explainer.explain(images, top_k=3, batch_size=2)
    assert len(calls) == 2
    assert [len(of_image) for of_image in found] == [3, 3, 3]
    for image, of_image in zip(images, found, strict=True):
        probabilities = [e.probability for e in of_image]
        assert probabilities == sorted(probabilities, reverse=True)
        assert of_image[0].target == of_image[0].predicted_target
        for explanation in of_image:
            expected = explainer.explain(image, explanation.target).scores
            np.testing.assert_allclose(explanation.scores, expected, atol=1e-4, rtol=1e-4)
    alone = explainer.explain(images[0], top_k=2)
    assert isinstance(alone, list) and [e.target for e in alone] == [e.target for e in found[0][:2]]


def test_what_does_not_go_together(explainer):
    photograph = make_photograph(20, 20)
    with pytest.raises(ValueError, match="either target or top_k"):
        explainer.explain(photograph, 1, top_k=2)
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=f"top_k must lie in 1..5, the number of classes, but it is {top_k}"):
            explainer.explain(photograph, top_k=top_k)
    with pytest.raises(ValueError, match="batch_size must be at least 1, but it is 0"):
        explainer.explain(photograph, batch_size=0)


# ------------------------------------------------------------------------------------------------------ other failures


def test_without_classifier_or_processor(explainer, make_classifier):
    alone = AhaExplainer(explainer.config)
    with pytest.raises(RuntimeError, match="no image processor|No classifier"):
        alone.explain(make_photograph(20, 20))
    alone.attach(explainer.classifier)
    with pytest.raises(RuntimeError, match="no image processor; give it with attach"):
        alone.explain(make_photograph(20, 20))
    alone.attach(explainer.classifier, image_processor=SQUASH)
    assert alone.explain(make_photograph(20, 20)).scores.shape == (20, 20)


def test_a_processor_that_gives_no_numbers_is_refused(make_explainer):
    processor = copy.deepcopy(SQUASH)
    processor.image_mean = [float("nan")] * 3
    explainer = make_explainer()
    explainer.image_processor = processor
    with pytest.raises(ValueError, match="hold NaN or infinite pixels") as caught:
        explainer.explain(make_photograph(20, 20))
    assert "\n" not in str(caught.value)


def test_every_family_explains(family, make_explainer):
    explainer = make_explainer(CROP, family=family)
    found = explainer.explain([make_photograph(44, 60), make_photograph(50, 41)], top_k=2)
    assert [[e.scores.shape for e in of_image] for of_image in found] == [[(44, 60)] * 2, [(50, 41)] * 2]
    assert all(np.isfinite(e.scores).any() for of_image in found for e in of_image)


def test_bfloat16_explains(explainer):
    photograph = make_photograph(32, 32)
    scores = explainer.to(torch.bfloat16).explain(photograph).scores
    assert scores.dtype == np.float32
    assert len(np.unique(scores)) > 0.95 * scores.size
