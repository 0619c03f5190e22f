"""The one thing every selector is: a frozen value with a `select` method."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from thresher.errors import require
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class Selector(ABC):
    """Chooses which tokens each query attends to. Subclasses are frozen dataclasses; whatever a method must remember lives in the state.

    A subclass has a ``topk`` (a field, or a property that is None when the number of kept tokens has no bound of its own).
    """

    if TYPE_CHECKING:

        @property
        def topk(self) -> int | None: ...

    @abstractmethod
    def select(
        self,
        query: IndexQuery,
        keys: IndexKeys,
        state: LayerState | None = None,
        attention: AttentionInputs | None = None,
    ) -> Selection:
        """The tokens of ``keys`` that each query attends to.

        Args:
            query: Q index queries, of any mix of requests.
            keys: the index keys held for every request; query i sees ``min(positions[i] + 1, lengths[requests[i]])`` of them.
            state: what is kept between steps and layers (block means, earlier layers' selections); None recomputes it, with the same bits.
            attention: the attention's own inputs, for selectors that look at true attention mass.

        Returns:
            A logical ``Selection``: ascending, no duplicates, -1 padded, each row a function of its own query and request alone.
        """

    def select_indices(
        self,
        query: IndexQuery,
        keys: IndexKeys,
        state: LayerState | None = None,
        attention: AttentionInputs | None = None,
    ) -> Selection:
        """``select`` for a caller that reads no scores: the same, but ``scores`` may be None. Selectors override it to save their cost."""
        return self.select(query, keys, state, attention)

    def shard(self, ranks: int, topk: int) -> Self:
        """The same selector for one of ``ranks`` shards, keeping ``topk`` tokens there."""
        require_int("ranks", ranks, 1)
        changes: dict[str, Any] = {"topk": topk}  # not every subclass has the field; one without it overrides shard
        return dataclasses.replace(self, **changes)

    def index_flops(self, length: int, heads: int, head_dim: int) -> float:
        """Floating-point operations (two per multiply-add) of the indexer for one query over ``length`` keys. 0 where nothing is scored."""
        return 0.0

    def index_bytes(self, length: int, heads: int, head_dim: int) -> float:
        """Bytes of keys and block means the indexer reads for one query over ``length`` keys, ``head_dim + 4`` each."""
        return 0.0


def require_int(name: str, value: object, minimum: int) -> None:
    """Raise a ``ThresherError`` unless ``value`` is an int of at least ``minimum``."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    require(ok, f"{name} must be an int of at least {minimum}", repr(value), f"pass {name}={minimum} or more")


def require_active_heads(active: int, heads: int) -> None:
    """Raise a ``ThresherError`` when more heads are asked for than the query has."""
    require(active <= heads, f"active_heads must be at most the query's {heads} heads", active, f"pass active_heads={heads} or fewer")
