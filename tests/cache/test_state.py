import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import BlockMeans, IndexKeyCache, LayerState, PageTable, load_keys
from thresher.cache.fp8 import quantize_fp8
from thresher.errors import ThresherError
from thresher.types import Selection

DIM = 8


def pool(values, scales, block_size):
    """Mean of each full block, as the injected operation must give it; only the calls around it are tested here."""
    wide = (values.float() * scales[:, None]).unflatten(0, (-1, block_size))
    return quantize_fp8(wide.mean(dim=1))


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
    means = state.block_means(block_size, pool)
    for grow, request, number, look in steps:
        if grow:
            paged.append(request, torch.randn(number, DIM, generator=made))
        else:
            length = max(0, len(paged.held[request]) - number)
            paged.rollback(request, length)
            state.rollback(request, length)
        if look:
            means.update(paged.keys())
    means.update(paged.keys())
    for request in range(2):
        full = len(paged.held[request]) // block_size
        want = pool(*quantize_fp8(paged.held[request][: full * block_size]), block_size)
        got = means.of(request)
        assert got[0].shape == (full, DIM)
        assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(got[1], want[1])


def test_only_new_blocks_are_pooled():
    seen = []

    def counting(values, scales, block_size):
        seen.append(len(scales))
        return pool(values, scales, block_size)

    paged, means = Paged(), BlockMeans(4, counting)
    for count in (9, 2, 1, 0):
        paged.append(0, torch.randn(count, DIM))
        means.update(paged.keys())
    assert seen == [8, 4]


def test_packed_means_are_kept_until_a_mean_comes_or_goes():
    paged, means = Paged(), BlockMeans(2, pool)
    paged.append(0, torch.randn(5, DIM))
    means.update(paged.keys())
    packed = means.packed(2)
    assert packed.lengths.tolist() == [2, 0]
    paged.append(0, torch.randn(0, DIM))
    means.update(paged.keys())
    means.rollback(0, 5)
    assert means.packed(2) is packed
    assert means.packed(1).lengths.tolist() == [2]
    paged.append(1, torch.randn(140, DIM))
    means.update(paged.keys())
    grown = means.packed(2)
    assert grown.lengths.tolist() == [2, 70]
    means.rollback(1, 9)
    for now, counts in ((grown, (2, 70)), (means.packed(2), (2, 4))):
        assert now.lengths.tolist() == list(counts)
        for request, count in enumerate(counts):
            values, scales = load_keys(now, request)
            want = pool(*quantize_fp8(paged.held[request][: 2 * count]), 2)
            assert torch.equal(values.view(torch.uint8), want[0].view(torch.uint8))
            assert torch.equal(scales, want[1])
    with pytest.raises(ThresherError, match="must come before"):
        means.packed(3)
    with pytest.raises(ThresherError, match="num_requests"):
        means.packed(0)


def test_a_cut_without_rollback_is_noticed():
    paged, means = Paged(), BlockMeans(4, pool)
    paged.append(1, torch.randn(8, DIM))
    means.update(paged.keys())
    paged.rollback(1, 3)
    with pytest.raises(ThresherError, match=r"call rollback\(1, length\)"):
        means.update(paged.keys())


def test_of_before_update_and_bad_sizes():
    with pytest.raises(ThresherError, match="must come before"):
        BlockMeans(4, pool).of(0)
    with pytest.raises(ThresherError, match="block_size must be at least 1"):
        LayerState(0).block_means(0, pool)
    with pytest.raises(ThresherError, match="length must be at least 0"):
        BlockMeans(4, pool).rollback(0, -1)


def test_state_keeps_means_by_block_size_and_drops_the_steps_selections():
    shared = {}
    first, second = LayerState(0, shared), LayerState(1, shared)
    assert first.block_means(4, pool) is first.block_means(4, pool)
    assert first.block_means(4, pool) is not first.block_means(8, pool)
    assert first.block_means(4, pool) is not second.block_means(4, pool)
    first.selections[0] = Selection(torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int64))
    assert second.selections is first.selections
    second.rollback(0, 0)
    assert first.selections == {}
