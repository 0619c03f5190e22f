"""Quantise-and-store against the references, to the bit where no cosine is involved; the merge against fp64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import triton
import triton.language as tl

from thresher.cache import IndexKeyCache, LatentCache
from thresher.ops import apply_rope, hadamard, quantize_fp8

from .compare import bits, differ, differ_all, exceed, fail_on
from .draw import generator
from .machine import DEVICE, INTERPRET, sized

quantizing = importlib.import_module("thresher.ops.quantize.triton")
launching = importlib.import_module("thresher.ops.quantize.triton_launch")
sending = importlib.import_module("thresher.ops.send")
turning = importlib.import_module("thresher.ops.quantize.triton_kernels")
merging = importlib.import_module("thresher.ops.merge.triton")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf
NUM = sized(300, 12)


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal rows of magnitudes from 1e-9 to 1e9."""
    gen = generator(seed)
    return torch.randn(*shape, generator=gen) * 10.0 ** torch.randint(-9, 10, (*shape[:-1], 1), generator=gen)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize(dtype):
    problems = []
    for shape in ((NUM, 128), (7, 3, 64), (3, 5), (1, 1), (2, 2500), (64,), (0, 8)):
        x = spread(*shape).to(dtype).nan_to_num(0, 6e4, -6e4)
        got = quantizing.quantize_fp8(x.to(DEVICE))
        problems += differ_all(f"{shape}", [y.cpu() for y in got], quantize_fp8(x))
    fail_on(problems)


def test_quantize_at_every_boundary():
    """e4m3 numbers, halfway points and their fp32 neighbours; scales at their own boundaries; signed zeros, subnormals; NaN."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    points = torch.cat([points, points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1e9))])
    points = torch.cat([points, -points])
    points = points[points.abs() <= 448]
    x = torch.cat([torch.full((len(points), 1), 448.0), points[:, None], torch.zeros(len(points), 1) * -1.0], dim=1)
    tops = torch.cat([torch.tensor([448.0, 1e-4, 0.0, 1e-45, 3e38]), 7.0 * 2.0 ** torch.arange(-30, 30)])
    tops = torch.cat([tops, tops.nextafter(torch.tensor(1e39)), tops.nextafter(torch.tensor(-1.0))]).clamp(max=torch.finfo().max)
    x = torch.cat([x, torch.stack([tops, tops / 3, -tops / 1000], dim=1)])
    problems = differ_all("boundaries", [y.cpu() for y in quantizing.quantize_fp8(x.to(DEVICE))], quantize_fp8(x))
    bad = torch.tensor([[torch.nan, 1.0], [1.0, torch.inf], [-torch.inf, 0.0]])
    values, scales = quantizing.quantize_fp8(bad.to(DEVICE))
    problems.append(None if bool(values.float().isnan().all()) and bool((scales == 1).all()) else "not finite, but not NaN under scale 1")
    fail_on(problems)


def nearly(what: str, got: torch.Tensor, want: torch.Tensor, exact: bool) -> str | None:
    """The same bits; where a cosine was taken, a rare value may be one e4m3 step off, since it may differ by an ulp."""
    if exact:
        return differ(what, got, want)
    far = exceed(what, got.float(), want.float(), want.float().abs().double() * 2**-3 + 2**-9)
    odd = int((got.float() != want.float()).sum())
    return far or (f"{what}: {odd} of {got.numel()} differ" if odd > max(2, got.numel() // 200) else None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("dim", "rotary", "style"), [(128, 0, "half"), (128, 64, "half"), (64, 64, "interleaved"), (1024, 0, "half")])
def test_keys_and_queries(dim, rotary, style, dtype):
    gen, heads = generator(1), sized(33, 3)
    wide = (torch.randn(NUM, 2 * heads, dim + 3, generator=gen) * 10.0 ** torch.randint(-3, 4, (NUM, 1, 1), generator=gen)).to(dtype)
    x, weights = wide.to(DEVICE)[:, ::2, :dim], torch.randn(NUM, 2 * heads, generator=gen)[:, :heads]
    positions = torch.randint(0, 2**20, (NUM,), generator=gen)
    values, folded = quantizing.quantize_queries(x, weights.to(DEVICE), positions.to(DEVICE), 1e4, rotary, style, 0.3)
    rotated = apply_rope(wide[:, ::2, :dim], positions, 1e4, rotary, style)
    want, scales = quantize_fp8(hadamard(rotated))
    problems = [nearly("queries", values.cpu(), want, rotary == 0), nearly("weights", folded.cpu(), weights * 0.3 * scales, rotary == 0)]

    slots = torch.randperm(NUM + 9, generator=gen)[:NUM]
    slots[3], slots[5], slots[7] = -1, 2**40, -(2**63)
    kept = (slots >= 0) & (slots < NUM + 9)
    pages = -(-(NUM + 9) // 61)
    cache, wanted = IndexKeyCache(pages, dim, 61, DEVICE), IndexKeyCache(pages, dim, 61)
    quantizing.store_index_keys(cache.pages, slots.to(DEVICE), x[:, 0], positions.to(DEVICE), 1e4, rotary, style)
    wanted.store(slots[kept], want[kept, 0], scales[kept, 0])
    if rotary == 0:
        problems.append(differ("stored keys", cache.pages.cpu(), wanted.pages))
    else:
        odd = int((cache.pages.cpu() != wanted.pages).sum())
        problems.append(f"stored keys: {odd} bytes differ" if odd > max(2, wanted.pages.numel() // 200) else None)
    fail_on(problems)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rotate", [False, True])
def test_latents(dtype, rotate):
    gen = generator(2)
    latent = spread(NUM, 4, 128).clamp(-6e4, 6e4).view(NUM, 512).to(dtype)
    rope = torch.randn(NUM, 80, generator=gen).to(dtype)[:, 8:72]
    positions, slots = torch.randint(0, 2**20, (NUM,), generator=gen), torch.randperm(NUM + 9, generator=gen)[:NUM]
    slots[3], slots[5], slots[7] = -1, 2**40, -(2**63)
    kept = (slots >= 0) & (slots < NUM + 9)
    pages = -(-(NUM + 9) // 61)
    cache, want = LatentCache(pages, 61, device=DEVICE), LatentCache(pages, 61)
    wide = torch.zeros(NUM, 80, dtype=dtype, device=DEVICE)
    wide[:, 8:72] = rope.to(DEVICE)
    quantizing.store_latents(cache.data, slots.to(DEVICE), latent.to(DEVICE), wide[:, 8:72], positions.to(DEVICE) if rotate else None)
    turned = apply_rope(rope, positions, 10000.0, 64, "interleaved") if rotate else rope
    want.store(slots[kept], latent[kept], turned[kept])
    got = cache.data.cpu()
    problems = [differ("latents and scales", got[..., :528], want.data[..., :528])]
    odd = int((got[..., 528:] != want.data[..., 528:]).sum())
    allowed = want.data[..., 528:].numel() // 200 if rotate else 0
    problems.append(f"RoPE part: {odd} bytes differ" if odd > allowed else None)
    fail_on(problems)


def step(num: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """New tokens as ``store_step`` takes them, between the caches and theta; strided wherever a stride is allowed."""
    gen = generator(num + heads)

    def drawn(*shape: int) -> torch.Tensor:
        wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=gen) * 10.0 ** torch.randint(-3, 4, (*shape[:-1], 1), generator=gen)
        return wide.to(DEVICE, dtype)[..., 1:-2]

    slots = torch.randperm(num + 9, generator=gen)[:num]
    slots[3::7], slots[5::7] = -1, 2**40
    positions = torch.randint(0, 2**20, (num,), generator=gen).to(DEVICE)
    parts = drawn(num, dim), drawn(num, 512), drawn(num, 64), drawn(num, 2 * heads, dim)[:, ::2], drawn(num, heads)
    return slots.to(DEVICE), *parts, positions


def step_caches(num: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return IndexKeyCache(num // 60 + 1, dim, 61, DEVICE).pages, LatentCache(num // 4 + 2, 5, device=DEVICE).data


def one_by_one(num: int, dim: int, given: tuple[torch.Tensor, ...], rotary: int, style: str) -> tuple[torch.Tensor, ...]:
    """What ``store_step`` stores and returns, by the kernels of one part each."""
    pages, data = step_caches(num, dim)
    slots, key, latent, rope, q, weights, positions = given
    quantizing.store_index_keys(pages, slots, key, positions, 1e4, rotary, style)
    quantizing.store_latents(data, slots, latent, rope, positions, 1e4)
    return pages, data, *quantizing.quantize_queries(q, weights, positions, 1e4, rotary, style, 0.3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("num", "heads", "dim", "rotary", "style"),
    [
        (1, sized(64, 5), 128, 64, "interleaved"),
        (sized(32, 5), sized(64, 3), 128, 64, "interleaved"),
        (NUM, sized(64, 3), 128, 128, "half"),
        (NUM, 1, 64, 0, "half"),
        (sized(7, 2), 5, 1024, 64, "half"),
    ],
)
def test_a_step_has_the_bits_of_its_parts(num, heads, dim, rotary, style, dtype):
    given, caches = step(num, heads, dim, dtype), step_caches(num, dim)
    got = *caches, *quantizing.store_step(*caches, *given, 1e4, rotary, style, 0.3)
    fail_on(differ_all("step", got, one_by_one(num, dim, given, rotary, style)))


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize(("num", "row"), [(1, 9), (1, 2304), (sized(32, 2), 2304), sized((300, 1152), (2, 1152))])
def test_words_are_sent(num, row, ranks):
    """To memory of this one device; the ranks one after the other, twice."""
    first, at = 3, 2**15
    words = torch.randint(-(2**62), 2**62, (ranks, num, row), generator=generator(row)).to(DEVICE)
    memory = torch.zeros(ranks, at // 8 + words.numel() + 9, dtype=torch.int64, device=DEVICE)
    turns = torch.zeros(ranks, first + sending.PROGRAMS, dtype=torch.int32, device=DEVICE)
    addresses = torch.tensor([there.data_ptr() for there in memory], device=DEVICE)
    block = sending.FEW if num * row <= sending.FEW * sending.PROGRAMS else sending.MANY
    programs = min(-(-num * row // block), sending.PROGRAMS)
    problems = []
    for turn in range(1, 3):
        words += turn
        for rank in range(ranks):
            sending.Send(words[rank].view(-1), row, addresses, at, turns[rank], first, rank, 0).launch()
        flags = memory.view(torch.int32)[:, : (first + sending.PROGRAMS) * ranks].view(ranks, -1, ranks)
        want = torch.zeros_like(flags)
        want[:, first : first + programs] = turn * (1 - torch.eye(ranks, dtype=torch.int32, device=DEVICE))[:, None]
        came = memory[:, at // 8 : -9].view(ranks, num, ranks, row)
        problems += differ_all(f"turn {turn}", (came, flags), (words.transpose(0, 1).expand(came.shape), want))
        problems.append("words behind the last" if bool(memory[:, -9:].any()) else None)
    fail_on(problems)


@triton.jit
def sin_cos_kernel(angles, got, want, num, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < num
    angle = tl.load(angles + at, mask=ok, other=0.0)
    sin, cos = turning.sin_cos(angle)
    tl.store(got + at, sin, mask=ok)
    tl.store(got + num + at, cos, mask=ok)
    tl.store(want + at, tl.sin(angle), mask=ok)
    tl.store(want + num + at, tl.cos(angle), mask=ok)


@pytest.mark.skipif(INTERPRET, reason="NumPy's sine has other bits; tests/triton has the same of the angle's remainder")
def test_sine_and_cosine_have_the_bits_of_the_devices_own():
    """Of every position up to 2**20 under every frequency of 64 dims, and of angles of every size and sign."""
    positions = torch.arange(2**20, device=DEVICE, dtype=torch.float32)
    every = [positions * freq for freq in launching.inv_freq(1e4, 64, DEVICE)]
    drawn = torch.randint(-(2**31), 2**31, (2**22,), generator=generator(3)).int().view(torch.float32).to(DEVICE)
    problems = []
    for angles in [*every, drawn[drawn.isfinite()]]:
        got, want = (torch.empty(2, len(angles), device=DEVICE) for _ in range(2))
        sin_cos_kernel[(triton.cdiv(len(angles), 1024),)](angles, got, want, len(angles), BLOCK=1024, enable_fp_fusion=False)
        problems.append(differ("sine and cosine", got, want))
    fail_on(problems)


def test_bf16_rounds_to_even_and_carries():
    tail, slot = torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    raw = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3FFFFFFF, 0x00018000, 0x7F7F7FFF], dtype=torch.int32)
    tail[0, :6], tail[0, 6:12] = raw.view(torch.float32), -raw.view(torch.float32)
    cache = LatentCache(1, 1, device=DEVICE)
    quantizing.store_latents(cache.data, slot, torch.zeros(1, 512, device=DEVICE), tail.to(DEVICE))
    fail_on([differ("tail", cache.data[0, 0, 0, 528:].cpu().view(torch.bfloat16), tail[0].bfloat16())])


def exact_merge(out, lse):
    """fp64; empty parts are not looked at."""
    out, lse = out.double(), lse.double()
    total = lse.logsumexp(0)
    weight = torch.exp(lse - torch.where(total == -INF, 0.0, total))
    return (weight[..., None] * out.masked_fill((lse == -INF)[..., None], 0.0)).sum(0), total


@pytest.mark.parametrize("shape", [(1, 5, 3, 7), (3, 5, 3, 7), (8, 2, 64, 1), (2, 3, 2, 130), sized((4, 16, 128, 512), (4, 2, 3, 512))])
def test_merge(shape):
    gen = generator(shape[0])
    out, lse = torch.randn(*shape, generator=gen), torch.randn(*shape[:3], generator=gen) * 20
    row = torch.arange(shape[1] * shape[2]).view(shape[1], shape[2])
    for part in range(shape[0]):
        lse[part][(row >> part) % 2 == 1] = -INF
    out[lse == -INF] = math.nan
    out, lse = out.to(DEVICE), lse.to(DEVICE)
    got = merging.merge_stacked(out, lse)
    want_out, want_lse = exact_merge(out, lse)
    empty = want_lse == -INF
    problems = [
        exceed("lse", got.lse, want_lse, 1e-6 + 1e-6 * want_lse.abs().masked_fill(empty, 0.0)),
        exceed("out", got.out, want_out, 1e-5),
    ]
    problems.append(None if bool((got.out[empty] == 0).all()) else "a row that is empty everywhere is not 0")
    apart, turned = torch.cat((out, out), 1)[:, : shape[1]], lse.transpose(1, 2).contiguous().transpose(1, 2)
    again = merging.merge_stacked(apart, turned)
    fail_on([*problems, *differ_all("strided", (again.out, again.lse), (got.out, got.lse))])


@pytest.mark.parametrize("shift", [-1e30, -1e4, 0.0, 1e4, 1e30])
def test_merge_of_extreme_lse(shift):
    values = torch.tensor([1.0, 3.0], device=DEVICE).view(2, 1, 1, 1)
    got = merging.merge_stacked(values, torch.full((2, 1, 1), shift, device=DEVICE))
    assert got.out.item() == 2
    assert math.isfinite(got.lse.item())
    far = merging.merge_stacked(values, torch.tensor([-1e30, 1e30], device=DEVICE).view(2, 1, 1))
    assert far.out.item() == 3
    one = merging.merge_stacked(values[:1], torch.full((1, 1, 1), shift, device=DEVICE))
    assert (one.out.item(), bits(one.lse).item()) == (1.0, bits(torch.full((1,), shift)).item())
