"""Zeros that launches leave to one another."""

import torch

from thresher.cache.scratch import Scratch

CPU = torch.device("cpu")


def test_the_same_memory_until_more_is_needed():
    scratch = Scratch()
    first = scratch.zeros(100, CPU)
    assert first.dtype == torch.int32
    assert len(first) >= 100
    assert not first.any()
    assert scratch.zeros(50, CPU).data_ptr() == first.data_ptr()
    more = scratch.zeros(101, CPU)
    assert len(more) >= 200, "it does not grow by a step at a time"
    assert scratch.zeros(100, CPU).data_ptr() == more.data_ptr()


def test_what_it_gave_stays_for_graphs_that_hold_it():
    scratch = Scratch()
    where = scratch.zeros(10, CPU).data_ptr()
    scratch.zeros(1000, CPU)
    assert where in {held.data_ptr() for held in scratch._held[CPU]}


def test_while_a_graph_is_recorded_nothing_is_kept(monkeypatch):
    """Its memory is cleared by a replay alone, so nobody else may count on it."""
    scratch, device = Scratch(), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda words, dtype, device: zeros(words, dtype=dtype))
    assert not scratch.zeros(10, device).any()
    assert scratch._held[device] == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept = scratch.zeros(10, device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert scratch.zeros(10, device).data_ptr() == kept.data_ptr()
