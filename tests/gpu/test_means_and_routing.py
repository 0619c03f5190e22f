"""Block means to the bit, head mass within its bound, and the choice of heads to the bit."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from thresher.cache.index_keys import planes
from thresher.ops import head_mass, partial_means, pool_keys, quantize_fp8, route_heads
from thresher.ops.route_heads.reference import keep_heads
from thresher.types import IndexKeys

from .compare import bits, differ, differ_all, dissimilar, exceed, fail_on
from .draw import FP8, generator, on_cpu, paged, queries, query_of, vectors
from .machine import DEVICE, sized

pooling = importlib.import_module("thresher.ops.pool_keys.triton")
routing = importlib.import_module("thresher.ops.route_heads.triton")


def cpu(*tensors):
    return [x.cpu() for x in tensors]


def spread(num: int, dim: int, seed: int):
    """Normal keys of magnitudes from 1e-3 to 1e3, quantised."""
    gen = generator(seed)
    values, scales = quantize_fp8(torch.randn(num, dim, generator=gen) * 10.0 ** torch.randint(-3, 4, (num, 1), generator=gen))
    return values.to(DEVICE), scales.to(DEVICE)


@pytest.mark.parametrize(
    ("num", "block", "dim"), sized([(5000, 128, 128), (5000, 16, 64), (70, 7, 36), (5, 1, 128), (40, 64, 128)], [(40, 8, 64)])
)
def test_flat_means(num, block, dim):
    values, scales = spread(num, dim, block)
    positions = torch.tensor([-1, 0, num - 1, num // 2, min(block, num) - 1, block // 2])
    got = pooling.pool_keys(values, scales, block)
    own = pooling.partial_means(values, scales, block, positions.to(DEVICE))
    problems = differ_all("full blocks", cpu(*got), pool_keys(*cpu(values, scales), block, impl="reference"))
    problems += differ_all("own blocks", cpu(*own), partial_means(*cpu(values, scales), block, positions, impl="reference"))
    fail_on(problems)


def test_every_byte_and_the_order_of_the_sum():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(4)[:960].view(-1, 64).view(FP8)
    scales = torch.tensor([2.0**-22, 1.0, 0.0, 2.0**20]).repeat(len(codes))[: len(codes)]
    problems = []
    for block in (1, 2, 5):
        got = pooling.pool_keys(codes.to(DEVICE), scales.to(DEVICE), block)
        problems += differ_all(f"every byte, blocks of {block}", cpu(*got), pool_keys(codes, scales, block, impl="reference"))
    big, small = torch.full((1, 64), 448.0 * 2**16), torch.full((126, 64), 2.0**-8)
    values, scales = quantize_fp8(torch.cat([big, -big, small]))
    got = pooling.pool_keys(values.to(DEVICE), scales.to(DEVICE), 128)
    problems += differ_all("keys that cancel", cpu(*got), pool_keys(values, scales, 128, impl="reference"))
    fail_on(problems)


@pytest.mark.parametrize(("block", "page_size"), [(16, 64), (7, 61), (128, 64), (3, 2)])
def test_means_from_and_to_pages(block, page_size):
    """Grown in three steps, through shuffled pages; what is not complete is not written."""
    dim, lengths = 64, sized([1000, 0, 333], [60, 0, 33])
    data = [spread(n, dim, n) for n in lengths]
    keys = paged(data, page_size, seed=block)
    blocks = max(lengths) // block
    made = paged([vectors(blocks, dim, seed=1)] * 3, 8, seed=2)
    means = IndexKeys(torch.full_like(made.pages, 0xFF), made.page_table, made.lengths)
    flat = torch.full((3, blocks, dim), 0xFF, dtype=torch.uint8, device=DEVICE).view(FP8), torch.full((3, blocks), torch.nan, device=DEVICE)
    old = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for share in (0.3, 0.7, 1.0):
        now = (keys.lengths * share).long()
        for target in (means, flat):
            pooling.pool_paged_keys(IndexKeys(keys.pages, keys.page_table, now), old, block, max(lengths), target)
        old = now
    value_plane, scale_plane = planes(means.pages.cpu())
    table, problems = means.page_table.cpu().long(), []
    for request, length in enumerate(lengths):
        full = length // block
        want = pool_keys(*cpu(*data[request]), block, impl="reference") if length else None
        held = table[request, : -(-blocks // 8)]
        in_pages = value_plane.view(torch.uint8)[held].flatten(0, 1)[:blocks], scale_plane[held].flatten()[:blocks]
        in_rows = bits(flat[0][request].cpu()), flat[1][request].cpu()
        for form, (values, scales) in (("pages", in_pages), ("rows", in_rows)):
            if want is not None:
                pairs = (values[:full].view(FP8), scales[:full]), (want[0], want[1])
                problems += differ_all(f"request {request}, {form}", *pairs)
            untouched = bool((values[full:] == 0xFF).all()) and bool(scales[full:].isnan().all())
            problems.append(None if untouched else f"request {request}, {form}: wrote blocks that are not complete")
    grown, whole = (pooling.pool_blocks(keys, block) for _ in range(2))
    grown.pages.zero_(), grown.lengths.zero_()
    pooled, tickets = torch.zeros_like(grown.lengths), torch.zeros(len(lengths), dtype=torch.int32, device=DEVICE)
    for share in (3, 2, 2, 1):
        pooling.grow_means(replace(keys, lengths=keys.lengths // share), grown, pooled, tickets, block)
    problems += [differ("means that grew", grown.pages, whole.pages), differ("their number", grown.lengths, whole.lengths)]
    problems += [differ("blocks looked at", pooled // block, keys.lengths // block), "tickets left" if tickets.any() else None]
    requests, positions = torch.tensor([0, 2, 0, 1, 0, 7, -1]), torch.tensor([0, lengths[2] - 1, lengths[0] // 2, 5, 2**40, 3, 3])
    got = pooling.paged_partial_means(keys, requests.to(DEVICE), positions.to(DEVICE), block)
    for i, (request, position) in enumerate(zip(requests.tolist(), positions.tolist(), strict=True)):
        there = request in (0, 2)
        values, scales = cpu(*data[request if there else 0])
        at = torch.tensor([min(position, len(values) - 1) if there else -1])
        want = partial_means(values, scales, block, at, impl="reference")
        problems += differ_all(f"own block of query {i}", cpu(got[0][i : i + 1], got[1][i : i + 1]), want)
    fail_on(problems)


def routing_case(heads: int, dim: int, block: int, dtype=FP8, absolute: bool = False):
    lengths = sized((20000, 0, 700), (120, 0, 7))
    gen = generator(heads)
    x, keys = torch.randn(9, heads, dim, generator=gen), [torch.randn(n, dim, generator=gen) for n in lengths]
    weights = torch.randn(9, heads, generator=gen)
    if absolute:
        x, keys, weights = x.abs(), [key.abs() for key in keys], weights.abs()
    data = [quantize_fp8(key) for key in keys]
    q, scales = quantize_fp8(x)
    q = q if dtype == FP8 else x.to(dtype)
    positions = torch.tensor([0, -1, lengths[0] - 1, block - 1, block, 2 * block - 2, lengths[2] - 1, 5, 2**40])
    query = query_of(q.to(DEVICE), (weights * scales).to(DEVICE), positions, torch.tensor([0, 0, 0, 0, 0, 0, 2, 1, 2]))
    means = [pool_keys(*pair, block, impl="reference") for pair in data]
    return query, means, paged([(v.to(DEVICE), s.to(DEVICE)) for v, s in data], 64)


def moved(means):
    return [(v.to(DEVICE), s.to(DEVICE)) for v, s in means]


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "dim", "block"), sized([(5, 64, 16), (32, 128, 128), (64, 128, 16), (128, 128, 1024)], [(5, 64, 3), (32, 64, 3)])
)
def test_head_mass(heads, dim, block, dtype, record_property):
    query, means, keys = routing_case(heads, dim, block, dtype)
    mass, chosen = routing.routed_heads(query, moved(means), keys, block, (heads + 1) // 2)
    want = head_mass(on_cpu(query, keys)[0], means, on_cpu(query, keys)[1], block, impl="reference")
    big_query, big_means, big_keys = routing_case(heads, dim, block, dtype, absolute=True)
    size = head_mass(on_cpu(big_query, big_keys)[0], big_means, on_cpu(big_query, big_keys)[1], block, impl="reference").double()
    # 2 D truncations of 2**-13 each for FP8 (docs/numerics.md), of 2**-22 for bf16; a mean's magnitude may round up by 1/16.
    n = 2 * dim * (2.0 ** (1 - sized(14, 23)) if dtype == FP8 else 2.0**-22)
    share = float(((mass.cpu().double() - want).abs() / size.clamp(min=1e-30)).max())
    record_property("measured", f"head mass, {dtype}, {heads} heads of {dim}: off by {share:.1e} of the mass of absolute values")
    problems = [exceed("mass", mass.cpu(), want, n / (1 - n) * 17 / 16 * size + 1e-6 * want.double())]
    problems.append(dissimilar("mass", mass.cpu(), want, 5e-6))
    problems.append(differ("heads of its own mass", chosen.cpu(), route_heads(mass.cpu(), (heads + 1) // 2, impl="reference")))
    problems.append(None if not bool(mass[[1, 7]].any()) else "mass where nothing is in sight")
    listed = moved(means)
    for row in range(query.num_queries):
        alone = routing.head_mass(query.rows(slice(row, row + 1)), listed, keys, block)
        problems.append(differ(f"query {row} alone", alone, mass[row : row + 1]))
    problems.append(differ("means in pages", routing.head_mass(query, paged(means, 7), keys, block), mass))
    fail_on(problems)


@pytest.mark.parametrize("heads", sized([64, 32, 128, 8], [5, 32]))
@pytest.mark.parametrize("block", sized([1024, 128, 16], [64, 16, 3]))
def test_routed_query(heads, block, monkeypatch):
    """Queries behind one another, as in prefill, and some at odds: each has the bits that it has alone, in any order, and among others."""
    dim, length = sized(128, 64), sized(20000, 300)
    run = sized(1500, 40)
    data = [vectors(n, dim, seed=n) for n in (length, block + 70)]
    keys, means = paged(data, 64), [pool_keys(*cpu(*pair), block, impl="reference") for pair in data]
    odd = torch.tensor([-1, 0, 2**40, block - 1, block, block + 1, 4, 4])
    positions = torch.cat((torch.arange(length - run, length), torch.arange(5), odd))
    requests = torch.cat((torch.zeros(run, dtype=torch.int64), torch.ones(13, dtype=torch.int64)))
    q, weights = queries(len(positions), heads, dim, seed=heads)
    query, listed, active = query_of(q, weights, positions, requests), moved(means), min(heads, 8)
    mass, chosen = routing.routed_heads(query, listed, keys, block, active)
    problems = [differ("heads", chosen.cpu(), route_heads(mass.cpu(), active, impl="reference"))]
    want = keep_heads(query, chosen)
    for turn in range(sized(20, 2)):
        got = routing.routed_query(query, listed, keys, block, active)
        problems += differ_all(f"turn {turn}", (got.q, got.weights), (want.q, want.weights))
    order = torch.randperm(len(positions), generator=generator(1)).to(DEVICE)
    problems.append(differ("shuffled", routing.head_mass(query.rows(order), listed, keys, block), mass[order]))
    apart = query.rows(torch.arange(0, len(positions), sized(97, 11), device=DEVICE))
    problems.append(differ("few of them", routing.head_mass(apart, listed, keys, block), mass[:: sized(97, 11)]))
    for many in (0, 2**30):  # segments in one program, and each in its own
        monkeypatch.setattr(routing, "MANY_QUERIES", many)
        problems.append(differ(f"many are {many}", routing.head_mass(query, listed, keys, block), mass))
    fail_on(problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_route_heads(dtype):
    problems = []
    for heads in sized((1, 13, 64, 128, 300), (1, 13, 70)):
        mass = torch.randn(16, heads, generator=generator(heads))
        mass[0], mass[1], mass[2], mass[3] = 0, torch.nan, torch.inf, -torch.inf
        mass[4, ::2], mass[5, ::3], mass[6] = -torch.inf, torch.nan, mass[6].round()
        mass[7] = torch.where(torch.arange(heads) % 2 == 0, 0.0, -0.0)
        mass[8] = torch.where(torch.arange(heads) % 3 == 0, torch.nan, -torch.inf)
        mass = mass.to(dtype)
        for active in sorted({1, (heads + 1) // 2, heads}):
            got = routing.route_heads(mass.to(DEVICE), active).cpu()
            problems.append(differ(f"{active} of {heads}", got, route_heads(mass, active, impl="reference")))
    fail_on(problems)
