"""Score and select in one: the keys of largest score, the scores never held.

```python
scores = paged_index_score(query, keys)
selection = select_topk(scores, topk)
```

"auto" takes kernels that do both at once where they can run and are faster, and the two steps, each by its own row of the table, elsewhere.
A query that sees at most topk tokens selects them all. The kernel for a step of decoding scores none of them, unless scores are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from thresher.cache.scratch import Scratch
from thresher.checks import check_count, check_kind
from thresher.ops.arguments import check_paged
from thresher.ops.dispatch import AUTO, choose, one_or_steps
from thresher.ops.score_select.reference import score_select_reference
from thresher.types import IndexKeys, IndexQuery, Selection


def score_select(
    query: IndexQuery, keys: IndexKeys, topk: int, *, with_scores: bool = True, impl: str = AUTO, scratch: Scratch | None = None
) -> Selection:
    """The topk visible keys of largest score for each query: ``paged_index_score`` and ``select_topk``, bit for bit. No gradient.

    Args:
        query: the queries of any mix of requests.
        keys: the paged index keys; query i sees those at ``0..positions[i]`` of its request, as far as they are held.
        topk: how many to keep, at least 1.
        with_scores: whether scores are returned beside.
        impl: "auto", "triton", "cuda" or "reference". "triton" are the kernels that do both at once in prefill, "cuda" is the one for a
            step of decoding on Hopper; each raises where it cannot run. "reference" is the two steps' reference. "auto" is "cuda" or
            "triton" where that can run and its ``worthwhile`` says so, and else the two steps with "auto" each, which hold a matrix of
            scores.
        scratch: for "cuda", which then has nothing to clear before it begins, and does its errand if it has one; None gives it memory of
            its own.

    Returns:
        A logical Selection with indices int32 ``[Q, topk]`` ascending and -1 padded, lengths, and scores (-inf where padded) or None.

    Raises:
        ThresherError: what ``paged_index_score`` refuses, topk below 1, with_scores that is no bool, scratch that is
            none, or an impl that cannot run.

    Source: DeepSeek-V3.2-Exp (arXiv 2512.02556), equations 1 and 2.
    """
    device = check_paged(query, keys)
    check_count("topk", topk, 1, do="ask for at least one token")
    check_kind("with_scores", with_scores, bool, "pass True or False")
    if scratch is not None:
        check_kind("scratch", scratch, Scratch, "pass a Scratch, or None")
    if impl == AUTO:
        kernel = one_pass(query, keys, topk, with_scores)
    else:
        kernel = choose("score_select", impl, device, lambda module: module.unsupported(query, keys, topk))
    if kernel is None:
        return score_select_reference(query, keys, topk, with_scores, impl)
    return kernel(query, keys, topk, with_scores, scratch)


def one_pass(query: IndexQuery, keys: IndexKeys, topk: int, with_scores: bool = True) -> Callable[..., Selection] | None:
    """The kernels that "auto" takes for these arguments, which hold no matrix of scores; None where it takes the two steps."""
    sizes = query.num_heads, query.num_queries, keys.num_requests, keys.room, with_scores or keys.room > topk

    def unsupported(module: ModuleType) -> str | None:
        why: str | None = module.unsupported(query, keys, topk)
        return why

    return one_or_steps("score_select", query.q.device, unsupported, lambda module: module.worthwhile(*sizes))
