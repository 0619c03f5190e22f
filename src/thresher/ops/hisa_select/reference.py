"""The four operations: scores of blocks, the best of them, scores of their tokens, the best of those."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from thresher.cache.block_means import Growing
from thresher.ops.index_score import block_index_score, paged_index_score
from thresher.ops.pool_keys import grow_means
from thresher.ops.select import select_blocks, select_topk_in_blocks
from thresher.types import IndexKeys, IndexQuery, Selection


def choose_blocks(query: IndexQuery, keys: IndexKeys, means: IndexKeys, num_blocks: int, block_size: int, impl: str = "auto") -> Tensor:
    """int32 ``[Q, m]``, ``m <= num_blocks``: the blocks to look into, ascending, -1 padded at the end; see ``hisa_select``."""
    # A query sees the mean of its own block too, once that is full; it is not looked at.
    of_blocks = replace(query, positions=query.positions // block_size)
    score_QM = paged_index_score(of_blocks, means, impl, filled=False, width=means.room)
    return select_blocks(score_QM, num_blocks, query, keys, block_size, impl)


def hisa_select_reference(
    query: IndexQuery,
    keys: IndexKeys,
    means: IndexKeys | Growing,
    num_blocks: int,
    block_size: int,
    topk: int,
    with_scores: bool,
    impl: str,
) -> Selection:
    """The selection, all four by ``impl``, and before them what brings means up to date."""
    if isinstance(means, Growing):
        grow_means(keys, *means, block_size, impl)
        means = means.means
    blocks = choose_blocks(query, keys, means, num_blocks, block_size, impl)
    scores = block_index_score(query, keys, blocks, block_size, impl)
    return select_topk_in_blocks(scores, topk, blocks, block_size, impl=impl, with_scores=with_scores)
