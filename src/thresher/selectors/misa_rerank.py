"""MISA with a second look: routed heads propose, all heads decide (MISA-dagger)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thresher.errors import require
from thresher.ops.index_score import gathered_index_score
from thresher.ops.select import select_topk
from thresher.selectors.base import require_int
from thresher.selectors.misa import MISA
from thresher.selectors.rows import in_chunks
from thresher.selectors.scan import block_means, most_tokens, routed_columns, routed_topk
from thresher.selectors.scored import ScoredSelector
from thresher.types import IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class MISARerank(ScoredSelector):
    """MISA's hierarchical variant (arXiv 2605.07363): the best ``candidates`` by the routed score, re-scored with every head.

    Attributes:
        active_heads, block_size: as in ``MISA``.
        candidates: tokens proposed by the routed heads, at least ``topk``.
        topk: tokens kept.
    """

    active_heads: int = 8
    block_size: int = 1024
    candidates: int = 8192
    topk: int = 2048

    def __post_init__(self) -> None:
        require_int("active_heads", self.active_heads, 1)
        require_int("block_size", self.block_size, 1)
        require_int("topk", self.topk, 1)
        require_int("candidates", self.candidates, 1)
        require(
            self.candidates >= self.topk, f"candidates must be at least topk={self.topk}", self.candidates, "raise candidates or lower topk"
        )

    def proposer(self) -> MISA:
        """The selector of the first look."""
        return MISA(self.active_heads, self.block_size, self.candidates)

    def shard(self, ranks: int, topk: int) -> MISARerank:
        """A rank proposes its share of the candidates, and never fewer than ``topk``."""
        require_int("ranks", ranks, 1)
        return replace(self, topk=topk, candidates=max(-(-self.candidates // ranks), topk))

    def _select(self, query: IndexQuery, keys: IndexKeys, state: LayerState | None, with_scores: bool) -> Selection:
        """See ``MISA._select``."""
        means = block_means(keys, self.block_size, state)
        count = max(1, min(self.candidates, most_tokens(keys, means, self.block_size)))

        def select_rows(rows: IndexQuery, _: slice) -> Selection:
            proposed = routed_topk(rows, keys, means, self.block_size, self.active_heads, count, with_scores=False, state=state)
            scores = gathered_index_score(rows, keys, proposed.indices)
            return select_topk(scores, self.topk, positions=proposed.indices, with_scores=with_scores)

        return in_chunks(query, max(routed_columns(query, keys, means, self.block_size, self.active_heads, count), count), select_rows)

    def index_flops(self, length: int, heads: int, head_dim: int) -> float:
        """MISA's, and ``2 H D`` for each candidate."""
        return self.proposer().index_flops(length, heads, head_dim) + 2.0 * heads * head_dim * min(self.candidates, length)

    def index_bytes(self, length: int, heads: int, head_dim: int) -> float:
        """MISA's, and ``D + 4`` for each candidate."""
        return self.proposer().index_bytes(length, heads, head_dim) + (head_dim + 4) * min(self.candidates, length)
