"""A (query, key) pair of FP8 vectors has the same score bits in every form, batch, chunk, page size and shard."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from thresher.distributed.shards import Placement
from thresher.types import IndexKeys

from .compare import bits, differ, fail_on
from .draw import GARBAGE, generator, paged, queries, query_of, take, vectors
from .machine import DEVICE, INTERPRET, sized

kernels = importlib.import_module("thresher.ops.index_score.triton")

INF = float("inf")
NUM, KEYS = sized((1024, 1008), (9, 208))
SHAPES = [(heads, dim) for dim in (64, 128) for heads in (1, 5, 8, 16, 32, 64, 128)]
SHAPES = sized(SHAPES, [(1, 128), (5, 64), (16, 64), (64, 64)])


@functools.lru_cache(maxsize=4)
def world(heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, weights, k, k_scales, and the scores of all pairs from the ragged form, to which all else is compared."""
    q, weights = queries(NUM, heads, dim, seed=heads)
    k, scales = vectors(KEYS, dim, seed=heads + 1000)
    out = torch.full((NUM, KEYS), torch.nan, device=DEVICE)
    return q, weights, k, scales, kernels.index_score(q, weights, k, scales, *span(NUM, 0, KEYS), out=out)


def span(num: int, start: int, end: int) -> tuple[Tensor, Tensor]:
    return torch.full((num,), start, device=DEVICE), torch.full((num,), end, device=DEVICE)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, device=DEVICE)


def seen(scores: Tensor, positions: Tensor, lengths: Tensor | int) -> Tensor:
    """The scores of positions 0, 1, ..., with -inf past each row's sight."""
    column = torch.arange(scores.shape[1], device=DEVICE)
    end = torch.minimum(positions + 1, torch.as_tensor(lengths, device=DEVICE))
    return scores.masked_fill(column >= end[:, None], -INF)


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_ragged(heads, dim):
    q, weights, k, scales, full = world(heads, dim)
    problems = [None if bool(full.isfinite().all()) else "scores that are not finite"]
    for row in (0, 5, NUM - 1):
        one = slice(row, row + 1)
        got = kernels.index_score(q[one], weights[one], k, scales, *span(1, 0, KEYS), out=poisoned(1, KEYS))
        problems.append(differ(f"query {row} alone", got, full[one]))
    some = slice(3, 8)
    for first, last in ((0, 64), (37, 101), (KEYS - 65, KEYS)):
        got = kernels.index_score(q[some], weights[some], k[first:last], scales[first:last], *span(5, 0, last - first))
        problems.append(differ(f"keys {first}..{last - 1} alone", got, full[some, first:last]))
    got = kernels.index_score(q[some], weights[some], k[1::3], scales[1::3], *span(5, 0, len(k[1::3])))
    problems.append(differ("every third key, strided", got, full[some, 1::3]))
    gen = generator(1)
    starts, ends = (torch.randint(0, KEYS + 1, (NUM,), generator=gen).to(DEVICE) for _ in range(2))
    got = kernels.index_score(q, weights, k, scales, starts, ends, out=poisoned(NUM, KEYS))
    column = torch.arange(KEYS, device=DEVICE)
    inside = (column >= starts[:, None]) & (column < ends[:, None])
    problems.append(differ("random ranges", got, full.masked_fill(~inside, -INF)))
    fail_on(problems)


@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_paged(heads, dim):
    q, weights, k, scales, full = world(heads, dim)
    keys = paged([(k, scales)], 64)
    positions = torch.randint(-1, KEYS + 9, (NUM,), generator=generator(2)).to(DEVICE)
    query = query_of(q, weights, positions, [0] * NUM)
    got = kernels.paged_index_score(query, keys, out=poisoned(NUM, KEYS))
    problems = [differ("one request, all queries", got, seen(full, positions, KEYS))]
    for row in (0, NUM - 1):
        one = slice(row, row + 1)
        got = kernels.paged_index_score(query.rows(one), keys, out=poisoned(1, KEYS))
        problems.append(differ(f"query {row} alone", got, seen(full, positions, KEYS)[one]))
    fail_on(problems)


@pytest.mark.skipif(INTERPRET, reason="the kernel for many queries runs on Hopper alone")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [20, 32, 64])
@pytest.mark.parametrize("num", [64, 201])
def test_many_queries_of_one_request(num, heads, dim, monkeypatch):
    """The kernel that prefill takes on Hopper, the plain one, the gathered form and single queries."""
    q, weights, k, scales, _ = world(heads, dim)
    q, weights = q[:num], weights[:num]
    keys = paged([(k, scales)], 64)
    positions = torch.randint(-1, KEYS + 9, (num,), generator=generator(num)).to(DEVICE)
    query = query_of(q, weights, positions, [0] * num)
    starts, ends = torch.zeros_like(positions), (positions + 1).clamp(0, KEYS)

    def both() -> tuple[Tensor, Tensor]:
        ragged = kernels.index_score(q, weights, k, scales, starts, ends, out=poisoned(num, KEYS))
        return ragged, kernels.paged_index_score(query, keys, out=poisoned(num, KEYS))

    assert kernels._hopper(q, k.dtype) is not None, "the Hopper kernel is what is to be tested"
    ragged, pages = both()
    monkeypatch.setattr(kernels, "HOPPER_QUERIES", 10**9)
    assert kernels._hopper(q, k.dtype) is None
    plain_ragged, plain_pages = both()
    problems = [differ("ragged and paged", ragged, pages), differ("ragged", ragged, plain_ragged), differ("paged", pages, plain_pages)]
    problems.append(None if bool((ragged > -INF).any()) else "no score at all")
    everywhere = torch.arange(KEYS, device=DEVICE).expand(num, -1)
    problems.append(differ("gathered", kernels.gathered_index_score(query, keys, everywhere, out=poisoned(num, KEYS)), pages))
    for row in (0, 7, num - 1):
        one = slice(row, row + 1)
        got = kernels.paged_index_score(query.rows(one), keys, out=poisoned(1, KEYS))
        problems.append(differ(f"query {row} alone", got, pages[one]))
    fail_on(problems)


@pytest.mark.parametrize("page_size", [2, 61, 64, 128])
@pytest.mark.parametrize(("heads", "dim"), sized([(5, 64), (8, 128), (64, 128)], [(5, 64), (64, 64)]))
def test_requests_of_their_own_keys(heads, dim, page_size):
    """One to four queries a request, decoding and with drafts; each request holds the keys in an order of its own; one is empty."""
    q, weights, k, scales, full = world(heads, dim)
    gen = generator(page_size)
    lengths = sized([1008, 0, 700, 130, 1, 960], [100, 0, 70, 1])
    orders = [torch.randperm(KEYS, generator=gen)[:n].to(DEVICE) for n in lengths]
    keys = paged([(take(k, order), scales[order]) for order in orders], page_size, seed=page_size)
    problems = []
    for drafts in (1, 2, 3, 4):
        requests = torch.arange(len(lengths)).repeat_interleave(drafts)
        num = len(requests)
        if num > NUM:
            continue
        held = torch.tensor(lengths)[requests]
        positions = held - drafts + torch.arange(drafts).repeat(len(lengths))
        shuffled = torch.randperm(num, generator=gen) if drafts == 3 else torch.arange(num)
        query = query_of(q[:num], weights[:num], positions[shuffled], requests[shuffled])
        width = max(lengths)
        got = kernels.paged_index_score(query, keys, out=poisoned(num, width))
        want = torch.full((num, width), -INF, device=DEVICE)
        for row, request in enumerate(requests[shuffled].tolist()):
            want[row, : lengths[request]] = full[row, orders[request]]
        want = seen(want, query.positions, held[shuffled].to(DEVICE))
        problems.append(differ(f"{drafts} queries a request", got, want))
        picked = torch.randint(-3, width + 3, (num, 77), generator=gen).to(DEVICE)
        got = kernels.gathered_index_score(query, keys, picked, out=poisoned(num, 77))
        there = (picked >= 0) & (picked < width)
        expected = want.gather(1, picked.clamp(0, width - 1)).masked_fill(~there, -INF)
        problems.append(differ(f"{drafts} queries a request, gathered", got, expected))
    fail_on(problems)


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_gathered(heads, dim, many, monkeypatch):
    """In either size of tile."""
    monkeypatch.setattr(kernels, "MANY_GATHERED", 0 if many else 10**9)
    q, weights, k, scales, full = world(heads, dim)
    keys = paged([(k, scales)], 64)
    num = min(NUM, 32)
    query = query_of(q[:num], weights[:num], [KEYS - 2] * num, [0] * num)
    gen = generator(3)
    problems = []
    for dtype in (torch.int32, torch.int64):
        wanted = torch.randint(0, KEYS, (num, 330), generator=gen, dtype=dtype)
        wanted[:, : len(GARBAGE)] = GARBAGE.to(dtype)
        wanted[0] = -1
        wanted = wanted.to(DEVICE)
        got = kernels.gathered_index_score(query, keys, wanted, out=poisoned(num, 330))
        there = (wanted >= 0) & (wanted <= KEYS - 2)
        want = full[:num].gather(1, wanted.long().clamp(0, KEYS - 1)).masked_fill(~there, -INF)
        problems.append(differ(f"candidates of {dtype}", got, want))
        got = kernels.gathered_index_score(query.rows(slice(4, 5)), keys, wanted[4:5, 100:101])
        problems.append(differ(f"one candidate of {dtype}", got, want[4:5, 100:101]))
    fail_on(problems)


@pytest.mark.parametrize("page_size", sized([64, 128, 61], [64, 61]))
@pytest.mark.parametrize("block_size", sized([128, 64, 192, 40, 1], [64, 40]))
@pytest.mark.parametrize(("heads", "dim"), sized([(1, 64), (8, 128), (32, 128), (64, 128), (128, 128)], [(5, 64)]))
def test_blocks(heads, dim, block_size, page_size):
    """Many queries, and one alone; blocks in any order among numbers from anywhere, and a hole in the page table."""
    q, weights, k, scales, full = world(heads, dim)
    keys = paged([(k, scales)], page_size)
    table = keys.page_table.clone()
    table[0, 1] = -1
    keys = replace(keys, page_table=table)
    num, gen = min(NUM, 200), generator(block_size)
    positions = torch.randint(-1, KEYS + 9, (num,), generator=gen)
    positions[4] = KEYS - 2
    query = query_of(q[:num], weights[:num], positions, [0] * num)
    blocks = torch.randint(-1, KEYS // block_size + 2, (num, 1300 // block_size + len(GARBAGE)), generator=gen, dtype=torch.int32)
    blocks[:, : len(GARBAGE)] = GARBAGE
    blocks[num // 2] = -1
    blocks[num // 3, blocks.shape[1] // 2 :] = -1
    blocks = blocks.to(DEVICE)
    width = blocks.shape[1] * block_size
    got = kernels.block_index_score(query, keys, blocks, block_size, out=poisoned(num, width))
    tokens = (blocks.long()[:, :, None] * block_size + torch.arange(block_size, device=DEVICE)).flatten(1)
    there = (tokens >= 0) & (tokens < KEYS) & (tokens <= query.positions[:, None]) & (tokens // page_size != 1)
    want = full[:num].gather(1, tokens.clamp(0, KEYS - 1)).masked_fill(~there, -INF)
    problems = [differ("blocks", got, want)]
    problems.append(differ("gathered", got, kernels.gathered_index_score(query, keys, tokens)))
    one = slice(4, 5)
    alone = kernels.block_index_score(query.rows(one), keys, blocks[one], block_size, out=poisoned(1, width))
    problems.append(differ("a query alone", alone, want[one]))
    fail_on(problems)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("heads", "dim"), sized([(8, 64), (32, 128), (64, 128)], [(5, 64), (64, 64)]))
def test_shards(heads, dim, ranks):
    """Keys dealt over ranks: what a rank scores locally are the scores of the whole."""
    q, weights, k, scales, full = world(heads, dim)
    num, position = min(NUM, 16), KEYS - 5
    problems = []
    for granularity in (1, 16):
        placement = Placement(ranks, granularity)
        for rank in range(ranks):
            mine = (placement.owner(torch.arange(KEYS)) == rank).nonzero()[:, 0].to(DEVICE)
            keys = paged([(take(k, mine), scales[mine])], 64, seed=rank)
            end = int((mine <= position).sum())
            query = query_of(q[:num], weights[:num], [end - 1] * num, [0] * num)
            want = seen(full[:num, mine], query.positions, len(mine))
            problems.append(differ(f"rank {rank} of {ranks}, {granularity} together", kernels.paged_index_score(query, keys), want))
            picked = torch.arange(len(mine) - 1, -1, -7, device=DEVICE).expand(num, -1)
            got = kernels.gathered_index_score(query, keys, picked)
            problems.append(differ(f"rank {rank} of {ranks}, {granularity} together, gathered", got, want.gather(1, picked)))
    fail_on(problems)


def test_holes_and_garbage_are_out_of_sight():
    """Pages of -1 or not in the cache, requests and positions from anywhere in int64, lengths past the table."""
    q, weights, k, scales, full = world(64, sized(128, 64))
    keys = paged([(k[:192], scales[:192]), (k[:70], scales[:70])], 64)
    table = keys.page_table.clone()
    table[0, 1] = -1
    table[0, 3:] = GARBAGE[: table.shape[1] - 3].to(DEVICE)
    keys = IndexKeys(keys.pages, table, torch.tensor([2**62, 70], device=DEVICE))
    positions = torch.tensor([2**62, -(2**63), 2**31, 191, 60, 60, 60])
    query = query_of(q[:7], weights[:7], positions, torch.tensor([0, 0, 0, 0, 2**40, -1, -(2**63)]))
    width = 320
    want = torch.full((7, width), -INF, device=DEVICE)
    for row in (0, 2, 3):
        want[row, :64], want[row, 128:192] = full[row, :64], full[row, 128:192]
    problems = [differ("paged", kernels.paged_index_score(query, keys, width=width, out=poisoned(7, width)), want)]
    wanted = torch.tensor([[0, 2**62, -(2**62), 63, 64, 191, 2**31, 130]], device=DEVICE).expand(7, -1)
    there = (wanted >= 0) & (wanted < width)
    got = kernels.gathered_index_score(query, keys, wanted, out=poisoned(7, 8))
    problems.append(differ("gathered", got, want.gather(1, wanted.clamp(0, width - 1)).masked_fill(~there, -INF)))
    fail_on(problems)


def test_strided_inputs():
    q, weights, k, scales, full = world(8, sized(128, 64)) if sized(True, False) else world(5, 64)
    num, heads, dim = 6, q.shape[1], q.shape[2]
    wide = torch.full((num, heads + 2, dim + 32), 0x7F, dtype=torch.uint8, device=DEVICE)
    wide[:, 1:-1, 16:-16] = bits(q[:num])
    strided = wide.view(q.dtype)[:, 1:-1, 16:-16]
    keys = paged([(k, scales)], 64)
    turned = replace(keys, page_table=keys.page_table.T.contiguous().T)
    query = query_of(strided, weights[:num].T.contiguous().T, [KEYS - 1] * num, [0] * num)
    out = poisoned(num, KEYS + 8)
    problems = [differ("paged", kernels.paged_index_score(query, turned, out=out[:, :KEYS]), full[:num])]
    problems.append(None if bool(out[:, KEYS:].isnan().all()) else "paged wrote past its columns")
    wide_k = torch.full((KEYS, dim + 16), 0x7F, dtype=torch.uint8, device=DEVICE)
    wide_k[:, :dim] = bits(k)
    got = kernels.index_score(strided, weights[:num], wide_k.view(k.dtype)[:, :dim], scales, *span(num, 0, KEYS))
    problems.append(differ("ragged", got, full[:num]))
    wanted = torch.arange(0, 2 * KEYS, 2, device=DEVICE).expand(num, -1)[:, : KEYS // 2]
    problems.append(differ("gathered", kernels.gathered_index_score(query, turned, wanted), full[:num, ::2]))
    fail_on(problems)
