"""Explainers loaded from a Hub with the real client: revisions, arguments, offline use, and all that goes wrong."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from conftest import build_classifier
from huggingface_hub import HfApi, constants
from loopback_hub import LoopbackHub, connected, offline
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel, ViTImageProcessor, ViTModel

from hf_aha import AhaExplainer, ClassifierMismatchError, ExplainerAccessError, ExplainerFilesError
from hf_aha.encoder_aha import FrozenEncoder


SIZES = {"grid_width": 16, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)


class World:
    """A Hub with a classifier and an explainer of it, and what a user does with it."""

    def __init__(self, hub, folder):
        self.hub, self.folder = hub, folder
        self.token = hub.add_account("alice", organizations=("org",))
        self.api = HfApi(endpoint=hub.url, token=self.token)
        self.explainer = self.scores = None

    def push(self, folder, repo_id, **named):
        """Upload a folder as a user does and return the commit."""
        self.api.create_repo(repo_id, exist_ok=True)
        return self.api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns="*", **named).oid

    def push_classifier(self, repo_id="org/classifier", **shape):
        folder = self.folder / "source" / repo_id
        build_classifier("vit", **shape).save_pretrained(folder)
        PROCESSOR.save_pretrained(folder)
        return self.push(folder, repo_id)

    def save(self, explainer, **named):
        folder = self.folder / "saved"
        shutil.rmtree(folder, ignore_errors=True)
        explainer.save_pretrained(folder, **named)
        return folder

    def asked(self):
        return [str(request) for request in self.hub.requests if "/resolve/" in request.path]

    def edit_config(self, repo_id="org/explainer", **changes):
        content = json.loads(self.hub.repository(repo_id).files()["config.json"]) | changes
        return self.hub.commit(repo_id, {"config.json": json.dumps(content)})

    def new_cache(self):
        """Forget everything that was downloaded."""
        shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
        self.hub.clear_log()


def train(seed, name="org/classifier", **named):
    """An explainer whose decoder depends on the seed."""
    torch.manual_seed(seed)
    return AhaExplainer.from_classifier(name, **SIZES, **named).eval()


@pytest.fixture(scope="module")
def first_world(tmp_path_factory):
    """Trained and pushed with the real client, once; every test works on a copy."""
    folder = tmp_path_factory.mktemp("first")
    with LoopbackHub() as hub, connected(hub, folder / "home"):
        world = World(hub, folder)
        world.push_classifier()
        world.explainer = train(1)
        world.push(world.save(world.explainer), "org/explainer")
        world.scores = scores(world.explainer)
    return world


@pytest.fixture
def world(tmp_path, first_world):
    with LoopbackHub() as hub, connected(hub, tmp_path / "home"):
        hub.repositories = copy.deepcopy(first_world.hub.repositories)
        world = World(hub, tmp_path)
        world.explainer, world.scores = first_world.explainer, first_world.scores
        world.commit = hub.repository("org/explainer").resolve("main")
        world.classifier_commit = hub.repository("org/classifier").resolve("main")
        yield world


def scores(explainer):
    with torch.no_grad():
        return explainer(PIXELS.to(explainer.decoder.pixel_score.weight.device), target=2).scores


def refused(kind, message, name="org/explainer", **named):
    """Loading fails with one sentence that matches, keeps its cause, and ends in a full stop or three dots."""
    with pytest.raises(kind, match=message) as caught:
        AhaExplainer.from_pretrained(name, **named)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text.replace("... ", ""), text
    return caught.value


# ------------------------------------------------------------------------------------------------------ load by id


def test_load_by_id(world):
    loaded = AhaExplainer.from_pretrained("org/explainer")
    assert torch.equal(scores(loaded), world.scores)
    assert loaded.config.base_model_name_or_path == "org/classifier"
    assert loaded.config.base_model_revision == world.classifier_commit
    assert loaded.name_or_path == "org/explainer"
    assert loaded.image_processor.image_mean == PROCESSOR.image_mean
    # Each file is asked for once, and only what is needed.
    files = sorted(request.path for request in world.hub.requests if request.method == "GET" and request.status == 200)
    files = [path.rsplit("/", 1)[1] for path in files if "/resolve/" in path]
    assert sorted(files) == sorted(2 * ["config.json", "model.safetensors"] + ["preprocessor_config.json"])


def test_the_auto_classes_load_by_id(world):
    assert AutoConfig.from_pretrained("org/explainer").base_model_name_or_path == "org/classifier"
    loaded = AutoModel.from_pretrained("org/explainer")
    assert type(loaded) is AhaExplainer and torch.equal(scores(loaded), world.scores)
    assert AutoImageProcessor.from_pretrained("org/explainer").image_std == PROCESSOR.image_std


def test_both_revisions_are_honoured_and_neither_leaks(world):
    second_classifier = world.push_classifier(seed=1)
    second = train(2)
    assert second.config.base_model_revision == second_classifier != world.classifier_commit
    second_commit = world.push(world.save(second), "org/explainer")
    world.api.create_tag("org/explainer", tag="v1", revision=world.commit)
    # A branch that only the explainer has, and one that both have but that means other things.
    world.api.create_branch("org/explainer", branch="work", revision=world.commit)
    world.api.create_branch("org/classifier", branch="v1", revision=second_classifier)
    world.new_cache()

    expected = {None: second, "main": second, second_commit: second}
    expected |= dict.fromkeys(("v1", "work", world.commit), world.explainer)
    for revision, explainer in expected.items():
        loaded = AhaExplainer.from_pretrained("org/explainer", **({"revision": revision} if revision else {}))
        assert torch.equal(scores(loaded), scores(explainer)), revision
        assert loaded.config.base_model_revision == explainer.config.base_model_revision
    assert not any("/classifier/resolve/main" in line or "/classifier/resolve/v1" in line for line in world.asked())
    assert any(f"/classifier/resolve/{world.classifier_commit}" in line for line in world.asked())


def test_a_pull_request_is_loaded_by_its_ref(world):
    other = train(3)
    info = world.api.upload_folder(repo_id="org/explainer", folder_path=world.save(other), create_pr=True)
    loaded = AhaExplainer.from_pretrained("org/explainer", revision=info.pr_revision)
    assert torch.equal(scores(loaded), scores(other))
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)


def test_all_files_are_of_one_commit(world):
    """A push between the config and the weights must not mix two commits."""
    other = world.folder / "other"
    train(4, name="org/classifier").save_pretrained(other)
    world.new_cache()
    route = world.hub.answer

    def push_in_between(method, target, headers, body):
        answer = route(method, target, headers, body)
        if method == "GET" and target.endswith("/config.json") and "explainer" in target:
            world.hub.commit_folder("org/explainer", other)
        return answer

    world.hub.answer = push_in_between
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)


def test_the_token_reaches_both_loads(world):
    for name in ("org/explainer", "org/classifier"):
        world.hub.repository(name).private = True
    refused(ExplainerAccessError, "no folder and no Hub repository org/explainer is to be seen .* token=")
    refused(ExplainerAccessError, "no folder and no Hub repository", token=world.hub.add_account("bob"))
    world.new_cache()
    loaded = AhaExplainer.from_pretrained("org/explainer", token=world.token)
    assert torch.equal(scores(loaded), world.scores)
    assert world.asked() and all(request.with_token for request in world.hub.requests)

    # Logged in, no token needs to be given, and token=False takes it back.
    world.new_cache()
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text(world.token)
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)
    world.new_cache()
    refused(ExplainerAccessError, "no folder and no Hub repository", token=False)


def test_cache_dir_and_local_files_only_reach_both_loads(world, tmp_path):
    cache = tmp_path / "elsewhere"
    AhaExplainer.from_pretrained("org/explainer", cache_dir=cache)
    assert {path.name for path in cache.iterdir()} >= {"models--org--explainer", "models--org--classifier"}
    assert not Path(constants.HF_HUB_CACHE).exists()
    world.hub.clear_log()
    loaded = AhaExplainer.from_pretrained("org/explainer", cache_dir=cache, local_files_only=True)
    assert torch.equal(scores(loaded), world.scores)
    refused(ExplainerAccessError, "config.json is not in the cache and the network is off", local_files_only=True)
    assert world.hub.requests == []


def test_offline_reload_asks_nothing(world):
    AhaExplainer.from_pretrained("org/explainer")
    world.hub.clear_log()
    with offline():
        for revision in ("main", world.commit):
            assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer", revision=revision)), world.scores)
        assert torch.equal(scores(AutoModel.from_pretrained("org/explainer")), world.scores)
        refused(ExplainerAccessError, "not in the cache and the network is off", name="org/other")
        refused(ExplainerAccessError, "not in the cache and the network is off", revision="v1")
    assert world.hub.requests == []


def test_a_known_commit_asks_nothing_again(world):
    AhaExplainer.from_pretrained("org/explainer", revision=world.commit)
    world.hub.clear_log()
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer", revision=world.commit)), world.scores)
    assert world.asked() == []


def test_offline_without_an_image_processor(world):
    bare = AhaExplainer(world.explainer.config).attach(build_classifier("vit")).eval()
    world.push(world.save(bare), "org/bare")
    for _ in range(2):
        assert AhaExplainer.from_pretrained("org/bare").image_processor is None
    world.hub.clear_log()
    with offline():
        assert torch.equal(scores(AhaExplainer.from_pretrained("org/bare")), scores(bare))
    assert world.hub.requests == []


def test_force_download_reaches_both_loads(world):
    AhaExplainer.from_pretrained("org/explainer")
    world.hub.clear_log()
    AhaExplainer.from_pretrained("org/explainer", force_download=True)
    again = [request.path for request in world.hub.requests if request.method == "GET" and "/resolve/" in request.path]
    for name, files in {
        "org/explainer": ("config.json", "model.safetensors", "preprocessor_config.json"),
        "org/classifier": ("config.json", "model.safetensors"),
    }.items():
        for file in files:
            assert sum(path.startswith(f"/{name}/") and path.endswith(f"/{file}") for path in again) == 1, file


def test_subfolder_is_the_explainers_alone(world):
    world.push(world.save(world.explainer), "org/many", path_in_repo="explainers/first")
    loaded = AhaExplainer.from_pretrained("org/many", subfolder="explainers/first")
    assert torch.equal(scores(loaded), world.scores)
    assert not any("classifier" in line and "explainers" in line for line in world.asked())
    refused(ExplainerFilesError, "The explainer org/many is no explainer: it has no config.json", name="org/many")


@pytest.mark.parametrize("how", [AhaExplainer, AutoModel])
def test_dtype_device_map_and_attention_reach_both_loads(world, how, monkeypatch):
    load, device_maps = PreTrainedModel.from_pretrained.__func__, {}

    def watched(cls, *arguments, **named):
        device_maps[cls.__name__] = named.get("device_map")
        return load(cls, *arguments, **named)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    for dtype in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        loaded = how.from_pretrained("org/explainer", **dtype, device_map="cpu", attn_implementation="eager")
        assert loaded.decoder.pixel_score.weight.dtype == torch.bfloat16
        assert loaded.classifier.model.dtype == torch.bfloat16
        assert loaded.classifier.model.config._attn_implementation == "eager"
        assert device_maps == {"AhaExplainer": "cpu", "ViTForImageClassification": "cpu"}
        assert scores(loaded).dtype == torch.float32
    loaded = how.from_pretrained("org/explainer", attn_implementation="sdpa")
    assert loaded.classifier.model.config._attn_implementation == "sdpa"
    # A config that has been in use wishes for nothing.
    again = how.from_pretrained("org/explainer", config=loaded.config)
    assert again.classifier.model.config._attn_implementation == "sdpa"
    assert loaded.decoder.pixel_score.weight.dtype == loaded.classifier.model.dtype == torch.float32


def test_a_separate_encoder_is_pinned_and_loaded_too(world):
    backbone = ViTModel(build_classifier("vit").config)
    folder = world.folder / "backbone"
    FrozenEncoder(backbone, [0.5] * 3, [0.5] * 3, PROCESSOR).save_pretrained(folder)
    first = world.push(folder, "org/encoder")
    explainer = train(5, encoder="org/encoder")
    assert explainer.config.encoder_revision == first
    world.push(world.save(explainer), "org/with-encoder")
    other = ViTModel(build_classifier("vit", seed=1).config)
    FrozenEncoder(other, [0.5] * 3, [0.5] * 3, PROCESSOR).save_pretrained(folder)
    assert world.push(folder, "org/encoder") != first
    world.new_cache()
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/with-encoder")), scores(explainer))
    world.hub.repository("org/encoder").gated = True
    world.new_cache()
    refused(
        ExplainerAccessError,
        "The encoder org/encoder of the explainer org/with-encoder .* request access to org/encoder",
        name="org/with-encoder",
    )


def test_a_sharded_explainer(world):
    folder = world.save(world.explainer, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    world.push(folder, "org/sharded")
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/sharded")), world.scores)
    world.hub.clear_log()
    with offline():
        assert torch.equal(scores(AhaExplainer.from_pretrained("org/sharded")), world.scores)
    assert world.hub.requests == []


def test_training_pins_the_commit_it_loaded(world):
    """A push between the config and the weights of the classifier must not mix two commits, or pin the wrong one."""
    world.push_classifier("org/second", seed=1)
    second = world.hub.repository("org/second").files()
    route = world.hub.answer

    def push_in_between(method, target, headers, body):
        answer = route(method, target, headers, body)
        if method == "GET" and target.endswith("/config.json"):
            world.hub.commit("org/classifier", second)
        return answer

    world.hub.answer = push_in_between
    explainer = train(1)
    assert explainer.config.base_model_revision == world.classifier_commit
    assert torch.equal(scores(explainer), world.scores)


def test_what_training_refuses(world):
    pickled = world.hub.commit("org/classifier", {"pytorch_model.bin": b"x", "model.safetensors": None})
    for named, message in (
        ({"name": "org/none"}, "The classifier org/none could not be loaded: no folder and no Hub repository"),
        ({"revision": "none"}, "has no revision 'none'"),
        ({"revision": pickled}, "pickled weights .* never loaded; or load it yourself and give the model"),
        ({"encoder": "org/none"}, "The encoder org/none could not be loaded"),
    ):
        with pytest.raises((ExplainerAccessError, ExplainerFilesError), match=message):
            train(1, **({"revision": world.classifier_commit} | named))
    with pytest.raises(ValueError, match="holds a character that no access token has"):
        train(1, token="hf_x\n")
    world.hub.commit("org/classifier", world.hub.repository("org/classifier").commits[world.classifier_commit])
    bare = world.hub.commit("org/classifier", {"preprocessor_config.json": None})
    with pytest.raises(ValueError, match="org/classifier has no preprocessor_config.json, so give its"):
        train(1, revision=bare)
    assert train(1, revision=bare, image_processor=PROCESSOR).config.base_model_revision == bare


# ------------------------------------------------------------------------------------------- saving, other classifiers


def test_saving_asks_nothing(world, tmp_path):
    loaded = AhaExplainer.from_pretrained("org/explainer")
    world.hub.clear_log()
    loaded.save_pretrained(tmp_path / "plain")
    loaded.save_pretrained(tmp_path / "whole", include_classifier=True)
    assert world.hub.requests == []
    assert (
        json.loads((tmp_path / "plain" / "config.json").read_text())["base_model_revision"] == world.classifier_commit
    )


def test_an_air_gapped_machine(world, tmp_path):
    folder = tmp_path / "whole"
    AhaExplainer.from_pretrained("org/explainer").save_pretrained(folder, include_classifier=True)
    world.new_cache()
    with offline():
        assert torch.equal(scores(AhaExplainer.from_pretrained(folder)), world.scores)
    assert world.hub.requests == []
    commit = world.push(folder, "org/whole")
    world.hub.repositories.pop(("model", "org/classifier"))
    for revision in ("main", commit):
        assert torch.equal(scores(AhaExplainer.from_pretrained("org/whole", revision=revision)), world.scores)


def test_ones_own_classifier(world):
    own = build_classifier("vit")
    loaded = AhaExplainer.from_pretrained("org/explainer", classifier=own)
    assert loaded.classifier.model is own
    assert torch.equal(scores(loaded), world.scores)
    assert not any("org/classifier" in line for line in world.asked()), "the other one is not even asked for"
    world.push_classifier("org/fork")
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer", classifier="org/fork")), world.scores)


def test_a_classifier_that_behaves_differently(world):
    world.push_classifier("org/other", seed=1)
    for other in ("org/other", build_classifier("vit", seed=1)):
        refused(ClassifierMismatchError, "does not behave like org/classifier", classifier=other)
        with pytest.warns(UserWarning, match="does not behave like org/classifier"):
            loaded = AhaExplainer.from_pretrained("org/explainer", classifier=other, allow_classifier_mismatch=True)
        assert loaded.classifier is not None


def test_the_decoder_alone(world):
    loaded = AhaExplainer.from_pretrained("org/explainer", load_classifier=False)
    assert loaded.classifier is None
    assert not any("org/classifier" in line for line in world.asked())
    assert torch.equal(scores(loaded.attach(build_classifier("vit"))), world.scores)


@pytest.mark.parametrize(
    "name, own",
    [
        ("target", "classifier"),
        ("load_target", "load_classifier"),
        ("allow_target_mismatch", "allow_classifier_mismatch"),
    ],
)
def test_other_words_are_answered_with_ours(world, name, own):
    with pytest.raises(TypeError, match=rf"no argument '{name}'; give {own}=\.\.\. instead"):
        AhaExplainer.from_pretrained("org/explainer", **{name: False})


def test_include_target_is_not_swallowed(world, tmp_path):
    with pytest.raises(
        TypeError, match=r"save_pretrained\(\) has no argument 'include_target'; give include_classifier"
    ):
        world.explainer.save_pretrained(tmp_path / "saved", include_target=True)
    assert not (tmp_path / "saved" / "config.json").exists()


# ------------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("name", ["org/none", "none"])
def test_a_name_that_does_not_exist(world, name):
    refused(
        ExplainerAccessError, f"The explainer {name} could not be loaded: no folder and no Hub repository {name}", name
    )


@pytest.mark.parametrize(
    "name", ["https://huggingface.co/org/explainer", "a/b/c", "../org/explainer", "org/x y", "/no/where"]
)
def test_a_name_that_cannot_exist(world, name):
    refused(ExplainerAccessError, "neither a folder of this machine nor a Hub id such as 'org/name'", name)
    assert world.hub.requests == []


@pytest.mark.parametrize("revision", ["none", "0" * 40, "refs/pr/9", "../../main"])
def test_a_revision_that_does_not_exist(world, revision):
    refused(ExplainerAccessError, f"has no revision '{revision}'; see its branches", revision=revision)


def test_a_repository_that_is_no_explainer(world):
    hint = r"to explain that model, train one with AhaExplainer.from_classifier\('org/classifier'\)"
    refused(ExplainerFilesError, f"a model of type 'vit', not 'aha'; {hint}", "org/classifier")
    world.hub.commit("org/text", {"config.json": json.dumps({"model_type": "bert"})})
    refused(ExplainerFilesError, "describes a model of type 'bert', not 'aha'.$", "org/text")
    world.hub.commit("org/empty", {"README.md": "# Nothing"})
    refused(ExplainerFilesError, "The explainer org/empty is no explainer: it has no config.json", "org/empty")
    world.hub.commit("org/list", {"config.json": "[1, 2]"})
    refused(ExplainerFilesError, "damaged config.json: it holds no JSON object", "org/list")
    world.hub.commit("org/garbage", {"config.json": b"\xff\xfe{"})
    refused(ExplainerFilesError, "damaged config.json: it is no valid JSON", "org/garbage")


def test_a_missing_classifier(world):
    world.hub.repositories.pop(("model", "org/classifier"))
    refused(
        ExplainerAccessError,
        "The classifier org/classifier of the explainer org/explainer could not be loaded: no folder and no Hub "
        "repository .*; or give it with classifier=..., or load the decoder alone with load_classifier=False",
    )


def test_a_commit_of_the_classifier_that_is_gone(world):
    repository = world.hub.repository("org/classifier")
    repository.add_commit("refs/heads/main", repository.files(), "history squashed")
    del repository.commits[world.classifier_commit]
    refused(ExplainerAccessError, f"has no revision '{world.classifier_commit}'.*; or give it with classifier=")
    assert torch.equal(
        scores(AhaExplainer.from_pretrained("org/explainer", classifier="org/classifier")), world.scores
    )


def test_a_classifier_and_an_explainer_that_have_moved(world):
    world.hub.move("org/classifier", "neworg/classifier")
    world.hub.move("org/explainer", "neworg/explainer")
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)


def test_a_classifier_in_a_folder_of_another_machine(world):
    world.edit_config(base_model_name_or_path="/data/alice/vit", base_model_revision=None)
    refused(
        ExplainerAccessError,
        "The classifier /data/alice/vit of the explainer org/explainer .* neither a folder of this machine nor",
    )


def test_a_gated_classifier(world):
    world.hub.repository("org/classifier").gated = True
    page = f"{world.hub.url}/org/classifier"
    message = (
        f"The classifier org/classifier .* is gated, so request access to org/classifier at {page} and pass token="
    )
    error = refused(ExplainerAccessError, message)
    assert "GatedRepoError" in {type(cause).__name__ for cause in causes(error)}
    refused(ExplainerAccessError, message, token=world.hub.add_account("bob"))
    world.hub.repository("org/classifier").granted.add("bob")
    loaded = AhaExplainer.from_pretrained("org/explainer", token=world.hub.add_account("bob"))
    assert torch.equal(scores(loaded), world.scores)


def test_a_gated_explainer(world):
    world.hub.repository("org/explainer").gated = True
    refused(ExplainerAccessError, "The explainer org/explainer .* request access to org/explainer")


def causes(error):
    while error is not None:
        yield error
        error = error.__cause__


# ------------------------------------------------------------------------------------------------- tokens and networks


def test_a_wrong_token(world, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = "hf_" + "wrongwrong" * 4
    error = refused(ExplainerAccessError, "the Hub does not know the token; make one at", token=wrong)
    told = "".join(traceback.format_exception(error)) + caplog.text
    assert wrong not in told


@pytest.mark.parametrize("token", ["hf_abcdefgh\n", "", "hf_abc def", "hf_äöü", "hf_\x00"])
def test_a_token_that_cannot_be_one_is_refused_without_repeating_it(world, token, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ValueError, match="holds a character that no access token has") as caught:
        AhaExplainer.from_pretrained("org/explainer", token=token)
    told = "".join(traceback.format_exception(caught.value)).replace(repr(token), "")
    assert "hf_abc" not in str(caught.value) and "hf_abc" not in caplog.text and caught.value.__context__ is None
    assert world.hub.requests == [] and told


def test_the_token_is_told_to_nobody(world, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    for name in ("transformers", "huggingface_hub", "hf_aha", "httpx2"):
        caplog.set_level(logging.DEBUG, logger=name)
    loaded = AhaExplainer.from_pretrained("org/explainer", token=world.token)
    loaded.save_pretrained(tmp_path / "again", include_classifier=True)
    errors = [
        refused(ExplainerAccessError, "no revision", token=world.token, revision="none"),
        refused(ExplainerAccessError, "no folder", token=world.token, name="org/none"),
        refused(ExplainerFilesError, "no explainer", token=world.token, name="org/classifier"),
    ]
    world.hub.fail("/org/explainer/", 500, times=99)
    errors.append(refused(ExplainerAccessError, "error 500", token=world.token, force_download=True))
    told = caplog.text + "".join(capfd.readouterr())
    told += "".join("".join(traceback.format_exception(error)) for error in errors)
    assert world.token not in told
    for path in (*(tmp_path / "again").rglob("*"), *Path(constants.HF_HUB_CACHE).rglob("*")):
        assert not path.is_file() or world.token.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "status, message",
    [(403, "not allowed to read it"), (429, "too many requests"), (500, "error 500"), (503, "error 503")],
)
@pytest.mark.parametrize("part", ["explainer", "classifier"])
def test_a_hub_that_refuses(world, status, message, part):
    world.hub.fail(f"/org/{part}/resolve/", status, times=999)
    refused(ExplainerAccessError, f"The {part} org/{part} .*{message}")
    world.hub.clear_log()
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)


@pytest.mark.parametrize("status", [429, 500])
def test_a_hub_that_stumbles(world, status):
    world.hub.fail("/resolve/", status, times=3)
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize("part", ["explainer", "classifier"])
def test_cut_connections_leave_a_cache_that_a_retry_can_use(world, part, file):
    if (part, file) == ("classifier", "preprocessor_config.json"):
        pytest.skip("the explainer brings its own")
    world.hub.cut(f"/org/{part}/resolve/.*/{file}", after=50, times=999)
    refused(ExplainerAccessError, f"The {part} org/{part} .*the connection to {world.hub.url} failed; try again")
    for snapshot in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*"):
        assert snapshot.resolve().is_file(), "the snapshot holds whole files only"
        repo_id = snapshot.parts[-4].removeprefix("models--").replace("--", "/")
        assert snapshot.read_bytes() == world.hub.repository(repo_id).files(snapshot.parts[-2])[snapshot.name]
    world.hub.clear_log()
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)


def test_a_connection_cut_once_is_resumed(world):
    world.hub.cut("model.safetensors", after=1000, times=2)
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)


def test_no_hub_at_all(world, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    refused(ExplainerAccessError, "the connection to http://127.0.0.1:9 failed; try again")


def test_without_a_hub_the_cache_serves(world, monkeypatch):
    AhaExplainer.from_pretrained("org/explainer")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)


# --------------------------------------------------------------------------------------------------------- bad files


class Payload:
    """Unpickling this creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "model.pkl"])
@pytest.mark.parametrize("part", ["explainer", "classifier"])
def test_pickles_are_never_loaded(world, part, name, tmp_path):
    trap = tmp_path / "opened"
    payload = pickle.dumps(Payload(trap))
    pickle.loads(payload)
    assert trap.exists(), "the payload works"
    trap.unlink()
    commit = world.hub.commit(f"org/{part}", {name: payload, "model.safetensors": None})
    if part == "classifier":
        world.edit_config(base_model_revision=commit)
    refused(ExplainerFilesError, f"The {part} org/{part} .*has no model.safetensors.*: pickled weights")
    for named in ({"weights_only": False}, {"trust_remote_code": True}):
        with pytest.raises(ExplainerFilesError, match="pickled weights"):
            AhaExplainer.from_pretrained("org/explainer", **named)
    with pytest.raises(ValueError, match="use_safetensors=False is refused"):
        AhaExplainer.from_pretrained("org/explainer", use_safetensors=False)
    with pytest.raises(ExplainerFilesError, match="pickled weights"):
        AutoModel.from_pretrained("org/explainer", use_safetensors=None)
    assert not trap.exists()
    assert not any(name in line for line in world.asked()), "it is not even downloaded"
    assert not any("huggingface.co" in str(request) for request in world.hub.requests)


@pytest.mark.parametrize("part", ["explainer", "classifier"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "../../model.safetensors", "adapter_model.bin"])
def test_a_config_cannot_name_other_weights(world, part, name, tmp_path):
    trap = tmp_path / "opened"
    world.hub.commit(f"org/{part}", {"pytorch_model.bin": pickle.dumps(Payload(trap))})
    commit = world.edit_config(f"org/{part}", transformers_weights=name)
    if part == "explainer":
        with pytest.warns(UserWarning, match="'transformers_weights', which this version of hf_aha does not know"):
            assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)
    else:
        world.edit_config(base_model_revision=commit)
        refused(ExplainerFilesError, "names '.*' in its config.json as a file of weights, which is refused")
    assert not trap.exists()


@pytest.mark.parametrize(
    "shard",
    [
        "pytorch_model.bin",
        "../secret.safetensors",
        "x/../../secret.safetensors",
        "/secret.safetensors",
        "x\\..\\secret.safetensors",
        ".safetensors",
        None,
    ],
)
def test_an_index_cannot_name_files_elsewhere(world, shard, tmp_path):
    index = {"metadata": {}, "weight_map": {"decoder.half_stem.weight": shard}}
    world.hub.commit("org/explainer", {"model.safetensors": None, "model.safetensors.index.json": json.dumps(index)})
    refused(ExplainerFilesError, "in its model.safetensors.index.json as a file of weights, which is refused")
    # In a folder, where transformers would read it.
    folder = tmp_path / "explainer"
    folder.mkdir()
    for path, data in world.hub.repository("org/explainer").files().items():
        (folder / path).write_bytes(data)
    save_file(load_file(world.save(world.explainer) / "model.safetensors"), tmp_path / "secret.safetensors")
    refused(ExplainerFilesError, "as a file of weights, which is refused", folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": [1]}, {"weight_map": "x"}])
def test_a_damaged_index(world, index):
    world.hub.commit("org/explainer", {"model.safetensors": None, "model.safetensors.index.json": json.dumps(index)})
    refused(ExplainerFilesError, "damaged model.safetensors.index.json: it maps no weights")


def test_an_index_that_names_a_missing_shard(world):
    index = {"metadata": {}, "weight_map": {"decoder.half_stem.weight": "model-00001-of-00002.safetensors"}}
    world.hub.commit("org/explainer", {"model.safetensors": None, "model.safetensors.index.json": json.dumps(index)})
    refused(
        ExplainerFilesError, "lacks model-00001-of-00002.safetensors, which its model.safetensors.index.json names"
    )


DAMAGES = {
    "cut short": lambda data: data[: len(data) // 2],
    "cut to its header": lambda data: data[:100],
    "empty": lambda data: b"",
    "no safetensors": lambda data: b"<html>Not found</html>",
    "header of 2**63 bytes": lambda data: (2**63 - 1).to_bytes(8, "little") + data[8:],
    "changed header": lambda data: data.replace(b'"F32"', b'"F99"', 1),
    "longer than it says": lambda data: data + b"x" * 64,
    "pickle": lambda data: pickle.dumps({"decoder": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["explainer", "classifier"])
def test_damaged_safetensors(world, part, damage):
    data = world.hub.repository(f"org/{part}").files()["model.safetensors"]
    commit = world.hub.commit(f"org/{part}", {"model.safetensors": DAMAGES[damage](data)})
    if part == "classifier":
        world.edit_config(base_model_revision=commit)
    refused(ExplainerFilesError, f"The {part} org/{part} .*has a damaged model.safetensors, changed or cut short")


@pytest.mark.parametrize("damage", ["another shape", "missing", "NaN", "infinite"])
def test_tampered_weights(world, damage):
    weights = load_file(world.save(world.explainer) / "model.safetensors")
    name = "decoder.half_stem.weight"
    if damage == "another shape":
        weights[name], message = weights[name][:1], f"weights {name} of shape .* where its config asks for"
    elif damage == "missing":
        message = f"lacks 1 of its decoder's weights .{name}"
        del weights[name]
    else:
        weights[name][0, 0, 0, 0], message = (
            float(damage.replace("infinite", "inf")),
            f"{name} that are NaN or infinite",
        )
    world.hub.commit("org/explainer", {"model.safetensors": save(weights, metadata={"format": "pt"})})
    refused(ExplainerFilesError, message)


def test_weights_of_another_classifier(world):
    """Tampering with the classifier, which safetensors cannot show, is found by its behaviour."""
    files = world.hub.repository("org/classifier").files()
    world.push_classifier("org/evil", seed=1)
    evil = world.hub.repository("org/evil").files()["model.safetensors"]
    assert len(evil) == len(files["model.safetensors"])
    commit = world.hub.commit("org/classifier", {"model.safetensors": evil})
    world.edit_config(base_model_revision=commit)
    refused(ClassifierMismatchError, "does not behave like org/classifier")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grid_width": "wide"}, "'grid_width' expected int"),
        ({"taps": None}, "'taps'"),
        ({"taps": []}, "taps must name at least one layer"),
        ({"image_size": [32]}, "image_size must hold 2 values"),
        ({"id2label": [1, 2]}, "config.json"),
        ({"id2label": {"x": "y"}}, "config.json"),
        ({"dtype": "nonsense"}, "config.json"),
        ({"dtype": "load"}, "config.json"),
        ({"base_model_revision": "main"}, "must be a commit of 40 hexadecimal digits"),
        ({"base_model_revision": "../" * 20}, "must be a commit of 40 hexadecimal digits"),
        ({"base_model_name_or_path": 5}, "'base_model_name_or_path'"),
        ({"base_model_fingerprint": "x"}, "'base_model_fingerprint'"),
        ({"includes_classifier": "yes"}, "'includes_classifier'"),
        ({"grid_width": 10**9}, "grid_width must be at most"),
        ({"grid_width": 2**16}, "where its config asks for"),
        ({"grid_depth": 10**9}, "grid_depth must be at most"),
    ],
)
def test_a_config_with_wrong_values(world, changes, message):
    world.edit_config(**changes)
    refused(ExplainerFilesError, message)


@pytest.mark.parametrize("fingerprint", [[], [1.0, 2.0], [float("nan")] * 16])
def test_a_config_with_a_fingerprint_that_is_none(world, fingerprint):
    world.edit_config(base_model_fingerprint=fingerprint)
    with pytest.raises(ValueError, match="(?i)fingerprint"):
        AhaExplainer.from_pretrained("org/explainer")


def test_keys_of_a_newer_version_are_ignored_with_a_warning(world):
    world.edit_config(
        shiny=1,
        quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"},
        fusion_config={"x": 1},
        attn_implementation="evil/kernel",
        _attn_implementation="evil/kernel",
    )
    with pytest.warns(UserWarning, match="holds '_attn_implementation', 'attn_implementation', .*'shiny'") as caught:
        loaded = AhaExplainer.from_pretrained("org/explainer")
    assert sum("does not know" in str(warning.message) for warning in caught) == 1
    assert torch.equal(scores(loaded), world.scores)
    with pytest.warns(UserWarning, match="'shiny'"):
        assert torch.equal(scores(AutoModel.from_pretrained("org/explainer")), world.scores)


def test_a_file_name_that_leaves_the_folder_is_never_written(world, tmp_path):
    world.hub.commit("org/explainer", {"../../../escaped.txt": "x", "/escaped.txt": "x"})
    AhaExplainer.from_pretrained("org/explainer")
    assert not list(tmp_path.rglob("escaped.txt"))
    refused(ExplainerAccessError, "The explainer org/explainer could not be loaded", subfolder="../../..")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_code_of_a_repository_is_not_run(world, tmp_path):
    trap = tmp_path / "run"
    code = f"from pathlib import Path\nPath({str(trap)!r}).touch()\n"
    own = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoImageProcessor": "evil.Evil"}
    world.hub.commit("org/explainer", {"evil.py": code})
    processor = json.loads(world.hub.repository("org/explainer").files()["preprocessor_config.json"])
    world.hub.commit("org/explainer", {"preprocessor_config.json": json.dumps(processor | {"auto_map": own})})
    world.hub.commit("org/classifier", {"evil.py": code})
    theirs = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    commit = world.edit_config("org/classifier", auto_map=theirs)
    world.edit_config(auto_map=own, base_model_revision=commit)
    for named in ({}, {"trust_remote_code": True}):
        assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer", **named)), world.scores)
    unknown = world.edit_config("org/classifier", auto_map=theirs, model_type="evil")
    world.edit_config(base_model_revision=unknown)
    refused(ExplainerFilesError, "The classifier org/classifier .*could not be loaded from its files")
    assert not trap.exists()


def test_adapters_of_peft_are_refused(world, monkeypatch):
    monkeypatch.setattr("hf_aha.loading_aha.is_peft_available", lambda: True)
    assert torch.equal(scores(AhaExplainer.from_pretrained("org/explainer")), world.scores)
    world.hub.commit("org/explainer", {"adapter_config.json": json.dumps({"base_model_name_or_path": "org/evil"})})
    refused(ExplainerFilesError, "The explainer org/explainer holds an adapter of PEFT, which is not supported")


@pytest.mark.parametrize("content", ["{", "[]", '{"image_processor_type": "Evil"}', '{"image_processor_type": 5}'])
def test_a_damaged_image_processor(world, content):
    world.hub.commit("org/explainer", {"preprocessor_config.json": content})
    refused(ExplainerFilesError, "The explainer org/explainer")


def test_a_classifier_that_is_none(world):
    world.hub.commit("org/text", {"config.json": json.dumps({"model_type": "bert"}), "model.safetensors": b""})
    refused(ExplainerFilesError, "The classifier org/text could not be loaded from its files", classifier="org/text")
    world.hub.commit("org/empty", {"README.md": "# Nothing"})
    refused(ExplainerFilesError, "The classifier org/empty has no config.json", classifier="org/empty")
