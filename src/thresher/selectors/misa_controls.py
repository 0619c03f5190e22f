"""Controls for MISA: the same few heads for every query, and heads drawn by chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from thresher.errors import require
from thresher.ops.route_heads import route_heads
from thresher.ops.route_heads.reference import keep_heads
from thresher.selectors.base import Selector, require_active_heads, require_int
from thresher.selectors.hashing import hash_counters, hash_scores
from thresher.selectors.scan import scan_topk
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection

if TYPE_CHECKING:
    from thresher.cache.state import LayerState


@dataclass(frozen=True)
class MISAStatic(Selector):
    """DSA with the same ``heads`` for every query: what routing adds over a fixed choice."""

    heads: tuple[int, ...]
    topk: int = 2048

    def __post_init__(self) -> None:
        require_int("topk", self.topk, 1)
        ok = isinstance(self.heads, tuple) and len(self.heads) > 0 and all(type(h) is int and h >= 0 for h in self.heads)
        require(ok, "heads must be a tuple of at least one head number", repr(self.heads), "pass heads=(0, 3, 7)")
        require(len(set(self.heads)) == len(self.heads), "heads must be distinct", self.heads, "name each head once")

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``. Raises ``ThresherError`` when a head is not among the query's."""
        largest = max(self.heads)
        require(largest < query.num_heads, f"heads must be below the query's {query.num_heads} heads", largest, "name existing heads")
        heads = torch.tensor(sorted(self.heads), device=query.positions.device)
        return scan_topk(keep_heads(query, heads.expand(query.num_queries, -1)), keys, self.topk)

    def index_flops(self, length: int, heads: int, head_dim: int) -> float:
        """``2 h D L``."""
        return 2.0 * len(self.heads) * head_dim * length

    def index_bytes(self, length: int, heads: int, head_dim: int) -> float:
        """``(D + 4) L``."""
        return float((head_dim + 4) * length)


@dataclass(frozen=True)
class MISARandom(Selector):
    """DSA with ``active_heads`` heads drawn for each query from a hash of (seed, layer, query position, head): chance routing.

    The layer is the state's, 0 without one.
    """

    active_heads: int = 8
    seed: int = 0
    topk: int = 2048

    def __post_init__(self) -> None:
        require_int("active_heads", self.active_heads, 1)
        require_int("seed", self.seed, 0)
        require_int("topk", self.topk, 1)

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """See ``Selector.select``. Raises ``ThresherError`` when the query has fewer heads than ``active_heads``."""
        require_active_heads(self.active_heads, query.num_heads)
        seed = torch.full_like(query.positions, self.seed)
        draw = hash_counters(seed, torch.full_like(seed, state.layer if state else 0), query.positions)[:, None]
        chance = hash_scores(hash_counters(torch.arange(query.num_heads, device=draw.device), draw))
        return scan_topk(keep_heads(query, route_heads(chance, self.active_heads)), keys, self.topk)

    def index_flops(self, length: int, heads: int, head_dim: int) -> float:
        """``2 h D L``."""
        return 2.0 * min(self.active_heads, heads) * head_dim * length

    def index_bytes(self, length: int, heads: int, head_dim: int) -> float:
        """``(D + 4) L``."""
        return float((head_dim + 4) * length)
