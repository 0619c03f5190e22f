"""Score, then select: all scores are held in between."""

from __future__ import annotations

from thresher.ops.index_score import paged_index_score
from thresher.ops.select import select_topk
from thresher.types import IndexKeys, IndexQuery, Selection


def score_select_reference(query: IndexQuery, keys: IndexKeys, topk: int) -> Selection:
    """The selection; see ``score_select``. Both steps run as ``impl="auto"`` has them."""
    return select_topk(paged_index_score(query, keys), topk)
