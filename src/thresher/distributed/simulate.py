"""R ranks in one process: the same per-rank steps a process group runs, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from thresher.cache.placement import Placement
from thresher.cache.state import LayerState
from thresher.distributed.collectives import Collectives, stack_parts
from thresher.distributed.shards import Shard, split_keys, union
from thresher.errors import require
from thresher.ops.merge import merge
from thresher.selectors.base import Selector
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, PartialAttention, Selection


class OverRanks(Protocol):
    """What ``Single``, ``Replicated``, ``IDSA`` and ``ExactMerge`` have in common."""

    @property
    def selector(self) -> Selector: ...

    @property
    def placement(self) -> Placement: ...

    @property
    def width(self) -> int | None: ...

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """The logical union of what all ranks attend to, in one process, of keys that are not dealt out."""
        ...

    def local_sets(self, query: IndexQuery, shards: Sequence[Shard], attention: AttentionInputs | None = None) -> list[Selection]:
        """Every rank's local selection, in one process; ``attention`` holds all keys."""
        ...

    def own_set(
        self, query: IndexQuery, shard: Shard, ranks: Collectives, attention: AttentionInputs | None = None
    ) -> Selection:
        """One rank's, the same; ``attention`` holds its own keys. It may lack scores."""
        ...

    def own_set_of(
        self, local: IndexQuery, shard: Shard, ranks: Collectives, attention: AttentionInputs | None = None
    ) -> Selection:
        """``own_set`` of queries as the rank sees them."""
        ...


def run(
    over: OverRanks, query: IndexQuery, shards: Sequence[Shard], attention: AttentionInputs | None = None
) -> tuple[PartialAttention, Selection]:
    """Select and attend on every rank, then merge.

    Args:
        over: a ``Single``, ``Replicated``, ``IDSA`` or ``ExactMerge``.
        query: Q queries of logical positions.
        shards: one per rank, in rank order, each with ``attend``: over all heads, or over the rank's own where tokens are replicated.
        attention: the attention's inputs with all keys, for selectors that look at true mass.

    Returns:
        The merged attention, and the logical union of what the ranks attended to, ascending.

    Raises:
        ThresherError: not one shard per rank.
    """
    ranks = over.placement.ranks
    require(len(shards) == ranks, f"there must be one shard for each of the {ranks} ranks", len(shards), "pass them in rank order")
    sets = over.local_sets(query, shards, attention)
    parts = [shard.attend_to(picked) for shard, picked in zip(shards, sets, strict=True)]
    if over.placement.kind == "replicated":
        return stack_parts(parts), replace(sets[0], space="logical")
    return merge(parts), union(sets, over.placement, over.width)


def select_over_ranks(
    over: OverRanks,
    query: IndexQuery,
    keys: IndexKeys,
    state: LayerState | None = None,
    attention: AttentionInputs | None = None,
) -> Selection:
    """Deal the keys over the ranks, select on each, and give the logical union; for measuring.

    Every rank starts from a fresh state, so cached quantities are recomputed (the same bits). A selector without a bound of its own
    (dense, shared) picks the same tokens wherever they live and is called once, with ``state``.
    """
    if over.width is None:
        return over.selector.select(query, keys, state, attention)
    shards = [Shard(piece, None if state is None else LayerState(state.layer)) for piece in split_keys(keys, over.placement)]
    return union(over.local_sets(query, shards, attention), over.placement, over.width)
