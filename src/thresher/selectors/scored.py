"""Selectors that rank tokens by scores, which they need not return."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thresher.selectors.base import Selector
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class ScoredSelector(Selector):
    """A selector whose one method is ``_select``; it looks at index queries and keys alone."""

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``."""
        return self._select(query, keys, state, with_scores=True)

    def select_indices(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select_indices``: without scores."""
        return self._select(query, keys, state, with_scores=False)

    @abstractmethod
    def _select(self, query: IndexQuery, keys: IndexKeys, state: LayerState | None, with_scores: bool) -> Selection:
        """The selection, with its scores or with None for them."""
