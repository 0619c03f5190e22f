"""Block means against the reference, to the bit: flat, paged, and grown by what was appended."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from thresher.cache import IndexKeyCache, PageTable, pack_keys
from thresher.cache.index_keys import planes
from thresher.errors import ThresherError
from thresher.ops import partial_means, pool_blocks, pool_keys, quantize_fp8
from thresher.ops.pool_keys import triton as kernels
from thresher.types import IndexKeys


def same(got, want) -> bool:
    return torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1], want[1])


def keys(num: int, dim: int = 64, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    return quantize_fp8(torch.randn(num, dim, generator=gen) * 10.0 ** torch.randint(-3, 4, (num, 1), generator=gen))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel is given to fill holds 0xFF."""
    empty = torch.empty

    def poison(*size, **kwargs):
        out = empty(*size, **kwargs)
        out.view(torch.uint8).fill_(0xFF)
        return out

    monkeypatch.setattr(torch, "empty", poison)


def every_code(dim: int = 128):
    """Keys that use each finite e4m3 byte, under small, large and zero scales."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(4)[: 1016 // dim * dim]
    values = codes.view(-1, dim).view(torch.float8_e4m3fn)
    return values, torch.tensor([2.0**-22, 1.0, 0.0, 2.0**20]).repeat(len(values))[: len(values)]


@pytest.mark.parametrize(
    ("num", "block", "dim"), [(24, 8, 64), (27, 8, 128), (5, 1, 64), (14, 7, 36), (33, 16, 64), (0, 4, 64), (7, 8, 64), (40, 33, 8)]
)
def test_bits_of_the_reference(num, block, dim):
    values, scales = keys(num, dim)
    assert same(kernels.pool_keys(values, scales, block), pool_keys(values, scales, block))
    if num:
        positions = torch.tensor([-1, 0, num - 1, num // 2, 0, min(block, num) - 1])
        assert same(kernels.partial_means(values, scales, block, positions), partial_means(values, scales, block, positions))


@pytest.mark.parametrize("block", [1, 2, 5])
def test_every_value_and_strided_rows(block):
    values, scales = every_code()
    assert same(kernels.pool_keys(values, scales, block), pool_keys(values, scales, block))
    values, scales = keys(20, 96)
    values, scales = values[::2, :64], scales[::2]
    assert same(kernels.pool_keys(values, scales, block), pool_keys(values.contiguous(), scales, block))


def test_sums_run_in_position_order():
    """Two large keys that cancel, then small ones: from the other end the small ones are lost."""
    big, small = torch.full((1, 8), 448.0 * 2**16), torch.full((126, 8), 2.0**-8)
    values, scales = quantize_fp8(torch.cat([big, -big, small]))
    got = kernels.pool_keys(values, scales, 128)
    assert same(got, pool_keys(values, scales, 128))
    assert not same(got, pool_keys(values.flip(0), scales.flip(0), 128)), "the input must be one where order shows"


@pytest.mark.parametrize(("block", "page_size"), [(4, 8), (8, 4), (6, 5), (3, 64)])
@pytest.mark.parametrize("paged", [False, True])
def test_grown_token_by_token_and_after_a_rollback(block, page_size, paged):
    """Two requests that grow by steps of 0 to 9 tokens end with the means of one call; nothing else is written."""
    final, dim, room = [37, 22], 64, 40
    data = [keys(n, dim, seed=n) for n in final]
    table, cache = PageTable(3, 64, page_size), IndexKeyCache(64, dim, page_size)
    max_blocks = room // block
    if paged:
        spare = pack_keys([keys(max_blocks, dim)] * 3, 7)
        means = IndexKeys(torch.full_like(spare.pages, 0xFF), spare.page_table, spare.lengths)
    else:
        means = torch.empty(3, max_blocks, dim, dtype=torch.float8_e4m3fn), torch.empty(3, max_blocks)
    gen, held = torch.Generator().manual_seed(0), [0, 0]
    while held != final:
        old = table.lengths
        steps = [min(int(torch.randint(0, 10, (1,), generator=gen)), final[r] - held[r]) for r in range(2)]
        for request, step in enumerate(steps):
            values, scales = data[request]
            part = slice(held[request], held[request] + step)
            cache.store(table.append(request, step), values[part], scales[part])
            held[request] += step
        kernels.pool_paged_keys(cache.view(table.table, table.lengths), old, block, 9, means)
        if held[0] == 30:  # drafts are thrown away, and come again
            table.rollback(0, 20)
            held[0] = 20
    for request in range(3):
        if paged:
            values, scales = planes(means.pages)
            pages = means.page_table[request].long()
            values, scales = values.view(torch.uint8)[pages].view(torch.float8_e4m3fn).flatten(0, 1), scales[pages].flatten()
        else:
            values, scales = means[0][request], means[1][request]
        full = final[request] // block if request < 2 else 0
        if full:
            assert same((values[:full], scales[:full]), pool_keys(*data[request], block))
        assert (values[full:].view(torch.uint8) == 0xFF).all()
        assert scales[full:].isnan().all()


def test_prefill_at_once_and_a_cache_that_is_too_small():
    data = [keys(n, 64, seed=n) for n in (30, 0, 13)]
    paged = pack_keys(data, 8)
    means = torch.empty(3, 5, 64, dtype=torch.float8_e4m3fn), torch.empty(3, 5)
    kernels.pool_paged_keys(paged, torch.zeros(3, dtype=torch.int64), 4, 32, means)
    for request, full in enumerate((5, 0, 3)):  # request 0 has 7 blocks and room for 5
        want = pool_keys(*data[request], 4)
        assert same((means[0][request, :full], means[1][request, :full]), (want[0][:full], want[1][:full]))
        assert means[1][request, full:].isnan().all()
    before = [t.clone() for t in (means[0].view(torch.uint8), means[1])]
    kernels.pool_paged_keys(paged, paged.lengths + 50, 4, 32, means)  # a request that was cut: nothing to do
    kernels.pool_paged_keys(paged, paged.lengths, 4, 32, means)
    assert torch.equal(before[0], means[0].view(torch.uint8))
    assert torch.equal(before[1].nan_to_num(), means[1].nan_to_num())
    with pytest.raises(ThresherError, match="contiguous"):
        kernels.pool_paged_keys(paged, paged.lengths, 4, 32, (means[0].transpose(0, 1), means[1]))


def test_garbage_page_tables_are_never_followed():
    """A page that does not exist reads as zeros and, among the means, is not written."""
    paged = pack_keys([keys(32, 64)], 8)
    bad = torch.tensor([[-(2**31), 2**31 - 1, 1, 4]], dtype=torch.int32)
    broken = IndexKeys(paged.pages, bad, torch.tensor([10**6]))
    means = IndexKeys(torch.full((2, 4, 1, 68), 0xFF, dtype=torch.uint8), torch.tensor([[1, -1, 7]], dtype=torch.int32), torch.tensor([12]))
    kernels.pool_paged_keys(broken, torch.zeros(1, dtype=torch.int64), 8, 64, means)
    values, scales = planes(means.pages)
    want = pool_keys(*keys(32, 64), 8)
    assert not values[1, [0, 1, 3]].view(torch.uint8).any()
    assert same((values[1, 2:3], scales[1, 2:3]), (want[0][1:2], want[1][1:2]))
    assert (means.pages[0] == 0xFF).all()


@pytest.mark.parametrize(("block", "page_size"), [(4, 8), (16, 4), (7, 5)])
def test_partial_means_from_pages(block, page_size):
    data = [keys(n, 64, seed=n) for n in (21, 0, 40)]
    paged = pack_keys(data, page_size)
    requests = torch.tensor([0, 0, 0, 2, 2, 2, 1, 0, -1, 3, 2**62, -(2**63), 2])
    positions = torch.tensor([0, 20, 7, 39, 12, -1, 3, 2**62, 5, 5, 5, 5, -(2**63)])
    got = kernels.paged_partial_means(paged, requests, positions, block)
    for i, (request, position) in enumerate(zip(requests.tolist(), positions.tolist(), strict=True)):
        values, scales = data[request] if request in (0, 2) else keys(1)
        at = torch.tensor([min(max(position, -1), len(values) - 1) if request in (0, 2) else -1])
        want = partial_means(values, scales, block, at)
        assert same((got[0][i : i + 1], got[1][i : i + 1]), want), (request, position)


@pytest.mark.parametrize(("block", "page_size"), [(4, 8), (7, 5), (4, 64)])
def test_all_blocks_in_pages(block, page_size):
    paged = pack_keys([keys(n, 64, seed=n) for n in (300, 0, 3, 41)], page_size)
    got, want = kernels.pool_blocks(paged, block), pool_blocks(paged, block, impl="reference")
    assert torch.equal(got.pages, want.pages)
    assert torch.equal(got.page_table, want.page_table)
    assert torch.equal(got.lengths, want.lengths)


@pytest.mark.parametrize(("block", "page_size"), [(7, 5), (16, 64)])
def test_means_that_grow_are_those_made_at_once(block, page_size, monkeypatch):
    """More blocks than programs, cuts, lengths past the table's room and below zero."""
    monkeypatch.setattr(kernels, "PROGRAMS", 9)
    paged = pack_keys([keys(n, 64, seed=n) for n in (300, 0, 3, 41)], page_size)
    whole = kernels.pool_blocks(paged, block)
    means = replace(whole, pages=torch.zeros_like(whole.pages), lengths=torch.zeros_like(whole.lengths))
    pooled, tickets = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    for lengths in ([7, 0, -4, 41], [120, 0, 3, 41], [121, 0, 3, 41], [300, 0, 3, 41]):
        held = replace(paged, lengths=torch.tensor(lengths))
        kernels.grow_means(held, means, pooled, tickets, block)
        counted = held.lengths.clamp(0, held.room)
        assert torch.equal(pooled // block, counted // block)
        assert torch.equal(means.lengths, counted // block)
        assert not tickets.any()
    assert torch.equal(means.pages, whole.pages)
    # cut: what is past the cut is pooled again, and nothing else
    means.pages.fill_(0xAB)
    pooled[0] = 2 * block + 1
    kernels.grow_means(paged, means, pooled, tickets, block)
    values, made = (planes(x.pages)[0].view(torch.uint8).flatten(0, 1) for x in (means, whole))
    assert (values[:2] == 0xAB).all()
    assert torch.equal(values[2 : 300 // block], made[2 : 300 // block])
    assert (values[300 // block :] == 0xAB).all()
    # a length past what the table has room for
    pooled.zero_()
    kernels.grow_means(replace(paged, lengths=torch.full((4,), 10**9)), means, pooled, tickets, block)
    assert pooled.tolist() == [paged.room] * 4


def test_what_is_not_supported_is_said():
    assert kernels.unsupported(128) is None
    assert "head_dim" in kernels.unsupported(4096)


COMPILE = """
import torch
from thresher.cache import pack_keys
from thresher.ops.pool_keys import triton as kernels

zeros = torch.zeros(2, dtype=torch.int64)
for dim in (64, 128):
    key = torch.zeros(2048, dim, dtype=torch.float8_e4m3fn), torch.ones(2048)
    flat = torch.zeros(2, 16, dim, dtype=torch.float8_e4m3fn), torch.zeros(2, 16)
    for page_size, block in ((64, 128), (64, 1024), (16, 128), (61, 128))[: 4 if dim == 128 else 1]:
        keys = pack_keys([key, key], page_size)
        kernels.pool_paged_keys(keys, zeros, block, 2048, keys)
        if dim == block == 128 and page_size != 16:  # those of 64 keys a page take seconds each
            kernels.pool_paged_keys(keys, zeros, block, 4, flat)
            kernels.paged_partial_means(keys, zeros, zeros, block)
kernels.pool_keys(*key, 128)
kernels.partial_means(*key, 128, zeros)
"""


def test_compiles_for_hopper(compile_for_hopper):
    found = compile_for_hopper(COMPILE)
    assert {kernel.name for kernel in found} == {"_pool_kernel", "_partial_kernel"}
    for kernel in found:
        assert kernel.shared <= 128, "the largest magnitude of each warp"
        assert getattr(kernel, "stack", 0) == 0, "nothing spills"
        assert "div.full" not in kernel.ptx, "an approximate division would move a mean's rounding"
