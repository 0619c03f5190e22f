"""Head mass against the fp64 reference, and the choice of heads to the bit."""

from __future__ import annotations

import pytest
import torch

from thresher.cache import pack_keys
from thresher.errors import ThresherError
from thresher.ops import head_mass, pool_keys, quantize_fp8, route_heads
from thresher.ops.route_heads import triton as kernels
from thresher.ops.route_heads.reference import keep_heads
from thresher.types import IndexKeys, IndexQuery

BLOCK = 3


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel is given to fill holds 0xFF."""
    empty = torch.empty

    def poison(*size, **kwargs):
        out = empty(*size, **kwargs)
        out.view(torch.uint8).fill_(0xFF)
        return out

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and segments in a short context."""
    monkeypatch.setattr(kernels, "SEGMENT", 32)
    monkeypatch.setattr(kernels, "BLOCKS", 16)
    monkeypatch.setattr(kernels, "LOOK", 4)


def case(heads: int, dim: int, lengths=(0, 200, 7), page_size=5, dtype=torch.float8_e4m3fn, seed=0):
    torch.manual_seed(seed)
    data = [quantize_fp8(torch.randn(n, dim)) for n in lengths]
    positions = torch.tensor([0, -1, 0, 1, 2, 198, 199, 2**40, 100, 95, 96, 5])
    requests = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 2])
    q, q_scales = quantize_fp8(torch.randn(len(positions), heads, dim))
    weights = torch.randn(len(positions), heads) * q_scales
    q = q if dtype == torch.float8_e4m3fn else torch.randn(q.shape).to(dtype)
    query = IndexQuery(q, weights, positions, requests)
    return query, [pool_keys(*each, BLOCK) for each in data], pack_keys(data, page_size)


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    # The interpreter's dot products are fp32: D products, up to 70 blocks, a handful of other steps.
    return bool(((got - want).abs() <= 2e-5 * want.abs() + 1e-12).all())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (5, 64), (16, 128), (128, 64)])
def test_mass_and_heads(heads, dim, dtype):
    query, means, keys = case(heads, dim, dtype=dtype)
    want = head_mass(query, means, keys, BLOCK)
    got = kernels.head_mass(query, means, keys, BLOCK)
    assert close(got, want)
    assert (got[[0, 1]] == 0).all(), "nothing in sight"
    active = (heads + 1) // 2
    paged = pack_keys(means, 7)
    mass, chosen = kernels.routed_heads(query, paged, keys, BLOCK, active)
    assert torch.equal(mass, got), "paged and listed means are the same"
    assert torch.equal(chosen, route_heads(mass, active))
    assert torch.equal(kernels.head_mass(query, means, keys, BLOCK), got)
    assert same_query(kernels.routed_query(query, means, keys, BLOCK, active), keep_heads(query, chosen))


def same_query(got: IndexQuery, want: IndexQuery) -> bool:
    pairs = [(getattr(got, name), getattr(want, name)) for name in ("q", "weights", "positions", "requests")]
    return all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


@pytest.mark.usefixtures("small_tiles")
def test_segments_in_one_program_or_in_many(monkeypatch):
    """Many queries leave their segments to one program each: the same bits, and the same heads."""
    query, means, keys = case(6, 64)
    mass = kernels.head_mass(query, means, keys, BLOCK)
    routed = kernels.routed_query(query, means, keys, BLOCK, 2)
    monkeypatch.setattr(kernels, "MANY_QUERIES", 0)
    assert torch.equal(kernels.head_mass(query, means, keys, BLOCK), mass)
    assert same_query(kernels.routed_query(query, means, keys, BLOCK, 2), routed)
    # One tile of means, which has no loop, and no means at all.
    monkeypatch.setattr(kernels, "BLOCKS", 128)
    assert close(kernels.head_mass(query, means, keys, BLOCK), mass)
    few = IndexKeys(keys.pages, keys.page_table, keys.lengths.clamp(max=2))
    none = [(values[:0], scales[:0]) for values, scales in means]
    assert close(kernels.head_mass(query, none, few, BLOCK), head_mass(query, none, few, BLOCK))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("block", [1, 3, 16, 64])
def test_queries_behind_one_another_are_served_by_one_walk(block):
    """Runs that cross blocks, break off, change request, stand still past the end, or go on at another request's position."""
    torch.manual_seed(block)
    data = [quantize_fp8(torch.randn(n, 64)) for n in (70, 40)]
    keys, means = pack_keys(data, 16), [pool_keys(*each, block) for each in data]
    positions = [*range(20, 52), *range(5, 9), 8, 7, *range(66, 75), -1, 0, 1, *range(9, 20), 12, 13, 13, 14, -1, 0]
    requests = [0] * 32 + [1] * 4 + [1, 1] + [0] * 9 + [1, 1, 1] + [1] * 4 + [0] * 7 + [0, 1, 1, 1, 9, 0]
    q, scales = quantize_fp8(torch.randn(len(positions), 4, 64))
    query = IndexQuery(q, torch.randn(scales.shape) * scales, torch.tensor(positions), torch.tensor(requests))
    whole = kernels.head_mass(query, means, keys, block)
    known = query.rows(query.requests < 2)
    assert close(whole[query.requests < 2], head_mass(known, means, keys, block))
    assert (whole[query.requests == 9] == 0).all()
    order = torch.randperm(len(positions))
    assert torch.equal(kernels.head_mass(query.rows(order), means, keys, block), whole[order])


@pytest.mark.usefixtures("small_tiles")
def test_bits_do_not_depend_on_company_or_on_what_comes_later():
    query, means, keys = case(6, 64)
    whole = kernels.head_mass(query, means, keys, BLOCK)
    for i in range(query.num_queries):
        assert torch.equal(kernels.head_mass(query.rows(slice(i, i + 1)), means, keys, BLOCK), whole[i : i + 1])
    # The same request when it held 97 tokens: the queries at 95 and 96 feel nothing of the rest.
    data_means = [(values[: 97 // BLOCK], scales[: 97 // BLOCK]) for values, scales in means]
    short = IndexKeys(keys.pages, keys.page_table, keys.lengths.clamp(max=97))
    early = query.rows(torch.tensor([9, 10]))
    assert torch.equal(kernels.head_mass(early, data_means, short, BLOCK), whole[9:11])


@pytest.mark.usefixtures("small_tiles")
def test_one_request_and_no_full_block():
    query, means, keys = case(4, 64, lengths=(200,))
    query = IndexQuery(query.q, query.weights, query.positions, torch.zeros_like(query.requests))
    assert close(kernels.head_mass(query, means, keys, BLOCK), head_mass(query, means, keys, BLOCK))
    query, means, keys = case(4, 64, lengths=(2,))
    query = IndexQuery(query.q, query.weights, query.positions, torch.zeros_like(query.requests))
    assert close(kernels.head_mass(query, means, keys, BLOCK), head_mass(query, means, keys, BLOCK))
    with pytest.raises(ThresherError, match="means must cover"):
        kernels.head_mass(query, means * 2, keys, BLOCK)


@pytest.mark.usefixtures("small_tiles")
def test_garbage_is_never_followed():
    query, means, keys = case(4, 64)
    wild = torch.tensor([-(2**63), -(2**31), -1, 3, 2**31 - 1, 2**62, 1, 1, 1, 1, 1, 1])
    query = IndexQuery(query.q, query.weights, query.positions, wild)
    assert (kernels.head_mass(query, means, keys, BLOCK)[:6] == 0).all()
    table = keys.page_table.clone()
    table[1, ::2] = torch.tensor(-(2**31))
    table[1, 1::2] = 2**31 - 1
    broken = IndexKeys(keys.pages, table, keys.lengths * 1000)
    assert kernels.head_mass(query, means, broken, BLOCK).isfinite().all()
    paged = pack_keys(means, 7)
    wild_means = IndexKeys(paged.pages, table[:, : paged.page_table.shape[1]].contiguous(), paged.lengths * 1000)
    assert kernels.head_mass(query, wild_means, keys, BLOCK).isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_sums_that_nobody_made_are_not_read(monkeypatch):
    """Lengths may claim more means than their table has room for. What lies behind the sums is NaN here."""
    query, means, keys = case(4, 64)
    paged = pack_keys(means, 7)
    many = torch.full_like(keys.lengths, 10**6)
    query = IndexQuery(query.q, query.weights, many[:1].expand(len(query.positions)).contiguous() - 1, query.requests)
    empty = torch.empty

    def before_nan(*size, **options):
        made = empty(*size, **options)
        if made.dtype != torch.float32:
            return made
        return torch.full((made.numel() + 4096,), torch.nan)[: made.numel()].view(made.shape)

    monkeypatch.setattr(torch, "empty", before_nan)
    mass = kernels.head_mass(query, IndexKeys(paged.pages, paged.page_table, many), IndexKeys(keys.pages, keys.page_table, many), BLOCK)
    assert mass.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_strided_queries_and_zeros():
    query, means, keys = case(8, 64)
    q = query.q.view(torch.uint8).repeat(1, 2, 1)[:, ::2].view(torch.float8_e4m3fn)
    weights = query.weights.repeat(1, 2)[:, :8]
    strided = IndexQuery(q, weights, query.positions, query.requests)
    solid = IndexQuery(q.contiguous(), weights.contiguous(), query.positions, query.requests)
    assert torch.equal(kernels.head_mass(strided, means, keys, BLOCK), kernels.head_mass(solid, means, keys, BLOCK))
    nothing = IndexQuery(torch.zeros_like(query.q), query.weights, query.positions, query.requests)
    mass, heads = kernels.routed_heads(nothing, means, keys, BLOCK, 3)
    assert (mass == 0).all()
    assert (heads == torch.arange(3)).all(), "ties go to the smaller head"
    assert same_query(kernels.routed_query(strided, means, keys, BLOCK, 8), solid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 13, 128, 300])
def test_route_heads_to_the_bit(heads, dtype):
    torch.manual_seed(heads)
    mass = torch.randn(16, heads)
    mass[0], mass[1], mass[2], mass[3] = 0, torch.nan, torch.inf, -torch.inf
    mass[4, ::2], mass[5, ::3], mass[6] = -torch.inf, torch.nan, mass[6].round()
    mass[7] = torch.where(torch.arange(heads) % 2 == 0, 0.0, -0.0)
    mass[8] = torch.where(torch.arange(heads) % 3 == 0, torch.nan, -torch.inf)
    mass = mass.to(dtype)
    for active in {1, (heads + 1) // 2, heads}:
        assert torch.equal(kernels.route_heads(mass, active), route_heads(mass, active))
    assert torch.equal(kernels.route_heads(mass.T.contiguous().T[::2], 1), route_heads(mass[::2], 1))
    assert kernels.route_heads(mass[:0], 1).shape == (0, 1)


def test_what_is_not_supported_is_said():
    assert kernels.unsupported(torch.float8_e4m3fn, 64, 128) is None
    assert "float32" in kernels.unsupported(torch.float32, 64, 128)
    assert "129" in kernels.unsupported(torch.float8_e4m3fn, 129, 128)
    assert "96" in kernels.unsupported(torch.float8_e4m3fn, 64, 96)


COMPILE = """
import torch
from thresher.cache import pack_keys
from thresher.ops.route_heads import triton as kernels
from thresher.ops.route_heads.reference import keep_heads
from thresher.types import IndexQuery

zeros = torch.zeros(32, dtype=torch.int64)
for dim in (64, 128):
    key = torch.zeros(100, dim, dtype=torch.float8_e4m3fn), torch.ones(100)
    keys = pack_keys([key], 16)  # means of blocks in pages of 64 take many seconds to compile, and are test_pool_keys' business
    many = [(key[0].repeat(8, 1), key[1].repeat(8))]
    for dtype, counts in ((torch.float8_e4m3fn, (64, 8, 128)), (torch.bfloat16, (64,)))[: 2 if dim == 128 else 1]:
        for heads in counts[: 3 if dim == 128 else 1]:
            query = IndexQuery(torch.zeros(32, heads, dim).to(dtype), torch.zeros(32, heads), zeros, zeros)
            kernels.routed_heads(query, keys, keys, 1024, min(heads, 8))
            kernels.routed_query(query, many, keys, 1024, min(heads, 8))
            kernels.MANY_QUERIES = 0
            kernels.routed_query(query, many, keys, 1024, min(heads, 8))
            kernels.MANY_QUERIES = 264
            if heads == 64:
                kernels.head_mass(query, [key], keys, 128)
kernels.route_heads(torch.zeros(10, 128), 8)
kernels.route_heads(torch.zeros(10, 1024), 8)
kernels.route_heads(torch.zeros(10, 8, dtype=torch.float64), 8)
"""


def test_compiles_for_hopper(compile_for_hopper):
    found = compile_for_hopper(COMPILE)
    assert {kernel.name for kernel in found} == {"own_kernel", "segment_kernel", "finish_kernel", "route_kernel"}
    for kernel in found:
        assert kernel.shared <= 227 * 1024
        assert getattr(kernel, "stack", 0) == 0, "nothing spills"
        segments = kernel.name == "segment_kernel" or (kernel.name == "finish_kernel" and kernel.shared > 4096)
        assert ("wgmma.mma_async" in kernel.ptx) == segments
        assert "div.full" not in kernel.ptx
