"""Exchanges over symmetric memory in the interpreter, which runs one rank after the other: none waits, all go twice, and by the second time
they find what their peers wrote the first. tests/gpu/test_symmetric.py has them wait for one another."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from thresher.distributed import packed, symmetric, symmetric_kernels
from thresher.distributed.collectives import ProcessGroup, own_heads, rounded, share_heads
from thresher.ops import send
from thresher.ops.merge import merge
from thresher.ops.sparse_attend.triton import Shares
from thresher.ops.to_slots import triton as to_slots
from thresher.types import PartialAttention

ROOM = 2**18


@pytest.fixture
def ranks_of(monkeypatch):
    """``ranks_of(R)``: that many ranks."""
    monkeypatch.setattr(symmetric_kernels, "globaltimer", lambda: 0)
    monkeypatch.setattr(send, "globaltimer", lambda: 0)
    monkeypatch.setattr(
        symmetric_kernels, "_await_word", lambda words, turn, began, patience: tl.load(words).to(tl.int32).to(tl.float32, bitcast=True)
    )

    def make(num: int) -> list[symmetric.SymmetricMemory]:
        held = [torch.zeros(symmetric.size_of(num, ROOM), dtype=torch.uint8) for _ in range(num)]
        ranks = [symmetric.SymmetricMemory(rank, held[rank], [x.data_ptr() for x in held], ROOM) for rank in range(num)]
        for rank in ranks:
            rank._multiprocessors = 1  # several tasks for each program
        return ranks

    return make


def twice(ranks, job):
    """What ``job(rank)`` gives the second time, of the same turn."""
    for again in range(2):
        given = []
        for rank in ranks:
            rank._held.view(torch.int32)[: symmetric_kernels.SLOTS * rank.ranks] = 2**30  # all have come
            before = rank._turns.clone()
            given.append(job(rank))
            if not again:
                rank._turns.copy_(before)
                rank._unread = 0
    return given


def part_of(made, num, heads, dim):
    out, lse = torch.randn(num, heads, dim, generator=made), torch.randn(num, heads, generator=made) * 5
    lse[torch.rand(num, heads, generator=made) < 0.2] = -torch.inf
    lse[0, 0] = -torch.inf
    out[lse == -torch.inf] = torch.nan
    return PartialAttention(out, lse)


def close(got, want, heads=slice(None)):
    torch.testing.assert_close(got.out, want.out[:, heads], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.lse, want.lse[:, heads], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("shape", [(2, 5, 6), (3,), (0, 4), (1030, 2)])
def test_gather(ranks_of, num, shape):
    every = torch.randn(num, *shape, generator=torch.Generator().manual_seed(num))
    ranks = ranks_of(num)
    for _ in range(2):
        for got in twice(ranks, lambda rank: rank.gather(every[rank.rank])):
            assert torch.equal(got, every)


@pytest.mark.parametrize("few", [symmetric.FEW, 0])
@pytest.mark.parametrize(("num", "queries", "heads", "dim"), [(2, 3, 5, 16), (2, 5, 4, 32), (3, 2, 7, 16), (3, 1, 2, 16)])
def test_merge(ranks_of, monkeypatch, few, num, queries, heads, dim):
    monkeypatch.setattr(symmetric, "FEW", few)
    made, ranks, shares = torch.Generator().manual_seed(heads), ranks_of(num), share_heads(heads, num)
    for _ in range(2):
        parts = [part_of(made, queries, heads, dim) for _ in range(num)]
        want = merge([PartialAttention(part.out.nan_to_num(0.0), part.lse) for part in parts], impl="reference")
        for got in twice(ranks, lambda rank, parts=parts: rank.merge(parts[rank.rank])):
            close(got, want)
        want = merge([rounded(PartialAttention(part.out.nan_to_num(0.0), part.lse)) for part in parts], impl="reference")
        for rank, got in enumerate(twice(ranks, lambda rank, parts=parts: rank.merge_heads(parts[rank.rank], shares))):
            close(got, want, own_heads(shares, rank))


@pytest.mark.parametrize("few", [symmetric.FEW, 0])
@pytest.mark.parametrize("shares", [1, 3, 40])
def test_shares_are_added_up_first(ranks_of, monkeypatch, few, shares):
    monkeypatch.setattr(symmetric, "FEW", few)
    made, ranks, heads = torch.Generator().manual_seed(shares), ranks_of(2), [2, 2]
    out, peaks = torch.randn(2, 3, shares, 4, 64, generator=made), 20 * torch.randn(2, 3, shares, 4, generator=made)
    totals = 1 + torch.rand(2, 3, shares, 4, generator=made)
    parts = [Shares(out[rank], peaks[rank], totals[rank] if shares > 1 else peaks[rank]) for rank in range(2)]
    want = merge([rounded(part.added()) for part in parts], impl="reference")
    for rank, got in enumerate(twice(ranks, lambda rank: rank.merge_shares(parts[rank.rank], heads))):
        close(got, want, own_heads(heads, rank))


def test_more_queries_than_there_is_room_for_are_merged_one_part_after_another(ranks_of):
    rank, launched = ranks_of(2)[0], []
    rank._merge_into = lambda result, lse, part, *rest: launched.append((len(result), len(lse), len(part.out)))
    rank.merge(part_of(torch.Generator().manual_seed(0), 300, 4, 64))
    assert launched == [(126,) * 3, (126,) * 3, (48,) * 3]


@pytest.mark.parametrize(("num", "queries", "heads"), [(2, 3, 4), (2, 1, 5), (3, 2, 6)])
def test_heads_are_sent_and_received(ranks_of, num, queries, heads):
    made, ranks, shares = torch.Generator().manual_seed(heads), ranks_of(num), share_heads(heads, num)
    table, requests, indices = torch.tensor([[3, 1]], dtype=torch.int32), torch.zeros(1, dtype=torch.int64), torch.tensor([[70, 2, -1]])
    for _ in range(2):
        q = torch.randn(queries, heads, 16, generator=made)
        received = [rank.send_heads(q[:, own_heads(shares, rank.rank)], shares) for rank in ranks]
        for rank, came in zip(ranks, received, strict=True):
            assert torch.equal(came(), q)
            slots = to_slots.to_slots(indices.int(), table, requests, 64, came.sent)
            assert slots.tolist() == [[70, 194, -1]]
            assert torch.equal(came.heads(), q)
            rank._unread = 0


@pytest.mark.parametrize(
    ("ranks", "num", "row", "word"),
    [(2, 3, 700, torch.int64), (3, 1, 5, torch.int32), (2, 2, 2 * send.FEW, torch.uint8), (2, 0, 5, torch.int64)],
)
def test_what_is_sent_is_in_every_rank_s_memory(ranks, num, row, word):
    """The ranks one after the other, in one process: none waits for another."""
    first, at, limit = 7, 4096, num * row * ranks * word.itemsize
    words = [torch.randint(0, 100, (num, row), generator=torch.Generator().manual_seed(rank)).to(word) for rank in range(ranks)]
    memory = [torch.zeros(at + limit + 512, dtype=torch.uint8) for _ in range(ranks)]
    turns = [torch.arange(at // 4 // ranks, dtype=torch.int32) for _ in range(ranks)]
    addresses = torch.tensor([there.data_ptr() for there in memory])
    programs = -(-num * row // send.FEW)
    for again in range(1, 3):
        for rank in range(ranks):
            sending = send.Send((words[rank] + again).view(-1), row, addresses, at, turns[rank], first, rank, 0)
            assert sending.programs == programs
            if programs:
                sending.launch()
        for rank in range(ranks):
            came = memory[rank][at : at + limit].view(word).view(num, ranks, row)
            assert torch.equal(came, torch.stack([x + again for x in words], 1))
            assert not memory[rank][at + limit :].any()
            flags = memory[rank][:at].view(torch.int32)[: at // 4 // ranks * ranks].view(-1, ranks)
            want = torch.zeros_like(flags)
            want[first : first + programs] = torch.arange(first, first + programs)[:, None] + again
            want[:, rank] = 0  # it tells nobody that it has come to itself
            assert torch.equal(flags, want)
            counted_on = torch.arange(len(turns[rank]), dtype=torch.int32)
            counted_on[first : first + programs] += again
            assert torch.equal(turns[rank], counted_on)


def test_many_words_are_sent_by_few_programs():
    words = torch.arange(send.MANY * (send.PROGRAMS + 1) + 3)
    memory = [torch.zeros(2**15 + 2 * 8 * len(words), dtype=torch.uint8) for _ in range(2)]
    addresses, turns = torch.tensor([x.data_ptr() for x in memory]), torch.zeros(send.PROGRAMS, dtype=torch.int32)
    sending = send.Send(words, len(words), addresses, 2**15, turns, 0, 1, 0)
    assert sending.programs == send.PROGRAMS
    sending.launch()
    for there in memory:
        came = there[2**15 :].view(torch.int64).view(2, -1)
        assert torch.equal(came[1], words)
        assert not came[0].any()


COMPILE = """
import torch
from thresher.ops.send import Send

for ranks in (2, 8):
    words, addresses = torch.zeros(2304, dtype=torch.int64), torch.zeros(ranks, dtype=torch.int64)
    Send(words, 2304, addresses, 2**20, torch.zeros(2000, dtype=torch.int32), 1056, 0, 0).launch()
"""


def test_every_peer_is_told_once_its_words_are_there(compile_for_hopper):
    found = compile_for_hopper(COMPILE)
    assert [kernel.name for kernel in found] == ["send_kernel"] * 2
    for kernel, ranks in zip(found, (2, 8), strict=True):
        assert kernel.ptx.count("atom.global.sys.release.exch") == ranks - 1


class OneByOne:
    """NCCL's all-to-all among ranks that come one after the other: all send first, then each is given what was sent to it."""

    def __init__(self, ranks: int) -> None:
        self.sent: list[torch.Tensor] = [torch.empty(0)] * ranks

    def group(self, rank: int) -> ProcessGroup:
        made = object.__new__(ProcessGroup)
        made.rank, made.ranks = rank, len(self.sent)

        def swap(sent, num, shares, row):
            self.sent[rank] = sent
            begin, size = num * row * sum(shares[:rank]), num * row * shares[rank]
            pieces = [there[begin : begin + size] if len(there) else sent.new_zeros(size) for there in self.sent]
            return torch.stack(pieces).view(len(self.sent), num, shares[rank], row)

        made._swap = swap
        return made


@pytest.mark.parametrize(
    ("num", "queries", "heads", "dim", "shares"), [(2, 3, 5, 16, 1), (3, 2, 7, 32, 3), (4, 5, 3, 64, 1), (2, 0, 4, 16, 2)]
)
def test_packed_heads_are_those_of_pytorch(num, queries, heads, dim, shares):
    """In what is sent, byte for byte, and merged; of ranks without a head too."""
    made, each, joined = torch.Generator().manual_seed(heads), share_heads(heads, num), OneByOne(num)
    out, peaks = torch.randn(num, queries, shares, heads, dim, generator=made), 9 * torch.randn(num, queries, shares, heads, generator=made)
    peaks[torch.rand(peaks.shape, generator=made) < 0.2] = -torch.inf
    totals = (1 + torch.rand(peaks.shape, generator=made)).masked_fill(peaks == -torch.inf, 0)
    parts = [Shares(out[rank], peaks[rank], totals[rank] if shares > 1 else peaks[rank]) for rank in range(num)]
    groups = [joined.group(rank) for rank in range(num)]

    def run(merge_on):
        _ = [merge_on(rank) for rank in range(num)]
        return list(joined.sent), [merge_on(rank) for rank in range(num)]

    sent, merged = run(lambda rank: groups[rank].merge_shares(parts[rank], each))
    by_torch, want = run(lambda rank: groups[rank]._merge_heads(parts[rank].added(), each))
    assert all(map(torch.equal, sent, by_torch))
    for ours, theirs in zip(merged, want, strict=True):
        close(ours, theirs)


def test_which_heads_can_be_packed():
    assert packed.unfit([2, 3], 16) is None
    assert "not [3, 2]" in packed.unfit([3, 2], 16)
    assert "power of two" in packed.unfit([2, 3], 24)
    assert "at least 2" in packed.unfit([2, 3], 1)
