"""Block means against a scalar fp32 sum and against fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thresher.cache import load_keys, pack_keys
from thresher.errors import ThresherError
from thresher.ops import dequantize_fp8, partial_means, pool_blocks, pool_keys, quantize_fp8


def keys(num: int, dim: int = 8, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    return quantize_fp8(torch.randn(num, dim, generator=gen) * 10.0 ** torch.randint(-3, 4, (num, 1), generator=gen))


def scalar_mean(values: torch.Tensor, scales: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """fp32, one key after the other, in numpy scalars."""
    out = []
    for d in range(values.shape[1]):
        total = np.float32(0)
        for s in range(start, end):
            total = np.float32(total + np.float32(values[s, d].item()) * np.float32(scales[s].item()))
        out.append(total / np.float32(end - start))
    return torch.tensor(np.array(out))


def same(got, want) -> bool:
    return torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1], want[1])


@pytest.mark.parametrize(("num", "block"), [(24, 8), (27, 8), (5, 1), (14, 7), (33, 16)])
def test_bits_of_a_scalar_sum(num, block):
    values, scales = keys(num)
    want = quantize_fp8(torch.stack([scalar_mean(values, scales, b * block, (b + 1) * block) for b in range(num // block)]))
    assert same(pool_keys(values, scales, block), want)


def test_is_the_mean():
    values, scales = keys(64, 32)
    exact = (values.double() * scales.double()[:, None]).view(4, 16, 32).mean(1)
    got = dequantize_fp8(*pool_keys(values, scales, 16)).double()
    step = exact.abs().amax(1, keepdim=True) * 2**-4
    assert ((got - exact).abs() <= torch.maximum(exact.abs() * 2**-4, step * 2**-5) + 1e-9).all()


@pytest.mark.parametrize("num", [0, 1, 7])
def test_no_full_block(num):
    values, scales = keys(num)
    got = pool_keys(values, scales, 8)
    assert got[0].shape == (0, 8)
    assert got[1].shape == (0,)


def test_a_block_does_not_feel_its_neighbours():
    values, scales = keys(50)
    whole = pool_keys(values, scales, 10)
    for b in range(5):
        alone = pool_keys(values[b * 10 : b * 10 + 10], scales[b * 10 : b * 10 + 10], 10)
        assert same(alone, (whole[0][b : b + 1], whole[1][b : b + 1]))


@pytest.mark.parametrize("block", [1, 3, 8, 100])
def test_partial_bits_of_a_scalar_sum(block):
    values, scales = keys(23)
    positions = torch.tensor([22, 0, 7, 8, 8, 5, 15, -1, 21])
    got = partial_means(values, scales, block, positions)
    for i, t in enumerate(positions.tolist()):
        want = scalar_mean(values, scales, t // block * block, t + 1) if t >= 0 else torch.zeros(8)
        assert same((got[0][i], got[1][i]), quantize_fp8(want))


def test_the_end_of_a_block_is_the_full_block():
    values, scales = keys(48)
    assert same(partial_means(values, scales, 16, torch.tensor([15, 31, 47])), pool_keys(values, scales, 16))


def test_partial_ignores_what_comes_later_and_who_else_asks():
    values, scales = keys(40)
    positions = torch.arange(20)
    want = partial_means(values, scales, 16, positions)
    later = values.clone()
    later.view(torch.uint8)[20:] = 0x7F
    assert same(partial_means(later, scales, 16, positions), want)
    assert same(partial_means(values[:20], scales[:20], 16, positions), want)
    for i in range(20):
        assert same(partial_means(values, scales, 16, positions[i : i + 1]), (want[0][i : i + 1], want[1][i : i + 1]))


def test_no_queries():
    got = partial_means(*keys(10), 4, torch.zeros(0).long())
    assert got[0].shape == (0, 8)
    assert partial_means(*keys(0), 4, torch.tensor([-1, -1]))[0].shape == (2, 8)


def test_refuses():
    values, scales = keys(10)
    for bad in ((values, scales, 0), (values.float(), scales, 4), (values, scales[:9], 4), (values, scales.double(), 4)):
        with pytest.raises(ThresherError, match="must"):
            pool_keys(*bad)
    for positions in (torch.tensor([10]), torch.tensor([-2]), torch.tensor([1.0]), torch.tensor([[1]])):
        with pytest.raises(ThresherError, match="positions must"):
            partial_means(values, scales, 4, positions)
    broken = values.clone()
    broken.view(torch.uint8)[3, 3] = 0x7F
    with pytest.raises(ThresherError, match="must be finite"):
        pool_keys(broken, scales, 5)


def test_all_blocks_in_pages():
    """Requests of many lengths, one with more blocks than a page holds; past the full blocks there are zeros."""
    pairs = [keys(n) for n in (500, 0, 3, 41)]
    means = pool_blocks(pack_keys(pairs, 8), 4)
    assert means.lengths.tolist() == [125, 0, 0, 10]
    assert (means.page_size, means.room) == (64, 128)
    for request, pair in enumerate(pairs):
        assert same(load_keys(means, request), pool_keys(*pair, 4))
    assert not means.pages[3:6].any()
    no_room = pool_blocks(pack_keys([keys(0)], 8), 64)
    assert (no_room.lengths.tolist(), no_room.room) == ([0], 64)
