"""The training scripts of recipes/, from their arguments to what they write."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from hf_aha import AhaExplainer


FOLDER = Path(__file__).resolve().parents[1] / "recipes"
LABELS = ("cat", "dog", "newt")


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train_explainer():
    return importlib.import_module("train_explainer")


@pytest.fixture
def train_target():
    return importlib.import_module("train_target")


@pytest.fixture
def classifier_folder(tmp_path, make_classifier) -> str:
    folder = tmp_path / "classifier"
    make_classifier(num_labels=3).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photographs(tmp_path) -> str:
    """An image folder with a training and a validation split of three classes, one file broken."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("validation", 2)):
        for label in LABELS:
            folder = tmp_path / "photographs" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    broken = tmp_path / "photographs" / "train" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    return str(tmp_path / "photographs")


EXPLAINER = """
max_steps: 3
per_device_batch_size: 4
mixed_precision: "no"
dataloader_num_workers: 0
learning_rate: 1e-3
eval_images: 4
log_steps: 1
grid_range: [2, 4]
grid_width: 16
grid_depth: 1
quarter_width: 8
half_width: 8
taps: [2, 4]
"""


def explainer_words(tmp_path, *words: str) -> list[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(EXPLAINER)
    return [str(recipe), "--output_dir", str(tmp_path / "run"), *words]


TARGET = ("--epochs", "2", "--batch_size", "5", "--mixed_precision", "no", "--num_workers", "0", "--image_size", "32")


def one_sentence(run, words: list[str]) -> str:
    with pytest.raises(SystemExit) as raised:
        run(words)
    message = str(raised.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- train_explainer.py


def test_an_explainer_is_trained_from_a_recipe_and_the_command_line(
    tmp_path, train_explainer, classifier_folder, photographs
):
    words = explainer_words(tmp_path, "--classifier", classifier_folder, "--dataset", photographs)
    explainer = train_explainer.main([*words, "--max_steps", "2", "--label_column", "label"])
    assert explainer.config.taps == [2, 4] and explainer.config.grid_width == 16
    assert explainer.config.training["steps"] == 2
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert any("validation/blur/deletion" in entry for entry in log)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["learning_rate"] == 0.001

    loaded = AhaExplainer.from_pretrained(tmp_path / "run" / "final")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).scores, explainer(pixels).scores)


def test_the_seed_decides_the_new_weights_and_the_training(tmp_path, train_explainer, classifier_folder, photographs):
    weights = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        torch.manual_seed(len(weights))
        words = explainer_words(tmp_path, "--classifier", classifier_folder, "--dataset", photographs)
        words += ["--output_dir", str(tmp_path / name), "--seed", seed, "--validation_split", "", "--image_size", "16"]
        weights.append(train_explainer.main(words).decoder.grid_score.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_goes_on_from_another_explainer(tmp_path, train_explainer, classifier_folder, photographs):
    common = ["--classifier", classifier_folder, "--dataset", photographs, "--validation_split", ""]
    first = train_explainer.main(explainer_words(tmp_path, *common))
    recipe = tmp_path / "second.yaml"
    recipe.write_text(re.sub(r"(?m)^(taps|.*_(width|depth)): .*\n", "", EXPLAINER))
    init_from = str(tmp_path / "run" / "final")
    words = [str(recipe), *common, "--output_dir", str(tmp_path / "two"), "--init_from", init_from]
    # A rate of almost nothing leaves the weights where they start.
    second = train_explainer.main([*words, "--learning_rate", "1e-12"])
    for name, value in first.decoder.state_dict().items():
        assert torch.allclose(second.decoder.state_dict()[name], value, atol=1e-6), name
    assert second.config.init_from["new"] == [] and second.config.init_from["explainer"] == "final"
    words += ["--grid_width", "32", "--quarter_width", "12", "--half_width", "12"]
    message = one_sentence(train_explainer.main, words)
    assert message.startswith("The training cannot start: Nothing of the explainer final (grid_width 16, ")


def test_a_bfloat16_classifier_trains_an_explainer_of_the_full_one(
    tmp_path, train_explainer, classifier_folder, photographs
):
    words = explainer_words(tmp_path, "--classifier", classifier_folder, "--dataset", photographs, "--max_steps", "2")
    words += ["--mixed_precision", "bf16", "--classifier_dtype", "bfloat16"]
    explainer = train_explainer.main(words)
    assert explainer.classifier.model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in explainer.decoder.parameters()} == {torch.float32}
    loaded = AhaExplainer.from_pretrained(tmp_path / "run" / "final")
    assert loaded.classifier.model.dtype == torch.float32
    expected = loaded.classifier.fingerprint()
    assert torch.allclose(torch.tensor(loaded.config.base_model_fingerprint), torch.tensor(expected), atol=1e-5)


def test_a_wrong_start_is_one_sentence(tmp_path, train_explainer, classifier_folder, photographs):
    def refused(*words: str) -> str:
        return one_sentence(train_explainer.main, explainer_words(tmp_path, *words))

    both = ("--classifier", classifier_folder, "--dataset", photographs)
    assert refused() == "classifier is missing: give it in the YAML file or as --classifier."
    assert refused(*both[:2]) == "dataset is missing: give it in the YAML file or as --dataset."
    assert "did you mean 'classifier'?" in refused("--clasifier", classifier_folder)
    assert refused(*both, "--max_steps", "0") == "max_steps must be at least 1, but it is 0."
    assert "must be float32 or bfloat16, but it is 'half'" in refused(*both, "--classifier_dtype", "half")
    assert "goes with mixed_precision bf16 only" in refused(*both, "--classifier_dtype", "bfloat16")
    assert "The training cannot start: " in refused(*both, "--train_split", "test")
    assert "no column 'kind'" in refused(*both, "--label_column", "kind")
    assert "read, more than max_unreadable=0" in refused(*both, "--max_unreadable", "0", "--max_steps", "9")
    assert "does not exist; use 'auto'" in refused(*both, "--resume_from_checkpoint", str(tmp_path / "checkpoint-1"))


def test_a_missing_classifier_or_dataset_is_named(tmp_path, train_explainer, classifier_folder, photographs):
    for words in (
        ("--classifier", str(tmp_path / "nowhere"), "--dataset", photographs),
        ("--classifier", classifier_folder, "--dataset", str(tmp_path / "nowhere")),
    ):
        with pytest.raises(SystemExit, match="The training cannot start: .*nowhere"):
            train_explainer.main(explainer_words(tmp_path, *words))


# ---------------------------------------------------------------------------------------------- train_target.py


def test_a_shallower_target_is_distilled_from_a_teacher(tmp_path, train_target, classifier_folder, photographs):
    words = ["--dataset", photographs, "--output_dir", str(tmp_path / "run"), "--teacher", classifier_folder]
    last = train_target.main([*words, *TARGET, "--keep_layers", "0", "2", "--token_weight", "0.5"])
    assert last["epoch"] == 2 and np.isfinite(last["loss"]) and 0 <= last["validation_accuracy"] <= 1
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1] == last and len(log) == 2
    assert all(entry["unreadable_rows"] == 1 for entry in log)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.num_hidden_layers == 2 and model.dtype == torch.float16
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_a_model_keeps_a_head_that_fits_and_gets_one_for_other_classes(
    tmp_path, train_target, classifier_folder, make_classifier, photographs
):
    args = ["--dataset", photographs, "--output_dir", str(tmp_path / "run"), *TARGET, "--epochs", "1"]
    args += ["--model_dtype", "float32"]
    train_target.main([*args, "--model", classifier_folder, "--learning_rate", "1e-9"])
    before, after = (
        AutoModelForImageClassification.from_pretrained(folder) for folder in (classifier_folder, tmp_path / "run")
    )
    assert torch.allclose(before.classifier.weight, after.classifier.weight, atol=1e-6)

    other = tmp_path / "five"
    make_classifier(num_labels=5).save_pretrained(other)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(other)
    train_target.main([*args, "--model", str(other)])
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert trained.config.id2label == dict(enumerate(LABELS)) and trained.classifier.out_features == 3
    assert trained.config.label2id["newt"] == 2


def test_the_target_learns(tmp_path, train_target, classifier_folder):
    for split in ("train", "validation"):
        for label, colour in zip(LABELS, ("red", "green", "blue"), strict=True):
            folder = tmp_path / "colours" / split / label
            folder.mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
    words = ["--dataset", str(tmp_path / "colours"), "--output_dir", str(tmp_path / "run"), *TARGET]
    last = train_target.main([*words, "--model", classifier_folder, "--epochs", "6", "--learning_rate", "3e-3"])
    assert last["validation_accuracy"] == 1.0


def test_a_copy_of_all_layers_at_the_same_size_is_the_teacher(train_target, make_classifier):
    teacher = make_classifier()
    pixels = torch.randn(2, 3, 32, 32)
    student = train_target.shallower_copy(teacher, [0, 1, 2, 3], 32).eval()
    with torch.no_grad():
        assert torch.equal(student(pixels).logits, teacher(pixels).logits)


def test_a_shallower_copy_takes_the_layers_asked_for_and_resizes_the_positions(train_target, make_classifier):
    teacher = make_classifier()
    student = train_target.shallower_copy(teacher, [3, 1], 48).eval()
    pixels = torch.randn(1, 3, 48, 48)
    teacher.vit.layers = torch.nn.ModuleList([teacher.vit.layers[3], teacher.vit.layers[1]])
    with torch.no_grad():
        expected = teacher(pixels, interpolate_pos_encoding=True).logits
        assert torch.allclose(student(pixels).logits, expected, atol=1e-5)


def test_the_distillation_loss_is_the_weighted_sum_of_both_terms(train_target):
    logits, teacher, labels = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 4, 2])
    args = train_target.TargetArguments(
        "d", "o", model="m", label_smoothing=0.0, distillation_weight=0.7, distillation_temperature=3.0
    )
    p, q = (teacher / 3).softmax(-1), (logits / 3).softmax(-1)
    entropy = -logits.softmax(-1)[torch.arange(4), labels].log().mean()
    divergence = (p * (p / q).log()).sum(-1).mean()
    expected = 0.3 * entropy + 0.7 * 9 * divergence
    assert train_target.distillation_loss(logits, labels, teacher, args).item() == pytest.approx(
        expected.item(), rel=1e-4
    )
    assert train_target.distillation_loss(logits, labels, None, args).item() == pytest.approx(entropy.item(), rel=1e-4)


def test_a_target_that_cannot_be_trained_is_one_sentence(
    tmp_path, train_target, classifier_folder, make_classifier, photographs
):
    def refused(*words: str) -> str:
        common = ["--dataset", photographs, "--output_dir", str(tmp_path / "run"), *TARGET]
        return one_sentence(train_target.main, [*common, *words])

    teacher = ("--teacher", classifier_folder)
    assert "Give exactly one of model" in refused()
    assert "Give exactly one of model" in refused("--model", "m", "--keep_layers", "1", *teacher)
    assert refused("--model", "m", "--token_weight", "1") == "token_weight needs a teacher."
    assert "keep_layers needs a teacher of class ViT" in refused("--keep_layers", "1")
    assert "different layers of the teacher's 0..3, but it is [1, 4]" in refused("--keep_layers", "1", "4", *teacher)
    assert "different layers" in refused("--keep_layers", "1", "1", *teacher)
    assert "multiple of the teacher's patch of 8" in refused("--keep_layers", "1", *teacher, "--image_size", "36")
    assert "give image_size 32" in refused("--model", classifier_folder, "--image_size", "64")
    assert "15 rows, fewer than batch_size=16" in refused("--model", classifier_folder, "--batch_size", "16")
    assert "no column 'kind'" in refused("--model", classifier_folder, "--label_column", "kind")
    make_classifier(num_labels=5).save_pretrained(tmp_path / "five")
    assert "teacher has 5 classes and the model 3" in refused(
        "--model", classifier_folder, "--teacher", str(tmp_path / "five")
    )


# ---------------------------------------------------------------------------------------------- interpolate.py


@pytest.fixture
def interpolate():
    return importlib.import_module("interpolate")


def saved_explainer(folder: Path, classifier: str, seed: int, **sizes: int) -> str:
    torch.manual_seed(seed)
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8, **sizes}
    AhaExplainer.from_classifier(classifier, **sizes).save_pretrained(folder)
    return str(folder)


def test_weights_are_interpolated(tmp_path, interpolate, classifier_folder):
    ends = [saved_explainer(tmp_path / name, classifier_folder, seed) for seed, name in enumerate("ab")]
    before, after = (AhaExplainer.from_pretrained(end).decoder.state_dict() for end in ends)
    for share in (0.0, 0.25, 1.0, 1.5):
        interpolate.main([*ends, "--share", str(share), "--output", str(tmp_path / "mixed")])
        mixed = AhaExplainer.from_pretrained(tmp_path / "mixed")
        assert mixed.config.training["interpolation_share"] == share
        for name, found in mixed.decoder.state_dict().items():
            torch.testing.assert_close(found, (1 - share) * before[name] + share * after[name], atol=1e-6, rtol=1e-5)


def test_decoders_of_two_shapes_are_not_interpolated(tmp_path, interpolate, classifier_folder):
    ends = [
        saved_explainer(tmp_path / "a", classifier_folder, 0),
        saved_explainer(tmp_path / "b", classifier_folder, 0, half_width=4),
    ]
    words = [*ends, "--share", "0.5", "--output", str(tmp_path / "mixed")]
    assert "one was trained on from the other" in one_sentence(interpolate.main, words)
    assert "a-misspelt-folder" in one_sentence(interpolate.main, [str(tmp_path / "a-misspelt-folder"), *words[1:]])
    assert "share is nan" in one_sentence(interpolate.main, [ends[0], ends[0], "--share", "nan", *words[4:]])
    assert not (tmp_path / "mixed").exists()


def test_explainers_of_two_classifiers_are_not_interpolated(tmp_path, interpolate, classifier_folder, make_classifier):
    torch.manual_seed(5)
    other = make_classifier(num_labels=3)
    with torch.no_grad():
        other.classifier.weight.neg_()
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    first = AhaExplainer.from_pretrained(saved_explainer(tmp_path / "a", classifier_folder, 0))
    second = AhaExplainer.from_classifier(other, image_processor=first.image_processor, **sizes)
    with pytest.raises(ValueError, match="explain different classifiers"):
        interpolate.interpolate(first, second, 0.5)
