# mypy: disable-error-code="no-untyped-def"
"""The Hopper kernel behind ``gluon.py``, and how its warps share the work.

Persistent programs, one a multiprocessor, take equal runs of (block of queries, tile of 64 keys). In a program one warp fetches key tiles
through the copy engine into a ring in shared memory, and two groups of four warps consume every tile, each for its own half of the
block's queries: 256 (query, head) columns, in two chunks of 128, so that one chunk is multiplied while the other is summed up.

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
def _live(start, end, mine, t0, t1):
    """The tiles of ``t0 .. t1 - 1`` that some row of ``mine`` sees."""
    some = mine & (start < end)
    low = gl.min(gl.where(some, start, NO_REQUEST), 0) // KEYS
    high = (gl.max(gl.where(some, end, 0), 0) + KEYS - 1) // KEYS
    begin = gl.minimum(gl.maximum(low, t0), t1)
    return begin, gl.minimum(gl.maximum(high, begin), t1)


@gluon.jit
def _share(units):
    """This program's run of the units: ``first, last``."""
    each, more = units // gl.num_programs(0), units % gl.num_programs(0)
    first = gl.program_id(0) * each + gl.minimum(gl.program_id(0), more)
    return first, first + each + gl.where(gl.program_id(0) < more, 1, 0)


@gluon.jit
def _page(table, tile, num_pages, PAGE: gl.constexpr):
    """A tile's page, 0 where the table names none, and whether it does. Contiguous keys are one page."""
    if PAGE > 0:
        page = gl.load(table + tile * KEYS // PAGE)
        valid = (page >= 0) & (page < num_pages)
        page = gl.where(valid, page, 0)
    else:
        page, valid = tile * 0, tile >= 0
    return page, valid


@gluon.jit
def _producer(
    k_desc, low, high, owners, lengths, page_table, num_queries, num_keys, num_requests, num_pages, width, table_row, buffers, full, empty,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Fetch every tile that a consumer will ask for, in the same order."""
    row = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [1], [0]))
    tiles = (width + KEYS - 1) // KEYS
    unit, last = _share((num_queries + BLOCK - 1) // BLOCK * tiles)
    turn = 0
    while unit < last:
        first, t0 = unit // tiles * BLOCK, unit % tiles
        t1 = gl.minimum(tiles, t0 + last - unit)
        start, end, owner = _range(first + row, low, high, owners, lengths, num_queries, num_keys, num_requests, PAGE > 0)
        current = gl.min(owner, 0)
        while current < NO_REQUEST:
            begin, stop = _live(start, end, owner == current, t0, t1)
            table = page_table + current.to(gl.int64) * table_row
            page = begin * 0
            if begin < stop:
                page, _ = _page(table, begin, num_pages, PAGE)
            for tile in range(begin, stop):
                slot = turn % STAGES
                # Asked for one tile ahead, so that nothing waits for the answer.
                page_ahead, _ = _page(table, gl.minimum(tile + 1, stop - 1), num_pages, PAGE)
                mbarrier.wait(empty.index(slot), (turn // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(slot), KEYS * D)
                offset = tile * KEYS % PAGE if PAGE > 0 else tile * KEYS
                tma.async_copy_global_to_shared(k_desc, [page, offset, 0], full.index(slot), buffers.index(slot))
                page = page_ahead
                turn += 1
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        unit += t1 - t0


@gluon.jit
def _load_scales(scales, page, tile, key, num_keys, page_words, D: gl.constexpr, PAGE: gl.constexpr):
    """A tile's scales ``[64]``."""
    if PAGE > 0:
        found = gl.load(scales + page.to(gl.int64) * page_words + PAGE * D // 4 + tile * KEYS % PAGE + key)
    else:
        found = gl.load(scales + tile * KEYS + key, mask=tile * KEYS + key < num_keys, other=0.0)
    return found


@gluon.jit
def _multiply(buffers, q, turn, zero, STAGES: gl.constexpr, D: gl.constexpr):
    """Begin the product of one chunk with the tile of this turn."""
    return warpgroup_mma(buffers.index(turn % STAGES).reshape([KEYS, D]), q, zero, use_acc=False, is_async=True)


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
def _fill(out, row, keep, t0, t1, width, out_row, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """-inf into the tiles ``t0 .. t1 - 1`` of the rows to keep."""
    for tile in range(t0, t1):
        column = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
        value = gl.full([ROWS, KEYS], float("-inf"), gl.float32, LAYOUT)
        gl.store(out + row.to(gl.int64)[:, None] * out_row + column[None, :], value, mask=keep[:, None] & (column < width)[None, :])


@gluon.jit
def _consumer(
    q, weights, scales, low, high, owners, lengths, page_table, out, num_queries, num_heads, num_keys, num_requests, num_pages, width,
    q_row, q_head, w_row, page_words, table_row, out_row, buffers, q_buffers, full, empty,
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
    unit, last = _share((num_queries + BLOCK - 1) // BLOCK * tiles)
    turn = 0
    while unit < last:
        block, t0 = unit // tiles * BLOCK, unit % tiles
        t1 = gl.minimum(tiles, t0 + last - unit)
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
            begin, stop = _live(start, end, mine, t0, t1)
            # Keys that every row of this consumer sees; none when one of them is absent or another request's.
            inner_low = gl.max(gl.where(own, gl.where(mine, start, NO_REQUEST), 0), 0)
            inner_high = gl.min(gl.where(own, gl.where(mine, end, 0), NO_REQUEST), 0)
            mine0, mine1 = owner0 == current, owner1 == current
            table = page_table + current.to(gl.int64) * table_row
            # Scales are asked for one tile ahead, pages two.
            page_ahead, valid, valid_ahead, scale = begin * 0, begin < begin, begin < begin, (key * 0).to(gl.float32)
            if begin < stop:
                page, valid = _page(table, begin, num_pages, PAGE)
                scale = _load_scales(scales, page, begin, key, num_keys, page_words, D, PAGE)
                page_ahead, valid_ahead = _page(table, gl.minimum(begin + 1, stop - 1), num_pages, PAGE)
            for tile in range(begin, stop):
                n0 = tile * KEYS
                inner = valid & (n0 >= inner_low) & (n0 + KEYS <= inner_high)
                # A page that is not there is seen by nobody.
                stop0, stop1 = gl.where(valid, end0, 0), gl.where(valid, end1, 0)
                now = scale
                scale = _load_scales(scales, page_ahead, gl.minimum(tile + 1, stop - 1), key, num_keys, page_words, D, PAGE)
                valid = valid_ahead
                page_ahead, valid_ahead = _page(table, gl.minimum(tile + 2, stop - 1), num_pages, PAGE)
                mbarrier.wait(full.index(turn % STAGES), turn // STAGES & 1)
                acc0 = _multiply(buffers, q0, turn, zero, STAGES, D)
                acc1 = _multiply(buffers, q1, turn, zero, STAGES, D)
                sums = _chunk_sums(warpgroup_mma_wait(1, [acc0]), w0, zero, SUB, HB, True)
                if HEADS < 64:
                    _put(_total(sums, SUB), now, block_out + n0, at0, n0 + wide_key, start0, stop0, mine0, width, inner)
                dots = warpgroup_mma_wait(0, [acc1])
                mbarrier.arrive(empty.index(turn % STAGES))
                sums = _chunk_sums(dots, w1, sums if HEADS == 64 else zero, SUB, HB, HEADS < 64)
                _put(_total(sums, SUB), now, block_out + n0, at1, n0 + wide_key, start1, stop1, mine1, width, inner)
                turn += 1
            keep = fill_owner == current
            _fill(out, fill_row, keep, t0, begin, width, out_row, ROWS, FILL)
            _fill(out, fill_row, keep, stop, t1, width, out_row, ROWS, FILL)
            current = gl.min(gl.where(owner > current, owner, NO_REQUEST), 0)
        unit += t1 - t0


@gluon.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "num_requests", "num_pages", "width"])
def prefill_kernel(
    k_desc, q, weights, scales, low, high, owners, lengths, page_table, out,
    num_queries, num_heads, num_keys, num_requests, num_pages, width, q_row, q_head, w_row, page_words, table_row, out_row,
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
                width, q_row, q_head, w_row, page_words, table_row, out_row, buffers, q_buffers, full, empty,
                0, HEADS, BLOCK, ROWS, STAGES, D, PAGE, HB, SUB,
            )),
            (_consumer, (
                q, weights, scales, low, high, owners, lengths, page_table, out, num_queries, num_heads, num_keys, num_requests, num_pages,
                width, q_row, q_head, w_row, page_words, table_row, out_row, buffers, q_buffers, full, empty,
                1, HEADS, BLOCK, ROWS, STAGES, D, PAGE, HB, SUB,
            )),
            (_producer, (
                k_desc, low, high, owners, lengths, page_table, num_queries, num_keys, num_requests, num_pages, width, table_row,
                buffers, full, empty, BLOCK, STAGES, D, PAGE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
