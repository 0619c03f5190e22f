# mypy: disable-error-code="no-untyped-def"
"""The Hopper kernel behind ``gluon.py`` for up to 32 heads, and how its warps share the work.

Persistent programs, one a multiprocessor, take equal runs of (block of queries, tile of 64 keys). In a program one warp fetches key tiles
through the copy engine into a ring in shared memory, and two groups of four warps consume every tile, each for its own half of the
block's queries. With 32 heads these are two chunks of 128 (query, head) columns; with fewer it is one, which takes two tiles a turn. So one
product is made while the other is summed up.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from thresher.ops.index_score.gluon_share import share
from thresher.ops.index_score.gluon_tiles import (
    KEYS,
    NO_REQUEST,
    absent,
    chunk_sums,
    fetch,
    find_pages,
    live,
    load_queries,
    multiply,
    ring,
    scale_ring,
    sight,
    there,
    whole_sums,
)


@gluon.jit
def fetch_tiles(
    unit, last, k_desc, s_desc, low, high, owners, lengths, page_table, num_queries, num_keys, num_requests, num_pages, width, table_row,
    buffers, scale_buffers, full, empty,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Fetch every tile of the units ``unit .. last - 1`` that a consumer will ask for, in the same order, ``TILES`` at a time."""
    row = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [1], [0]))
    nowhere = absent()
    tiles = (width + KEYS - 1) // KEYS
    turn = 0
    while unit < last:
        first, t0 = unit // tiles * BLOCK, unit % tiles
        t1 = gl.minimum(tiles, t0 + last - unit)
        start, end, owner = sight(first + row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            begin, stop = live(start, end, owner == current, t0, t1)
            table = page_table + current.to(gl.int64) * table_row
            page0, page1, valid0, valid1 = begin * 0, begin * 0, begin < begin, begin < begin
            if begin < stop:
                page0, page1, valid0, valid1 = find_pages(table, begin, stop, num_pages, PAGE, TILES)
            for tile in range(begin, stop, TILES):
                slot = turn % STAGES
                # Asked for one turn ahead, so that nothing waits for the answer.
                ahead0, ahead1, next0, next1 = find_pages(table, tile + TILES, stop, num_pages, PAGE, TILES)
                mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
                fetch(
                    k_desc, s_desc, page0, page1, valid0, valid1, tile, gl.minimum(tile + 1, stop - 1), slot, turn % (2 * STAGES), full,
                    buffers, scale_buffers, nowhere, D, PAGE, TILES,
                )  # fmt: skip
                page0, page1, valid0, valid1 = ahead0, ahead1, next0, next1
                turn += 1
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        unit += t1 - t0


@gluon.jit
def scales_of(buffer, LAYOUT: gl.constexpr):
    """A tile's scales ``[64]`` from shared memory."""
    return buffer.reshape([KEYS]).load(LAYOUT)


@gluon.jit
def fill(out, row, keep, t0, t1, width, out_row, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf into the tiles ``t0 .. t1 - 1`` of the rows to keep."""
    for tile in range(t0, t1):
        column = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        value = gl.full([ROWS, KEYS], float("-inf"), gl.float32, LAYOUT)
        gl.store(out + row.to(gl.int64)[:, None] * out_row + column[None, :], value, mask=keep[:, None] & (column < width)[None, :])


@gluon.jit
def _store(
    sums, scale, tile, inner, own_start, own_end, own_owner, current, key, at, block_out, width,
):  # fmt: skip
    """A tile's scores from its sums ``[64, ROWS]``; where not all of its rows see all of it (``inner``), what they do not see is -inf.

    A page that is not there is seen by nobody.
    """
    n0 = tile * KEYS
    # Times the scale and + 0.0 in one: the bits of (sum + 0.0) * scale.
    score = there(gl.fma(sums, scale[:, None], 0.0), scale[:, None])
    if inner:
        gl.store(block_out + n0 + at, score)
    else:
        column = n0 + key[:, None]
        score = gl.where((column >= own_start[None, :]) & (column < own_end[None, :]), score, float("-inf"))
        gl.store(block_out + n0 + at, score, mask=(own_owner == current)[None, :] & (column < width))


@gluon.jit
def _consumer(
    unit, last, q, weights, low, high, owners, lengths, out, num_queries, num_heads, num_keys, num_requests, width,
    q_row, q_head, w_row, out_row, buffers, scale_buffers, q_buffers, full, empty,
    HALF: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    PAGE: gl.constexpr, HEADS: gl.constexpr, HB: gl.constexpr, SUB: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Score the units ``unit .. last - 1`` for half ``HALF`` of a block's queries, ``ROWS`` of them; ``q_buffers`` hold its chunks."""
    CHUNKS: gl.constexpr = 3 - TILES
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SUB * HB * 8, 32])
    FILL: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    zero = gl.zeros([KEYS, SUB * HB * 8], gl.float32, ACC)
    # Computed for its layout alone.
    TOTAL: gl.constexpr = gl.reshape(whole_sums(chunk_sums(zero, zero, zero, SUB, HB, True), SUB), [KEYS, ROWS]).type.layout
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, TOTAL))
    query = gl.arange(0, ROWS, layout=gl.SliceLayout(0, TOTAL))
    tiles = (width + KEYS - 1) // KEYS
    turn = 0
    while unit < last:
        block, t0 = unit // tiles * BLOCK, unit % tiles
        t1 = gl.minimum(tiles, t0 + last - unit)
        first = block + HALF * ROWS
        w0, w1 = load_queries(
            q, weights, first, num_queries, num_heads, q_row, q_head, w_row, q_buffers, zero, HALF, HEADS, D, HB, SUB, ACC, False
        )
        q0 = q_buffers.index(HALF * CHUNKS).permute((1, 0))
        q1 = q_buffers.index(HALF * CHUNKS + CHUNKS - 1).permute((1, 0))

        # The block's rows decide which tiles there are, this consumer's which are stored, and in which layouts those are asked.
        row = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, ACC))
        start, end, owner = sight(block + row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        own = (row >= HALF * ROWS) & (row < HALF * ROWS + ROWS)
        own_row = first + query
        own_start, own_end, own_owner = sight(own_row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        at = query[None, :] * out_row + key[:, None]
        block_out = out + first.to(gl.int64) * out_row
        fill_row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, FILL))
        _, _, fill_owner = sight(fill_row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)

        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            mine = owner == current
            begin, stop = live(start, end, mine, t0, t1)
            # Keys that every row of this consumer sees; none when one of them is absent or another request's.
            inner_low = gl.max(gl.where(own, gl.where(mine, start, NO_REQUEST), 0), 0)
            inner_high = gl.min(gl.where(own, gl.where(mine, end, 0), NO_REQUEST), 0)
            for tile in range(begin, stop, TILES):
                n0 = tile * KEYS
                inner = (n0 >= inner_low) & (n0 + TILES * KEYS <= inner_high)
                slot = turn % STAGES
                mbarrier.wait(full.index(slot), turn // STAGES & 1)
                acc0 = multiply(buffers, q0, slot * TILES, zero, STAGES * TILES, D)
                acc1 = multiply(buffers, q1, slot * TILES + TILES - 1, zero, STAGES * TILES, D)
                scale_slot = turn % (2 * STAGES) * TILES
                scale0 = scales_of(scale_buffers.index(scale_slot), gl.SliceLayout(1, TOTAL))
                scale1 = scales_of(scale_buffers.index(scale_slot + TILES - 1), gl.SliceLayout(1, TOTAL))
                sums = chunk_sums(warpgroup_mma_wait(1, [acc0]), w0, zero, SUB, HB, True)
                if TILES == 2:
                    _store(
                        gl.reshape(whole_sums(sums, SUB), [KEYS, ROWS]), scale0, tile, inner, own_start, own_end, own_owner, current, key,
                        at, block_out, width,
                    )  # fmt: skip
                dots = warpgroup_mma_wait(0, [acc1])
                mbarrier.arrive(empty.index(slot))
                sums = gl.reshape(whole_sums(chunk_sums(dots, w1, sums, SUB, HB, TILES == 2), SUB), [KEYS, ROWS])
                if TILES == 1:
                    _store(sums, scale0, tile, inner, own_start, own_end, own_owner, current, key, at, block_out, width)
                elif tile + 1 < stop:
                    _store(sums, scale1, tile + 1, inner, own_start, own_end, own_owner, current, key, at, block_out, width)
                turn += 1
            keep = fill_owner == current
            fill(out, fill_row, keep, t0, begin, width, out_row, ROWS, FILL)
            fill(out, fill_row, keep, stop, t1, width, out_row, ROWS, FILL)
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        unit += t1 - t0


@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "num_requests", "num_pages", "width"])
def prefill_kernel(
    k_desc, s_desc, q, weights, low, high, owners, lengths, page_table, out,
    num_queries, num_heads, num_keys, num_requests, num_pages, width, q_row, q_head, w_row, table_row, out_row,
    BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
    HEADS: gl.constexpr, HB: gl.constexpr, SUB: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """``num_keys``: keys there are, or that the page table has room for. ``PAGE`` 0: keys are contiguous."""
    buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * TILES, 1, KEYS, D], gl.NVMMASharedLayout(D, 8, 3))
    scale_buffers = scale_ring(STAGES * TILES)
    q_buffers = gl.allocate_shared_memory(gl.float8e4nv, [6 - 2 * TILES, SUB * HB * 8, D], gl.NVMMASharedLayout(D, 8, 2))
    full, empty = ring(STAGES, 2)
    unit, last = share((num_queries + BLOCK - 1) // BLOCK, (width + KEYS - 1) // KEYS, low, high, num_queries, BLOCK, PAGE > 0)
    gl.warp_specialize(
        [
            (_consumer, (
                unit, last, q, weights, low, high, owners, lengths, out, num_queries, num_heads, num_keys, num_requests, width,
                q_row, q_head, w_row, out_row, buffers, scale_buffers, q_buffers, full, empty,
                0, BLOCK, ROWS, STAGES, D, PAGE, HEADS, HB, SUB, TILES,
            )),
            (_consumer, (
                unit, last, q, weights, low, high, owners, lengths, out, num_queries, num_heads, num_keys, num_requests, width,
                q_row, q_head, w_row, out_row, buffers, scale_buffers, q_buffers, full, empty,
                1, BLOCK, ROWS, STAGES, D, PAGE, HEADS, HB, SUB, TILES,
            )),
            (fetch_tiles, (
                unit, last, k_desc, s_desc, low, high, owners, lengths, page_table, num_queries, num_keys, num_requests, num_pages, width,
                table_row, buffers, scale_buffers, full, empty, BLOCK, STAGES, D, PAGE, TILES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
