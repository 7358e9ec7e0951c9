"""`AhaTrainer` on tiny models and pictures: it learns, resumes exactly, and refuses what it cannot use."""

from __future__ import annotations

import copy
import io
import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTImageProcessor

from hf_aha import AhaExplainer
from hf_aha.data import Photographs, ProcessorCrop, RandomCrop, load_photographs
from hf_aha.decoder_aha import AttributionDecoder
from hf_aha.draws import StepDraws
from hf_aha.mosaics import paste
from hf_aha.pointing_loss import pointing_loss
from hf_aha.trainer import AhaTrainer, ScoredImages, UnreadableDataError
from hf_aha.training_args import AhaTrainingArguments


HALF = (0.5, 0.5, 0.5)
ROWS = 24
TIMES = ("images_per_second", "data_wait_share")


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(seed)
    # Large blocks, so that the pictures differ after any crop.
    blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
    Image.fromarray(blocks).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def _fresh_state(tmp_path, monkeypatch):
    """Accelerate keeps the precision of the first run of a process; every test chooses its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def explainer(make_classifier) -> AhaExplainer:
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    sizes = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
    return AhaExplainer.from_classifier(make_classifier(), image_processor=processor, **sizes)


@pytest.fixture
def make_photographs(tmp_path):
    def make(rows: int = ROWS, broken: tuple[int, ...] = (), crop: str = "random", labels: bool = False):
        source = tmp_path / f"rows-{rows}-{'-'.join(map(str, broken))}"
        if not source.exists():
            source.mkdir()
            cells = [{"bytes": encoded(i)[: 60 if i in broken else None], "path": None} for i in range(rows)]
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
            table = datasets.Dataset.from_dict({"image": cells, "label": [i % 5 for i in range(rows)]}, features)
            table.to_parquet(source / "train.parquet")
        table, column = load_photographs(str(source), split="train")
        transform = RandomCrop((32, 32), HALF, HALF)
        if crop == "processor":
            transform = ProcessorCrop(ViTImageProcessor(size={"height": 32, "width": 32}))
        return Photographs(table, column, transform, "label" if labels else None)

    return make


def arguments(folder, **changes) -> AhaTrainingArguments:
    settings = {
        "max_steps": 4,
        "per_device_batch_size": 8,
        "mixed_precision": "no",
        "dataloader_num_workers": 0,
        "log_steps": 2,
        "eval_steps": 2,
        "eval_images": 8,
        "save_steps": 1000,
        "grid_range": [2, 4],
    }
    return AhaTrainingArguments(str(folder), **{**settings, **changes})


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


class Stop(Exception):
    pass


def stop_after(trainer: AhaTrainer, steps: int) -> None:
    """Let the run end as if it was killed after `steps` batches."""
    step, done = trainer.training_step, 0

    def stopping(*args):
        nonlocal done
        if done == steps:
            raise Stop
        done += 1
        return step(*args)

    trainer.training_step = stopping
    with pytest.raises(Stop):
        trainer.train()


# ---------------------------------------------------------------------------------------------- a whole run


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_writes_everything_and_the_result_reloads(tmp_path, explainer, make_photographs, precision):
    before = copy.deepcopy(explainer.classifier.state_dict())
    decoder = copy.deepcopy(explainer.decoder.state_dict())
    args = arguments(tmp_path / "run", mixed_precision=precision, save_steps=3, log_steps=3)
    trained = AhaTrainer(explainer, args, make_photographs(), make_photographs(crop="processor")).train()

    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 4
    assert Image.open(run / "training.png").size[0] > 100
    assert not (run / "unreadable.jsonl").exists()
    log = read_log(run)
    assert [entry["step"] for entry in log if "loss" in entry] == [3, 4]
    validated = [entry for entry in log if "loss" not in entry]
    assert [entry["step"] for entry in validated] == [2, 4]
    names = {
        f"validation/{r}{c}/{m}" for r in ("blur", "mean") for c in ("", "/cells") for m in ("deletion", "insertion")
    }
    assert set(validated[0]) == {"step", *names}
    assert all(0 < entry[name] < 1 for entry in validated for name in names)

    # The classifier is neither changed nor saved; the decoder is both.
    assert all(torch.equal(before[name], value) for name, value in trained.classifier.state_dict().items())
    assert any(not torch.equal(decoder[name], value) for name, value in trained.decoder.state_dict().items())
    saved = load_file(run / "final" / "model.safetensors")
    assert set(saved) == {f"decoder.{name}" for name in decoder}
    assert set(load_file(run / "checkpoint-3" / "model.safetensors")) == set(decoder)
    assert not any("classifier" in path.name for path in run.rglob("*"))

    again = AhaExplainer.from_pretrained(run / "final", classifier=trained.classifier.model)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels).scores, trained(pixels).scores)
    training = again.config.training
    assert (training["steps"], training["images_seen"], training["train_rows"]) == (4, 32, ROWS)
    assert training["unreadable_rows"] == 0
    assert str(tmp_path) not in json.dumps(training)
    assert trained.decoder.forward.__func__ is AttributionDecoder.forward, "Accelerate's autocast is taken off again"


class Quadrant(torch.nn.Module):
    """Stands in for the classifier: class 0 is the brightness of the upper left quadrant, class 1 its opposite."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __call__(self, pixels, layers=()):
        features = self.model(pixels, layers=layers)
        bright = 3 * pixels[:, :, : pixels.shape[-2] // 2, : pixels.shape[-1] // 2].mean((1, 2, 3))
        features.logits[:] = -20
        features.logits[:, 0] = bright
        features.logits[:, 1] = -bright
        return features

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "model" else getattr(self.model, name)


def test_training_finds_the_quadrant_that_decides_the_class(tmp_path, explainer, make_photographs):
    explainer.classifier = Quadrant(explainer.classifier)
    args = arguments(
        tmp_path / "run", max_steps=80, learning_rate=0.01, ema_decay=0.8, eval_images=16, eval_steps=1000, log_steps=8
    )
    trainer = AhaTrainer(explainer, args, make_photographs(), make_photographs(crop="processor"))
    untrained = trainer.evaluate()
    trainer.train()
    log = read_log(tmp_path / "run")
    trained = [entry for entry in log if "loss" not in entry][-1]

    def gap(entry, kind):
        return entry[f"validation/{kind}/insertion"] - entry[f"validation/{kind}/deletion"]

    for kind in ("mean", "mean/cells"):
        assert gap(trained, kind) > gap(untrained, kind) + 0.05
    losses = [entry["loss"] for entry in log if "loss" in entry]
    # Of few points a step, so single entries are noisy.
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.03
    batch = torch.stack([trainer.eval_dataset[i]["pixel_values"] for i in range(16)])
    with torch.no_grad():
        scores = explainer(batch).scores
    top = scores.flatten(1).topk(256).indices  # a quarter of the pixels
    inside = (top // 32 < 16) & (top % 32 < 16)
    assert inside.float().mean() > 0.5, "by chance it is a quarter"


def test_the_averaged_weights_are_measured_and_saved(tmp_path, explainer, make_photographs):
    args = arguments(tmp_path / "run", ema_decay=0.5, max_steps=3, mixed_precision="bf16")
    trainer = AhaTrainer(explainer, args, make_photographs(), make_photographs(crop="processor"))
    seen = []
    step = trainer.training_step

    def recording(*batch):
        output = step(*batch)
        seen.append(copy.deepcopy(explainer.decoder.state_dict()))
        return output

    trainer.training_step = recording
    trained = trainer.train().decoder.state_dict()
    for name in trained:
        expected = 0.25 * seen[0][name] + 0.25 * seen[1][name] + 0.5 * seen[2][name]
        assert torch.allclose(trained[name], expected, atol=1e-6)
    measured = trainer.evaluate()
    # The average has its own weights also behind the forward that Accelerate wrapped.
    with torch.no_grad():
        for parameter in explainer.decoder.parameters():
            parameter.zero_()
    assert trainer.evaluate() == measured == {k: v for k, v in read_log(tmp_path / "run")[-1].items() if k != "step"}


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("changes", "killed_after", "checkpoint"),
    [
        ({"save_steps": 2}, 3, 2),  # within the first epoch (three batches)
        ({"save_steps": 5}, 6, 5),  # within the second epoch
        ({"save_steps": 3}, 5, 3),  # at the end of an epoch
        ({"save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "ema_decay": 0.0}, 5, 2),
        (
            {"save_steps": 4, "noise": 0.5, "target_classes": "sampled", "mosaic_share": 0.5, "references": ["noise"]},
            5,
            4,
        ),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(
    tmp_path, explainer, make_photographs, changes, killed_after, checkpoint
):
    fresh = copy.deepcopy(explainer)
    settings = {"max_steps": 8, "eval_steps": 1000, "log_steps": 1, **changes}
    photographs = make_photographs(broken=(3, 11))
    whole = AhaTrainer(copy.deepcopy(fresh), arguments(tmp_path / "whole", **settings), photographs).train()

    stop_after(AhaTrainer(copy.deepcopy(fresh), arguments(tmp_path / "run", **settings), photographs), killed_after)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{checkpoint}"]
    assert not (tmp_path / "run" / "final").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    args = arguments(tmp_path / "run", resume_from_checkpoint="auto", **settings)
    # Another seed of the process must not matter.
    torch.manual_seed(123)
    trainer = AhaTrainer(copy.deepcopy(fresh), args, make_photographs(broken=(3, 11)))
    resumed = trainer.train()

    for name, value in whole.decoder.state_dict().items():
        assert torch.equal(resumed.decoder.state_dict()[name], value), name
    timeless = [
        [{k: v for k, v in entry.items() if k not in TIMES} for entry in read_log(tmp_path / name)]
        for name in ("whole", "run")
    ]
    assert timeless[0] == timeless[1]
    assert [entry["step"] for entry in timeless[1]] == list(range(1, settings["max_steps"] + 1))
    lines = [(tmp_path / name / "unreadable.jsonl").read_text() for name in ("whole", "run")]
    assert lines[0] == lines[1]
    trainings = [e.config.training for e in (whole, resumed)]
    assert trainings[0]["images_seen"] == trainings[1]["images_seen"]
    assert trainings[0]["unreadable_rows"] == trainings[1]["unreadable_rows"] == 2


def test_epochs_differ_in_order_and_crops_and_every_row_comes_once(tmp_path, explainer, make_photographs):
    trainer = AhaTrainer(explainer, arguments(tmp_path / "run"), make_photographs())
    batches = iter(trainer.source)
    epochs = [torch.cat([next(batches).indices for _ in range(3)]).tolist() for _ in range(3)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for done in (1, 4, 6, 8):
        AcceleratorState._reset_state(reset_partial_state=True)
        later = AhaTrainer(explainer, arguments(tmp_path / "run"), make_photographs())
        later.source.feed.go_to(done)
        rest = iter(later.source)
        assert torch.cat([next(rest).indices for _ in range(9 - done)]).tolist() == sum(epochs, [])[8 * done :]


def test_old_checkpoints_are_removed_and_only_whole_ones_are_found(tmp_path, explainer, make_photographs):
    run = tmp_path / "run"
    args = arguments(run, max_steps=6, save_steps=1, save_total_limit=2)
    AhaTrainer(explainer, args, make_photographs()).train()
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]

    # A run killed while it saved leaves a part under another name.
    AcceleratorState._reset_state(reset_partial_state=True)
    (run / "partial-checkpoint-6").mkdir()
    args = arguments(run, max_steps=7, resume_from_checkpoint="auto", save_steps=6)
    trainer = AhaTrainer(explainer, args, make_photographs())
    trainer.train()
    assert [entry["step"] for entry in read_log(run)] == [2, 4, 6, 7]
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-5", "checkpoint-6"]


def test_what_cannot_be_resumed_is_one_sentence(tmp_path, explainer, make_photographs):
    run = tmp_path / "run"

    def train(**changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        AhaTrainer(explainer, arguments(run, **changes), make_photographs()).train()

    train(resume_from_checkpoint="auto", save_steps=3)  # nothing to resume yet: starts from the beginning
    with pytest.raises(FileExistsError, match="holds checkpoint-3 of another run; resume it with"):
        train()
    with pytest.raises(FileNotFoundError, match="checkpoint-9 does not exist; use 'auto'"):
        train(resume_from_checkpoint=str(run / "checkpoint-9"))
    with pytest.raises(ValueError, match="stands at step 3, so max_steps=3 leaves nothing to train"):
        train(resume_from_checkpoint="auto", max_steps=3)
    assert [entry["step"] for entry in read_log(run)] == [2, 4], "a refused run leaves the log alone"


# ---------------------------------------------------------------------------------------------- unreadable rows


def test_unreadable_rows_are_counted_and_listed_once(tmp_path, explainer, make_photographs):
    args = arguments(tmp_path / "run", max_steps=7)
    trained = AhaTrainer(explainer, args, make_photographs(broken=(1, 5, 20))).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "unreadable.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == [1, 5, 20]
    assert all("truncated" in line["reason"] for line in lines)
    assert trained.config.training["unreadable_rows"] == 3
    assert trained.config.training["images_seen"] == 2 * (ROWS - 3) + 8 - sum(
        row in (1, 5, 20) for row in _order(args, epoch=2)[:8]
    )


def _order(args: AhaTrainingArguments, epoch: int) -> list[int]:
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()


def test_too_many_unreadable_rows_stop_the_run(tmp_path, explainer, make_photographs):
    args = arguments(tmp_path / "run", max_unreadable=2)
    with pytest.raises(
        UnreadableDataError, match="rows of the training dataset could not be read, more than"
    ) as raised:
        AhaTrainer(explainer, args, make_photographs(broken=tuple(range(12)))).train()
    assert "max_unreadable=2; the last was row" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_dataset_without_a_readable_row_is_refused(tmp_path, explainer, make_photographs):
    broken = make_photographs(rows=9, broken=tuple(range(9)))
    with pytest.raises(UnreadableDataError, match="No row of the training dataset could be read"):
        AhaTrainer(explainer, arguments(tmp_path / "run"), broken).train()
    with pytest.raises(UnreadableDataError, match="No row of the validation dataset could be read"):
        AhaTrainer(explainer, arguments(tmp_path / "run"), make_photographs(), broken).train()


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "changes",
    [
        {"target_classes": "sampled", "mosaic_share": 1.0},
        {"target_classes": "alone", "mosaic_share": 1.0, "mosaic_layout": "quarters", "pointing_weight": 0.2},
        {"target_classes": "label", "gradient_accumulation_steps": 2},
        {"preset": "paper", "grid_range": [4, 6]},
        {"target_classes": "sampled", "second_class": "rival", "gradient_accumulation_steps": 2},
        {"second_class": "label", "tv_weight": 0.3},
        {"ranker": "transport", "score": "log_odds", "curve_points": 0, "num_bins": 4, "ema_decay": 0.0},
        {"per_device_batch_size": 50, "dataloader_num_workers": 1},  # more than there are rows
    ],
)
def test_settings_run(tmp_path, explainer, make_photographs, changes):
    args = arguments(tmp_path / "run", max_steps=2, **changes)
    AhaTrainer(explainer, args, make_photographs(labels=True)).train()
    (entry,) = read_log(tmp_path / "run")
    assert all(np.isfinite(value) for value in entry.values())


@pytest.mark.parametrize("name", ["target_classes", "second_class"])
def test_labels_are_asked_for_when_they_are_to_be_explained(tmp_path, explainer, make_photographs, name):
    with pytest.raises(ValueError, match=f"{name} is 'label', but the training dataset has no label column"):
        AhaTrainer(explainer, arguments(tmp_path / "run", **{name: "label"}), make_photographs())


def test_two_classes_of_an_image_are_trained_as_two_images(tmp_path, explainer, make_photographs, monkeypatch):
    changes = {"second_class": "label", "references": ["mean"], "pixel_share": 1.0, "curve_points": 0}
    trainer = AhaTrainer(explainer, arguments(tmp_path / "run", **changes), make_photographs(labels=True))
    asked = []
    features = type(explainer).features
    monkeypatch.setattr(type(explainer), "features", lambda *given: asked.append(len(given[1])) or features(*given))
    pixels, rows = torch.randn(3, 3, 32, 32), torch.arange(3)
    with torch.no_grad():
        predicted = explainer.classifier(pixels).logits.argmax(-1)
    labels = torch.stack([predicted[0], (predicted[1] + 1) % 5, (predicted[2] + 2) % 5])
    draws = StepDraws.of(0, 0, rows.tolist())
    scored = trainer._scores_of(explainer.decoder, pixels, labels, draws)
    seen, target = scored.pixel_values, scored.target
    assert asked == [3], "the plain classifier runs once an image"
    assert torch.equal(seen, torch.cat([pixels, pixels])) and torch.equal(target[:3], predicted)
    assert torch.equal(target[4:], labels[1:]) and target[3] != labels[0]
    whole = trainer._objective_of(trainer.objective, scored, draws).loss
    # With all points of the curves and one reference nothing is drawn: two plain runs, one a class.
    single = AhaTrainer(
        explainer, arguments(tmp_path / "single", **{**changes, "second_class": "none"}), make_photographs()
    )
    parts = [
        single._objective_of(
            single.objective, ScoredImages(pixels, target[part], scored.scores[part], None), draws
        ).loss
        for part in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close(whole, sum(parts) / 2)


def test_a_map_is_drawn_into_the_photographs_of_its_class(tmp_path, explainer, make_photographs):
    """The loss of the trainer is the objective's plus the pointing loss, with the classes of the photographs alone."""
    settings = {"mosaic_share": 1.0, "mosaic_layout": "quarters", "target_classes": "alone", "second_class": "rival"}
    pixels, rows = torch.randn(4, 3, 32, 32), torch.arange(4)
    with torch.no_grad():
        alone = explainer.classifier(pixels).logits.argmax(-1)
    losses = {}
    for weight in (0.0, 0.5):
        args = arguments(tmp_path / str(weight), pointing_weight=weight, **settings)
        trainer, draws = AhaTrainer(explainer, args, make_photographs()), StepDraws.of(0, 0, rows.tolist())
        scored = trainer._scores_of(explainer.decoder, pixels, torch.full((4,), -1), draws)
        assert torch.equal(scored.target[:4], alone) and not torch.equal(scored.pixel_values[:4], pixels)
        losses[weight] = trainer._objective_of(trainer.objective, scored, draws).loss
    source = paste(pixels, 1.0, StepDraws.of(0, 0, rows.tolist()).images, "quarters").source
    inside = alone[torch.cat([source, source])] == scored.target[:, None, None]
    assert torch.equal(scored.inside, inside) and inside[:4].any((1, 2)).all()
    torch.testing.assert_close(losses[0.5] - losses[0.0], 0.5 * pointing_loss(scored.scores, inside))


def test_gradient_accumulation_equals_one_larger_batch(tmp_path, explainer, make_photographs):
    """Means over equal batches: with nothing random but the order, two halves give the gradient of the whole."""
    fresh = copy.deepcopy(explainer)
    weights = []
    for size, parts in ((8, 1), (4, 2)):
        AcceleratorState._reset_state(reset_partial_state=True)
        args = arguments(
            tmp_path / f"run-{parts}",
            per_device_batch_size=size,
            gradient_accumulation_steps=parts,
            **{"max_steps": 2, "references": ["mean"], "pixel_share": 1.0, "curve_points": 0, "ema_decay": 0.0},
        )
        photographs = make_photographs(crop="processor")
        weights.append(AhaTrainer(copy.deepcopy(fresh), args, photographs).train().decoder.state_dict())
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-4), name


def test_every_step_takes_as_many_batches_also_across_the_end_of_an_epoch(tmp_path, explainer, make_photographs):
    args = arguments(tmp_path / "run", per_device_batch_size=8, gradient_accumulation_steps=2, max_steps=5)
    # Three batches an epoch: every other epoch ends within a step.
    assert AhaTrainer(explainer, args, make_photographs()).train().config.training["images_seen"] == 5 * 2 * 8


def test_norms_and_biases_do_not_decay_and_the_rate_warms_up(tmp_path, explainer, make_photographs):
    args = arguments(tmp_path / "run", max_steps=100, warmup_share=0.1, weight_decay=0.3)
    trainer = AhaTrainer(explainer, args, make_photographs())
    decayed, free = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim <= 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(explainer.decoder.parameters()))
    rate = trainer.schedule.lr_lambdas[0]
    assert [rate(step) for step in (0, 5, 10, 55, 100)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)


@pytest.mark.parametrize("where", ["loss", "scores"])
def test_a_run_that_is_never_finite_stops(tmp_path, explainer, make_photographs, where):
    args = arguments(tmp_path / "run", max_nonfinite_steps=2)
    trainer = AhaTrainer(explainer, args, make_photographs())
    if where == "loss":
        trainer._logits_of = lambda pixels: torch.full((len(pixels), 5), float("inf"))
    else:
        with torch.no_grad():
            explainer.decoder.pixel_score.bias.fill_(float("nan"))
    told = f"NaN or infinity in the {where} at step 1, the last of 2 such steps in a row; lower the learning rate"
    with pytest.raises(FloatingPointError, match=told), pytest.warns(UserWarning, match="Step 0 is left out"):
        trainer.train()
    assert not (tmp_path / "run" / "final").exists()
