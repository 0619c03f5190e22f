"""HISA: all heads score block means first, then the tokens of the best blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thresher.cache.block_means import held_means
from thresher.errors import require
from thresher.ops.hisa_select import hisa_select
from thresher.ops.pool_keys import grow_means, pool_blocks
from thresher.selectors.base import require_int
from thresher.selectors.rows import in_chunks
from thresher.selectors.scored import ScoredSelector
from thresher.types import IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class HISA(ScoredSelector):
    """Hierarchical indexing (arXiv 2603.28458). Equal to DSA while the context fits in ``num_blocks * block_size`` tokens.

    Attributes:
        block_size: tokens in a block.
        num_blocks: blocks whose tokens are scored: the first, the query's own, and the best of the full blocks between them.
        topk: tokens kept, at most ``num_blocks * block_size``.
    """

    block_size: int = 128
    num_blocks: int = 64
    topk: int = 2048

    def __post_init__(self) -> None:
        require_int("block_size", self.block_size, 1)
        require_int("num_blocks", self.num_blocks, 2)
        require_int("topk", self.topk, 1)
        held = self.num_blocks * self.block_size
        require(held >= self.topk, f"num_blocks * block_size must be at least topk={self.topk}", held, "raise num_blocks or lower topk")

    def shard(self, ranks: int, topk: int) -> HISA:
        """A rank's share of the blocks (of local positions) and one more, enough for ``topk`` beside the two forced ones.

        Never more than ``num_blocks``, unless ``topk`` needs them.
        """
        require_int("ranks", ranks, 1)
        needed = -(-topk // self.block_size)
        share = max(-(-self.num_blocks // ranks) + 1, needed + 2)
        return replace(self, topk=topk, num_blocks=max(min(share, self.num_blocks), needed))

    def _select(self, query: IndexQuery, keys: IndexKeys, state: LayerState | None, with_scores: bool) -> Selection:
        """Uses the state's block means."""
        means = pool_blocks(keys, self.block_size) if state is None else state.block_means(self.block_size, grow_means).growing(keys)
        scratch = None if state is None else state.scratch

        def select_rows(rows: IndexQuery, _: slice) -> Selection:
            sizes = self.num_blocks, self.block_size, self.topk
            return hisa_select(rows, keys, means, *sizes, with_scores=with_scores, scratch=scratch)

        return in_chunks(query, max(self.num_blocks * self.block_size, held_means(means).room), select_rows)

    def index_flops(self, length: int, heads: int, head_dim: int) -> float:
        """``2 H D (ceil(L / B) + min(L, m B))``."""
        return 2.0 * heads * head_dim * self.keys_scored(length)

    def index_bytes(self, length: int, heads: int, head_dim: int) -> float:
        """``(D + 4) (ceil(L / B) + min(L, m B))``."""
        return float((head_dim + 4) * self.keys_scored(length))

    def keys_scored(self, length: int) -> int:
        """Block means and tokens scored for one query over ``length`` keys."""
        return -(-length // self.block_size) + min(length, self.num_blocks * self.block_size)
