"""The first few tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from thresher.cache.index_keys import visible_counts
from thresher.errors import require
from thresher.selectors.base import Selector, require_int
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class Window(Selector):
    """A sliding window with attention sinks (StreamingLLM, arXiv 2309.17453).

    Attributes:
        topk: tokens kept, the sinks included.
        sinks: how many of them are the first tokens of the request; the others are the most recent.
    """

    topk: int
    sinks: int = 4

    def __post_init__(self) -> None:
        require_int("topk", self.topk, 1)
        require_int("sinks", self.sinks, 0)
        require(self.sinks <= self.topk, f"sinks must be at most topk={self.topk}", self.sinks, "lower sinks or raise topk")

    def shard(self, ranks: int, topk: int) -> Window:
        """A rank keeps its share of the sinks."""
        require_int("ranks", ranks, 1)
        return replace(self, topk=topk, sinks=min(-(-self.sinks // ranks), topk))

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``."""
        visible = visible_counts(query, keys)[:, None]
        column = torch.arange(self.topk, device=visible.device)
        recent = torch.where(column < self.sinks, column, column + (visible - self.topk).clamp(min=0))
        indices = torch.where(column < visible, recent, -1)
        return Selection(indices.int(), visible[:, 0].clamp(max=self.topk))
