"""Every visible token: the comparison that selects nothing away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from thresher.cache.index_keys import visible_counts
from thresher.selectors.base import Selector, require_int
from thresher.selectors.rows import in_chunks
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class Dense(Selector):
    """All visible tokens; rows are as wide as the longest of them."""

    @property
    def topk(self) -> int | None:
        return None

    def shard(self, ranks: int, topk: int) -> Self:
        """Itself: every rank attends to all it holds, whatever ``topk``."""
        require_int("ranks", ranks, 1)
        return self

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``."""
        visible = visible_counts(query, keys)
        width = int(visible.max()) if query.num_queries else 0
        column = torch.arange(width, dtype=torch.int32, device=visible.device)

        def select_rows(rows: IndexQuery, part: slice) -> Selection:
            count = visible[part]
            return Selection(torch.where(column < count[:, None], column, -1), count)

        return in_chunks(query, width, select_rows)
