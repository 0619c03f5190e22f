"""The whole context where it is attended to: on one device, or on every rank, each of which then has its share of the heads."""

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
class _Whole:
    """Every rank that there is selects the same tokens of the whole context."""

    selector: Selector

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
        """The same, called local: its positions are logical ones as well. Nothing is exchanged."""
        return replace(self.selector.select_indices(query, shard.keys, shard.state, attention), space="local")

    own_set_of = own_set

    def local_sets(self, query: IndexQuery, shards: Sequence[Shard], attention: AttentionInputs | None = None) -> list[Selection]:
        """Every rank's set, in one process, with scores."""
        return [replace(self.selector.select(query, shard.keys, shard.state, attention), space="local") for shard in shards]


@dataclass(frozen=True)
class Single(_Whole):
    """Every token on one rank."""

    @property
    def ranks(self) -> int:
        return 1

    @property
    def placement(self) -> Placement:
        return Placement(1)


@dataclass(frozen=True)
class Replicated(_Whole):
    """Every token on every rank; a shard's ``attend`` takes the rank's heads alone.

    Attributes:
        selector: the selector of one device.
        ranks: R.

    Raises:
        ThresherError: ranks under 1.
    """

    ranks: int

    def __post_init__(self) -> None:
        _ = self.placement

    @property
    def placement(self) -> Placement:
        return Placement(self.ranks, kind="replicated")
