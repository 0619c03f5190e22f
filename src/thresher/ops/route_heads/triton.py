"""Head routing on a GPU: FP8 dot products of every head with the block means, summed in a fixed order.

Three launches: the mean of each query's own block (one warp a query), sums over segments of ``SEGMENT`` blocks (keys are the wide side of
the matrix product, heads the narrow one), and the end: segments added ascending, own block, weights, division and, when asked for, the
choice of heads. Segments lie at fixed block numbers and a block out of sight adds +0.0, so a query's mass has the same bits in prefill and
decode, whatever comes later and however long the others are.

The mass is fp32 from tensor-core dot products, where the reference is fp64: close, not equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from thresher.cache.device import INTERPRET, Rows, find_rows, flat_rows, keys_under_way, on_device, ordered_mean, paged_rows
from thresher.errors import require
from thresher.types import IndexKeys, IndexQuery

MAX_HEADS = 128
HEAD_DIMS = (64, 128)
Q_TYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16)
# Blocks of one program: few enough that 8192 blocks of one decoded token give 16 programs, enough that prefill at 128K has one.
SEGMENT = 512
BLOCKS = 128


@triton.jit
def _sight(query, positions_ptr, requests_ptr, lengths_ptr, num_requests, BLOCK_SIZE: tl.constexpr):
    """Request, last visible position (-1: nothing) and number of full blocks up to it."""
    request = tl.load(requests_ptr + query)
    known = (request >= 0) & (request < num_requests)
    request = tl.where(known, request, 0)
    last = tl.minimum(tl.load(positions_ptr + query), tl.load(lengths_ptr + request) - 1)
    last = tl.where(known, tl.maximum(last, -1), -1)
    return request, last, ((last + 1) // BLOCK_SIZE).to(tl.int32)


@triton.jit
def _own_kernel(
    positions_ptr,
    requests_ptr,
    lengths_ptr,
    num_requests,
    values_ptr,
    scales_ptr,
    table_ptr,
    table_width,
    num_pages,
    out_values_ptr,
    out_scales_ptr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    UNROLL: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The mean of a query's own block up to the query; zero where the query completes the block."""
    query = tl.program_id(0).to(tl.int64)
    request, last, full = _sight(query, positions_ptr, requests_ptr, lengths_ptr, num_requests, BLOCK_SIZE)
    start = full.to(tl.int64) * BLOCK_SIZE
    codes, scales = ordered_mean(
        values_ptr,
        scales_ptr,
        table_ptr,
        request,
        start,
        (last + 1 - start).to(tl.int32),
        table_width,
        num_pages,
        BLOCK_SIZE,
        DIM,
        DIM,
        PAGE_SIZE,
        VALUE_STRIDE,
        SCALE_STRIDE,
        SCALE_START,
        UNROLL,
        INTERPRET,
    )
    tl.store(out_values_ptr + query * DIM + tl.arange(0, DIM)[None, :], codes)
    tl.store(out_scales_ptr + query + tl.arange(0, 1), scales)


@triton.jit
def _segment_kernel(
    q_ptr,
    positions_ptr,
    requests_ptr,
    lengths_ptr,
    num_requests,
    values_ptr,
    scales_ptr,
    table_ptr,
    counts_ptr,
    table_width,
    num_pages,
    sums_ptr,
    q_stride_t,
    q_stride_h,
    num_segments,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCKS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Sum over a segment's blocks of ``scale * relu(q . mean)``, for all heads of one query."""
    query = tl.program_id(0).to(tl.int64)
    request, _, full = _sight(query, positions_ptr, requests_ptr, lengths_ptr, num_requests, BLOCK_SIZE)
    full = tl.minimum(full, tl.load(counts_ptr + request).to(tl.int32))
    first = tl.program_id(1) * SEGMENT
    if first < full:
        head, d = tl.arange(0, BLOCK_H), tl.arange(0, DIM)
        q_at = query * q_stride_t + head[:, None].to(tl.int64) * q_stride_h + d[None, :]
        q = tl.load(q_ptr + q_at, mask=(head < HEADS)[:, None], other=0.0)
        if INTERPRET and q_ptr.dtype.element_ty == tl.bfloat16:
            q = q.to(tl.float32)
        total = tl.zeros([BLOCKS, BLOCK_H], tl.float32)
        for base in range(first, tl.minimum(first + SEGMENT, full), BLOCKS):
            block = base + tl.arange(0, BLOCKS)
            value_at, scale_at, ok = find_rows(
                table_ptr, request, block, block < full, table_width, num_pages, DIM, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START
            )
            mean = tl.load(values_ptr + value_at[:, None] + d[None, :], mask=ok[:, None], other=0.0)
            scale = tl.load(scales_ptr + scale_at, mask=ok, other=0.0)
            dots = tl.dot(mean.to(q.dtype), tl.trans(q))
            # Not a maximum, which would lose NaN.
            total += tl.where(dots < 0, 0.0, dots) * scale[:, None]
        tl.store(sums_ptr + (query * num_segments + tl.program_id(1)) * HEADS + head, tl.sum(total, 0), mask=head < HEADS)


@triton.jit
def _num_better(mass, head, others, other_head):
    """How many of the others rank before each head: more mass, or as much and a smaller head."""
    better = (others[None, :] > mass[:, None]) | ((others[None, :] == mass[:, None]) & (other_head[None, :] < head[:, None]))
    return tl.sum(better.to(tl.int32), 1)


@triton.jit
def _store_heads(heads_ptr, query, head, rank, ACTIVE: tl.constexpr):
    """The ACTIVE heads of smallest rank, ascending."""
    keep = rank < ACTIVE
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(heads_ptr + query * ACTIVE + place, head.to(tl.int64), mask=keep)


@triton.jit
def _rankable(mass, real):
    """NaN ranks with -inf. So does padding, whose head numbers are the largest: it loses every tie."""
    return tl.where(real & (mass == mass), mass, float("-inf"))


@triton.jit
def _finish_kernel(
    q_ptr,
    weights_ptr,
    positions_ptr,
    requests_ptr,
    lengths_ptr,
    num_requests,
    own_ptr,
    own_scales_ptr,
    counts_ptr,
    sums_ptr,
    mass_ptr,
    heads_ptr,
    q_stride_t,
    q_stride_h,
    weights_stride,
    num_segments,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    SEGMENT: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    request, last, full = _sight(query, positions_ptr, requests_ptr, lengths_ptr, num_requests, BLOCK_SIZE)
    partial = tl.where((last + 1) % BLOCK_SIZE != 0, 1, 0)
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, DIM)
    real = head < HEADS
    total = tl.zeros([BLOCK_H], tl.float32)
    held = tl.minimum(full, tl.load(counts_ptr + request).to(tl.int32))
    # Means that the table has no room for have no sums either, whatever their number says.
    for segment in range(0, tl.minimum((held + SEGMENT - 1) // SEGMENT, num_segments)):
        total += tl.load(sums_ptr + (query * num_segments + segment) * HEADS + head, mask=real, other=0.0)
    q_at = query * q_stride_t + head[:, None].to(tl.int64) * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_at, mask=real[:, None], other=0.0).to(tl.float32)
    own = tl.load(own_ptr + query * DIM + d).to(tl.float32)
    dots = tl.sum(q * own[None, :], 1)
    total += tl.where(partial > 0, tl.where(dots < 0, 0.0, dots) * tl.load(own_scales_ptr + query), 0.0)
    weight = tl.load(weights_ptr + query * weights_stride + head, mask=real, other=0.0)
    count = tl.maximum(full + partial, 1).to(tl.float32)
    mass = tl.div_rn(tl.abs(weight) * total, tl.zeros([BLOCK_H], tl.float32) + count)
    mass = tl.where(last < 0, 0.0, mass)
    tl.store(mass_ptr + query * HEADS + head, mass, mask=real)
    if ACTIVE > 0:
        ranked = _rankable(mass, real)
        _store_heads(heads_ptr, query, head, _num_better(ranked, head, ranked, head), ACTIVE)


@triton.jit
def _load_mass(mass_ptr, head, HEADS: tl.constexpr):
    mass = tl.load(mass_ptr + head, mask=head < HEADS, other=0.0)
    if mass.dtype != tl.float64:
        mass = mass.to(tl.float32)
    return _rankable(mass, head < HEADS)


@triton.jit
def _route_kernel(mass_ptr, heads_ptr, stride, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, OTHERS: tl.constexpr, ACTIVE: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    mass = _load_mass(mass_ptr + query * stride, head, HEADS)
    rank = tl.zeros([BLOCK_H], tl.int32)
    for base in range(0, HEADS, OTHERS):
        other = base + tl.arange(0, OTHERS)
        rank += _num_better(mass, head, _load_mass(mass_ptr + query * stride, other, HEADS), other)
    _store_heads(heads_ptr, query, head, rank, ACTIVE)


def unsupported(q_dtype: torch.dtype, num_heads: int, head_dim: int) -> str | None:
    """Why these kernels cannot run, or None. Any block size, page size and length will do."""
    if q_dtype not in Q_TYPES:
        return f"q must be float8_e4m3fn, bfloat16 or float16 for the Triton kernel, got {q_dtype}"
    if not 1 <= num_heads <= MAX_HEADS:
        return f"heads must be in 1..{MAX_HEADS} for the Triton kernel, got {num_heads}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS} for the Triton kernel, got {head_dim}"
    return None


def head_mass(query: IndexQuery, means: Sequence[tuple[Tensor, Tensor]] | IndexKeys, keys: IndexKeys, block_size: int) -> Tensor:
    """See ``thresher.ops.route_heads.head_mass``; nothing is read back from the device.

    ``means`` may also be paged: the key cache's format with block numbers as positions and ``lengths`` in blocks. That form, unlike a list
    of several requests, copies nothing and fits a CUDA graph. A query that sees more blocks than there are means is not refused here; the
    missing ones add nothing.
    """
    return _mass(query, means, keys, block_size, 0)[0]


def routed_heads(
    query: IndexQuery, means: Sequence[tuple[Tensor, Tensor]] | IndexKeys, keys: IndexKeys, block_size: int, active_heads: int
) -> tuple[Tensor, Tensor]:
    """``head_mass`` and the ``route_heads`` of it, without a launch between: fp32 ``[Q, H]`` and int64 ``[Q, active_heads]``."""
    return _mass(query, means, keys, block_size, active_heads)


def route_heads(mass: Tensor, active_heads: int) -> Tensor:
    """See ``thresher.ops.route_heads.route_heads``; at most 1024 heads."""
    num, heads = mass.shape
    mass = mass if mass.stride(1) == 1 else mass.contiguous()
    out = torch.empty(num, active_heads, dtype=torch.int64, device=mass.device)
    if num:
        with on_device(mass):
            block_h = triton.next_power_of_2(heads)
            others = min(block_h, max(1, 4096 // block_h))  # comparisons held at once
            _route_kernel[(num,)](mass, out, mass.stride(0), HEADS=heads, BLOCK_H=block_h, OTHERS=others, ACTIVE=active_heads)
    return out


def _mean_rows(means: Sequence[tuple[Tensor, Tensor]] | IndexKeys, device: torch.device) -> tuple[Rows, Tensor, int]:
    """Where the means lie, how many there are of each request (int64 ``[B]``), and a bound on that."""
    if isinstance(means, IndexKeys):
        return paged_rows(means), means.lengths.contiguous(), means.page_table.shape[1] * means.page_size
    counts = [len(values) for values, _ in means]
    if len(means) == 1:
        values, scales = means[0]
        start = torch.zeros(1, dtype=torch.int64, device=device)
        return flat_rows(values, scales, start), torch.full_like(start, counts[0]), counts[0]
    values = torch.cat([values.view(torch.uint8) for values, _ in means]).view(torch.float8_e4m3fn)
    held = torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)
    return flat_rows(values, torch.cat([scales for _, scales in means]), held.cumsum(0) - held), held, max(counts)


def _mass(
    query: IndexQuery, means: Sequence[tuple[Tensor, Tensor]] | IndexKeys, keys: IndexKeys, block_size: int, active: int
) -> tuple[Tensor, Tensor]:
    q, weights, device = query.q, query.weights, query.q.device
    num, heads, dim = q.shape
    given = means.num_requests if isinstance(means, IndexKeys) else len(means)
    require(given == keys.num_requests, f"means must cover the {keys.num_requests} requests", given, "pool every request")
    q = q if q.stride(2) == 1 else q.contiguous()
    weights = weights if weights.stride(1) == 1 else weights.contiguous()
    mass = torch.empty(num, heads, dtype=torch.float32, device=device)
    chosen = torch.empty(num, active, dtype=torch.int64, device=device)
    if not num:
        return mass, chosen
    paged = paged_rows(keys)
    rows, counts, most = _mean_rows(means, device)
    num_segments = -(-most // SEGMENT)
    own = torch.empty(num, dim, dtype=torch.uint8, device=device)
    own_scales = torch.empty(num, dtype=torch.float32, device=device)
    sums = torch.empty(num, max(num_segments, 1), heads, dtype=torch.float32, device=device)
    # Launch options: 8 warps where 4 would spill registers. No fused multiply-add, so that every specialisation rounds alike.
    sight = (query.positions.contiguous(), query.requests.contiguous(), keys.lengths.contiguous(), keys.num_requests)
    block_h = max(16, triton.next_power_of_2(heads))
    with on_device(q):
        _own_kernel[(num,)](
            *sight,
            paged.values,
            paged.scales,
            paged.table,
            paged.table_width,
            paged.num_pages,
            own,
            own_scales,
            BLOCK_SIZE=block_size,
            DIM=dim,
            PAGE_SIZE=paged.page_size,
            VALUE_STRIDE=paged.value_stride,
            SCALE_STRIDE=paged.scale_stride,
            SCALE_START=paged.scale_start,
            UNROLL=keys_under_way(paged.page_size, block_size),
            INTERPRET=INTERPRET,
            num_warps=1,
        )
        if num_segments:
            _segment_kernel[(num, num_segments)](
                q,
                *sight,
                rows.values,
                rows.scales,
                rows.table,
                counts,
                rows.table_width,
                rows.num_pages,
                sums,
                q.stride(0),
                q.stride(1),
                num_segments,
                HEADS=heads,
                BLOCK_H=block_h,
                BLOCK_SIZE=block_size,
                DIM=dim,
                PAGE_SIZE=rows.page_size,
                VALUE_STRIDE=rows.value_stride,
                SCALE_STRIDE=rows.scale_stride,
                SCALE_START=rows.scale_start,
                SEGMENT=SEGMENT,
                BLOCKS=BLOCKS,
                INTERPRET=INTERPRET,
                num_warps=8 if block_h > 64 or (block_h == 64 and q.element_size() > 1) else 4,
                num_stages=3,
                enable_fp_fusion=False,
            )
        _finish_kernel[(num,)](
            q,
            weights,
            *sight,
            own.view(torch.float8_e4m3fn),
            own_scales,
            counts,
            sums,
            mass,
            chosen,
            q.stride(0),
            q.stride(1),
            weights.stride(0),
            num_segments,
            HEADS=heads,
            BLOCK_H=block_h,
            BLOCK_SIZE=block_size,
            DIM=dim,
            SEGMENT=SEGMENT,
            ACTIVE=active,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return mass, chosen
