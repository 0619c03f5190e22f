"""MISA's routing: which indexer heads carry a query.

```python
dots = torch.einsum("qhd,md->qhm", q, kbar).relu()  # kbar: the means of the M blocks the query sees
mass = (weights[:, :, None] * dots).abs().mean(-1)  # each dot rounded as in index_score, blocks summed ascending in fp64
ranked = mass.sort(dim=1, descending=True, stable=True).indices  # ties to the smaller head
heads = ranked[:, :active_heads].sort(dim=1).values
```
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.checks import E4M3, FP32, WIDE, check_count, check_list, check_tensor
from thresher.errors import require
from thresher.ops.arguments import check_means, check_paged
from thresher.ops.dispatch import checks_values, choose, device_of
from thresher.ops.route_heads.reference import Means, head_mass_reference, route_reference, routed_query_reference
from thresher.types import IndexKeys, IndexQuery


def head_mass(query: IndexQuery, means: Means, keys: IndexKeys, block_size: int, impl: str = "auto") -> Tensor:
    """``E[t, j] = 1/M sum_b |w[t,j] relu(q[t,j] . kbar[b])|`` over the M blocks that query t sees. Causal.

    The blocks wholly at or before the query count as they are; its own block, where the query stands inside it, counts once by the mean of
    its tokens up to the query. What comes later changes no bit.

    Args:
        query: the queries of any mix of requests.
        means: per request, e4m3 ``[nb, D]`` and fp32 ``[nb]``: the full blocks, as from ``pool_keys``; or all of them in pages, as from
            ``pool_blocks``. Blocks past a query are ignored.
        keys: the paged index keys (for the query's own block).
        block_size: tokens a block.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        fp32 ``[Q, H]``; 0 for a query that sees nothing.

    Raises:
        ThresherError: what ``paged_index_score`` refuses, means missing for a request or too few for a query, shapes, dtypes or devices
            that do not fit, or an impl that cannot run.

    Source: MISA (arXiv 2605.07363), the routing score.
    """
    device = check_paged(query, keys)
    check_count("block_size", block_size, 1, do="pass tokens per block")
    _check_means(query, means, keys, block_size)
    dim = keys.head_dim
    kernel = choose("head_mass", impl, device, lambda module: module.unsupported(query.q.dtype, query.num_heads, dim))
    return head_mass_reference(query, means, keys, block_size) if kernel is None else kernel(query, means, keys, block_size)


def route_heads(mass: Tensor, active_heads: int, impl: str = "auto") -> Tensor:
    """The heads with the largest mass, ties to the smaller head; NaN ranks below every number.

    Args:
        mass: fp32 ``[Q, H]``, or bf16, fp16 or fp64.
        active_heads: how many to keep, 1..H.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        int64 ``[Q, active_heads]``, ascending.

    Raises:
        ThresherError: a shape or dtype that does not fit, active_heads outside 1..H, or an impl that cannot run.
    """
    check_tensor("mass", mass, WIDE, ("num_queries", "heads"), "convert it")
    heads = mass.shape[1]
    check_count("active_heads", active_heads, 1, heads, "pick at most the heads there are")
    kernel = choose("route_heads", impl, mass.device, lambda _: None if heads <= 1024 else f"it takes at most 1024 heads, not {heads}")
    return route_reference(mass, active_heads) if kernel is None else kernel(mass, active_heads)


def routed_query(
    query: IndexQuery, means: Means, keys: IndexKeys, block_size: int, active_heads: int, impl: str = "auto"
) -> IndexQuery:
    """The query with each row's ``active_heads`` heads of largest ``head_mass``: those that ``route_heads`` picks, ascending.

    Args:
        query, means, keys, block_size: as for ``head_mass``.
        active_heads: how many to keep, 1..H.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        An IndexQuery with q ``[Q, active_heads, D]`` of the query's dtype and weights fp32 ``[Q, active_heads]``; positions and requests
        are the query's own.

    Raises:
        ThresherError: what ``head_mass`` refuses, active_heads outside 1..H, or an impl that cannot run.

    Source: MISA (arXiv 2605.07363).
    """
    device = check_paged(query, keys)
    check_count("block_size", block_size, 1, do="pass tokens per block")
    check_count("active_heads", active_heads, 1, query.num_heads, "pick at most the heads there are")
    _check_means(query, means, keys, block_size)
    kernel = choose("routed_query", impl, device, lambda module: module.unsupported(query.q.dtype, query.num_heads, keys.head_dim))
    if kernel is None:
        return routed_query_reference(query, means, keys, block_size, active_heads)
    routed: IndexQuery = kernel(query, means, keys, block_size, active_heads)
    return routed


def _check_means(query: IndexQuery, means: Means, keys: IndexKeys, block_size: int) -> None:
    if isinstance(means, IndexKeys):
        _check_mean_pages(query, means, keys, block_size)
        return
    check_list("means", means, "(values, scales) pairs", "pool every request")
    require(len(means) == keys.num_requests, f"means must hold one pair per request, {keys.num_requests}", len(means), "pool every request")
    tensors = {"query": query.q}
    for i, pair in enumerate(means):
        check_list(f"means[{i}]", pair, "values and scales", "pass what pool_keys returns")
        require(len(pair) == 2, f"means[{i}] must be a pair of values and scales", f"{len(pair)} of them", "pass what pool_keys returns")
        check_tensor(f"means[{i}] values", pair[0], E4M3, ("blocks", keys.head_dim), "pass what pool_keys returns")
        check_tensor(f"means[{i}] scales", pair[1], FP32, (len(pair[0]),), "pass one scale per block")
        tensors |= {f"means[{i}] values": pair[0], f"means[{i}] scales": pair[1]}
    device = device_of(**tensors)
    if not query.num_queries or not checks_values(device):
        return
    _check_counts(query, torch.tensor([len(values) for values, _ in means], device=device), keys, block_size)


def _check_mean_pages(query: IndexQuery, means: IndexKeys, keys: IndexKeys, block_size: int) -> None:
    check_means(means, keys)
    if query.num_queries and checks_values(query.q.device):
        _check_counts(query, means.lengths, keys, block_size)


def _check_counts(query: IndexQuery, counts: Tensor, keys: IndexKeys, block_size: int) -> None:
    needed = torch.minimum(query.positions + 1, keys.lengths[query.requests]) // block_size
    held = counts[query.requests]
    if bool((held < needed).any()):
        worst = int((needed - held).argmax())
        must = f"means of request {int(query.requests[worst])} must cover its {int(needed[worst])} full blocks"
        require(False, must, int(held[worst]), "pool the keys appended since")
