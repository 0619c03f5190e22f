"""The specification at the head of each operation is code: it runs, it is short, and the operation agrees with it."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from thresher import ops
from thresher.cache import Placement
from thresher.cache.index_keys import pack_keys
from thresher.types import IndexQuery, PartialAttention

from .candidates import propose

GEN = torch.Generator().manual_seed(0)
NAMES = [
    "hadamard", "index_score", "keep_best", "merge", "pool_keys", "quantize", "rope", "route_heads", "score_select", "select",
    "sparse_attend",
]  # fmt: skip


def spec(name: str) -> str:
    found = re.findall(r"```python\n(.*?)```", sys.modules[f"thresher.ops.{name}"].__doc__, re.S)
    assert len(found) == 1
    return found[0]


def run(operation: str, **names) -> SimpleNamespace:
    scope = {"torch": torch, "quantize_fp8": ops.quantize_fp8, **names}
    exec(spec(operation), scope)
    return SimpleNamespace(**scope)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GEN)


@pytest.mark.parametrize("name", NAMES)
def test_at_most_ten_lines(name):
    assert len(spec(name).splitlines()) <= 10


def test_hadamard():
    x = randn(3, 16)
    torch.testing.assert_close(ops.hadamard(x), run("hadamard", x=x, D=16).out)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rope(style):
    x, positions = randn(5, 12), torch.arange(5) * 3
    want = run("rope", x=x, positions=positions, theta=1e4, rotary_dim=8, style=style).out
    torch.testing.assert_close(ops.apply_rope(x, positions, 1e4, 8, style), want)


def test_quantize():
    x = randn(6, 16)
    want = run("quantize", x=x)
    values, scales = ops.quantize_fp8(x)
    assert torch.equal(scales, want.scales)
    assert torch.equal(values.float(), want.values.float())
    assert torch.equal(ops.dequantize_fp8(values, scales), want.again)


def test_index_score():
    (q, _), (k, k_scales), weights = ops.quantize_fp8(randn(3, 4, 16)), ops.quantize_fp8(randn(20, 16)), randn(3, 4)
    ranges = {"starts": torch.tensor([0, 3, 7]), "ends": torch.tensor([20, 3, 9])}
    want = run("index_score", q=q, weights=weights, k=k, k_scales=k_scales, Q=3, N=20, H=4, **ranges).score
    assert torch.equal(ops.index_score(q, weights, k, k_scales, **ranges), want)


def test_select():
    scores = randn(4, 30).relu()
    scores[0, 3], scores[1] = torch.nan, -torch.inf
    ends = torch.tensor([30, 30, 17, 0])
    for topk in (5, 29, 35):
        want = run("select", scores=scores, topk=topk, ends=ends.tolist(), Q=4).indices
        assert torch.equal(ops.select_topk(scores, topk, ends=ends).indices.long(), want)


def test_keep_best():
    scores, positions = propose("cruel", 3, 4, 12)
    for rank in range(3):
        given = {"scores": scores, "positions": positions, "rank": rank, "topk": 15, "granularity": 4}
        want = run("keep_best", R=3, Q=4, Placement=Placement, **given).indices
        assert torch.equal(ops.keep_best(**given).indices.long(), want)


def test_score_select():
    (k, k_scales), (q, _) = ops.quantize_fp8(randn(80, 16)), ops.quantize_fp8(randn(3, 4, 16))
    keys, query = (
        pack_keys([(k[:50], k_scales[:50]), (k[50:], k_scales[50:])]),
        IndexQuery(q, randn(3, 4), torch.tensor([49, 3, 10**6]), torch.tensor([0, 0, 1])),
    )
    names = {"paged_index_score": ops.paged_index_score, "select_topk": ops.select_topk, "query": query, "keys": keys}
    for topk in (1, 7, 60):
        want, got = run("score_select", **names, topk=topk).selection, ops.score_select(query, keys, topk)
        for part in ("indices", "lengths", "scores"):
            assert torch.equal(getattr(got, part), getattr(want, part))
        assert got.space == want.space
        bare = ops.score_select(query, keys, topk, with_scores=False)
        assert bare.scores is None
        assert torch.equal(bare.indices, want.indices)


def test_pool_keys():
    values, scales = ops.quantize_fp8(randn(27, 8))
    want = run("pool_keys", values=values, scales=scales, N=27, B=6, D=8).means
    got = ops.pool_keys(values, scales, 6)
    assert torch.equal(got[0].float(), want[0].float())
    assert torch.equal(got[1], want[1])


def test_route_heads():
    pair, (q, _), weights = ops.quantize_fp8(randn(24, 16)), ops.quantize_fp8(randn(2, 6, 16)), randn(2, 6)
    means = ops.pool_keys(*pair, 8)
    query = IndexQuery(q, weights, torch.tensor([23, 23]), torch.tensor([0, 0]))
    want = run("route_heads", q=q.float(), weights=weights, kbar=ops.dequantize_fp8(*means), active_heads=3)
    mass = ops.head_mass(query, [means], pack_keys([pair]), 8)
    torch.testing.assert_close(mass, want.mass)
    assert torch.equal(ops.route_heads(want.mass, 3), want.heads)


def test_sparse_attend():
    q, k, v = randn(3, 6, 8), randn(10, 2, 8), randn(10, 2, 4)
    slots = torch.tensor([[0, 4, 9, 2], [3, -1, 5, -1], [7, -1, -1, -1]], dtype=torch.int32)
    want = run("sparse_attend", q=q, k=k, v=v, slots=slots.long(), scale=0.3, N=6, G=2)
    got = ops.sparse_attend(q, k, v, slots, 0.3)
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.lse, want.lse)


def test_merge():
    parts = [PartialAttention(randn(2, 3, 4), randn(2, 3)) for _ in range(3)]
    want = run("merge", parts=parts)
    torch.testing.assert_close(ops.merge(parts).out, want.out)
    torch.testing.assert_close(ops.merge(parts).lse, want.lse)
