from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_aha.stop_signals import (
    LostWorkerError,
    StopSignals,
    TrainingStopped,
    lost_workers_explained,
    outlive_stop_signals,
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_a_later_one_acts(monkeypatch, number):
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    try:
        with StopSignals() as signals:
            assert signals.received is None
            signal.raise_signal(number)
            signal.raise_signal(number)  # a launcher passes on what the terminal already sent
            assert signals.received == signal.Signals(number).name and not seen
            signals.same_within = 0.0
            signal.raise_signal(number)
            assert seen == [number]
        with StopSignals():
            pass
        signal.raise_signal(number)
        assert seen == [number, number], "the handler is given back"
    finally:
        signal.signal(number, before)


def test_a_thread_changes_no_handler():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopSignals() as signals:
            seen.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_stopping_ends_a_process_well():
    with pytest.raises(SystemExit, match="saved") as raised:
        raise TrainingStopped("checkpoint saved")
    assert raised.value.code == 0


class Rows(Dataset):
    """Row 2 kills the process that reads it, row 3 sends it SIGTERM and SIGINT."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return torch.tensor(index)


def test_a_lost_worker_is_one_sentence():
    loader = DataLoader(Rows(), sampler=[0, 2, 1], num_workers=1)
    with pytest.raises(LostWorkerError, match=r"was lost \(DataLoader worker \(pid") as raised:
        with lost_workers_explained("go on"):
            list(loader)
    assert "\n" not in str(raised.value) and str(raised.value).endswith(", then go on.")


@pytest.mark.parametrize("text", ["Caught RuntimeError in DataLoader worker process 0.", "CUDA out of memory"])
def test_other_errors_are_passed_on(text):
    with pytest.raises(RuntimeError, match=text) as raised, lost_workers_explained("go on"):
        raise RuntimeError(text)
    assert type(raised.value) is RuntimeError


def test_workers_outlive_signals_to_the_whole_group():
    loader = DataLoader(Rows(), sampler=[3, 1], num_workers=1, worker_init_fn=outlive_stop_signals)
    assert [int(row) for row in loader] == [3, 1]
