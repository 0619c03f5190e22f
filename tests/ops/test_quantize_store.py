"""Quantise-and-store: what lies in the cache afterwards is what the steps make one by one, and everything else is untouched."""

from __future__ import annotations

import pytest
import torch

from thresher.cache import IndexKeyCache, LatentCache
from thresher.cache.index_keys import planes
from thresher.errors import ThresherError
from thresher.ops import (
    apply_rope,
    dequantize_fp8,
    hadamard,
    quantize_fp8,
    quantize_queries,
    store_index_keys,
    store_latents,
    store_step,
)

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
STYLES = ["half", "interleaved"]
SLOTS, POSITIONS = torch.tensor([7, -1, 0, 14]), torch.tensor([0, 5, 4095, 131071])


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_index_keys(dtype, style, index):
    x = randn(4, 2 * 64)[:, ::2].to(dtype)  # strided
    pages = torch.full((3, 5, 1, 68), 0xAB, dtype=torch.uint8)
    store_index_keys(pages, SLOTS.to(index), x, POSITIONS.to(index), 1e4, 32, style)
    want_values, want_scales = quantize_fp8(hadamard(apply_rope(x, POSITIONS, 1e4, 32, style)))
    values, scales = (plane.flatten(0, 1) for plane in planes(pages))
    kept = SLOTS >= 0
    assert torch.equal(values[SLOTS[kept]].view(torch.uint8), want_values[kept].view(torch.uint8))
    assert torch.equal(scales[SLOTS[kept]], want_scales[kept])
    others = torch.ones(15, dtype=torch.bool)
    others[SLOTS[kept]] = False
    assert (values[others].view(torch.uint8) == 0xAB).all()
    assert (scales[others].view(torch.int32) == 0xABABABAB - 2**32).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("style", STYLES)
def test_queries(dtype, style):
    x, weights = randn(4, 3, 64).to(dtype), randn(4, 3).to(dtype)
    values, folded = quantize_queries(x, weights, POSITIONS.int(), 1e4, 64, style, factor=0.125)
    rotated = hadamard(apply_rope(x, POSITIONS, 1e4, 64, style))
    want, scales = quantize_fp8(rotated)
    assert torch.equal(values.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(folded, weights.float() * 0.125 * scales)
    # Folding moves the scale out of the score, not the score: q . k * w is the same up to FP8.
    k = randn(64)
    got = folded * (values.float() @ k).relu()
    torch.testing.assert_close(got, weights.float() * 0.125 * (dequantize_fp8(want, scales) @ k).relu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("style", [*STYLES, None])
def test_latents(dtype, style):
    latent, rope = randn(4, 512).to(dtype), randn(4, 64).to(dtype)
    cache = LatentCache(3, 5)
    cache.data.fill_(0xAB)
    if style is None:
        store_latents(cache.data, SLOTS, latent, rope)
    else:
        store_latents(cache.data, SLOTS, latent, rope, POSITIONS, 1e4, style)
        rope = apply_rope(rope, POSITIONS, 1e4, 64, style)
    kept = SLOTS >= 0
    got = cache.load(SLOTS[kept])
    assert torch.equal(got[:, 512:], rope[kept].bfloat16().float())
    want = dequantize_fp8(*quantize_fp8(latent[kept].unflatten(1, (4, 128)))).flatten(1)
    assert torch.equal(got[:, :512], want)
    assert (got[:, :512] - latent[kept].float()).abs().max() < 0.2
    others = torch.ones(15, dtype=torch.bool)
    others[SLOTS[kept]] = False
    assert (cache.data.view(15, 656)[others] == 0xAB).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_a_step_is_the_three(dtype, style, index):
    slots, positions = SLOTS.to(index), POSITIONS.to(index)
    key, latent, rope, q, weights = (randn(4, *shape).to(dtype) for shape in ((64,), (512,), (64,), (3, 64), (3,)))
    pages, data = (torch.full(shape, 0xAB, dtype=torch.uint8) for shape in ((3, 5, 1, 68), (5, 3, 1, 656)))
    want_pages, want_data = pages.clone(), data.clone()
    values, folded = store_step(pages, data, slots, key, latent, rope, q, weights, positions, 1e4, 32, style, 0.125)
    store_index_keys(want_pages, slots, key, positions, 1e4, 32, style)
    store_latents(want_data, slots, latent, rope, positions, 1e4)
    want, want_folded = quantize_queries(q, weights, positions, 1e4, 32, style, 0.125)
    assert torch.equal(pages, want_pages)
    assert torch.equal(data, want_data)
    assert torch.equal(values.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(folded, want_folded)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_and_nothing_is_written(bad):
    keys, latents = IndexKeyCache(3, 64, 5), LatentCache(3, 5)
    x, latent, rope = randn(4, 64), randn(4, 512), randn(4, 64)
    x[2, 3] = latent[2, 3] = bad
    for call in (
        lambda: store_index_keys(keys.pages, SLOTS, x, POSITIONS, 1e4, 32, "half"),
        lambda: quantize_queries(x[:, None], torch.ones(4, 1), POSITIONS, 1e4, 32, "half"),
        lambda: store_latents(latents.data, SLOTS, latent, rope),
    ):
        with pytest.raises(ThresherError, match="must be finite"):
            call()
    assert not keys.pages.any()
    assert not latents.data.any()
    # Token 1 is left out, whatever it holds.
    x[2, 3] = latent[2, 3] = 0.0
    x[1], latent[1], rope[1] = bad, bad, bad
    store_index_keys(keys.pages, SLOTS, x, POSITIONS, 1e4, 32, "half")
    store_latents(latents.data, SLOTS, latent, rope, POSITIONS)
    assert keys.pages.any()
    assert latents.data.any()


def test_no_gradient_is_recorded():
    x = randn(2, 64).requires_grad_()
    pages = IndexKeyCache(1, 64, 5).pages
    store_index_keys(pages, torch.tensor([0, 1]), x, POSITIONS[:2], 1e4, 32, "half")
    assert not quantize_queries(x[:, None], torch.ones(2, 1), POSITIONS[:2], 1e4, 32, "half")[1].requires_grad
