"""One device: the placement that places nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from thresher.cache.placement import Placement
from thresher.cache.state import LayerState
from thresher.distributed.collectives import Collectives
from thresher.distributed.shards import Shard
from thresher.selectors.base import Selector
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection


@dataclass(frozen=True)
class Single:
    """Every token on one rank."""

    selector: Selector

    @property
    def ranks(self) -> int:
        return 1

    @property
    def placement(self) -> Placement:
        return Placement(1)

    @property
    def topk(self) -> int | None:
        """The selector's own."""
        return self.selector.topk

    @property
    def width(self) -> int | None:
        """Columns of the logical union; None where the selector has no bound of its own."""
        return self.topk

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """The selector's own selection."""
        return self.selector.select(query, keys, state, attention)

    def own_set(
        self, query: IndexQuery, shard: Shard, ranks: Collectives, attention: AttentionInputs | None = None
    ) -> Selection:
        """The selection of the one shard, called local."""
        return self.local_sets(query, [shard], attention)[0]

    def local_sets(self, query: IndexQuery, shards: Sequence[Shard], attention: AttentionInputs | None = None) -> list[Selection]:
        """The selection of the one shard, called local."""
        (shard,) = shards
        return [replace(self.selector.select(query, shard.keys, shard.state, attention), space="local")]
