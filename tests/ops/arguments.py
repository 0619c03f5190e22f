"""Good arguments of every public function, by name, and small empty ones."""

from __future__ import annotations

import torch

from thresher import ops
from thresher.cache import IndexKeyCache, LatentCache, pack_keys
from thresher.cache.scratch import Scratch
from thresher.types import IndexKeys, IndexQuery, PartialAttention

HEADS, DIM, BLOCK = 3, 64, 16


def longs(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def room_for_means(keys):
    """Zeros, as for no full block yet."""
    means = ops.pool_blocks(keys, BLOCK)
    means.pages.zero_()
    means.lengths.zero_()
    return means


def good():
    """function -> its arguments but impl; made anew, since some functions write."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    (k, k_scales), (q, _), weights = ops.quantize_fp8(randn(70, DIM)), ops.quantize_fp8(randn(2, HEADS, DIM)), randn(2, HEADS)
    query, keys = IndexQuery(q, weights, longs(69, 40), longs(0, 0)), pack_keys([(k, k_scales)])
    slots = torch.tensor([[0, 3, -1], [-1, -1, -1]], dtype=torch.int32)
    blocks = torch.tensor([[0, 4], [2, -1]], dtype=torch.int32)
    tokens = {"slots": longs(4, -1), "positions": longs(0, 70)}
    rotation = {"theta": 1e4, "rotary_dim": 32, "style": "half"}
    return {
        "hadamard": {"x": randn(2, DIM)},
        "apply_rope": {"x": randn(2, DIM), "positions": longs(3, 9), **rotation},
        "quantize_fp8": {"x": randn(2, DIM)},
        "dequantize_fp8": {"values": k, "scales": k_scales},
        "index_score": {"q": q, "weights": weights, "k": k, "k_scales": k_scales, "starts": longs(0, 5), "ends": longs(70, 5)},
        "paged_index_score": {"query": query, "keys": keys, "filled": True, "width": 80},
        "gathered_index_score": {"query": query, "keys": keys, "positions": torch.tensor([[0, 5, -1], [1, 2, 69]])},
        "block_index_score": {"query": query, "keys": keys, "blocks": blocks, "block_size": BLOCK},
        "select_topk_in_blocks": {
            "scores": randn(2, 2 * BLOCK), "topk": 2, "blocks": blocks, "block_size": BLOCK, "space": "local", "with_scores": False
        },
        "select_blocks": {"scores": randn(2, 5), "num_blocks": 3, "query": query, "keys": keys, "block_size": BLOCK},
        "select_topk": {
            "scores": randn(2, 3),
            "topk": 2,
            "space": "local",
            "positions": torch.tensor([[0, 5, -1], [1, 2, 69]]),
            "ends": longs(3, 2),
            "with_scores": False,
        },
        "select_topk_slots": {
            "scores": randn(2, 3),
            "topk": 2,
            "page_table": torch.tensor([[3, -1]], dtype=torch.int32),
            "requests": longs(0, 0),
            "page_size": 64,
            "positions": torch.tensor([[0, 5, -1], [1, 2, 69]]),
            "ends": longs(3, 2),
        },
        "keep_best": {
            "scores": randn(2, 2, 3), "positions": torch.tensor([[[0, 5, -1], [1, 2, 9]], [[-1, -1, -1], [0, 1, 4]]], dtype=torch.int32),
            "rank": 1, "topk": 2, "granularity": 1,
        },
        "score_select": {"query": query, "keys": keys, "topk": 2, "with_scores": False, "scratch": Scratch()},
        "to_slots": {
            "indices": torch.tensor([[0, 5, -1], [1, 2, 69]], dtype=torch.int32), "page_table": keys.page_table, "requests": longs(0, 0),
            "page_size": 64,
        },
        "pool_keys": {"values": k, "scales": k_scales, "block_size": BLOCK},
        "pool_blocks": {"keys": keys, "block_size": BLOCK},
        "grow_means": {
            "keys": keys,
            "means": room_for_means(keys),
            "pooled": longs(3),
            "tickets": torch.zeros(1, dtype=torch.int32),
            "block_size": BLOCK,
        },
        "hisa_select": {
            "query": query, "keys": keys, "means": ops.pool_blocks(keys, BLOCK), "num_blocks": 3, "block_size": BLOCK, "topk": 2,
            "with_scores": False, "scratch": Scratch(),
        },
        "partial_means": {"values": k, "scales": k_scales, "block_size": BLOCK, "positions": longs(-1, 69)},
        "head_mass": {"query": query, "means": [ops.pool_keys(k, k_scales, BLOCK)], "keys": keys, "block_size": BLOCK},
        "route_heads": {"mass": randn(2, HEADS).abs(), "active_heads": 2},
        "routed_query": {
            "query": query, "means": [ops.pool_keys(k, k_scales, BLOCK)], "keys": keys, "block_size": BLOCK, "active_heads": 2
        },
        "sparse_attend": {"q": randn(2, 4, 8), "k": randn(6, 2, 8), "v": randn(6, 2, 5), "slots": slots, "scale": 0.3},
        "sparse_attend_mla": {"q": randn(2, 4, 576), "latents": randn(6, 576), "slots": slots, "scale": 0.05, "value_dim": 512},
        "sparse_attend_mla_fp8": {
            "q": randn(2, 4, 576).bfloat16(), "cache_data": LatentCache(2, 3).data, "slots": slots, "scale": 0.05, "early": False
        },
        "merge": {"parts": [PartialAttention(randn(2, 3, 4), randn(2, 3)) for _ in range(2)]},
        "store_index_keys": {"pages": IndexKeyCache(2, DIM, 3).pages, "x": randn(2, DIM), **tokens, **rotation},
        "quantize_queries": {
            "x": randn(2, HEADS, DIM),
            "weights": weights,
            "positions": tokens["positions"],
            **rotation,
            "factor": 0.3,
        },
        "store_latents": {
            "data": LatentCache(2, 3).data,
            "latent": randn(2, 512),
            "rope": randn(2, 64),
            **tokens,
            "theta": 1e4,
            "style": "interleaved",
        },
        "store_step": {
            "pages": IndexKeyCache(2, DIM, 3).pages,
            "data": LatentCache(5, 1).data,
            "key": randn(2, DIM),
            "latent": randn(2, 512),
            "rope": randn(2, 64),
            "q": randn(2, HEADS, DIM),
            "weights": weights,
            **tokens,
            **rotation,
            "factor": 0.3,
        },
    }


def empty():
    """``(function, arguments, what comes out)``: no queries, no keys, no context, nothing to keep or to store."""
    q, none = torch.zeros(2, HEADS, DIM).to(torch.float8_e4m3fn), torch.zeros(0, HEADS, DIM).to(torch.float8_e4m3fn)
    k, no_keys = torch.zeros(5, DIM).to(torch.float8_e4m3fn), torch.zeros(0, DIM).to(torch.float8_e4m3fn)
    inf = torch.inf
    held, bare = pack_keys([(k, torch.ones(5))]), pack_keys([(no_keys, torch.ones(0))])
    nobody = IndexKeys(held.pages, torch.zeros(0, 1, dtype=torch.int32), longs())
    two = IndexQuery(q, torch.ones(2, HEADS), longs(0, 4), longs(0, 0))
    blind = IndexQuery(q, torch.ones(2, HEADS), longs(-1, -1), longs(0, 0))
    nothing = IndexQuery(none, torch.ones(0, HEADS), longs(), longs())
    slots = torch.full((2, 3), -1, dtype=torch.int32)
    table, no_pages = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 0, dtype=torch.int32)
    half = torch.zeros(2, 4, 576).bfloat16()
    empty_row = {"out": torch.zeros(2, 4, 512), "lse": torch.full((2, 4), -inf)}
    rope = {"theta": 1e4, "rotary_dim": 32, "style": "half"}
    minus = torch.full((2, 4), -1, dtype=torch.int32)
    cases = [
        ("index_score", (none, torch.ones(0, HEADS), k, torch.ones(5), longs(), longs()), torch.zeros(0, 5)),
        ("index_score", (q, torch.ones(2, HEADS), no_keys, torch.ones(0), longs(0, 0), longs(0, 0)), torch.zeros(2, 0)),
        ("index_score", (q, torch.ones(2, HEADS), k, torch.ones(5), longs(0, 3), longs(0, 2)), torch.full((2, 5), -inf)),
        ("paged_index_score", (nothing, held), torch.zeros(0, 5)),
        ("paged_index_score", (nothing, nobody), torch.zeros(0, 0)),
        ("paged_index_score", (two, bare), torch.zeros(2, 0)),
        ("paged_index_score", (blind, held), torch.full((2, 5), -inf)),
        ("gathered_index_score", (nothing, held, torch.zeros(0, 4).long()), torch.zeros(0, 4)),
        ("gathered_index_score", (two, held, torch.zeros(2, 0).long()), torch.zeros(2, 0)),
        ("gathered_index_score", (two, bare, torch.tensor([[0, -1], [2, -1]])), torch.full((2, 2), -inf)),
        ("block_index_score", (nothing, held, slots[:0], 4), torch.zeros(0, 12)),
        ("block_index_score", (two, held, slots[:, :0], 4), torch.zeros(2, 0)),
        ("block_index_score", (two, held, slots, 4), torch.full((2, 12), -inf)),
        ("block_index_score", (two, bare, slots + 1, 4), torch.full((2, 12), -inf)),
        ("select_topk_in_blocks", (torch.zeros(0, 12), 4, slots[:0], 4), minus[:0]),
        ("select_topk_in_blocks", (torch.zeros(2, 0), 4, slots[:, :0], 4), minus),
        ("select_topk_in_blocks", (torch.zeros(2, 12), 4, slots, 4), minus),
        ("select_blocks", (torch.zeros(0, 5), 4, nothing, held, 2), minus[:0]),
        ("select_blocks", (torch.zeros(0, 5), 4, nothing, nobody, 2), minus[:0]),
        ("select_blocks", (torch.zeros(2, 0), 4, blind, held, 2), minus[:, :1]),
        ("select_blocks", (torch.zeros(2, 0), 4, two, bare, 2), minus[:, :1]),
        ("select_topk", (torch.zeros(0, 5), 4), minus[:0]),
        ("select_topk", (torch.zeros(2, 0), 4), minus),
        ("select_topk", (torch.full((2, 5), -inf), 4), minus),
        ("select_topk_slots", (torch.zeros(0, 5), 4, table, longs(), 64), minus[:0]),
        ("select_topk_slots", (torch.zeros(2, 0), 4, table, longs(0, 0), 64), minus),
        ("select_topk_slots", (torch.zeros(2, 5), 4, no_pages, longs(0, 0), 64), minus),
        ("to_slots", (minus[:0], table, longs(), 64), minus[:0]),
        ("to_slots", (minus[:, :0], table, longs(0, 0), 64), minus[:, :0]),
        ("to_slots", (minus + 1, no_pages, longs(0, 0), 64), minus),
        ("keep_best", (torch.zeros(3, 0, 5), torch.zeros(3, 0, 5).int(), 2, 4), minus[:0]),
        ("keep_best", (torch.zeros(3, 2, 0), torch.zeros(3, 2, 0).int(), 2, 4), minus),
        ("keep_best", (torch.zeros(3, 2, 5), torch.zeros(3, 2, 5).int() - 1, 2, 4), minus),
        ("score_select", (nothing, held, 4), minus[:0]),
        ("score_select", (nothing, nobody, 4), minus[:0]),
        ("score_select", (two, bare, 4), minus),
        ("score_select", (blind, held, 4), minus),
        ("hisa_select", (nothing, held, ops.pool_blocks(held, 4), 2, 4, 4), minus[:0]),
        ("hisa_select", (nothing, nobody, ops.pool_blocks(nobody, 4), 2, 4, 4), minus[:0]),
        ("hisa_select", (two, bare, ops.pool_blocks(bare, 4), 2, 4, 4), minus),
        ("hisa_select", (blind, held, ops.pool_blocks(held, 4), 2, 4, 4), minus),
        ("pool_keys", (no_keys, torch.ones(0), 4), torch.zeros(0, DIM)),
        ("pool_keys", (k, torch.ones(5), 8), torch.zeros(0, DIM)),
        ("pool_blocks", (bare, 4), torch.zeros(1, 64, 1, DIM + 4, dtype=torch.uint8)),
        ("grow_means", (bare, ops.pool_blocks(bare, 4), longs(0), minus[0, :1] + 1, 4), None),
        ("partial_means", (k, torch.ones(5), 4, longs()), torch.zeros(0, DIM)),
        ("partial_means", (no_keys, torch.ones(0), 4, longs(-1, -1)), torch.zeros(2, DIM)),
        ("head_mass", (nothing, [(no_keys, torch.ones(0))], held, 8), torch.zeros(0, HEADS)),
        ("head_mass", (two, [(no_keys, torch.ones(0))], bare, 8), torch.zeros(2, HEADS)),
        ("head_mass", (blind, [(no_keys, torch.ones(0))], held, 8), torch.zeros(2, HEADS)),
        ("route_heads", (torch.zeros(0, 4), 2), torch.zeros(0, 2).long()),
        ("routed_query", (nothing, [(no_keys, torch.ones(0))], held, 8, 1), nothing.q[:, :1]),
        ("routed_query", (two, [(no_keys, torch.ones(0))], bare, 8, HEADS), two.q),
        ("routed_query", (blind, [(no_keys, torch.ones(0))], held, 8, HEADS), blind.q),
        ("sparse_attend", (torch.zeros(0, 4, 8), torch.zeros(6, 2, 8), torch.zeros(6, 2, 8), slots[:0], 1.0), torch.zeros(0, 4, 8)),
        ("sparse_attend", (torch.zeros(2, 4, 8), torch.zeros(0, 2, 8), torch.zeros(0, 2, 8), slots, 1.0), torch.zeros(2, 4, 8)),
        ("sparse_attend_mla", (half, torch.zeros(0, 576).bfloat16(), slots, 1.0), empty_row),
        ("sparse_attend_mla", (half, torch.zeros(6, 576).bfloat16(), slots[:, :0], 1.0), empty_row),
        ("sparse_attend_mla_fp8", (half[:0], LatentCache(2, 3).data, slots[:0], 1.0), torch.zeros(0, 4, 512)),
        ("sparse_attend_mla_fp8", (half, LatentCache(0, 3).data, slots, 1.0), empty_row),
        ("sparse_attend_mla_fp8", (half, LatentCache(2, 3).data, slots[:, :0], 1.0), empty_row),
        ("sparse_attend_mla_fp8", (half, torch.full((2, 3, 1, 656), 0xFF, dtype=torch.uint8), slots, 1.0), empty_row),
        ("merge", ([PartialAttention(torch.full((2, 3, 4), torch.nan), torch.full((2, 3), -inf))],), torch.zeros(2, 3, 4)),
        ("merge", ([PartialAttention(torch.zeros(0, 3, 4), torch.zeros(0, 3))],), torch.zeros(0, 3, 4)),
        ("quantize_queries", (torch.zeros(0, 3, 64), torch.zeros(0, 3), longs(), *rope.values()), torch.zeros(0, 3, 64)),
    ]
    pages, data = IndexKeyCache(2, DIM, 3).pages, LatentCache(2, 3).data
    nan = torch.full((1, DIM), torch.nan)
    cases += [
        ("store_index_keys", (pages, longs(), torch.zeros(0, DIM), longs(), *rope.values()), pages.clone()),
        ("store_index_keys", (pages, longs(-1), nan, longs(7), *rope.values()), pages.clone()),
        ("store_index_keys", (pages[:0], longs(-1), nan, longs(7), *rope.values()), pages[:0].clone()),
        ("store_latents", (data, longs(), torch.zeros(0, 512), torch.zeros(0, 64)), data.clone()),
        ("store_latents", (data, longs(-1), nan.expand(1, 64).repeat(1, 8), nan, longs(7)), data.clone()),
        ("store_latents", (data[:0], longs(-1), torch.zeros(1, 512), torch.zeros(1, 64)), data[:0].clone()),
    ]
    none = torch.zeros(0, DIM), torch.zeros(0, 512), torch.zeros(0, 64), torch.zeros(0, 3, DIM), torch.zeros(0, 3)
    left_out = nan, nan.repeat(1, 8), nan
    some, headless = (torch.zeros(1, 3, DIM), torch.ones(1, 3)), (torch.zeros(1, 0, DIM), torch.ones(1, 0))
    cases += [
        ("store_step", (pages, data, longs(), *none, longs(), *rope.values()), none[3]),
        ("store_step", (pages[:0], data[:0], longs(-1), *left_out, *some, longs(7), *rope.values()), some[0]),
        ("store_step", (pages, data, longs(-1), *left_out, *headless, longs(7), *rope.values()), headless[0]),
    ]
    return cases


def first_tensor(result, given):
    """The main tensor of a result; of a function that writes, its first argument."""
    if result is None:
        return given[0]
    if isinstance(result, tuple):
        return first_tensor(result[0], given).float()
    return result if isinstance(result, torch.Tensor) else next(iter(vars(result).values()))
