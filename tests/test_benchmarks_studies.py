"""The studies of trainings, ablation and matrix of references, on tiny runs; no number itself is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import ViTImageProcessor

from hf_aha import AhaExplainer
from hf_aha.data import Photographs, ProcessorCrop, load_photographs
from hf_aha.metrics.curves import deletion_insertion_curves
from hf_aha.metrics.legibility import total_variation
from hf_aha.perturbation import Normalization, reference_image


pytestmark = pytest.mark.usefixtures("accelerate_afresh")
SIZES = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}


@pytest.fixture
def photographs(tmp_path) -> str:
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("validation", 3)):
        folder = tmp_path / "photographs" / split
        folder.mkdir(parents=True)
        for number in range(count):
            blocks = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(blocks).save(folder / f"{number}.png")
    return str(tmp_path / "photographs")


@pytest.fixture
def classifier(tmp_path, make_classifier) -> str:
    make_classifier(num_labels=3).save_pretrained(tmp_path / "tiny-vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tiny-vit")
    return str(tmp_path / "tiny-vit")


def common(**changes) -> dict:
    settings = {
        "image_size": 16,
        "per_device_batch_size": 4,
        "max_steps": 2,
        "mixed_precision": "no",
        "ema_decay": 0.0,
    }
    return {**settings, "dataloader_num_workers": 0, "grid_range": [2, 4], "disable_tqdm": True, **SIZES, **changes}


@pytest.fixture
def plan(tmp_path) -> Path:
    rows = [
        {"name": "default", "why": "the first"},
        {"name": "seed-1", "why": "chance", "overrides": {"seed": 1}, "repeats": True, "priority": 2},
    ]
    more = [{"name": "soft", "why": "soft masks", "overrides": {"straight_through": False}, "against": "seed-1"}]
    groups = [{"title": "One", "rows": rows}, {"title": "Two", "rows": more, "decided": "Hard masks stay."}]
    path = tmp_path / "plan.yaml"
    text = yaml.safe_dump({"recipe": "imagenette-demo/explainer.yaml", "common": common(), "groups": groups})
    path.write_text(text, encoding="utf-8")
    return path


def test_every_row_of_the_ablation_is_a_valid_run_of_equal_budget(script, tmp_path):
    ablation, studies = script("ablation"), script("studies")
    plan = ablation.Plan.read(ablation.ROWS_FILE)
    recipe = script("recipe_runs").recipe_script()

    def parsed(row) -> object:
        words = [str(plan.recipe), "--classifier", "x", "--dataset", "y", "--output_dir", str(tmp_path)]
        words += [*studies.as_words(plan.common), *studies.as_words(row.overrides)]
        return recipe.parse_yaml_and_command_line(recipe.RecipeArguments, words)

    first = parsed(plan.rows[0])
    assert first.image_size == 112 and not plan.rows[0].overrides
    for row in plan.rows:
        args = parsed(row)
        for name, value in row.overrides.items():
            assert getattr(args, name) == value, row.name
            # A row that changes nothing would be the default under another name.
            assert getattr(first, name) != value or name in ("references", "pixel_share"), row.name
        crops = args.max_steps * args.per_device_batch_size
        assert crops == first.max_steps * first.per_device_batch_size * (2 if row.name == "longer" else 1)
        if row.repeats:
            assert set(row.overrides) == {"seed"}
    # Two rows with the same settings would be one run under two names.
    assert len({json.dumps(row.overrides, sort_keys=True) for row in plan.rows}) == len(plan.rows)


def test_the_ablation_runs_goes_on_and_reports_what_is_missing(
    script, plan, photographs, classifier, tmp_path, monkeypatch
):
    ablation, studies = script("ablation"), script("studies")
    output, results, page = tmp_path / "study", tmp_path / "results.json", tmp_path / "page.md"
    words = ["measure", "--dataset", photographs, "--classifier", classifier, "--rows-file", str(plan)]
    words += ["--eval-rows", "2", "--output", str(output), "--results", str(results)]
    ran, run = [], studies.Study.run
    monkeypatch.setattr(studies.Study, "run", lambda study, *given: ran.append(given[1]) or run(study, *given))

    empty = ablation.main([*words, "--rows"])
    assert empty["rows"] == [] and [row["name"] for row in empty["missing"]] == ["default", "seed-1", "soft"]
    text = ablation.main(["report", str(results), "--rows-file", str(plan), "--output", str(page)])
    assert "No run has been measured yet." in text and "- `soft`: soft masks" in text

    # By priority: default and soft, then seed-1.
    ablation.main([*words, "--shard", "1/2", "--priority", "1"])
    assert ran == ["soft"]
    result = ablation.main(words)
    assert ran == ["soft", "default", "seed-1"]
    assert result["missing"] == [] and [row["name"] for row in result["rows"]] == ["default", "seed-1", "soft"]
    default, seed, soft = result["rows"]
    assert default["minus"] is None and (seed["against"], soft["against"]) == ("default", "seed-1")
    assert default["images_seen"] == 8 and default["steps"] == 2 and default["seconds_per_step"] > 0
    means = [row["quality"]["mean"]["mean"] for row in result["rows"]]
    assert soft["minus"]["mean"]["mean"] == pytest.approx(means[2] - means[1], abs=1e-6)
    assert seed["minus"]["blur/cell"]["images"] == 2 and 0 < default["roughness"]["mean"] < 1.5
    assert result["seed_spread"] == pytest.approx(abs(means[1] - means[0]), abs=1e-6)
    assert json.loads(results.read_text()) == json.loads(json.dumps(result))
    everything = results.read_text() + "".join(path.read_text() for path in (output / "rows").iterdir())
    assert str(tmp_path) not in everything and not list((output / "runs").iterdir())

    text = ablation.main(["report", str(results), "--rows-file", str(plan), "--output", str(page)])
    assert page.read_text() == text and "Hard masks stay." in text and "Not measured" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("| **soft**"))
    assert "(`straight_through: False`)" in line and "to seed-1" in line
    assert line.count("|") == text.splitlines()[text.splitlines().index("## Two") + 2].count("|")

    # Done rows are not run again, and rows of other settings are not mixed in.
    assert ablation.main(words)["rows"] == result["rows"] and len(ran) == 3
    with pytest.raises(SystemExit, match=r"The row default in .* was made with another recipe or other settings"):
        ablation.main([*words, "--", "--learning_rate", "1e-4"])


def test_an_interrupted_row_goes_on_from_its_checkpoint(script, plan, photographs, classifier, tmp_path, monkeypatch):
    runs, studies = script("recipe_runs"), script("studies")
    recipe = script("recipe_runs").recipe_script()
    settings = common(max_steps=3, save_steps=1)
    parts = Path(recipe.__file__).parent / "imagenette-demo" / "explainer.yaml", settings, classifier, photographs

    def study(name: str) -> studies.Study:
        return studies.Study(*parts, "validation", 2, ["mean/pixel"], tmp_path / name)

    whole = study("whole").run(recipe, "row", {})
    step, taken = runs.TimedTrainer.training_step, []

    def stopping(trainer, *given):
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(trainer.step)
        return step(trainer, *given)

    monkeypatch.setattr(runs.TimedTrainer, "training_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        study("stopped").run(recipe, "row", {})
    assert study("stopped").row("row", {}) is None
    monkeypatch.setattr(
        runs.TimedTrainer, "training_step", lambda trainer, *given: taken.append(trainer.step) or step(trainer, *given)
    )
    resumed = study("stopped").run(recipe, "row", {})
    assert taken == [0, 1, 2]
    for name in ("made_with", "areas", "roughness", "images_seen", "steps"):
        assert resumed[name] == whole[name]
    assert study("stopped").row("row", {}) == resumed


def test_the_measure_is_that_of_the_metrics_image_by_image(script, photographs, classifier):
    runs = script("recipe_runs")
    explainer = AhaExplainer.from_classifier(classifier, **SIZES).eval()
    rows = runs.held_out(explainer, photographs, "validation")
    measured = runs.measure(explainer, rows, 3, ["blur/cell", "noise/pixel"], batch_size=2)
    normalization = Normalization(explainer.config.image_mean, explainer.config.image_std)
    for row in range(3):
        pixels = rows[row]["pixel_values"][None]
        with torch.no_grad():
            output = explainer(pixels)
        rgb = normalization.denormalize(pixels)
        noise = reference_image(rgb, "noise", generator=torch.Generator().manual_seed(row))
        for setting, reference, cells in (
            ("blur/cell", reference_image(rgb, "blur"), explainer.classifier.grid(32, 32)),
            ("noise/pixel", noise, None),
        ):
            curves = deletion_insertion_curves(
                lambda given: explainer.classifier(given).logits,
                pixels,
                normalization.normalize(reference),
                output.scores,
                output.target,
                fractions=[step / 10 for step in range(11)],
                cells=cells,
            )
            expected = (curves.insertion_auc - curves.deletion_auc).item()
            # The passes may be in bfloat16, where the machine is faster with it.
            assert measured.areas[setting][row] == pytest.approx(expected, abs=0.02)
        assert measured.roughness[row] == pytest.approx(total_variation(output.scores).item(), abs=0.02)
    torch.testing.assert_close(measured.mean_areas(), torch.tensor(list(measured.areas.values())).mean(0))


def test_what_a_difference_reads_as(script):
    reads_as = script("ablation").reads_as

    def line(mean, low, high):
        return {"minus": {"mean": {"mean": mean, "low": low, "high": high, "images": 9}}}

    assert reads_as({"minus": None}, 0.1) == "-"
    assert reads_as(line(0.03, -0.01, 0.05), 0.01) == "no difference seen"
    assert reads_as(line(0.03, 0.01, 0.05), 0.01) == "**better**" == reads_as(line(0.03, 0.01, 0.05), None)
    assert reads_as(line(-0.03, -0.05, -0.01), 0.04) == "worse, within what a seed does"
    assert reads_as(line(0.03, None, None), 0.01) == "-"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"groups": [{"title": "A", "rows": [{"name": "a", "why": "b", "override": {}}]}]}, "is no file of rows"),
        ({"groups": [{"title": "A", "rows": [{"name": "a", "why": "b"}] * 2}]}, "has the row a 2 times"),
        ({"groups": [{"title": "A", "rows": [{"name": "a", "why": "b", "against": "c"}]}]}, "taken against 'c'"),
    ],
)
def test_a_file_of_rows_that_makes_no_sense_is_refused(script, plan, change, told):
    plan.write_text(yaml.safe_dump({**yaml.safe_load(plan.read_text()), **change}))
    with pytest.raises(SystemExit, match=told):
        script("ablation").Plan.read(plan)


def test_rows_and_shards_are_chosen_or_refused(script):
    wanted = script("studies").wanted
    names = ["a", "b", "c", "d", "e"]
    assert wanted(names, None, "0/1") == names and wanted(names, [], "0/1") == []
    assert sorted(wanted(names, None, "0/2") + wanted(names, None, "1/2")) == names
    with pytest.raises(SystemExit, match="There is no row 'x'; the rows are a, b"):
        wanted(names, ["x"], "0/1")
    for shard in ("2/2", "1", "-1/2", "a/b"):
        with pytest.raises(SystemExit, match="--shard must be I/N with I in 0..N-1"):
            wanted(names, None, shard)


def test_another_photograph_is_the_next_one_and_noise_belongs_to_the_row(script, photographs, classifier):
    matrix = script("reference_matrix")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    table, column = load_photographs(photographs, split="validation")
    rows = Photographs(table, column, ProcessorCrop(processor))
    normalization = Normalization(processor.image_mean, processor.image_std)
    references = matrix.references_with_photographs(rows, normalization)
    rgb = torch.stack([normalization.denormalize(rows[row]["pixel_values"]) for row in range(3)])
    torch.testing.assert_close(references(matrix.OTHER, rgb, range(3)), rgb.roll(-1, 0), atol=1e-5, rtol=0)
    noise = references("noise", rgb, range(3))
    assert torch.equal(noise[2], references("noise", rgb[2:], range(2, 3))[0])
    assert not torch.equal(noise[0], noise[1])
    torch.testing.assert_close(references("blur", rgb, range(3)), reference_image(rgb, "blur"))


def test_the_matrix_compares_with_the_mixture_and_is_drawn(script, plan, photographs, classifier, tmp_path):
    matrix = script("reference_matrix")
    results, page = tmp_path / "matrix.json", tmp_path / "docs" / "references.md"
    figure = page.parent / "images" / "matrix.png"
    words = ["measure", "--dataset", photographs, "--classifier", classifier, "--rows-file", str(plan)]
    words += ["--eval-rows", "2", "--output", str(tmp_path / "study"), "--results", str(results)]
    matrix.main([*words, "--rows"])
    ask = ["report", str(results), "--output", str(page), "--figure", str(figure)]
    assert "No run has been measured yet." in matrix.main(ask) and not figure.exists()

    result = matrix.main([*words, "--rows", "noise", "mixture"])
    mixture, noise = result["rows"]
    assert (mixture["trained_on"], mixture["minus_mixture"]) == ("mixture", None)
    assert set(noise["quality"]) == {"black", "mean", "blur", "noise", "another photograph"}
    row = json.loads((tmp_path / "study" / "rows" / "noise.json").read_text())
    by_hand = np.mean([row["areas"]["black/pixel"], row["areas"]["black/cell"]])
    assert noise["quality"]["black"]["mean"] == pytest.approx(by_hand, abs=1e-6)
    for kind, entry in noise["minus_mixture"].items():
        assert entry["mean"] == pytest.approx(
            noise["quality"][kind]["mean"] - mixture["quality"][kind]["mean"], abs=1e-6
        )
    assert any(entry["mean"] != 0 for entry in noise["minus_mixture"].values())
    text = matrix.main(ask)
    assert "](images/matrix.png)" in text and "Not measured: black, mean, blur, blur and mean (the recipe)." in text
    assert text.count("\n| noise |") == 2 and str(tmp_path) not in text + results.read_text()
    with Image.open(figure) as picture:
        assert picture.width > 500
