"""Index score kernels: the reference's bits where its arithmetic is exact, and Hopper's matrix instructions where they are compiled.

The interpreter's dot products come from a BLAS whose order depends on the shape, so inputs are small integers: then every dot product is
exact in fp32, and so is the head sum when weights are eighths.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from thresher.cache import pack_keys
from thresher.errors import ThresherError
from thresher.ops import gathered_index_score, index_score, paged_index_score, quantize_fp8
from thresher.types import IndexKeys, IndexQuery

kernels = importlib.import_module("thresher.ops.index_score.triton")
FP8 = torch.float8_e4m3fn
INF = float("inf")
interpreted = pytest.mark.skipif(not kernels.INTERPRET, reason="the kernels were imported before the interpreter was asked for")


def integers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float().to(FP8)


def world(num: int, heads: int, dim: int, lengths: list[int], page_size: int = 64, seed: int = 0) -> tuple[IndexQuery, IndexKeys]:
    gen = torch.Generator().manual_seed(seed)
    pairs = [(integers(n, dim, seed=seed + n), 2.0 ** torch.randint(-4, 3, (n,), generator=gen).float()) for n in lengths]
    weights = torch.randint(-4, 5, (num, heads), generator=gen).float() / 8
    positions = torch.randint(-1, max(lengths) + 9, (num,), generator=gen)
    requests = torch.randint(0, len(lengths), (num,), generator=gen)
    return IndexQuery(integers(num, heads, dim, seed=seed + 1), weights, positions, requests), pack_keys(pairs, page_size)


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@interpreted
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (5, 128), (8, 64), (12, 64), (32, 128), (64, 128), (128, 64)])
def test_ragged_has_the_references_bits(heads, dim):
    num, length = 19, 300
    query, _ = world(num, heads, dim, [9])
    k, scales = integers(length, dim, seed=5), 2.0 ** torch.arange(length).remainder(7).float()
    starts, ends = torch.randint(0, length + 1, (2, num), generator=torch.Generator().manual_seed(1))
    starts[:4], ends[:4] = torch.tensor([0, 0, length, 64]), torch.tensor([length, 0, length, 65])
    got = kernels.index_score(query.q, query.weights, k, scales, starts, ends, out=poisoned(num, length))
    assert torch.equal(bits(got), bits(index_score(query.q, query.weights, k, scales, starts, ends)))


@interpreted
def test_ragged_packed_documents_and_ranges_that_do_not_fit():
    """Two documents meet within one tile of queries; wild ranges are cut to the keys there are."""
    query, _ = world(8, 8, 64, [9])
    k, scales = integers(130, 64, seed=5), torch.ones(130)
    starts = torch.tensor([0, 0, 0, 70, 70, -(2**62), 131, 2**62])
    ends = torch.tensor([1, 2, 3, 71, 72, 2**62, 2**62, -(2**62)])
    got = kernels.index_score(query.q, query.weights, k, scales, starts, ends, out=poisoned(8, 130))
    want = index_score(query.q, query.weights, k, scales, starts.clamp(0, 130), ends.clamp(0, 130))
    assert torch.equal(bits(got), bits(want))


@interpreted
@pytest.mark.parametrize("page_size", [2, 61, 64, 128])
@pytest.mark.parametrize(("num", "heads"), [(3, 8), (3, 64), (12, 16), (23, 5)])
def test_paged_has_the_references_bits(num, heads, page_size):
    """One query a request and many, requests in any order within a tile of queries, one of them empty."""
    query, keys = world(num, heads, 64, [150, 0, 193], page_size)
    got = kernels.paged_index_score(query, keys, out=poisoned(num, 193))
    assert torch.equal(bits(got), bits(paged_index_score(query, keys)))


@interpreted
@pytest.mark.parametrize("width", [1, 100, 256, 450])
def test_paged_to_another_width(width):
    query, keys = world(4, 8, 64, [150, 200])
    want = torch.nn.functional.pad(paged_index_score(query, keys), (0, max(0, width - 200)), value=-INF)[:, :width]
    assert torch.equal(bits(kernels.paged_index_score(query, keys, width=width, out=poisoned(4, width))), bits(want))


@interpreted
@pytest.mark.parametrize("page_size", [7, 64])
@pytest.mark.parametrize("heads", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gathered_has_the_references_bits(dtype, heads, page_size):
    query, keys = world(5, heads, 128, [150, 0, 193], page_size)
    wanted = torch.randint(-20, 220, (5, 130), generator=torch.Generator().manual_seed(2), dtype=dtype)
    wanted[:, :4] = torch.tensor([-(2**31), 2**31 - 1, -1, 0], dtype=dtype)
    wanted[0] = -1
    got = kernels.gathered_index_score(query, keys, wanted, out=poisoned(5, 130))
    assert torch.equal(bits(got), bits(gathered_index_score(query, keys, wanted)))


@interpreted
def test_garbage_is_out_of_sight():
    query, keys = world(6, 8, 64, [150, 193])
    wanted = torch.tensor([[0, 2**62, -(2**62), 64, 149]]).expand(6, -1)
    query = replace(
        query,
        positions=torch.tensor([2**62, -(2**63), 2**31, 149, 149, 149]),
        requests=torch.tensor([0, 0, 0, 0, 2**40, -1]),
    )
    table = keys.page_table.clone()
    table[0, 1] = 2**31 - 1
    keys = replace(keys, page_table=table, lengths=torch.tensor([2**62, 5]))
    got = kernels.paged_index_score(query, keys, width=300, out=poisoned(6, 300))
    picked = kernels.gathered_index_score(query, keys, wanted, out=poisoned(6, 5))
    there = (table[0] >= 0) & (table[0] < len(keys.pages))
    room = len(there) * 64
    fine = replace(keys, page_table=table.where(there, 0), lengths=torch.tensor([room, 5]))
    want = torch.full((4, 300), -INF)
    want[:, :room] = paged_index_score(query.rows(slice(0, 4)), fine)[:, :300].where(there.repeat_interleave(64), -INF)
    for row in (0, 2, 3):
        assert torch.equal(bits(got[row]), bits(want[row]))
        assert torch.equal(bits(picked[row, [0, 4]]), bits(want[row, [0, 149]]))
    assert (got[[1, 4, 5]] == -INF).all()
    assert (picked[[1, 4, 5]] == -INF).all()
    assert (picked[:, 1:4] == -INF).all()


@interpreted
@pytest.mark.parametrize("heads", [5, 16, 64])
def test_one_score_whatever_the_form_and_the_tile(monkeypatch, heads):
    """Any fp32 weights: the head sum rounds, in an order that no tile may change."""
    query, keys = world(9, heads, 64, [200])
    gen = torch.Generator().manual_seed(4)
    query = replace(query, weights=torch.randn(9, heads, generator=gen), positions=torch.full((9,), 199))
    k, scales = integers(200, 64, seed=200), 2.0 ** torch.randint(-4, 3, (200,), generator=torch.Generator().manual_seed(0)).float()
    zeros, ends = torch.zeros(9).long(), torch.full((9,), 200)
    ragged = kernels.index_score(query.q, query.weights, k, scales, zeros, ends)
    want = index_score(query.q, query.weights, k, scales, zeros, ends)
    size = index_score(query.q, query.weights.abs(), k, scales, zeros, ends)
    assert ((ragged - want).abs() <= 2 * heads * 2.0**-24 * size).all()  # two head sums in fp32, each within H roundings
    assert torch.equal(bits(kernels.paged_index_score(query, keys)), bits(ragged))
    assert torch.equal(bits(kernels.paged_index_score(query.rows(slice(4, 5)), keys)), bits(ragged[4:5]))
    chosen = torch.randperm(200, generator=gen)[:77].expand(9, -1)
    assert torch.equal(bits(kernels.gathered_index_score(query, keys, chosen)), bits(ragged.gather(1, chosen)))
    monkeypatch.setattr(kernels, "QUERIES", dict.fromkeys(kernels.QUERIES, 2))
    monkeypatch.setattr(kernels, "MIN_TILES", 1)
    assert torch.equal(bits(kernels.index_score(query.q, query.weights, k, scales, zeros, ends)), bits(ragged))
    assert torch.equal(bits(kernels.paged_index_score(query, keys)), bits(ragged))


@interpreted
def test_no_score_is_minus_zero():
    query, keys = world(3, 8, 64, [70])
    zero = replace(query, q=query.q.float().mul(0).to(FP8), weights=-torch.ones(3, 8), positions=torch.full((3,), 69))
    assert (bits(kernels.paged_index_score(zero, keys)) == 0).all()


@interpreted
def test_nan_in_a_query_spoils_its_row_alone():
    """In bf16: the interpreter reads e4m3's NaN as 480."""
    query, _ = world(3, 16, 64, [9])
    q, k = query.q.bfloat16(), integers(70, 64, seed=2).bfloat16()
    q[1, 3, 7] = torch.nan
    zeros, ends = torch.zeros(3).long(), torch.tensor([70, 40, 70])
    got = kernels.index_score(q, query.weights, k, torch.ones(70), zeros, ends)
    assert got[1, :40].isnan().all()
    assert torch.equal(got.isnan(), index_score(q, query.weights, k, torch.ones(70), zeros, ends).isnan())


@interpreted
def test_stale_bytes_behind_the_length_do_not_show():
    query, keys = world(4, 8, 64, [70, 64])
    before = kernels.paged_index_score(query, keys)
    keys.pages[1].view(-1)[6 * 64 : 64 * 64] = 0x7F
    assert torch.equal(bits(kernels.paged_index_score(query, keys)), bits(before))


@interpreted
@pytest.mark.parametrize("heads", [4, 64])
def test_bf16_is_ragged_only(heads):
    gen = torch.Generator().manual_seed(3)
    q, k = torch.randn(5, heads, 64, generator=gen).bfloat16(), torch.randn(150, 64, generator=gen).bfloat16()
    weights, starts, ends = torch.randn(5, heads, generator=gen), torch.zeros(5).long(), torch.tensor([150, 0, 1, 149, 77])
    got = kernels.index_score(q, weights, k, torch.ones(150), starts, ends)
    want = index_score(q, weights, k, torch.ones(150), starts, ends)
    size = index_score(q.abs(), weights.abs(), k.abs(), torch.ones(150), starts, ends).amax(1, keepdim=True)
    assert torch.equal(got == -INF, want == -INF)
    seen = want > -INF
    assert ((got - want).abs()[seen] <= ((heads + 64 + 2) * 2.0**-24 * size).expand_as(got)[seen]).all()
    query, keys = world(5, heads, 64, [9])
    with pytest.raises(ThresherError, match="bfloat16"):
        kernels.paged_index_score(replace(query, q=q), keys)


@interpreted
def test_strided_inputs():
    query, keys = world(6, 8, 64, [150, 193])
    want = kernels.paged_index_score(query, keys)
    wide = torch.zeros(6, 10, 96, dtype=torch.uint8).view(FP8)
    wide[:, 1:9, 16:80] = query.q
    strided = IndexQuery(wide[:, 1:9, 16:80], query.weights.T.contiguous().T, query.positions, query.requests)
    got = kernels.paged_index_score(strided, replace(keys, page_table=keys.page_table.T.contiguous().T), out=poisoned(6, 400)[:, :193])
    assert torch.equal(bits(got), bits(want))
    k, scales = integers(300, 64, seed=1)[::3], torch.ones(300)[::3]
    starts, ends = torch.zeros(6).long(), torch.full((12,), 100)[::2]
    got = kernels.index_score(strided.q, strided.weights, k, scales, starts, ends)
    assert torch.equal(bits(got), bits(index_score(query.q, query.weights, k, scales, starts, ends)))


@interpreted
def test_nothing_to_score():
    query, keys = world(2, 8, 64, [0, 0])
    assert kernels.paged_index_score(query, keys).shape == (2, 0)
    assert kernels.gathered_index_score(query, keys, torch.zeros(2, 0).long()).shape == (2, 0)
    assert (kernels.gathered_index_score(query, keys, torch.zeros(2, 3).long()) == -INF).all()
    assert (kernels.paged_index_score(query, keys, width=70) == -INF).all()
    assert kernels.paged_index_score(query.rows(slice(0, 0)), keys, width=70).shape == (0, 70)
    none = torch.zeros(0).long()
    assert kernels.index_score(query.q[:0], query.weights[:0], query.q[0], torch.ones(8), none, none).shape == (0, 8)


def test_unsupported_says_why():
    assert kernels.unsupported(FP8, FP8, 64, 128) is None
    assert kernels.unsupported(torch.bfloat16, torch.bfloat16, 1, 64) is None
    assert "head_dim" in kernels.unsupported(FP8, FP8, 64, 96)
    assert "heads" in kernels.unsupported(FP8, FP8, 129, 128)
    assert "float32" in kernels.unsupported(torch.float32, FP8, 8, 128)
    assert "keys" in kernels.unsupported(FP8, FP8, 8, 128, 2**26)


def test_a_wrong_out_is_refused():
    query, keys = world(2, 8, 64, [70])
    for out in (torch.zeros(2, 71), torch.zeros(2, 70).double(), torch.zeros(70, 2).T):
        with pytest.raises(ThresherError, match="out must be"):
            kernels.paged_index_score(query, keys, out=out)


LAUNCHES = """
import importlib, torch
from thresher.types import IndexKeys, IndexQuery
kernels = importlib.import_module("thresher.ops.index_score.triton")
FP8 = torch.float8_e4m3fn

def ragged(heads, dim, dtype=FP8):
    q, k, ones = torch.zeros(64, heads, dim).to(dtype), torch.zeros(256, dim).to(dtype), torch.zeros(64).long()
    kernels.index_score(q, torch.zeros(64, heads), k, torch.zeros(256), ones, ones)

def paged(num, heads, dim, requests, page_size=64):
    pages, table = torch.zeros(32, page_size, 1, dim + 4, dtype=torch.uint8), torch.zeros(requests, 4, dtype=torch.int32)
    zeros = torch.zeros(num).long()
    query = IndexQuery(torch.zeros(num, heads, dim).to(FP8), torch.zeros(num, heads), zeros, zeros)
    return query, IndexKeys(pages, table, torch.zeros(requests).long())

for heads, dim in ((8, 128), (16, 128), (32, 128), (64, 128), (128, 128), (32, 64), (1, 64)):
    ragged(heads, dim)
ragged(64, 128, torch.bfloat16)
for num, heads, dim, requests, size in ((8, 64, 128, 8, 64), (16, 64, 128, 8, 64), (32, 64, 128, 8, 64), (8, 32, 128, 8, 64),
                                        (8, 8, 128, 8, 64), (99, 8, 128, 1, 64), (8, 128, 128, 8, 64), (99, 64, 64, 1, 64),
                                        (99, 64, 128, 1, 61)):
    kernels.paged_index_score(*paged(num, heads, dim, requests, size), width=256)
for heads, dim in ((8, 128), (64, 128), (128, 128), (32, 64)):
    for kernels.MANY_GATHERED in (10**9, 0):
        kernels.gathered_index_score(*paged(8, heads, dim, 8), torch.zeros(8, 256).long())
for num, heads, dim, page_size, block_size in ((1024, 64, 128, 64, 128), (1, 64, 128, 64, 128), (8, 64, 128, 61, 128), (8, 64, 128, 64, 8),
                                               (8, 8, 128, 64, 64), (8, 16, 64, 64, 64), (8, 128, 128, 64, 128)):
    kernels.block_index_score(*paged(num, heads, dim, 1, page_size), torch.zeros(num, 64, dtype=torch.int32), block_size)
"""


def test_compiles_for_hopper_and_all_forms_add_alike():
    """Every element is made by the same instructions: wgmma over the whole head dim, then one fixed sequence of roundings."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    del env["TRITON_INTERPRET"]
    tool = Path(__file__).with_name("compile.py")
    run = subprocess.run([sys.executable, str(tool)], input=LAUNCHES, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-2000:]
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert [sum(r["name"] == f"{form}_kernel" for r in records) for form in ("ragged", "paged", "gathered", "block")] == [8, 9, 7, 7]
    for record in records:
        ptx = record["ptx"]
        assert record["shared"] <= 232448 // 2, "two programs must fit on a multiprocessor"
        assert record.get("hot_spills", 0) == 0, "registers spilled where it counts"
        products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|32)\.f32", ptx)
        assert products
        assert "mma.sync" not in ptx
        assert len({columns for columns, _ in products}) == 1
        # A thread holds two rows of every 64 keys, and all their sums lie in its group of four lanes.
        heads, sums = padded_and_sums(ptx, int(products[0][0]), record)
        halved = r"\bmul\.rn\.f32\s+%\w+, %\w+, 0f3F000000"  # weights
        assert len(re.findall(r"\bmul\.rn\.f32", ptx)) - len(re.findall(halved, ptx)) == 3 * sums  # first heads of two sums, and the scale
        assert len(re.findall(r"\bfma\.rn\.f32", ptx)) == 2 * (heads // 8 - 1) * sums
        relus = len(re.findall(r"\babs\.f32", ptx))
        # Beside the relus the two sums, two lanes, two pairs of lanes, +0.0.
        assert len(re.findall(r"\badd\.rn\.f32", ptx)) - relus == 4 * sums
        assert not re.findall(r"\b(?:add|mul)\.f32|\bfma\.f32", ptx), "a rounding that ptxas may fuse"


def padded_and_sums(ptx: str, columns: int, record: dict) -> tuple[int, int]:
    """(padded heads, head sums a thread ends up with), from the relus: one for each accumulator."""
    accumulators = len(re.findall(r"\babs\.f32", ptx))
    sums = (len(re.findall(r"\badd\.rn\.f32", ptx)) - accumulators) // 4
    heads = accumulators // sums * 4
    assert accumulators % (columns // 2) == 0
    assert heads in (8, 16, 32, 64, 128)
    return heads, sums


def test_quantised_inputs_of_every_size():
    """Close to the reference on real FP8 vectors, whatever order the interpreter's dot products have."""
    if not kernels.INTERPRET:
        pytest.skip("needs the interpreter")
    gen = torch.Generator().manual_seed(8)
    q, q_scales = quantize_fp8(torch.randn(6, 32, 128, generator=gen))
    k, k_scales = quantize_fp8(torch.randn(257, 128, generator=gen) * torch.logspace(-3, 3, 257)[:, None])
    weights = torch.randn(6, 32, generator=gen) * q_scales
    starts, ends = torch.zeros(6).long(), torch.full((6,), 257)
    got, want = kernels.index_score(q, weights, k, k_scales, starts, ends), index_score(q, weights, k, k_scales, starts, ends)
    x, y = got.double(), want.double()
    assert 1 - 2 * (x * y).sum() / (x * x + y * y).sum() < 1e-12
