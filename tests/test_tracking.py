"""Trackers get the settings and every entry of the log, never a token, and never end a run; the progress line."""

from __future__ import annotations

import importlib.util
import io
import json
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from test_trainer import arguments, explainer, make_photographs, read_log  # noqa: F401 (fixtures)

from hf_aha import tracking
from hf_aha.tracking import ProgressLine, RunTrackers, TrackerError, check_trackers, flat_settings
from hf_aha.trainer import AhaTrainer
from hf_aha.training_args import TRACKERS, AhaTrainingArguments


TOKEN = "hf_" + "x1" * 16


@pytest.fixture(autouse=True)
def _fresh_state(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Recorder(GeneralTracker):
    """Keeps what it is sent."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, fails: str = ""):
        super().__init__()
        self.fails, self.calls = fails, []

    @property
    def tracker(self):
        return self

    def _record(self, kind: str, *content: object) -> None:
        self.calls.append((kind, *content))
        if kind == self.fails:
            raise ConnectionError("no\nnetwork.")

    def start(self):
        self._record("start")

    def store_init_configuration(self, values):
        self._record("config", values)

    def log(self, values, step=None, **kwargs):
        self._record("log", step, values)

    def finish(self):
        self._record("finish")

    def kinds(self) -> list[str]:
        return [call[0] for call in self.calls]


def run(tmp_path, explainer, photographs, *trackers, **changes):  # noqa: F811
    args = arguments(
        tmp_path / "run", max_steps=2, log_steps=1, eval_steps=2, eval_images=2, hub_token=TOKEN, **changes
    )
    return AhaTrainer(explainer, args, photographs, photographs, trackers=trackers).train()


# ---------------------------------------------------------------------------------------------- what is sent


def test_a_tracker_gets_the_settings_and_every_entry_of_the_log(tmp_path, explainer, make_photographs):  # noqa: F811
    tracker = Recorder()
    run(tmp_path, explainer, make_photographs(crop="processor"), tracker)
    assert tracker.kinds() == ["start", "config", "log", "log", "log", "finish"]
    settings = tracker.calls[1][1]
    assert settings["max_steps"] == 2 and settings["grid_range"] == "[2, 4]"
    assert all(isinstance(value, (str, int, float, bool)) for value in settings.values())
    assert TOKEN not in str(tracker.calls) and "hub_token" not in settings
    sent = [{"step": step, **values} for kind, step, values in (c for c in tracker.calls if c[0] == "log")]
    log = read_log(tmp_path / "run")
    assert len(log) == 3
    for entry, values in zip(log, sent, strict=True):
        assert {name.removeprefix("training/"): value for name, value in values.items()} == entry
    assert {name.split("/")[0] for name in sent[-1] if name != "step"} == {"validation"}


def test_a_tracker_that_fails_costs_a_warning_and_not_the_run(tmp_path, explainer, make_photographs):  # noqa: F811
    broken, whole = Recorder(fails="log"), Recorder()
    with pytest.warns(UserWarning, match=r"The tracker recorder failed \(no network\); the training goes on without"):
        run(tmp_path, explainer, make_photographs(crop="processor"), broken, whole)
    assert broken.kinds() == ["start", "config", "log"], "it is left out from then on"
    assert whole.kinds() == ["start", "config", "log", "log", "log", "finish"]
    assert (tmp_path / "run" / "final").is_dir()


def test_a_tracker_that_cannot_start_ends_the_run_before_it_begins(tmp_path, explainer, make_photographs):  # noqa: F811
    with pytest.raises(TrackerError, match=r"The trackers recorder cannot be started \(no network\); mend that, or"):
        run(tmp_path, explainer, make_photographs(crop="processor"), Recorder(fails="start"))
    assert not (tmp_path / "run" / "final").exists() and not read_log(tmp_path / "run")


def test_a_tracker_is_closed_also_when_the_run_fails(tmp_path, explainer, make_photographs):  # noqa: F811
    tracker = Recorder()
    args = arguments(tmp_path / "run", max_nonfinite_steps=1)
    trainer = AhaTrainer(explainer, args, make_photographs(), trackers=[tracker])
    trainer._logits_of = lambda pixels: torch.full((len(pixels), 5), float("inf"))
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert tracker.kinds() == ["start", "config", "finish"]


# ---------------------------------------------------------------------------------------------- by name


def test_no_tracker_is_on_by_default():
    assert AhaTrainingArguments("run").report_to is None


@pytest.mark.parametrize(
    ("name", "advice"), [("tensorbord", "did you mean 'tensorboard'?"), ("xyz", "known trackers are tensorboard, ")]
)
def test_an_unknown_tracker_is_refused_with_the_near_one(name, advice):
    with pytest.raises(ValueError, match=f"report_to has an unknown tracker {name!r}; ") as raised:
        AhaTrainingArguments("run", report_to=[name])
    assert advice in str(raised.value)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_names_its_package(name, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(TrackerError, match=f"The tracker {name} is not installed; run `pip install {TRACKERS[name]}`"):
        check_trackers([name])


def test_the_names_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS) <= set(LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize(("run_name", "expected"), [(None, "mine"), ("second try", "second try")])
def test_trackers_are_told_project_and_name(tmp_path, run_name, expected):
    class Accelerator:
        log_with, trackers = ["wandb"], []

        def init_trackers(self, *told):
            self.told = told

    accelerator = Accelerator()
    args = AhaTrainingArguments(str(tmp_path / "mine"), run_name=run_name, tracking_project="maps")
    RunTrackers(accelerator, args).start()
    project, settings, names = accelerator.told
    assert project == "maps" and settings == flat_settings(args)
    assert names["wandb"] == {"name": expected} and names["mlflow"] == {"run_name": expected}


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_the_log(tmp_path, explainer, make_photographs):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, explainer, make_photographs(crop="processor"), report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "tracking" / "hf-aha"))
    events.Reload()
    logged = [entry["loss"] for entry in read_log(tmp_path / "run") if "loss" in entry]
    assert [event.value for event in events.Scalars("training/loss")] == pytest.approx(logged, abs=1e-6)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_what_is_sent_fits_tensorboards_hyperparameters():
    settings = flat_settings(AhaTrainingArguments("run", references=["blur"], straight_through=False))
    assert settings["references"] == json.dumps(["blur"]) and settings["straight_through"] is False
    assert "image_size" not in settings, "nothing that is not set"


# ---------------------------------------------------------------------------------------------- the progress line


class Process:
    def __init__(self, main: bool):
        self.is_main_process = main


ENTRY = {"step": 3, "deletion": 0.25, "insertion": 0.5, "images_per_second": 12.5, "loss": 0.1}


@pytest.mark.parametrize(("main", "quiet"), [(True, False), (True, True), (False, False)])
def test_the_progress_line_is_that_of_the_main_process_alone(monkeypatch, main, quiet):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    line = ProgressLine(AhaTrainingArguments("run", max_steps=8, disable_tqdm=quiet), Process(main), 2)
    line.advance()
    line.show(ENTRY)
    line.close()
    shown = sys.stderr.getvalue()
    if quiet or not main:
        assert shown == ""
    else:
        assert "3/8" in shown and "deletion=0.25, insertion=0.5, images/s=12.5" in shown
        assert "<" in shown, "the time left"
