"""MISA: a few routed heads score every visible key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thresher.selectors.base import require_int
from thresher.selectors.scan import block_means, routed_topk
from thresher.selectors.scored import ScoredSelector
from thresher.types import IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class MISA(ScoredSelector):
    """Mixture of Indexer Sparse Attention (arXiv 2605.07363): DSA with the heads of largest mass over block means.

    Attributes:
        active_heads: heads kept for each query, at most the indexer's.
        block_size: tokens in a block whose mean key stands for it when heads are routed. Only what a query sees counts:
            full blocks before its own, and the part of its own up to itself.
        topk: tokens kept.
    """

    active_heads: int = 8
    block_size: int = 1024
    topk: int = 2048

    def __post_init__(self) -> None:
        require_int("active_heads", self.active_heads, 1)
        require_int("block_size", self.block_size, 1)
        require_int("topk", self.topk, 1)

    def _select(self, query: IndexQuery, keys: IndexKeys, state: LayerState | None, with_scores: bool) -> Selection:
        """Uses the state's block means. Raises ``ThresherError`` when ``active_heads`` are more than its heads."""
        means = block_means(keys, self.block_size, state)
        return routed_topk(query, keys, means, self.block_size, self.active_heads, self.topk, with_scores, state)

    def index_flops(self, length: int, heads: int, head_dim: int) -> float:
        """``2 h D L + 2 H D ceil(L / B)``."""
        return 2.0 * head_dim * (min(self.active_heads, heads) * length + heads * -(-length // self.block_size))

    def index_bytes(self, length: int, heads: int, head_dim: int) -> float:
        """``(D + 4) (L + ceil(L / B))``."""
        return float((head_dim + 4) * (length - (-length // self.block_size)))
