"""Checkpoint folders are whole or absent, and what is not whole is told and passed over."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_aha import checkpoints, files
from hf_aha.checkpoints import (
    CheckpointError,
    clear_leftovers,
    find_checkpoint,
    keep_newest,
    list_checkpoints,
    verify_checkpoint,
    write_checkpoint,
)
from hf_aha.files import folder_in_one_step
from hf_aha.training_state import random_states, set_random_states


FILES = {"a.bin": b"\x00" * 5000, "state.json": b'{"step": 1}'}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(run: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(run / f"checkpoint-{step}", FILES)


# ---------------------------------------------------------------------------------------------- writing


def test_a_checkpoint_holds_its_files_and_a_manifest_of_them(tmp_path):
    write(tmp_path, 3)
    folder = tmp_path / "checkpoint-3"
    assert names(folder) == ["a.bin", "manifest.json", "state.json"] and names(tmp_path) == ["checkpoint-3"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["a.bin"]["size"] == 5000 and len(manifest["files"]["state.json"]["sha256"]) == 64
    verify_checkpoint(folder)


def test_a_folder_of_an_engine_is_moved_in_and_verified(tmp_path):
    engine = tmp_path / "partial-engine"
    (engine / "deep").mkdir(parents=True)
    (engine / "deep" / "shard.pt").write_bytes(b"shard")
    folder = write_checkpoint(tmp_path / "checkpoint-3", FILES, {"engine": engine})
    assert not engine.exists()
    verify_checkpoint(folder)
    (folder / "engine" / "deep" / "shard.pt").write_bytes(b"SHARD")
    with pytest.raises(CheckpointError, match="engine/deep/shard.pt"):
        verify_checkpoint(folder)


def test_the_name_comes_last_and_everything_is_on_the_disk_before(tmp_path, monkeypatch):
    events = []
    flush, rename = files.flush_to_disk, Path.rename

    def note_flush(path):
        flush(path)
        events.append(path.name)

    def note_rename(path, target):
        events.append(f"rename to {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(files, "flush_to_disk", note_flush)
    monkeypatch.setattr(Path, "rename", note_rename)
    write(tmp_path, 3)
    at = events.index("rename to checkpoint-3")
    assert set(events[:at]) == {"a.bin", "state.json", "manifest.json", "partial-checkpoint-3"}
    assert events[at + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("failing", ["a.bin", "state.json", "manifest.json"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failing):
    write(tmp_path, 3)
    before = (tmp_path / "checkpoint-3" / "manifest.json").read_bytes()
    for method in ("write_bytes", "write_text"):
        original = getattr(Path, method)

        def full(path, data, *args, original=original, **kwargs):
            if path.name == failing:
                original(path, data[:3], *args, **kwargs)
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(path, data, *args, **kwargs)

        monkeypatch.setattr(Path, method, full)
    for step in (3, 5):
        with pytest.raises(OSError, match="No space left"):
            write_checkpoint(tmp_path / f"checkpoint-{step}", {"a.bin": b"new", "state.json": b"new"})
    assert names(tmp_path) == ["checkpoint-3"]
    verify_checkpoint(tmp_path / "checkpoint-3")
    assert (tmp_path / "checkpoint-3" / "manifest.json").read_bytes() == before


def test_a_folder_that_cannot_get_its_name_gives_the_old_one_back(tmp_path, monkeypatch):
    with folder_in_one_step(tmp_path / "final") as folder:
        (folder / "a").write_text("old")
    rename = Path.rename

    def failing(path, target):
        if path.name == "partial-final":
            raise OSError("cannot rename")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="cannot rename"), folder_in_one_step(tmp_path / "final") as folder:
        (folder / "a").write_text("new")
    assert names(tmp_path) == ["final"] and (tmp_path / "final" / "a").read_text() == "old"


def test_a_folder_in_one_step_replaces_and_clears_what_a_killed_run_left(tmp_path):
    for leftover in ("partial-final", "partial-old-final"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "half").write_text("")
    for text in ("one", "two"):
        with folder_in_one_step(tmp_path / "final") as folder:
            (folder / "a").write_text(text)
    assert names(tmp_path) == ["final"] and names(tmp_path / "final") == ["a"]
    assert (tmp_path / "final" / "a").read_text() == "two"


# ---------------------------------------------------------------------------------------------- verifying


def damage(folder: Path, how: str) -> None:
    if how == "missing file":
        (folder / "a.bin").unlink()
    elif how == "short file":
        (folder / "a.bin").write_bytes(b"\x00" * 4999)
    elif how == "flipped bit":
        data = bytearray((folder / "a.bin").read_bytes())
        data[1234] ^= 1
        (folder / "a.bin").write_bytes(data)
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "half a manifest":
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:40])
    elif how == "strange manifest":
        (folder / "manifest.json").write_text('{"format": "hf_aha.checkpoint", "version": 1, "files": []}')
    elif how == "newer format":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))


DAMAGES = {
    "missing file": "the file a.bin of the checkpoint .*checkpoint-5 cannot be read",
    "short file": "a.bin of the checkpoint .*checkpoint-5 has 4999 bytes instead of 5000",
    "flipped bit": "a.bin of the checkpoint .*checkpoint-5 is not what was written",
    "no manifest": "checkpoint-5 has no manifest.json, so it was torn or comes from an earlier version",
    "half a manifest": "the manifest.json of the checkpoint .*checkpoint-5 is damaged",
    "strange manifest": "the manifest.json of the checkpoint .*checkpoint-5 is damaged",
    "newer format": "checkpoint-5 has format 'hf_aha.checkpoint' version 2, but this hf_aha reads",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, how):
    write(tmp_path, 3, 5)
    damage(tmp_path / "checkpoint-5", how)
    with pytest.raises(CheckpointError, match=DAMAGES[how]):
        verify_checkpoint(tmp_path / "checkpoint-5")
    with pytest.warns(UserWarning, match=f"The run goes on from checkpoint-3, .* because .*{DAMAGES[how]}"):
        assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-3"
    with pytest.raises(CheckpointError, match=f"cannot go on, because .*{DAMAGES[how]}.*'auto' takes the newest"):
        find_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path)
    damage(tmp_path / "checkpoint-3", how)
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints in .* can be used, because") as raised:
        find_checkpoint("auto", tmp_path)
    assert "checkpoint-5" in str(raised.value) and "checkpoint-3" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-5"], "nothing is removed"


def test_the_newest_is_that_of_the_highest_step(tmp_path):
    assert find_checkpoint("auto", tmp_path) is None and find_checkpoint(None, tmp_path) is None
    write(tmp_path, 900, 1000, 20)
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-1000"
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (20, 900, 1000)]


def test_checkpoints_of_another_run_are_in_the_way(tmp_path):
    write(tmp_path / "a", 3)
    write(tmp_path / "b", 3)
    assert find_checkpoint(str(tmp_path / "a" / "checkpoint-3"), tmp_path / "new") == tmp_path / "a" / "checkpoint-3"
    for wanted in (None, str(tmp_path / "a" / "checkpoint-3")):
        with pytest.raises(FileExistsError, match="holds checkpoint-3 of another run; resume it with"):
            find_checkpoint(wanted, tmp_path / "b")


# ---------------------------------------------------------------------------------------------- keeping


def test_the_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 10)
    keep_newest(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-3"]
    keep_newest(tmp_path, 5)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-3"]


def test_a_run_killed_while_it_removes_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1, 2)

    def killed(path, **_):
        (path / "a.bin").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_newest(tmp_path, 1)
    for folder in list_checkpoints(tmp_path):
        verify_checkpoint(folder)
    clear_leftovers(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2"]


def test_leftovers_go_and_later_checkpoints_step_aside(tmp_path):
    write(tmp_path, 2, 4, 6)
    leftovers = ["partial-checkpoint-8", "partial-old-final", "partial-final", "partial-engine"]
    for name in (*leftovers, "partial-results", "set-aside-checkpoint-6"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path, 4)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "partial-results", "set-aside-checkpoint-6"]
    verify_checkpoint(shutil.move(tmp_path / "set-aside-checkpoint-6", tmp_path / "checkpoint-6"))


# ---------------------------------------------------------------------------------------------- random states


def test_random_states_go_on_exactly_and_hold_no_code(tmp_path):
    cpu = torch.device("cpu")
    np.random.normal()  # leaves half a pair behind, which is part of the state
    torch.save(random_states(cpu), tmp_path / "states.pt")

    def draw():
        return [random.random(), np.random.normal(), np.random.rand(), *torch.rand(2).tolist()]

    drawn = draw()
    draw()
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True), cpu)
    assert draw() == drawn
