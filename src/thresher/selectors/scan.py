"""Score every visible key with the heads at hand, keep the best: the step most selectors end with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from thresher.cache.block_means import BlockMeans
from thresher.cache.index_keys import visible_counts
from thresher.ops.index_score import paged_index_score
from thresher.ops.pool_keys import pool_keys
from thresher.ops.route_heads import head_mass, route_heads
from thresher.ops.select import select_visible
from thresher.selectors.base import require_active_heads
from thresher.selectors.rows import in_chunks, keep_heads, longest
from thresher.types import IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState

# Per request: e4m3 [full blocks, D] and fp32 [full blocks].
Means = list[tuple[Tensor, Tensor]]


def scan_topk(query: IndexQuery, keys: IndexKeys, topk: int) -> Selection:
    """The ``topk`` visible keys of largest score over all heads of ``query``."""
    return in_chunks(query, longest(keys), lambda rows, _: _best_visible(rows, keys, topk))


def routed_topk(query: IndexQuery, keys: IndexKeys, means: Means, block_size: int, active_heads: int, topk: int) -> Selection:
    """``scan_topk`` over each query's ``active_heads`` heads of largest mass over the block means (MISA, arXiv 2605.07363)."""
    require_active_heads(active_heads, query.num_heads)
    length = longest(keys)
    num_blocks = -(-length // block_size)

    def select_rows(rows: IndexQuery, _: slice) -> Selection:
        heads = route_heads(head_mass(rows, means, keys, block_size), active_heads)
        return _best_visible(keep_heads(rows, heads), keys, topk)

    return in_chunks(query, max(length, num_blocks * query.num_heads), select_rows)


def _best_visible(rows: IndexQuery, keys: IndexKeys, topk: int) -> Selection:
    """Scores past what a row sees are neither written nor read."""
    return select_visible(paged_index_score(rows, keys, filled=False), topk, visible_counts(rows, keys))


def up_to_date_means(keys: IndexKeys, block_size: int, state: LayerState | None) -> Means:
    """Means of every request's full blocks: the state's, grown by what was appended, or afresh without a state."""
    means = BlockMeans(block_size, pool_keys) if state is None else state.block_means(block_size, pool_keys)
    means.update(keys)
    return [means.of(request) for request in range(keys.num_requests)]
