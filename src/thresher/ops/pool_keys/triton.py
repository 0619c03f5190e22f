"""Block means on a GPU: one program walks one block in position order, so the bits are those of the reference.

The walk is a chain of dependent fp32 additions, D of them side by side, a thread each: that leaves registers for the loads of two runs of
``UNROLL`` keys, and what a walk waits for is loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.cache.device import INTERPRET, Rows, as_mask, flat_rows, keys_under_way, mean_of, on_device, ordered_sum, paged_rows, warps_of
from thresher.errors import require
from thresher.ops.pool_keys.reference import room_for_means
from thresher.ops.pool_keys.walks import Kept, can_walk, pool
from thresher.types import IndexKeys

MAX_DIM = 1024
PROGRAMS = 264  # that bring means up to date, mostly with nothing to do: two for each multiprocessor


@triton.jit(do_not_specialize=["table_width", "num_pages", "out_width", "out_pages"])
def _pool_kernel(
    values_ptr,
    scales_ptr,
    table_ptr,
    old_ptr,
    new_ptr,
    out_values_ptr,
    out_scales_ptr,
    out_table_ptr,
    counts_ptr,
    tickets_ptr,
    table_width,
    num_pages,
    out_width,
    out_pages,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    OUT_PAGE_SIZE: tl.constexpr,
    OUT_VALUE_STRIDE: tl.constexpr,
    OUT_SCALE_STRIDE: tl.constexpr,
    OUT_SCALE_START: tl.constexpr,
    UNROLL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Every so-many-th block of a request that the new length completes, from ``old // B`` on; the last program tells the new length, where
    the number of full blocks changed."""
    request = tl.program_id(1)
    old = tl.maximum(tl.load(old_ptr + request), 0) // BLOCK_SIZE
    block = old + tl.program_id(0)
    new = tl.maximum(tl.load(new_ptr + request), 0)
    if PAGE_SIZE != 0:
        new = tl.minimum(new, table_width.to(tl.int64) * PAGE_SIZE)
    while block < new // BLOCK_SIZE:
        if OUT_PAGE_SIZE == 0:  # flat: row after row, out_width of them a request
            value_at, scale_at = (request.to(tl.int64) * out_width + block) * DIM, request.to(tl.int64) * out_width + block
            ok = block < out_width
        else:
            column = block // OUT_PAGE_SIZE
            ok = column < out_width
            page = tl.load(out_table_ptr + request.to(tl.int64) * out_width + column, mask=ok, other=-1).to(tl.int64)
            ok = ok & (page >= 0) & (page < out_pages)
            row = block - column * OUT_PAGE_SIZE
            value_at, scale_at = page * OUT_VALUE_STRIDE + row * DIM, page * OUT_SCALE_STRIDE + OUT_SCALE_START + row
        total = ordered_sum(
            values_ptr, scales_ptr, table_ptr, request, block * BLOCK_SIZE, BLOCK_SIZE, None, 0, table_width, num_pages,
            BLOCK_SIZE, DIM, BLOCK_D, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START, UNROLL,
        )  # fmt: skip
        codes, scales = mean_of(total, new * 0 + BLOCK_SIZE, BLOCK_D, INTERPRET)
        d = tl.arange(0, BLOCK_D)[None, :]
        ok = as_mask(ok)
        tl.store(out_values_ptr + value_at + d, codes, mask=ok & (d < DIM))
        tl.store(out_scales_ptr + scale_at + tl.arange(0, 1), scales, mask=ok)
        block += tl.num_programs(0)
    if tickets_ptr is not None and old != new // BLOCK_SIZE:
        last = tl.atomic_add(tickets_ptr + request, 1) == tl.num_programs(0) - 1
        tl.store(old_ptr + request, new, mask=last)
        tl.store(counts_ptr + request, new // BLOCK_SIZE, mask=last)
        tl.store(tickets_ptr + request, 0, mask=last)


@triton.jit(do_not_specialize=["table_width", "num_pages"])
def _partial_kernel(
    values_ptr,
    scales_ptr,
    table_ptr,
    lengths_ptr,
    requests_ptr,
    positions_ptr,
    out_values_ptr,
    out_scales_ptr,
    num_requests,
    table_width,
    num_pages,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    UNROLL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The own block of one query, up to the query."""
    query = tl.program_id(0).to(tl.int64)
    request = tl.load(requests_ptr + query)
    known = (request >= 0) & (request < num_requests)
    request = tl.where(known, request, 0)
    last = tl.minimum(tl.load(positions_ptr + query), tl.load(lengths_ptr + request) - 1)
    last = tl.where(known, tl.maximum(last, -1), -1)
    start = last // BLOCK_SIZE * BLOCK_SIZE
    count = tl.where(last < 0, 0, last - start + 1).to(tl.int32)
    total = ordered_sum(
        values_ptr, scales_ptr, table_ptr, request, start, count, None, 0, table_width, num_pages,
        BLOCK_SIZE, DIM, BLOCK_D, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START, UNROLL,
    )  # fmt: skip
    codes, scales = mean_of(total, count, BLOCK_D, INTERPRET)
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(out_values_ptr + query * DIM + d, codes, mask=d < DIM)
    tl.store(out_scales_ptr + query + tl.arange(0, 1), scales)


def unsupported(head_dim: int) -> str | None:
    """Why these kernels cannot run, or None. Any block size and page size will do."""
    return f"head_dim must be in 1..{MAX_DIM} for the Triton kernel, got {head_dim}" if not 1 <= head_dim <= MAX_DIM else None


def pool_keys(values: Tensor, scales: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Means of the full blocks of one request's keys: see ``thresher.ops.pool_keys.pool_keys``."""
    num_blocks, dim = len(values) // block_size, values.shape[1]
    device = values.device
    out = torch.empty(num_blocks, dim, dtype=values.dtype, device=device), torch.empty(num_blocks, dtype=torch.float32, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    new = torch.full_like(zero, len(values))
    _pool(flat_rows(values, scales, zero), zero, new, block_size, num_blocks, flat_rows(*out, zero), num_blocks, dim)
    return out


def pool_blocks(keys: IndexKeys, block_size: int) -> IndexKeys:
    """Means of all full blocks of every request, in one launch: see ``thresher.ops.pool_keys.pool_blocks``."""
    means = room_for_means(keys, block_size)
    pool_paged_keys(keys, torch.zeros_like(keys.lengths), block_size, keys.room, means)
    return means


def grow_means(keys: IndexKeys, means: IndexKeys, pooled: Tensor, tickets: Tensor, block_size: int) -> None:
    """Bring a cache of means up to date, in one launch: see ``thresher.ops.pool_keys.grow_means``."""
    width = means.page_table.shape[1]
    programs = max(1, min(PROGRAMS // max(len(pooled), 1), keys.room // block_size))
    kept = Kept(means.lengths, tickets)
    _pool(paged_rows(keys), pooled, keys.lengths, block_size, programs, paged_rows(means), width, keys.head_dim, kept)


def partial_means(values: Tensor, scales: Tensor, block_size: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The own block of each query of one request: see ``thresher.ops.pool_keys.partial_means``."""
    zero = torch.zeros(1, dtype=torch.int64, device=values.device)
    rows = flat_rows(values, scales, zero)
    return _partial(rows, torch.full_like(zero, len(values)), torch.zeros_like(positions), positions, block_size, values.shape[1])


def pool_paged_keys(
    keys: IndexKeys, old_lengths: Tensor, block_size: int, max_appended: int, means: IndexKeys | tuple[Tensor, Tensor]
) -> None:
    """Pool the blocks that ``keys`` completed since ``old_lengths`` into a cache of means, without asking the device for a length.

    Block b of request r is written, and no other, when ``old_lengths[r] // B <= b < keys.lengths[r] // B``; one that the cache has no
    room for is left out. In a decode step that is at most one block a request and mostly none; with ``old_lengths`` 0 it is prefill.

    Args:
        keys: the paged keys, lengths after appending.
        old_lengths: int64 ``[B]``, lengths before.
        block_size: tokens a block.
        max_appended: no request grew by more tokens than this; sizes the launch.
        means: where to: pages in the key cache's format with block numbers as positions (``lengths`` is not read), or
            e4m3 ``[B, max_blocks, D]`` and fp32 ``[B, max_blocks]``, contiguous.
    """
    if isinstance(means, IndexKeys):
        out, width = paged_rows(means), means.page_table.shape[1]
    else:
        contiguous = means[0].is_contiguous() and means[1].is_contiguous()
        require(contiguous, "means must be contiguous", f"strides {means[0].stride()} and {means[1].stride()}", "allocate them whole")
        out, width = flat_rows(*means, keys.lengths), means[0].shape[1]
    programs = -(-max_appended // block_size)
    _pool(paged_rows(keys), old_lengths.contiguous(), keys.lengths, block_size, programs, out, width, keys.head_dim)


def paged_partial_means(keys: IndexKeys, requests: Tensor, positions: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The mean of each query's own block up to the query, from the paged cache: e4m3 ``[Q, D]`` and fp32 ``[Q]``.

    Args:
        keys: the paged keys.
        requests: int64 ``[Q]``; one that does not exist gives a zero mean.
        positions: int64 ``[Q]``; -1 gives a zero mean, one past the length counts as the last.
        block_size: tokens a block.
    """
    return _partial(paged_rows(keys), keys.lengths, requests, positions, block_size, keys.head_dim)


def _pool(
    rows: Rows, old: Tensor, new: Tensor, block_size: int, programs: int, out: Rows, out_width: int, dim: int, kept: Kept | None = None
) -> None:
    if not programs or not len(old) or not out_width:
        return
    new = new.contiguous()
    if can_walk(rows, block_size, dim):
        pool(rows, old, new, block_size, programs, out, out_width, dim, kept)
        return
    with on_device(rows.values):
        _pool_kernel[(programs, len(old))](
            rows.values,
            rows.scales,
            rows.table,
            old,
            new,
            out.values.view(torch.uint8),
            out.scales,
            out.table,
            None if kept is None else kept.counts,
            None if kept is None else kept.tickets,
            rows.table_width,
            rows.num_pages,
            out_width,
            out.num_pages,
            BLOCK_SIZE=block_size,
            DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            PAGE_SIZE=rows.page_size,
            VALUE_STRIDE=rows.value_stride,
            SCALE_STRIDE=rows.scale_stride,
            SCALE_START=rows.scale_start,
            OUT_PAGE_SIZE=out.page_size,
            OUT_VALUE_STRIDE=out.value_stride,
            OUT_SCALE_STRIDE=out.scale_stride,
            OUT_SCALE_START=out.scale_start,
            UNROLL=keys_under_way(rows.page_size, block_size),
            INTERPRET=INTERPRET,
            num_warps=warps_of(dim),
        )


def _partial(rows: Rows, lengths: Tensor, requests: Tensor, positions: Tensor, block_size: int, dim: int) -> tuple[Tensor, Tensor]:
    num, device = len(positions), positions.device
    values = torch.empty(num, dim, dtype=torch.uint8, device=device)
    scales = torch.empty(num, dtype=torch.float32, device=device)
    if num:
        with on_device(rows.values):
            _partial_kernel[(num,)](
                rows.values,
                rows.scales,
                rows.table,
                lengths.contiguous(),
                requests.contiguous(),
                positions.contiguous(),
                values,
                scales,
                len(lengths),
                rows.table_width,
                rows.num_pages,
                BLOCK_SIZE=block_size,
                DIM=dim,
                BLOCK_D=triton.next_power_of_2(dim),
                PAGE_SIZE=rows.page_size,
                VALUE_STRIDE=rows.value_stride,
                SCALE_STRIDE=rows.scale_stride,
                SCALE_START=rows.scale_start,
                UNROLL=keys_under_way(rows.page_size, block_size),
                INTERPRET=INTERPRET,
                num_warps=warps_of(dim),
            )
    return values.view(torch.float8_e4m3fn), scales
