"""Block means by a sum that runs over the offset inside the block, all blocks at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from thresher.cache.block_means import MEANS_PAGE, empty_means, pages_of_means
from thresher.cache.index_keys import load_keys, store_keys
from thresher.ops.quantize import dequantize_fp8, quantize_fp8
from thresher.types import IndexKeys


@torch.no_grad()
def pool_reference(values: Tensor, scales: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """e4m3 ``[N // block_size, D]`` and fp32 ``[N // block_size]``."""
    num_blocks, dim = len(values) // block_size, values.shape[1]
    full = num_blocks * block_size
    keys = dequantize_fp8(values[:full], scales[:full]).view(num_blocks, block_size, dim)
    total = keys.new_zeros(num_blocks, dim)
    for key in keys.unbind(1):
        total.add_(key)
    return quantize_fp8(_over(total, torch.full((num_blocks,), block_size, device=values.device)))


@torch.no_grad()
def pool_blocks_reference(keys: IndexKeys, block_size: int) -> IndexKeys:
    """One request after the other into ``room_for_means``."""
    means = room_for_means(keys, block_size)
    for request, num in enumerate(means.lengths.tolist()):
        first = request * means.room
        slots = torch.arange(first, first + num, device=means.pages.device)
        store_keys(means.pages, slots, *pool_reference(*load_keys(keys, request), block_size))
    return means


@torch.no_grad()
def grow_means_reference(keys: IndexKeys, means: IndexKeys, pooled: Tensor, block_size: int) -> None:
    """One request after the other."""
    lengths = keys.lengths.clamp(0, keys.room)
    for request, (old, length) in enumerate(zip(pooled.tolist(), lengths.tolist(), strict=True)):
        first, full = max(old, 0) // block_size, min(length // block_size, means.room)
        if first < full:
            blocks = torch.arange(first, full, device=means.pages.device)
            slots = means.page_table[request, blocks // MEANS_PAGE] * MEANS_PAGE + blocks % MEANS_PAGE
            store_keys(means.pages, slots, *pool_reference(*load_keys(keys, request, first * block_size, full * block_size), block_size))
    pooled.copy_(torch.where(pooled // block_size == lengths // block_size, pooled, lengths))
    means.lengths.copy_(lengths // block_size)


def room_for_means(keys: IndexKeys, block_size: int) -> IndexKeys:
    """Pages of zeros, request after request, for the means of as many blocks as the page table of ``keys`` has room for."""
    means = empty_means(keys.num_requests, pages_of_means(keys, block_size), keys.head_dim, keys.pages.device)
    return replace(means, lengths=keys.lengths // block_size)


@torch.no_grad()
def partial_means_reference(values: Tensor, scales: Tensor, block_size: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 ``[Q, D]`` and fp32 ``[Q]``: running sums of every block that holds a query, read off at each query's offset."""
    blocks, which = (positions.clamp(min=0) // block_size).unique(return_inverse=True)
    counts = torch.where(positions < 0, 0, positions % block_size + 1)
    totals = torch.zeros(len(positions), values.shape[1], device=values.device)
    deepest = int(counts.max()) if len(positions) else 0
    if deepest:
        token = blocks[:, None] * block_size + torch.arange(deepest, device=values.device)
        token = token.clamp(max=len(values) - 1)  # past the end: summed, and read by no query
        keys = dequantize_fp8(values.view(torch.uint8)[token].view(values.dtype), scales[token])
        rows = keys.unbind(1)
        running = torch.zeros_like(rows[0])
        done = 0
        for count in counts.unique().tolist():
            for key in rows[done:count]:
                running.add_(key)
            done = count
            readers = (counts == count).nonzero()[:, 0]
            totals[readers] = running[which[readers]]
    return quantize_fp8(_over(totals, counts.clamp(min=1)))


def _over(total: Tensor, counts: Tensor) -> Tensor:
    # A tensor of counts, not a number: by a number some devices multiply with the reciprocal.
    return total / counts.float()[:, None]
