"""YAML recipes and their overrides on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from hf_aha.arguments import parse_yaml_and_command_line


@dataclass
class Settings:
    output_dir: str = field(metadata={"help": "Where to."})
    learning_rate: float = 0.1
    max_steps: int = 10
    precision: str = "bf16"
    split: str | None = "validation"
    scale: list[float] = field(default_factory=lambda: [0.5, 1.0])
    kinds: list[str] | None = None
    smooth: bool | None = None
    offline: bool = False

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, but it is {self.max_steps}.")


def parse(tmp_path, text: str | None, *argv: str) -> Settings:
    if text is None:
        return parse_yaml_and_command_line(Settings, argv)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_yaml_and_command_line(Settings, [str(path), *argv])


def refused(tmp_path, text: str | None, *argv: str) -> str:
    with pytest.raises(SystemExit) as raised:
        parse(tmp_path, text, *argv)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_yaml_values_get_the_types_of_the_fields(tmp_path):
    settings = parse(
        tmp_path,
        "output_dir: out\nlearning_rate: 1e-3\nmax_steps: 3\nsplit: null\nscale: [0.25, 1]\n"
        "kinds: [blur, mean]\nsmooth: true\noffline: true\n",
    )
    assert settings == Settings("out", 0.001, 3, "bf16", None, [0.25, 1.0], ["blur", "mean"], True, True)
    assert all(isinstance(value, float) for value in (settings.learning_rate, *settings.scale))


def test_the_command_line_wins_and_the_rest_stays(tmp_path):
    recipe = "output_dir: out\nlearning_rate: 0.5\nsplit: null\nscale: [0.1, 0.2]\nsmooth: true\noffline: true\n"
    settings = parse(
        tmp_path,
        recipe,
        *("--learning-rate", "2e-4", "--split=test", "--scale", "0.3", "0.4"),
        *("--smooth", "false", "--offline", "false", "--kinds", "noise"),
    )
    assert settings == Settings("out", 2e-4, 10, "bf16", "test", [0.3, 0.4], ["noise"], False, False)
    # A value equal to the default is an override too.
    assert parse(tmp_path, recipe, "--learning_rate", "0.1").learning_rate == 0.1


def test_a_recipe_is_not_needed_and_a_flag_needs_no_word(tmp_path):
    assert parse(tmp_path, None, "--output_dir", "out", "--offline") == Settings("out", offline=True)


def test_a_single_word_fills_a_list(tmp_path):
    assert parse(tmp_path, "output_dir: out\nkinds: blur\n").kinds == ["blur"]


def test_unknown_names_are_refused_with_the_nearest_known_one(tmp_path):
    message = refused(tmp_path, "output_dir: out\nlearnin_rate: 1\n")
    assert "unknown name 'learnin_rate'; did you mean 'learning_rate'?" in message
    assert "known names are kinds, learning_rate" in refused(tmp_path, "output_dir: out\nzzz: 1\n")
    assert "unknown word '--max-step'; did you mean 'max_steps'?" in refused(
        tmp_path, "output_dir: o", "--max-step", "3"
    )
    # Abbreviations would bypass the rule that the command line wins.
    assert "did you mean 'learning_rate'?" in refused(tmp_path, "output_dir: out", "--learning", "3")


def test_a_recipe_must_exist_and_be_a_mapping(tmp_path):
    with pytest.raises(SystemExit, match="recipe .*nowhere.yaml does not exist"):
        parse_yaml_and_command_line(Settings, [str(tmp_path / "nowhere.yaml")])
    assert "must be a YAML mapping" in refused(tmp_path, "- a\n- b\n")
    assert "must be a YAML mapping" in refused(tmp_path, "")
    assert "is not YAML" in refused(tmp_path, "a: [1\nb: 2")


def test_wrong_values_are_one_sentence(tmp_path):
    assert "--output_dir" in refused(tmp_path, "max_steps: 3\n")
    assert "--output_dir" in refused(tmp_path, None)
    assert "invalid int value: 'many'" in refused(tmp_path, "output_dir: out\nmax_steps: many\n")
    assert "invalid float value: 'x'" in refused(tmp_path, "output_dir: out\n", "--learning_rate", "x")
    assert "no value for 'max_steps'" in refused(tmp_path, "output_dir: out\nmax_steps:\n")
    assert "gives 'kinds' a mapping" in refused(tmp_path, "output_dir: out\nkinds: {a: 1}\n")
    assert refused(tmp_path, "output_dir: out\nmax_steps: 0\n") == "max_steps must be at least 1, but it is 0."


def test_a_word_that_yaml_reads_as_a_boolean_is_not_taken_for_text(tmp_path):
    assert "'precision' a word that YAML reads as False; put it in quotes" in refused(
        tmp_path, "output_dir: out\nprecision: no\n"
    )
    assert parse(tmp_path, 'output_dir: out\nprecision: "no"\n').precision == "no"
