"""Choosing blocks, and the best tokens of blocks, in the interpreter against the reference, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from thresher.cache import pack_keys
from thresher.ops.select import triton as kernel
from thresher.ops.select.reference import select_blocks_reference, select_in_blocks_reference
from thresher.types import IndexKeys, IndexQuery

from .test_select import _poison, cruel, generator, path  # noqa: F401

INF, NAN = math.inf, math.nan


def world(lengths: list[int], positions: list[int], requests: list[int]) -> tuple[IndexQuery, IndexKeys]:
    keys = pack_keys([(torch.zeros(n, 64).to(torch.float8_e4m3fn), torch.ones(n)) for n in lengths], 16)
    num = len(positions)
    q = torch.zeros(num, 1, 64).to(torch.float8_e4m3fn)
    return IndexQuery(q, torch.ones(num, 1), torch.tensor(positions), torch.tensor(requests)), keys


QUERY, KEYS = world([200, 0, 37], [-1, 0, 4, 5, 40, 199, 10**9, 36, 36, 0], [0, 0, 0, 0, 0, 0, 0, 2, 2, 1])


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 9, 200])
@pytest.mark.parametrize("block_size", [1, 5, 64, 300])
def test_blocks_are_the_references(block_size, num_blocks):
    for width in (0, 1, 2, 40, 128, 201):
        for scores in (cruel(10, width, width), torch.randn(10, width, generator=generator(width)), torch.zeros(10, width)):
            if width < 200 // block_size:
                continue  # a request has more blocks than are scored
            got = kernel.select_blocks(scores, num_blocks, QUERY, KEYS, block_size)
            want = select_blocks_reference(scores, num_blocks, QUERY, KEYS, block_size)
            assert got.dtype == want.dtype == torch.int32
            assert torch.equal(got, want)


def test_what_is_not_looked_at_may_be_anything():
    scores = torch.randn(10, 40, generator=generator(0))
    want = kernel.select_blocks(scores, 6, QUERY, KEYS, 5)
    own = (torch.minimum(QUERY.positions + 1, KEYS.lengths[QUERY.requests]) - 1).clamp(min=0) // 5
    column = torch.arange(40)
    for garbage in (INF, NAN, -INF):
        spoilt = scores.masked_fill((column == 0) | (column >= own[:, None]), garbage)
        assert torch.equal(kernel.select_blocks(spoilt, 6, QUERY, KEYS, 5), want)


def test_many_blocks():
    query, keys = world([16384 + 5], [16388, 9000, 3], [0, 0, 0])
    scores = torch.zeros(3, kernel.MAX_BLOCKS)
    scores[0, ::7] = torch.randn(len(range(0, kernel.MAX_BLOCKS, 7)), generator=generator(1))
    got = kernel.select_blocks(scores, 5000, query, keys, 1)
    assert torch.equal(got, select_blocks_reference(scores, 5000, query, keys, 1))
    assert kernel.unsupported_blocks(kernel.MAX_BLOCKS) is None
    assert "16384" in kernel.unsupported_blocks(kernel.MAX_BLOCKS + 1)


def test_garbage_sees_nothing_or_what_is_held():
    """Requests, positions and lengths from anywhere; scores fewer than a request has blocks."""
    query, keys = world([200], [2**62, -(2**63), 2**31, 40, 40, 40], [0, 0, 0, 2**40, -1, -(2**63)])
    keys = IndexKeys(keys.pages, keys.page_table, torch.tensor([2**62]))
    room = keys.page_table.shape[1] * keys.page_size
    scores = torch.randn(6, 50, generator=generator(2))
    got = kernel.select_blocks(scores, 4, query, keys, 5)
    full = IndexKeys(keys.pages, keys.page_table, torch.tensor([room]))
    want = select_blocks_reference(scores[:3], 4, query.rows(slice(0, 3)), full, 5)
    assert torch.equal(got[:3], want)
    assert (got[[1, 3, 4, 5]] == -1).all()
    few = kernel.select_blocks(scores[:, :3], 9, query, keys, 5)
    assert few.tolist()[0] == [0, 1, 2, (room - 1) // 5]


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("topk", [1, 20, 77, 500])
def test_tokens_of_blocks(topk, block_size):
    blocks = torch.randint(0, 90, (5, 20), generator=generator(topk)).sort(1).values.int()
    blocks += torch.arange(20, dtype=torch.int32)
    for row, count in enumerate((0, 1, 19, 20, 7)):
        blocks[row, count:] = -1
    width = 20 * block_size
    for scores in (cruel(5, width, topk), torch.randn(5, width, generator=generator(topk))):
        got = kernel.select_topk_in_blocks(scores, topk, blocks, block_size, "local")
        want = select_in_blocks_reference(scores, topk, blocks, block_size, "local")
        assert got.space == "local"
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.lengths, want.lengths)
        assert torch.equal(got.scores.view(torch.int32), want.scores.view(torch.int32))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", ["normal", "plateau", "cruel"])
def test_tokens_of_blocks_in_long_rows(kind):
    size, count = 96, 125
    blocks = torch.arange(3, 3 + 2 * count, 2, dtype=torch.int32).repeat(2, 1)
    blocks[1, 110:] = -1
    scores = torch.randn(2, size * count, generator=generator(5)) if kind != "cruel" else cruel(2, size * count, 5)
    scores = scores.relu().round() if kind == "plateau" else scores
    for topk in (64, 2048):
        got = kernel.select_topk_in_blocks(scores, topk, blocks, size)
        want = select_in_blocks_reference(scores, topk, blocks, size, "logical")
        assert torch.equal(got.indices, want.indices)
        assert torch.equal(got.lengths, want.lengths)
