"""Sparse attention against fp64: error at most twice that of PyTorch at the same precision, FlashMLA's tolerances, garbage slots."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from thresher.cache import LatentCache
from thresher.types import PartialAttention

from .compare import differ_all, dissimilarity, exceed, fail_on
from .draw import GARBAGE, generator
from .machine import DEVICE, INTERPRET, sized

kernels = importlib.import_module("thresher.ops.sparse_attend.triton")

INF = math.inf
U = 2.0**-24
SLOTS = sized(4096, 192)  # of the caches
SCALE = 192**-0.5


@pytest.fixture(params=["bf16", "plain fp8", "fp8"])
def form(request, monkeypatch):
    """The kernels for latents: over bf16, and both over FP8. In the interpreter those two are one."""
    if request.param == "plain fp8":
        if INTERPRET:
            pytest.skip("the interpreter has the plain kernel alone")
        monkeypatch.setattr(kernels, "runs_gluon", lambda q: False)
    if request.param == "fp8" and not INTERPRET:
        assert kernels._hopper(torch.zeros(1, device=DEVICE)) is not None, "the Hopper kernel is what is to be tested"
    return request.param


def make_slots(num: int, topk: int, total: int, seed: int = 0) -> Tensor:
    """Rows in turn: full; every other one garbage; all garbage but the last; no slot at all; -1 at the end; one in the middle."""
    gen = generator(seed)
    slots = torch.randint(total, (num, topk), generator=gen, dtype=torch.int32)
    if total >= topk:
        slots = torch.stack([torch.randperm(total, generator=gen)[:topk] for _ in range(num)]).int()
    junk = torch.cat((GARBAGE, torch.tensor([total], dtype=torch.int32)))[torch.arange(topk) % (len(GARBAGE) + 1)]
    junk = torch.where((junk >= 0) & (junk < total), -1, junk)
    for row in range(num):
        match row % 6:
            case 1:
                slots[row, ::2] = junk[::2]
            case 2:
                slots[row, :-1] = junk[:-1]
            case 3:
                slots[row] = junk if row % 12 == 3 else -1
            case 4:
                slots[row, topk // 3 :] = -1
            case 5:
                kept = int(slots[row, topk // 2])
                slots[row] = -1
                slots[row, topk // 2] = kept
    return slots.to(DEVICE)


def gathered(q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``[Q, G, K, D]`` (zeros where there is none) and which are there ``[Q, K]``."""
    there = (slots >= 0) & (slots < len(k))
    safe = slots.long().masked_fill(~there, 0)
    zero = ~there[:, :, None, None]
    return k[safe].masked_fill(zero, 0).transpose(1, 2), v[safe].masked_fill(zero, 0).transpose(1, 2), there


def product(a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """Batched ``a @ b`` added up in ``kind``; bf16 in fp32 on the same matrix units as the kernel's, where PyTorch offers them."""
    if kind == torch.float32 and a.is_cuda and a.dtype == b.dtype == torch.bfloat16:
        made = torch.bmm(a.flatten(0, 1).contiguous(), b.flatten(0, 1).contiguous(), out_dtype=torch.float32)
        return made.unflatten(0, a.shape[:2])
    return a.to(kind) @ b.to(kind)


def attend(q: Tensor, k: Tensor, v: Tensor, slots: Tensor, scale: float, exact: bool) -> tuple[Tensor, Tensor]:
    """out and lse: in fp64, or as at the kernel's precision: products of bf16 added up in fp32, probabilities rounded to bf16."""
    outs, lses = [], []
    for row in range(0, len(q), 8):
        part = slice(row, row + 8)
        keys, values, there = gathered(q[part], k, v, slots[part])
        num, heads, dim = q[part].shape
        groups = keys.shape[1]
        kind = torch.float64 if exact else torch.float32
        wide = q[part].view(num, groups, heads // groups, dim)
        score = product(wide, keys.transpose(2, 3), kind) * scale
        score = score.masked_fill(~there[:, None, None], -INF)
        lse = score.logsumexp(3)
        probs = torch.exp(score - torch.where(lse == -INF, 0.0, lse)[..., None])
        outs.append(product(probs if exact else probs.bfloat16(), values, kind).view(num, heads, -1))
        lses.append(lse.view(num, heads))
    return torch.cat(outs), torch.cat(lses)


def judge(what: str, got: PartialAttention, q, k, v, slots, scale, record) -> list[str | None]:
    """Every check of one result."""
    want_out, want_lse = attend(q, k, v, slots, scale, True)
    poor_out, poor_lse = attend(q, k, v, slots, scale, False)
    full = want_lse > -INF
    problems = [None if got.out.dtype == got.lse.dtype == torch.float32 else f"{what}: not fp32"]
    problems.append(None if torch.equal(got.lse == -INF, ~full) else f"{what}: other rows are empty than should be")
    problems.append(None if bool((got.out[~full] == 0).all()) else f"{what}: an empty row is not 0")
    if not bool(got.out.isfinite().all()):
        at = (~got.out.isfinite()).nonzero()[0].tolist()
        return [*problems, f"{what}: not finite, first at {at}"]
    if not bool(full.any()):
        return problems
    size, peak = float(v[v.isfinite()].abs().max()), float(want_lse[full].abs().max())
    for name, mine, poor, exact, floor in (
        ("out", got.out, poor_out, want_out, 4 * U * size),
        ("lse", got.lse[full], poor_lse[full], want_lse[full], 8 * U * max(peak, 1.0)),
    ):
        off, allowed = (mine.double() - exact).abs(), (poor.double() - exact).abs()
        rms = off.square().mean().sqrt(), allowed.square().mean().sqrt()
        record("measured", f"{what}, {name}: max error {off.max():.2e} (PyTorch {allowed.max():.2e}), rms {rms[0]:.2e} ({rms[1]:.2e})")
        if off.max() > 2 * allowed.max() + floor:
            at = [int(i) for i in torch.unravel_index(off.argmax(), off.shape)]
            problems.append(f"{what}, {name}: max error {off.max():.3g} at {at}, over twice PyTorch's {allowed.max():.3g}")
        if rms[0] > 2 * rms[1] + floor:
            problems.append(f"{what}, {name}: rms error {rms[0]:.3g}, over twice PyTorch's {rms[1]:.3g}")
    # FlashMLA's own.
    problems.append(exceed(f"{what}, out", got.out, want_out, (2.01 / 128 * want_out.abs()).clamp(min=1e-3)))
    problems.append(exceed(f"{what}, lse", got.lse[full], want_lse[full], (8.01 / 65536 * want_lse[full].abs()).clamp(min=1e-6)))
    off = dissimilarity(got.out, want_out)
    problems.append(None if off <= 5e-6 else f"{what}: off by {off:.3g} of cosine, over 5e-6")
    return problems


def unnamed_is_nan(rows: Tensor, slots: Tensor) -> Tensor:
    """The rows with NaN in all that no slot names."""
    named = torch.zeros(len(rows), dtype=torch.bool, device=DEVICE)
    named[slots[(slots >= 0) & (slots < len(rows))].long()] = True
    return rows.masked_fill(~named.view(-1, *[1] * (rows.dim() - 1)), math.nan)


GQA = sized([(1, 1, 64, 64), (16, 2, 128, 128), (64, 1, 192, 128), (128, 8, 128, 128)], [(1, 1, 16, 16), (16, 2, 16, 12), (64, 1, 8, 8)])


@pytest.mark.parametrize("topk", sized([77, 2048], [77]))
@pytest.mark.parametrize(("heads", "groups", "k_dim", "v_dim"), GQA)
def test_gqa(heads, groups, k_dim, v_dim, topk, record_property):
    gen = generator(heads)
    q = torch.randn(12, heads, k_dim, generator=gen).bfloat16().to(DEVICE)
    k, v = (torch.randn(SLOTS, groups, dim, generator=gen).bfloat16().to(DEVICE) for dim in (k_dim, v_dim))
    v = v / 10  # FlashMLA's absolute tolerance is meant for values of this size
    slots = make_slots(12, topk, SLOTS)
    k, v = unnamed_is_nan(k, slots), unnamed_is_nan(v, slots)
    got = kernels.sparse_attend(q, k, v, slots, k_dim**-0.5)
    fail_on(judge(f"GQA {heads}/{groups} heads of {k_dim}, K {topk}", got, q, k, v, slots, k_dim**-0.5, record_property))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gqa_in_other_types(dtype):
    gen = generator(1)
    dim = sized(64, 16)
    q = torch.randn(6, 9, dim, generator=gen).to(dtype).to(DEVICE)
    k, v = (torch.randn(SLOTS, 3, dim, generator=gen).to(dtype).to(DEVICE) for _ in range(2))
    slots = make_slots(6, 130, SLOTS)
    got = kernels.sparse_attend(q, k, v, slots, dim**-0.5)
    out, lse = attend(q, k, v, slots, dim**-0.5, True)
    tol = 5e-6 if dtype == torch.float32 else 1e-3
    fail_on([exceed("out", got.out, out, tol * (1 + out.abs())), exceed("lse", got.lse, lse, 1e-5 * (1 + lse.abs()))])


def make_mla(num: int, heads: int, seed: int, page_size: int = 64) -> tuple[Tensor, LatentCache, Tensor]:
    """q, an FP8 cache whose groups of 128 have scales of their own, and its latents in bf16 (exactly what the bytes stand for).

    Values are a tenth, as in FlashMLA's tests, whose absolute tolerance is meant for that; queries make up for it.
    """
    gen = generator(seed)
    pages = -(-SLOTS // page_size)
    cache = LatentCache(pages, page_size)
    total = pages * page_size
    size = torch.tensor([0.1, 0.05, 0.01, 0.1]).repeat_interleave(128)
    cache.store(torch.arange(total), torch.randn(total, 512, generator=gen) * size, torch.randn(total, 64, generator=gen) / 10)
    latents = cache.load(torch.arange(total)).bfloat16()
    cache.data = cache.data.to(DEVICE)
    return (8 * torch.randn(num, heads, 576, generator=gen)).bfloat16().to(DEVICE), cache, latents.to(DEVICE)


@pytest.mark.parametrize("heads", sized([1, 16, 64, 128], [1, 20]))
def test_mla_decode(heads, form, record_property):
    """Few queries: slots are cut into shares."""
    q, cache, latents = make_mla(6, heads, heads)
    problems = []
    for topk in sized([77, 2048], [77]):
        slots = make_slots(6, topk, len(latents), seed=topk)
        if form != "bf16":
            named = unnamed_is_nan(latents, slots).isnan().any(1)
            data = cache.data.clone()
            data.view(-1, 656)[named] = 0xFF
            got = kernels.sparse_attend_mla_fp8(q, data, slots, SCALE)
        else:
            got = kernels.sparse_attend_mla(q, unnamed_is_nan(latents, slots), slots, SCALE)
        k = latents[:, None]
        problems += judge(f"MLA {form}, {heads} heads, K {topk}", got, q, k, k[..., :512], slots, SCALE, record_property)
    fail_on(problems)


@pytest.mark.parametrize(("num", "heads", "topk"), [(6, 128, 2048), (1, 128, 2048), (32, 64, 500), (140, 16, 700), (5, 20, 1)])
def test_only_so_many_columns(num, heads, topk, record_property):
    """Where the rest is known to hold no slots: none, all, and numbers that fill no tile; in shares of which some are left nothing."""
    if INTERPRET:
        pytest.skip("it is a kernel for Hopper that looks at counts, and none is interpreted")
    q, cache, latents = make_mla(num, heads, heads)
    counts = (torch.arange(num) * 131 % (topk + 2) - 1).clamp(0, topk).to(DEVICE)
    slots = make_slots(num, topk, len(latents), seed=topk).masked_fill(torch.arange(topk, device=DEVICE) >= counts[:, None], -1)
    got, k = kernels.attend_in_shares(q, cache.data, slots, SCALE, counts).added(), latents[:, None]
    problems = judge(f"{num} queries, {heads} heads, K {topk}", got, q, k, k[..., :512], slots, SCALE, record_property)
    again = kernels.attend_in_shares(q, cache.data, slots, SCALE, counts.int()).added()
    fail_on(problems + differ_all("again", (again.out, again.lse), (got.out, got.lse)))


@pytest.mark.parametrize("heads", sized([16, 128], [3]))
def test_mla_prefill(heads, form, record_property):
    """As many queries as fill the device: one share each."""
    num, topk = sized((144, 200), (6, 70))
    q, cache, latents = make_mla(num, heads, heads + 1)
    slots = make_slots(num, topk, len(latents))
    if INTERPRET:
        q = q.repeat(30, 1, 1)[:132]
        slots = slots.repeat(30, 1)[:132]
    assert kernels.cut(len(q), topk, 64)[0] == 1
    run, held = (kernels.sparse_attend_mla, latents) if form == "bf16" else (kernels.sparse_attend_mla_fp8, cache.data)
    got = run(q, held, slots, SCALE)
    k = latents[:, None]
    fail_on(judge(f"MLA prefill {form}, {heads} heads", got, q, k, k[..., :512], slots, SCALE, record_property))


@pytest.mark.parametrize("form", ["gqa", "bf16", "plain fp8", "fp8"], indirect=True)
def test_nothing_to_attend_to(form):
    """All slots -1, all garbage, no slots at all, no queries."""
    q, cache, latents = make_mla(3, 16, 0)
    k, v = latents[:, None, :64], latents[:, None, 64:128]
    run = {
        "gqa": lambda q, slots: kernels.sparse_attend(q[..., :64], k, v, slots, 0.1),
        "bf16": lambda q, slots: kernels.sparse_attend_mla(q, latents, slots, 0.1),
        "fp8": lambda q, slots: kernels.sparse_attend_mla_fp8(q, cache.data, slots, 0.1),
        "plain fp8": lambda q, slots: kernels.sparse_attend_mla_fp8(q, cache.data, slots, 0.1),
    }[form]
    junk = torch.tensor([-(2**31), 2**31 - 1, -1, -2, len(latents), 2**30], dtype=torch.int32, device=DEVICE)
    problems = []
    for what, slots in (
        ("all -1", torch.full((3, 77), -1, dtype=torch.int32, device=DEVICE)),
        ("garbage", junk.repeat(13)[:77].expand(3, -1)),
        ("no slots", torch.zeros(3, 0, dtype=torch.int32, device=DEVICE)),
    ):
        got = run(q, slots)
        problems.append(None if bool((got.out == 0).all()) else f"{what}: out is not 0")
        problems.append(None if bool((got.lse == -INF).all()) else f"{what}: lse is not -inf")
    assert run(q[:0], torch.zeros(0, 77, dtype=torch.int32, device=DEVICE)).out.shape[0] == 0
    fail_on(problems)


@pytest.mark.parametrize("form", ["plain fp8", "fp8"], indirect=True)
@pytest.mark.parametrize("odd_scales", [False, True])
@pytest.mark.parametrize(("heads", "page_size"), [(16, 2), (16, 61), (16, 64), *sized([(100, 61), (128, 2)], [])])
def test_fp8_pages_and_scales_of_any_size_and_strides(heads, page_size, odd_scales, form, record_property):
    q, cache, latents = make_mla(6, heads, page_size, page_size)
    if odd_scales:
        # Other engines' scales are no powers of two; what is attended to is then each product rounded to bf16.
        scales = cache.data.view(-1, 656)[:, 512:528].view(torch.float32)
        scales *= 0.5 + torch.rand(scales.shape, generator=generator(9)).to(DEVICE)
        latents = cache.load(torch.arange(len(latents), device=DEVICE)).bfloat16()
    slots = make_slots(6, 77, len(latents))
    pages = len(cache.data)
    apart = torch.full((pages, page_size + 3, 1, 672), 0xFF, dtype=torch.uint8, device=DEVICE)[:, :page_size, :, :656]
    apart.copy_(cache.data)
    # In the interpreter products stay fp32.
    k = (cache.load(torch.arange(len(latents), device=DEVICE)) if INTERPRET else latents)[:, None]
    got = kernels.sparse_attend_mla_fp8(q, cache.data, slots, SCALE)
    strided = kernels.sparse_attend_mla_fp8(q.transpose(0, 1).contiguous().transpose(0, 1), apart, slots.T.contiguous().T, SCALE)
    what = f"MLA {form}, {heads} heads, pages of {page_size}, {'odd' if odd_scales else 'even'} scales"
    problems = judge(what, got, q, k, k[..., :512], slots, SCALE, record_property)
    fail_on(problems + differ_all("strided", (strided.out, strided.lse), (got.out, got.lse)))


@pytest.mark.parametrize("form", ["plain fp8", "fp8"], indirect=True)
def test_fp8_repeats(form):
    """Ten times the same bits, at a size where programs and warps race."""
    q, cache, latents = make_mla(sized(8, 2), sized(128, 3), 7)
    slots = make_slots(len(q), sized(2048, 70), len(latents))
    first = kernels.sparse_attend_mla_fp8(q, cache.data, slots, SCALE)
    problems = []
    for turn in range(sized(10, 2)):
        got = kernels.sparse_attend_mla_fp8(q, cache.data, slots, SCALE)
        problems += differ_all(f"repeat {turn}, {form}", (got.out, got.lse), (first.out, first.lse))
    fail_on(problems)


def test_far_scores_and_ties():
    """Logits in the hundreds, where one slot has all the weight, and all equal, where each has as much."""
    q, _, latents = make_mla(6, 16, 5)
    slots = make_slots(6, 130, len(latents), seed=1)
    q[0] = 0
    q[1:3] *= 60
    k = latents[:, None]
    got = kernels.sparse_attend_mla(q, latents, slots, SCALE)
    out, lse = attend(q, k, k[..., :512], slots, SCALE, True)
    full = lse > -INF
    far = (q.abs().amax(-1) > 400)[..., None]
    problems = [exceed("out", got.out, out, torch.where(far, 0.05, 2e-2) * (1 + out.abs()))]
    problems.append(exceed("lse", got.lse[full], lse[full], 2e-5 * (1 + lse[full].abs())))
    problems.append(exceed("lse of equal logits", got.lse[0], torch.full_like(got.lse[0], math.log(130)), 1e-5))
    fail_on(problems)


def test_what_stands_around_flash_mla():
    """The two launches of its adapter against PyTorch's steps on a CPU."""
    around = importlib.import_module("thresher.ops.sparse_attend.flash_mla_kernels")
    gen, num = generator(7), sized(300, 5)
    slots = torch.randint(-50, SLOTS + 50, (num, sized(2048, 130)), generator=gen).int()
    slots[:, :8] = torch.tensor([-(2**31), -2, -1, 0, SLOTS - 1, SLOTS, SLOTS + 1, 2**31 - 1]).int()
    out, lse = torch.randn(num, 2, 64, 512, generator=gen).bfloat16(), torch.randn(num, 64, 1, generator=gen)
    lse[::3, 5], lse[::2, 7] = INF, -INF
    got = (around.inside(slots.to(DEVICE), SLOTS), *around.as_part(out.to(DEVICE)[:, 1], lse.to(DEVICE)[:, :, 0]))
    want = (slots.masked_fill((slots < 0) | (slots >= SLOTS), -1), out[:, 1].float(), lse[:, :, 0].masked_fill(lse[:, :, 0] == INF, -INF))
    fail_on(differ_all("around FlashMLA", [x.cpu() for x in got], want))
