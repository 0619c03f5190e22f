# mypy: disable-error-code="no-untyped-def"
"""The Hopper kernel behind ``gluon.py``, and how its warps share the work.

Persistent programs, one a multiprocessor, take turns at the units (block of queries, run), where run r of R holds every R-th tile of 64
keys from tile r on. In a program one warp fetches key tiles through the copy engine into a ring in shared memory, and two groups of four
warps consume every tile, each for its own half of the block's queries: 256 (query, head) columns, in two chunks of 128, so that one chunk
is multiplied while the other is summed up.

**Columns.** Chunk, group of 4 queries, pair of heads, parity, query: column ``((sub * HB + pair) * 2 + parity) * 4 + query``. A thread of
the matrix unit then holds one parity of two queries, and adds up heads in its own registers; the other parity is one shuffle away. The
pairs are so chosen that a thread's heads fall into four classes modulo 8, and the sums are those of ``triton.py``: the same bits.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

NAN_ALL = gl.constexpr(triton.language.PropagateNan.ALL)
NO_REQUEST = gl.constexpr(2**31 - 1)
KEYS = gl.constexpr(64)
COLUMNS = gl.constexpr(128)  # of a chunk


@gluon.jit
def _sums(dots, weights, sums, SUB: gl.constexpr, HB: gl.constexpr, FIRST: gl.constexpr):
    """``[64, SUB, HB, 2, 4]`` to ``[64, SUB, 4, 2, 4]``: pairs of heads ascending, each onto the sum of its index modulo 4."""
    if HB == 4:
        sums = dots * weights if FIRST else gl.fma(dots, weights, sums)
    else:
        low, high = gl.split(gl.permute(gl.reshape(dots, [KEYS, SUB, 2, HB // 2, 2, 4]), (0, 1, 3, 4, 5, 2)))
        low_w, high_w = gl.split(gl.permute(gl.reshape(weights, [KEYS, SUB, 2, HB // 2, 2, 4]), (0, 1, 3, 4, 5, 2)))
        sums = _sums(low, low_w, sums, SUB, HB // 2, FIRST)
        sums = _sums(high, high_w, sums, SUB, HB // 2, False)
    return sums


@gluon.jit
def _chunk_sums(dots, weights, sums, SUB: gl.constexpr, HB: gl.constexpr, FIRST: gl.constexpr):
    dots = gl.maximum(dots, 0.0, propagate_nan=NAN_ALL)
    return _sums(gl.reshape(dots, [KEYS, SUB, HB, 2, 4]), gl.reshape(weights, [KEYS, SUB, HB, 2, 4]), sums, SUB, HB, FIRST)


@gluon.jit
def _total(sums, SUB: gl.constexpr):
    """The fixed tree over a parity's four classes, then over both parities: ``[64, SUB, 4]``."""
    a, b = gl.split(gl.permute(gl.reshape(sums, [KEYS, SUB, 2, 2, 2, 4]), (0, 1, 2, 4, 5, 3)))
    a, b = gl.split(gl.permute(a + b, (0, 1, 3, 4, 2)))
    return gl.sum(a + b, 2) + 0.0


@gluon.jit
def _row_and_head(chunk: gl.constexpr, HEADS: gl.constexpr, HB: gl.constexpr, SUB: gl.constexpr, LAYOUT: gl.constexpr):
    """Which of the consumer's queries, and which head, a chunk's columns are."""
    column = gl.arange(0, COLUMNS, layout=LAYOUT)
    pair, inside = column // 8 % HB, column % 8
    if HEADS == 64:  # both chunks are the same 4 queries
        pair += 16 * chunk
        row = inside % 4
    else:
        row = (chunk * SUB + column // (8 * HB)) * 4 + inside % 4
    # Parity 0 has the heads 0, 1, 4, 5 modulo 8, parity 1 the others.
    return row, pair // 4 * 8 + pair % 2 + pair % 4 // 2 * 4 + inside // 4 * 2


@gluon.jit
def _row_numbers(first, SUB: gl.constexpr, L: gl.constexpr):
    """int32 ``[1, SUB, 4]`` in the layout of a total."""
    sub = gl.arange(0, SUB, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))
    query = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))
    return first + gl.expand_dims(gl.expand_dims(sub * 4, 0), 2) + gl.expand_dims(gl.expand_dims(query, 0), 1)


@gluon.jit
def _range(row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGED: gl.constexpr):
    """``(start, end, owner)`` of rows, int32. Rows that are not there have owner ``NO_REQUEST`` and see nothing.

    ``low`` and ``high`` hold starts and ends; when paged, ``high`` holds positions and a row sees its request from the start. A request
    that is not in the table is one more request, of no tokens.
    """
    here = row < num_queries
    limit = num_keys.to(gl.int64)
    if PAGED:
        request = gl.load(owners + row, mask=here, other=0)
        known = here & (request >= 0) & (request < num_requests)
        length = gl.load(lengths + gl.where(known, request, 0), mask=known, other=0)
        held = gl.minimum(gl.maximum(length, 0), limit)
        end = gl.minimum(gl.maximum(gl.load(high + row, mask=here, other=-1), -1), held - 1) + 1
        start = end * 0
        owner = gl.where(here, gl.where(known, request, num_requests), NO_REQUEST).to(gl.int32)
    else:
        start = gl.minimum(gl.maximum(gl.load(low + row, mask=here, other=0), 0), limit)
        end = gl.minimum(gl.maximum(gl.load(high + row, mask=here, other=0), 0), limit)
        owner = gl.where(here, 0, NO_REQUEST)
    return start.to(gl.int32), gl.where(here, end, 0).to(gl.int32), owner


@gluon.jit
def _live(start, end, mine, tiles):
    """The tiles of ``0 .. tiles - 1`` that some row of ``mine`` sees."""
    some = mine & (start < end)
    begin = gl.minimum(gl.min(gl.where(some, start, NO_REQUEST), 0) // KEYS, tiles)
    high = (gl.max(gl.where(some, end, 0), 0) + KEYS - 1) // KEYS
    return begin, gl.minimum(gl.maximum(high, begin), tiles)


@gluon.jit
def _first_of_run(begin, run, runs):
    """The first tile from ``begin`` on that belongs to the run."""
    return begin + (run + runs - begin % runs) % runs


@gluon.jit
def _page(table, tile, num_pages, PAGE: gl.constexpr):
    """A tile's page, 0 where the table names none, and whether it does."""
    page = gl.load(table + tile * KEYS // PAGE)
    valid = (page >= 0) & (page < num_pages)
    return gl.where(valid, page, 0), valid


@gluon.jit
def _producer(
    k_desc, low, high, owners, lengths, page_table, num_queries, num_keys, num_requests, num_pages, width, runs, table_row,
    buffers, full, empty, BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Fetch every tile that a consumer will ask for, in the same order."""
    row = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [1], [0]))
    tiles = (width + KEYS - 1) // KEYS
    turn = 0
    for unit in range(gl.program_id(0), (num_queries + BLOCK - 1) // BLOCK * runs, gl.num_programs(0)):
        first, run = unit // runs * BLOCK, unit % runs
        start, end, owner = _range(first + row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            begin, stop = _live(start, end, owner == current, tiles)
            for tile in range(_first_of_run(begin, run, runs), stop, runs):
                slot = turn % STAGES
                mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(slot), KEYS * D)
                if PAGE > 0:
                    page, _ = _page(page_table + current.to(gl.int64) * table_row, tile, num_pages, PAGE)
                    at = [page, tile * KEYS % PAGE, 0]
                else:
                    at = [0, tile * KEYS, 0]
                tma.async_copy_global_to_shared(k_desc, at, full.index(slot), buffers.index(slot))
                turn += 1
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)


@gluon.jit
def _load_scales(scales, table, tile, key, num_keys, num_pages, page_words, D: gl.constexpr, PAGE: gl.constexpr):
    """A tile's scales ``[64]``, and whether its page exists."""
    if PAGE > 0:
        page, valid = _page(table, tile, num_pages, PAGE)
        found = gl.load(scales + page.to(gl.int64) * page_words + PAGE * D // 4 + tile * KEYS % PAGE + key)
    else:
        valid = tile >= 0
        found = gl.load(scales + tile * KEYS + key, mask=tile * KEYS + key < num_keys, other=0.0)
    return found, valid


@gluon.jit
def _zero_scale(key):
    return (key * 0).to(gl.float32)


@gluon.jit
def _put(score, scale, out, at, key, start, end, mine, width, inner):
    """Store a tile of one group: ``score [64, SUB, 4]``; ``inner`` says that every row is there and sees every key."""
    score = score * gl.expand_dims(gl.expand_dims(scale, 1), 2)
    if inner:
        gl.store(out + at, score)
    else:
        score = gl.where((key >= start) & (key < end), score, float("-inf"))
        gl.store(out + at, score, mask=mine & (key < width))


@gluon.jit
def _halves(x, SUB: gl.constexpr):
    """``[64, SUB, 4]`` to two of ``[4, 8, SUB, 4]``: a warp's first and last 8 of its 16 keys, which a thread holds one each of."""
    return gl.split(gl.permute(gl.reshape(x, [4, 2, 8, SUB, 4]), (0, 2, 3, 4, 1)))


@gluon.jit
def _count_lanes(flags, same, before):
    """Of the lanes ``same``, how many have their flag set: those in ``before`` too, and all. The masks and results are a thread's own."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 b, c;
        setp.ne.s32 p, $2, 0;
        vote.sync.ballot.b32 b, p, 0xffffffff;
        and.b32 b, b, $3;
        popc.b32 $1, b;
        and.b32 c, b, $4;
        popc.b32 $0, c;
        }""",
        "=r,=r,r,r,r",
        [flags, same, before],
        dtype=(gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _lane_masks(like):
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
        "=r,=r,r",
        [like],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _append(
    score, scale, key, start, end, mine, level, level_key, count, list_at, found, same, before, ROOM: gl.constexpr, SUB: gl.constexpr
):  # fmt: skip
    """Keep what lies above a row's level, as (score bits, key): each warp appends its 16 keys of a tile to its own list of the row.

    Above means a larger score, or the level's own score at a key up to the level's. ``count`` int32 ``[4, 8, SUB, 4]`` is the length of
    the list, which goes on counting where ROOM ends. Returns the new count.
    """
    score = score * gl.expand_dims(gl.expand_dims(scale, 1), 2)
    keep = (score > level) | ((score == level) & (key <= level_key))
    keep = keep & (key >= start) & (key < end) & mine
    low_keep, high_keep = _halves(keep.to(gl.int32), SUB)
    low_score, high_score = _halves(score, SUB)
    low_key, high_key = _halves(key + gl.zeros_like(score).to(gl.int32), SUB)
    low_before, low_all = _count_lanes(low_keep, same, before)
    high_before, high_all = _count_lanes(high_keep, same, before)
    at = count + low_before
    pair = (low_score.to(gl.int32, bitcast=True).to(gl.int64) << 32) | low_key.to(gl.int64)
    gl.store(found + list_at + at, pair, mask=(low_keep != 0) & (at < ROOM))
    count += low_all
    at = count + high_before
    pair = (high_score.to(gl.int32, bitcast=True).to(gl.int64) << 32) | high_key.to(gl.int64)
    gl.store(found + list_at + at, pair, mask=(high_keep != 0) & (at < ROOM))
    return count + high_all


@gluon.jit
def _fill(out, row, keep, begin, stop, runs, width, out_row, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf into every ``runs``-th tile from ``begin`` to before ``stop``, in the rows to keep."""
    for tile in range(begin, stop, runs):
        column = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        value = gl.full([ROWS, KEYS], float("-inf"), gl.float32, LAYOUT)
        gl.store(out + row.to(gl.int64)[:, None] * out_row + column[None, :], value, mask=keep[:, None] & (column < width)[None, :])


@gluon.jit
def _consumer(
    q, weights, scales, low, high, owners, lengths, page_table, out, num_queries, num_heads, num_keys, num_requests, num_pages, width,
    runs, q_row, q_head, w_row, page_words, table_row, out_row, buffers, q_buffers, full, empty,
    HALF: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    PAGE: gl.constexpr, HB: gl.constexpr, SUB: gl.constexpr,
):  # fmt: skip
    """Score all tiles for half ``HALF`` of a block's queries, ``ROWS`` of them; ``q_buffers`` hold its two chunks."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    LOAD: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    FILL: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    BY_ROW: gl.constexpr = gl.SliceLayout(0, ACC)
    zero = gl.zeros([KEYS, COLUMNS], gl.float32, ACC)
    # Computed for its layout alone.
    TOTAL: gl.constexpr = _total(_chunk_sums(zero, zero, zero, SUB, HB, True), SUB).type.layout
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, gl.SliceLayout(2, TOTAL)))
    wide_key = gl.expand_dims(gl.expand_dims(key, 1), 2)
    tiles = (width + KEYS - 1) // KEYS
    turn = 0
    for unit in range(gl.program_id(0), (num_queries + BLOCK - 1) // BLOCK * runs, gl.num_programs(0)):
        block, run = unit // runs * BLOCK, unit % runs
        first = block + HALF * ROWS
        w0, w1 = zero, zero
        for chunk in gl.static_range(2):
            row, head = _row_and_head(chunk, HEADS, HB, SUB, gl.SliceLayout(1, LOAD))
            used = (first + row < num_queries) & (head < num_heads)
            at = (first + row).to(gl.int64) * q_row + head * q_head
            dim = gl.arange(0, D, layout=gl.SliceLayout(0, LOAD))
            q_buffers.index(HALF * 2 + chunk).store(gl.load(q + at[:, None] + dim[None, :], mask=used[:, None], other=0.0))
            row, head = _row_and_head(chunk, HEADS, HB, SUB, BY_ROW)
            used = (first + row < num_queries) & (head < num_heads)
            w = gl.expand_dims(gl.load(weights + (first + row).to(gl.int64) * w_row + head, mask=used, other=0.0), 0)
            if chunk == 0:
                w0 += w
            else:
                w1 += w
        fence_async_shared()
        q0 = q_buffers.index(HALF * 2).permute((1, 0))
        q1 = q_buffers.index(HALF * 2 + 1).permute((1, 0))

        # The block's rows decide which tiles there are, this consumer's which are stored, and in which layouts those are asked.
        row = gl.arange(0, BLOCK, layout=BY_ROW)
        start, end, owner = _range(block + row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        own = (row >= HALF * ROWS) & (row < HALF * ROWS + ROWS)
        row0 = _row_numbers(first, SUB, TOTAL)
        row1 = row0 if HEADS == 64 else _row_numbers(first + 4 * SUB, SUB, TOTAL)
        start0, end0, owner0 = _range(row0, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        start1, end1, owner1 = _range(row1, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        at0 = (row0 - first) * out_row + wide_key
        at1 = (row1 - first) * out_row + wide_key
        block_out = out + first.to(gl.int64) * out_row
        fill_row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, FILL))
        _, _, fill_owner = _range(fill_row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)

        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            mine = owner == current
            begin, stop = _live(start, end, mine, tiles)
            begin = _first_of_run(begin, run, runs)
            # Keys that every row of this consumer sees; none when one of them is absent or another request's.
            inner_low = gl.max(gl.where(own, gl.where(mine, start, NO_REQUEST), 0), 0)
            inner_high = gl.min(gl.where(own, gl.where(mine, end, 0), NO_REQUEST), 0)
            mine0, mine1 = owner0 == current, owner1 == current
            table = page_table + current.to(gl.int64) * table_row
            scale, valid = _zero_scale(key), begin < begin
            if begin < stop:
                scale, valid = _load_scales(scales, table, begin, key, num_keys, num_pages, page_words, D, PAGE)
            for tile in range(begin, stop, runs):
                slot = turn % STAGES
                n0 = tile * KEYS
                inner = valid & (n0 >= inner_low) & (n0 + KEYS <= inner_high)
                # A page that is not there is seen by nobody.
                stop0, stop1 = gl.where(valid, end0, 0), gl.where(valid, end1, 0)
                now = scale
                scale, valid = _load_scales(
                    scales, table, gl.minimum(tile + runs, stop - 1), key, num_keys, num_pages, page_words, D, PAGE
                )
                mbarrier.wait(full.index(slot), turn // STAGES & 1)
                keys = buffers.index(slot).reshape([KEYS, D])
                acc0 = warpgroup_mma(keys, q0, zero, use_acc=False, is_async=True)
                acc1 = warpgroup_mma(keys, q1, zero, use_acc=False, is_async=True)
                acc0 = warpgroup_mma_wait(1, [acc0])
                sums = _chunk_sums(acc0, w0, zero, SUB, HB, True)
                if HEADS == 64:
                    acc1 = warpgroup_mma_wait(0, [acc1])
                    mbarrier.arrive(empty.index(slot))
                    sums = _chunk_sums(acc1, w1, sums, SUB, HB, False)
                    _put(_total(sums, SUB), now, block_out + n0, at0, n0 + wide_key, start0, stop0, mine0, width, inner)
                else:
                    _put(_total(sums, SUB), now, block_out + n0, at0, n0 + wide_key, start0, stop0, mine0, width, inner)
                    acc1 = warpgroup_mma_wait(0, [acc1])
                    mbarrier.arrive(empty.index(slot))
                    sums = _chunk_sums(acc1, w1, zero, SUB, HB, True)
                    _put(_total(sums, SUB), now, block_out + n0, at1, n0 + wide_key, start1, stop1, mine1, width, inner)
                turn += 1
            keep = fill_owner == current
            _fill(out, fill_row, keep, run, gl.minimum(begin, tiles), runs, width, out_row, ROWS, FILL)
            _fill(out, fill_row, keep, _first_of_run(stop, run, runs), tiles, runs, width, out_row, ROWS, FILL)
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)


@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "num_requests", "num_pages", "width", "runs"])
def prefill_kernel(
    k_desc, q, weights, scales, low, high, owners, lengths, page_table, out,
    num_queries, num_heads, num_keys, num_requests, num_pages, width, runs, q_row, q_head, w_row, page_words, table_row, out_row,
    HEADS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
    HB: gl.constexpr, SUB: gl.constexpr,
):  # fmt: skip
    """``num_keys``: keys there are, or that the page table has room for. ``PAGE`` 0: keys are contiguous."""
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
                q, weights, scales, low, high, owners, lengths, page_table, out, num_queries, num_heads, num_keys, num_requests, num_pages,
                width, runs, q_row, q_head, w_row, page_words, table_row, out_row, buffers, q_buffers, full, empty,
                0, HEADS, BLOCK, ROWS, STAGES, D, PAGE, HB, SUB,
            )),
            (_consumer, (
                q, weights, scales, low, high, owners, lengths, page_table, out, num_queries, num_heads, num_keys, num_requests, num_pages,
                width, runs, q_row, q_head, w_row, page_words, table_row, out_row, buffers, q_buffers, full, empty,
                1, HEADS, BLOCK, ROWS, STAGES, D, PAGE, HB, SUB,
            )),
            (_producer, (
                k_desc, low, high, owners, lengths, page_table, num_queries, num_keys, num_requests, num_pages, width, runs,
                table_row, buffers, full, empty, BLOCK, STAGES, D, PAGE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
