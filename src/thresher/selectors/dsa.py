"""DeepSeek Sparse Attention: every indexer head scores every visible key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from thresher.selectors.base import require_int
from thresher.selectors.scan import scan_topk
from thresher.selectors.scored import ScoredSelector
from thresher.types import IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class DSA(ScoredSelector):
    """The ``topk`` keys of largest ``sum_j w[t,j] * relu(q[t,j] . k[s])`` over all heads (DeepSeek-V3.2-Exp, arXiv 2512.02556)."""

    topk: int = 2048

    def __post_init__(self) -> None:
        require_int("topk", self.topk, 1)

    def _select(self, query: IndexQuery, keys: IndexKeys, state: LayerState | None, with_scores: bool) -> Selection:
        return scan_topk(query, keys, self.topk, with_scores, state)

    def index_flops(self, length: int, heads: int, head_dim: int) -> float:
        """``2 H D L``."""
        return 2.0 * heads * head_dim * length

    def index_bytes(self, length: int, heads: int, head_dim: int) -> float:
        """``(D + 4) L``."""
        return float((head_dim + 4) * length)
