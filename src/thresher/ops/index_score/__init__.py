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

One score: a (query, key) pair with e4m3 vectors has the same bits in the ragged, paged, gathered and block forms, alone or in any batch.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from thresher.checks import FLOAT, FP32, INDEX, INT32, INT64, check_count, check_kind, check_tensor
from thresher.ops.arguments import check_paged, check_values
from thresher.ops.dispatch import can_read, choose, device_of
from thresher.ops.index_score.paged import block_scores, gathered_scores, paged_scores
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
    check_tensor("q", q, FLOAT, ("num_queries", "heads", "head_dim"), "reshape it")
    num, heads, dim = q.shape
    check_tensor("k", k, FLOAT, ("num_keys", dim), "use one head dim")
    num_keys = k.shape[0]
    check_tensor("weights", weights, FP32, (num, heads), "pass one weight per query and head, as .float()")
    check_tensor("k_scales", k_scales, FP32, (num_keys,), "pass one scale per key, as .float()")
    check_tensor("starts", starts, INT64, (num,), "pass one per query, as .long()")
    check_tensor("ends", ends, INT64, (num,), "pass one per query, as .long()")
    device = device_of(q=q, weights=weights, k=k, k_scales=k_scales, starts=starts, ends=ends)
    check_values(("starts", starts, 0, None, "clamp them"), ("ends", ends, None, num_keys, "clamp them to the number of keys"))
    kernel = choose("index_score", impl, device, lambda module: module.unsupported(q.dtype, k.dtype, heads, dim, num_keys))
    if kernel is not None:
        return kernel(q, weights, k, k_scales, starts, ends)
    return ragged_scores(q, weights, k, k_scales, starts.tolist(), ends.tolist())


def paged_index_score(query: IndexQuery, keys: IndexKeys, impl: str = "auto", filled: bool = True, width: int | None = None) -> Tensor:
    """Scores over a paged cache: query i sees the keys at ``0..positions[i]`` of its request, as far as those are held. No gradient.

    Args:
        query: the queries of any mix of requests.
        keys: the paged index keys.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.
        filled: whether columns that a row does not see are -inf; otherwise they hold anything, which is less to write.
        width: columns to return, which should be no fewer than the longest length; what lies past them is not scored. None: the longest
            length, for which the host waits; while a CUDA graph is recorded, what the page table has room for.

    Returns:
        fp32 ``[Q, width]``, -inf past ``min(position + 1, length)`` where filled.

    Raises:
        ThresherError: something else than queries and keys, head dims or devices that differ, strided pages, a query that names a
            request that is not there, a length outside 0..the page table's room, filled that is no bool, width that is no whole number
            of at least 0, or an impl that cannot run.
    """
    device = check_paged(query, keys)
    check_kind("filled", filled, bool, "pass True or False")
    if width is None:
        width = None if can_read(device) else keys.room
    else:
        check_count("width", width, 0, do="pass the columns to return")
    columns = keys.room if width is None else width
    kernel = choose("paged_index_score", impl, device, lambda module: _unsupported(module, query, columns))
    return paged_scores(query, keys, width) if kernel is None else kernel(query, keys, width=width, filled=filled)


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
        ThresherError: as for ``paged_index_score``, or positions of another shape, dtype or device.
    """
    device = check_paged(query, keys)
    check_tensor("positions", positions, INDEX, (query.num_queries, "C"), "pass a row of positions per query")
    device_of(query=query.q, positions=positions)
    kernel = choose("gathered_index_score", impl, device, lambda module: _unsupported(module, query, positions.shape[1]))
    return gathered_scores(query, keys, positions) if kernel is None else kernel(query, keys, positions)


def block_index_score(query: IndexQuery, keys: IndexKeys, blocks: Tensor, block_size: int, impl: str = "auto") -> Tensor:
    """Scores of the keys of chosen blocks, block after block. No gradient.

    Args:
        query: the queries of any mix of requests.
        keys: the paged index keys.
        blocks: ``[Q, m]`` int32; block b of a query is the positions ``b * block_size .. (b + 1) * block_size - 1`` of its request.
        block_size: tokens in a block, at least 1; the kernel is fastest where it and the page size are multiples of 64.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        fp32 ``[Q, m * block_size]``: column c is position ``blocks[:, c // block_size] * block_size + c % block_size``, bit-equal to the
        paged form there; -inf where the block is negative or the position out of the query's sight.

    Raises:
        ThresherError: as for ``paged_index_score``, or blocks of another shape, dtype or device, or a block_size below 1.

    Source: HISA (arXiv 2603.28458), the second stage.
    """
    device = check_paged(query, keys)
    check_tensor("blocks", blocks, INT32, (query.num_queries, "m"), "pass a row of block numbers per query, as .int()")
    check_count("block_size", block_size, 1, do="pass tokens per block")
    device_of(query=query.q, blocks=blocks)
    kernel = choose("block_index_score", impl, device, lambda module: _unsupported(module, query, blocks.shape[1] * block_size))
    return block_scores(query, keys, blocks, block_size) if kernel is None else kernel(query, keys, blocks, block_size)


def _unsupported(module: ModuleType, query: IndexQuery, width: int) -> str | None:
    why: str | None = module.unsupported(query.q.dtype, torch.float8_e4m3fn, query.num_heads, query.q.shape[2], width)
    return why
