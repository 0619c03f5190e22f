"""Which way hisa_select goes, and that the four operations behind it are HISA's."""

from __future__ import annotations

import pytest
import torch

from thresher import ops
from thresher.cache import LayerState, pack_keys
from thresher.cache.block_means import BlockMeans
from thresher.errors import ThresherError
from thresher.ops import dispatch
from thresher.ops.hisa_select import cuda
from thresher.ops.hisa_select.reference import choose_blocks
from thresher.selectors import DSA, HISA
from thresher.types import IndexKeys, IndexQuery

from .stand_ins import put_in, stand_in

BLOCK = 16


def world(lengths=(200, 90), num=5) -> tuple[IndexQuery, IndexKeys]:
    gen = torch.Generator().manual_seed(num)
    keys = pack_keys([ops.quantize_fp8(torch.randn(length, 64, generator=gen)) for length in lengths])
    q, _ = ops.quantize_fp8(torch.randn(num, 3, 64, generator=gen))
    requests = torch.arange(num) % len(lengths)
    positions = torch.tensor(lengths)[requests] - 1 - torch.arange(num)
    return IndexQuery(q, torch.randn(num, 3, generator=gen), positions, requests), keys


def test_tokens_are_of_the_blocks_chosen_by_their_means():
    query, keys = world()
    means = ops.pool_blocks(keys, BLOCK)
    got = ops.hisa_select(query, keys, means, 4, BLOCK, 20)
    blocks = choose_blocks(query, keys, means, 4, BLOCK)
    scores = ops.paged_index_score(query, keys)
    for row, chosen in enumerate(blocks.tolist()):
        assert chosen[0] == 0
        assert int(query.positions[row]) // BLOCK in chosen
        inside = torch.isin(torch.arange(scores.shape[1]) // BLOCK, torch.tensor(chosen))
        want = ops.select_topk(scores[row : row + 1].masked_fill(~inside, -torch.inf), 20)
        assert torch.equal(got.indices[row], want.indices[0])
        assert torch.equal(got.scores[row], want.scores[0])
    assert ops.hisa_select(query, keys, means, 4, BLOCK, 20, with_scores=False).scores is None
    whole = ops.hisa_select(query, keys, means, 20, BLOCK, 20)
    assert torch.equal(whole.indices, DSA(20).select(query, keys).indices), "all blocks are chosen"


def test_means_are_brought_up_to_date_first():
    query, keys = world()
    held = BlockMeans(BLOCK, lambda *given: pytest.fail("not by themselves"))
    fresh = ops.pool_blocks(keys, BLOCK)
    want = ops.hisa_select(query, keys, fresh, 4, BLOCK, 20)
    for length in (50, 90):
        few = IndexKeys(keys.pages, keys.page_table, keys.lengths.clamp(max=length))
        short = IndexQuery(query.q, query.weights, query.positions.clamp(max=length - 1), query.requests)
        ops.hisa_select(short, few, held.growing(few), 4, BLOCK, 20)
    growing = held.growing(keys)
    assert torch.equal(ops.hisa_select(query, keys, growing, 4, BLOCK, 20).indices, want.indices)
    assert torch.equal(growing.means.lengths, keys.lengths // BLOCK)
    cut = IndexKeys(keys.pages, keys.page_table, keys.lengths - 40)
    with pytest.raises(ThresherError, match=r"request 0 must hold the 12 blocks already pooled; got 10 full ones; call rollback\(0"):
        ops.hisa_select(query, cut, held.growing(cut), 4, BLOCK, 20)


@pytest.fixture
def module(monkeypatch):
    made = stand_in("hisa_select", "cuda", lambda num, requests: num < 5, "in one launch")
    put_in(monkeypatch, "hisa_select", {"cuda": made})
    return made


def test_auto_takes_the_kernel_where_it_can_run_and_is_faster(module):
    query, keys = world(num=4)
    means, state = ops.pool_blocks(keys, BLOCK), LayerState(0)
    assert ops.hisa_select(query, keys, means, 4, BLOCK, 20, scratch=state.scratch) == "in one launch"
    assert module.asked == [(4, 2)]
    assert module.seen[0][3:] == (4, BLOCK, 20, True, state.scratch)
    selector = HISA(BLOCK, 4, 20)
    assert selector.select(query, keys, state) == "in one launch"
    assert module.seen[1][2].pooled.tolist() == [0, 0], "means are the kernel's to bring up to date"
    many, _ = world(num=5)
    want = ops.hisa_select(many, keys, means, 4, BLOCK, 20, impl="reference")
    assert torch.equal(ops.hisa_select(many, keys, means, 4, BLOCK, 20).indices, want.indices)
    assert ops.hisa_select(many, keys, means, 4, BLOCK, 20, impl="cuda") == "in one launch", "whoever names it wants it"
    module.why = "the moon is full"
    assert torch.equal(ops.hisa_select(many, keys, means, 4, BLOCK, 20).indices, want.indices)
    with pytest.raises(ThresherError, match='impl="cuda" of hisa_select must be able to run; got: the moon is full'):
        ops.hisa_select(many, keys, means, 4, BLOCK, 20, impl="cuda")


def test_inside_using(module):
    """A name there is one for the four operations, but "cuda" is the kernel's."""
    query, keys = world(num=4)
    given = query, keys, ops.pool_blocks(keys, BLOCK), 4, BLOCK, 20
    with dispatch.using("reference"):
        assert ops.hisa_select(*given).indices.shape == (4, 20)
    with dispatch.using("triton"), pytest.raises(ThresherError, match='impl="triton" of paged_index_score'):
        ops.hisa_select(*given)
    assert module.seen == []
    with dispatch.using("cuda"):
        assert ops.hisa_select(*given) == "in one launch"


def test_what_the_kernel_takes(monkeypatch):
    query, keys = world()
    monkeypatch.setattr(cuda.step, "unsupported", lambda *given: None)
    monkeypatch.setattr(cuda, "unfit", lambda *given: None)
    means = ops.pool_blocks(keys, 64)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 2)
    for num_blocks, why in ((385, None), (386, "needs at most 1024 tiles of 64 keys a multiprocessor, not 1025")):
        assert cuda.unsupported(query, keys, means, num_blocks, 64, 20) == why
    assert cuda.unsupported(query, keys, means, 4, 16, 20) == "needs blocks of a multiple of 64 tokens, not 16"
    wide = IndexKeys(keys.pages, torch.full((2, 70 * 64), -1, dtype=torch.int32), keys.lengths)
    assert cuda.unsupported(query, wide, means, 4, 64, 20) == "needs room for the means of 4480 blocks, not 64"
    assert cuda.worthwhile(1, 1)
    assert cuda.worthwhile(64, 16)
    assert not cuda.worthwhile(64, 15)
    assert cuda.worthwhile(256, 128)
    assert not cuda.worthwhile(257, 128)
