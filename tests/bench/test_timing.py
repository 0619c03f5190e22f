"""Quantiles, and the order in which ways are timed."""

from __future__ import annotations

import time

import pytest
import torch

from thresher.bench import timing as module
from thresher.bench.timing import WARM_UPS, Quantiles, in_turns, interleave, make_copies, num_copies
from thresher.errors import ThresherError

CPU = torch.device("cpu")


def test_quantiles():
    assert Quantiles.of([5.0]) == Quantiles(5.0, 5.0, 5.0)
    assert Quantiles.of([3.0, 1.0, 2.0, 5.0, 4.0, 0.0]) == Quantiles(1.0, 2.5, 4.0)


def test_ways_take_turns_and_each_sample_runs_every_copy():
    calls = []
    ways = {"ours": [lambda i=i: calls.append(f"ours{i}") for i in range(2)], "peer": [lambda: calls.append("peer")]}
    interleave(ways, CPU, 4, "clock")
    assert calls == ["ours0", "ours1", "peer"] * (4 + WARM_UPS)


def test_a_sample_is_the_mean_of_its_copies():
    nap = [lambda: time.sleep(0.004), lambda: None]
    taken = interleave({"ours": nap, "peer": nap[:1]}, CPU, 3, "clock")
    assert 1900 < taken["ours"].p20 <= taken["ours"].p50 <= taken["ours"].p80
    assert taken["peer"].p20 > 3900
    assert taken["ours"].p20 < taken["peer"].p20


@pytest.mark.parametrize("timing", ["graph", "events", "stopwatch"])
def test_a_timing_that_does_not_fit(timing):
    with pytest.raises(ThresherError, match="timing on cpu must be one of clock"):
        interleave({"ours": [lambda: None]}, CPU, 3, timing)


def test_no_repeats():
    with pytest.raises(ThresherError, match="repeats must be at least 1"):
        interleave({"ours": [lambda: None]}, CPU, 0, "clock")


def test_a_graph_holds_many_steps_of_decoding():
    steps = [lambda: None, lambda: None, lambda: None]
    turns = in_turns(steps)
    assert len(turns) == 18
    assert turns[:6] == steps * 2, "a copy is used again only after all others"
    assert len(in_turns(steps * 7)) == 21


def test_copies_exceed_the_cache(monkeypatch):
    class Card:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    cuda = torch.device("cuda")
    for size in (2**20, 4_325_376, 60 * 2**20, 2**30):
        copies = num_copies(size, cuda)
        assert copies * size >= 3 * Card.L2_cache_size > (copies - 1) * size
    assert num_copies(1, cuda) == 256
    assert num_copies(2**30, CPU) == 2


@pytest.mark.parametrize(("each", "made"), [(0, 256), (1, 256), (100, 101), (300, 34), (5001, 2), (50000, 2)])
def test_copies_take_a_quarter_of_the_free_memory_at_most(monkeypatch, each, made):
    """Of 50000 units, 10000 are taken: 40000 are free beside the first copy."""
    held = [10000]

    def make(copy):
        held[0] += each
        return copy

    monkeypatch.setattr(module, "free_bytes", lambda device: 50000 - held[0])
    monkeypatch.setattr(module, "held_bytes", lambda device: held[0])
    copies = make_copies(0, make, 256, torch.device("cuda"))
    assert copies == list(range(len(copies)))
    assert len(copies) == made
    held[0] = 10000
    assert make_copies(0, make, 1, torch.device("cuda")) == [0]
    assert held == [10000]


def test_on_a_cpu_nothing_is_held_back():
    assert make_copies("first", lambda copy: copy, 4, CPU) == ["first", 1, 2, 3]
