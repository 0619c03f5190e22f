"""Means of blocks and sums of own blocks in CUDA C++, its threads in turn on a CPU, to the bit."""

from __future__ import annotations

import pytest
import torch

from thresher.cache.device import flat_rows, paged_rows
from thresher.ops import quantize_fp8
from thresher.ops.pool_keys import walks
from thresher.types import IndexKeys

from .threads import in_order, needs_compiler

pytestmark = needs_compiler


def world(dim: int, page_size: int) -> tuple[IndexKeys, torch.Tensor]:
    """Three requests in shuffled pages, with holes and pages that do not exist, and their keys fp32 ``[3, N, D]``, zeros in holes."""
    gen = torch.Generator().manual_seed(dim + page_size)
    lengths, width = torch.tensor([1500, 0, 333]), 1 + 1500 // page_size
    table = torch.randperm(3 * width, generator=gen).view(3, width).int()
    table[0, [1, width - 1]], table[2, 2] = torch.tensor([-1, 3 * width], dtype=torch.int32), 2**31 - 1
    scaled = torch.randn(3 * width, page_size, dim, generator=gen) * 10.0 ** torch.randint(-3, 4, (3 * width, page_size, 1), generator=gen)
    values, scales = quantize_fp8(scaled.view(-1, dim))
    values.view(torch.uint8)[:254] = torch.tensor([code for code in range(256) if code % 128 != 127], dtype=torch.uint8)[:, None]
    largest = slice(int(table[2, 0]) * page_size, (int(table[2, 0]) + 1) * page_size)  # of means, which no larger scale is needed for
    values.view(torch.uint8)[largest], scales[largest] = 0x7E, 1.0
    pages = torch.empty(3 * width, page_size, 1, dim + 4, dtype=torch.uint8)
    flat = pages.view(3 * width, -1)
    flat[:, : page_size * dim] = values.view(torch.uint8).view(3 * width, -1)
    flat[:, page_size * dim :] = scales.view(torch.uint8).view(3 * width, -1)
    there = (table >= 0) & (table < 3 * width)
    keys = (values.float() * scales[:, None]).view(3 * width, page_size, dim)[torch.where(there, table, 0).long()]
    return IndexKeys(pages, table, lengths), (keys * there[..., None, None]).flatten(1, 2)


def running(keys: torch.Tensor) -> torch.Tensor:
    sums, total = [], torch.zeros(keys.shape[-1])
    for key in keys:
        total = total + key
        sums.append(total)
    return torch.stack(sums) if sums else keys


@pytest.fixture(params=[0, 1, 7, 8])
def order(request, monkeypatch):
    monkeypatch.setattr(walks.launch, "launch", in_order(request.param))


@pytest.mark.parametrize(("dim", "page_size", "block_size"), [(128, 64, 128), (64, 16, 272), (128, 32, 32), (64, 64, 16), (64, 64, 640)])
@pytest.mark.parametrize("paged", [True, False])
def test_means_of_blocks(dim, page_size, block_size, paged, order):
    keys, vectors = world(dim, page_size)
    most = 1500 // block_size
    old = torch.tensor([block_size + 3 if block_size < 600 else 0, -5, 0])
    pages = torch.full((8, 16, 1, dim + 4), 0xEE, dtype=torch.uint8)
    table = torch.full((3, 3), -1, dtype=torch.int32)
    table[0], table[2, :2] = torch.tensor([5, 2, 7]), torch.tensor([1, 8])
    if paged:
        out, width = paged_rows(IndexKeys(pages, table, keys.lengths)), 3
    else:
        flat = torch.full((3, 99, dim), 0xEE, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.full((3, 99), -7.0)
        out, width = flat_rows(*flat, keys.lengths), 99
    walks.pool(paged_rows(keys), old, keys.lengths, block_size, most, out, width, dim)
    done = {}
    for request in (0, 2):
        for block in range(max(int(old[request]), 0) // block_size, int(keys.lengths[request]) // block_size):
            mean = running(vectors[request, block * block_size : (block + 1) * block_size])[-1] / block_size
            done[request, block] = quantize_fp8(mean[None])
    assert len(done) > 1
    if not paged:
        for request in range(3):
            for block in range(99):
                values, scales = done.get((request, block), (None, torch.tensor([-7.0])))
                assert flat[1][request, block] == scales
                wanted = 0xEE if values is None else values.view(torch.uint8)
                assert (flat[0][request, block].view(torch.uint8) == wanted).all()
        return
    expected = torch.full_like(pages, 0xEE).view(8, -1)
    for (request, block), (values, scales) in done.items():
        page = int(table[request, block // 16]) if block // 16 < 3 else -1
        if 0 <= page < 8:
            at = block % 16
            expected[page, at * dim : (at + 1) * dim] = values.view(torch.uint8)
            expected[page, 16 * dim + 4 * at : 16 * dim + 4 * at + 4] = scales.view(torch.uint8)
    assert torch.equal(pages.view(8, -1), expected)


@pytest.mark.parametrize(("dim", "page_size", "block_size"), [(128, 64, 128), (64, 16, 272), (128, 32, 608)])
def test_sums_of_own_blocks(dim, page_size, block_size, order):
    """Runs of queries that one walk serves, broken by a block's end, another request, a step back; and queries that see nothing."""
    keys, vectors = world(dim, page_size)
    positions = [*range(100, 300), 299, *range(298, 290, -1), 5000, -1, 699, 0, 1, 2, *range(1100, 1110)]
    positions += [*range(block_size - 4, block_size + 3), 40, 330, 331, 332]
    requests = [0] * (len(positions) - 4) + [1, 2, 2, 2]
    requests[30], requests[31] = 3, -1
    positions, requests = torch.tensor(positions), torch.tensor(requests)
    sums = torch.full((len(positions), dim), -7.0)
    walks.own_sums(paged_rows(keys), positions, requests, keys.lengths, block_size, sums)
    walked = 0
    for query, (position, request) in enumerate(zip(positions.tolist(), requests.tolist(), strict=True)):
        length = int(keys.lengths[request]) if 0 <= request < 3 else 0
        last = min(position, length - 1)
        expected = torch.full((dim,), -7.0)
        if last >= 0 and (last + 1) % block_size:
            start = last // block_size * block_size
            expected = running(vectors[request, start : last + 1])[-1]
            walked += 1
        assert torch.equal(sums[query], expected), (query, position, request)
    assert 200 < walked < len(positions)


def test_keys_that_do_not_lie_so_are_left_to_triton():
    keys, _ = world(128, 64)
    rows = paged_rows(keys)
    assert walks.fits(rows, 128, 128)
    assert not walks.fits(rows, 100, 128)
    assert not walks.fits(rows, 128, 96)
    assert not walks.fits(rows._replace(page_size=48), 128, 128)
    assert not walks.fits(rows._replace(page_size=0), 128, 128)
    assert not walks.fits(rows._replace(values=rows.values[1:]), 128, 128)
    assert not walks.can_walk(rows, 128, 128)  # not on a CPU
