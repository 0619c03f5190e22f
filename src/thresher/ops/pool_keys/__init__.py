"""Block means of index keys, in the key cache's own FP8 format.

```python
blocks = (values.float() * scales[:, None])[: N // B * B].view(N // B, B, D)
total = torch.zeros(N // B, D)
for offset in range(B):
    total = total + blocks[:, offset]  # fp32, in position order
means = quantize_fp8(total / B)
```
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.block_means import MEANS_PAGE
from thresher.checks import E4M3, FP32, INT32, INT64, check_count, check_kind, check_tensor
from thresher.errors import require
from thresher.ops.arguments import check_means, check_values
from thresher.ops.dispatch import checks_values, choose, device_of
from thresher.ops.pool_keys.reference import (
    grow_means_reference,
    partial_means_reference,
    pool_blocks_reference,
    pool_reference,
)
from thresher.types import IndexKeys


def pool_keys(values: Tensor, scales: Tensor, block_size: int, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Means of the full blocks; the tokens after the last full block are left out.

    Args:
        values: float8_e4m3fn ``[N, D]``, the keys of one request in position order.
        scales: fp32 ``[N]``.
        block_size: tokens a block, at least 1.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        e4m3 ``[N // block_size, D]`` and fp32 ``[N // block_size]``. A block has the same bits whatever stands around it.

    Raises:
        ThresherError: a shape, dtype or device that does not fit, keys that hold NaN (which a cache refuses, and only the reference
            looks for), or an impl that cannot run.

    Source: MISA (arXiv 2605.07363) and HISA (arXiv 2603.28458), block representatives.
    """
    device = _check(values, scales, block_size)
    kernel = choose("pool_keys", impl, device, lambda module: module.unsupported(values.shape[1]))
    return pool_reference(values, scales, block_size) if kernel is None else kernel(values, scales, block_size)


def pool_blocks(keys: IndexKeys, block_size: int, impl: str = "auto") -> IndexKeys:
    """``pool_keys`` of all full blocks of every request, packed anew; no length is read on the host, so a CUDA graph can hold it.

    Args:
        keys: the paged index keys.
        block_size: tokens a block, at least 1.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        keys whose positions are block numbers, in pages of 64: room for as many blocks as the page table has room for, zeros past the
        full ones, which ``lengths`` counts.

    Raises:
        ThresherError: keys that are none or strided, or an impl that cannot run.

    Source: MISA (arXiv 2605.07363) and HISA (arXiv 2603.28458), block representatives.
    """
    device = _check_pages(keys, block_size)
    kernel = choose("pool_blocks", impl, device, lambda module: module.unsupported(keys.head_dim))
    means: IndexKeys = pool_blocks_reference(keys, block_size) if kernel is None else kernel(keys, block_size)
    return means


def grow_means(keys: IndexKeys, means: IndexKeys, pooled: Tensor, tickets: Tensor, block_size: int, impl: str = "auto") -> None:
    """Pool the blocks that became full since the last call into a cache of means; no length is read on the host by a kernel.

    Block b of request r is written when ``pooled[r] // B <= b < keys.lengths[r] // B``. A cut is told by a smaller ``pooled[r]``: what lies
    past it is pooled again once it is full again. A mean depends on its block's keys alone, so it has the bits of ``pool_blocks``.

    Args:
        keys: the paged index keys; a length counts as within 0..the page table's room.
        means: where to, as ``pool_blocks`` returns them; ``lengths`` becomes the number of full blocks.
        pooled: int64 ``[B]``, contiguous, tokens looked at before; becomes the length where the number of full blocks is another.
        tickets: int32 ``[B]``, contiguous, zeros before and after, for a kernel.
        block_size: tokens a block, at least 1.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Raises:
        ThresherError: as for ``pool_blocks``, means, pooled or tickets of other sizes, types or devices, a request with fewer full blocks
            than means (where values are checked), or an impl that cannot run.

    Source: MISA (arXiv 2605.07363) and HISA (arXiv 2603.28458), block representatives.
    """
    device = _check_pages(keys, block_size)
    check_means(means, keys)
    whole = means.page_size == MEANS_PAGE and means.lengths.is_contiguous()
    must = f"means must be in pages of {MEANS_PAGE}, with contiguous lengths"
    require(whole, must, f"pages of {means.page_size}", "pass what pool_blocks returns")
    check_tensor("pooled", pooled, INT64, (keys.num_requests,), "pass one per request")
    check_tensor("tickets", tickets, INT32, (keys.num_requests,), "pass a zero per request")
    require(pooled.is_contiguous() and tickets.is_contiguous(), "pooled and tickets must be contiguous", "strides", "allocate them whole")
    device_of(keys=keys.pages, pooled=pooled, tickets=tickets)
    check_cuts(keys, means, block_size)
    kernel = choose("grow_means", impl, device, lambda module: module.unsupported(keys.head_dim))
    if kernel is None:
        grow_means_reference(keys, means, pooled, block_size)
    else:
        kernel(keys, means, pooled, tickets, block_size)


def check_cuts(keys: IndexKeys, means: IndexKeys, block_size: int) -> None:
    """Raise ``ThresherError``, where values are checked, if a request holds fewer full blocks than there are means of."""
    if not checks_values(keys.pages.device):
        return
    full = (keys.lengths // block_size).tolist()
    for request, done in enumerate(means.lengths.tolist()):
        must = f"request {request} must hold the {done} blocks already pooled"
        require(full[request] >= done, must, f"{full[request]} full ones", f"call rollback({request}, length) when the cache is cut")


def partial_means(values: Tensor, scales: Tensor, block_size: int, positions: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The mean of each query's own block as far as the query sees it: tokens ``[t // block_size * block_size, t]``.

    Args:
        values: float8_e4m3fn ``[N, D]``, the keys of one request in position order.
        scales: fp32 ``[N]``.
        block_size: tokens a block, at least 1.
        positions: ``[Q]`` int64, in -1..N - 1; -1 gives a zero mean.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        e4m3 ``[Q, D]`` and fp32 ``[Q]``; at the last position of a block the same bits as ``pool_keys``.

    Raises:
        ThresherError: as for ``pool_keys``, or a position outside -1..N - 1.
    """
    device = _check(values, scales, block_size)
    check_tensor("positions", positions, INT64, ("num_queries",), "pass one per query, as .long()")
    device_of(values=values, positions=positions)
    check_values(("positions", positions, -1, len(values) - 1, "append the keys first"))
    kernel = choose("partial_means", impl, device, lambda module: module.unsupported(values.shape[1]))
    if kernel is not None:
        means: tuple[Tensor, Tensor] = kernel(values, scales, block_size, positions)
        return means
    return partial_means_reference(values, scales, block_size, positions)


def _check_pages(keys: IndexKeys, block_size: int) -> torch.device:
    check_kind("keys", keys, IndexKeys, "take IndexKeyCache.view or pack_keys")
    device = device_of(pages=keys.pages, page_table=keys.page_table, lengths=keys.lengths)
    require(keys.pages.is_contiguous(), "pages must be contiguous", f"strides {keys.pages.stride()}", "pass IndexKeyCache.pages")
    check_values(("lengths", keys.lengths, 0, keys.room, "pass the tokens that page_table holds"))
    check_count("block_size", block_size, 1, do="pass tokens per block")
    return device


def _check(values: Tensor, scales: Tensor, block_size: int) -> torch.device:
    check_count("block_size", block_size, 1, do="pass tokens per block")
    check_tensor("values", values, E4M3, ("num_keys", "head_dim"), "use quantize_fp8")
    require(values.shape[1] >= 1, "values must have a head_dim of at least 1", tuple(values.shape), "use quantize_fp8")
    check_tensor("scales", scales, FP32, (len(values),), "pass one scale per key")
    return device_of(values=values, scales=scales)
