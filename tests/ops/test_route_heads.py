"""Head mass against the formula in fp64, its causality bit by bit, and the heads it picks."""

from __future__ import annotations

import sys

import pytest
import torch

from thresher.cache.index_keys import pack_keys
from thresher.errors import ThresherError
from thresher.ops import dequantize_fp8, head_mass, partial_means, pool_blocks, pool_keys, quantize_fp8, route_heads, routed_query
from thresher.types import IndexQuery


def world(positions: list[int], requests: list[int], lengths: list[int], heads: int = 6, dim: int = 16, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    pairs = [quantize_fp8(torch.randn(n, dim, generator=gen)) for n in lengths]
    q, _ = quantize_fp8(torch.randn(len(positions), heads, dim, generator=gen))
    query = IndexQuery(q, torch.randn(len(positions), heads, generator=gen), torch.tensor(positions), torch.tensor(requests))
    return query, pairs, pack_keys(pairs)


def pooled(pairs, block):
    return [pool_keys(*pair, block) for pair in pairs]


@pytest.mark.parametrize("block", [1, 4, 7, 16, 64])
def test_matches_the_formula(block):
    positions, requests = [0, 3, 15, 16, 30, 44, 12, 99, -1], [0, 0, 1, 1, 1, 1, 0, 0, 1]
    query, pairs, keys = world(positions, requests, [20, 45])
    got = head_mass(query, pooled(pairs, block), keys, block)
    assert got.dtype == torch.float32
    assert torch.equal(head_mass(query, pool_blocks(keys, block), keys, block), got), "means in pages are the same"
    for i, (position, request) in enumerate(zip(positions, requests, strict=True)):
        last = min(position, len(pairs[request][0]) - 1)
        if last < 0:
            assert (got[i] == 0).all()
            continue
        # the stored means are FP8: that rounding belongs to the definition, so they come from partial_means, tested on its own
        ends = [min((b + 1) * block - 1, last) for b in range(last // block + 1)]
        means = dequantize_fp8(*partial_means(*pairs[request], block, torch.tensor(ends))).double()
        dots = query.q[i].double() @ means.T
        want = (query.weights[i].double()[:, None] * dots.relu()).abs().mean(1)
        torch.testing.assert_close(got[i].double(), want, rtol=1e-6, atol=1e-9)


def test_later_tokens_and_other_queries_change_no_bit(monkeypatch):
    positions = list(range(40))
    query, pairs, keys = world(positions, [0] * 40, [90])
    want = head_mass(query, pooled(pairs, 8), keys, 8)
    short = [(v[:40], s[:40]) for v, s in pairs]
    assert torch.equal(head_mass(query, pooled(short, 8), pack_keys(short), 8), want)
    for i in range(40):
        one = query.rows(torch.tensor([i]))
        cut = [(v[: i + 1], s[: i + 1]) for v, s in pairs]
        assert torch.equal(head_mass(one, pooled(cut, 8), pack_keys(cut), 8)[0], want[i])
    monkeypatch.setattr(sys.modules["thresher.ops.route_heads.reference"], "chunk_elements", lambda device: 1)
    assert torch.equal(head_mass(query, pooled(pairs, 8), keys, 8), want)


def test_broken_means_past_the_query_are_not_read():
    query, pairs, keys = world([15, 9], [0, 0], [64])
    means = pooled(pairs, 8)
    want = head_mass(query, means, keys, 8)
    means[0][0].view(torch.uint8)[2:] = 0x7F
    means[0][1][2:] = torch.nan
    assert torch.equal(head_mass(query, means, keys, 8), want)


def test_requests_without_keys_or_queries():
    query, pairs, keys = world([4, 0], [2, 1], [10, 0, 10])
    got = head_mass(query, pooled(pairs, 4), keys, 4)
    assert (got[1] == 0).all()
    assert (got[0] > 0).any()
    none = query.rows(torch.zeros(0).long())
    assert head_mass(none, pooled(pairs, 4), keys, 4).shape == (0, 6)


def test_routes_by_means_in_pages():
    query, pairs, keys = world([19, 44, 30, -1], [0, 1, 1, 1], [20, 45])
    got, want = (routed_query(query, means, keys, 8, 2) for means in (pool_blocks(keys, 8), pooled(pairs, 8)))
    assert torch.equal(got.q.view(torch.uint8), want.q.view(torch.uint8))
    assert torch.equal(got.weights, want.weights)


def test_refuses_missing_means():
    query, pairs, keys = world([30], [0], [40])
    with pytest.raises(ThresherError, match="one pair per request"):
        head_mass(query, [], keys, 8)
    with pytest.raises(ThresherError, match="cover its 3 full blocks; got 2"):
        head_mass(query, [(pool_keys(*pairs[0], 8)[0][:2], pool_keys(*pairs[0], 8)[1][:2])], keys, 8)
    with pytest.raises(ThresherError, match="block_size"):
        head_mass(query, pooled(pairs, 8), keys, 0)
    lost = IndexQuery(query.q, query.weights, query.positions, torch.tensor([1]))
    with pytest.raises(ThresherError, match="requests must be"):
        head_mass(lost, pooled(pairs, 8), keys, 8)


@pytest.mark.parametrize("active", [1, 2, 5, 8])
def test_route_against_sorting(active):
    mass = torch.rand(30, 8, generator=torch.Generator().manual_seed(active)).mul(4).round()
    got = route_heads(mass, active)
    assert got.dtype == torch.int64
    for row, heads in zip(mass.tolist(), got.tolist(), strict=True):
        assert heads == sorted(sorted(range(8), key=lambda j: (-row[j], j))[:active])


def test_route_ties_zeros_and_nan():
    assert route_heads(torch.zeros(1, 5), 3).tolist() == [[0, 1, 2]]
    assert route_heads(torch.tensor([[-0.0, 0.0, -0.0]]), 1).tolist() == [[0]]
    assert route_heads(torch.tensor([[torch.nan, 0.0, 1.0]]), 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("active", [0, 6])
def test_route_refuses(active):
    with pytest.raises(ThresherError, match=r"active_heads must be in 1\.\.5"):
        route_heads(torch.zeros(1, 5), active)
