# mypy: disable-error-code="no-untyped-def"
"""Scores of a prefill that are never stored: what lies above each row's level goes to short lists.

The work is shared as in ``index_score/gluon_kernels.py``, but for the order: programs take turns at units (block of queries, run), where
run r of R holds every R-th tile of 64 keys from tile r on. A thread has the same place of every tile, and a list of its own for each of
its rows, so that appending asks nobody: a row has ``64 * R`` lists. They fill alike even where all its best keys stand together.
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
    parity_sums,
    sight,
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
    """``[64, SUB, 2, 4]`` to two of ``[4, 8, SUB, 2, 4]``: the first and the last 8 of each warp's 16 keys. A thread holds one of each."""
    return gl.split(gl.permute(gl.reshape(x, [4, 2, 8, SUB, 2, 4]), (0, 2, 3, 4, 5, 1)))


@gluon.jit
def _parity(zero):
    """The parity of heads that a thread sums up, in the layout of ``zero``: a bit of its lane."""
    return gl.inline_asm_elementwise(
        """{
        mov.u32 $0, %laneid;
        bfe.u32 $0, $0, 1, 1;
        }""",
        "=&r,r",
        [zero],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _place_total(sums, parity, SUB: gl.constexpr):
    """The sums of both parities: ``[4, 8, SUB, 2, 4]``, key ``16 * warp + 8 * half + lane``.

    Where ``total`` gives both lanes of a pair both of their sums, here the lane of parity p keeps half p, so each sum is made once. The
    addition of the two parities has the same bits in either order.
    """
    low, high = _halves(parity_sums(sums, SUB), SUB)
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 send, keep, got;
        setp.ne.s32 p, $3, 0;
        selp.b32 send, $1, $2, p;
        selp.b32 keep, $2, $1, p;
        shfl.sync.bfly.b32 got, send, 2, 0x1f, 0xffffffff;
        add.rn.f32 $0, keep, got;
        }""",
        "=&r,r,r,r",
        [low, high, parity],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _along(size: gl.constexpr, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """0, 1, 2 ... along one of five dims, 1 wide in the others."""
    L3: gl.constexpr = gl.SliceLayout(4 if DIM < 4 else 3, LAYOUT)
    L2: gl.constexpr = gl.SliceLayout(3 if DIM < 3 else 2, L3)
    L1: gl.constexpr = gl.SliceLayout(2 if DIM < 2 else 1, L2)
    L0: gl.constexpr = gl.SliceLayout(1 if DIM < 1 else 0, L1)
    x = gl.arange(0, size, layout=L0)
    x = gl.expand_dims(x, 1 if DIM < 1 else 0)
    x = gl.expand_dims(x, 2 if DIM < 2 else 1)
    x = gl.expand_dims(x, 3 if DIM < 3 else 2)
    return gl.expand_dims(x, 4 if DIM < 4 else 3)


@gluon.jit
def _append(score, scale, key, end, level, level_key, count, list_at, found, ROOM: gl.constexpr):
    """Append the scores above a row's level to the threads' lists, as (score bits, key), keys ascending. Returns the lists' new lengths.

    Above means a larger score, or the level's own score at a key up to the level's. Lengths go on counting where ROOM ends.
    """
    score = (score + 0.0) * scale
    keep = ((score > level) | ((score == level) & (key <= level_key))) & (key < end)
    pair = (score.to(gl.int32, bitcast=True).to(gl.int64) << 32) | key.to(gl.int64)
    gl.store(found + list_at + count, pair, mask=keep & (count < ROOM))
    return count + keep.to(gl.int32)


@gluon.jit
def _rows(
    first, owners, positions, lengths, levels, level_keys, num_queries, num_keys, num_requests, SUB: gl.constexpr, PLACE: gl.constexpr
):  # fmt: skip
    """Of a consumer's rows from ``first`` on, ``[1, 1, SUB, 1, 4]``: number, end, owner, level, level's key."""
    row = first + _along(SUB, 2, PLACE) * 4 + _along(4, 4, PLACE)
    _start, end, owner = sight(row, positions, positions, owners, lengths, num_queries, num_keys, num_requests, True)
    here = row < num_queries
    return row, end, owner, gl.load(levels + row, mask=here, other=float("inf")), gl.load(level_keys + row, mask=here, other=-1)


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
    # Computed for its layout alone.
    half, _half = _halves(gl.sum(gl.reshape(zero, [KEYS, SUB, HB, 2, 4]), 2), SUB)
    PLACE: gl.constexpr = half.type.layout
    nought = gl.zeros([4, 8, SUB, 2, 4], gl.int32, PLACE)
    parity = _parity(nought)
    place = _along(4, 0, PLACE) * 16 + _along(8, 1, PLACE) + _along(2, 3, PLACE) * 8
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
        row0, end0, owner0, level0, level_key0 = _rows(
            first, owners, positions, lengths, levels, level_keys, num_queries, num_keys, num_requests, SUB, PLACE
        )
        row1, end1, owner1, level1, level_key1 = _rows(
            first if HEADS == 64 else first + 4 * SUB, owners, positions, lengths, levels, level_keys, num_queries, num_keys, num_requests,
            SUB, PLACE,
        )  # fmt: skip
        list0 = (row0 * runs + run) * KEYS + place
        list1 = (row1 * runs + run) * KEYS + place
        count0, count1 = nought, nought

        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            begin, stop = live(start, end, owner == current, 0, tiles)
            begin = _first_of_run(begin, run, runs)
            mine0, mine1 = gl.where(owner0 == current, end0, 0), gl.where(owner1 == current, end1, 0)
            table = page_table + current.to(gl.int64) * table_row
            # Scales are asked for one tile ahead, pages two.
            page_ahead, valid, valid_ahead, scale = begin * 0, begin < begin, begin < begin, (place * 0).to(gl.float32)
            if begin < stop:
                page, valid = find_page(table, begin, num_pages, PAGE)
                scale = load_scales(scales, page, begin, place, num_keys, page_words, D, PAGE)
                page_ahead, valid_ahead = find_page(table, gl.minimum(begin + runs, stop - 1), num_pages, PAGE)
            for tile in range(begin, stop, runs):
                key = tile * KEYS + place
                # A page that is not there is seen by nobody.
                stop0, stop1 = gl.where(valid, mine0, 0), gl.where(valid, mine1, 0)
                now = scale
                scale = load_scales(scales, page_ahead, gl.minimum(tile + runs, stop - 1), place, num_keys, page_words, D, PAGE)
                valid = valid_ahead
                page_ahead, valid_ahead = find_page(table, gl.minimum(tile + 2 * runs, stop - 1), num_pages, PAGE)
                mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
                acc0 = multiply(buffers, q0, turn, zero, STAGES, D)
                acc1 = multiply(buffers, q1, turn, zero, STAGES, D)
                sums = chunk_sums(warpgroup_mma_wait(1, [acc0]), w0, zero, SUB, HB, True)
                if HEADS < 64:
                    score = _place_total(sums, parity, SUB)
                    count0 = _append(score, now, key, stop0, level0, level_key0, count0, list0 * ROOM, found, ROOM)
                dots = warpgroup_mma_wait(0, [acc1])
                mbarrier.arrive(empty.index(turn % STAGES))
                sums = chunk_sums(dots, w1, sums if HEADS == 64 else zero, SUB, HB, HEADS < 64)
                score = _place_total(sums, parity, SUB)
                count1 = _append(score, now, key, stop1, level1, level_key1, count1, list1 * ROOM, found, ROOM)
                turn += 1
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        if HEADS < 64:
            gl.store(counts + list0, count0, mask=row0 < num_queries)
        gl.store(counts + list1, count1, mask=row1 < num_queries)


@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "num_requests", "num_pages", "runs"])
def collect_kernel(
    k_desc, q, weights, scales, owners, positions, lengths, page_table, levels, level_keys, found, counts,
    num_queries, num_heads, num_keys, num_requests, num_pages, runs, q_row, q_head, w_row, page_words, table_row,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
    HB: gl.constexpr, SUB: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """``num_keys``: keys that the page table has room for. ``found`` int64 ``[Q, runs, 64, ROOM]``, ``counts`` int32 ``[Q, runs, 64]``."""
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
