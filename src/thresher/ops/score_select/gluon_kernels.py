# mypy: disable-error-code="no-untyped-def"
"""Scores of a prefill that are never stored: what lies above each row's level goes to short lists.

The work is shared as in ``index_score/gluon_kernels.py``, but for the order: programs take turns at units (block of queries, run), where
run r of R holds every R-th tile of 64 keys from tile r on. So a row's lists, one for each run and each of the four warps that share
its tiles, fill alike even where all its best keys stand together.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait

from thresher.ops.index_score.gluon_tiles import (
    COLUMNS,
    KEYS,
    NO_REQUEST,
    chunk_sums,
    find_page,
    live,
    load_block,
    load_scales,
    multiply,
    row_numbers,
    sight,
    total,
)


@gluon.jit
def _first_of_run(begin, run, runs):
    """The first tile from ``begin`` on that belongs to the run."""
    return begin + (run + runs - begin % runs) % runs


@gluon.jit
def _producer(
    k_desc, owners, positions, lengths, page_table, num_queries, num_keys, num_requests, num_pages, runs, table_row, buffers, full, empty,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Fetch every tile that a consumer will ask for, in the same order."""
    row = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [1], [0]))
    tiles = num_keys // KEYS
    turn = 0
    for unit in range(gl.program_id(0), (num_queries + BLOCK - 1) // BLOCK * runs, gl.num_programs(0)):
        rows = unit // runs * BLOCK + row
        start, end, owner = sight(rows, positions, positions, owners, lengths, num_queries, num_keys, num_requests, True)
        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            begin, stop = live(start, end, owner == current, 0, tiles)
            begin = _first_of_run(begin, unit % runs, runs)
            table = page_table + current.to(gl.int64) * table_row
            page = begin * 0
            if begin < stop:
                page, _valid = find_page(table, begin, num_pages, PAGE)
            for tile in range(begin, stop, runs):
                slot = turn % STAGES
                # Asked for one tile ahead, so that nothing waits for the answer.
                page_ahead, _valid = find_page(table, gl.minimum(tile + runs, stop - 1), num_pages, PAGE)
                mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(slot), KEYS * D)
                tma.async_copy_global_to_shared(k_desc, [page, tile * KEYS % PAGE, 0], full.index(slot), buffers.index(slot))
                page = page_ahead
                turn += 1
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)


@gluon.jit
def _halves(x, SUB: gl.constexpr):
    """``[64, SUB, 4]`` to two of ``[4, 8, SUB, 4]``: the first and the last 8 of each warp's 16 keys. A thread holds one key of each."""
    return gl.split(gl.permute(gl.reshape(x, [4, 2, 8, SUB, 4]), (0, 2, 3, 4, 1)))


@gluon.jit
def _lane_masks(zero):
    """For every thread, the lanes of its warp that hold the same query and parity as it does, and the lanes before it."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 lane;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 3;
        mov.u32 $0, 0x11111111;
        shl.b32 $0, $0, lane;
        mov.u32 $1, %lanemask_lt;
        }""",
        "=&r,=&r,r",
        [zero],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _count_lanes(flags, same, before):
    """Of a thread's lanes ``same``, how many have their flag set: those ``before`` it, and all."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 b, c;
        setp.ne.s32 p, $2, 0;
        vote.sync.ballot.b32 b, p, 0xffffffff;
        and.b32 b, b, $3;
        and.b32 c, b, $4;
        popc.b32 $1, b;
        popc.b32 $0, c;
        }""",
        "=&r,=&r,r,r,r",
        [flags, same, before],
        dtype=(gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _append(
    score, scale, key, end, mine, level, level_key, count, list_at, found, same, before, ROOM: gl.constexpr, SUB: gl.constexpr
):  # fmt: skip
    """Append a tile's scores above the level to their rows' lists, as (score bits, key); each warp to its own list, keys ascending.

    Above means a larger score, or the level's own score at a key up to the level's. ``count`` int32 ``[4, 8, SUB, 4]`` is a list's length,
    which goes on counting where its ROOM ends. Returns the new count.
    """
    score = score * gl.expand_dims(gl.expand_dims(scale, 1), 2)
    keep = (score > level) | ((score == level) & (key <= level_key))
    keep = (keep & (key < end) & mine).to(gl.int32)
    low_keep, high_keep = _halves(keep, SUB)
    low_bits, high_bits = _halves(score.to(gl.int32, bitcast=True), SUB)
    low_key, high_key = _halves(key + keep * 0, SUB)
    low_before, low_all = _count_lanes(low_keep, same, before)
    high_before, high_all = _count_lanes(high_keep, same, before)
    at = count + low_before
    pair = (low_bits.to(gl.int64) << 32) | low_key.to(gl.int64)
    gl.store(found + list_at + at, pair, mask=(low_keep != 0) & (at < ROOM))
    at = count + low_all + high_before
    pair = (high_bits.to(gl.int64) << 32) | high_key.to(gl.int64)
    gl.store(found + list_at + at, pair, mask=(high_keep != 0) & (at < ROOM))
    return count + low_all + high_all


@gluon.jit
def _lists(first, run, runs, num_queries, same, ROOM: gl.constexpr, SUB: gl.constexpr, PART: gl.constexpr):
    """For every element of ``[4, 8, SUB, 4]``: the number of its list (row, run, warp), and whether the row is there."""
    warp = gl.arange(0, 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PART))))
    sub = gl.arange(0, SUB, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, PART))))
    query = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PART))))
    warp = gl.expand_dims(gl.expand_dims(gl.expand_dims(warp, 1), 2), 3)
    sub = gl.expand_dims(gl.expand_dims(gl.expand_dims(sub, 0), 1), 3)
    query = gl.expand_dims(gl.expand_dims(gl.expand_dims(query, 0), 1), 2)
    row = first + sub * 4 + query
    number = (row * runs + run) * 4 + warp + same * 0
    return number, (row < num_queries) & (number >= 0)


@gluon.jit
def _consumer(
    q, weights, scales, owners, positions, lengths, page_table, levels, level_keys, found, counts,
    num_queries, num_heads, num_keys, num_requests, num_pages, runs, q_row, q_head, w_row, page_words, table_row,
    buffers, q_buffers, full, empty,
    HALF: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    PAGE: gl.constexpr, HB: gl.constexpr, SUB: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """Score all tiles of a unit for half ``HALF`` of the block's queries, ``ROWS`` of them; ``q_buffers`` hold its two chunks."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    zero = gl.zeros([KEYS, COLUMNS], gl.float32, ACC)
    # Computed for their layouts alone.
    TOTAL: gl.constexpr = total(chunk_sums(zero, zero, zero, SUB, HB, True), SUB).type.layout
    flag, _flag = _halves(gl.zeros([KEYS, SUB, 4], gl.int32, TOTAL), SUB)
    PART: gl.constexpr = flag.type.layout
    same, before = _lane_masks(gl.zeros([4, 8, SUB, 4], gl.int32, PART))
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, gl.SliceLayout(2, TOTAL)))
    wide_key = gl.expand_dims(gl.expand_dims(key, 1), 2)
    tiles = num_keys // KEYS
    turn = 0
    for unit in range(gl.program_id(0), (num_queries + BLOCK - 1) // BLOCK * runs, gl.num_programs(0)):
        block, run = unit // runs * BLOCK, unit % runs
        first = block + HALF * ROWS
        w0, w1 = load_block(
            q, weights, first, num_queries, num_heads, q_row, q_head, w_row, q_buffers, zero, HALF, HEADS, D, HB, SUB, ACC
        )
        q0 = q_buffers.index(HALF * 2).permute((1, 0))
        q1 = q_buffers.index(HALF * 2 + 1).permute((1, 0))
        row = block + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, ACC))
        start, end, owner = sight(row, positions, positions, owners, lengths, num_queries, num_keys, num_requests, True)
        row0 = row_numbers(first, SUB, TOTAL)
        row1 = row0 if HEADS == 64 else row_numbers(first + 4 * SUB, SUB, TOTAL)
        _start0, end0, owner0 = sight(row0, positions, positions, owners, lengths, num_queries, num_keys, num_requests, True)
        _start1, end1, owner1 = sight(row1, positions, positions, owners, lengths, num_queries, num_keys, num_requests, True)
        level0 = gl.load(levels + row0, mask=row0 < num_queries, other=float("inf"))
        level1 = gl.load(levels + row1, mask=row1 < num_queries, other=float("inf"))
        level_key0 = gl.load(level_keys + row0, mask=row0 < num_queries, other=-1)
        level_key1 = gl.load(level_keys + row1, mask=row1 < num_queries, other=-1)
        list0, here0 = _lists(first, run, runs, num_queries, same, ROOM, SUB, PART)
        list1, here1 = _lists(first if HEADS == 64 else first + 4 * SUB, run, runs, num_queries, same, ROOM, SUB, PART)
        count0, count1 = same * 0, same * 0

        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            begin, stop = live(start, end, owner == current, 0, tiles)
            begin = _first_of_run(begin, run, runs)
            mine0, mine1 = owner0 == current, owner1 == current
            table = page_table + current.to(gl.int64) * table_row
            # Scales are asked for one tile ahead, pages two.
            page_ahead, valid, valid_ahead, scale = begin * 0, begin < begin, begin < begin, (key * 0).to(gl.float32)
            if begin < stop:
                page, valid = find_page(table, begin, num_pages, PAGE)
                scale = load_scales(scales, page, begin, key, num_keys, page_words, D, PAGE)
                page_ahead, valid_ahead = find_page(table, gl.minimum(begin + runs, stop - 1), num_pages, PAGE)
            for tile in range(begin, stop, runs):
                at = tile * KEYS + wide_key
                # A page that is not there is seen by nobody.
                stop0, stop1 = gl.where(valid, end0, 0), gl.where(valid, end1, 0)
                now = scale
                scale = load_scales(scales, page_ahead, gl.minimum(tile + runs, stop - 1), key, num_keys, page_words, D, PAGE)
                valid = valid_ahead
                page_ahead, valid_ahead = find_page(table, gl.minimum(tile + 2 * runs, stop - 1), num_pages, PAGE)
                mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
                acc0 = multiply(buffers, q0, turn, zero, STAGES, D)
                acc1 = multiply(buffers, q1, turn, zero, STAGES, D)
                sums = chunk_sums(warpgroup_mma_wait(1, [acc0]), w0, zero, SUB, HB, True)
                if HEADS < 64:
                    count0 = _append(
                        total(sums, SUB), now, at, stop0, mine0, level0, level_key0, count0, list0 * ROOM, found, same, before, ROOM, SUB
                    )
                dots = warpgroup_mma_wait(0, [acc1])
                mbarrier.arrive(empty.index(turn % STAGES))
                sums = chunk_sums(dots, w1, sums if HEADS == 64 else zero, SUB, HB, HEADS < 64)
                count1 = _append(
                    total(sums, SUB), now, at, stop1, mine1, level1, level_key1, count1, list1 * ROOM, found, same, before, ROOM, SUB
                )
                turn += 1
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        if HEADS < 64:
            gl.store(counts + list0, count0, mask=here0)
        gl.store(counts + list1, count1, mask=here1)


@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "num_requests", "num_pages", "runs"])
def collect_kernel(
    k_desc, q, weights, scales, owners, positions, lengths, page_table, levels, level_keys, found, counts,
    num_queries, num_heads, num_keys, num_requests, num_pages, runs, q_row, q_head, w_row, page_words, table_row,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
    HB: gl.constexpr, SUB: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """``num_keys``: keys that the page table has room for. ``found`` int64 ``[Q, runs, 4, ROOM]``, ``counts`` int32 ``[Q, runs, 4]``."""
    buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, KEYS, D], gl.NVMMASharedLayout(D, 8, 3))
    q_buffers = gl.allocate_shared_memory(gl.float8e4nv, [4, COLUMNS, D], gl.NVMMASharedLayout(D, 8, 2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (
                q, weights, scales, owners, positions, lengths, page_table, levels, level_keys, found, counts,
                num_queries, num_heads, num_keys, num_requests, num_pages, runs, q_row, q_head, w_row, page_words, table_row,
                buffers, q_buffers, full, empty, 0, HEADS, BLOCK, ROWS, STAGES, D, PAGE, HB, SUB, ROOM,
            )),
            (_consumer, (
                q, weights, scales, owners, positions, lengths, page_table, levels, level_keys, found, counts,
                num_queries, num_heads, num_keys, num_requests, num_pages, runs, q_row, q_head, w_row, page_words, table_row,
                buffers, q_buffers, full, empty, 1, HEADS, BLOCK, ROWS, STAGES, D, PAGE, HB, SUB, ROOM,
            )),
            (_producer, (
                k_desc, owners, positions, lengths, page_table, num_queries, num_keys, num_requests, num_pages, runs, table_row,
                buffers, full, empty, BLOCK, STAGES, D, PAGE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
