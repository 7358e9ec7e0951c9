from __future__ import annotations

import os
import stat
import threading

import pytest

from hf_aha.files import write_atomically


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_creates_and_replaces(tmp_path):
    path = tmp_path / "deep" / "er" / "scores.json"
    assert write_atomically(path, lambda file: file.write_text("one")) == path
    write_atomically(str(path), lambda file: file.write_text("two"))
    assert path.read_text() == "two"
    assert names(path.parent) == ["scores.json"]


def test_old_file_stays_in_place_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("old")
    seen = []

    def write(file):
        file.write_text("half")
        seen.append((path.read_text(), file.parent, file.suffix, file.exists()))
        file.write_text("whole")

    write_atomically(path, write)
    assert seen == [("old", tmp_path, ".json", True)]
    assert path.read_text() == "whole"


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
def test_failure_leaves_everything_as_it_was(tmp_path, error, exists):
    path = tmp_path / "scores.json"
    if exists:
        path.write_text("old")

    def write(file):
        file.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert names(tmp_path) == (["scores.json"] if exists else [])
    assert not exists or path.read_text() == "old"


def test_failed_replacement_cleans_up(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "a.txt", lambda file: file.write_text("x"))
    assert names(tmp_path) == []


def test_data_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(stat.S_ISDIR(os.fstat(fd).st_mode)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "a.txt", lambda file: file.write_text("x"))
    assert calls[:2] == [False, "replace"]
    assert calls[2:] in ([True], [])  # the folder, where the system lets it be flushed


def test_writer_that_renames_its_file(tmp_path):
    """Some libraries write beside the given name and move the result onto it."""

    def write(file):
        other = file.with_suffix(".tmp")
        other.write_text("moved")
        other.replace(file)

    write_atomically(tmp_path / "a.txt", write)
    assert (tmp_path / "a.txt").read_text() == "moved"


def test_writer_that_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.txt was not written"):
        write_atomically(tmp_path / "a.txt", lambda file: file.unlink())
    assert names(tmp_path) == []


def test_folder_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_atomically(tmp_path, lambda file: file.write_text("x"))
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="permission bits and links are those of POSIX")
def test_permissions_and_links(tmp_path):
    new = write_atomically(tmp_path / "new.txt", lambda file: file.write_text("x"))
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    assert new.stat().st_mode == plain.stat().st_mode

    plain.chmod(0o640)
    link = tmp_path / "link.txt"
    link.symlink_to(plain)
    write_atomically(link, lambda file: file.write_text("through the link"))
    assert link.is_symlink()
    assert plain.read_text() == "through the link"
    assert stat.S_IMODE(plain.stat().st_mode) == 0o640


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    contents = [str(i) * 50_000 for i in range(8)]
    threads = [
        threading.Thread(target=write_atomically, args=(path, lambda file, text=text: file.write_text(text)))
        for text in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in contents
    assert names(tmp_path) == ["a.txt"]
