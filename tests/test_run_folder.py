from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import time

import pytest
from filelock import FileLock

from hf_aha.run_folder import RunFolderError, locked_run_folder


FORK = multiprocessing.get_context("fork") if os.name == "posix" else None
pytestmark = pytest.mark.skipif(FORK is None, reason="other processes are forked")


def hold(folder, ready, child=False) -> None:
    with locked_run_folder(folder):
        if child:
            FORK.Process(target=time.sleep, args=(1.5,)).start()
        ready.set()
        time.sleep(60)


def owner(folder, **settings):
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(folder, ready), kwargs=settings)
    process.start()
    assert ready.wait(30)
    return process


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    process = owner(tmp_path / "run")
    try:
        told = rf"run is in use by another process \(pid {process.pid} on {socket.gethostname()}\); wait for it"
        with pytest.raises(RunFolderError, match=told) as raised, locked_run_folder(tmp_path / "run"):
            pass
        assert "\n" not in str(raised.value)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with locked_run_folder(tmp_path / "run"):
        assert (tmp_path / "run" / "run.pid").read_text().split()[1] == str(os.getpid())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.lock"]


def test_the_orphans_of_a_killed_run_are_waited_for(tmp_path):
    """A data loader worker of a killed run lives on for some seconds and may hold its lock."""
    process = owner(tmp_path, child=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked_run_folder(tmp_path):
        pass


def test_a_dead_owner_of_another_machine_is_no_reason_to_wait(tmp_path, monkeypatch):
    with locked_run_folder(tmp_path):
        (tmp_path / "run.pid").write_text("pid 999999999 on elsewhere\n")
        with pytest.raises(RunFolderError, match="pid 999999999 on elsewhere"), locked_run_folder(tmp_path):
            pass


def test_the_lock_ends_with_the_run_that_fails(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked_run_folder(tmp_path):
            raise ZeroDivisionError


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"file/run cannot be written \(Not a directory\); choose another"):
        with locked_run_folder(tmp_path / "file" / "run"):
            pass

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", read_only)
    with pytest.raises(RunFolderError, match=r"cannot be written \(Read-only file system\); choose another"):
        with locked_run_folder(tmp_path):
            pass
