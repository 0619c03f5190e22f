"""Score every visible key with the heads at hand, keep the best: the step most selectors end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thresher.ops.pool_keys import grow_means, pool_blocks
from thresher.ops.route_heads import routed_query
from thresher.ops.score_select import one_pass, score_select
from thresher.selectors.base import require_active_heads
from thresher.selectors.rows import first_heads, in_chunks, scan_columns
from thresher.types import IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


def scan_topk(query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool = True, state: LayerState | None = None) -> Selection:
    """The ``topk`` visible keys of largest score over all heads of ``query``."""

    def select_rows(rows: IndexQuery, _: slice) -> Selection:
        return _score_select(rows, keys, topk, with_scores, state)

    return in_chunks(query, scan_columns(query, keys, topk), select_rows)


def routed_topk(
    query: IndexQuery,
    keys: IndexKeys,
    means: IndexKeys,
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


def routed_columns(query: IndexQuery, keys: IndexKeys, means: IndexKeys, block_size: int, active_heads: int, topk: int) -> int:
    """Elements alive for each query in ``routed_topk``: what the routing holds, or a row of scores where the scan has a matrix of them."""
    scanned = 0 if one_pass(first_heads(query, active_heads), keys, topk) else most_tokens(keys, means, block_size)
    return max(scanned, (most_blocks(keys, means, block_size) + 1) * query.num_heads)


def most_blocks(keys: IndexKeys, means: IndexKeys, block_size: int) -> int:
    """No request has more full blocks than this, which is known without a look at the device."""
    return min(means.room, keys.room // block_size)


def most_tokens(keys: IndexKeys, means: IndexKeys, block_size: int) -> int:
    """No request is longer than this: full blocks, and one that is not."""
    return min((most_blocks(keys, means, block_size) + 1) * block_size, keys.room)


def block_means(keys: IndexKeys, block_size: int, state: LayerState | None) -> IndexKeys:
    """Means of every request's full blocks, as paged keys whose positions are block numbers: the state's, grown by what was appended, or
    afresh without a state. On a GPU no length is read, so that a CUDA graph can hold it."""
    return pool_blocks(keys, block_size) if state is None else state.block_means(block_size, grow_means).update(keys)
