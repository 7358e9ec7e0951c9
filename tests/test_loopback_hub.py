"""The loopback Hub speaks the protocol of the real `huggingface_hub` client."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LFS_SUFFIXES, LoopbackHub, connected, environment, offline, page


BIG = bytes(range(256)) * 64


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub, connected(hub, tmp_path / "home"):
        yield hub


@pytest.fixture
def api(hub):
    """The client of an account that owns the namespace alice."""
    return HfApi(endpoint=hub.url, token=hub.add_account("alice"))


def download(hub, repo_id, path, **named):
    return Path(hf_hub_download(repo_id, path, **named)).read_bytes()


def test_a_folder_goes_up_and_comes_down(hub, api, tmp_path):
    source = tmp_path / "source"
    (source / "deep" / "deeper").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "empty.txt").write_text("")
    (source / "model.safetensors").write_bytes(BIG)
    (source / "deep" / "deeper" / "weights.bin").write_bytes(BIG[::-1])

    url = api.create_repo("alice/demo")
    assert url == f"{hub.url}/alice/demo" and url.repo_id == "alice/demo"
    info = api.upload_folder(repo_id="alice/demo", folder_path=source, commit_message="First")
    assert info.oid == hub.repository("alice/demo").resolve("main")
    assert len(hub.lfs_objects) == 2, "only the files of LFS_SUFFIXES went through LFS"
    assert ".safetensors" in LFS_SUFFIXES

    folder = Path(snapshot_download("alice/demo"))
    for path in source.rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert folder.name == info.oid


def test_unchanged_files_are_not_sent_again(hub, api):
    api.create_repo("alice/demo")
    operations = [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("b.bin", BIG)]
    first = api.create_commit("alice/demo", operations, commit_message="One")
    hub.clear_log()
    operations = [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("b.bin", BIG)]
    again = api.create_commit("alice/demo", operations, commit_message="Two")
    assert again.oid == first.oid
    assert not any(request.method == "PUT" or "/commit/" in request.path for request in hub.requests)


def test_commits_delete_and_keep(hub, api):
    api.create_repo("alice/demo")
    api.create_commit(
        "alice/demo",
        [CommitOperationAdd(path, b"x") for path in ("kept.txt", "gone.txt", "folder/one.txt")],
        commit_message="Add",
    )
    api.create_commit(
        "alice/demo",
        [CommitOperationDelete("gone.txt"), CommitOperationDelete("folder/", is_folder=True)],
        commit_message="Delete",
    )
    assert api.list_repo_files("alice/demo") == ["kept.txt"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            "alice/demo", [CommitOperationAdd("late.txt", b"x")], commit_message="Late", parent_commit="0" * 40
        )


def test_branches_tags_and_pull_requests(hub, api):
    api.create_repo("alice/demo")
    first = api.create_commit("alice/demo", [CommitOperationAdd("a.txt", b"1")], commit_message="One").oid
    api.create_tag("alice/demo", tag="v1")
    api.create_branch("alice/demo", branch="work")
    api.create_commit("alice/demo", [CommitOperationAdd("a.txt", b"2")], commit_message="Two", revision="work")
    pull = api.create_commit("alice/demo", [CommitOperationAdd("a.txt", b"3")], commit_message="Three", create_pr=True)
    assert pull.pr_revision == "refs/pr/1" and pull.pr_num == 1
    contents = {revision: download(hub, "alice/demo", "a.txt", revision=revision) for revision in (None, "v1", "work")}
    assert contents == {None: b"1", "v1": b"1", "work": b"2"}
    assert download(hub, "alice/demo", "a.txt", revision="refs/pr/1") == b"3"
    assert download(hub, "alice/demo", "a.txt", revision=first) == b"1"

    refs = api.list_repo_refs("alice/demo", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "work"]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    for taken in (
        lambda: api.create_tag("alice/demo", tag="v1"),
        lambda: api.create_branch("alice/demo", branch="work"),
    ):
        with pytest.raises(HfHubHTTPError, match="409"):
            taken()
    api.delete_tag("alice/demo", tag="v1")
    api.delete_branch("alice/demo", branch="work")
    assert set(hub.repository("alice/demo").refs) == {"refs/heads/main", "refs/pr/1"}


def test_tree_paths_and_model_info(hub, api):
    hub.commit("alice/demo", {"config.json": "{}", "deep/a.txt": "a", "deep/down/model.safetensors": BIG})
    flat = {entry.path: type(entry).__name__ for entry in api.list_repo_tree("alice/demo")}
    assert flat == {"config.json": "RepoFile", "deep": "RepoFolder"}
    inner = {entry.path for entry in api.list_repo_tree("alice/demo", "deep")}
    assert inner == {"deep/a.txt", "deep/down"}
    everything = {entry.path: entry for entry in api.list_repo_tree("alice/demo", recursive=True)}
    assert set(everything) == {"config.json", "deep", "deep/a.txt", "deep/down", "deep/down/model.safetensors"}
    assert everything["deep/down/model.safetensors"].lfs.size == len(BIG)
    assert [entry.path for entry in api.get_paths_info("alice/demo", ["deep", "config.json", "none"])] == [
        "deep",
        "config.json",
    ]
    info = api.model_info("alice/demo", files_metadata=True)
    assert info.sha == hub.repository("alice/demo").resolve("main")
    assert {sibling.rfilename: sibling.size for sibling in info.siblings}["config.json"] == 2
    assert api.file_exists("alice/demo", "deep/a.txt") and not api.file_exists("alice/demo", "deep/b.txt")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("alice/demo", "nowhere"))


def test_who_may_do_what(hub, api):
    stranger = HfApi(endpoint=hub.url, token=hub.add_account("bob"))
    reader = HfApi(endpoint=hub.url, token=hub.add_account("carol", organizations=("org",), can_write=False))
    assert api.whoami()["name"] == "alice"
    api.create_repo("alice/secret", private=True)
    api.create_commit("alice/secret", [CommitOperationAdd("a.txt", b"x")], commit_message="One")
    assert api.model_info("alice/secret").private
    with pytest.raises(RepositoryNotFoundError, match="404"):
        stranger.model_info("alice/secret")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        HfApi(endpoint=hub.url, token=False).model_info("alice/secret")
    with pytest.raises(HfHubHTTPError, match="403.*rights"):
        stranger.create_repo("alice/theirs")
    with pytest.raises(HfHubHTTPError, match="403.*rights"):
        reader.create_repo("org/theirs")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("alice/secret")
    api.create_repo("alice/secret", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token="hf_wrong").model_info("alice/secret")
    api.delete_repo("alice/secret")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/secret")


def test_a_gated_repository_is_seen_but_not_read(hub, api):
    hub.commit("org/gated", {"config.json": "{}"})
    hub.repository("org/gated").gated = True
    assert api.model_info("org/gated").gated == "auto"
    with pytest.raises(GatedRepoError, match="403"):
        download(hub, "org/gated", "config.json", token=api.token)
    with pytest.raises(GatedRepoError, match="401"):
        download(hub, "org/gated", "config.json", token=False)
    hub.repository("org/gated").granted.add("alice")
    assert download(hub, "org/gated", "config.json", token=api.token) == b"{}"


def test_the_three_kinds_of_404(hub):
    hub.commit("org/demo", {"config.json": "{}"})
    with pytest.raises(EntryNotFoundError):
        download(hub, "org/demo", "none.json")
    with pytest.raises(RevisionNotFoundError):
        download(hub, "org/demo", "config.json", revision="none")
    with pytest.raises(RepositoryNotFoundError):
        download(hub, "org/none", "config.json")


def test_a_moved_repository_redirects(hub):
    hub.commit("org/old", {"config.json": "{}", "model.safetensors": BIG})
    hub.move("org/old", "org/new")
    assert download(hub, "org/old", "model.safetensors") == BIG
    assert HfApi(endpoint=hub.url).model_info("org/old").id == "org/new"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failures_on_demand_are_got_over_by_the_client(hub, status):
    hub.commit("org/demo", {"config.json": "{}"})
    hub.fail("/resolve/main/config", status, times=3, headers={"Retry-After": "0"} if status == 429 else None)
    assert download(hub, "org/demo", "config.json") == b"{}"
    assert [request.status for request in hub.requests].count(status) == 3
    hub.fail("/resolve/main/none", status, times=99)
    with pytest.raises((HfHubHTTPError, LocalEntryNotFoundError)):
        download(hub, "org/demo", "none.json")


@pytest.mark.parametrize("after", [0, 1000])
def test_a_cut_download_is_resumed(hub, after):
    hub.commit("org/demo", {"model.safetensors": BIG})
    hub.cut("model.safetensors", after=after, times=2)
    assert download(hub, "org/demo", "model.safetensors") == BIG
    ranges = [request.headers.get("Range") for request in hub.requests if request.method == "GET"]
    # What arrived before the cut is kept by the client only in whole chunks, so the ranges are its own affair.
    assert len(ranges) == 3 and [request.status for request in hub.requests].count(None) == 2


def test_ranges(hub):
    hub.commit("org/demo", {"a.bin": BIG})

    def ask(wanted):
        request = urllib.request.Request(page(hub, "org/demo", "a.bin"), headers={"Range": wanted})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status, answer.headers["Content-Range"], answer.read()

    assert ask("bytes=10-19") == (206, f"bytes 10-19/{len(BIG)}", BIG[10:20])
    assert ask("bytes=16000-") == (206, f"bytes 16000-{len(BIG) - 1}/{len(BIG)}", BIG[16000:])
    with pytest.raises(urllib.error.HTTPError, match="416"):
        ask(f"bytes={len(BIG)}-")


def test_cards_are_validated_as_they_are_pushed(hub, api):
    api.create_repo("alice/demo")
    card = ModelCard("---\nlicense: mit\n---\n\n# Demo\n")
    card.push_to_hub("alice/demo", token=api.token)
    assert hub.repository("alice/demo").files()["README.md"].startswith(b"---\nlicense: mit")
    assert hub.validated and all("license: mit" in content for content in hub.validated)


def test_data_sets_live_in_their_own_rooms(hub, api):
    api.create_repo("alice/demo", repo_type="dataset")
    api.upload_file(path_or_fileobj=BIG, path_in_repo="train.parquet", repo_id="alice/demo", repo_type="dataset")
    assert download(hub, "alice/demo", "train.parquet", repo_type="dataset") == BIG
    assert api.dataset_info("alice/demo").id == "alice/demo"
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("alice/demo")


def test_a_path_that_leaves_the_repository_is_refused(hub, api):
    api.create_repo("alice/demo")
    with pytest.raises(ValueError, match="path_in_repo"):
        CommitOperationAdd("../up.txt", b"x")
    operation = CommitOperationAdd("up.txt", b"x")
    operation.path_in_repo = "../up.txt"
    with pytest.raises(HfHubHTTPError, match="Invalid path"):
        api.create_commit("alice/demo", [operation], commit_message="Up")


def test_the_log_knows_of_tokens_but_not_the_tokens(hub, api, caplog):
    caplog.set_level(logging.DEBUG)
    hub.commit("alice/demo", {"config.json": "{}"})
    download(hub, "alice/demo", "config.json", token=api.token)
    download(hub, "alice/demo", "config.json", token=False, force_download=True)
    told = [request.with_token for request in hub.requests]
    assert True in told and False in told
    assert api.token not in repr(hub.requests) and api.token not in caplog.text
    hub.clear_log()
    assert hub.requests == []


def test_offline_asks_nothing(hub):
    hub.commit("org/demo", {"config.json": "{}"})
    download(hub, "org/demo", "config.json")
    hub.clear_log()
    with offline():
        assert download(hub, "org/demo", "config.json") == b"{}"
        with pytest.raises(LocalEntryNotFoundError):
            download(hub, "org/demo", "other.json")
    assert hub.requests == []


def test_everything_is_put_back(tmp_path):
    names = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH")
    before = {name: getattr(constants, name) for name in names} | dict(os.environ)
    with LoopbackHub() as hub, connected(hub, tmp_path):
        assert constants.ENDPOINT == hub.url
    assert {name: getattr(constants, name) for name in names} | dict(os.environ) == before


def test_a_subprocess_is_pointed_at_it_too(tmp_path):
    with LoopbackHub() as hub:
        token = hub.add_account("alice")
        hub.commit("alice/secret", {"a.txt": "secret"})
        hub.repository("alice/secret").private = True
        script = "from huggingface_hub import hf_hub_download as d; print(open(d('alice/secret', 'a.txt')).read())"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | environment(hub, tmp_path) | {"HF_TOKEN": token},
            capture_output=True,
            text=True,
        )
        assert done.stdout == "secret\n", done.stderr
        assert token not in done.stderr
