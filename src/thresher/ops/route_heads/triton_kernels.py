"""The kernels of head routing: see ``triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.cache.device import as_mask, find_rows, mean_of, ordered_sum


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
def own_kernel(
    positions_ptr,
    requests_ptr,
    lengths_ptr,
    num_requests,
    values_ptr,
    scales_ptr,
    table_ptr,
    table_width,
    num_pages,
    sums_ptr,
    num_queries,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    UNROLL: tl.constexpr,
    LOOK: tl.constexpr,
):
    """The sum fp32 of the keys of a query's own block up to the query; nothing is written where the query completes the block.

    Queries that stand behind one another in a block, as in prefill, are served by one walk: the first one's program passes them all.
    """
    query = tl.program_id(0).to(tl.int64)
    request, last, full = _sight(query, positions_ptr, requests_ptr, lengths_ptr, num_requests, BLOCK_SIZE)
    start = full.to(tl.int64) * BLOCK_SIZE
    offset = (last - start).to(tl.int32)
    if offset >= 0:
        length = tl.load(lengths_ptr + request)
        held = query > 0
        served = held & (tl.load(requests_ptr + query - 1, mask=held, other=-1) == request)
        served = served & (tl.minimum(tl.load(positions_ptr + query - 1, mask=held, other=-1), length - 1) == last - 1) & (offset > 0)
        if not served:
            # How many queries the walk passes: LOOK more are looked at while all of those before follow.
            run, looked = tl.full([], 1, tl.int32), tl.full([], 1, tl.int32)
            while run == looked:
                step = looked + tl.arange(0, LOOK)
                ok = (query + step < num_queries) & (offset + step < BLOCK_SIZE - 1)
                same = tl.load(requests_ptr + query + step, mask=ok, other=-1) == request
                there = tl.minimum(tl.load(positions_ptr + query + step, mask=ok, other=-1), length - 1) == last + step
                run += tl.min(tl.where(ok & same & there, LOOK, tl.arange(0, LOOK)), 0)
                looked += LOOK
            ordered_sum(
                values_ptr, scales_ptr, table_ptr, request, start, offset + run, sums_ptr + query * DIM, offset, table_width, num_pages,
                BLOCK_SIZE, DIM, DIM, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START, UNROLL,
            )  # fmt: skip


@triton.jit
def _load_q(q_ptr, query, q_stride_t, q_stride_h, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, DIM: tl.constexpr):
    head, d = tl.arange(0, BLOCK_H), tl.arange(0, DIM)
    q_at = query * q_stride_t + head[:, None].to(tl.int64) * q_stride_h + d[None, :]
    return tl.load(q_ptr + q_at, mask=(head < HEADS)[:, None], other=0.0)


@triton.jit
def _segment_sum(
    q,
    request,
    first,
    full,
    values_ptr,
    scales_ptr,
    table_ptr,
    table_width,
    num_pages,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    SCALE_START: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCKS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Sum fp32 ``[BLOCK_H]`` over the segment's blocks ``first ..``, below ``full``, of ``scale * relu(q . mean)``."""
    d = tl.arange(0, DIM)
    if INTERPRET and q.dtype == tl.bfloat16:
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
    return tl.sum(total, 0)


@triton.jit
def segment_kernel(
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
    """One segment's sum, for all heads of one query."""
    query = tl.program_id(0).to(tl.int64)
    request, _, full = _sight(query, positions_ptr, requests_ptr, lengths_ptr, num_requests, BLOCK_SIZE)
    full = tl.minimum(full, tl.load(counts_ptr + request).to(tl.int32))
    first = tl.program_id(1) * SEGMENT
    if first < full:
        head = tl.arange(0, BLOCK_H)
        q = _load_q(q_ptr, query, q_stride_t, q_stride_h, HEADS, BLOCK_H, DIM)
        total = _segment_sum(
            q, request, first, full, values_ptr, scales_ptr, table_ptr, table_width, num_pages,
            BLOCK_H, DIM, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START, SEGMENT, BLOCKS, INTERPRET,
        )  # fmt: skip
        tl.store(sums_ptr + (query * num_segments + tl.program_id(1)) * HEADS + head, total, mask=head < HEADS)


@triton.jit
def _num_better(mass, head, others, other_head):
    """How many of the others rank before each head: more mass, or as much and a smaller head."""
    better = (others[None, :] > mass[:, None]) | ((others[None, :] == mass[:, None]) & (other_head[None, :] < head[:, None]))
    return tl.sum(better.to(tl.int32), 1)


@triton.jit
def _places(rank, ACTIVE: tl.constexpr):
    """Which heads are among the ACTIVE of smallest rank, and each one's place among those, ascending."""
    keep = rank < ACTIVE
    return keep, tl.cumsum(keep.to(tl.int32), 0) - 1


@triton.jit
def _rankable(mass, real):
    """NaN ranks with -inf. So does padding, whose head numbers are the largest: it loses every tie."""
    return tl.where(real & (mass == mass), mass, float("-inf"))


@triton.jit
def finish_kernel(
    q_ptr,
    weights_ptr,
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
    own_ptr,
    codes_ptr,
    sums_ptr,
    mass_ptr,
    heads_ptr,
    kept_q_ptr,
    kept_weights_ptr,
    q_stride_t,
    q_stride_h,
    weights_stride,
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
    ACTIVE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Mass of all heads of one query, and what is asked for of it: what is None is not written.

    Sums of segments are read where ``sums_ptr`` is not None, and made here otherwise: the same bits.
    """
    query = tl.program_id(0).to(tl.int64)
    request, last, full = _sight(query, positions_ptr, requests_ptr, lengths_ptr, num_requests, BLOCK_SIZE)
    head = tl.arange(0, BLOCK_H)
    real = head < HEADS
    q = _load_q(q_ptr, query, q_stride_t, q_stride_h, HEADS, BLOCK_H, DIM)
    total = tl.zeros([BLOCK_H], tl.float32)
    held = tl.minimum(full, tl.load(counts_ptr + request).to(tl.int32))
    # Means that the table has no room for have no sums either, whatever their number says.
    for segment in range(0, tl.minimum((held + SEGMENT - 1) // SEGMENT, num_segments)):
        if sums_ptr is None:
            total += _segment_sum(
                q, request, segment * SEGMENT, held, values_ptr, scales_ptr, table_ptr, table_width, num_pages,
                BLOCK_H, DIM, PAGE_SIZE, VALUE_STRIDE, SCALE_STRIDE, SCALE_START, SEGMENT, BLOCKS, INTERPRET,
            )  # fmt: skip
        else:
            total += tl.load(sums_ptr + (query * num_segments + segment) * HEADS + head, mask=real, other=0.0)
    inside = (last + 1 - full.to(tl.int64) * BLOCK_SIZE).to(tl.int32)
    partial = inside > 0
    d = tl.arange(0, DIM)
    own = tl.load(own_ptr + query * DIM + d[None, :], mask=as_mask(partial), other=0.0)
    codes, own_scale = mean_of(own, inside, DIM, INTERPRET)
    # By way of memory, and the query read anew: which threads hold which dims sets the order of this sum, and so must not depend on what
    # else the kernel does.
    tl.store(codes_ptr + query * DIM + d[None, :], codes)
    tl.debug_barrier()
    q = _load_q(q_ptr, query, q_stride_t, q_stride_h, HEADS, BLOCK_H, DIM)
    own = tl.load(codes_ptr + query * DIM + d).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    dots = tl.sum(q.to(tl.float32) * own[None, :], 1)
    total += tl.where(partial, tl.where(dots < 0, 0.0, dots) * own_scale, 0.0)
    weight = tl.load(weights_ptr + query * weights_stride + head, mask=real, other=0.0)
    count = tl.maximum(full + partial.to(tl.int32), 1).to(tl.float32)
    mass = tl.div_rn(tl.abs(weight) * total, tl.zeros([BLOCK_H], tl.float32) + count)
    mass = tl.where(last < 0, 0.0, mass)
    if mass_ptr is not None:
        tl.store(mass_ptr + query * HEADS + head, mass, mask=real)
    if ACTIVE > 0:
        ranked = _rankable(mass, real)
        keep, place = _places(_num_better(ranked, head, ranked, head), ACTIVE)
        row = query * ACTIVE + place
        if heads_ptr is not None:
            tl.store(heads_ptr + row, head.to(tl.int64), mask=keep)
        if kept_q_ptr is not None:
            tl.store(kept_q_ptr + row[:, None] * DIM + tl.arange(0, DIM)[None, :], q, mask=keep[:, None])
            tl.store(kept_weights_ptr + row, weight, mask=keep)


@triton.jit
def _load_mass(mass_ptr, head, HEADS: tl.constexpr):
    mass = tl.load(mass_ptr + head, mask=head < HEADS, other=0.0)
    if mass.dtype != tl.float64:
        mass = mass.to(tl.float32)
    return _rankable(mass, head < HEADS)


@triton.jit
def route_kernel(mass_ptr, heads_ptr, stride, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, OTHERS: tl.constexpr, ACTIVE: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    mass = _load_mass(mass_ptr + query * stride, head, HEADS)
    rank = tl.zeros([BLOCK_H], tl.int32)
    for base in range(0, HEADS, OTHERS):
        other = base + tl.arange(0, OTHERS)
        rank += _num_better(mass, head, _load_mass(mass_ptr + query * stride, other, HEADS), other)
    keep, place = _places(rank, ACTIVE)
    tl.store(heads_ptr + query * ACTIVE + place, head.to(tl.int64), mask=keep)
