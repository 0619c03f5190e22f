"""Sparse attention against loops in fp64."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from thresher.cache import LatentCache
from thresher.errors import ThresherError
from thresher.ops import sparse_attend, sparse_attend_mla, sparse_attend_mla_fp8


def expected(q, k, v, slots, scale):
    q, k, v = q.double(), k.double(), v.double()
    num, heads = q.shape[:2]
    out, lse = torch.zeros(num, heads, v.shape[2], dtype=torch.float64), torch.full((num, heads), -math.inf, dtype=torch.float64)
    for i in range(num):
        chosen = [s for s in slots[i].tolist() if s >= 0]
        for n in range(heads if chosen else 0):
            group = n // (heads // k.shape[1])
            score = [scale * float(q[i, n] @ k[s, group]) for s in chosen]
            peak = max(score)
            lse[i, n] = peak + math.log(sum(math.exp(x - peak) for x in score))
            out[i, n] = sum(math.exp(x - lse[i, n]) * v[s, group] for x, s in zip(score, chosen, strict=True))
    return out, lse


def draw(num=4, heads=6, groups=2, dim=16, v_dim=12, slots=50, topk=20, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(num, heads, dim, generator=gen).to(dtype)
    k, v = torch.randn(slots, groups, dim, generator=gen).to(dtype), torch.randn(slots, groups, v_dim, generator=gen).to(dtype)
    chosen = torch.stack([torch.randperm(slots, generator=gen)[:topk] for _ in range(num)]).int()
    return q, k, v, chosen


def check(q, k, v, slots, scale=0.25, tol=2e-6):
    got = sparse_attend(q, k, v, slots, scale)
    out, lse = expected(q, k, v, slots, scale)
    assert got.out.dtype == got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), out, rtol=tol, atol=tol)
    torch.testing.assert_close(got.lse.double(), lse, rtol=tol, atol=tol)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 1), (6, 2), (6, 6), (9, 3)])
def test_matches_the_formula(heads, groups):
    check(*draw(heads=heads, groups=groups))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_fp32(dtype):
    check(*draw(dtype=dtype))


def test_padding_anywhere_and_empty_rows():
    q, k, v, slots = draw(num=6)
    slots[0] = -1
    slots[1, 5:] = -1
    slots[2, ::2] = -1
    slots[3, :19] = -1
    slots[4, 1:] = -1
    check(q, k, v, slots)
    got = sparse_attend(q, k, v, slots, 0.25)
    assert (got.out[0] == 0).all()
    assert (got.lse[0] == -math.inf).all()


@pytest.mark.parametrize("topk", [0, 3])
def test_nothing_selected_at_all(topk):
    q, k, v, _ = draw()
    got = sparse_attend(q, k, v, torch.full((4, topk), -1, dtype=torch.int32), 0.25)
    assert (got.out == 0).all()
    assert (got.lse == -math.inf).all()
    assert got.out.shape == (4, 6, 12)
    empty = sparse_attend(q[:0], k, v, torch.zeros(0, topk, dtype=torch.int32), 0.25)
    assert empty.lse.shape == (0, 6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_memory_that_is_not_named_never_leaks(poison):
    q, k, v, slots = draw()
    slots = slots.masked_fill((slots == 0) | (slots == 7), -1)
    slots[2, 4:] = -1
    slots[3] = -1
    want = sparse_attend(q, k, v, slots, 0.25)
    k[[0, 7]] = v[[0, 7]] = poison
    got = sparse_attend(q, k, v, slots, 0.25)
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


def test_large_scores_do_not_overflow():
    q, k, v, slots = draw()
    check(q * 100, k * 100, v, slots, tol=2e-4)


def test_chunks_agree_and_repeats_are_bit_equal(monkeypatch):
    q, k, v, slots = draw(num=9)
    slots[4, 10:] = -1
    first = sparse_attend(q, k, v, slots, 0.25)
    for _ in range(5):
        again = sparse_attend(q, k, v, slots, 0.25)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)
    for limit in (1, 2000):
        monkeypatch.setattr(sys.modules["thresher.ops.sparse_attend.reference"], "chunk_elements", lambda device, n=limit: n)
        again = sparse_attend(q, k, v, slots, 0.25)
        torch.testing.assert_close(again.out, first.out, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(again.lse, first.lse, rtol=1e-6, atol=1e-6)


def test_all_slots_is_dense_attention():
    q, k, v, _ = draw(heads=6, groups=2)
    everything = torch.arange(50, dtype=torch.int32).expand(4, 50)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(sparse_attend(q, k, v, everything, 0.25).out, dense[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_gradients_match_dense_and_stay_finite():
    q, k, v, slots = draw(num=3)
    slots[1, 6:] = -1
    slots[2] = -1
    ours, theirs = [[t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2)]
    part = sparse_attend(*ours, slots, 0.25)
    (part.out.square().sum() + part.lse[:2].sum()).backward()

    mask = torch.zeros(3, 50, dtype=torch.bool)
    for i in range(2):
        mask[i, slots[i][slots[i] >= 0].long()] = True
    wide_k, wide_v = theirs[1].repeat_interleave(3, 1), theirs[2].repeat_interleave(3, 1)
    score = torch.einsum("qnd,snd->qns", theirs[0][:2], wide_k) * 0.25
    score = score.masked_fill(~mask[:2, None], -math.inf)
    out = torch.einsum("qns,snd->qnd", score.softmax(-1), wide_v)
    (out.square().sum() + score.logsumexp(-1).sum()).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mla_is_one_group_with_shared_values(dtype):
    gen = torch.Generator().manual_seed(1)
    q, latents = torch.randn(3, 4, 576, generator=gen).to(dtype), torch.randn(30, 576, generator=gen).to(dtype)
    slots = torch.stack([torch.randperm(30, generator=gen)[:10] for _ in range(3)]).int()
    slots[1, 4:] = -1
    slots[2] = -1
    out, lse = expected(q, latents[:, None], latents[:, None, :512], slots, 576**-0.5)
    got = sparse_attend_mla(q, latents, slots, 576**-0.5)
    assert got.out.shape == (3, 4, 512)
    torch.testing.assert_close(got.out.double(), out, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(got.lse.double(), lse, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("bad", [50, 2**31 - 1, -2, -(2**31)])
def test_slots_out_of_range_raise(bad):
    q, k, v, slots = draw()
    slots[1, 3] = bad
    with pytest.raises(ThresherError, match=r"slots must be in -1\.\.49"):
        sparse_attend(q, k, v, slots, 0.25)


def test_refuses_shapes():
    q, k, v, slots = draw()
    for args in ((q, k[:, 0], v, slots), (q, k, v[:9], slots), (q[:, :5], k, v, slots), (q[..., :8], k, v, slots), (q, k, v, slots.long())):
        with pytest.raises(ThresherError, match="must"):
            sparse_attend(*args, 0.25)
    with pytest.raises(ThresherError, match="value_dim"):
        sparse_attend_mla(q, k[:, 0], slots, 0.25)
    with pytest.raises(ThresherError, match="latents must"):
        sparse_attend_mla(q, k, slots, 0.25)


def fp8_world(page_size=5, pages=7):
    """A full cache, queries, and slots with holes: a row with gaps, a full one, an empty one."""
    gen = torch.Generator().manual_seed(4)
    cache = LatentCache(pages, page_size)
    every = torch.arange(pages * page_size)
    cache.store(every, torch.randn(len(every), 512, generator=gen), torch.randn(len(every), 64, generator=gen))
    slots = torch.stack([torch.randperm(len(every), generator=gen)[:12] for _ in range(3)]).int()
    slots[0, [0, 3, 11]] = -1
    slots[2] = -1
    return torch.randn(3, 4, 576, generator=gen).bfloat16(), cache, slots


def test_fp8_is_attention_over_the_decoded_latents():
    q, cache, slots = fp8_world()
    latents = cache.load(torch.arange(35))
    out, lse = expected(q, latents[:, None], latents[:, None, :512], slots, 0.04)
    got = sparse_attend_mla_fp8(q, cache.data, slots, 0.04)
    torch.testing.assert_close(got.out.double(), out, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(got.lse.double(), lse, rtol=5e-6, atol=5e-6)
    assert got.lse[2].tolist() == [-torch.inf] * 4
    assert not got.out[2].any()


def test_fp8_pages_and_tokens_may_be_strided():
    q, cache, slots = fp8_world()
    wide = torch.full((14, 10, 1, 672), 0xFF, dtype=torch.uint8)
    strided = wide[::2, ::2, :, :656]
    strided.copy_(cache.data)
    want = sparse_attend_mla_fp8(q, cache.data, slots, 0.04)
    got = sparse_attend_mla_fp8(q, strided, slots, 0.04)
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


def test_fp8_scales_of_other_writers_are_read_as_they_are():
    q, cache, slots = fp8_world()
    scales = cache.data[..., 512:528].contiguous().view(torch.float32) * 1.7
    cache.data[..., 512:528] = scales.view(torch.uint8)
    latents = cache.load(torch.arange(35))
    want = sparse_attend_mla(q, latents, slots, 0.04)
    got = sparse_attend_mla_fp8(q, cache.data, slots, 0.04)
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)


def test_fp8_slots_that_nobody_names_are_not_read():
    q, cache, slots = fp8_world()
    want = sparse_attend_mla_fp8(q, cache.data, slots, 0.04)
    unnamed = torch.ones(35, dtype=torch.bool)
    unnamed[slots[slots >= 0].long()] = False
    cache.data.view(35, 656)[unnamed] = 0xFF  # NaN
    got = sparse_attend_mla_fp8(q, cache.data, slots, 0.04)
    assert torch.equal(got.out, want.out)


def test_fp8_has_a_gradient_in_q():
    q, cache, slots = fp8_world()
    latents = cache.load(torch.arange(35))
    grads = []
    for attend, memory in ((sparse_attend_mla_fp8, cache.data), (sparse_attend_mla, latents)):
        leaf = q.clone().requires_grad_()
        attend(leaf, memory, slots, 0.04).out.sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
