"""Head routing on a GPU: FP8 dot products of every head with the block means, summed in a fixed order.

Two launches: the sums of each query's own block, one walk for all queries that stand behind one another in it; and the rest, a program a
query: sums over segments of ``SEGMENT`` blocks (keys are the wide side of the matrix product, heads the narrow one), segments added
ascending, own block, weights, division and, when asked for, the choice of heads and the query with those alone. Few queries over many
segments would leave most of the chip idle, so there the segments are a launch of their own, with a program each. Segments lie at fixed
block numbers and a block out of sight adds +0.0, so a query's mass has the same bits in prefill and decode, whatever comes later and
however long the others are.

The mass is fp32 from tensor-core dot products, where the reference is fp64: close, not equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from thresher.cache.device import INTERPRET, Rows, flat_rows, keys_under_way, on_device, paged_rows, unit_rows, warps_of
from thresher.errors import require
from thresher.ops.pool_keys.walks import can_walk, own_sums
from thresher.ops.route_heads.reference import Means
from thresher.ops.route_heads.triton_kernels import finish_kernel, own_kernel, route_kernel, segment_kernel
from thresher.types import IndexKeys, IndexQuery

MAX_HEADS = 128
HEAD_DIMS = (64, 128)
Q_TYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16)
# Blocks of one program: few enough that 8192 blocks of one decoded token give 16 programs, enough that prefill at 128K has one.
SEGMENT = 512
BLOCKS = 128
MANY_QUERIES = 264  # with so many, two a multiprocessor, a query's segments are left to one program
LOOK = 1024  # queries looked at together, for those that stand behind one another


class Routed(NamedTuple):
    """What ``_route`` writes, None where not asked for: mass fp32 ``[Q, H]``, heads int64 ``[Q, h]``, q ``[Q, h, D]``, weights fp32
    ``[Q, h]``."""

    mass: Tensor | None = None
    heads: Tensor | None = None
    q: Tensor | None = None
    weights: Tensor | None = None


def unsupported(q_dtype: torch.dtype, num_heads: int, head_dim: int) -> str | None:
    """Why these kernels cannot run, or None. Any block size, page size and length will do."""
    if q_dtype not in Q_TYPES:
        return f"q must be float8_e4m3fn, bfloat16 or float16 for the Triton kernel, got {q_dtype}"
    if not 1 <= num_heads <= MAX_HEADS:
        return f"heads must be in 1..{MAX_HEADS} for the Triton kernel, got {num_heads}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS} for the Triton kernel, got {head_dim}"
    return None


def head_mass(query: IndexQuery, means: Means, keys: IndexKeys, block_size: int) -> Tensor:
    """See ``thresher.ops.route_heads.head_mass``; nothing is read back from the device.

    ``means`` may also be paged: the key cache's format with block numbers as positions and ``lengths`` in blocks. That form, unlike a list
    of several requests, copies nothing and fits a CUDA graph. A query that sees more blocks than there are means is not refused here; the
    missing ones add nothing.
    """
    mass = torch.empty(query.weights.shape, dtype=torch.float32, device=query.q.device)
    _route(query, means, keys, block_size, 0, Routed(mass))
    return mass


def routed_heads(query: IndexQuery, means: Means, keys: IndexKeys, block_size: int, active_heads: int) -> tuple[Tensor, Tensor]:
    """``head_mass`` and the ``route_heads`` of it, without a launch between: fp32 ``[Q, H]`` and int64 ``[Q, active_heads]``."""
    device = query.q.device
    mass = torch.empty(query.weights.shape, dtype=torch.float32, device=device)
    heads = torch.empty(query.num_queries, active_heads, dtype=torch.int64, device=device)
    _route(query, means, keys, block_size, active_heads, Routed(mass, heads))
    return mass, heads


def routed_query(query: IndexQuery, means: Means, keys: IndexKeys, block_size: int, active_heads: int) -> IndexQuery:
    """See ``thresher.ops.route_heads.routed_query``; ``means`` as for ``head_mass``."""
    num, _, dim = query.q.shape
    q = torch.empty(num, active_heads, dim, dtype=query.q.dtype, device=query.q.device)
    weights = torch.empty(num, active_heads, dtype=torch.float32, device=query.q.device)
    _route(query, means, keys, block_size, active_heads, Routed(q=q, weights=weights))
    return IndexQuery(q, weights, query.positions, query.requests)


def route_heads(mass: Tensor, active_heads: int) -> Tensor:
    """See ``thresher.ops.route_heads.route_heads``; at most 1024 heads."""
    num, heads = mass.shape
    mass = unit_rows(mass)
    out = torch.empty(num, active_heads, dtype=torch.int64, device=mass.device)
    if num:
        with on_device(mass):
            block_h = triton.next_power_of_2(heads)
            others = min(block_h, max(1, 4096 // block_h))  # comparisons held at once
            route_kernel[(num,)](mass, out, mass.stride(0), HEADS=heads, BLOCK_H=block_h, OTHERS=others, ACTIVE=active_heads)
    return out


def _mean_rows(means: Means, device: torch.device) -> tuple[Rows, Tensor, int]:
    """Where the means lie, how many there are of each request (int64 ``[B]``), and a bound on that."""
    if isinstance(means, IndexKeys):
        return paged_rows(means), means.lengths.contiguous(), means.room
    counts = [len(scales) for _, scales in means]
    starts, held = torch.tensor([[sum(counts[:request]) for request in range(len(counts))], counts], dtype=torch.int64).to(device)
    # torch has no float8 concatenation on every device.
    values = torch.cat([values.view(torch.uint8) for values, _ in means]).view(torch.float8_e4m3fn)
    return flat_rows(values, torch.cat([scales for _, scales in means]), starts), held, max(counts, default=0)


def _route(query: IndexQuery, means: Means, keys: IndexKeys, block_size: int, active: int, out: Routed) -> None:
    q, weights, device = unit_rows(query.q), unit_rows(query.weights), query.q.device
    num, heads, dim = q.shape
    given = means.num_requests if isinstance(means, IndexKeys) else len(means)
    require(given == keys.num_requests, f"means must cover the {keys.num_requests} requests", given, "pool every request")
    if not num:
        return
    paged = paged_rows(keys)
    rows, counts, most = _mean_rows(means, device)
    # What fits in one tile needs no loop, nor the registers and the shared memory for one.
    segment, stages = (BLOCKS, 1) if most <= BLOCKS else (SEGMENT, 3)
    num_segments = -(-most // segment)
    own = torch.empty(num, dim, dtype=torch.float32, device=device)
    codes = torch.empty(num, dim, dtype=torch.uint8, device=device)
    # Kernels for other types than FP8 have no room for the rest beside a segment.
    apart = q.element_size() > 1 or (num_segments > 1 and num < MANY_QUERIES)
    sums = torch.empty(num, max(num_segments, 1), heads, dtype=torch.float32, device=device) if apart else None
    sight = (query.positions.contiguous(), query.requests.contiguous(), keys.lengths.contiguous(), keys.num_requests)
    block_h = max(16, triton.next_power_of_2(heads))
    means_given = (rows.values, rows.scales, rows.table, counts, rows.table_width, rows.num_pages)
    # Launch options: 8 warps where 4 would spill registers. No fused multiply-add, so that every specialisation rounds alike.
    constants = {
        "HEADS": heads, "BLOCK_H": block_h, "BLOCK_SIZE": block_size, "DIM": dim, "PAGE_SIZE": rows.page_size,
        "VALUE_STRIDE": rows.value_stride, "SCALE_STRIDE": rows.scale_stride, "SCALE_START": rows.scale_start, "SEGMENT": segment,
        "BLOCKS": BLOCKS, "INTERPRET": INTERPRET, "num_stages": stages, "enable_fp_fusion": False,
    }  # fmt: skip
    warps = 8 if block_h > 64 or (block_h == 64 and q.element_size() > 1) else 4
    with on_device(q):
        if can_walk(paged, block_size, dim):
            own_sums(paged, *sight[:3], block_size, own)
        else:
            own_kernel[(num,)](
                *sight, paged.values, paged.scales, paged.table, paged.table_width, paged.num_pages, own, num,
                BLOCK_SIZE=block_size, DIM=dim, PAGE_SIZE=paged.page_size, VALUE_STRIDE=paged.value_stride, SCALE_STRIDE=paged.scale_stride,
                SCALE_START=paged.scale_start, UNROLL=keys_under_way(paged.page_size, block_size),
                LOOK=min(LOOK, triton.next_power_of_2(block_size)), num_warps=warps_of(dim),
            )  # fmt: skip
        if apart and num_segments:
            segment_kernel[(num, num_segments)](
                q, *sight, *means_given, sums, q.stride(0), q.stride(1), num_segments, **constants, num_warps=warps
            )
        finish_kernel[(num,)](
            q, weights, *sight, *means_given, own, codes, sums, *out, q.stride(0), q.stride(1), weights.stride(0), num_segments,
            ACTIVE=active, **constants, num_warps=4 if apart else warps,
        )  # fmt: skip
