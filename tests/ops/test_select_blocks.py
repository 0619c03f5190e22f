"""select_blocks and select_topk_in_blocks against sorting in Python."""

from __future__ import annotations

import math

import pytest
import torch

from thresher.cache import pack_keys
from thresher.errors import ThresherError
from thresher.ops import block_index_score, paged_index_score, select_blocks, select_topk, select_topk_in_blocks
from thresher.types import IndexKeys, IndexQuery

INF, NAN = math.inf, math.nan


def world(lengths: list[int], positions: list[int], requests: list[int]) -> tuple[IndexQuery, IndexKeys]:
    gen = torch.Generator().manual_seed(0)
    keys = pack_keys([(torch.randn(n, 16, generator=gen).to(torch.float8_e4m3fn), torch.ones(n)) for n in lengths], 8)
    q = torch.randn(len(positions), 2, 16, generator=gen).to(torch.float8_e4m3fn)
    return IndexQuery(q, torch.ones(len(positions), 2), torch.tensor(positions), torch.tensor(requests)), keys


def expected(row: list[float], seen: int, block_size: int, num_blocks: int) -> list[int]:
    if seen == 0:
        return []
    own = (seen - 1) // block_size
    between = [b for b in range(1, own) if row[b] != -INF]
    between.sort(key=lambda b: (math.isnan(row[b]), 0.0 if math.isnan(row[b]) else -row[b], b))
    return sorted({0, own, *between[: num_blocks - 2]})


@pytest.mark.parametrize("num_blocks", [2, 3, 5, 12, 40])
@pytest.mark.parametrize("block_size", [1, 4, 7, 100])
def test_blocks(block_size, num_blocks):
    query, keys = world([90, 0, 30], [-1, 0, 3, 4, 8, 89, 200, 29, 28, 5], [0, 0, 0, 0, 0, 0, 0, 2, 2, 1])
    width = 90 // block_size
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, NAN, -INF, INF])
    gen = torch.Generator().manual_seed(num_blocks)
    for scores in (torch.randn(10, width, generator=gen), values[torch.randint(7, (10, width), generator=gen)]):
        got = select_blocks(scores, num_blocks, query, keys, block_size)
        assert got.dtype == torch.int32
        assert got.shape == (10, min(num_blocks, width + 1))
        for row, position, request, chosen in zip(
            scores.tolist(), query.positions.tolist(), query.requests.tolist(), got.tolist(), strict=True
        ):
            want = expected(row, min(position + 1, [90, 0, 30][request]), block_size, num_blocks)
            assert chosen == want + [-1] * (len(chosen) - len(want))


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_tokens_in_blocks(block_size):
    query, keys = world([90, 40], [89, 55, 7, -1, 39], [0, 0, 0, 0, 1])
    blocks = torch.tensor([[0, 2, 3, 5], [0, 1, 4, 9], [0, -1, -1, -1], [-1] * 4, [1, 2, 88, 2**30]], dtype=torch.int32)
    scores = block_index_score(query, keys, blocks, block_size)
    paged = paged_index_score(query, keys)
    tokens = (blocks.long()[:, :, None] * block_size + torch.arange(block_size)).flatten(1)
    there = (blocks >= 0).repeat_interleave(block_size, 1) & (tokens < 90)
    column = tokens.masked_fill(~there, 0)
    assert torch.equal(scores, paged.gather(1, column).masked_fill(~there, -INF))
    only = torch.full_like(paged, -INF).scatter_reduce(1, column, scores, "amax")
    for topk in (1, 5, 70):
        got, want = select_topk_in_blocks(scores, topk, blocks, block_size, "local"), select_topk(only, topk)
        assert got.space == "local"
        for part in ("indices", "lengths", "scores"):
            assert torch.equal(getattr(got, part), getattr(want, part))


def test_scores_beside_no_block_are_no_candidates():
    blocks = torch.tensor([[2, 5, -1]], dtype=torch.int32)
    scores = torch.tensor([[1.0, 2.0, 3.0, 0.0, INF, INF]])
    assert select_topk_in_blocks(scores, 5, blocks, 2).indices.tolist() == [[4, 5, 10, 11, -1]]


def test_scores_to_another_width():
    query, keys = world([50, 20], [49, 30, 19, -1], [0, 0, 1, 1])
    whole = paged_index_score(query, keys)
    assert torch.equal(paged_index_score(query, keys, width=37), whole[:, :37])
    assert torch.equal(paged_index_score(query, keys, width=70), torch.nn.functional.pad(whole, (0, 20), value=-INF))
    assert paged_index_score(query, keys, width=0).shape == (4, 0)


def test_scores_that_are_not_of_these_blocks_are_refused():
    blocks = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ThresherError, match=r"scores must be float32 \[2, 12\]"):
        select_topk_in_blocks(torch.zeros(2, 11), 4, blocks[:, :3], 4)
    with pytest.raises(ThresherError, match="blocks must ascend strictly"):
        select_topk_in_blocks(torch.zeros(2, 12), 4, blocks, 4)
