"""Every public function with ``impl="triton"``: the kernel is reached, takes what the function passes, and agrees with the reference."""

from __future__ import annotations

import copy

import pytest
import torch

from thresher import ops
from thresher.cache import IndexKeyCache, LatentCache, pack_keys
from thresher.errors import ThresherError
from thresher.ops import dispatch
from thresher.selectors import DSA, HISA, MISA
from thresher.types import IndexQuery, PartialAttention

torch.manual_seed(0)
HEADS, DIM = 3, 64
K, K_SCALES = ops.quantize_fp8(torch.randn(150, DIM))
QUERY = IndexQuery(ops.quantize_fp8(torch.randn(2, HEADS, DIM))[0], torch.randn(2, HEADS), torch.tensor([149, 70]), torch.tensor([0, 0]))
KEYS = pack_keys([(K, K_SCALES)])
SLOTS = torch.tensor([[0, 3, -1], [-1, -1, -1]], dtype=torch.int32)
ATTENTION = torch.randn(2, 4, 64), torch.randn(6, 2, 64), torch.randn(6, 2, 64), SLOTS, 0.3
LATENTS = torch.randn(2, 4, 576).bfloat16(), torch.randn(6, 576).bfloat16(), SLOTS, 0.05
CACHE = LatentCache(2, 3)
CACHE.store(torch.arange(6), torch.randn(6, 512), torch.randn(6, 64))
POSITIONS = torch.tensor([0, 70])
PARTS = [PartialAttention(torch.randn(2, 3, 4), torch.randn(2, 3)) for _ in range(2)]

GIVEN = {
    "index_score": (QUERY.q, QUERY.weights, K, K_SCALES, torch.tensor([0, 5]), torch.tensor([150, 71])),
    "paged_index_score": (QUERY, KEYS),
    "gathered_index_score": (QUERY, KEYS, torch.tensor([[0, 5, 149], [1, 70, -1]])),
    "block_index_score": (QUERY, KEYS, torch.tensor([[0, 3, 9], [1, 4, -1]], dtype=torch.int32), 16),
    "select_topk_in_blocks": (torch.randn(2, 48), 4, torch.tensor([[0, 3, 9], [1, 4, -1]], dtype=torch.int32), 16),
    "select_blocks": (torch.randn(2, 9), 4, QUERY, KEYS, 16),
    "select_topk": (torch.randn(2, 40), 4),
    "select_topk_slots": (torch.randn(2, 40), 30, torch.tensor([[5, -1, 0], [2, 9, -1]], dtype=torch.int32), torch.tensor([1, 0]), 16),
    "to_slots": (
        torch.tensor([[0, 31, 17, -1, 40], [1, 16, 47, 300, -7]], dtype=torch.int32),
        torch.tensor([[5, -1, 0], [2, 9, -1]], dtype=torch.int32), torch.tensor([1, 0]), 16,
    ),
    "keep_best": (torch.randn(2, 2, 40), torch.arange(40, dtype=torch.int32).expand(2, 2, 40), 1, 30, 4),
    "pool_keys": (K, K_SCALES, 16),
    "pool_blocks": (KEYS, 16),
    "grow_means": (KEYS, ops.pool_blocks(KEYS, 16), torch.tensor([40]), torch.zeros(1, dtype=torch.int32), 16),
    "partial_means": (K, K_SCALES, 16, torch.tensor([3, 149])),
    "head_mass": (QUERY, [ops.pool_keys(K, K_SCALES, 16)], KEYS, 16),
    "route_heads": (torch.rand(2, 6), 2),
    "routed_query": (QUERY, [ops.pool_keys(K, K_SCALES, 16)], KEYS, 16, 2),
    "sparse_attend": ATTENTION,
    "sparse_attend_mla": LATENTS,
    "sparse_attend_mla_fp8": (LATENTS[0], CACHE.data, SLOTS, 0.05),
    "store_index_keys": (IndexKeyCache(2, 64, 3).pages, torch.tensor([5, -1]), torch.randn(2, 64), POSITIONS, 1e4, 0, "half"),
    "quantize_queries": (torch.randn(2, 3, 64), torch.randn(2, 3).bfloat16(), POSITIONS, 1e4, 0, "half", 0.3),
    "store_latents": (LatentCache(2, 3).data, torch.tensor([5, -1]), torch.randn(2, 512), torch.randn(2, 64)),
    "store_step": (
        IndexKeyCache(2, 64, 3).pages, LatentCache(3, 2).data, torch.tensor([5, -1]), torch.randn(2, 64), torch.randn(2, 512),
        torch.randn(2, 64), torch.randn(2, 3, 64), torch.randn(2, 3), torch.zeros(2, dtype=torch.int32), 1e4, 32, "half", 0.3,
    ),
    "merge": (PARTS,),
}


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result.float()]
    parts = result if isinstance(result, tuple) else [part for part in vars(result).values() if isinstance(part, torch.Tensor)]
    return [tensor for part in parts for tensor in tensors(part)]


def outcome(operation, impl):
    """What a call returns; a function that writes to its first argument, or to the means that are its second, has that for a result.

    ``store_step`` returns something and writes to two.
    """
    given = copy.deepcopy(GIVEN[operation])
    result = getattr(ops, operation)(*given, impl=impl)
    if operation == "store_step":
        assert all(cache.any() for cache in given[:2]), "something was stored"
        return *result, *given[:2]
    if result is None:
        result = given[1].pages if operation == "grow_means" else given[0]
        assert result.any(), "something was stored"
    return result


def test_every_operation_is_here():
    assert set(GIVEN) == set(dispatch.TABLE) - {"score_select", "hisa_select"}
    with pytest.raises(ThresherError, match=r'impl="triton" of score_select .* cannot be interpreted'):
        ops.score_select(QUERY, KEYS, 4, impl="triton")


@pytest.mark.parametrize("operation", GIVEN)
def test_the_kernel_agrees_with_the_reference(operation):
    loose = {"sparse_attend_mla": 1e-2, "sparse_attend_mla_fp8": 1e-2}.get(operation, 1e-5)
    kernel, reference = (tensors(outcome(operation, impl)) for impl in ("triton", "reference"))
    for got, want in zip(kernel, reference, strict=True):
        torch.testing.assert_close(got, want, rtol=loose, atol=loose)


@pytest.mark.parametrize("garbage", [float("inf"), float("nan")])
@pytest.mark.parametrize("selector", [DSA(20), MISA(2, 16, 20), HISA(16, 4, 20)])
def test_selectors_read_no_score_that_is_out_of_sight(monkeypatch, selector, garbage):
    """Scores that are not filled hold whatever the memory held: the worst of it, here."""
    query = IndexQuery(QUERY.q, QUERY.weights, torch.tensor([70, 9]), QUERY.requests)
    with dispatch.using("triton"):
        want = selector.select(query, KEYS)
        empty = torch.empty

        def filled(*size, **options):
            return empty(*size, **options).fill_(garbage if "dtype" not in options else 0)

        monkeypatch.setattr(torch, "empty", filled)
        bare = ops.paged_index_score(query, KEYS, filled=False)
        got = selector.select(query, KEYS)
    assert torch.equal(bare[:, :10], ops.paged_index_score(query, KEYS, impl="triton")[:, :10])
    assert not (bare[:, 128:] == -torch.inf).any(), "nothing was filled"
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.lengths, want.lengths)


def test_what_a_kernel_cannot_take_is_refused_with_its_reason():
    narrow = IndexQuery(QUERY.q[:, :, :32], QUERY.weights, QUERY.positions, QUERY.requests)
    with pytest.raises(ThresherError, match=r'impl="triton" of paged_index_score .* head_dim'):
        ops.paged_index_score(narrow, pack_keys([(K[:, :32].contiguous(), K_SCALES)]), impl="triton")
    with pytest.raises(ThresherError, match="bfloat16"):
        ops.sparse_attend_mla(LATENTS[0].float(), *LATENTS[1:], impl="triton")
    with pytest.raises(ThresherError, match="no gradient"):
        ops.sparse_attend(ATTENTION[0].clone().requires_grad_(), *ATTENTION[1:], impl="triton")


@pytest.mark.parametrize(
    "selector", [DSA(topk=16), MISA(active_heads=2, block_size=32, topk=16), HISA(block_size=8, num_blocks=4, topk=16)]
)
def test_a_selector_runs_on_kernels_alone(selector):
    want = selector.select(QUERY, KEYS)
    with dispatch.using("triton"):
        got = selector.select(QUERY, KEYS)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.scores, want.scores)
