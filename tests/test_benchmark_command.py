"""`hf-aha benchmark`: explainers beside baselines, on a tiny random target model and noise."""

from __future__ import annotations

import datasets
import pytest
import torch
from test_evaluate_command import save_dataset, save_explainer

from hf_aha import AhaExplainer
from hf_aha.benchmark import BenchmarkResults
from hf_aha.cli import main


@pytest.fixture(scope="module")
def explainer(tmp_path_factory):
    return save_explainer(tmp_path_factory.mktemp("explainers") / "tiny")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def benchmark(tmp_path):
    save_dataset(tmp_path / "data", 4)

    def run(*words: object) -> int:
        options = ["--dataset", tmp_path / "data", "--output", tmp_path / "out", "--batch-size", 2]
        return main(["benchmark", *map(str, [*options, "--protocols", "aha", *words])])

    return run


def test_methods_are_measured_side_by_side(benchmark, explainer, tmp_path, capsys):
    words = ["--explainer", explainer, "--methods", "random", "centre:3", "attention-rollout"]
    assert benchmark(*words, "--metrics", "total_variation") == 0
    results = BenchmarkResults.load(tmp_path / "out")
    assert [record.name for record in results.methods] == ["aha", "random", "centre", "attention-rollout"]
    by_method = results.protocols["aha/deletion"]
    assert [len(by_method[record.name]) for record in results.methods] == [4, 4, 3, 4]
    assert results.methods[3].passes == (1, 0) and all(record.seconds for record in results.methods)
    text = capsys.readouterr().out
    assert "### aha: AHA (tiny) minus the others" in text and "| Random order |" in text
    assert {"cost-aha.png", "curves-aha.png", "maps.png", "results.md"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_a_target_model_alone_is_enough(benchmark, explainer, tmp_path):
    processor = AhaExplainer.from_pretrained(explainer).image_processor
    processor.save_pretrained(explainer / "classifier")
    assert benchmark("--classifier", explainer / "classifier", "--methods", "centre", "--quiet") == 0
    results = BenchmarkResults.load(tmp_path / "out")
    assert results.run["context"]["classifier"] == "classifier" and results.accuracy() is not None


def test_two_explainers_of_one_target_are_compared_and_of_two_refused(benchmark, explainer, tmp_path, capsys):
    second = AhaExplainer.from_pretrained(explainer)
    with torch.no_grad():
        next(second.decoder.parameters()).mul_(-1)
    second.save_pretrained(tmp_path / "second", include_classifier=True)
    assert benchmark("--explainer", explainer, tmp_path / "second", "--methods", "random") == 0
    assert "| AHA (second) |" in capsys.readouterr().out
    other = save_explainer(tmp_path / "other", seed=1)
    assert benchmark("--explainer", explainer, other, "--output", tmp_path / "two") == 2
    assert "explains another target model than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--methods", "random"], "there is no target model: give --classifier, --explainer, or both"),
        (["--classifier", "x", "--methods", "rnadom"], "unknown method 'rnadom': did you mean 'random'"),
        (["--classifier", "x", "--methods", "rise:no"], "number of images as in rise:100"),
        (["--classifier", "no-such", "--local-files-only"], "the target model 'no-such' cannot be loaded"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence_and_2(words, named, benchmark, capsys):
    assert benchmark(*words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("hf-aha benchmark: ") and named in last
