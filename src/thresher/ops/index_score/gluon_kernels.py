# mypy: disable-error-code="no-untyped-def"
"""The Hopper kernel behind ``gluon.py`` for 17 to 32 heads, and how its warps share the work.

Persistent programs, one a multiprocessor, take equal runs of (block of queries, tile of 64 keys). In a program one warp fetches key tiles
through the copy engine into a ring in shared memory, and two groups of four warps consume every tile, each for its own half of the
block's queries: 256 (query, head) columns, in two chunks of 128, so that one chunk is multiplied while the other is summed up.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from thresher.ops.index_score.gluon_tiles import (
    COLUMNS,
    KEYS,
    NO_REQUEST,
    chunk_sums,
    find_page,
    live,
    load_queries,
    load_scales,
    multiply,
    ring,
    sight,
    wait_for_inputs,
    whole_sums,
)


SWITCH = gl.constexpr(3)  # tiles that could be scored while a program goes over to another block


@gluon.jit
def share(blocks, tiles):
    """This program's run of the units (block, tile): ``first, last``. Runs are even, or whole blocks where those are hardly longer."""
    program, programs, units = gl.program_id(0), gl.num_programs(0), blocks * tiles
    each, more = units // programs, units % programs
    whole = (blocks + programs - 1) // programs * tiles
    even = whole > each + SWITCH
    first = gl.where(even, program * each + gl.minimum(program, more), gl.minimum(program * whole, units))
    return first, gl.minimum(first + gl.where(even, each + gl.where(program < more, 1, 0), whole), units)


@gluon.jit
def fetch_tiles(
    k_desc, s_desc, low, high, owners, lengths, page_table, num_queries, num_keys, num_requests, num_pages, width, table_row,
    buffers, scale_buffers, full, empty,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """Fetch every tile that a consumer will ask for, in the same order; if ``SCALED`` its scales too."""
    row = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [1], [0]))
    tiles = (width + KEYS - 1) // KEYS
    unit, last = share((num_queries + BLOCK - 1) // BLOCK, tiles)
    turn = 0
    while unit < last:
        first, t0 = unit // tiles * BLOCK, unit % tiles
        t1 = gl.minimum(tiles, t0 + last - unit)
        start, end, owner = sight(first + row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            begin, stop = live(start, end, owner == current, t0, t1)
            table = page_table + current.to(gl.int64) * table_row
            page = begin * 0
            if begin < stop:
                page, _ = find_page(table, begin, num_pages, PAGE)
            for tile in range(begin, stop):
                slot = turn % STAGES
                # Asked for one tile ahead, so that nothing waits for the answer.
                page_ahead, _ = find_page(table, gl.minimum(tile + 1, stop - 1), num_pages, PAGE)
                mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(slot), KEYS * D + KEYS * 4 if SCALED else KEYS * D)
                offset = tile * KEYS % PAGE if PAGE > 0 else tile * KEYS
                if SCALED:
                    tma.async_copy_global_to_shared(s_desc, [page, PAGE * D // 4 + offset], full.index(slot), scale_buffers.index(slot))
                tma.async_copy_global_to_shared(k_desc, [page, offset, 0], full.index(slot), buffers.index(slot))
                page = page_ahead
                turn += 1
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        unit += t1 - t0


@gluon.jit
def fill(out, row, keep, t0, t1, width, out_row, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf into the tiles ``t0 .. t1 - 1`` of the rows to keep."""
    for tile in range(t0, t1):
        column = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        value = gl.full([ROWS, KEYS], float("-inf"), gl.float32, LAYOUT)
        gl.store(out + row.to(gl.int64)[:, None] * out_row + column[None, :], value, mask=keep[:, None] & (column < width)[None, :])


@gluon.jit
def _consumer(
    q, weights, scales, low, high, owners, lengths, page_table, out, num_queries, num_heads, num_keys, num_requests, num_pages, width,
    q_row, q_head, w_row, page_words, table_row, out_row, buffers, q_buffers, full, empty,
    HALF: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    PAGE: gl.constexpr, HEADS: gl.constexpr, HB: gl.constexpr,
):  # fmt: skip
    """Score all tiles for half ``HALF`` of a block's queries, ``ROWS`` of them; ``q_buffers`` hold its two chunks."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    FILL: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    zero = gl.zeros([KEYS, COLUMNS], gl.float32, ACC)
    # Computed for its layout alone.
    TOTAL: gl.constexpr = gl.reshape(whole_sums(chunk_sums(zero, zero, zero, 1, HB, True), 1), [KEYS, ROWS]).type.layout
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, TOTAL))
    query = gl.arange(0, ROWS, layout=gl.SliceLayout(0, TOTAL))
    tiles = (width + KEYS - 1) // KEYS
    unit, last = share((num_queries + BLOCK - 1) // BLOCK, tiles)
    turn = 0
    while unit < last:
        block, t0 = unit // tiles * BLOCK, unit % tiles
        t1 = gl.minimum(tiles, t0 + last - unit)
        first = block + HALF * ROWS
        w0, w1 = load_queries(
            q, weights, first, num_queries, num_heads, q_row, q_head, w_row, q_buffers, zero, HALF, HEADS, D, HB, 1, ACC
        )
        q0 = q_buffers.index(HALF * 2).permute((1, 0))
        q1 = q_buffers.index(HALF * 2 + 1).permute((1, 0))

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
            table = page_table + current.to(gl.int64) * table_row
            # Scales are asked for one tile ahead, pages two.
            page_ahead, valid, valid_ahead, scale = begin * 0, begin < begin, begin < begin, (key * 0).to(gl.float32)
            if begin < stop:
                page, valid = find_page(table, begin, num_pages, PAGE)
                scale = load_scales(scales, page, begin, key, num_keys, page_words, D, PAGE)
                page_ahead, valid_ahead = find_page(table, gl.minimum(begin + 1, stop - 1), num_pages, PAGE)
            for tile in range(begin, stop):
                n0 = tile * KEYS
                inner = valid & (n0 >= inner_low) & (n0 + KEYS <= inner_high)
                seen = gl.where(valid, own_end, 0)  # a page that is not there is seen by nobody
                now = scale
                scale = load_scales(scales, page_ahead, gl.minimum(tile + 1, stop - 1), key, num_keys, page_words, D, PAGE)
                valid = valid_ahead
                page_ahead, valid_ahead = find_page(table, gl.minimum(tile + 2, stop - 1), num_pages, PAGE)
                mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
                acc0 = multiply(buffers, q0, turn, zero, STAGES, D)
                acc1 = multiply(buffers, q1, turn, zero, STAGES, D)
                sums = chunk_sums(warpgroup_mma_wait(1, [acc0]), w0, zero, 1, HB, True)
                dots = warpgroup_mma_wait(0, [acc1])
                mbarrier.arrive(empty.index(turn % STAGES))
                sums = gl.reshape(whole_sums(chunk_sums(dots, w1, sums, 1, HB, False), 1), [KEYS, ROWS])
                # Times the scale and + 0.0 in one: the bits of (sum + 0.0) * scale.
                score = gl.fma(sums, now[:, None], 0.0)
                if inner:
                    gl.store(block_out + n0 + at, score)
                else:
                    column = n0 + key[:, None]
                    score = gl.where((column >= own_start[None, :]) & (column < seen[None, :]), score, float("-inf"))
                    gl.store(block_out + n0 + at, score, mask=(own_owner == current)[None, :] & (column < width))
                turn += 1
            keep = fill_owner == current
            fill(out, fill_row, keep, t0, begin, width, out_row, ROWS, FILL)
            fill(out, fill_row, keep, stop, t1, width, out_row, ROWS, FILL)
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        unit += t1 - t0


@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "num_requests", "num_pages", "width"])
def prefill_kernel(
    k_desc, q, weights, scales, low, high, owners, lengths, page_table, out,
    num_queries, num_heads, num_keys, num_requests, num_pages, width, q_row, q_head, w_row, page_words, table_row, out_row,
    BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
    HEADS: gl.constexpr, HB: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """``num_keys``: keys there are, or that the page table has room for. ``PAGE`` 0: keys are contiguous."""
    buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, KEYS, D], gl.NVMMASharedLayout(D, 8, 3))
    q_buffers = gl.allocate_shared_memory(gl.float8e4nv, [4, COLUMNS, D], gl.NVMMASharedLayout(D, 8, 2))
    wait_for_inputs(OVERLAP)  # the other warps start after this
    full, empty = ring(STAGES, 2)
    gl.warp_specialize(
        [
            (_consumer, (
                q, weights, scales, low, high, owners, lengths, page_table, out, num_queries, num_heads, num_keys, num_requests, num_pages,
                width, q_row, q_head, w_row, page_words, table_row, out_row, buffers, q_buffers, full, empty,
                0, BLOCK, ROWS, STAGES, D, PAGE, HEADS, HB,
            )),
            (_consumer, (
                q, weights, scales, low, high, owners, lengths, page_table, out, num_queries, num_heads, num_keys, num_requests, num_pages,
                width, q_row, q_head, w_row, page_words, table_row, out_row, buffers, q_buffers, full, empty,
                1, BLOCK, ROWS, STAGES, D, PAGE, HEADS, HB,
            )),
            (fetch_tiles, (
                k_desc, k_desc, low, high, owners, lengths, page_table, num_queries, num_keys, num_requests, num_pages, width, table_row,
                buffers, buffers, full, empty, BLOCK, STAGES, D, PAGE, False,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
