"""Tokens by chance: the floor any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from thresher.cache.index_keys import visible_counts
from thresher.ops.select import select_topk
from thresher.selectors.base import Selector, require_int
from thresher.selectors.hashing import hash_counters, hash_scores
from thresher.selectors.rows import in_chunks, longest
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class Random(Selector):
    """``topk`` visible tokens, uniform without replacement.

    Drawn from a hash of (seed, layer, query position, key position): the layer is the state's, 0 without one. The same draw whatever the
    batch, the split over calls or the device.
    """

    topk: int
    seed: int = 0

    def __post_init__(self) -> None:
        require_int("topk", self.topk, 1)
        require_int("seed", self.seed, 0)

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``."""
        width = longest(keys)
        column = torch.arange(width, device=query.positions.device)
        seed = torch.full_like(query.positions, self.seed)
        draw = hash_counters(seed, torch.full_like(seed, state.layer if state else 0), query.positions)[:, None]

        def select_rows(rows: IndexQuery, part: slice) -> Selection:
            scores = hash_scores(hash_counters(column, draw[part]))
            hidden = column >= visible_counts(rows, keys)[:, None]
            return select_topk(scores.masked_fill(hidden, float("-inf")), self.topk)

        return in_chunks(query, 4 * width, select_rows)
