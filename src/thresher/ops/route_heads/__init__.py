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

from torch import Tensor

from thresher.errors import require
from thresher.ops.route_heads.reference import head_mass_reference, route_reference
from thresher.types import IndexKeys, IndexQuery


def head_mass(query: IndexQuery, means: Sequence[tuple[Tensor, Tensor]], keys: IndexKeys, block_size: int) -> Tensor:
    """``E[t, j] = 1/M sum_b |w[t,j] relu(q[t,j] . kbar[b])|`` over the M blocks that query t sees. Causal.

    The blocks wholly at or before the query count as they are; its own block, where the query stands inside it, counts once by the mean of
    its tokens up to the query. What comes later changes no bit.

    Args:
        query: the queries of any mix of requests.
        means: per request, e4m3 ``[nb, D]`` and fp32 ``[nb]``: the full blocks, as from ``pool_keys``. Blocks past a query are ignored.
        keys: the paged index keys (for the query's own block).
        block_size: tokens a block.

    Returns:
        fp32 ``[Q, H]``; 0 for a query that sees nothing.

    Raises:
        ThresherError: means missing for a request or too few for a query, or shapes that do not fit.

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
    if query.num_queries:
        low, high = int(query.requests.min()), int(query.requests.max())
        require(low >= 0 and high < num, f"requests must be in 0..{num - 1}", f"{low}..{high}", "name a row of page_table")
    return head_mass_reference(query, means, keys, block_size)


def route_heads(mass: Tensor, active_heads: int) -> Tensor:
    """The heads with the largest mass, ties to the smaller head; NaN ranks below every number.

    Args:
        mass: float ``[Q, H]``.
        active_heads: how many to keep, 1..H.

    Returns:
        int64 ``[Q, active_heads]``, ascending.

    Raises:
        ThresherError: active_heads outside 1..H.
    """
    require(
        mass.dim() == 2 and mass.is_floating_point(),
        "mass must be a float tensor [num_queries, heads]",
        f"{mass.dtype} {tuple(mass.shape)}",
        "reshape it",
    )
    heads = mass.shape[1]
    require(1 <= active_heads <= heads, f"active_heads must be in 1..{heads}", active_heads, "pick at most the heads there are")
    return route_reference(mass, active_heads)
