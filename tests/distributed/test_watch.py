"""A process whose GPU answers too late ends with one line."""

from __future__ import annotations

import os
import time

import pytest
import torch

from thresher.distributed import watch


class Event:
    """Done from a moment on."""

    def __init__(self, done: float) -> None:
        self.done = done

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return time.monotonic() >= self.done


@pytest.fixture
def ended(monkeypatch):
    """Where exit codes go."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit  # of the thread

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return codes


def expect(monkeypatch, timeout_s: float, *seconds: float) -> None:
    made = iter(seconds)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(time.monotonic() + next(made)))
    looking = watch.Watch(timeout_s, "nobody answers")
    for _ in seconds:
        looking.expect()
    time.sleep(timeout_s + 4 * watch.POLL_S)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # how the fake end leaves the thread
def test_work_that_is_late_ends_the_process(monkeypatch, capsys, ended):
    expect(monkeypatch, 0.3, 0.0, 60.0)
    assert ended == [2]
    assert capsys.readouterr().err == "thresher: nobody answers\n"


def test_work_that_is_done_in_time_does_not(monkeypatch, capsys, ended):
    expect(monkeypatch, 0.3, 0.1, 0.2, 0.0)
    assert ended == []
    assert capsys.readouterr().err == ""


def test_what_a_graph_records_is_not_waited_for(monkeypatch, ended):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    watch.Watch(0.1, "nobody answers").expect()
    time.sleep(0.3)
    assert ended == []
