"""Sharing through a loopback Hub with the real client: one commit, our card, no path of this machine, no lost run."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import re
import threading
import warnings
from pathlib import Path
from threading import Event

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import build_classifier
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import LoopbackHub, connected
from PIL import Image
from transformers import PreTrainedModel, ViTImageProcessorPil

import hf_aha
from hf_aha import AhaExplainer, push_explainer
from hf_aha.card_results import CardResults, Validation
from hf_aha.data import Photographs, ProcessorCrop, RandomCrop
from hf_aha.hub import explain_hub_error, inherited_licence
from hf_aha.trainer import AhaTrainer, _hub_source
from hf_aha.training_args import AhaTrainingArguments
from hf_aha.training_uploads import TrainingUploads, _snapshot


SIZES = {"grid_width": 8, "grid_depth": 1, "quarter_width": 8, "half_width": 8}
HALF = (0.5, 0.5, 0.5)
PROCESSOR = {"size": {"height": 32, "width": 32}}
CARD = "---\nlicense: cc-by-4.0\n---\n# A target\n"


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub, connected(hub, tmp_path / "home"):
        yield hub


@pytest.fixture
def token(hub) -> str:
    return hub.add_account("alice")


@pytest.fixture
def target(tmp_path) -> Path:
    """A classifier's folder."""
    folder = tmp_path / "secret" / "tiny-vit"
    build_classifier("vit").save_pretrained(folder)
    ViTImageProcessorPil(**PROCESSOR).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def explainer(hub, target) -> AhaExplainer:
    """An explainer of a classifier of the Hub."""
    hub.commit_folder("google/tiny-vit", target)
    return AhaExplainer.from_classifier("google/tiny-vit", **SIZES).eval()


def commits(hub, repo_id: str) -> list[str]:
    """Titles of the commits of a repository after its first, empty one."""
    return list(hub.repositories["model", repo_id].titles.values())[1:]


def sent(hub, pattern: str) -> list[str]:
    return [str(request) for request in hub.requests if re.search(pattern, request.path)]


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


# ----------------------------------------------------------------------------------------------------------- pushing


def test_push_to_hub_has_the_signature_of_transformers():
    ours = inspect.signature(AhaExplainer.push_to_hub).parameters
    theirs = inspect.signature(inspect.unwrap(PreTrainedModel.push_to_hub)).parameters
    assert {name: (p.kind, p.default) for name, p in ours.items()} == {
        name: (p.kind, p.default) for name, p in theirs.items()
    }


def test_everything_goes_up_in_one_commit_and_comes_back_by_id(hub, token, explainer, tmp_path):
    hub.clear_log()
    commit = explainer.push_to_hub("aha-tiny", token=token, tags=["mine"], commit_message="First", private=True)
    repository = hub.repositories["model", "alice/aha-tiny"]
    assert commits(hub, "alice/aha-tiny") == ["First"] and len(sent(hub, "/commit/")) == 1
    assert commit.oid == repository.resolve("main") and commit.oid in commit.commit_url and commit.pr_url is None
    assert repository.private
    files = repository.files()
    examples = {name for name in files if name.startswith("examples/")}
    others = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    code = {name for name in files if name.endswith(".py")}
    assert files.keys() - examples - code - {".gitattributes"} == others and len(examples) == 3
    assert code == {path.name for path in Path(hf_aha.__file__).parent.glob("*_aha.py")}
    assert all(name in files["README.md"].decode() for name in examples)
    assert hub.validated[-1] == files["README.md"].decode()
    card = ModelCard(files["README.md"].decode())
    revision = hub.repositories["model", "google/tiny-vit"].resolve("main")
    assert (card.data.base_model, card.data.base_model_relation) == ("google/tiny-vit", "adapter")
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "hf_aha")
    assert "mine" in card.data.tags and f"`{revision}`" in card.text
    assert 'from_pretrained("alice/aha-tiny")' in card.text
    loaded = AhaExplainer.from_pretrained("alice/aha-tiny", token=token, cache_dir=tmp_path / "fresh").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(pixels()).scores, explainer(pixels()).scores, atol=1e-5)
    assert token not in str(files)


def test_a_pull_request_leaves_main_alone(hub, token, explainer, quick):
    explainer.push_to_hub("alice/aha-tiny", token=token)
    main = hub.repositories["model", "alice/aha-tiny"].resolve("main")
    with torch.no_grad():
        next(explainer.decoder.parameters()).add_(1.0)
    commit = explainer.push_to_hub("alice/aha-tiny", token=token, create_pr=True, commit_description="Why")
    assert commit.pr_num == 1 and commit.pr_revision == "refs/pr/1"
    assert hub.repositories["model", "alice/aha-tiny"].resolve("main") == main
    proposed = AhaExplainer.from_pretrained("alice/aha-tiny", revision="refs/pr/1", token=token)
    for name, parameter in explainer.decoder.state_dict().items():
        assert torch.equal(parameter, proposed.decoder.state_dict()[name]), name


def test_a_branch_is_made(hub, token, explainer, quick):
    explainer.push_to_hub("alice/aha-tiny", token=token, revision="next")
    repository = hub.repositories["model", "alice/aha-tiny"]
    assert "model.safetensors" in repository.files("next") and "model.safetensors" not in repository.files("main")


def test_weights_and_pictures_of_an_earlier_push_go_with_the_same_commit(hub, token, explainer):
    explainer.push_to_hub("alice/aha-tiny", token=token, max_shard_size="10KB")
    shards = {name for name in hub.repositories["model", "alice/aha-tiny"].files() if "safetensors" in name}
    assert len(shards) > 2 and "model.safetensors.index.json" in shards
    hub.commit("alice/aha-tiny", {"examples/old.jpg": b"old", "notes.md": b"mine"})
    push_explainer(explainer, "alice/aha-tiny", token=token, photographs=[])
    files = hub.repositories["model", "alice/aha-tiny"].files()
    assert {name for name in files if "safetensors" in name} == {"model.safetensors"}
    assert not [name for name in files if name.startswith("examples/")] and files["notes.md"] == b"mine"
    assert len(commits(hub, "alice/aha-tiny")) == 3
    AhaExplainer.from_pretrained("alice/aha-tiny", token=token)


def test_no_folder_of_this_machine_goes_up(hub, token, target, tmp_path, quick):
    explainer = AhaExplainer.from_classifier(target, **SIZES)
    push_explainer(explainer, "alice/aha-local", token=token, datasets=[str(tmp_path / "photos")])
    files = hub.repositories["model", "alice/aha-local"].files()
    for name in ("config.json", "README.md", "preprocessor_config.json"):
        assert str(tmp_path) not in files[name].decode() and "secret" not in files[name].decode(), name
    assert json.loads(files["config.json"])["base_model_name_or_path"] == "tiny-vit"
    assert ModelCard(files["README.md"].decode()).data.license == "cc-by-4.0"
    assert explainer.config.base_model_name_or_path == str(target), "the explainer itself was changed"


def test_a_classifier_saved_with_its_explainer_goes_up_with_it(hub, token, target, tmp_path, quick):
    AhaExplainer.from_classifier(target, **SIZES).save_pretrained(tmp_path / "whole", include_classifier=True)
    explainer = AhaExplainer.from_pretrained(tmp_path / "whole")
    explainer.push_to_hub("alice/aha-whole", token=token)
    assert "classifier/model.safetensors" in hub.repositories["model", "alice/aha-whole"].files()
    assert "in the folder `classifier`" in hub.repositories["model", "alice/aha-whole"].files()["README.md"].decode()
    AhaExplainer.from_pretrained("alice/aha-whole", token=token).explain(Image.new("RGB", (40, 30)))


def test_results_and_photographs_can_be_given(hub, token, explainer, tmp_path):
    results = CardResults(validation=Validation(10, {"validation/blur/deletion": 0.125}, "log.jsonl"))
    push_explainer(
        explainer,
        "alice/aha-tiny",
        token=token,
        results=results,
        licence="mit",
        datasets=["org/photos"],
        photographs=[Image.new("RGB", (40, 30), "red")],
    )
    files = hub.repositories["model", "alice/aha-tiny"].files()
    assert json.loads(files["results.json"]) == results.to_dict()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.datasets) == ("mit", ["org/photos"]) and "0.1250" in card.text
    assert {name for name in files if name.startswith("examples/")} == {"examples/1.jpg"}


def test_save_pretrained_pushes_what_it_wrote_with_our_card(hub, token, explainer, tmp_path, quick):
    folder = tmp_path / "aha-saved"
    folder.mkdir()
    (folder / "private.txt").write_text("not for the Hub")
    explainer.save_pretrained(folder, push_to_hub=True, token=token, private=True, commit_message="Saved", tags="mine")
    repository = hub.repositories["model", "alice/aha-saved"]
    assert repository.private and commits(hub, "alice/aha-saved") == ["Saved"]
    files = repository.files()
    assert "private.txt" not in files and {"model.safetensors", "README.md", "config.json"} <= files.keys()
    assert files["README.md"] == (folder / "README.md").read_bytes()
    assert "mine" in ModelCard(files["README.md"].decode()).data.tags
    hub.clear_log()
    explainer.save_pretrained(folder)
    explainer.save_pretrained(folder, is_main_process=False, push_to_hub=True)
    assert not hub.requests
    explainer.save_pretrained(folder, True, None, True, repo_id="alice/by-place", token=token)
    assert "# by-place" in repository_text(hub, "alice/by-place")


def repository_text(hub, repo_id: str) -> str:
    return hub.repositories["model", repo_id].files()["README.md"].decode()


def test_as_custom_code_it_asks_for_the_package(explainer, monkeypatch):
    real = importlib.import_module

    def absent(name, *args):
        if name.startswith("hf_aha"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr("hf_aha.modeling_aha.importlib.import_module", absent)
    with pytest.raises(ImportError, match=r"push_to_hub\(\) needs the hf_aha package"):
        explainer.push_to_hub("alice/aha-tiny")


def test_the_licence_is_looked_for_and_may_be_absent(hub, token, explainer, tmp_path):
    assert inherited_licence(explainer).identifier == "cc-by-4.0"
    hub.clear_log()
    explainer.config.base_model_revision = "f" * 40
    with pytest.warns(UserWarning, match="google/tiny-vit could not be read, so this card names no licence"):
        assert inherited_licence(explainer) is None
    hub.clear_log()
    assert inherited_licence(explainer, local_files_only=True) is None and not hub.requests
    explainer.config.base_model_name_or_path = str(tmp_path / "absent")
    assert inherited_licence(explainer) is None


# ---------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("status", "named"),
    [(401, "hf auth login"), (403, "may not write"), (404, "is not there"), (500, "try again later")],
)
@pytest.mark.parametrize("place", ["/api/repos/create", "/commit/"])
def test_a_refusal_becomes_one_sentence_without_the_token(hub, token, explainer, quick, status, named, place):
    hub.fail(place, status, times=50)
    with pytest.raises(HfHubHTTPError) as error:
        explainer.push_to_hub("alice/aha-tiny", token=token)
    sentence = explain_hub_error(error.value, "alice/aha-tiny", token)
    assert named in sentence and "\n" not in sentence and token not in sentence
    assert len(sentence.rstrip(".").split(". ")) == 1


def test_tokens_are_taken_out_of_any_message():
    error = RuntimeError("Bearer hf_abcdefghijklmnop and my-own-token")
    assert explain_hub_error(error, "a/b", "my-own-token").endswith("Bearer <token> and <token>")


# ---------------------------------------------------------------------------------------------------- while training


@pytest.fixture
def train(hub, explainer, tmp_path):
    """`train(**settings)`: a tiny run with uploads to the loopback Hub; returns its folder and its warnings."""
    AcceleratorState._reset_state(reset_partial_state=True)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)) for _ in range(8)]
    rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
    rows = rows.cast_column("image", datasets.Image(decode=False))
    run = tmp_path / "run"

    def train(**changes: object) -> tuple[Path, list[str]]:
        settings = {
            "max_steps": 4,
            "per_device_batch_size": 4,
            "mixed_precision": "no",
            "dataloader_num_workers": 0,
            "log_steps": 2,
            "eval_steps": 4,
            "eval_images": 2,
            "save_steps": 2,
            "grid_range": [2, 4],
            "push_to_hub": True,
            "hub_model_id": "alice/aha-run",
        }
        args = AhaTrainingArguments(str(run), **{**settings, **changes})
        validation = Photographs(rows, "image", ProcessorCrop(explainer.image_processor))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            photographs = Photographs(rows, "image", RandomCrop((32, 32), HALF, HALF))
            AhaTrainer(explainer, args, photographs, validation).train()
        return run, [str(warning.message) for warning in caught if "alice/aha-run" in str(warning.message)]

    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def quick(monkeypatch):
    """Pictures take most of the time of a tiny run: a small plot, and none of photographs."""
    monkeypatch.setattr("hf_aha.card_files.plot_training", lambda log, path: Image.new("RGB", (200, 9)).save(path))
    monkeypatch.setattr("hf_aha.hub.BUNDLED_PHOTOGRAPHS", ())


def assert_trained(run: Path) -> None:
    """The trained explainer is whole, on its own."""
    explainer = AhaExplainer.from_pretrained(run / "final", load_classifier=False, local_files_only=True)
    assert explainer.config.training["steps"] == 4
    assert (run / "final" / "README.md").is_file() and (run / "training.png").is_file()


def test_the_end_of_a_training_goes_up_with_card_log_and_plot(hub, token, train):
    run, complaints = train(hub_token=token, hub_private_repo=True)
    assert_trained(run)
    assert not complaints and commits(hub, "alice/aha-run") == ["End of training"]
    repository = hub.repositories["model", "alice/aha-run"]
    files = repository.files()
    assert repository.private and {"training/log.jsonl", "training/training.png", "results.json"} <= files.keys()
    assert files["training/log.jsonl"] == (run / "log.jsonl").read_bytes()
    assert "| max_steps | 4 |" in repository_text(hub, "alice/aha-run")
    assert "(training/training.png)" in repository_text(hub, "alice/aha-run")
    for path in run.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path
    assert token not in str(AhaTrainingArguments("run", hub_token=token))
    assert "hub_token" not in yaml.safe_load((run / "config.yaml").read_text())


def test_every_checkpoint_goes_up_and_its_weights_are_those_of_that_step(hub, token, train, quick):
    run, complaints = train(hub_token=token, hub_strategy="every_save")
    assert_trained(run)
    assert not complaints
    assert commits(hub, "alice/aha-run") == ["Training in progress, step 2", "End of training"]
    shas = list(hub.repositories["model", "alice/aha-run"].commits)
    first, last = (AhaExplainer.from_pretrained("alice/aha-run", revision=sha, token=token) for sha in shas[1:])
    assert (first.config.training["steps"], last.config.training["steps"]) == (2, 4)
    final = AhaExplainer.from_pretrained(run / "final", load_classifier=False)
    for name, parameter in final.decoder.state_dict().items():
        assert torch.equal(parameter, last.decoder.state_dict()[name])
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), last.parameters(), strict=True))
    log = hub.repositories["model", "alice/aha-run"].commits[shas[1]]["training/log.jsonl"].decode()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [2]


def test_a_snapshot_draws_no_random_numbers_of_the_run(explainer):
    state = torch.get_rng_state()
    snapshot = _snapshot(explainer, explainer.decoder, {"steps": 1})
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot.config.training == {"steps": 1} and explainer.config.training is None
    assert all(
        torch.equal(p, q) and p.data_ptr() != q.data_ptr()
        for p, q in zip(snapshot.decoder.parameters(), explainer.decoder.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("place", "status"), [("/api/repos/create", 401), ("/commit/", 401), ("/commit/", 403), ("/commit/", 500)]
)
def test_a_refusing_hub_never_loses_the_training(hub, token, train, quick, status, place):
    hub.fail(place, status, times=1000)
    run, complaints = train(hub_token=token, hub_strategy="every_save")
    assert_trained(run)
    assert complaints and not any(token in text for text in complaints)
    assert "hf-aha push" in complaints[-1]
    if place == "/api/repos/create":
        assert "the training goes on" in complaints[0]


def test_a_hub_that_is_gone_never_loses_the_training(hub, token, train, quick):
    hub.cut(".*", times=1000, method="POST")
    run, complaints = train(hub_token=token)
    assert_trained(run)
    assert len(complaints) == 2


def test_a_disk_too_full_for_an_upload_never_loses_the_training(hub, token, train, quick, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_aha.training_uploads.shutil.copy", full)
    run, complaints = train(hub_token=token, hub_strategy="every_save")
    assert_trained(run)
    assert len(complaints) == 1 and "No space left on device (the training goes on)" in complaints[0]
    assert commits(hub, "alice/aha-run") == ["End of training"]


def test_an_upload_on_its_way_does_not_hold_up_a_run_that_ends(hub, token, explainer, tmp_path):
    reached, go_on = Event(), Event()
    uploads = TrainingUploads(AhaTrainingArguments(str(tmp_path / "run"), hub_token=token, hub_strategy="every_save"))

    def stuck(*_):
        reached.set()
        go_on.wait(60)

    uploads._push = stuck
    (tmp_path / "log.jsonl").write_text("")
    uploads.checkpoint(explainer, explainer.decoder, {"steps": 1}, tmp_path / "log.jsonl")
    assert reached.wait(30)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "upload")
    assert thread.daemon, "Python does not wait for it at its end"
    go_on.set()
    thread.join()


def test_a_later_push_finds_the_log_of_the_run(hub, token, train, quick):
    run, _ = train(push_to_hub=False)
    AhaExplainer.from_pretrained(run / "final").push_to_hub("alice/later", token=token)
    files = hub.repositories["model", "alice/later"].files()
    assert files["training/log.jsonl"] == (run / "log.jsonl").read_bytes()
    assert "training/training.png" in files


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hub_strategy": "always"}, "'always'"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "'a/b/c'"),
        ({"push_to_hub": True, "hub_model_id": "-bad-"}, "'-bad-'"),
    ],
)
def test_wrong_settings_are_refused_before_the_training(settings, named):
    with pytest.raises(ValueError, match=named):
        AhaTrainingArguments("run", **settings)


def test_the_repository_is_named_after_the_run_unless_told():
    assert AhaTrainingArguments("runs/mine", push_to_hub=True).repository_name() == "mine"
    assert AhaTrainingArguments("runs/mine", hub_model_id="a/b").repository_name() == "a/b"


def test_only_datasets_of_the_hub_are_recorded():
    rows = datasets.Dataset.from_dict({"a": [1]})
    assert _hub_source(rows) == {}
    rows.info.download_checksums = {"/data/secret/train.parquet": {}}
    assert _hub_source(rows) == {}
    sha = "0123456789abcdef0123456789abcdef01234567"
    rows.info.download_checksums = {f"hf://datasets/frgfm/imagenette@{sha}/160px/train.parquet": {}}
    assert _hub_source(rows) == {"dataset": "frgfm/imagenette", "dataset_revision": sha}
