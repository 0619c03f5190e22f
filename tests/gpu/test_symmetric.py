"""Exchanges over symmetric memory with all ranks on one GPU, each on a stream of its own: kernels of all of them must run at once, so each
gets its part of the multiprocessors, and nothing else is launched while they wait for one another."""

from __future__ import annotations

import pytest
import torch

from thresher.distributed.collectives import own_heads, pad_heads, rounded, share_heads, unpad_heads
from thresher.errors import ThresherError
from thresher.ops import pool_blocks
from thresher.ops import send as sending
from thresher.ops.hisa_select import cuda as hisa
from thresher.ops.merge import merge
from thresher.ops.score_select import cuda as step
from thresher.types import PartialAttention

from ..triton.test_symmetric import OneByOne
from .test_score_select import world

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TURNS = 5


@pytest.fixture(autouse=True)
def poisoned():
    """In place of the one that fills new memory: nothing else is launched while ranks wait for one another."""


class Ranks:
    """All of them, and a stream for each."""

    def __init__(self, num: int) -> None:
        symmetric = pytest.importorskip("thresher.distributed.symmetric")
        held = [torch.zeros(symmetric.size_of(num), dtype=torch.uint8, device="cuda") for _ in range(num)]
        addresses = [x.data_ptr() for x in held]
        self.ranks = [symmetric.SymmetricMemory(rank, held[rank], addresses, timeout_s=10.0) for rank in range(num)]
        for rank in self.ranks:
            rank._multiprocessors //= num
        self.streams = [torch.cuda.Stream() for _ in self.ranks]
        for stream in self.streams:  # memory that each has from now on: none can be had while a kernel waits
            with torch.cuda.stream(stream):
                _ = [torch.empty(size, device="cuda") for size in (2**18, 2**18, 2**26)]

    def run(self, job):
        """``job(rank)`` on every rank. What it launches must be the same kernel on all: while one waits, no other can be loaded."""
        torch.cuda.synchronize()
        given = []
        for rank, stream in zip(self.ranks, self.streams, strict=True):
            with torch.cuda.stream(stream):
                given.append(job(rank))
        torch.cuda.synchronize()
        return given


def part_of(made: torch.Generator, num: int, heads: int, dim: int) -> PartialAttention:
    out, lse = torch.randn(num, heads, dim, generator=made), torch.randn(num, heads, generator=made) * 5
    lse[torch.rand(num, heads, generator=made) < 0.1] = -torch.inf  # empty, and what they hold is no number
    out[lse == -torch.inf] = torch.nan
    return PartialAttention(out.cuda(), lse.cuda())


def shares_of(made: torch.Generator, num: int, shares: int, heads: int):
    from thresher.ops.sparse_attend.triton import Shares

    out, peaks = torch.randn(num, shares, heads, 512, generator=made), 40 * torch.randn(num, shares, heads, generator=made)
    totals, empty = 1 + torch.rand(num, shares, heads, generator=made), torch.rand(num, shares, heads, generator=made) < 0.3
    empty[0, :, 0] = True
    out[empty], peaks[empty], totals[empty] = 0.0, -torch.inf, 0.0
    return Shares(out.cuda(), peaks.cuda(), totals.cuda())


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("num", [2, 3, 4])
def test_gather(num):
    made, all_ranks = torch.Generator().manual_seed(num), Ranks(num)
    for shape in ((1, 64, 576), (32, 64, 576), (3, 5, 7), (1,), (0, 4), (1000, 1001)):
        for dtype in (torch.bfloat16, torch.float32, torch.uint8):
            every = (torch.randn(num, *shape, generator=made) * 10).to(dtype).cuda()
            own = [x.clone() for x in every]
            for got in all_ranks.run(lambda rank, own=own: rank.gather(own[rank.rank])):
                assert same(got, every)


@pytest.mark.parametrize("num", [2, 3, 4])
@pytest.mark.parametrize(
    ("queries", "heads", "dim"), [(1, 128, 512), (32, 128, 512), (120, 64, 512), (2000, 7, 64), (5, 7, 64), (2, 4, 16), (3, 1, 16)]
)
def test_merge(num, queries, heads, dim):
    """Small ones and large ones in turn: programs of other numbers have the same turns."""
    made, all_ranks, shares = torch.Generator().manual_seed(heads), Ranks(num), share_heads(heads, num)
    for _ in range(TURNS):
        parts = [part_of(made, queries, heads, dim) for _ in range(num)]
        want = merge([PartialAttention(part.out.nan_to_num(0.0), part.lse) for part in parts])
        for got in all_ranks.run(lambda rank, parts=parts: rank.merge(parts[rank.rank])):
            assert same(got.out, want.out)
            assert same(got.lse, want.lse)
        want = merge([rounded(PartialAttention(part.out.nan_to_num(0.0), part.lse)) for part in parts])
        for rank, got in enumerate(all_ranks.run(lambda rank, parts=parts: rank.merge_heads(parts[rank.rank], shares))):
            own = own_heads(shares, rank)
            assert same(got.out, want.out[:, own])
            assert same(got.lse, want.lse[:, own])
        little = torch.randn(num, 4, generator=made).cuda()
        assert all(same(got, little) for got in all_ranks.run(lambda rank, little=little: rank.gather(little[rank.rank])))


@pytest.mark.parametrize("num", [2, 4])
@pytest.mark.parametrize(("queries", "shares"), [(1, 18), (1, 3), (4, 18), (8, 9), (32, 2), (40, 1), (2, 40)])
def test_shares_are_added_up_and_merged(num, queries, shares):
    made, all_ranks, heads = torch.Generator().manual_seed(shares), Ranks(num), share_heads(128, num)
    for _ in range(TURNS):
        parts = [shares_of(made, queries, shares, 128) for _ in range(num)]
        want = merge([rounded(part.added()) for part in parts])
        for rank, got in enumerate(all_ranks.run(lambda rank, parts=parts: rank.merge_shares(parts[rank.rank], heads))):
            own = own_heads(heads, rank)
            assert same(got.out, want.out[:, own])
            assert same(got.lse, want.lse[:, own])


@pytest.mark.parametrize("num", [2, 3, 8])
@pytest.mark.parametrize(("queries", "shares"), [(1, 18), (8, 9), (32, 2), (40, 1), (0, 1)])
def test_heads_are_packed_for_another_exchange_and_merged(num, queries, shares):
    """NCCL's, whose place is taken by one process."""
    made, heads, joined = torch.Generator().manual_seed(shares), share_heads(128, num), OneByOne(num)
    parts = [shares_of(made, max(queries, 1), shares, 128) for _ in range(num)]
    parts = [type(part)(*(x[:queries] for x in part)) for part in parts]
    groups = [joined.group(rank) for rank in range(num)]
    want = merge([rounded(part.added()) for part in parts])
    for _ in range(2):
        merged = [group.merge_shares(part, heads) for group, part in zip(groups, parts, strict=True)]
    for rank, got in enumerate(merged):
        own = own_heads(heads, rank)
        assert same(got.out, want.out[:, own])
        assert same(got.lse, want.lse[:, own])


@pytest.mark.parametrize("num", [2, 3, 4])
@pytest.mark.parametrize(("queries", "heads"), [(1, 128), (8, 128), (32, 128), (3, 7), (300, 8)])
def test_heads_are_sent_and_received(num, queries, heads):
    made, all_ranks, shares = torch.Generator().manual_seed(queries), Ranks(num), share_heads(heads, num)
    for _ in range(TURNS):
        q = torch.randn(queries, heads, 576, generator=made).bfloat16().cuda()
        parts = [part_of(made, 2, 4, 16) for _ in range(num)]
        receives = all_ranks.run(lambda rank, q=q: rank.send_heads(q[:, own_heads(shares, rank.rank)].contiguous(), shares))
        for got in all_ranks.run(lambda rank, receives=receives: receives[rank.rank]()):
            assert same(got, q)
        all_ranks.run(lambda rank, parts=parts: rank.merge(parts[rank.rank]))


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize(("queries", "heads"), [(1, 128), (8, 128), (32, 128), (3, 7)])
@pytest.mark.parametrize("how", ["score_select", "hisa_select"])
def test_heads_are_sent_by_a_selection(num, queries, heads, how, monkeypatch):
    """Whose set is what it is without, in a graph too; it ends when all have come, whoever is late. Each rank has its multiprocessors."""
    programs = torch.cuda.get_device_properties(0).multi_processor_count // num
    monkeypatch.setattr(sending, "PROGRAMS", programs)
    made, all_ranks, shares = torch.Generator().manual_seed(queries), Ranks(num), share_heads(heads, num)
    query, keys = world("normal", [20000] * queries, queries, 64, 128)
    means = pool_blocks(keys, 128)
    words = max(step.shared_words(queries, programs), hisa.shared_words(queries, 40, programs))
    zeros = [torch.zeros(words, device="cuda", dtype=torch.int32) for _ in range(num)]

    def select(rank, send):
        if how == "score_select":
            return step.select_step(query, keys, 512, False, programs, zeros[rank], send)
        return hisa.select_step(query, keys, means, 40, 128, 512, False, programs, zeros[rank], send)

    want, own = select(0, None), [torch.zeros(queries, share, 576, device="cuda", dtype=torch.bfloat16) for share in shares]
    came = [torch.zeros(queries, heads, 576, device="cuda", dtype=torch.bfloat16) for _ in range(num)]
    padded = [pad_heads(x, max(shares)) for x in own]  # all kernels are loaded before anybody waits
    came[0].copy_(unpad_heads(torch.stack(padded, 1), shares)), torch.cuda._sleep(1)

    def exchange(rank):
        send, received = rank.sending(own[rank.rank], shares)
        got = select(rank.rank, send)
        came[rank.rank].copy_(received.heads())
        return got

    def one_late(turn, job):
        def run(rank):
            if rank.rank == turn % num:
                torch.cuda._sleep(10**6)
            return job(rank)

        return all_ranks.run(run)

    graphs, sent = [], []
    for turn in range(TURNS):
        q = torch.randn(queries, heads, 576, generator=made).bfloat16().cuda()
        for rank in range(num):
            own[rank].copy_(q[:, own_heads(shares, rank)])
        if turn < 2:
            sent = one_late(turn, exchange)
        elif turn == 2:
            torch.cuda.synchronize()
            sent, graphs = [], [torch.cuda.CUDAGraph() for _ in range(num)]
            for graph, rank, stream in zip(graphs, all_ranks.ranks, all_ranks.streams, strict=True):
                with torch.cuda.graph(graph, stream=stream):
                    sent.append(exchange(rank))
        if graphs:
            one_late(turn, lambda rank, graphs=graphs: graphs[rank.rank].replay())
        for got, picked in zip(came, sent, strict=True):
            assert same(got, q)
            assert same(picked.indices, want.indices)
            assert same(picked.slots, want.slots)
        parts = [part_of(made, 2, 4, 16) for _ in range(num)]
        all_ranks.run(lambda rank, parts=parts: rank.merge(parts[rank.rank]))


def test_heads_are_sent_once_between_merges():
    all_ranks = Ranks(2)
    q = torch.zeros(1, 64, 576, dtype=torch.bfloat16, device="cuda")
    rank = all_ranks.ranks[0]
    rank.send_heads(q, [64, 64])
    with pytest.raises(ThresherError, match="sent too early"):
        rank.send_heads(q, [64, 64])


def test_more_than_there_is_room_for():
    from thresher.distributed.symmetric import SymmetricMemory, size_of

    room = 64 * 1024
    held = torch.zeros(size_of(2, room), dtype=torch.uint8, device="cuda")
    rank = SymmetricMemory(0, held, [held.data_ptr()] * 2, room)
    for too_much in (
        lambda: rank.gather(torch.zeros(room + 1, dtype=torch.uint8, device="cuda")),
        lambda: rank.send_heads(torch.zeros(16, 4, 256, dtype=torch.bfloat16, device="cuda"), [4, 4]),
        lambda: rank.merge(PartialAttention(torch.zeros(1, 64, 512, device="cuda"), torch.zeros(1, 64, device="cuda"))),
    ):
        with pytest.raises(ThresherError, match="must fit"):
            too_much()
