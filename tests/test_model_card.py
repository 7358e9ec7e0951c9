"""Cards: what they say comes from the config and the result files, whatever the config and the files hold."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import hf_aha
from hf_aha import AhaConfig, AhaExplainer, AhaModelCard, AhaModelCardData, create_model_card
from hf_aha.card_files import write_card, write_training_files
from hf_aha.card_results import CardResults, MeasuredCost, MeasuredValue, Measurement, Validation
from hf_aha.model_card import Example, Licence, training_references
from hf_aha.objectives import FaithfulnessObjective
from hf_aha.result_files import _read


ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
SETTINGS = yaml.safe_load((CARDS / "cards.yaml").read_text(encoding="utf-8"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


@pytest.fixture(scope="module")
def render():
    """The script `model_cards/render.py` as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CARDS))
        yield importlib.import_module("render")


@pytest.fixture
def explainer() -> AhaExplainer:
    sizes = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8, "token_size": 16, "taps": [1, 2]}
    training = {"steps": 20, "images_seen": 1600, "train_rows": 99, "arguments": {"references": ["blur"], "seed": 7}}
    config = AhaConfig(
        **sizes,
        class_vector_size=16,
        base_model_name_or_path="google/vit-base-patch16-224",
        base_model_revision=COMMIT,
        id2label={0: "tench", 1: "church"},
        label2id={"tench": 0, "church": 1},
        training=training,
    )
    return AhaExplainer(config)


def value(method: str, mean: float, **changes: object) -> MeasuredValue:
    facts = {
        "explainer": method == "aha",
        "metric": "deletion",
        "higher_is_better": False,
        "images": 12,
        "left_out": 0,
    }
    return MeasuredValue(method=method, mean=mean, **{"low": mean - 0.01, "high": mean + 0.01, **facts, **changes})


def measurement(**changes: object) -> Measurement:
    facts = {
        "protocol": "hf_aha/pixel/blur",
        "version": 1,
        "trained_on": True,
        "classifier": "target",
        "dataset": "org/photos",
        "dataset_revision": COMMIT,
        "split": "test",
        "selection": None,
        "image_size": (32, 32),
        "seed": 0,
        "resamples": 2000,
        "confidence": 0.95,
        "versions": {"torch": "2.0"},
        "sources": ("a.json",),
        "values": (value("aha", 0.1234), value("rival", 0.4567, paired=(-0.3333, -0.4, -0.25))),
    }
    return Measurement(**{**facts, **changes})


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of cells; all rows of one have as many cells as its header."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        assert {len(row) for row in rows} == {len(rows[0])}, block
        assert set("".join(rows[1])) == {"-"}
        found.append([rows[0], *rows[2:]])
    return found


# ------------------------------------------------------------------------------------------------------- what it says


def test_metadata_are_those_of_an_adapter_of_its_pinned_target(explainer, tmp_path):
    card = create_model_card(
        explainer,
        repo_id="alice/aha-vit",
        results=CardResults((measurement(),)),
        datasets=["frgfm/imagenette", "my photographs"],
        licence=Licence("apache-2.0", inherited=True),
        tags=["mine", "saliency"],
    )
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.license) == ("hf_aha", "apache-2.0")
    assert (data.base_model, data.base_model_relation) == ("google/vit-base-patch16-224", "adapter")
    assert data.datasets == ["frgfm/imagenette"]
    assert {"explainability", "mine"} <= set(data.tags) and data.tags.count("saliency") == 1
    (result,) = data.eval_results
    assert (data.model_name, result.dataset_type, result.dataset_revision) == ("aha-vit", "org/photos", COMMIT)
    assert (result.metric_type, result.metric_value, result.metric_args["interval"]) == (
        "deletion",
        0.1234,
        [0.1134, 0.1334],
    )
    assert isinstance(AhaModelCard.load(tmp_path / "README.md").data, AhaModelCardData)
    assert f"`{COMMIT}`" in card.text and "alice/aha-vit" in card.text
    assert "that of the target model" in card.text and "my photographs" in card.text


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:-1], f"{COMMIT}\n"])
@pytest.mark.parametrize(
    "name", ["/data/secret/models/vit-tuned", "runs/vit-tuned", "C:\\data\\secret\\vit-tuned", "~/secret/vit-tuned/"]
)
def test_a_target_without_a_commit_is_local_and_named_by_its_folder_only(explainer, name, revision):
    explainer.config.base_model_name_or_path, explainer.config.base_model_revision = name, revision
    explainer.config.encoder_name_or_path = "/data/secret/encoders/dino"
    card = create_model_card(explainer, repo_id="alice/aha", datasets=["/data/secret/photos"])
    text = str(card)
    assert not {"base_model", "base_model_relation", "datasets"} & card.data.to_dict().keys()
    assert "vit-tuned, a local model" in text and "| dino, a separate" in text and "Photographs: photos" in text
    assert not re.search(r"secret|runs/|/data", text)
    assert 'classifier="FOLDER_OR_ID"' in text


def test_a_target_beside_the_card_or_in_memory_is_said_to_be_so(explainer):
    explainer.config.base_model_revision, explainer.config.includes_classifier = None, True
    text = create_model_card(explainer, repo_id="alice/aha").text
    assert "in the folder `classifier`" in text and "FOLDER_OR_ID" not in text
    explainer.config.base_model_name_or_path, explainer.config.includes_classifier = None, False
    assert "built in memory" in create_model_card(explainer, repo_id="alice/aha").text


def test_settings_and_references_come_from_the_config(explainer):
    rows = dict(tables(create_model_card(explainer, repo_id="a/b").text)[1][1:])
    assert rows == {"seed": "7", "references": "blur"}
    explainer.config.training["arguments"] |= {"output_dir": "/data/run", "hub_token": "hf_x", "save_steps": 5, "k": 1}
    assert dict(tables(create_model_card(explainer, repo_id="a/b").text)[1][1:]) == rows
    preset = list(FaithfulnessObjective.preset("paper").references)
    assert training_references(AhaConfig(training={"arguments": {"preset": "paper"}})) == preset
    assert training_references(AhaConfig()) is None


def test_what_was_not_trained_on_has_its_own_section(explainer):
    results = CardResults((measurement(trained_on=False, protocol="road"), measurement(trained_on=None)))
    text = create_model_card(explainer, repo_id="a/b", results=results).text
    assert text.index("### What it was not trained on") < text.index("#### Road") < text.index("### Measured")
    assert "No metric that training did not optimise" not in text
    text = create_model_card(explainer, repo_id="a/b", results=CardResults((measurement(),))).text
    assert "No metric that training did not optimise" in text
    assert "Not measured yet" in create_model_card(explainer, repo_id="a/b").text


def test_counts_that_differ_and_values_that_are_missing_are_shown(explainer):
    values = (value("aha", 0.5), value("slow", 0.25, images=3, low=None, high=None, left_out=9), value("aha", 0.75))
    values = (*values[:2], dataclasses.replace(values[2], metric="insertion", higher_is_better=True))
    text = create_model_card(explainer, repo_id="a/b", results=CardResults((measurement(values=values),))).text
    results = next(rows for rows in tables(text) if rows[0][0] == "method")
    assert results[0] == ["method", "deletion (lower is better)", "insertion (higher is better)", "photographs"]
    assert results[1][0] == "**this explainer**" and results[1][3] == "12"
    assert results[2] == ["slow", "0.250 (one photograph, no interval)", "-", "3"]
    assert "for them: 9 photographs" in text


# ----------------------------------------------------------------------------------------------------- hostile content

EVIL = "x`*_|</td><script>alert(1)</script>{{ 7*7 }}{% raw %}\n---\nlicense: mit\n---\n# H\n[a](https://evil.example)"


def test_hostile_texts_change_neither_metadata_nor_structure(explainer):
    def build(text: str) -> AhaModelCard:
        ours = copy.deepcopy(explainer)
        config = ours.config
        config.base_model_name_or_path, config.base_model_revision, config.base_model_type = text, None, text
        config.encoder_name_or_path, config.encoder_revision = text, text
        config.id2label = {0: text, 1: f"{text} too"}
        config.training = {
            "steps": text,
            "images_seen": text,
            "train_rows": text,
            "dataset_revision": text,
            "arguments": {"references": [text], "preset": text, "target_classes": text},
        }
        values = (value("aha", 0.1, metric=text), value(text, 0.2, metric=text, paired=(0.1, 0.0, 0.2)))
        changes = {"protocol": text, "dataset": text, "dataset_revision": text, "split": text, "selection": text}
        made = measurement(**changes, versions={text: text}, sources=(text,), values=values)
        cost = MeasuredCost(text, False, 0.5, 3, text, {text: text})
        return create_model_card(
            ours,
            repo_id=text,
            results=CardResults((made,), (cost,), Validation(3, {f"validation/{text}/deletion": 0.5}, text)),
            datasets=[text, "org/ok"],
            licence=Licence(text, name=text, link=text, inherited=True),
            tags=[text],
            examples=[Example("examples/1-a.jpg", text)],
        )

    card, plain = build(EVIL), build("plain")
    assert card.data.to_dict().keys() == plain.data.to_dict().keys()
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("other", None, ["org/ok"])
    assert yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1]) == card.data.to_dict()

    def structure(text: str) -> list[str]:
        """What begins every line, with the number of cells: headings, rows, lists, fences, pictures, text."""
        begins = re.compile(r"#+ |!\[|- |```\w*|\||")
        return [f"{begins.match(line)[0]}{line.count('|')}" for line in text.splitlines()]

    prose, plain_prose = (re.sub(r"```python.*?```", "", one.text, flags=re.DOTALL) for one in (card, plain))
    assert structure(prose) == structure(plain_prose)
    assert not re.search(r"<|\{\{|\{%|`\*_|https://evil", prose)
    # Inside code only string literals hold foreign text.
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert re.sub(r'"(?:[^"\\]|\\.)*"', '""', code) == re.sub(
        r'"(?:[^"\\]|\\.)*"', '""', re.search(r"```python\n(.*?)```", plain.text, re.DOTALL)[1]
    )


@pytest.mark.parametrize("training", [{}, {"arguments": 3}, {"steps": None}, {"steps": 3, "arguments": {"seed": {}}}])
def test_odd_summaries_of_other_versions_still_give_a_card(explainer, training):
    explainer.config.training = training
    assert "## Training" in create_model_card(explainer, repo_id="a/b", results=CardResults((measurement(),))).text


# ------------------------------------------------------------------------------------------- the cards in model_cards/


@pytest.mark.parametrize("name", SETTINGS)
def test_card_is_in_step_with_config_and_results(render, name):
    """Run `python model_cards/render.py` when this fails (model_cards/README.md)."""
    folder = CARDS / name
    explainer = AhaExplainer.from_pretrained(name, load_classifier=False)
    stored = CardResults.from_dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    measured = render.measure(name, SETTINGS[name], explainer).to_dict()
    assert_close(stored.to_dict(), measured)
    examples = render.read_examples(name)
    card = render.compose(name, SETTINGS[name], explainer, stored, examples, folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == str(card)
    assert examples and all((folder / example.file).is_file() for example in examples)
    log = SETTINGS[name]["training_log"]
    if log is not None:
        assert (folder / "training" / "log.jsonl").read_bytes() == (ROOT / log).read_bytes()
        assert (folder / "training" / "training.png").is_file()


def assert_close(stored: object, measured: object) -> None:
    if isinstance(stored, dict):
        assert stored.keys() == measured.keys()
        for key in stored:
            assert_close(stored[key], measured[key])
    elif isinstance(stored, list):
        assert len(stored) == len(measured)
        for one, other in zip(stored, measured, strict=True):
            assert_close(one, other)
    else:
        assert stored == (pytest.approx(measured, abs=3e-6) if isinstance(stored, float) else measured)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_number_of_the_result_tables_is_in_the_cited_file(name):
    folder = CARDS / name
    text = (folder / "README.md").read_text(encoding="utf-8")
    facts = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    numbers = {"3": set(), "4": set()}

    def collect(value: object) -> None:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(item)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers["3"].add(f"{value:.3f}")
            numbers["4"].add(f"{value:.4f}")

    collect(facts)
    checked = 0
    for header, *rows in tables(text):
        if header[0] in ("method", "measured"):
            for row in rows:
                for number in NUMBER.findall(" ".join(row[1:])):
                    digits = str(len(number.partition(".")[2]))
                    assert number.lstrip("+") in numbers[digits], (number, row)
                    checked += 1
    values = [v for m in facts["measurements"] for v in m["values"]]
    shown = sum(3 if v["low"] is not None else 1 for v in values) + len(facts["costs"])
    assert checked >= shown + len((facts["validation"] or {"values": ()})["values"]) > 0
    for count in re.findall(r"\(([\d,]+) photographs\)", text):
        assert int(count.replace(",", "")) in {v["images"] for v in values}
    # The model-index says the same.
    stated = {result.metric_value for result in ModelCard.load(folder / "README.md").data.eval_results or []}
    assert stated == {round(v["mean"], 4) for v in values if v["explainer"]}


@pytest.mark.parametrize("name", SETTINGS)
def test_results_were_measured_on_the_bundled_explainer(name):
    explainer = AhaExplainer.from_pretrained(name, load_classifier=False)
    weights = sum(parameter.numel() for parameter in explainer.decoder.parameters())
    for pattern in SETTINGS[name]["results"]:
        for path in sorted(ROOT.glob(pattern)):
            content = _read(path)
            if isinstance(content, list) and content[0]["explainer"] is not None:
                head = content[0]
                assert head["decoder_parameters"] == weights, path
                for fact in ("steps", "images_seen", "train_rows"):
                    assert head["training"][fact] == explainer.config.training[fact], path


@pytest.mark.parametrize("name", SETTINGS)
def test_card_in_the_repository_names_no_machine_and_has_the_sections(name):
    text = (CARDS / name / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(?:work|root|home|tmp)/", text)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == [
        *(
            "What it explains",
            "How to use",
            "Training",
            "Results",
            "Examples",
            "Cost",
            "Limits",
            "Licence",
            "Citation",
        ),
    ]
    assert "arXiv:2604.05819" in text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("https://"):
            assert (CARDS / name / link).is_file(), link


def test_the_code_of_the_card_runs(tmp_path, monkeypatch):
    text = (CARDS / "imagenette-demo" / "README.md").read_text(encoding="utf-8")
    shutil.copy(Path(hf_aha.__file__).parent / "bundled" / "photographs" / "church.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "card", "exec"), names)
    assert names["explanation"].label == "church" and names["another"].label == "tench"
    assert names["scores"].shape == names["explanation"].image.size[::-1] and (tmp_path / "overlay.png").is_file()


def test_the_pictures_of_the_card_show_the_bundled_weights(render, tmp_path):
    explainer = AhaExplainer.from_pretrained("imagenette-demo").eval()
    examples = render.draw_examples("imagenette-demo", explainer, tmp_path)
    assert examples == render.read_examples("imagenette-demo")
    for example in examples:
        stored, drawn = (
            np.asarray(Image.open(p / example.file), float) for p in (CARDS / "imagenette-demo", tmp_path)
        )
        assert stored.shape == drawn.shape and np.abs(stored - drawn).mean() < 1.0


def test_pictures_of_other_weights_are_refused(render, tmp_path):
    shutil.copytree(CARDS / "imagenette-demo", tmp_path / "imagenette-demo")
    record = tmp_path / "imagenette-demo" / "examples" / "examples.json"
    facts = json.loads(record.read_text())
    assert (
        facts["weights"]
        == hashlib.sha256(
            (ROOT / "hf_aha" / "bundled" / "imagenette-demo" / "model.safetensors").read_bytes()
        ).hexdigest()
    )
    record.write_text(json.dumps({**facts, "weights": "0" * 64}))
    with pytest.raises(SystemExit, match="--classifier imagenette-demo="):
        render.read_examples("imagenette-demo", tmp_path)


# ------------------------------------------------------------------------------------------------ a folder with a card


def test_write_card_shows_the_training_beside_it(explainer, tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 0.25, "validation/blur/cells/insertion": 0.625}]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "final"
    write_training_files(log, folder)
    card = write_card(explainer, folder, repo_id="a/b")
    assert (folder / "README.md").read_text(encoding="utf-8") == str(card)
    assert "![The training run" in card.text and "at step 10" in card.text
    assert ["insertion, patch cells, blur reference", "0.6250"] in tables(card.text)[2]
    assert json.loads((folder / "results.json").read_text())["validation"]["values"] == {
        "validation/blur/cells/insertion": 0.625
    }
    assert (folder / "training" / "log.jsonl").read_bytes() == log.read_bytes()


def test_code_files_are_mentioned_only_where_they_lie(explainer, tmp_path):
    assert "trust_remote_code" not in write_card(explainer, tmp_path, repo_id="a/b").text
    (tmp_path / "modeling_aha.py").write_text("")
    assert "trust_remote_code=True" in write_card(explainer, tmp_path, repo_id="a/b").text
    assert not (tmp_path / "results.json").exists()
