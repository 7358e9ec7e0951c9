"""A decoder that starts from another target's: which parts are copied, what they mean there, and how it is told."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

import hf_aha
from hf_aha import AhaConfig, AhaExplainer
from hf_aha.decoder_aha import AttributionDecoder
from hf_aha.transfer_aha import public_name, start_decoder


ROOT = Path(hf_aha.__file__).parents[1]
SIZES = {"grid_width": 16, "grid_depth": 2, "quarter_width": 8, "half_width": 8}
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
SHARED = ["half_stem", "quarter_stem", "quarter_block", "quarter_to_half", "half_block", "pixel_score"]


def randomised(explainer, seed=7):
    """As if trained: no weight is what initialisation makes it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in explainer.decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return explainer.eval()


@pytest.fixture
def make_explainer(make_classifier):
    def make(processor=PROCESSOR, sizes=SIZES, taps=None, init_from=None, **shape):
        model = make_classifier("vit", **shape)
        return AhaExplainer.from_classifier(
            model, image_processor=processor, taps=taps, init_from=init_from, **sizes
        ).eval()

    return make


@pytest.fixture
def source(make_explainer):
    return randomised(make_explainer())


def parts_of(explainer):
    """The decoder's weights by the names that are told, found in another way than the code does."""
    parts = {}
    for name, tensor in explainer.decoder.state_dict().items():
        words = name.split(".")
        listed = words[0] in ("taps", "grid_blocks")
        part = (
            ".".join(words[:2]) if listed else "class" if words[0] in ("class_norm", "class_modulation") else words[0]
        )
        parts.setdefault(part, {})[name] = tensor
    return parts


def assert_told_truly(explainer, source, check_values=True):
    """Copied parts are the source's, new ones are not, and every part is one of the two."""
    told, parts, theirs = explainer.config.init_from, parts_of(explainer), parts_of(source)
    assert sorted(told["copied"] + told["new"]) == sorted(parts)
    for part in told["copied"] if check_values else ():
        for name, tensor in parts[part].items():
            assert torch.equal(tensor, theirs[part][name]), name
    for part in told["new"]:
        for name, tensor in parts[part].items():
            same = theirs.get(part, {}).get(name)
            assert same is None or same.shape != tensor.shape or not torch.equal(tensor, same), name


# ---------------------------------------------------------------------------------------------------- what is copied


def test_a_decoder_that_reads_gradients_leaves_the_scores_of_one_that_does_not(make_explainer, source):
    explainer = make_explainer(sizes=SIZES | {"gradient_features": 2}, init_from=source)
    assert set(explainer.config.init_from["new"]) == {"grid_score", "pixel_score", "gradient_stem"}
    assert_told_truly(explainer, source)
    assert explainer.decoder.grid_score.weight.abs().max() == 0
    # From one that reads gradients as well, everything is taken.
    again = make_explainer(sizes={}, init_from=randomised(explainer))
    assert again.config.init_from["new"] == [] and again.config.gradient_layers == explainer.config.gradient_layers
    assert_told_truly(again, explainer)


def test_a_detail_that_the_source_lacks_begins_as_it_does_in_a_new_decoder(make_explainer, source):
    gradients = {"gradient_features": 2}
    trained = randomised(make_explainer(sizes=SIZES | gradients, init_from=source))
    explainer = make_explainer(sizes={"gradient_detail": True}, init_from=trained)
    assert explainer.config.init_from["new"] == ["gradient_detail"]
    assert explainer.decoder.gradient_detail.weight.tolist() == [1.0]


def test_another_head_and_patch_size_leave_every_shape(make_explainer, source):
    before = copy.deepcopy(source.decoder.state_dict())
    new = make_explainer(sizes={}, init_from=source, num_labels=7, patch_size=16, seed=1)
    assert new.config.init_from["new"] == []
    assert new.config.num_labels == 7 and new.config.patch_size == [16, 16]
    assert (new.config.grid_width, new.config.grid_depth) == (16, 2)
    assert_told_truly(new, source)
    assert new.config.base_model_fingerprint != source.config.base_model_fingerprint
    with torch.no_grad():
        assert new(torch.randn(1, 3, 32, 32)).scores.shape == (1, 32, 32)
        for parameter in new.decoder.parameters():
            parameter.zero_()
    # The source shares nothing with it.
    assert all(torch.equal(value, before[name]) for name, value in source.decoder.state_dict().items())


def test_the_same_classifier_goes_on_where_it_stood(make_explainer, source):
    new = make_explainer(sizes={}, init_from=source)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(new(pixels, 1).scores, source(pixels, 1).scores)


def test_tokens_of_another_width_are_read_anew(make_explainer, source):
    new = make_explainer(sizes={}, init_from=source, hidden_size=48)
    told = new.config.init_from
    assert told["new"] == ["taps.0", "taps.1", "taps.2", "taps.3", "class"]
    assert told["copied"][:3] == ["grid_blocks.0", "grid_blocks.1", "grid_score"] and set(SHARED) <= set(
        told["copied"]
    )
    assert_told_truly(new, source)


def test_a_given_size_leaves_out_the_parts_it_touches(make_explainer, source):
    new = make_explainer(sizes={"grid_width": 24}, init_from=source)
    assert new.config.grid_width == 24 and new.config.quarter_width == 8
    assert sorted(new.config.init_from["copied"]) == sorted(SHARED)
    assert_told_truly(new, source)
    deeper = make_explainer(sizes={"grid_depth": 3}, init_from=source)
    assert deeper.config.init_from["new"] == ["grid_blocks.2"]
    assert_told_truly(deeper, source)


def test_nothing_to_carry_over_is_one_sentence(make_explainer, source):
    with pytest.raises(
        ValueError, match="Nothing of the explainer in memory .grid_width 16, quarter_width 8"
    ) as raised:
        make_explainer(sizes={"grid_width": 24, "quarter_width": 12, "half_width": 12}, init_from=source)
    assert str(raised.value).endswith("leave the sizes out, which takes them from it, or leave init_from out.")
    assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match="init_from must be an explainer, or its Hub id or folder, but it is ViT"):
        make_explainer(init_from=source.classifier.model)


# ---------------------------------------------------------------------------------------------------- tapped layers


def test_taps_are_those_of_a_source_of_the_same_depth(make_explainer):
    source = randomised(make_explainer(taps=[1, 4]))
    assert make_explainer(sizes={}, init_from=source).config.taps == [1, 4]
    assert make_explainer(sizes={}, init_from=source, taps=[2, 3]).config.taps == [2, 3]
    # A quarter, half, three quarters and all of eight layers.
    assert make_explainer(sizes={}, init_from=source, num_layers=8).config.taps == [2, 4, 6, 8]


def test_more_taps_share_the_projection_nearest_in_depth(make_explainer):
    source = randomised(make_explainer(taps=[2, 4]))
    new = make_explainer(sizes={}, init_from=source, num_layers=8)
    for place, theirs in enumerate((0, 0, 1, 1)):
        ours, start = new.decoder.taps[place], source.decoder.taps[theirs]
        torch.testing.assert_close(ours.linear.weight, start.linear.weight / 2)
        torch.testing.assert_close(ours.linear.bias, start.linear.bias / 2)
        assert torch.equal(ours.norm.weight, start.norm.weight)
    # Where neighbouring layers say the same, the sum is what it was.
    tokens = [torch.randn(1, 4, 4, 32) for _ in range(2)]
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        grid = new.decoder.encode([tokens[0], tokens[0], tokens[1], tokens[1]], pixels).grid
        torch.testing.assert_close(grid, source.decoder.encode(tokens, pixels).grid, atol=1e-5, rtol=1e-5)


def test_fewer_taps_take_the_nearest_each(make_explainer):
    source = randomised(make_explainer(taps=[1, 2, 3, 4]))
    new = make_explainer(sizes={}, init_from=source, taps=[3, 4])
    for place, theirs in enumerate((2, 3)):
        assert torch.equal(new.decoder.taps[place].linear.weight, source.decoder.taps[theirs].linear.weight)


# ---------------------------------------------------------------------------------------------------- pixels


def test_the_same_colours_give_the_same_map_under_another_normalisation():
    source, new = (AttributionDecoder(6, 1, 5, **SIZES) for _ in range(2))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.3)
    old_config = AhaConfig(taps=[1], image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    new_config = AhaConfig(taps=[1], image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    assert start_decoder(new, new_config, source, old_config)["new"] == []
    rgb, tokens, vectors = torch.rand(2, 3, 64, 64), [torch.randn(2, 8, 8, 6)], torch.randn(2, 5)
    inputs = [
        (rgb - torch.tensor(config.image_mean)[:, None, None]) / torch.tensor(config.image_std)[:, None, None]
        for config in (old_config, new_config)
    ]
    with torch.no_grad():
        expected, found = source(tokens, inputs[0], vectors), new(tokens, inputs[1], vectors)
        unchanged = source(tokens, inputs[1], vectors)
    # At the border the convolution's zeros are another colour, which the norms tell the rest of the map, faintly.
    error, without = ((map_ - expected)[:, 16:48, 16:48].abs().max() for map_ in (found, unchanged))
    assert error < 0.02 * without and without > 0.05


# ---------------------------------------------------------------------------------------------------- names and files


def test_a_folder_or_a_bundled_name_will_do(make_explainer, source, tmp_path):
    source.save_pretrained(tmp_path / "trained")
    new = make_explainer(sizes={}, init_from=tmp_path / "trained", num_labels=3)
    assert new.config.init_from["explainer"] == "trained" and new.config.init_from["base_model"] is None
    assert_told_truly(new, source)
    new.save_pretrained(tmp_path / "new", include_classifier=True)
    assert str(tmp_path) not in (tmp_path / "new" / "config.json").read_text()
    again = AhaExplainer.from_pretrained(tmp_path / "new")
    assert again.config.init_from == new.config.init_from
    bundled = make_explainer(sizes={}, init_from="imagenette-demo")
    assert bundled.config.init_from["explainer"] == "imagenette-demo" and bundled.config.grid_width == 160
    assert "taps.0" in bundled.config.init_from["new"] and "half_block" in bundled.config.init_from["copied"]
    assert bundled.config.num_labels == 5
    with pytest.raises(OSError, match="nowhere"):
        make_explainer(init_from=str(tmp_path / "nowhere"))


def test_names_of_this_machine_are_cut_to_their_last_part(tmp_path):
    (tmp_path / "final").mkdir()
    assert public_name(tmp_path / "final") == public_name(str(tmp_path / "final") + "/") == "final"
    assert public_name("someone/explainer") == "someone/explainer"


# ---------------------------------------------------------------------------------------------------- recipe and study


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3)):
        folder = tmp_path / "photographs" / split
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return str(tmp_path / "photographs")


@pytest.fixture
def classifiers(tmp_path, make_classifier):
    """Two targets of different widths as folders, and an explainer of each."""
    for name, hidden_size in (("narrow", 32), ("wide", 48)):
        model = make_classifier(num_labels=3, hidden_size=hidden_size)
        model.save_pretrained(tmp_path / name)
        PROCESSOR.save_pretrained(tmp_path / name)
        explainer = AhaExplainer.from_classifier(model, image_processor=PROCESSOR, **SIZES)
        randomised(explainer).save_pretrained(tmp_path / f"{name}-explainer")
    return tmp_path


@pytest.fixture
def recipe(tmp_path):
    lines = ["per_device_batch_size: 4", 'mixed_precision: "no"', "dataloader_num_workers: 0", "grid_range: [2, 4]"]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join([*lines, "learning_rate: 1.0e-3"]) + "\n")
    return path


def test_the_recipe_starts_from_another_targets_explainer(
    accelerate_afresh, monkeypatch, recipe, classifiers, photographs, capsys
):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    train = importlib.import_module("train_explainer").main
    words = [str(recipe), "--classifier", str(classifiers / "wide"), "--dataset", photographs, "--max_steps", "1"]
    words += ["--validation_split", "", "--output_dir", str(classifiers / "run"), "--learning_rate", "1e-12"]
    explainer = train([*words, "--init_from", str(classifiers / "narrow-explainer")])
    told = explainer.config.init_from
    assert (told["explainer"], told["base_model"]) == ("narrow-explainer", None)
    assert "class" in told["new"] and "half_block" in told["copied"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("The decoder starts"))
    assert "narrow-explainer" in line and "half_block" in line and "; new taps.0, " in line
    saved = json.loads((classifiers / "run" / "final" / "config.json").read_text())
    assert saved["init_from"] == told and saved["training"]["steps"] == 1
    source = AhaExplainer.from_pretrained(classifiers / "narrow-explainer", load_classifier=False)
    for name in ("half_block.expand.weight", "grid_blocks.0.depthwise.weight"):
        torch.testing.assert_close(explainer.decoder.state_dict()[name], source.decoder.state_dict()[name])


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("transfer")


def test_the_study_runs_from_end_to_end_and_goes_on(
    accelerate_afresh, study, recipe, classifiers, photographs, capsys, monkeypatch
):
    output = classifiers / "study"
    words = ["--dataset", photographs, "--recipe", str(recipe), "--output", str(output), "--eval-rows", "2"]
    for one, other in (("narrow", "wide"), ("wide", "narrow")):
        words += ["--pair", str(classifiers / one), str(classifiers / f"{other}-explainer")]
    words += ["--settings", "mean/cell", "--arms", "scratch", "transfer"]
    words += ["--steps", "2"]
    result = study.main([*words, "--", "--image_size", "16"])
    points = {(point["target"], point["arm"], point["steps"]): point for point in result["points"]}
    assert len(points) == 2 * 2
    assert {point["images_seen"] for point in points.values()} == {8}
    assert all(point["value"]["images"] == 2 for point in points.values())
    assert all(("minus_scratch" in point) == (key[1] != "scratch") for key, point in points.items())
    text = (output / "transfer.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(result)) and str(classifiers) not in text
    assert result["parts"]["wide from narrow-explainer"]["new"][-1] == "class"
    with Image.open(output / "transfer.png") as picture:
        assert picture.width > picture.height
    rows = (output / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 4 and str(classifiers) not in "".join(rows) and not list((output / "runs").glob("*"))

    # Interrupted while the last row was written: that one alone is run again.
    (output / "rows.jsonl").write_text("\n".join([*rows[:-1], rows[-1][:50]]))
    ran, run_row = [], study.run_row
    monkeypatch.setattr(study, "run_row", lambda *given: ran.append(given[2]) or run_row(*given))
    again = study.main([*words, "--", "--image_size", "16"])
    assert [(row.target, row.arm, row.steps) for row in ran] == [("wide", "transfer", 2)]
    assert again["points"] == result["points"]
    # Without training, the start itself is measured.
    start = study.main([*words[:-1], "0", "2", "--", "--image_size", "16"])["points"]
    assert [point["images_seen"] for point in start] == [0, 0, 8, 8] * 2 and len(ran) == 5
    with pytest.raises(SystemExit, match="were made with another recipe or other settings: choose another --output."):
        study.main([*words, "--", "--image_size", "32"])


def test_the_arms_differ_in_their_weights_alone(accelerate_afresh, study, recipe, classifiers, photographs):
    script = study.recipe_script()
    words = [str(recipe), "--classifier", str(classifiers / "narrow"), "--dataset", photographs, "--output_dir", "x"]
    built = {arm: study.build(script, words, arm, str(classifiers / "narrow-explainer"))[1] for arm in study.ARMS}
    source = AhaExplainer.from_pretrained(classifiers / "narrow-explainer", load_classifier=False).decoder.state_dict()
    states = {arm: explainer.decoder.state_dict() for arm, explainer in built.items()}
    assert len({tuple(explainer.config.taps) for explainer in built.values()}) == 1
    for name, tensor in states["transfer"].items():
        assert torch.equal(tensor, source[name])
        reads = name.split(".")[0] in ("taps", "class_norm", "class_modulation")
        assert torch.equal(states["readers-new"][name], states["scratch"][name] if reads else source[name])
        assert states["scratch"][name].shape == tensor.shape


def test_shuffled_channels_compute_the_same(study, make_classifier):
    model = make_classifier("vit")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(pixels, output_hidden_states=True)
        after = study.with_shuffled_channels(model)(pixels, output_hidden_states=True)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)
    old, new = before.hidden_states[2], after.hidden_states[2]
    assert not torch.allclose(old, new, atol=0.1)
    torch.testing.assert_close(old.sort(dim=-1).values, new.sort(dim=-1).values, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="Only the channels of a ViT can be shuffled, not those of a beit."):
        study.with_shuffled_channels(make_classifier("beit"))
