"""Quantise-and-store against the references, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from thresher.cache import IndexKeyCache, LatentCache
from thresher.ops import apply_rope, hadamard, quantize_fp8
from thresher.ops.quantize import triton as kernels
from thresher.ops.quantize.triton_kernels import sin_cos

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
GARBAGE = [-(2**63), -(2**31), -1, 15, 16, 2**31 - 1, 2**62]


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.shape == want.shape and torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal rows of magnitudes from 1e-9 to 1e9."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen) * 10.0 ** torch.randint(-9, 10, (*shape[:-1], 1), generator=gen)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a kernel is given to fill holds 0xFF, which is NaN in every float type and -1 in every integer type."""
    empty = torch.empty

    def poison(*size, **kwargs):
        out = empty(*size, **kwargs)
        out.view(torch.uint8).fill_(0xFF)
        return out

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(40, 128), (7, 3, 64), (0, 8), (3, 5), (1, 1), (2, 2500), (64,)])
def test_bits_of_the_reference(dtype, shape):
    x = spread(*shape).to(dtype).nan_to_num(0, 6e4, -6e4)
    got, want = kernels.quantize_fp8(x), quantize_fp8(x)
    assert same(got[0], want[0])
    assert same(got[1], want[1])


def test_every_boundary():
    """Every e4m3 number, the halfway points, and their fp32 neighbours; scales at their own boundaries; signed zeros and subnormals."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat((codes, (codes[1:] + codes[:-1]) / 2))
    points = torch.cat([points, points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1e9))])
    points = torch.cat([points, -points])
    points = points[points.abs() <= 448]
    x = torch.cat([torch.full((len(points), 1), 448.0), points[:, None], torch.zeros(len(points), 1) * -1.0], dim=1)
    tops = torch.cat([torch.tensor([448.0, 1e-4, 0.0, 1e-45, 3e38]), 7.0 * 2.0 ** torch.arange(-30, 30)])
    tops = torch.cat([tops, tops.nextafter(torch.tensor(1e39)), tops.nextafter(torch.tensor(-1.0))]).clamp(max=torch.finfo().max)
    x = torch.cat([x, torch.stack([tops, tops / 3, -tops / 1000], dim=1)])
    got, want = kernels.quantize_fp8(x), quantize_fp8(x)
    assert same(got[0], want[0])
    assert same(got[1], want[1])


def test_a_vector_that_is_not_finite_becomes_nan():
    x = spread(4, 8)
    x[1, 2], x[2, 7], x[3, 0] = torch.nan, torch.inf, -torch.inf
    values, scales = kernels.quantize_fp8(x)
    assert same(values[:1], quantize_fp8(x[:1])[0])
    assert values[1:].float().isnan().all()
    assert scales[1:].tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rotary", "style"), [(0, "half"), (64, "half"), (32, "interleaved"), (2, "half")])
@pytest.mark.parametrize(("dim", "heads"), [(64, 5), (128, 1)])
def test_keys_and_queries(dtype, rotary, style, dim, heads):
    gen = torch.Generator().manual_seed(1)
    wide = torch.randn(7, 2 * heads, dim + 3, generator=gen).to(dtype)
    x = wide[:, ::2, :dim]  # strided tokens and heads
    weights = torch.randn(7, 2 * heads, generator=gen)[:, :heads]
    positions = torch.tensor([0, 1, 63, 4095, 131071, 2**20, 5])
    rotated = apply_rope(x, positions, 10000.0, rotary, style)
    values, scales = quantize_fp8(hadamard(rotated))
    got = kernels.quantize_queries(x, weights, positions, 10000.0, rotary, style, 0.3)
    # The interpreter's cosine is NumPy's and the reference's is PyTorch's: they may differ by an ulp, so a rare value by one step.
    for mine, want in ((got[0], values), (got[1], weights * 0.3 * scales)):
        if rotary == 0:
            assert same(mine, want)
        assert (mine.float() - want.float()).abs().le(want.float().abs() * 2**-3 + 2**-9).all()
        assert (mine.float() != want.float()).sum() <= mine.numel() // 200

    cache, want_cache = IndexKeyCache(3, dim, 5), IndexKeyCache(3, dim, 5)
    slots = torch.tensor([3, 14, 0, -1, 15, 7, 2**40])
    stored = (slots >= 0) & (slots < 15)
    kernels.store_index_keys(cache.pages, slots, x[:, 0], positions, 10000.0, rotary, style)
    want_cache.store(slots[stored], got[0][stored, 0], quantize_fp8(hadamard(rotated[stored, 0]))[1])
    assert same(cache.pages, want_cache.pages)


@triton.jit
def sin_cos_kernel(angles, sines, cosines, NUM: tl.constexpr):
    at = tl.arange(0, NUM)
    sin, cos = sin_cos(tl.load(angles + at))
    tl.store(sines + at, sin)
    tl.store(cosines + at, cos)


def reduced(angle: np.float32) -> tuple[np.float32, int]:
    """What CUDA's libdevice leaves of an angle from 105615 on, and its quadrant: word by word, as its PTX reads."""
    two_over_pi, product, carry = 0xA2F9836E4E441529FC2757D1F534DDC0DB6295993C439041, [], 0
    bits = int(angle.view(np.uint32))
    mantissa, exponent, negative = (bits << 8 | 1 << 31) & 0xFFFFFFFF, bits >> 23 & 255, bits >> 31
    for word in range(6):
        carry += (two_over_pi >> 32 * word & 0xFFFFFFFF) * mantissa
        product.append(carry & 0xFFFFFFFF)
        carry >>= 32
    product.append(carry)
    low, middle, high = product[8 - (exponent >> 5) :][:3]
    turns = ((high << 64 | middle << 32 | low) << (exponent & 31)) >> 32 & (1 << 64) - 1
    quadrant, fraction = turns >> 62, turns << 2 & (1 << 64) - 1
    over = fraction >> 63
    fraction = fraction ^ ((1 << 64) - 1) if over else fraction
    rest = np.float32(np.float64(fraction) * float.fromhex("0x1.921fb54442d19p-64"))
    return (-rest if over != negative else rest), (-(quadrant + over) if negative else quadrant + over)


def test_sine_and_cosine_of_large_angles():
    """The interpreter's sine is NumPy's: what is tested is the angle that it sees, to the bit, and the quadrant."""
    gen = np.random.default_rng(0)
    large = [105615.0, 131071.0, 2.0**32 - 256, *gen.integers(105615, 2**20, 1021), *2.0 ** gen.uniform(16.7, 32, 1024)]
    large = np.array(large, np.float32) * np.where(np.arange(2048) % 7 == 3, np.float32(-1), np.float32(1))
    assert ((abs(large) >= 105615) & (abs(large) < 2**32)).all()
    others = np.array([0.0, -0.0, 105614.99, 2.0**32, 1e30, *gen.uniform(-1e5, 1e5, 2043)], np.float32)
    angles = torch.from_numpy(np.concatenate([large, others]))
    got = torch.zeros(2, 4096)
    sin_cos_kernel[(1,)](angles, *got, NUM=4096)
    turned = [reduced(angle) for angle in large] + [(angle, 0) for angle in others]
    rest, quadrant = np.array([r for r, _ in turned]), np.array([q for _, q in turned])
    choices = np.stack([np.sin(rest), np.cos(rest), -np.sin(rest), -np.cos(rest)])
    for mine, more in zip(got, (0, 1), strict=True):
        assert same(mine, torch.from_numpy(choices[(quadrant + more) % 4, np.arange(4096)]))
    assert np.abs(got[0, :2048].numpy() - np.sin(large.astype(np.float64))).max() < 1e-7


def test_hadamard_alone_has_the_bits_of_the_reference_at_every_size():
    for dim in (4, 8, 32, 256, 1024):
        x = spread(3, 2, dim, seed=dim)
        x[0, 0] = 0.0
        x[0, 1] = -0.0
        values, scales = quantize_fp8(hadamard(x))
        got = kernels.quantize_queries(x, torch.ones(3, 2), torch.zeros(3, dtype=torch.int32), 1e4, 0, "half")
        assert same(got[0], values), dim
        assert same(got[1], scales), dim


def test_garbage_slots_write_nothing():
    cache, latents = IndexKeyCache(3, 64, 5), LatentCache(3, 5)
    slots = torch.tensor(GARBAGE)
    positions = torch.zeros(len(slots), dtype=torch.int64)
    kernels.store_index_keys(cache.pages, slots, torch.randn(len(slots), 64), positions, 1e4, 32, "half")
    kernels.store_latents(latents.data, slots, torch.randn(len(slots), 512), torch.randn(len(slots), 64))
    assert not cache.pages.any()
    assert not latents.data.any()
    empty = IndexKeyCache(0, 64, 5)
    kernels.store_index_keys(empty.pages, slots, torch.randn(len(slots), 64), positions, 1e4, 32, "half")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rotate", [False, True])
def test_latents(dtype, rotate):
    gen = torch.Generator().manual_seed(2)
    num = 7
    latent = spread(num, 4, 128).clamp(-6e4, 6e4).view(num, 512).to(dtype)
    rope = torch.randn(num, 80, generator=gen).to(dtype)[:, 8:72]
    slots = torch.tensor([3, 14, 0, -1, 15, 7, 2**40])
    positions = torch.tensor([0, 1, 63, 4095, 131071, 2**20, 5])
    stored = (slots >= 0) & (slots < 15)
    cache, want = LatentCache(3, 5), LatentCache(3, 5)
    kernels.store_latents(cache.data, slots, latent, rope, positions if rotate else None)
    if rotate:
        rope = apply_rope(rope, positions, 10000.0, 64, "interleaved")
    want.store(slots[stored], latent[stored], rope[stored])
    if rotate:
        assert (cache.data != want.data).sum() <= 2
        assert same(cache.data[..., :528], want.data[..., :528])
    else:
        assert same(cache.data, want.data)


def test_bf16_rounds_to_even_and_carries():
    tail = torch.zeros(1, 64)
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3FFFFFFF, 0x00018000, 0x7F7F7FFF], dtype=torch.int32)
    tail[0, :6], tail[0, 6:12] = bits.view(torch.float32), -bits.view(torch.float32)
    cache = LatentCache(1, 1)
    kernels.store_latents(cache.data, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 512), tail)
    assert same(cache.data[0, 0, 0, 528:].view(torch.bfloat16), tail[0].bfloat16())


def test_what_is_not_supported_is_said():
    assert kernels.unsupported(torch.bfloat16, 100) is None
    assert kernels.unsupported(torch.bfloat16, 128, rotate=True) is None
    assert "power of two" in kernels.unsupported(torch.bfloat16, 100, rotate=True)
    assert "float64" in kernels.unsupported(torch.float64, 128)
    assert "head_dim" in kernels.unsupported(torch.float32, 10000)


COMPILE = """
import torch
from thresher.cache import IndexKeyCache, LatentCache
from thresher.ops.quantize import triton as kernels

for num in (1, 1024):
    zeros = torch.zeros(num, dtype=torch.int64)
    for dtype, dim, style in ((torch.bfloat16, 64, "half"), (torch.bfloat16, 128, "interleaved"), (torch.float32, 128, "half")):
        kernels.quantize_queries(torch.zeros(num, 64, dim, dtype=dtype), torch.zeros(num, 64), zeros, 1e4, 64, style, 0.1)
        kernels.store_index_keys(IndexKeyCache(16, dim).pages, zeros, torch.zeros(num, dim, dtype=dtype), zeros, 1e4, 64, style)
        kernels.store_latents(LatentCache(16).data, zeros, torch.zeros(num, 512, dtype=dtype), torch.zeros(num, 64, dtype=dtype), zeros)
        kernels.quantize_fp8(torch.zeros(num, 128, dtype=dtype))
"""


def test_compiles_for_hopper(compile_for_hopper):
    found = compile_for_hopper(COMPILE)
    assert {kernel.name for kernel in found} == {"queries_kernel", "keys_kernel", "latents_kernel", "rows_kernel"}
    for kernel in found:
        assert kernel.shared <= 227 * 1024
        assert "cvt.rn.satfinite.e4m3x2.f32" in kernel.ptx, "the cast is the hardware's"
        assert "cos.approx" not in kernel.ptx, "angles reach a million"
        waits = "griddepcontrol.wait" in kernel.ptx
        assert waits == (kernel.name != "rows_kernel"), "parts of a decoding step are launched before the one ahead ends"
        if waits:
            before = kernel.ptx[: kernel.ptx.index("griddepcontrol.wait")]
            assert "ld.global" not in before
            assert "st.global" not in before
        assert "div.full" not in kernel.ptx
