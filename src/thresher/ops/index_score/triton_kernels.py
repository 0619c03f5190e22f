# mypy: disable-error-code="no-untyped-def"
"""The kernels behind ``triton.py``: one device function, ``score_tile``, and four ways to bring it keys and queries."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.cache.device import as_mask, wait_for_inputs

STAGES = tl.constexpr(5)  # named at the loop, so that the scales are prefetched too and not the product's operands alone
NO_REQUEST = tl.constexpr(2**31 - 1)
LEAST_SCORE = tl.constexpr(-3.4028234663852886e38)
FILL = tl.constexpr(1024)  # columns written at once where there is nothing to score


@triton.jit
def _head_sums(dots, weights, total, HEADS: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, FIRST: tl.constexpr):
    """``[BN, BQ, HEADS]`` to ``[BN, BQ, 8]``: heads ascending, each onto the sum of its index modulo 8."""
    if HEADS == 8:
        weights = tl.broadcast_to(weights, [BN, BQ, 8])
        total = dots * weights if FIRST else tl.fma(dots, weights, total)
    else:
        low_dots, high_dots = tl.split(tl.permute(tl.reshape(dots, [BN, BQ, 2, HEADS // 2]), (0, 1, 3, 2)))
        low, high = tl.split(tl.permute(tl.reshape(weights, [1, BQ, 2, HEADS // 2]), (0, 1, 3, 2)))
        total = _head_sums(low_dots, low, total, HEADS // 2, BN, BQ, FIRST)
        total = _head_sums(high_dots, high, total, HEADS // 2, BN, BQ, False)
    return total


@triton.jit
def score_tile(keys, scales, queries, weights, HEADS: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr):
    """THE score: keys ``[BN, D]``, scales ``[BN]``, queries ``[BQ * HEADS, D]``, half of weights ``[1, BQ, HEADS]`` to fp32 ``[BN, BQ]``.

    ``dot + |dot|`` is twice its relu, NaN where it is: a multiprocessor adds 128 numbers a clock, but takes the maximum of 64. Products
    with halved weights have the same bits, as halves and doubles are exact (but for weights below 2**-125). -inf stands for no key.
    """
    if INTERPRET:  # bf16 products are wrong there
        keys = keys.to(tl.float32)
        queries = queries.to(tl.float32)
    dots = tl.dot(keys, tl.trans(queries))
    dots = dots + tl.abs(dots)
    sums = _head_sums(tl.reshape(dots, [BN, BQ, HEADS]), weights, 0.0, HEADS, BN, BQ, True)
    return tl.maximum((tl.sum(sums, axis=2) + 0.0) * scales[:, None], LEAST_SCORE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_queries(q, weights, first, num_rows, num_heads, q_row, q_head, w_row, HEADS: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr):
    """Queries and halved weights of rows ``first .. first + num_rows - 1``; zeros for the rows and heads beyond."""
    column = tl.arange(0, BQ * HEADS)
    row, head = column // HEADS, column % HEADS
    offset = (first + row).to(tl.int64) * q_row + head * q_head
    used = (row < num_rows) & (head < num_heads)
    queries = tl.load(q + offset[:, None] + tl.arange(0, D)[None, :], mask=used[:, None], other=0.0)
    row, head = tl.arange(0, BQ)[None, :, None], tl.arange(0, HEADS)[None, None, :]
    used = (row < num_rows) & (head < num_heads)
    return queries, tl.load(weights + (first + row).to(tl.int64) * w_row + head, mask=used, other=0.0) * 0.5


@triton.jit
def _fill(out, row_offset, rows, first, end, BN: tl.constexpr):
    """-inf into the columns ``first .. end - 1`` of the rows that ``rows`` keeps, whose column 0 lies at ``row_offset``."""
    for start in range(first, end, BN):
        n = start + tl.arange(0, BN)
        tl.store(out + row_offset[None, :] + n[:, None], float("-inf"), mask=(n < end)[:, None] & rows[None, :])


@triton.jit
def _live(low, high, first, last, BN: tl.constexpr):
    """The part of the columns ``first .. last - 1`` that meets ``low .. high - 1``, from a tile's begin; past ``last`` when empty."""
    begin = first + tl.maximum(low - first, 0) // BN * BN
    return begin, tl.maximum(tl.minimum(high, last), begin)


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_keys", "tiles"])
def ragged_kernel(
    q, weights, k, k_scales, starts, ends, out, num_queries, num_heads, num_keys, tiles, q_row, q_head, w_row, k_row, out_row,
    HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of BQ rows, chunks of ``tiles`` tiles of keys)."""
    first_row = tl.program_id(0) * BQ
    num_rows = tl.minimum(num_queries - first_row, BQ)
    row = tl.arange(0, BQ)
    rows = row < num_rows
    start = tl.load(starts + first_row + row, mask=rows, other=0)
    end = tl.load(ends + first_row + row, mask=rows, other=0)
    start = tl.minimum(tl.maximum(start, 0), num_keys).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0), num_keys).to(tl.int32)
    some = start < end
    first = tl.program_id(1) * tiles * BN
    last = tl.minimum(first + tiles * BN, num_keys)
    begin, stop = _live(tl.min(tl.where(some, start, num_keys)), tl.max(tl.where(some, end, 0)), first, last, BN)
    out_tile, row_offset = out + first_row.to(tl.int64) * out_row, row * out_row
    _fill(out_tile, row_offset, rows, first, tl.minimum(begin, last), BN)
    if begin < stop:
        queries, head_weights = _load_queries(q, weights, first_row, num_rows, num_heads, q_row, q_head, w_row, HEADS, BQ, D)
        for n0 in tl.range(begin, stop, BN, num_stages=STAGES):
            n = n0 + tl.arange(0, BN)
            here = n < last
            tile = k + tl.cast(n0, tl.int64) * k_row
            keys = tl.load(tile + tl.arange(0, BN)[:, None] * k_row + tl.arange(0, D)[None, :], mask=here[:, None], other=0.0)
            scales = tl.load(k_scales + n, mask=here, other=0.0)
            score = score_tile(keys, scales, queries, head_weights, HEADS, BN, BQ, INTERPRET)
            seen = (n[:, None] >= start[None, :]) & (n[:, None] < end[None, :])
            score = tl.where(seen, score, float("-inf"))
            tl.store(out_tile + row_offset[None, :] + n[:, None], score, mask=here[:, None] & rows[None, :])
    _fill(out_tile, row_offset, rows, begin + tl.cdiv(stop - begin, BN) * BN, last, BN)


@triton.jit
def row_ends(rows, num_queries, num_requests, lengths, positions, requests, room, width):
    """What rows of a paged form see: ``(end, owner)``, int32. Keys ``0 .. end - 1`` of their request, and which that is.

    A request that is not there is one more request, of no tokens: its rows are written too. Rows that are not there have no owner.
    """
    here = rows < num_queries
    request = tl.load(requests + rows, mask=here, other=0)
    position = tl.load(positions + rows, mask=here, other=-1)
    known = here & (request >= 0) & (request < num_requests)
    length = tl.load(lengths + tl.where(known, request, 0), mask=known, other=0)
    held = tl.minimum(tl.minimum(tl.maximum(length, 0), room), width)
    end = (tl.minimum(tl.maximum(position, -1), held - 1) + 1).to(tl.int32)
    return end, tl.where(here, tl.where(known, request, num_requests), NO_REQUEST).to(tl.int32)


@triton.jit
def _share(units):
    """This program's run of so many units, which all programs share out evenly: ``first, last``."""
    each, more = units // tl.num_programs(0), units % tl.num_programs(0)
    first = tl.program_id(0) * each + tl.minimum(tl.program_id(0), more)
    return first, first + each + (tl.program_id(0) < more).to(tl.int32)


@triton.jit
def _group_ends(num_queries, num_requests, lengths, positions, requests, room, width, GROUPS: tl.constexpr, STEP: tl.constexpr):
    """The largest end of each group of STEP rows; 0 for groups past the last."""
    high = tl.zeros([GROUPS], tl.int32)
    for step in tl.static_range(STEP):
        rows = tl.minimum(tl.arange(0, GROUPS) * STEP + step, num_queries)
        end, _ = row_ends(rows, num_queries, num_requests, lengths, positions, requests, room, width)
        high = tl.maximum(high, end)
    return high


@triton.jit
def _find(unit, counts, upto):
    """The group that a unit belongs to, how many units of it come before, and how many it has."""
    group = tl.sum((upto <= unit).to(tl.int32), axis=0)
    at = tl.arange(0, counts.shape[0]) == group
    have = tl.sum(tl.where(at, counts, 0), axis=0)
    return group, unit - (tl.sum(tl.where(at, upto, 0), axis=0) - have), have


@triton.jit
def score_rows(
    q, weights, values, scales, page_table, lengths, positions, requests, out,
    num_queries, num_heads, num_requests, num_pages, max_pages, width, first_row, first, last,
    q_row, q_head, w_row, page_words, table_row, out_row,
    STEP: tl.constexpr, PAGE: tl.constexpr, FILLED: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The columns ``first .. last - 1`` of STEP <= BQ rows, which may belong to several requests."""
    row = tl.arange(0, BQ)
    rows = (row < STEP) & (first_row + row < num_queries)
    end, owner = row_ends(
        tl.where(rows, first_row + row, num_queries), num_queries, num_requests, lengths, positions, requests,
        max_pages.to(tl.int64) * PAGE, width,
    )  # fmt: skip
    out_tile, row_offset = out + first_row.to(tl.int64) * out_row, row * out_row
    # Nothing to see here, nothing to load.
    wanted_rows = tl.where(tl.max(end) > first, tl.minimum(num_queries - first_row, STEP), 0)
    queries, head_weights = _load_queries(q, weights, first_row, wanted_rows, num_heads, q_row, q_head, w_row, HEADS, BQ, D)
    current = tl.min(owner)
    while current < NO_REQUEST:
        mine = owner == current
        begin, stop = _live(0, tl.max(tl.where(mine, end, 0)), first, last, BN)
        table = page_table + current.to(tl.int64) * table_row
        for n0 in tl.range(begin, stop, BN, num_stages=STAGES):
            n = n0 + tl.arange(0, BN)
            if PAGE % BN == 0:
                page = tl.load(table + n0 // PAGE)
                valid = as_mask((page >= 0) & (page < num_pages))
                word = tl.where(valid, page, 0).to(tl.int64) * page_words
                tile = values + word * 4 + (n0 % PAGE) * D
                keys = tl.load(tile + tl.arange(0, BN)[:, None] * D + tl.arange(0, D)[None, :], mask=valid, other=0.0)
                scale = tl.load(scales + word + PAGE * D // 4 + n0 % PAGE + tl.arange(0, BN), mask=valid, other=0.0)
                seen = (n < stop) & valid
            else:
                page = tl.load(table + n // PAGE, mask=n < stop, other=-1)
                seen = (page >= 0) & (page < num_pages)
                word = tl.where(seen, page, 0).to(tl.int64) * page_words
                offset = word * 4 + (n % PAGE) * D
                keys = tl.load(values + offset[:, None] + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0)
                scale = tl.load(scales + word + PAGE * D // 4 + n % PAGE, mask=seen, other=0.0)
            score = score_tile(keys, scale, queries, head_weights, HEADS, BN, BQ, INTERPRET)
            score = tl.where(seen[:, None] & (n[:, None] < end[None, :]), score, float("-inf"))
            tl.store(out_tile + row_offset[None, :] + n[:, None], score, mask=(n < last)[:, None] & mine[None, :])
        if FILLED:
            _fill(out_tile, row_offset, mine, begin + tl.cdiv(stop - begin, BN) * BN, last, BN)
        current = tl.min(tl.where(owner > current, owner, NO_REQUEST))


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_requests", "num_pages", "max_pages", "width"])
def paged_kernel(
    q, weights, values, scales, page_table, lengths, positions, requests, out,
    num_queries, num_heads, num_requests, num_pages, max_pages, width, q_row, q_head, w_row, page_words, table_row, out_row,
    GROUPS: tl.constexpr, STEP: tl.constexpr, PAGE: tl.constexpr, FILLED: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Programs share out the tiles that groups of STEP rows see, each an equal run of them, whatever the lengths; then the rest to fill,
    where that is asked for.

    GROUPS: a power of two that holds all groups; 0 where they are too many to look at, and every group counts as many tiles.
    """
    wait_for_inputs(OVERLAP)
    if GROUPS > 0:
        room = max_pages.to(tl.int64) * PAGE
        high = _group_ends(num_queries, num_requests, lengths, positions, requests, room, width, GROUPS, STEP)
        counts = tl.cdiv(high, BN)
        upto = tl.cumsum(counts, axis=0)
        unit, stop = _share(tl.sum(counts, axis=0))
        while unit < stop:
            here, at, have = _find(unit, counts, upto)
            run = tl.minimum(have - at, stop - unit)
            score_rows(
                q, weights, values, scales, page_table, lengths, positions, requests, out,
                num_queries, num_heads, num_requests, num_pages, max_pages, width, here * STEP, at * BN, tl.minimum((at + run) * BN, width),
                q_row, q_head, w_row, page_words, table_row, out_row, STEP, PAGE, FILLED, HEADS, D, BN, BQ, INTERPRET,
            )  # fmt: skip
            unit += run
        if FILLED:
            # Asked again rather than kept: the loop above has no registers to spare.
            high = _group_ends(num_queries, num_requests, lengths, positions, requests, room, width, GROUPS, STEP)
            group = tl.arange(0, GROUPS)
            begin = tl.cdiv(high, BN) * BN
            counts = tl.where(group * STEP < num_queries, tl.cdiv(tl.maximum(width - begin, 0), FILL), 0)
            upto = tl.cumsum(counts, axis=0)
            unit, stop = _share(tl.sum(counts, axis=0))
            while unit < stop:
                here, at, have = _find(unit, counts, upto)
                column = tl.sum(tl.where(group == here, begin, 0), axis=0) + at * FILL + tl.arange(0, FILL)
                for step in tl.static_range(STEP):
                    row = here * STEP + step
                    tl.store(out + row.to(tl.int64) * out_row + column, float("-inf"), mask=(column < width) & (row < num_queries))
                unit += 1
    else:
        tiles = tl.cdiv(width, BN)
        unit, stop = _share(tl.cdiv(num_queries, STEP) * tiles)
        while unit < stop:
            at = unit % tiles
            run = tl.minimum(tiles - at, stop - unit)
            score_rows(
                q, weights, values, scales, page_table, lengths, positions, requests, out,
                num_queries, num_heads, num_requests, num_pages, max_pages, width,
                unit // tiles * STEP, at * BN, tl.minimum((at + run) * BN, width),
                q_row, q_head, w_row, page_words, table_row, out_row, STEP, PAGE, FILLED, HEADS, D, BN, BQ, INTERPRET,
            )  # fmt: skip
            unit += run


@triton.jit(do_not_specialize=["num_heads", "num_requests", "num_pages", "max_pages", "width"])
def gathered_kernel(
    q, weights, values, scales, page_table, lengths, positions, requests, wanted, out,
    num_heads, num_requests, num_pages, max_pages, width, q_row, q_head, w_row, page_words, table_row, wanted_row, out_row,
    PAGE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid: queries times tiles of BN candidates, those of a query together. It is row 0 of its tile; others, if any, are zeros."""
    tiles = tl.cdiv(width, BN)
    row = tl.program_id(0) // tiles
    request = tl.load(requests + row)
    known = (request >= 0) & (request < num_requests)
    request = tl.where(known, request, 0)
    held = tl.minimum(tl.load(lengths + request, mask=known, other=0), max_pages.to(tl.int64) * PAGE)
    end = tl.minimum(tl.load(positions + row), held - 1) + 1
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    here = n < width
    position = tl.load(wanted + row.to(tl.int64) * wanted_row + n, mask=here, other=-1)
    seen = (position >= 0) & (position < end)
    out_tile = out + row.to(tl.int64) * out_row + n[:, None] + tl.zeros([1, BQ], tl.int32)
    store = here[:, None] & (tl.arange(0, BQ) == 0)[None, :]
    if tl.max(seen.to(tl.int32)) == 0:
        tl.store(out_tile, float("-inf"), mask=store)
    else:
        safe = tl.where(seen, position, 0).to(tl.int32)
        page = tl.load(page_table + request * table_row + safe // PAGE, mask=seen, other=-1)
        seen = (page >= 0) & (page < num_pages)
        word = tl.where(seen, page, 0).to(tl.int64) * page_words
        offset = word * 4 + (safe % PAGE) * D
        keys = tl.load(values + offset[:, None] + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0)
        scale = tl.load(scales + word + PAGE * D // 4 + safe % PAGE, mask=seen, other=0.0)
        queries, head_weights = _load_queries(q, weights, row, 1, num_heads, q_row, q_head, w_row, HEADS, BQ, D)
        score = score_tile(keys, scale, queries, head_weights, HEADS, BN, BQ, INTERPRET)
        tl.store(out_tile, tl.where(seen[:, None], score, float("-inf")), mask=store)


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_requests", "num_pages", "max_pages", "num_blocks", "chunks", "tiles"])
def block_kernel(
    q, weights, values, scales, page_table, lengths, positions, requests, blocks, out,
    num_queries, num_heads, num_requests, num_pages, max_pages, num_blocks, chunks, tiles,
    q_row, q_head, w_row, page_words, table_row, block_row, out_row,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program p scores chunk ``p % chunks`` of query ``p // chunks``: ``tiles`` tiles of BN columns.

    Keys bound it: D + 4 bytes of each for one query alone, out of L2. At 64 heads a tile of 64 keys is 8448 bytes, 370 to 460 clocks of a
    multiprocessor's share of 4 to 5 TB/s, beside 128 clocks of products and about 270 of instructions to sum up (reckoned for an H100). So
    loads are under way all the time: blocks' numbers, their pages, and the keys of two tiles for each of four programs. A tile that lies
    within a page needs one look at each table.

    BLOCKS: a power of two that holds the blocks which meet a chunk.
    """
    row = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * tiles * BN
    last = tl.minimum(first + tiles * BN, num_blocks * BLOCK_SIZE)
    one = tl.arange(0, BQ)  # row 0 is the query; others, if any, are zeros
    mine = one == 0
    ends, owners = row_ends(
        tl.where(mine, row, num_queries), num_queries, num_requests, lengths, positions, requests, max_pages.to(tl.int64) * PAGE, NO_REQUEST
    )  # fmt: skip
    end = tl.max(tl.where(mine, ends, 0))
    table = page_table + tl.min(owners).to(tl.int64) * table_row
    blocks += row.to(tl.int64) * block_row
    out_tile = out + row.to(tl.int64) * out_row
    # Blocks that have a token in sight come first as a rule; where none follows, there is nothing to load.
    seen_blocks = tl.cdiv(end, BLOCK_SIZE)
    at = first // BLOCK_SIZE + tl.arange(0, BLOCKS)
    listed = tl.load(blocks + at, mask=at < num_blocks, other=-1)
    upto = tl.max(tl.where((listed >= 0) & (listed < seen_blocks), at + 1, 0))
    stop = tl.maximum(tl.minimum(upto * BLOCK_SIZE, last), first)
    queries, head_weights = _load_queries(
        q, weights, row, tl.where(first < stop, 1, 0), num_heads, q_row, q_head, w_row, HEADS, BQ, D
    )  # fmt: skip
    offset = tl.arange(0, BN)
    for n0 in tl.range(first, stop, BN, num_stages=STAGES):
        n = n0 + offset
        if BLOCK_SIZE % BN == 0 and PAGE % BN == 0:
            block = tl.load(blocks + n0 // BLOCK_SIZE)
            there = (block >= 0) & (block < seen_blocks)
            start = tl.where(there, block, 0) * BLOCK_SIZE + n0 % BLOCK_SIZE
            there = there & (start < end)
            page = tl.load(table + tl.where(there, start, 0) // PAGE)
            there = as_mask(there & (page >= 0) & (page < num_pages))
            word = tl.where(there, page, 0).to(tl.int64) * page_words
            tile = values + word * 4 + (start % PAGE) * D
            keys = tl.load(tile + offset[:, None] * D + tl.arange(0, D)[None, :], mask=there, other=0.0)
            scale = tl.load(scales + word + PAGE * D // 4 + start % PAGE + offset, mask=there, other=0.0)
            seen = there & (start + offset < end)
        else:
            block = tl.load(blocks + n // BLOCK_SIZE, mask=n < last, other=-1)
            there = (block >= 0) & (block < seen_blocks)
            position = tl.where(there, block, 0) * BLOCK_SIZE + n % BLOCK_SIZE
            there = there & (position < end)
            page = tl.load(table + position // PAGE, mask=there, other=-1)
            seen = (page >= 0) & (page < num_pages)
            word = tl.where(seen, page, 0).to(tl.int64) * page_words
            key = word * 4 + (position % PAGE) * D
            keys = tl.load(values + key[:, None] + tl.arange(0, D)[None, :], mask=seen[:, None], other=0.0)
            scale = tl.load(scales + word + PAGE * D // 4 + position % PAGE, mask=seen, other=0.0)
        score = score_tile(keys, scale, queries, head_weights, HEADS, BN, BQ, INTERPRET)
        score = tl.where(seen[:, None], score, float("-inf"))
        tl.store(out_tile + n[:, None] + one[None, :] * 0, score, mask=(n < last)[:, None] & mine[None, :])
    _fill(out_tile, one * 0, mine, first + tl.cdiv(stop - first, BN) * BN, last, BN)
