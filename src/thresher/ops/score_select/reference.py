"""The two steps: every score, then the largest."""

from __future__ import annotations

from thresher.cache.index_keys import visible_counts
from thresher.ops.index_score import paged_index_score
from thresher.ops.select import select_visible
from thresher.types import IndexKeys, IndexQuery, Selection


def score_select_reference(query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool, impl: str) -> Selection:
    """The selection, both steps by ``impl``. Scores past what a row sees are neither written nor read."""
    scores = paged_index_score(query, keys, impl, filled=False)
    return select_visible(scores, topk, visible_counts(query, keys), impl, with_scores)
