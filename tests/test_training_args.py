"""Settings of a training run: ranges, presets with overrides, the temperature's path."""

from __future__ import annotations

import pytest

from hf_aha.arguments import parse_yaml_and_command_line
from hf_aha.objectives import FaithfulnessObjective
from hf_aha.training_args import MAY_CHANGE_ON_RESUME, AhaTrainingArguments


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_without_overrides_the_objective_is_the_preset(preset):
    assert AhaTrainingArguments("out", preset=preset).objective() == FaithfulnessObjective.preset(preset)


def test_overrides_replace_single_values_of_the_preset_also_by_zero_and_false():
    objective = AhaTrainingArguments(
        "out",
        preset="paper",
        noise=0.0,
        references=["blur"],
        grid_range=[3, 4],
        straight_through=True,
        peak_weight=0.0,
    ).objective()
    assert (objective.noise, objective.references, objective.grid_range) == (0.0, ("blur",), (3, 4))
    assert objective.straight_through and objective.peak_weight == 0
    assert (objective.ranker, objective.num_bins) == ("sinkhorn", 15)
    assert AhaTrainingArguments("out", straight_through=True).objective().straight_through


def test_tau_falls_geometrically_from_the_first_to_the_last_step():
    args = AhaTrainingArguments("out", max_steps=101, tau_start=1.0, tau_end=0.01)
    assert args.tau(0) == 1.0
    assert args.tau(50) == pytest.approx(0.1)
    assert args.tau(100) == pytest.approx(0.01)
    assert args.tau(500) == pytest.approx(0.01)
    assert AhaTrainingArguments("out", max_steps=1, tau_start=1.0, tau_end=0.1).tau(0) == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("eval_images", 0),
        ("save_steps", 0),
        ("save_total_limit", 0),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("tau_end", -1.0),
        ("max_grad_norm", 0.0),
        ("weight_decay", -0.1),
        ("seed", -1),
        ("warmup_share", 1.5),
        ("mosaic_share", -0.1),
        ("mosaic_layout", "thirds"),
        ("pointing_weight", -1.0),
        ("pointing_weight", 0.1),  # without images pasted together
        ("ema_decay", 2.0),
        ("mixed_precision", "half"),
        ("target_classes", "all"),
        ("second_class", "third"),
        ("tv_weight", -0.1),
        ("deletion_weight", -0.5),
        ("crop_scale", [0.5]),
        ("crop_scale", [0.8, 0.5]),
        ("crop_scale", [0.0, 0.5]),
        ("eval_references", ["grey"]),
        ("eval_references", []),
        ("preset", "ours"),
        ("ranker", "bubble"),
        ("references", ["blur", "grey"]),
        ("references", []),
        ("grid_range", [9, 7]),
        ("grid_range", [7]),
        ("noise", -1.0),
        ("blur_sigma", float("nan")),
        ("num_bins", 1),
        ("curve_points", 20),
        ("pixel_share", 1.1),
        ("score", "logit"),
    ],
)
def test_a_value_out_of_range_is_refused_at_once_and_named(name, value):
    with pytest.raises(ValueError) as raised:
        AhaTrainingArguments("out", **{name: value})
    message = str(raised.value)
    assert name in message
    assert "\n" not in message and message.endswith(".")


def test_every_setting_of_the_objective_can_be_set_and_every_name_has_help():
    for name in FaithfulnessObjective.__dataclass_fields__:
        assert getattr(AhaTrainingArguments("out"), name) is None
    assert all(f.metadata["help"] for f in AhaTrainingArguments.__dataclass_fields__.values())


def test_every_name_that_may_change_on_resume_is_a_setting_and_resume_is_short():
    assert set(MAY_CHANGE_ON_RESUME) <= set(AhaTrainingArguments.__dataclass_fields__)
    args = parse_yaml_and_command_line(AhaTrainingArguments, ["--output_dir", "out", "--resume", "auto"])
    assert args.resume_from_checkpoint == "auto"


def test_a_backend_without_compilation_is_refused():
    with pytest.raises(
        ValueError, match="torch_compile_backend is 'eager', but torch_compile is false; set it to true"
    ):
        AhaTrainingArguments("out", torch_compile_backend="eager")
