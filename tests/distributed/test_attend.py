"""Who sends a step's queries where ranks read one another's memory: the selection, where it can, or else a launch of its own, once."""

from __future__ import annotations

import pytest
import torch

from thresher.cache.scratch import Scratch
from thresher.distributed import attend
from thresher.ops.score_select import cuda as step
from thresher.ops.score_select import triton as kernels
from thresher.ops.send import Send
from thresher.types import IndexKeys, Selection

Q = torch.zeros(2, 4, 576)
KEYS = IndexKeys(torch.zeros(2, 64, 1, 132, dtype=torch.uint8), torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([64, 3]))


class Sends:
    """``ops.send.Send``, as far as it is asked for here."""

    def __init__(self) -> None:
        self.launched = 0

    def launch(self) -> None:
        self.launched += 1


class Received:
    """``symmetric.Received``, without ``sent``: ones if it waits, zeros if it is told that another has."""

    def __call__(self) -> torch.Tensor:
        return torch.ones(2, 8, 576)

    def heads(self) -> torch.Tensor:
        return torch.zeros(2, 8, 576)


class Memory:
    """Symmetric memory of two ranks; ``send`` None stands for queries that are there already."""

    rank, ranks = 0, 2

    def __init__(self, send: Sends | None) -> None:
        self.send = send

    def sending(self, x, shares):
        assert x is Q
        assert shares == [4, 4]
        return self.send, Received()


@pytest.fixture
def stored(monkeypatch):
    """What ``store_step`` was called with."""
    calls = []
    monkeypatch.setattr(attend, "store_step", lambda *given, **options: calls.append((given, options)) or ("q", "weights"))
    return calls


def put_on_their_way(ranks, scratch):
    made, coming = attend.store_and_send(ranks, Q, [4, 4], KEYS, scratch, 1, 2, factor=3)
    assert made == ("q", "weights")
    return coming


def slots(coming, found=None):
    indices, requests = torch.tensor([[5, 2], [1, -1]], dtype=torch.int32), torch.tensor([0, 1])
    return attend.slots_and_heads(coming, Selection(indices, torch.tensor([2, 1]), slots=found), KEYS.page_table, requests, 64)


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("found", [None, torch.tensor([[7, 6], [8, -1]], dtype=torch.int32)])
def test_a_selection_that_can_is_to_send(taken, found, stored, monkeypatch):
    """Of a selector that does not, the queries are sent before anybody waits for them. Slots that are known are not looked up."""
    send, scratch = Sends(), Scratch()
    monkeypatch.setattr(attend, "_selection_sends", lambda *given: given == (send, Q, KEYS))
    coming = put_on_their_way(Memory(send), scratch)
    assert stored == [((1, 2), {"factor": 3})]
    assert (scratch.errand, send.launched) == (send, 0)
    if taken:
        assert scratch.take_errand() is send
    there, q = slots(coming, found)
    assert (scratch.errand, send.launched) == (None, 0 if taken else 1)
    assert there is found or there.tolist() == [[5, 2], [65, -1]]
    assert q.shape == (2, 8, 576)
    assert bool(q.any()) == (not taken), "who waited for them"


def test_else_they_are_sent_at_once(stored):
    send, scratch = Sends(), Scratch()
    slots(put_on_their_way(Memory(send), scratch))
    assert (scratch.errand, send.launched) == (None, 1)
    slots(put_on_their_way(Memory(None), scratch))
    assert (scratch.errand, send.launched) == (None, 1)


def test_queries_that_have_come():
    assert slots(attend.Coming.there(Q))[1] is Q


def test_which_selections_send(monkeypatch):
    """Those that "auto" takes step.cu for, where it has blocks for all programs that send."""
    turns = torch.zeros(9, dtype=torch.int32)
    send = Send(torch.zeros(2 * 4 * 144, dtype=torch.int64), 4 * 144, torch.tensor([1, 2]), 0, turns, 0, 0, 0)
    assert not attend._selection_sends(send, Q, KEYS), "on a CPU"
    monkeypatch.setattr(attend, "reason", lambda *given: None)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: send.programs)
    long = IndexKeys(KEYS.pages, KEYS.page_table.repeat(1, 128), KEYS.lengths)
    assert long.room == 8192
    for keys in (KEYS, long):
        assert attend._selection_sends(send, Q, keys) == step.worthwhile(4, 2, 2, keys.room, True) == (keys is long)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: send.programs - 1)
    assert not attend._selection_sends(send, Q, long)
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: send.programs)
    monkeypatch.setattr(attend, "meaning", lambda: "triton")
    assert not attend._selection_sends(send, Q, long)
