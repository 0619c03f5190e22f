"""Every selector inside a placement over 1, 2 and 4 ranks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import LayerState
from thresher.distributed import IDSA, ExactMerge
from thresher.selectors import DSA, HISA, MISA, Dense, MISARerank, Window

from .worlds import SMALL, World, make_world, worlds

few = settings(max_examples=5, deadline=None, derandomize=True)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("selector", SMALL.values(), ids=SMALL.keys())
@few
@given(world=worlds(max_length=30), granularity=st.integers(1, 3))
def test_the_union_over_ranks_keeps_the_form_of_a_selection(selector, ranks, world: World, granularity):
    pairs = world.every_pair()
    placed = IDSA(selector, ranks, granularity=granularity)
    rows = world.select(placed, pairs)
    if selector.topk is not None:
        # local_topk * ranks covers topk, so a context within it is kept whole, as on one device
        assert all(row == list(range(p + 1)) for (_, p), row in zip(pairs, rows, strict=True) if p < selector.topk // ranks)
    assert world.select(placed, pairs, state=LayerState(0)) == rows
    if ranks == 1 and selector.topk is not None:
        assert world.select(IDSA(selector, 1, local_topk=selector.topk), pairs) == world.select(selector, pairs)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@few
@given(world=worlds(), granularity=st.integers(1, 3))
def test_exact_merge_of_dsa_is_dsa(ranks, world: World, granularity):
    pairs = world.every_pair()
    assert world.select(ExactMerge(DSA(7), ranks, granularity), pairs) == world.select(DSA(7), pairs)


@pytest.mark.parametrize("ranks", [2, 4])
def test_dense_over_ranks_is_everything(ranks):
    world = make_world([30, 7])
    pairs = world.every_pair()
    assert world.select(IDSA(Dense(), ranks), pairs) == world.select(Dense(), pairs)


def test_shards_of_selectors():
    assert DSA(2048).shard(4, 570) == DSA(570)
    assert MISA(8, 1024, 2048).shard(4, 570) == MISA(8, 1024, 570)
    assert MISARerank(8, 1024, 8192, 2048).shard(4, 570) == MISARerank(8, 1024, 2048, 570)
    assert MISARerank(8, 1024, 2048, 2048).shard(4, 570) == MISARerank(8, 1024, 570, 570), "never fewer candidates than kept tokens"
    assert HISA(128, 64, 2048).shard(4, 570) == HISA(128, 17, 570), "a quarter of the blocks and one"
    assert HISA(128, 16, 2048).shard(4, 1024) == HISA(128, 10, 1024), "room for the budget beside the two forced blocks"
    assert HISA(128, 16, 2048).shard(1, 2048) == HISA(128, 16, 2048), "not more than one device has"
    assert Window(2048, 4).shard(4, 512) == Window(512, 1)
    assert Window(4, 4).shard(1, 2) == Window(2, 2)
    assert Dense().shard(4, 1) == Dense()
