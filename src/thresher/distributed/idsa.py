"""Interleaved DSA: each rank keeps its own best m and nothing is exchanged between score and attend (OpenReview s3kae9DXni)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thresher.cache.placement import Placement
from thresher.cache.state import LayerState
from thresher.distributed import coverage
from thresher.distributed.collectives import Collectives
from thresher.distributed.shards import Shard, local_attention, local_query
from thresher.distributed.simulate import select_over_ranks
from thresher.errors import require
from thresher.selectors.base import Selector
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, PartialAttention, Selection

MISS_PROBABILITY = 1e-4


@dataclass(frozen=True)
class IDSA:
    """Any selector, run by every rank on its own tokens; outputs are merged by log-sum-exp.

    Attributes:
        selector: the selector of one device; a rank runs ``selector.shard(ranks, budget)``.
        ranks: R.
        local_topk: m, tokens a rank keeps; None for ``coverage.local_topk`` at a miss probability of 1e-4.
        granularity: neighbouring tokens kept on one rank.

    Raises:
        ThresherError: ranks or granularity under 1, or m outside ``[ceil(topk / ranks), topk]``.
    """

    selector: Selector
    ranks: int
    local_topk: int | None = None
    granularity: int = 1

    def __post_init__(self) -> None:
        placement = self.placement
        if self.topk is not None and self.local_topk is not None:
            least = -(-self.topk // placement.ranks)
            must = f"local_topk must lie in [{least}, {self.topk}], so that {self.ranks} ranks hold topk={self.topk} tokens"
            require(least <= self.local_topk <= self.topk, must, self.local_topk, "leave it out to take the derived one")

    @property
    def placement(self) -> Placement:
        return Placement(self.ranks, self.granularity)

    @property
    def topk(self) -> int | None:
        """The selector's own, k."""
        return self.selector.topk

    @property
    def budget(self) -> int | None:
        """m, tokens a rank keeps; None where the selector has no bound of its own."""
        if self.topk is None or self.local_topk is not None:
            return self.local_topk
        return coverage.local_topk(self.topk, self.ranks, MISS_PROBABILITY)

    @property
    def width(self) -> int | None:
        """Columns of the logical union, R * m; None where the selector has no bound of its own."""
        return None if self.topk is None or self.budget is None else self.ranks * self.budget

    @property
    def local_selector(self) -> Selector:
        """What every rank runs."""
        return self.selector if self.topk is None or self.budget is None else self.selector.shard(self.ranks, self.budget)

    def local_query(self, query: IndexQuery, rank: int) -> IndexQuery:
        """The queries, of logical positions, as ``rank`` sees them."""
        return local_query(query, self.placement, rank)

    def local_select(self, query: IndexQuery, shard: Shard, rank: int, attention: AttentionInputs | None = None) -> Selection:
        """What ``rank`` keeps of its own tokens.

        Args:
            query: Q queries of logical positions.
            shard: the rank's keys and state.
            rank: which rank this is.
            attention: the attention's inputs with the rank's own keys, for selectors that look at true mass.

        Returns:
            A local ``Selection`` of at most m tokens a query.
        """
        picked = self.local_selector.select(self.local_query(query, rank), shard.keys, shard.state, attention)
        return replace(picked, space="local")

    def own_set(
        self, query: IndexQuery, shard: Shard, ranks: Collectives, attention: AttentionInputs | None = None
    ) -> Selection:
        """What the rank keeps of its own tokens: nothing is exchanged."""
        return self.own_set_of(self.local_query(query, ranks.rank), shard, ranks, attention)

    def own_set_of(
        self, local: IndexQuery, shard: Shard, ranks: Collectives, attention: AttentionInputs | None = None
    ) -> Selection:
        """``own_set`` of queries as the rank sees them (``local_query``), which layers of one step have in common."""
        return replace(self.local_selector.select_indices(local, shard.keys, shard.state, attention), space="local")

    def local_step(
        self, query: IndexQuery, shard: Shard, rank: int, attention: AttentionInputs | None = None
    ) -> tuple[PartialAttention, Selection]:
        """``local_select``, then attention over it: all that a rank does before the merge."""
        picked = self.local_select(query, shard, rank, attention)
        return shard.attend_to(picked), picked

    def local_sets(self, query: IndexQuery, shards: Sequence[Shard], attention: AttentionInputs | None = None) -> list[Selection]:
        """Every rank's local selection, in one process; ``attention`` holds all keys."""
        return [
            self.local_select(query, shard, rank, local_attention(attention, self.placement, rank)) for rank, shard in enumerate(shards)
        ]

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """The logical union of what all ranks keep, R * m columns; see ``simulate.select_over_ranks``."""
        return select_over_ranks(self, query, keys, state, attention)
