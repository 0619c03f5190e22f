"""What an indexer costs next to DSA's, counted from the formulas."""

from __future__ import annotations

from collections.abc import Sequence

from thresher.distributed import IDSA, ExactMerge
from thresher.distributed.simulate import OverRanks
from thresher.selectors import DSA


def index_cost(plan: Sequence[OverRanks], length: int, heads: int, head_dim: int) -> tuple[float, float]:
    """Indexer FLOPs and bytes of one query over ``length`` keys, all layers and ranks together, as fractions of DSA's on every layer."""
    whole = DSA()
    flops = moved = 0.0
    for method in plan:
        ranks = method.placement.ranks
        selector = method.selector
        if isinstance(method, IDSA):
            selector = method.local_selector
        elif isinstance(method, ExactMerge) and selector.topk is not None:
            selector = selector.shard(ranks, selector.topk)
        flops += ranks * selector.index_flops(length // ranks, heads, head_dim)
        moved += ranks * selector.index_bytes(length // ranks, heads, head_dim)
    return flops / (len(plan) * whole.index_flops(length, heads, head_dim)), moved / (
        len(plan) * whole.index_bytes(length, heads, head_dim)
    )
