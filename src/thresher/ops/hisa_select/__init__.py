"""HISA's selection: blocks by the scores of their means, then tokens in the blocks chosen.

```python
of_blocks = replace(query, positions=query.positions // block_size)
blocks = select_blocks(paged_index_score(of_blocks, means), num_blocks, query, keys, block_size)
selection = select_topk_in_blocks(block_index_score(query, keys, blocks, block_size), topk, blocks, block_size)
```

"auto" takes a kernel that does this in one launch where it can run and is faster, and the four operations, each by its own row of the
table, elsewhere.
"""

from __future__ import annotations

from types import ModuleType

from thresher.cache.block_means import Growing, held_means
from thresher.cache.scratch import Scratch
from thresher.checks import check_count, check_kind
from thresher.ops.arguments import check_means, check_paged
from thresher.ops.dispatch import AUTO, choose, one_or_steps
from thresher.ops.hisa_select.reference import hisa_select_reference
from thresher.ops.pool_keys import check_cuts
from thresher.types import IndexKeys, IndexQuery, Selection


def hisa_select(
    query: IndexQuery,
    keys: IndexKeys,
    means: IndexKeys | Growing,
    num_blocks: int,
    block_size: int,
    topk: int,
    *,
    with_scores: bool = True,
    impl: str = AUTO,
    scratch: Scratch | None = None,
) -> Selection:
    """The topk visible keys of largest score in the blocks that ``select_blocks`` chooses, bit for bit. No gradient.

    Args:
        query: the queries of any mix of requests.
        keys: the paged index keys; query i sees those at ``0..positions[i]`` of its request, as far as they are held.
        means: the means of every request's full blocks, as keys whose positions are block numbers: from ``pool_blocks`` or ``grow_means``;
            or, from ``BlockMeans.growing``, those that are brought up to date first.
        num_blocks: blocks whose tokens are scored, at least 2: the first, the query's own, and the best of the full ones between them.
        block_size: tokens in a block, at least 1.
        topk: how many to keep, at least 1.
        with_scores: whether scores are returned beside.
        impl: "auto", "cuda" or "reference". "cuda" is for a step of decoding on Hopper, with blocks of whole pages of 64, and raises where
            it cannot run; "reference" is that of the four operations. "auto" is "cuda" where that can run and its ``worthwhile`` says so,
            and else the four operations with "auto" each.
        scratch: for "cuda", which then has nothing to clear before it begins, and does its errand if it has one; None gives it memory of
            its own.

    Returns:
        A logical Selection with indices int32 ``[Q, topk]`` ascending and -1 padded, lengths, and scores (-inf where padded) or None.

    Raises:
        ThresherError: what ``paged_index_score`` refuses, means of other requests or sizes, a number that is too small, with_scores that is
            no bool, scratch that is none, or an impl that cannot run.

    Source: HISA (arXiv 2603.28458).
    """
    device = check_paged(query, keys)
    held = held_means(means)
    check_means(held, keys)
    check_count("num_blocks", num_blocks, 2, do="keep the first and the query's own at least")
    check_count("block_size", block_size, 1, do="pass tokens per block")
    check_count("topk", topk, 1, do="ask for at least one token")
    check_kind("with_scores", with_scores, bool, "pass True or False")
    if scratch is not None:
        check_kind("scratch", scratch, Scratch, "pass a Scratch, or None")
    if isinstance(means, Growing):
        check_cuts(keys, held, block_size)

    def unsupported(module: ModuleType) -> str | None:
        why: str | None = module.unsupported(query, keys, held, num_blocks, block_size, topk)
        return why

    sizes = query.num_queries, keys.num_requests
    if impl == AUTO:
        kernel = one_or_steps("hisa_select", device, unsupported, lambda module: module.worthwhile(*sizes))
    else:
        kernel = choose("hisa_select", impl, device, unsupported)
    if kernel is None:
        return hisa_select_reference(query, keys, means, num_blocks, block_size, topk, with_scores, impl)
    return kernel(query, keys, means, num_blocks, block_size, topk, with_scores, scratch)
