"""The sparse attention kernels against fp64, in the interpreter (fp32 arithmetic throughout), and compiled for Hopper."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from thresher.cache import LatentCache
from thresher.errors import ThresherError

kernels = importlib.import_module("thresher.ops.sparse_attend.triton")

GARBAGE = torch.tensor([-(2**31), 2**31 - 1, -2, -1, 10**6, 1 << 20], dtype=torch.int32)
SHARED_LIMIT = 227 * 1024


@pytest.fixture(params=["shares", "one share"])
def shares(request, monkeypatch):
    if request.param == "one share":
        monkeypatch.setattr(kernels, "PROGRAMS", 1)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory for results starts as NaN."""

    new_empty = torch.Tensor.new_empty

    def new_nan(self, *size, **kwargs):
        made = new_empty(self, *size, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)


def expected(q, k, v, slots, scale):
    """fp64, over the slots within 0..S - 1; k and v ``[S, G, D]``."""
    q, k, v = q.double(), k.double(), v.double()
    heads, group_heads = q.shape[1], q.shape[1] // k.shape[1]
    out, lse = torch.zeros(len(q), heads, v.shape[2]).double(), torch.full((len(q), heads), -math.inf).double()
    for i in range(len(q)):
        chosen = [s for s in slots[i].tolist() if 0 <= s < len(k)]
        if chosen:
            wide_k, wide_v = (x[chosen].repeat_interleave(group_heads, 1) for x in (k, v))
            score = torch.einsum("nd,knd->nk", q[i], wide_k) * scale
            lse[i] = score.logsumexp(1)
            out[i] = torch.einsum("nk,knd->nd", score.softmax(1), wide_v)
    return out, lse


def draw_slots(num, topk, total, gen):
    """Rows: full; full; half garbage; all garbage but one; no slot at all; then full."""
    slots = torch.stack([torch.randperm(total, generator=gen)[:topk] for _ in range(num)]).int()
    junk = GARBAGE[torch.arange(topk) % len(GARBAGE)]
    slots[2:3, ::2] = junk[::2]
    slots[3:4, :-1] = junk[:-1]
    slots[4:5] = junk
    return slots


def draw(num=6, heads=6, groups=2, dim=16, v_dim=12, total=200, topk=150, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(num, heads, dim, generator=gen).to(dtype)
    k, v = torch.randn(total, groups, dim, generator=gen).to(dtype), torch.randn(total, groups, v_dim, generator=gen).to(dtype)
    return q, k, v, draw_slots(num, topk, total, gen)


def close(got, want, tol):
    assert got.out.dtype == got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), want[0], rtol=tol, atol=tol)
    torch.testing.assert_close(got.lse.double(), want[1], rtol=tol, atol=tol)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "v_dim", "topk"),
    [(1, 1, 16, 12, 150), (9, 3, 64, 64, 65), (20, 1, 24, 40, 64), (6, 6, 8, 1, 7), (70, 1, 16, 16, 130), (2, 1, 256, 256, 1)],
)
def test_gqa(heads, groups, dim, v_dim, topk):
    q, k, v, slots = draw(heads=heads, groups=groups, dim=dim, v_dim=v_dim, topk=topk)
    close(kernels.sparse_attend(q, k, v, slots, dim**-0.5), expected(q, k, v, slots, dim**-0.5), 2e-6)


@pytest.mark.parametrize("dtypes", [[torch.bfloat16] * 3, [torch.float16] * 3, [torch.float32, torch.bfloat16, torch.float16]])
def test_gqa_types(dtypes):
    q, k, v, slots = draw()
    q, k, v = (x.to(dtype) for x, dtype in zip((q, k, v), dtypes, strict=True))
    close(kernels.sparse_attend(q, k, v, slots, 0.25), expected(q, k, v, slots, 0.25), 2e-6)


@pytest.mark.usefixtures("shares")
def test_gqa_never_reads_what_is_not_named():
    q, k, v, slots = draw()
    slots[slots == 0] = -1
    want = kernels.sparse_attend(q, k, v, slots, 0.25)
    unused = torch.ones(200, dtype=torch.bool).scatter(0, slots[2][(slots[2] >= 0) & (slots[2] < 200)].long(), False)
    k[unused] = v[unused] = math.nan
    got = kernels.sparse_attend(q[2:3], k, v, slots[2:3], 0.25)
    assert torch.isfinite(got.out).all()
    torch.testing.assert_close(got.out, want.out[2:3], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got.lse, want.lse[2:3], rtol=2e-6, atol=2e-6)


def test_gqa_strides():
    q, k, v, slots = draw()
    want = kernels.sparse_attend(q, k, v, slots, 0.25)
    apart = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    columns = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    wide = torch.cat((slots, slots), 1)[:, : slots.shape[1]]
    for args in ((*apart, slots), (*columns, wide), (q[:, :, :], k, v, slots.t().contiguous().t())):
        got = kernels.sparse_attend(*args, 0.25)
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse, want.lse)


@pytest.mark.usefixtures("shares")
def test_gqa_far_scores_and_ties():
    q, k, v, slots = draw()
    q[0] = 0
    q[1] *= 300
    got = kernels.sparse_attend(q, k, v, slots, 0.25)
    close(got, expected(q, k, v, slots, 0.25), 2e-4)
    assert got.lse[0, 0].item() == pytest.approx(math.log(150), rel=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 5, 9), (2, 3, 0, 9), (2, 3, 5, 0)])
def test_nothing_at_all(shape):
    num, heads, topk, total = shape
    got = kernels.sparse_attend(
        torch.ones(num, heads, 8), torch.ones(total, 1, 8), torch.ones(total, 1, 4), torch.zeros(num, topk, dtype=torch.int32), 1.0
    )
    assert got.out.shape == (num, heads, 4)
    assert (got.out == 0).all()
    assert (got.lse == -math.inf).all()


def draw_mla(num, heads, topk, pages, page_size, seed=0):
    gen = torch.Generator().manual_seed(seed)
    total = pages * page_size
    cache = LatentCache(pages, page_size)
    size = torch.tensor([1.0, 30.0, 0.01, 3.0]).repeat_interleave(128)  # the four groups of a latent have scales of their own
    cache.store(torch.arange(total), torch.randn(total, 512, generator=gen) * size, torch.randn(total, 64, generator=gen))
    return torch.randn(num, heads, 576, generator=gen).bfloat16(), cache, draw_slots(num, topk, total, gen)


def expected_mla(q, latents, slots, scale):
    return expected(q, latents[:, None], latents[:, None, :512], slots, scale)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize(("num", "heads", "topk", "pages", "page_size"), [(5, 3, 70, 27, 3), (1, 17, 129, 2, 69), (1, 128, 64, 1, 64)])
def test_mla_fp8_and_bf16(num, heads, topk, pages, page_size):
    q, cache, slots = draw_mla(num, heads, topk, pages, page_size)
    latents = cache.load(torch.arange(pages * page_size))
    scale = 576**-0.5 / 30
    close(kernels.sparse_attend_mla_fp8(q, cache.data, slots, scale), expected_mla(q, latents, slots, scale), 5e-6)
    latents = latents.bfloat16()
    want = expected_mla(q, latents, slots, scale)
    close(kernels.sparse_attend_mla(q, latents, slots, scale), want, 5e-6)
    padded = torch.cat((latents, latents[:, :4]), 1)[:, :576]  # rows that do not start at multiples of 16 bytes
    close(kernels.sparse_attend_mla(q, padded, slots, scale), want, 5e-6)


def test_fp8_scales_of_any_size_and_strided_pages():
    q, cache, slots = draw_mla(5, 2, 70, 27, 3)
    scales = cache.data.view(-1, 656)[:, 512:528].view(torch.float32)
    scales *= 1.3
    latents = cache.load(torch.arange(81))
    want = expected_mla(q, latents, slots, 0.001)
    close(kernels.sparse_attend_mla_fp8(q, cache.data, slots, 0.001), want, 5e-6)
    apart = torch.full((2, 27, 5, 1, 672), 0x7F, dtype=torch.uint8)[0, :, :3, :, :656]
    apart.copy_(cache.data)
    close(kernels.sparse_attend_mla_fp8(q, apart, slots, 0.001), want, 5e-6)


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize("fp8", [True, False])
def test_mla_never_reads_what_is_not_named(fp8):
    q, cache, slots = draw_mla(5, 2, 70, 27, 3)
    q, slots = q[2:3], slots[2:3].masked_fill(slots[2:3] == 0, -1)
    unused = torch.ones(81, dtype=torch.bool).scatter(0, slots[(slots >= 0) & (slots < 81)].long(), False)
    latents = cache.load(torch.arange(81)).bfloat16()

    def run():
        return kernels.sparse_attend_mla_fp8(q, cache.data, slots, 0.001) if fp8 else kernels.sparse_attend_mla(q, latents, slots, 0.001)

    want = run()
    cache.data.view(81, 656)[unused] = 0xFF  # NaN in all three formats, though not where the interpreter reads e4m3
    latents[unused] = math.nan
    got = run()
    assert torch.isfinite(got.out).all()
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


def test_repeats_are_bit_equal():
    q, cache, slots = draw_mla(3, 4, 70, 27, 3)
    first = kernels.sparse_attend_mla_fp8(q, cache.data, slots, 0.001)
    for _ in range(3):
        again = kernels.sparse_attend_mla_fp8(q, cache.data, slots, 0.001)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


@pytest.mark.parametrize(("shares", "dim"), [(2, 512), (3, 1), (5, 77), (16, 96), (32, 64), (33, 512), (130, 40)])
def test_shares_add_up(shares, dim):
    """Shares of very different weight, some of them empty, and a row of empty ones alone."""
    gen = torch.Generator().manual_seed(shares)
    parts, peaks = torch.randn(3, shares, 7, dim, generator=gen), 40 * torch.randn(3, shares, 7, generator=gen)
    totals = 1 + torch.rand(3, shares, 7, generator=gen)
    empty = torch.rand(3, shares, 7, generator=gen) < 0.3
    empty[1, :, 2] = True
    peaks[empty], totals[empty], parts[empty] = -math.inf, 0.0, 0.0
    out, lse = vars(kernels.Shares(parts, peaks, totals).added()).values()
    size = peaks.double().amax(1, keepdim=True).clamp(min=-1e9)
    weights = torch.exp2(peaks.double() - size)
    total = (weights * totals).sum(1)
    want = (weights[..., None] * parts).sum(1) / total.clamp(min=1e-30)[..., None]
    torch.testing.assert_close(out.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), (size[:, 0] + total.log2()) * math.log(2), rtol=2e-6, atol=2e-6)
    assert lse[1, 2] == -math.inf


def test_no_share_is_empty():
    for programs in (1, 2, 3, 16, 64, 66, 67, 132, 133, 5000):
        for topk in (1, 63, 64, 65, 512, 2048, 8192):
            num, tiles = kernels.cut(programs, topk, 64)
            assert (num - 1) * tiles * 64 < topk <= num * tiles * 64
            assert num == 1 or num * programs <= kernels.PROGRAMS


def test_what_it_cannot_do():
    q, k, v, slots = draw()
    latents, data = torch.zeros(9, 576).bfloat16(), LatentCache(3, 3).data
    half = torch.zeros(6, 2, 576).bfloat16()
    for why, match in (
        (kernels.unsupported(q.double(), k, v), "float64"),
        (kernels.unsupported(torch.zeros(1, 1, 300), torch.zeros(1, 1, 300), v), "dims"),
        (kernels.unsupported(q.clone().requires_grad_(), k, v), "gradient"),
        (kernels.unsupported_mla(half.float(), latents), "bfloat16"),
        (kernels.unsupported_mla(half, latents, 256), "value"),
        (kernels.unsupported_mla(half.expand(6, 2, 576).repeat(1, 65, 1), latents), "heads"),
        (kernels.unsupported_mla_fp8(half, data.view(torch.int8)), "uint8"),
        (kernels.unsupported_mla_fp8(half, data[..., 1:]), "656"),
        (kernels.unsupported_mla_fp8(half, torch.zeros(3, 3, 1, 657, dtype=torch.uint8)[..., :656]), "16 bytes"),
    ):
        assert match in why
    assert kernels.unsupported(q, k, v) is kernels.unsupported_mla(half, latents) is kernels.unsupported_mla_fp8(half, data) is None
    for args, match in (
        ((half[..., :64], data, slots), "q must"),
        ((half, data, slots.long()), "int32"),
        ((half.float(), data, slots), "bf"),
    ):
        with pytest.raises(ThresherError, match=match):
            kernels.sparse_attend_mla_fp8(*args, 1.0)


MLA_CODE = """
import torch
from thresher.cache import LatentCache
from thresher.ops.sparse_attend.triton import sparse_attend_mla, sparse_attend_mla_fp8
data, latents = LatentCache(33).data, torch.zeros(33 * 64, 576).bfloat16()
for heads in HEADS:
    for num in (1, 140):
        q, slots = torch.zeros(num, heads, 576).bfloat16(), torch.zeros(num, 2048, dtype=torch.int32)
        sparse_attend_mla_fp8(q, data, slots, 0.1)
        sparse_attend_mla(q, latents, slots, 0.1)
"""

GQA_CODE = """
import torch
from thresher.ops.sparse_attend.triton import sparse_attend
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for heads, groups, dim in ((9, 3, 64), (32, 1, 128), (64, 1, 128), (8, 1, 256), (64, 1, 256)):
        q, k = torch.zeros(140, heads, dim, dtype=dtype), torch.zeros(4096, groups, dim, dtype=dtype)
        sparse_attend(q, k, k, torch.zeros(140, 2048, dtype=torch.int32), 0.1)
"""


@pytest.mark.parametrize(("heads", "wgmma"), [((16, 32), False), ((64, 128), True)])
def test_mla_compiles_for_hopper(compile_for_hopper, heads, wgmma):
    found = compile_for_hopper(MLA_CODE.replace("HEADS", str(heads)))
    mla = [kernel for kernel in found if kernel.name == "mla_kernel"]
    assert len(mla) >= 4
    assert {kernel.name for kernel in found} == {"mla_kernel", "combine_kernel"}
    for kernel in found:
        assert kernel.shared <= SHARED_LIMIT
        assert getattr(kernel, "stack", 0) <= 512
    for kernel in found:
        if kernel.name == "combine_kernel":
            assert kernel.shared == getattr(kernel, "stack", 0) == 0, "threads add up what they loaded themselves"
            assert "ld.global.v4" in kernel.ptx
    for kernel in mla:
        assert ("wgmma.mma_async" in kernel.ptx) == wgmma
        assert "cp.async" in kernel.ptx


def test_gqa_compiles_for_hopper(compile_for_hopper):
    found = compile_for_hopper(GQA_CODE)
    assert len(found) == 14  # a tile of 16 heads serves 8 and 64 of them in fp32
    for kernel in found:
        assert kernel.shared <= SHARED_LIMIT
        assert getattr(kernel, "stack", 0) == 0
    assert sum("wgmma.mma_async" in kernel.ptx for kernel in found) == 4
