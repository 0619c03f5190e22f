# mypy: disable-error-code="no-untyped-def"
"""``gluon_kernels.py`` for 33 to 64 heads, with four groups of four warps (``index_score/gluon_quads.py``).

Programs take turns at units (block of queries, run), where run r of R holds every R-th tile of 64 keys from tile r on. A thread has one
place of every tile and one query, and a list of its own for them. Registers are all in use: one more, and the loop spills. So it has as
little to keep as can be, a bar that scores must not be below, in tiles where no row of the block changes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from thresher.ops.index_score.gluon_quads import BLOCK, GROUPS, QUERIES, lanes, load_queries, places, scales_of, sums_of_heads
from thresher.ops.index_score.gluon_tiles import COLUMNS, KEYS, NO_REQUEST, absent, find_page, live, ring, scale_ring, sight
from thresher.ops.score_select.gluon_lists import (
    SPAN,
    append_careful,
    append_quick,
    first_of_run,
    look_ahead,
    read_rows,
    turns_ahead,
)


@gluon.jit
def _producer(
    k_desc, s_desc, owners, positions, lengths, page_table, num_queries, num_keys, num_requests, num_pages, runs, table_row,
    buffers, scale_buffers, full, empty, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Fetch every tile and its scales that a consumer will ask for, in the same order."""
    row = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [1], [0]))
    nowhere = absent()
    tiles = num_keys // KEYS
    turn = 0
    for unit in range(gl.program_id(0), (num_queries + BLOCK - 1) // BLOCK * runs, gl.num_programs(0)):
        rows = unit // runs * BLOCK + row
        start, end, owner = sight(rows, positions, positions, owners, lengths, num_queries, num_keys, num_requests, True)
        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            mine = owner == current
            begin, stop = live(start, end, mine, 0, tiles)
            tile = first_of_run(begin, unit % runs, runs)
            table = page_table + current.to(gl.int64) * table_row
            page, valid = begin * 0, begin < begin
            if tile < stop:
                page, valid = find_page(table, tile, num_pages, PAGE)
            for now in range(tile, stop, runs):
                # Asked for one tile ahead, so that nothing waits for the answer.
                page_ahead, valid_ahead = find_page(table, gl.minimum(now + runs, stop - 1), num_pages, PAGE)
                slot = turn & (STAGES - 1)
                scales = scale_buffers.index(turn & (2 * STAGES - 1))
                mbarrier.wait(empty.index(slot), (turn & STAGES) // STAGES ^ 1)
                if valid:
                    mbarrier.expect(full.index(slot), KEYS * D + KEYS * 4)
                    tma.async_copy_global_to_shared(s_desc, [page, PAGE * D // 4 + now * KEYS % PAGE], full.index(slot), scales)
                else:  # a page that is not there is seen by nobody: no score passes
                    scales.store(nowhere)
                    fence_async_shared()
                    mbarrier.expect(full.index(slot), KEYS * D)
                tma.async_copy_global_to_shared(k_desc, [page, now * KEYS % PAGE, 0], full.index(slot), buffers.index(slot))
                turn += 1
                page, valid = page_ahead, valid_ahead
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)


@gluon.jit
def _score(
    buffers, scale_buffers, full, empty, mat, w, lane, zero, turn, STAGES: gl.constexpr, D: gl.constexpr, PLACE: gl.constexpr
):  # fmt: skip
    """A tile's scores for a chunk."""
    slot = turn & (STAGES - 1)
    mbarrier.wait(full.index(slot), (turn & STAGES) // STAGES)
    acc = warpgroup_mma(buffers.index(slot).reshape([KEYS, D]), mat, zero, use_acc=False, is_async=True)
    scale = scales_of(scale_buffers.index(turn & (2 * STAGES - 1)), PLACE)
    dots = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(empty.index(slot))
    return gl.fma(sums_of_heads(dots, w, lane, zero), scale, 0.0)


@gluon.jit
def _consumer(
    q, weights, owners, positions, lengths, levels, level_keys, found, counts,
    num_queries, num_heads, num_keys, num_requests, runs, found_row, q_row, q_head, w_row,
    buffers, scale_buffers, q_buffers, full, empty,
    WHICH: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """Score all tiles of a unit for the block's chunk ``WHICH``, and append what passes."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    zero = gl.zeros([KEYS, COLUMNS], gl.float32, ACC)
    lane = lanes(zero)
    PLACE: gl.constexpr = sums_of_heads(zero, zero, lane, zero).type.layout
    place, query = places(PLACE)
    tiles = num_keys // KEYS
    turn = 0
    for unit in range(gl.program_id(0), (num_queries + BLOCK - 1) // BLOCK * runs, gl.num_programs(0)):
        block, run = unit // runs * BLOCK, unit % runs
        first = block + WHICH * QUERIES
        w = load_queries(q, weights, first, num_queries, num_heads, q_row, q_head, w_row, q_buffers.index(WHICH), zero, D, ACC)
        mat = q_buffers.index(WHICH).permute((1, 0))
        # Of the block's rows, which decide what tiles there are and in which of them care is due; and of the thread's own.
        row = block + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, ACC))
        end, owner, _level, ties = read_rows(row, owners, positions, lengths, levels, level_keys, num_queries, num_keys, num_requests)
        own = first + query
        own_end, own_owner, level, tie_end = read_rows(
            own, owners, positions, lengths, levels, level_keys, num_queries, num_keys, num_requests
        )
        index = (own * runs + run) * KEYS + place
        list_start = (own * found_row + (run * KEYS + place) * ROOM) * 8
        at = list_start

        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            mine = owner == current
            begin, stop = live(end * 0, end, mine, 0, tiles)
            tile = first_of_run(begin, run, runs)
            last = gl.where(own_owner == current, own_end, 0)
            ends, ties_here = gl.where(mine, end, 0), gl.where(mine, ties, 0)
            while tile < stop:
                overfull = at - list_start > ROOM * 8
                edge, bar = look_ahead(tile, runs, ends, ties_here, last, level, tie_end, overfull, SPAN, KEYS)
                quick, careful, upto = turns_ahead(tile, stop, edge, runs, SPAN)
                for now in range(tile, quick, runs):
                    score = _score(buffers, scale_buffers, full, empty, mat, w, lane, zero, turn, STAGES, D, PLACE)
                    at = append_quick(score, bar, now * KEYS + place, at, found)
                    turn += 1
                for now in range(careful, upto, runs):
                    score = _score(buffers, scale_buffers, full, empty, mat, w, lane, zero, turn, STAGES, D, PLACE)
                    at = append_careful(score, now * KEYS + place, last, level, tie_end, at, found, list_start, ROOM)
                    turn += 1
                tile = upto
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        gl.store(counts + index, (at - list_start) // 8, mask=own < num_queries)


@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "num_requests", "num_pages", "runs"])
def collect_quads_kernel(
    k_desc, s_desc, q, weights, owners, positions, lengths, page_table, levels, level_keys, found, counts,
    num_queries, num_heads, num_keys, num_requests, num_pages, runs, found_row, q_row, q_head, w_row, table_row,
    STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, KEYS, D], gl.NVMMASharedLayout(D, 8, 3))
    scale_buffers = scale_ring(STAGES)
    q_buffers = gl.allocate_shared_memory(gl.float8e4nv, [GROUPS, COLUMNS, D], gl.NVMMASharedLayout(D, 8, 2))
    full, empty = ring(STAGES, GROUPS)
    gl.warp_specialize(
        [
            (_consumer, (q, weights, owners, positions, lengths, levels, level_keys, found, counts,
                num_queries, num_heads, num_keys, num_requests, runs, found_row, q_row, q_head, w_row,
                buffers, scale_buffers, q_buffers, full, empty, 0, STAGES, D, ROOM)),
            (_consumer, (q, weights, owners, positions, lengths, levels, level_keys, found, counts,
                num_queries, num_heads, num_keys, num_requests, runs, found_row, q_row, q_head, w_row,
                buffers, scale_buffers, q_buffers, full, empty, 1, STAGES, D, ROOM)),
            (_consumer, (q, weights, owners, positions, lengths, levels, level_keys, found, counts,
                num_queries, num_heads, num_keys, num_requests, runs, found_row, q_row, q_head, w_row,
                buffers, scale_buffers, q_buffers, full, empty, 2, STAGES, D, ROOM)),
            (_consumer, (q, weights, owners, positions, lengths, levels, level_keys, found, counts,
                num_queries, num_heads, num_keys, num_requests, runs, found_row, q_row, q_head, w_row,
                buffers, scale_buffers, q_buffers, full, empty, 3, STAGES, D, ROOM)),
            (_producer, (k_desc, s_desc, owners, positions, lengths, page_table, num_queries, num_keys, num_requests, num_pages, runs,
                table_row, buffers, scale_buffers, full, empty, STAGES, D, PAGE)),
        ],
        [4, 4, 4, 1],
        [112, 112, 112, 24],
    )  # fmt: skip
