"""The plain way to use several devices: every rank holds every token, and attends for its share of the heads."""

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
class Replicated:
    """Every rank selects the same tokens of the whole context; a shard's ``attend`` takes the rank's heads alone.

    Attributes:
        selector: the selector of one device.
        ranks: R.

    Raises:
        ThresherError: ranks under 1.
    """

    selector: Selector
    ranks: int

    def __post_init__(self) -> None:
        _ = self.placement

    @property
    def placement(self) -> Placement:
        return Placement(self.ranks, kind="replicated")

    @property
    def topk(self) -> int | None:
        """The selector's own."""
        return self.selector.topk

    @property
    def width(self) -> int | None:
        """Columns of the selection; None where the selector has no bound of its own."""
        return self.topk

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """The selector's own selection."""
        return self.selector.select(query, keys, state, attention)

    def own_set(
        self, query: IndexQuery, shard: Shard, ranks: Collectives, attention: AttentionInputs | None = None
    ) -> Selection:
        """What every rank attends to: a local ``Selection``, whose positions are logical ones as well. Nothing is exchanged."""
        return replace(self.selector.select(query, shard.keys, shard.state, attention), space="local")

    def local_sets(self, query: IndexQuery, shards: Sequence[Shard], attention: AttentionInputs | None = None) -> list[Selection]:
        """Every rank's selection, in one process: all alike."""
        return [replace(self.selector.select(query, shard.keys, shard.state, attention), space="local") for shard in shards]
