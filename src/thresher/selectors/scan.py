"""Score every visible key with the heads at hand, keep the best: the step most selectors end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thresher.cache.block_means import BlockMeans, PackedMeans
from thresher.ops.pool_keys import pool_blocks, pool_keys, pool_pages
from thresher.ops.route_heads import routed_query
from thresher.ops.score_select import one_pass, score_select
from thresher.selectors.base import require_active_heads
from thresher.selectors.rows import first_heads, in_chunks, scan_columns
from thresher.types import IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState

Means = PackedMeans | IndexKeys


def scan_topk(query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool = True, state: LayerState | None = None) -> Selection:
    """The ``topk`` visible keys of largest score over all heads of ``query``."""

    def select_rows(rows: IndexQuery, _: slice) -> Selection:
        return _score_select(rows, keys, topk, with_scores, state)

    return in_chunks(query, scan_columns(query, keys, topk), select_rows)


def routed_topk(
    query: IndexQuery,
    keys: IndexKeys,
    means: Means,
    block_size: int,
    active_heads: int,
    topk: int,
    with_scores: bool = True,
    state: LayerState | None = None,
) -> Selection:
    """``scan_topk`` over each query's ``active_heads`` heads of largest mass over the block means (MISA, arXiv 2605.07363)."""
    require_active_heads(active_heads, query.num_heads)

    def select_rows(rows: IndexQuery, _: slice) -> Selection:
        return _score_select(routed_query(rows, means, keys, block_size, active_heads), keys, topk, with_scores, state)

    return in_chunks(query, routed_columns(query, keys, means, block_size, active_heads, topk), select_rows)


def _score_select(query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool, state: LayerState | None) -> Selection:
    return score_select(query, keys, topk, with_scores=with_scores, scratch=None if state is None else state.scratch)


def routed_columns(query: IndexQuery, keys: IndexKeys, means: Means, block_size: int, active_heads: int, topk: int) -> int:
    """Elements alive for each query in ``routed_topk``: what the routing holds, or a row of scores where the scan has a matrix of them."""
    scanned = 0 if one_pass(first_heads(query, active_heads), keys, topk) else most_tokens(keys, means, block_size)
    return max(scanned, (most_blocks(means) + 1) * query.num_heads)


def most_blocks(means: Means) -> int:
    """No request has more full blocks than this, which is known without a look at the device."""
    return means.room if isinstance(means, IndexKeys) else means.most


def most_tokens(keys: IndexKeys, means: Means, block_size: int) -> int:
    """No request is longer than this: full blocks, and one that is not."""
    return min((most_blocks(means) + 1) * block_size, keys.room)


def up_to_date_means(keys: IndexKeys, block_size: int, state: LayerState | None) -> Means:
    """Means of every request's full blocks: the state's, grown by what was appended, or afresh without a state.

    On a GPU those made afresh are paged, and no length is read: prefill without a state can be recorded in a CUDA graph.
    """
    return pool_blocks(keys, block_size) if _afresh(keys, state) else _updated(keys, block_size, state).all(keys.num_requests)


def mean_keys(keys: IndexKeys, block_size: int, state: LayerState | None) -> IndexKeys:
    """``up_to_date_means`` as paged keys whose positions are block numbers."""
    return pool_blocks(keys, block_size) if _afresh(keys, state) else _updated(keys, block_size, state).packed(keys.num_requests)


def _afresh(keys: IndexKeys, state: LayerState | None) -> bool:
    return state is None and keys.pages.is_cuda


def _updated(keys: IndexKeys, block_size: int, state: LayerState | None) -> BlockMeans:
    pools = (block_size, pool_keys, pool_pages)
    means = BlockMeans(*pools) if state is None else state.block_means(*pools)
    means.update(keys)
    return means
