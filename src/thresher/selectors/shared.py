"""Reuse of an earlier layer's selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from thresher.errors import require
from thresher.selectors.base import Selector, require_int
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class Shared(Selector):
    """The set that layer ``layer`` selected in this step (GLM-5.2's layers without an indexer of their own)."""

    layer: int

    def __post_init__(self) -> None:
        require_int("layer", self.layer, 0)

    @property
    def topk(self) -> int | None:
        return None

    def shard(self, ranks: int, topk: int) -> Self:
        """Itself: the set of layer ``layer`` on the same rank."""
        require_int("ranks", ranks, 1)
        return self

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``. Raises ``ThresherError`` when the state holds no selection of that layer for these queries."""
        found = None if state is None else state.selections.get(self.layer)
        must = f"Shared(layer={self.layer}) needs that layer's selection of this step in state.selections"
        got = "no state" if state is None else f"selections of layers {sorted(state.selections)}"
        require(found is not None, must, got, f"run layer {self.layer} first and store its selection")
        assert found is not None
        rows = found.indices.shape[0]
        must = f"the selection of layer {self.layer} must have {query.num_queries} rows, one per query"
        require(rows == query.num_queries, must, rows, "clear state.selections between steps")
        return found
