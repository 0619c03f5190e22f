"""Index scores: exact against scalar arithmetic, and the same bits in every form."""

from __future__ import annotations

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from thresher.cache.index_keys import pack_keys
from thresher.errors import ThresherError
from thresher.ops import gathered_index_score, index_score, paged_index_score, quantize_fp8
from thresher.types import IndexKeys, IndexQuery

INF = float("inf")


def finite_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    """e4m3 vectors over all finite codes: the widest spread of magnitudes the format has."""
    codes = torch.randint(0, 0x7F, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.uint8) * 0x80
    return (codes | signs).view(torch.float8_e4m3fn)


def world(num: int, heads: int, dim: int, lengths: list[int], seed: int = 0, page_size: int = 64):
    gen = torch.Generator().manual_seed(seed)
    pairs = [quantize_fp8(torch.randn(n, dim, generator=gen)) for n in lengths]
    q, _ = quantize_fp8(torch.randn(num, heads, dim, generator=gen))
    requests = torch.randint(0, len(lengths), (num,), generator=gen)
    room = torch.tensor(lengths)[requests]
    positions = (torch.rand(num, generator=gen) * (room + 1)).long() - 1
    query = IndexQuery(q, torch.randn(num, heads, generator=gen), positions, requests)
    return query, pairs, pack_keys(pairs, page_size)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


def ragged(query: IndexQuery, pair, rows=slice(None), left=0, right=None) -> torch.Tensor:
    values, scales = pair[0][left:right], pair[1][left:right]
    num = len(query.positions[rows])
    return index_score(query.q[rows], query.weights[rows], values, scales, torch.zeros(num).long(), torch.full((num,), len(values)))


def test_bits_of_scalar_arithmetic():
    num, heads, dim, keys = 3, 5, 16, 9
    q, k = finite_bytes(num, heads, dim), finite_bytes(keys, dim, seed=7)
    weights, scales = torch.randn(num, heads), torch.tensor([2.0**-e for e in range(keys)])
    got = index_score(q, weights, k, scales, torch.zeros(num).long(), torch.full((num,), keys))
    for i in range(num):
        for s in range(keys):
            total = np.float32(0)
            for h in range(heads):
                exact = sum(Fraction(a) * Fraction(b) for a, b in zip(q[i, h].double().tolist(), k[s].double().tolist(), strict=True))
                dot = max(np.float32(float(exact)), np.float32(0))
                total = np.float32(total + np.float32(np.float32(weights[i, h].item()) * dot))
            assert got[i, s].item() == float(np.float32(total * np.float32(scales[s].item())))


def test_value_against_fp64():
    query, pairs, _ = world(6, 8, 64, [150])
    values, scales = pairs[0][0].double(), pairs[0][1].double()
    terms = query.weights.double()[:, :, None] * torch.einsum("qhd,nd->qhn", query.q.double(), values).relu() * scales
    # one rounding of the dot, one of the product, H - 1 of the sum; the scale is a power of two
    bound = (8 + 1) * 2.0**-24 * terms.abs().sum(1)
    assert ((ragged(query, pairs[0]).double() - terms.sum(1)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unquantised_inputs(dtype):
    gen = torch.Generator().manual_seed(3)
    q, k = torch.randn(4, 6, 32, generator=gen).to(dtype), torch.randn(40, 32, generator=gen).to(dtype)
    weights = torch.randn(4, 6, generator=gen)
    got = index_score(q, weights, k, torch.ones(40), torch.zeros(4).long(), torch.full((4,), 40))
    want = torch.einsum("qh,qhn->qn", weights.double(), torch.einsum("qhd,nd->qhn", q.double(), k.double()).relu())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_same_bits_whatever_the_shape(monkeypatch):
    num, keys, dim = 7, 83, 512
    query = IndexQuery(finite_bytes(num, 16, dim), torch.randn(num, 16), torch.zeros(num).long(), torch.zeros(num).long())
    pair = (finite_bytes(keys, dim, seed=5), torch.rand(keys) + 0.5)
    whole = bits(ragged(query, pair))
    for i in range(num):
        assert torch.equal(bits(ragged(query, pair, slice(i, i + 1))), whole[i : i + 1])
    for left, right in ((0, 1), (3, 20), (20, 83), (82, 83)):
        assert torch.equal(bits(ragged(query, pair, left=left, right=right)), whole[:, left:right])
    order = torch.randperm(keys, generator=torch.Generator().manual_seed(0))
    shuffled = ragged(query, (pair[0].view(torch.uint8)[order].view(pair[0].dtype), pair[1][order]))
    assert torch.equal(bits(shuffled), whole[:, order])
    for limit in (1, 16, 100, 3000):
        monkeypatch.setattr(sys.modules["thresher.ops.index_score.reference"], "chunk_elements", lambda device, n=limit: n)
        assert torch.equal(bits(ragged(query, pair)), whole)


@pytest.mark.parametrize("page_size", [2, 61, 64])
def test_paged_gathered_and_ragged_agree_bit_for_bit(page_size):
    query, pairs, keys = world(20, 8, 32, [0, 1, 61, 64, 65, 130], page_size=page_size)
    paged = paged_index_score(query, keys)
    assert paged.shape == (20, 130)
    everything = torch.arange(130).expand(20, 130)
    assert torch.equal(bits(gathered_index_score(query, keys, everything)), bits(paged))
    for i in range(20):
        request, seen = int(query.requests[i]), int(query.positions[i]) + 1
        alone = ragged(query, pairs[request], slice(i, i + 1))
        assert torch.equal(bits(paged[i, :seen]), bits(alone[0, :seen]))
        assert (paged[i, seen:] == -INF).all()
        assert torch.equal(bits(paged_index_score(query.rows(torch.tensor([i])), keys)[0]), bits(paged[i]))


def test_queries_past_the_keys_see_what_is_held():
    query, pairs, keys = world(3, 4, 16, [10, 30])
    query = IndexQuery(query.q, query.weights, torch.tensor([500, 500, -1]), torch.tensor([0, 1, 1]))
    got = paged_index_score(query, keys)
    assert torch.isfinite(got[0, :10]).all()
    assert (got[0, 10:] == -INF).all()
    assert torch.equal(bits(got[1]), bits(ragged(query, pairs[1], slice(1, 2))[0]))
    assert (got[2] == -INF).all()


def test_garbage_in_unused_pages_and_tables_is_never_read():
    query, _, keys = world(8, 4, 16, [70, 5])
    clean = paged_index_score(query, keys)
    poisoned = torch.cat([keys.pages, torch.full_like(keys.pages[:2], 0xFF)])
    poisoned[int(keys.page_table[1, 0])].view(-1)[5 * 16 : 64 * 16] = 0x7F
    table = keys.page_table.masked_fill(keys.page_table < 0, len(keys.pages) + 1)
    dirty = IndexKeys(poisoned, table, keys.lengths)
    assert torch.equal(bits(paged_index_score(query, dirty)), bits(clean))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gathered_garbage_positions_are_no_candidates(dtype):
    query, _, keys = world(4, 4, 16, [40])
    query = IndexQuery(query.q, query.weights, torch.tensor([39, 10, 0, -1]), query.requests)
    row = torch.tensor([-(2**31), -7, -1, 0, 10, 11, 39, 40, 2**31 - 1], dtype=dtype)
    got = gathered_index_score(query, keys, row.expand(4, -1))
    paged = paged_index_score(query, keys)
    for i in range(4):
        for column, position in enumerate(row.tolist()):
            in_sight = 0 <= position <= int(query.positions[i])
            want = paged[i, position].item() if in_sight else -INF
            assert got[i, column].item() == want
    assert gathered_index_score(query, keys, row[:0].expand(4, -1)).shape == (4, 0)


def test_gathered_positions_may_repeat_and_come_in_any_order():
    query, _, keys = world(5, 4, 16, [64])
    query = IndexQuery(query.q, query.weights, torch.full((5,), 63), query.requests)
    positions = torch.randint(0, 64, (5, 200), generator=torch.Generator().manual_seed(2))
    assert torch.equal(bits(gathered_index_score(query, keys, positions)), bits(paged_index_score(query, keys).gather(1, positions)))


def test_fewer_heads_are_a_smaller_query():
    query, pairs, _ = world(4, 8, 32, [50])
    heads = torch.tensor([1, 4, 6])
    small = IndexQuery(query.q.view(torch.uint8)[:, heads].view(query.q.dtype), query.weights[:, heads], query.positions, query.requests)
    masked = IndexQuery(query.q, torch.zeros(4, 8).index_copy(1, heads, query.weights[:, heads]), query.positions, query.requests)
    assert torch.equal(bits(ragged(small, pairs[0])), bits(ragged(masked, pairs[0])))


def test_ranges():
    query, pairs, _ = world(6, 4, 16, [40])
    whole = ragged(query, pairs[0])
    starts, ends = torch.tensor([0, 5, 39, 40, 20, 0]), torch.tensor([40, 5, 40, 40, 10, 17])
    got = index_score(query.q, query.weights, *pairs[0], starts, ends)
    column = torch.arange(40)
    inside = (column >= starts[:, None]) & (column < ends[:, None])
    assert torch.equal(bits(got), bits(whole.masked_fill(~inside, -INF)))


def test_zero_scores_are_positive_zero():
    q = torch.full((2, 3, 16), -1.0).to(torch.float8_e4m3fn)
    k, scales = quantize_fp8(torch.ones(4, 16))
    got = index_score(q, -torch.ones(2, 3), k, scales, torch.zeros(2).long(), torch.full((2,), 4))
    assert (bits(got) == 0).all()


def test_a_broken_key_spoils_its_own_column_only():
    query, pairs, _ = world(3, 4, 16, [20])
    values, scales = pairs[0][0].clone(), pairs[0][1]
    whole = ragged(query, pairs[0])
    values.view(torch.uint8)[7, 3] = 0x7F
    got = ragged(query, (values, scales))
    assert got[:, 7].isnan().all()
    others = [c for c in range(20) if c != 7]
    assert torch.equal(bits(got[:, others]), bits(whole[:, others]))


def test_empty_shapes():
    query, pairs, keys = world(2, 4, 16, [10])
    none = torch.zeros(0).long()
    assert index_score(query.q[:0], query.weights[:0], *pairs[0], none, none).shape == (0, 10)
    assert ragged(query, (pairs[0][0][:0], pairs[0][1][:0])).shape == (2, 0)
    assert paged_index_score(query.rows(none), keys).shape == (0, 10)
    assert gathered_index_score(query.rows(none), keys, torch.zeros(0, 3).long()).shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(2, 16)),
        ("q", torch.zeros(2, 4, 16).long()),
        ("k", torch.zeros(10, 8)),
        ("weights", torch.zeros(2, 4).double()),
        ("weights", torch.zeros(2, 3)),
        ("k_scales", torch.ones(9)),
        ("starts", torch.tensor([-1, 0])),
        ("starts", torch.zeros(2)),
        ("ends", torch.tensor([11, 0])),
    ],
)
def test_ragged_refuses(name, value):
    call = {
        "q": torch.zeros(2, 4, 16),
        "weights": torch.zeros(2, 4),
        "k": torch.zeros(10, 16),
        "k_scales": torch.ones(10),
        "starts": torch.zeros(2).long(),
        "ends": torch.full((2,), 10),
    }
    with pytest.raises(ThresherError, match=name):
        index_score(**(call | {name: value}))


def test_paged_refuses():
    query, _, keys = world(2, 4, 16, [10])
    lost = IndexQuery(query.q, query.weights, query.positions, torch.tensor([0, 1]))
    with pytest.raises(ThresherError, match=r"requests must be in 0\.\.0"):
        paged_index_score(lost, keys)
    narrow = IndexQuery(torch.zeros(2, 4, 8), query.weights, query.positions, query.requests)
    with pytest.raises(ThresherError, match="head dim 16"):
        paged_index_score(narrow, keys)
    with pytest.raises(ThresherError, match="positions must be"):
        gathered_index_score(query, keys, torch.zeros(3, 5).long())
