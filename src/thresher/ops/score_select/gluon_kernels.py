# mypy: disable-error-code="no-untyped-def"
"""Scores of a prefill over up to 32 heads that are never stored: what lies above each row's level goes to short lists.

The work is shared as in ``index_score/gluon_kernels.py``, but for the order: programs take turns at units (block of queries, run), where
run r of R holds every R-th turn of keys from turn r on. A turn is ``TILES`` tiles of 64 keys. A thread has the same places of every tile,
and a list of its own for each of its rows, so that appending asks nobody. They fill alike even where all its best keys stand together.

With 32 heads a consumer multiplies a tile with two chunks (``index_score/gluon_tiles.py``), with fewer two tiles with one chunk: it always
has two products at once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

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
    whole_sums,
)
from thresher.ops.score_select.gluon_lists import (
    SPAN,
    append_two,
    first_of_run,
    halves,
    look_ahead,
    read_rows,
    rows_and_places,
    turns_ahead,
)

PLACES = gl.constexpr(32)  # lists of a run: a thread has two keys of a tile


@gluon.jit
def _turns(begin, stop, run, runs, TILES: gl.constexpr):
    """The first turn of the run that has tiles from ``begin`` on, and the turn after all those with tiles before ``stop``."""
    return first_of_run(begin // TILES, run, runs), (stop + TILES - 1) // TILES


@gluon.jit
def _producer(
    k_desc, s_desc, owners, positions, lengths, page_table, num_queries, num_keys, num_requests, num_pages, runs, table_row,
    buffers, scale_buffers, full, empty,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Fetch every tile that a consumer will ask for, in the same order."""
    nowhere = absent()
    row = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [1], [0]))
    tiles = num_keys // KEYS
    count = 0
    for unit in range(gl.program_id(0), (num_queries + BLOCK - 1) // BLOCK * runs, gl.num_programs(0)):
        rows = unit // runs * BLOCK + row
        start, end, owner = sight(rows, positions, positions, owners, lengths, num_queries, num_keys, num_requests, True)
        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            mine = owner == current
            begin, stop = live(start, end, mine, 0, tiles)
            first, last = _turns(begin, stop, unit % runs, runs, TILES)
            table = page_table + current.to(gl.int64) * table_row
            page0, page1, valid0, valid1 = begin * 0, begin * 0, begin < begin, begin < begin
            if first < last:
                page0, page1, valid0, valid1 = find_pages(table, first * TILES, stop, num_pages, PAGE, TILES)
            for turn in range(first, last, runs):
                slot = count & (STAGES - 1)
                # Asked for one turn ahead, so that nothing waits for the answer.
                ahead0, ahead1, next0, next1 = find_pages(table, (turn + runs) * TILES, stop, num_pages, PAGE, TILES)
                mbarrier.wait(empty.index(slot), (count & STAGES) // STAGES ^ 1)
                fetch(
                    k_desc, s_desc, page0, page1, valid0, valid1, turn * TILES, turn * TILES + 1, slot, count & (2 * STAGES - 1),
                    full, buffers, scale_buffers, nowhere, D, PAGE, TILES,
                )  # fmt: skip
                page0, page1, valid0, valid1 = ahead0, ahead1, next0, next1
                count += 1
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)


@gluon.jit
def scales_of(buffer, sums, SUB: gl.constexpr):
    """A tile's scales beside a thread's scores of two keys 8 apart; ``sums [64, SUB, 2, 4]`` lends its layout.

    Nothing passes that is times a missing page's.
    """
    SUMS: gl.constexpr = sums.type.layout
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, SUMS)))
    scale = gl.expand_dims(gl.expand_dims(gl.expand_dims(buffer.reshape([KEYS]).load(LAYOUT), 1), 2), 3)
    return halves(scale + gl.zeros([KEYS, SUB, 2, 4], gl.float32, SUMS), SUB)


@gluon.jit
def _take(
    turn, count, buffers, scale_buffers, full, empty, q0, q1, w0, w1, zero, lent, nothing, place,
    quick, bar, end, level, tie_end, at, lists, list_start,
    STAGES: gl.constexpr, D: gl.constexpr, HB: gl.constexpr, SUB: gl.constexpr, ROOM: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Score a turn and append what passes, by the bar alone if ``quick``; returns where the lists go on."""
    key = turn * (TILES * KEYS) + place
    slot = count & (STAGES - 1)
    mbarrier.wait(full.index(slot), (count & STAGES) // STAGES)
    acc0 = multiply(buffers, q0, slot * TILES, zero, STAGES * TILES, D)
    acc1 = multiply(buffers, q1, slot * TILES + TILES - 1, zero, STAGES * TILES, D)
    scale_slot = (count & (2 * STAGES - 1)) * TILES
    a0, a1 = scales_of(scale_buffers.index(scale_slot), lent, SUB)
    b0, b1 = scales_of(scale_buffers.index(scale_slot + TILES - 1), lent, SUB)
    # Times the scale and + 0.0 in one: (sum + 0.0) * scale has the same bits, -0.0 among them, since no scale is negative.
    sums = chunk_sums(warpgroup_mma_wait(1, [acc0]), w0, zero, SUB, HB, True)
    if TILES == 2:
        s0, s1 = halves(whole_sums(sums, SUB), SUB)
        s0, s1 = gl.fma(s0, a0, nothing), gl.fma(s1, a1, nothing)
        # Here and not below, so that it is done while the other tile is multiplied.
        at = append_two(s0, s1, quick, bar, key, end, level, tie_end, at, lists, list_start, ROOM)
        key += KEYS
    dots = warpgroup_mma_wait(0, [acc1])
    mbarrier.arrive(empty.index(slot))
    s0, s1 = halves(whole_sums(chunk_sums(dots, w1, sums, SUB, HB, TILES == 2), SUB), SUB)
    s0, s1 = gl.fma(s0, b0, nothing), gl.fma(s1, b1, nothing)
    return append_two(s0, s1, quick, bar, key, end, level, tie_end, at, lists, list_start, ROOM)


@gluon.jit
def _consumer(
    q, weights, owners, positions, lengths, levels, level_keys, found, counts,
    num_queries, num_heads, num_keys, num_requests, runs, found_row, q_row, q_head, w_row,
    buffers, scale_buffers, q_buffers, full, empty,
    HALF: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    PAGE: gl.constexpr, HB: gl.constexpr, SUB: gl.constexpr, ROOM: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Score all turns of a unit for half ``HALF`` of the block's queries, ``ROWS`` of them; ``q_buffers`` hold its chunks."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SUB * HB * 8, 32])
    CHUNKS: gl.constexpr = 3 - TILES
    zero = gl.zeros([KEYS, SUB * HB * 8], gl.float32, ACC)
    # Computed for its layout alone.
    lent = gl.sum(gl.reshape(zero, [KEYS, SUB, HB, 2, 4]), 2)
    half, _half = halves(lent, SUB)
    PLACE: gl.constexpr = half.type.layout
    nothing = gl.zeros([4, 8, SUB, 2, 4], gl.float32, PLACE)
    inside, place, which = rows_and_places(SUB, PLACE)
    tiles = num_keys // KEYS
    count = 0
    for unit in range(gl.program_id(0), (num_queries + BLOCK - 1) // BLOCK * runs, gl.num_programs(0)):
        block, run = unit // runs * BLOCK, unit % runs
        first_row = block + HALF * ROWS
        w0, w1 = load_queries(
            q, weights, first_row, num_queries, num_heads, q_row, q_head, w_row, q_buffers, zero, HALF, HEADS, D, HB, SUB, ACC, True
        )
        q0 = q_buffers.index(HALF * CHUNKS).permute((1, 0))
        q1 = q_buffers.index(HALF * CHUNKS + CHUNKS - 1).permute((1, 0))
        # Of the block's rows, which decide what tiles there are and in which of them care is due; and of the thread's own.
        row = block + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, ACC))
        end, owner, _level, ties = read_rows(row, owners, positions, lengths, levels, level_keys, num_queries, num_keys, num_requests)
        own_row = first_row + inside
        lists = found + first_row.to(gl.int64) * found_row
        list_start = (inside * found_row + (run * PLACES + which) * ROOM) * 8
        at = list_start

        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            here = owner == current
            begin, stop = live(end * 0, end, here, 0, tiles)
            first, last = _turns(begin, stop, run, runs, TILES)
            own_end, own_owner, level, tie_end = read_rows(
                own_row, owners, positions, lengths, levels, level_keys, num_queries, num_keys, num_requests
            )
            mine = gl.where(own_owner == current, own_end, 0)
            ends, ties_here = gl.where(here, end, 0), gl.where(here, ties, 0)
            # One loop with a branch in it for 32 heads, two without for fewer: the other way around each is slower (docs/lab-log.md).
            if TILES == 1:
                edge, bar = first, nothing
                for turn in range(first, last, runs):
                    quick = turn < edge
                    at = _take(
                        turn, count, buffers, scale_buffers, full, empty, q0, q1, w0, w1, zero, lent, nothing, place,
                        quick, bar, mine, level, tie_end, at, lists, list_start, STAGES, D, HB, SUB, ROOM, TILES,
                    )  # fmt: skip
                    if not quick:
                        overfull = at - list_start > ROOM * 8
                        edge, bar = look_ahead(turn + runs, runs, ends, ties_here, mine, level, tie_end, overfull, SPAN, KEYS)
                    count += 1
            else:
                while first < last:
                    overfull = at - list_start > ROOM * 8
                    edge, bar = look_ahead(first, runs, ends, ties_here, mine, level, tie_end, overfull, SPAN // 2, 2 * KEYS)
                    quick, careful, upto = turns_ahead(first, last, edge, runs, SPAN // 2)
                    for turn in range(first, quick, runs):
                        at = _take(
                            turn, count, buffers, scale_buffers, full, empty, q0, q1, w0, w1, zero, lent, nothing, place,
                            True, bar, mine, level, tie_end, at, lists, list_start, STAGES, D, HB, SUB, ROOM, TILES,
                        )  # fmt: skip
                        count += 1
                    for turn in range(careful, upto, runs):
                        at = _take(
                            turn, count, buffers, scale_buffers, full, empty, q0, q1, w0, w1, zero, lent, nothing, place,
                            False, bar, mine, level, tie_end, at, lists, list_start, STAGES, D, HB, SUB, ROOM, TILES,
                        )  # fmt: skip
                        count += 1
                    first = upto
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        gl.store(counts + (own_row * runs + run) * PLACES + which, (at - list_start) // 8, mask=own_row < num_queries)


@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "num_requests", "num_pages", "runs"])
def collect_kernel(
    k_desc, s_desc, q, weights, owners, positions, lengths, page_table, levels, level_keys, found, counts,
    num_queries, num_heads, num_keys, num_requests, num_pages, runs, found_row, q_row, q_head, w_row, table_row,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
    HB: gl.constexpr, SUB: gl.constexpr, ROOM: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """``num_keys``: keys that the page table has room for. ``counts`` int32 ``[Q, runs, places]``, ``found`` int64 such rows of ``ROOM``
    entries, ``found_row`` apart: an overfull list runs on into the next, or past the row's last by what ``SPAN`` tiles bring."""
    buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * TILES, 1, KEYS, D], gl.NVMMASharedLayout(D, 8, 3))
    scale_buffers = scale_ring(STAGES * TILES)
    q_buffers = gl.allocate_shared_memory(gl.float8e4nv, [6 - 2 * TILES, SUB * HB * 8, D], gl.NVMMASharedLayout(D, 8, 2))
    full, empty = ring(STAGES, 2)
    gl.warp_specialize(
        [
            (_consumer, (
                q, weights, owners, positions, lengths, levels, level_keys, found, counts,
                num_queries, num_heads, num_keys, num_requests, runs, found_row, q_row, q_head, w_row,
                buffers, scale_buffers, q_buffers, full, empty, 0, HEADS, BLOCK, ROWS, STAGES, D, PAGE, HB, SUB, ROOM, TILES,
            )),
            (_consumer, (
                q, weights, owners, positions, lengths, levels, level_keys, found, counts,
                num_queries, num_heads, num_keys, num_requests, runs, found_row, q_row, q_head, w_row,
                buffers, scale_buffers, q_buffers, full, empty, 1, HEADS, BLOCK, ROWS, STAGES, D, PAGE, HB, SUB, ROOM, TILES,
            )),
            (_producer, (
                k_desc, s_desc, owners, positions, lengths, page_table, num_queries, num_keys, num_requests, num_pages, runs,
                table_row, buffers, scale_buffers, full, empty, BLOCK, STAGES, D, PAGE, TILES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
