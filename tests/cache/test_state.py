import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import BlockMeans, IndexKeyCache, LayerState, PageTable, load_keys
from thresher.cache.fp8 import quantize_fp8
from thresher.errors import ThresherError
from thresher.ops import grow_means, pool_keys
from thresher.types import IndexKeys, Selection

DIM = 8


class Paged:
    """Two requests grown and cut like a decoder would."""

    def __init__(self):
        self.table, self.cache = PageTable(2, 60, 4), IndexKeyCache(60, DIM, 4)
        self.held = [torch.zeros(0, DIM), torch.zeros(0, DIM)]

    def append(self, request, x):
        self.cache.store(self.table.append(request, len(x)), *quantize_fp8(x))
        self.held[request] = torch.cat((self.held[request], x))

    def rollback(self, request, length):
        self.table.rollback(request, length)
        self.held[request] = self.held[request][:length]

    def keys(self):
        return self.cache.view(self.table.table, self.table.lengths)


STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 13), st.booleans()), max_size=12)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 6), st.integers(0, 2**16))
def test_grown_and_cut_means_have_the_bits_of_fresh_ones(steps, block_size, seed):
    made = torch.Generator().manual_seed(seed)
    paged, state = Paged(), LayerState(3)
    means = state.block_means(block_size, grow_means)
    for grow, request, number, look in steps:
        if grow:
            paged.append(request, torch.randn(number, DIM, generator=made))
        else:
            length = max(0, len(paged.held[request]) - number)
            paged.rollback(request, length)
            state.rollback(request, length)
        if look:
            means.update(paged.keys())
    got = means.update(paged.keys())
    assert got.lengths.tolist() == [len(held) // block_size for held in paged.held]
    for request in range(2):
        want = pool_keys(*quantize_fp8(paged.held[request]), block_size)
        values, scales = load_keys(got, request)
        assert torch.equal(values.view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(scales, want[1])


def test_only_new_blocks_are_pooled():
    seen = []

    def counting(keys, means, pooled, tickets, block_size):
        seen.append((pooled.tolist(), keys.lengths.tolist()))
        grow_means(keys, means, pooled, tickets, block_size)

    paged, means = Paged(), BlockMeans(4, counting)
    for count in (9, 2):
        paged.append(0, torch.randn(count, DIM))
        means.update(paged.keys())
    means.rollback(0, 6)
    paged.rollback(0, 6)
    means.update(paged.keys())
    assert seen == [([0, 0], [9, 0]), ([9, 0], [11, 0]), ([6, 0], [6, 0])], "9 and 11 tokens are two blocks; a cut is heard of"


def test_room_grows_with_the_table_and_what_is_held_stays():
    paged, means = Paged(), BlockMeans(2, grow_means)
    paged.append(0, torch.randn(5, DIM))
    few = means.update(IndexKeys(paged.cache.pages, paged.table.table[:1, :2].contiguous(), paged.table.lengths[:1]))
    assert (few.num_requests, few.lengths.tolist()) == (1, [2])
    held = load_keys(few, 0)[0].clone()
    paged.append(1, torch.randn(140, DIM))
    grown = means.update(paged.keys())
    assert grown.lengths.tolist() == [2, 70]
    assert torch.equal(load_keys(grown, 0)[0].view(torch.uint8), held.view(torch.uint8))
    assert means.update(paged.keys()).pages is grown.pages
    assert means.update(IndexKeys(paged.cache.pages, paged.table.table[:1], paged.table.lengths[:1])).lengths.tolist() == [2]


def test_a_cut_without_rollback_is_noticed():
    paged, means = Paged(), BlockMeans(4, grow_means)
    paged.append(1, torch.randn(8, DIM))
    means.update(paged.keys())
    paged.rollback(1, 3)
    with pytest.raises(ThresherError, match=r"call rollback\(1, length\)"):
        means.update(paged.keys())


def test_bad_sizes():
    with pytest.raises(ThresherError, match="block_size must be at least 1"):
        LayerState(0).block_means(0, grow_means)
    with pytest.raises(ThresherError, match="length must be at least 0"):
        BlockMeans(4, grow_means).rollback(0, -1)
    BlockMeans(4, grow_means).rollback(5, 0)  # nothing is held yet


def test_state_keeps_means_by_block_size_and_drops_the_steps_selections():
    shared = {}
    first, second = LayerState(0, shared), LayerState(1, shared)
    assert first.block_means(4, grow_means) is first.block_means(4, grow_means)
    assert first.block_means(4, grow_means) is not first.block_means(8, grow_means)
    assert first.block_means(4, grow_means) is not second.block_means(4, grow_means)
    first.selections[0] = Selection(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int64))
    assert second.selections is first.selections
    second.rollback(0, 0)
    assert first.selections == {}
