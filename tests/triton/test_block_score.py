"""Scores of blocks in the interpreter: the gathered form's bits at the same positions, whatever the sizes of blocks, pages and tiles."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from thresher.ops import block_index_score
from thresher.types import IndexKeys, IndexQuery

from .test_index_score import INF, bits, interpreted, poisoned, world

kernels = importlib.import_module("thresher.ops.index_score.triton")
pytestmark = interpreted
GARBAGE = torch.tensor([-(2**31), 2**31 - 1, -1, 1 << 30, 2**25], dtype=torch.int32)


def tokens_of(blocks: torch.Tensor, block_size: int) -> torch.Tensor:
    """int64 positions, block after block; -1 for what is no block."""
    tokens = (blocks.long()[:, :, None] * block_size + torch.arange(block_size)).flatten(1)
    return tokens.masked_fill((blocks < 0).repeat_interleave(block_size, 1), -1)


def draw_blocks(num: int, count: int, most: int, seed: int = 0) -> torch.Tensor:
    """Rows in any order, with repeats, and -1 at the end of some, everywhere in one."""
    blocks = torch.randint(-1, most, (num, count), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    blocks[num // 2] = -1
    blocks[num // 3, count // 2 :] = -1
    return blocks


def check(query: IndexQuery, keys: IndexKeys, blocks: torch.Tensor, block_size: int) -> None:
    width = blocks.shape[1] * block_size
    got = kernels.block_index_score(query, keys, blocks, block_size, out=poisoned(len(blocks), width))
    tokens = tokens_of(blocks, block_size)
    assert torch.equal(bits(got), bits(kernels.gathered_index_score(query, keys, tokens)))
    assert torch.equal(bits(got), bits(block_index_score(query, keys, blocks, block_size)))


@pytest.mark.parametrize("page_size", [64, 61, 128, 32])
@pytest.mark.parametrize("block_size", [64, 128, 5, 96, 1])
def test_the_bits_of_the_gathered_form(block_size, page_size):
    query, keys = world(6, 8, 64, [300, 0, 193], page_size)
    check(query, keys, draw_blocks(6, max(3, 150 // block_size), 300 // block_size + 2), block_size)


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (5, 128), (16, 128), (64, 128), (128, 64)])
def test_heads(heads, dim):
    query, keys = world(4, heads, dim, [150, 193])
    check(query, keys, draw_blocks(4, 3, 4), 64)


@pytest.mark.parametrize("tiles", [1, 2, 4])
@pytest.mark.parametrize("block_size", [192, 40])
def test_chunks_begin_and_end_anywhere_in_a_block(monkeypatch, block_size, tiles):
    monkeypatch.setattr(kernels, "key_tiles", lambda rows, width: tiles)
    query, keys = world(5, 8, 64, [700, 193])
    check(query, keys, draw_blocks(5, 3, 700 // block_size + 1), block_size)


@pytest.mark.parametrize("block_size", [64, 7])
def test_garbage_is_out_of_sight(block_size):
    """Block numbers, requests, positions, lengths and pages from anywhere."""
    query, keys = world(6, 8, 64, [150, 193])
    query = replace(
        query,
        positions=torch.tensor([2**62, -(2**63), 2**31, 149, 149, 149]),
        requests=torch.tensor([0, 0, 0, 0, 2**40, -1]),
    )
    table = keys.page_table.clone()
    table[0, 1] = 2**31 - 1
    keys = replace(keys, page_table=table, lengths=torch.tensor([2**62, 5]))
    blocks = torch.cat((GARBAGE, torch.arange(4, dtype=torch.int32))).expand(6, -1)
    width = blocks.shape[1] * block_size
    got = kernels.block_index_score(query, keys, blocks, block_size, out=poisoned(6, width))
    tokens = tokens_of(blocks, block_size)
    assert torch.equal(bits(got), bits(kernels.gathered_index_score(query, keys, tokens)))
    hole = (tokens >= 64) & (tokens < 128)
    assert (got[hole] == -INF).all()
    assert (got[[1, 4, 5]] == -INF).all()
    assert torch.isfinite(got[0][tokens[0] == 0]).all()


def test_one_score_whatever_the_form():
    """Any fp32 weights: the head sum rounds, in an order that no form may change."""
    query, keys = world(5, 64, 64, [200])
    gen = torch.Generator().manual_seed(4)
    query = replace(query, weights=torch.randn(5, 64, generator=gen), positions=torch.full((5,), 199))
    blocks = torch.tensor([[2, 0, 1, 3]], dtype=torch.int32).expand(5, -1)
    got = kernels.block_index_score(query, keys, blocks, 64)
    paged = torch.nn.functional.pad(kernels.paged_index_score(query, keys), (0, 56), value=-INF)
    assert torch.equal(bits(got), bits(paged.gather(1, tokens_of(blocks, 64))))


def test_stale_bytes_and_strides_do_not_show():
    query, keys = world(4, 8, 64, [70, 64])
    blocks = draw_blocks(4, 4, 3)
    before = kernels.block_index_score(query, keys, blocks, 32)
    keys.pages[1].view(-1)[6 * 64 : 64 * 64] = 0x7F
    wide = torch.full((4, 8), 2**30, dtype=torch.int32)
    wide[:, ::2] = blocks
    out = poisoned(4, 140)
    got = kernels.block_index_score(query, keys, wide[:, ::2], 32, out=out[:, :128])
    assert torch.equal(bits(got), bits(before))
    assert out[:, 128:].isnan().all()


def test_nothing_to_score():
    query, keys = world(2, 8, 64, [0, 0])
    assert kernels.block_index_score(query, keys, torch.zeros(2, 0, dtype=torch.int32), 64).shape == (2, 0)
    assert (kernels.block_index_score(query, keys, torch.zeros(2, 2, dtype=torch.int32), 64) == -INF).all()
    none = query.rows(slice(0, 0))
    assert kernels.block_index_score(none, keys, torch.zeros(0, 2, dtype=torch.int32), 64).shape == (0, 128)
