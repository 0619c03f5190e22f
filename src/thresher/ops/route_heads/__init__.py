"""MISA's routing: which indexer heads carry a query.

```python
dots = torch.einsum("qhd,md->qhm", q, kbar).relu()  # kbar: the means of the M blocks the query sees
mass = (weights[:, :, None] * dots).abs().mean(-1)  # each dot rounded as in index_score, blocks summed ascending in fp64
ranked = mass.sort(dim=1, descending=True, stable=True).indices  # ties to the smaller head
heads = ranked[:, :active_heads].sort(dim=1).values
```
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.errors import require
from thresher.ops.dispatch import can_read, choose, device_of
from thresher.ops.route_heads.reference import head_mass_reference, route_reference
from thresher.types import IndexKeys, IndexQuery


def head_mass(query: IndexQuery, means: Sequence[tuple[Tensor, Tensor]], keys: IndexKeys, block_size: int, impl: str = "auto") -> Tensor:
    """``E[t, j] = 1/M sum_b |w[t,j] relu(q[t,j] . kbar[b])|`` over the M blocks that query t sees. Causal.

    The blocks wholly at or before the query count as they are; its own block, where the query stands inside it, counts once by the mean of
    its tokens up to the query. What comes later changes no bit.

    Args:
        query: the queries of any mix of requests.
        means: per request, e4m3 ``[nb, D]`` and fp32 ``[nb]``: the full blocks, as from ``pool_keys``. Blocks past a query are ignored.
        keys: the paged index keys (for the query's own block).
        block_size: tokens a block.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        fp32 ``[Q, H]``; 0 for a query that sees nothing.

    Raises:
        ThresherError: means missing for a request or too few for a query, shapes or devices that do not fit, or an impl that cannot run.

    Source: MISA (arXiv 2605.07363), the routing score.
    """
    require(block_size >= 1, "block_size must be at least 1", block_size, "pass tokens per block")
    num, dim = keys.num_requests, keys.head_dim
    require(len(means) == num, f"means must hold one pair per request, {num}", len(means), "pool every request")
    require(
        query.q.shape[2] == dim,
        f"queries and keys must share the head dim {dim}",
        query.q.shape[2],
        "use the indexer that filled the cache",
    )
    device = device_of(
        query=query.q,
        weights=query.weights,
        positions=query.positions,
        requests=query.requests,
        pages=keys.pages,
        page_table=keys.page_table,
        lengths=keys.lengths,
    )
    for values, scales in means:
        device_of(query=query.q, values=values, scales=scales)
    if query.num_queries and can_read(device):
        low, high = int(query.requests.min()), int(query.requests.max())
        require(low >= 0 and high < num, f"requests must be in 0..{num - 1}", f"{low}..{high}", "name a row of page_table")
    kernel = choose("head_mass", impl, device, lambda module: module.unsupported(query.q.dtype, query.num_heads, dim))
    if kernel is None:
        return head_mass_reference(query, means, keys, block_size)
    if can_read(device):
        needed = torch.minimum(query.positions + 1, keys.lengths[query.requests]) // block_size
        held = torch.tensor([len(values) for values, _ in means], device=device)[query.requests]
        require(bool((held >= needed).all()), "means must cover every full block a query sees", "too few", "pool the keys appended since")
    return kernel(query, means, keys, block_size)


def route_heads(mass: Tensor, active_heads: int, impl: str = "auto") -> Tensor:
    """The heads with the largest mass, ties to the smaller head; NaN ranks below every number.

    Args:
        mass: float ``[Q, H]``.
        active_heads: how many to keep, 1..H.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        int64 ``[Q, active_heads]``, ascending.

    Raises:
        ThresherError: active_heads outside 1..H, or an impl that cannot run.
    """
    require(
        mass.dim() == 2 and mass.is_floating_point(),
        "mass must be a float tensor [num_queries, heads]",
        f"{mass.dtype} {tuple(mass.shape)}",
        "reshape it",
    )
    heads = mass.shape[1]
    require(1 <= active_heads <= heads, f"active_heads must be in 1..{heads}", active_heads, "pick at most the heads there are")
    kernel = choose("route_heads", impl, mass.device, lambda _: None if heads <= 1024 else f"it takes at most 1024 heads, not {heads}")
    return route_reference(mass, active_heads) if kernel is None else kernel(mass, active_heads)
