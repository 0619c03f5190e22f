"""Score and select in one: the keys of largest score, the scores never held.

```python
scores = paged_index_score(query, keys)
selection = select_topk(scores, topk)
```
"""

from __future__ import annotations

from thresher.errors import require
from thresher.ops.arguments import check_paged
from thresher.ops.dispatch import choose
from thresher.ops.score_select.reference import score_select_reference
from thresher.types import IndexKeys, IndexQuery, Selection


def score_select(query: IndexQuery, keys: IndexKeys, topk: int, impl: str = "auto") -> Selection:
    """The topk visible keys of largest score: what ``select_topk`` makes of ``paged_index_score``, ties included, bit for bit.

    Args:
        query: the queries of any mix of requests.
        keys: the paged index keys.
        topk: how many to keep, at least 1.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        Selection with logical indices int32 ``[Q, topk]``, ascending and -1 padded, lengths, and scores beside.

    Raises:
        ThresherError: as for ``paged_index_score``, topk below 1, or an impl that cannot run.

    Source: DeepSeek-V3.2-Exp (arXiv 2512.02556), equations 1 and 2.
    """
    device = check_paged(query, keys)
    require(topk >= 1, "topk must be at least 1", topk, "ask for at least one token")
    kernel = choose("score_select", impl, device, lambda module: module.unsupported(query, keys, topk))
    return score_select_reference(query, keys, topk) if kernel is None else kernel(query, keys, topk)
