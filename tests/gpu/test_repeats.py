"""Every kernel gives the same bits twenty times, among garbage and at sizes where programs race."""

from __future__ import annotations

import pytest
import torch

from thresher.types import PartialAttention

from . import small_cases as cases
from .compare import differ_all, fail_on
from .draw import generator, paged, queries, query_of, vectors
from .machine import DEVICE, INTERPRET, sized

REPEATS = sized(20, 2)


def repeat(run) -> None:
    first, problems = run(), []
    for turn in range(REPEATS - 1):
        problems += differ_all(f"repeat {turn + 1}", run(), first)
    fail_on(problems)


@pytest.mark.parametrize("name", cases.CASES)
def test_small(name):
    repeat(cases.CASES[name]())


def _parts(part: PartialAttention) -> list[torch.Tensor]:
    return [part.out, part.lse]


def big_score():
    q, weights = queries(64, 64, 128, seed=1)
    k, scales = vectors(8192, 128, seed=2)
    keys = paged([(k[:5000], scales[:5000]), (k[5000:], scales[5000:])], 64)
    query = query_of(q, weights, [4999, 3191] * 32, [0, 1] * 32)
    wanted = torch.randint(-1, 3192, (64, 2048), generator=generator(3)).to(DEVICE)
    blocks = torch.randint(-1, 40, (64, 64), generator=generator(8), dtype=torch.int32).to(DEVICE)
    ends = torch.arange(8129, 8193, device=DEVICE)

    def run():
        return [
            cases.score.index_score(q, weights, k, scales, ends - 7000, ends),
            cases.score.paged_index_score(query, keys),
            cases.score.gathered_index_score(query, keys, wanted),
            cases.score.block_index_score(query, keys, blocks, 128),
        ]

    return run


def big_attention():
    gen = generator(4)
    total = 8192
    q = torch.randn(8, 128, 576, generator=gen).bfloat16().to(DEVICE)
    cache = cases.LatentCache(total // 64)
    cache.store(torch.arange(total), torch.randn(total, 512, generator=gen), torch.randn(total, 64, generator=gen))
    latents = cache.load(torch.arange(total)).bfloat16().to(DEVICE)
    data = cache.data.to(DEVICE)
    slots = torch.stack([torch.randperm(total, generator=gen)[:2048] for _ in range(8)]).int().to(DEVICE)
    heads = latents.view(total, 9, 64)

    def run():
        return [
            *_parts(cases.attention.sparse_attend_mla(q, latents, slots, 0.07)),
            *_parts(cases.attention.sparse_attend_mla_fp8(q, data, slots, 0.07)),
            *_parts(cases.attention.sparse_attend(q[:, :18, :64], heads, heads, slots, 0.1)),
        ]

    return run


def big_means_and_routing():
    values, scales = vectors(20000, 128, seed=5)
    keys = paged([(values, scales)], 64)
    q, weights = queries(64, 64, 128, seed=6)
    query = query_of(q, weights, torch.arange(19936, 20000), [0] * 64)
    means = cases.pooling.pool_keys(values, scales, 16)

    def run():
        return [
            *cases.pooling.pool_keys(values, scales, 128),
            *cases.routing.routed_heads(query, [means], keys, 16, 8),
            *cases.quantizing.quantize_fp8(values.float()),
        ]

    return run


def big_merge():
    gen = generator(7)
    out, lse = torch.randn(8, 16, 128, 512, generator=gen).to(DEVICE), torch.randn(8, 16, 128, generator=gen).to(DEVICE)
    return lambda: _parts(cases.merging.merge_stacked(out, lse))


@pytest.mark.skipif(INTERPRET, reason="too large, and nothing races there; long rows are in test_select.py")
@pytest.mark.parametrize("make", [big_score, big_attention, big_means_and_routing, big_merge])
def test_large(make):
    repeat(make())
