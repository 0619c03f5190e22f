"""Index scores: how much each query wants each key.

```python
dots = torch.einsum("qhd,nd->qhn", q.double(), k.double()).float().relu()  # exact for e4m3 until rounded, once
score = torch.zeros(Q, N)
for h in range(H):
    score = score + weights[:, h, None] * dots[:, h]  # fp32: one multiply, one add, heads ascending
score = score * k_scales
column = torch.arange(N)
score = score.masked_fill((column < starts[:, None]) | (column >= ends[:, None]), -torch.inf)
```

One score: a (query, key) pair with e4m3 vectors has the same bits in the ragged, paged and gathered forms, alone or in any batch.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from thresher.errors import require
from thresher.ops.dispatch import can_read, choose, device_of
from thresher.ops.index_score.paged import gathered_scores, paged_scores
from thresher.ops.index_score.reference import ragged_scores
from thresher.types import IndexKeys, IndexQuery


def index_score(q: Tensor, weights: Tensor, k: Tensor, k_scales: Tensor, starts: Tensor, ends: Tensor, impl: str = "auto") -> Tensor:
    """Scores of contiguous keys, each query over its own range. No gradient.

    Args:
        q: ``[Q, H, D]`` float8_e4m3fn, or any float type (unquantised: then dots are near-exact and the bits may depend on the shape).
        weights: ``[Q, H]`` fp32 with every factor folded in.
        k: ``[N, D]`` float8_e4m3fn or any float type.
        k_scales: ``[N]`` fp32, multiplied last; ones for unquantised keys.
        starts: ``[Q]`` int64, first key of each query, at least 0.
        ends: ``[Q]`` int64, one past the last key, at most N. An empty range scores nothing.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        fp32 ``[Q, N]``, -inf outside ``[start, end)``. A sum of zeros is +0.0.

    Raises:
        ThresherError: a shape, dtype, device or range that does not fit, or an impl that cannot run.

    Source: DeepSeek-V3.2-Exp (arXiv 2512.02556), equation 1.
    """
    require(
        q.dim() == 3 and q.is_floating_point(),
        "q must be a float tensor [num_queries, heads, head_dim]",
        f"{q.dtype} {tuple(q.shape)}",
        "reshape it",
    )
    num, heads, dim = q.shape
    require(
        k.dim() == 2 and k.is_floating_point() and k.shape[1] == dim,
        f"k must be a float tensor [num_keys, {dim}]",
        f"{k.dtype} {tuple(k.shape)}",
        "use one head dim",
    )
    num_keys = k.shape[0]
    for name, tensor, shape in (("weights", weights, (num, heads)), ("k_scales", k_scales, (num_keys,))):
        ok = tensor.dtype == torch.float32 and tensor.shape == shape
        require(ok, f"{name} must be float32 {list(shape)}", f"{tensor.dtype} {tuple(tensor.shape)}", "convert it")
    for name, tensor in (("starts", starts), ("ends", ends)):
        ok = tensor.dtype == torch.int64 and tensor.shape == (num,)
        require(ok, f"{name} must be int64 [{num}]", f"{tensor.dtype} {tuple(tensor.shape)}", "convert it")
    device = device_of(q=q, weights=weights, k=k, k_scales=k_scales, starts=starts, ends=ends)
    if num and can_read(device):
        low, high = int(starts.min()), int(ends.max())
        require(low >= 0, "starts must be at least 0", low, "clamp them")
        require(high <= num_keys, f"ends must be at most the number of keys, {num_keys}", high, "clamp them")
    kernel = choose("index_score", impl, device, lambda module: module.unsupported(q.dtype, k.dtype, heads, dim, num_keys))
    if kernel is not None:
        return kernel(q, weights, k, k_scales, starts, ends)
    return ragged_scores(q, weights, k, k_scales, starts.tolist(), ends.tolist())


def paged_index_score(query: IndexQuery, keys: IndexKeys, impl: str = "auto") -> Tensor:
    """Scores over a paged cache: query i sees the keys at ``0..positions[i]`` of its request, as far as those are held. No gradient.

    Args:
        query: the queries of any mix of requests.
        keys: the paged index keys.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        fp32 ``[Q, max(keys.lengths)]``, -inf past ``min(position + 1, length)``. While a CUDA graph is recorded, as wide as the page
        table has room for.

    Raises:
        ThresherError: head dims or devices differ, a query names a request that is not there, or an impl that cannot run.
    """
    device = _check(query, keys)
    kernel = choose("paged_index_score", impl, device, lambda module: _unsupported(module, query, _room(keys)))
    if kernel is None:
        return paged_scores(query, keys)
    return kernel(query, keys) if can_read(device) else kernel(query, keys, width=_room(keys))


def gathered_index_score(query: IndexQuery, keys: IndexKeys, positions: Tensor, impl: str = "auto") -> Tensor:
    """Scores of chosen keys only, e.g. the candidates of a first stage. No gradient.

    Args:
        query: the queries of any mix of requests.
        keys: the paged index keys.
        positions: ``[Q, C]`` int32 or int64 positions in each query's request, -1 padded.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        fp32 ``[Q, C]``, bit-equal to the paged form at the same positions; -inf where a position is -1 or out of the query's sight.

    Raises:
        ThresherError: as for ``paged_index_score``, or positions of another shape or dtype.
    """
    device = _check(query, keys)
    ok = positions.dim() == 2 and positions.shape[0] == query.num_queries and positions.dtype in (torch.int32, torch.int64)
    require(ok, f"positions must be int32 or int64 [{query.num_queries}, C]", f"{positions.dtype} {tuple(positions.shape)}", "convert it")
    device_of(query=query.q, positions=positions)
    kernel = choose("gathered_index_score", impl, device, lambda module: _unsupported(module, query, positions.shape[1]))
    return gathered_scores(query, keys, positions) if kernel is None else kernel(query, keys, positions)


def _room(keys: IndexKeys) -> int:
    return keys.page_table.shape[1] * keys.page_size


def _unsupported(module: ModuleType, query: IndexQuery, width: int) -> str | None:
    why: str | None = module.unsupported(query.q.dtype, torch.float8_e4m3fn, query.num_heads, query.q.shape[2], width)
    return why


def _check(query: IndexQuery, keys: IndexKeys) -> torch.device:
    dim = query.q.shape[2]
    require(dim == keys.head_dim, f"queries and keys must share the head dim {keys.head_dim}", dim, "use the indexer that filled the cache")
    device = device_of(
        query=query.q,
        weights=query.weights,
        positions=query.positions,
        requests=query.requests,
        pages=keys.pages,
        page_table=keys.page_table,
        lengths=keys.lengths,
    )
    if query.num_queries and can_read(device):
        low, high = int(query.requests.min()), int(query.requests.max())
        require(
            low >= 0 and high < keys.num_requests,
            f"requests must be in 0..{keys.num_requests - 1}",
            f"{low}..{high}",
            "name a row of page_table",
        )
    return device
