# mypy: disable-error-code="no-untyped-def"
"""``gluon_kernels.py`` for 33 to 64 heads, with four groups of four warps (``gluon_quads.py``): shares, tiles and rows as there."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from thresher.ops.index_score.gluon_kernels import fetch_tiles, fill
from thresher.ops.index_score.gluon_quads import BLOCK, GROUPS, QUERIES, lanes, load_queries, places, scales_of, sums_of_heads
from thresher.ops.index_score.gluon_share import share
from thresher.ops.index_score.gluon_tiles import COLUMNS, KEYS, NO_REQUEST, live, ring, scale_ring, sight, there


@gluon.jit
def _consumer(
    unit, last, q, weights, low, high, owners, lengths, out, num_queries, num_heads, num_keys, num_requests, width,
    q_row, q_head, w_row, out_row, buffers, scale_buffers, q_buffers, full, empty,
    WHICH: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Score the units ``unit .. last - 1`` for their blocks' chunk ``WHICH``."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    FILL: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    zero = gl.zeros([KEYS, COLUMNS], gl.float32, ACC)
    lane = lanes(zero)
    PLACE: gl.constexpr = sums_of_heads(zero, zero, lane, zero).type.layout
    place, query = places(PLACE)
    tiles = (width + KEYS - 1) // KEYS
    turn = 0
    while unit < last:
        block, t0 = unit // tiles * BLOCK, unit % tiles
        t1 = gl.minimum(tiles, t0 + last - unit)
        first = block + WHICH * QUERIES
        w = load_queries(q, weights, first, num_queries, num_heads, q_row, q_head, w_row, q_buffers.index(WHICH), zero, D, ACC)
        mat = q_buffers.index(WHICH).permute((1, 0))

        # The block's rows decide which tiles there are, this chunk's which are stored, and in which layouts those are asked.
        row = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, ACC))
        start, end, owner = sight(block + row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        own = (row >= WHICH * QUERIES) & (row < WHICH * QUERIES + QUERIES)
        own_start, own_end, own_owner = sight(first + query, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        at = query * out_row + place
        block_out = out + first.to(gl.int64) * out_row
        fill_row = first + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, FILL))
        _start, _end, fill_owner = sight(fill_row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)

        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            mine = owner == current
            begin, stop = live(start, end, mine, t0, t1)
            # Keys that every row of this chunk sees; none when one of them is absent or another request's.
            inner_low = gl.max(gl.where(own, gl.where(mine, start, NO_REQUEST), 0), 0)
            inner_high = gl.min(gl.where(own, gl.where(mine, end, 0), NO_REQUEST), 0)
            room = gl.where(own_owner == current, width, 0)
            for tile in range(begin, stop):
                n0 = tile * KEYS
                slot = turn & (STAGES - 1)
                mbarrier.wait(full.index(slot), (turn & STAGES) // STAGES)
                acc = warpgroup_mma(buffers.index(slot).reshape([KEYS, D]), mat, zero, use_acc=False, is_async=True)
                scale = scales_of(scale_buffers.index(turn & (2 * STAGES - 1)), PLACE)
                dots = warpgroup_mma_wait(0, [acc])
                mbarrier.arrive(empty.index(slot))
                score = there(gl.fma(sums_of_heads(dots, w, lane, zero), scale, 0.0), scale)
                if (n0 >= inner_low) & (n0 + KEYS <= inner_high):
                    gl.store(block_out + n0 + at, score)
                else:
                    key = n0 + place
                    score = gl.where((key >= own_start) & (key < own_end), score, float("-inf"))
                    gl.store(block_out + n0 + at, score, mask=key < room)
                turn += 1
            keep = fill_owner == current
            fill(out, fill_row, keep, t0, begin, width, out_row, QUERIES, FILL)
            fill(out, fill_row, keep, stop, t1, width, out_row, QUERIES, FILL)
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        unit += t1 - t0


@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "num_requests", "num_pages", "width"])
def prefill_quads_kernel(
    k_desc, s_desc, q, weights, low, high, owners, lengths, page_table, out,
    num_queries, num_heads, num_keys, num_requests, num_pages, width, q_row, q_head, w_row, table_row, out_row,
    STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, KEYS, D], gl.NVMMASharedLayout(D, 8, 3))
    scale_buffers = scale_ring(STAGES)
    q_buffers = gl.allocate_shared_memory(gl.float8e4nv, [GROUPS, COLUMNS, D], gl.NVMMASharedLayout(D, 8, 2))
    full, empty = ring(STAGES, GROUPS)
    unit, last = share((num_queries + BLOCK - 1) // BLOCK, (width + KEYS - 1) // KEYS, low, high, num_queries, BLOCK, PAGE > 0)
    gl.warp_specialize(
        [
            (_consumer, (unit, last, q, weights, low, high, owners, lengths, out, num_queries, num_heads, num_keys, num_requests,
                width, q_row, q_head, w_row, out_row, buffers, scale_buffers, q_buffers, full, empty, 0, STAGES, D, PAGE)),
            (_consumer, (unit, last, q, weights, low, high, owners, lengths, out, num_queries, num_heads, num_keys, num_requests,
                width, q_row, q_head, w_row, out_row, buffers, scale_buffers, q_buffers, full, empty, 1, STAGES, D, PAGE)),
            (_consumer, (unit, last, q, weights, low, high, owners, lengths, out, num_queries, num_heads, num_keys, num_requests,
                width, q_row, q_head, w_row, out_row, buffers, scale_buffers, q_buffers, full, empty, 2, STAGES, D, PAGE)),
            (_consumer, (unit, last, q, weights, low, high, owners, lengths, out, num_queries, num_heads, num_keys, num_requests,
                width, q_row, q_head, w_row, out_row, buffers, scale_buffers, q_buffers, full, empty, 3, STAGES, D, PAGE)),
            (fetch_tiles, (unit, last, k_desc, s_desc, low, high, owners, lengths, page_table, num_queries, num_keys, num_requests,
                num_pages, width, table_row, buffers, scale_buffers, full, empty, BLOCK, STAGES, D, PAGE, 1)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )  # fmt: skip
