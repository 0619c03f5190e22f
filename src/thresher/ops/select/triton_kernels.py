"""The Triton kernels behind ``triton.py``; the method is told there.

A score becomes an int32 key: the fp32 bits, ordered, with -0.0 as 0.0, NaN below every number and "no candidate" below NaN. Every choice
is made on keys, but for the one pass over everything (``collect``), which compares scores directly to save instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.cache.device import as_mask

_NONE = tl.constexpr(-(2**31))  # -inf, or a position of -1
_NAN = tl.constexpr(-(2**31) + 1)
_INF = tl.constexpr(0x7F800000)
_SIGN = tl.constexpr(0x7FFFFFFF)  # every bit but the sign
_BELOW = tl.constexpr(-0x7F800000 - 1)  # one below the key of the lowest number


@triton.jit
def _order(bits):
    """int32 bits of fp32 scores -> keys."""
    size = bits & _SIGN
    key = tl.where(bits < 0, bits ^ _SIGN, bits)
    key = tl.where(size == 0, 0, key)
    key = tl.where(size > _INF, _NAN, key)
    return tl.where((size == _INF) & (bits < 0), _NONE, key)


@triton.jit
def _load(scores, positions, columns, live, HAS_POSITIONS: tl.constexpr):
    """Score bits and keys of one row's columns; ``_NONE`` where not live or no candidate. Both pointers are at the row's start."""
    bits = tl.load(scores + columns, mask=live, other=0.0).to(tl.int32, bitcast=True)
    if HAS_POSITIONS:
        live = live & (tl.load(positions + columns, mask=live, other=-1) >= 0)
    return bits, tl.where(live, _order(bits), _NONE)


@triton.jit
def _search(keys, want, slack, low, high):
    """A t in [low, high] with at least ``want`` keys >= t: at most ``want + slack`` of them, or else the largest such t.

    Bisection, but from high the first steps down are short, half an octave and then twice as far each time: the best of many scores
    are seldom far apart. At least ``want`` keys must be >= low and fewer than ``want`` above high, unless low == high.
    """
    step = (low & 0) + (1 << 22)
    while low < high:
        half = high - ((low | high) - ((low ^ high) >> 1))  # the mean rounded up, without overflow
        middle = high - tl.minimum(half, step)
        step = tl.where(step < (1 << 30), step * 2, step)
        count = tl.sum((keys >= middle).to(tl.int32), axis=0)
        high = tl.where(count < want, middle - 1, tl.where(count <= want + slack, middle, high))
        low = tl.where(count < want, low, middle)
    return low


@triton.jit
def _threshold(keys, topk, low):
    """(threshold, how many keys equal to it are taken, how many are taken in all) for the topk best of ``keys``, none but NONE < low."""
    num = tl.sum((keys > _NONE).to(tl.int32), axis=0)
    full = num >= topk
    threshold = _search(keys, topk, 0, tl.where(full, low, _NONE), tl.where(full, tl.max(keys, axis=0), _NONE))
    length = tl.minimum(num, topk)
    return threshold, length - tl.sum((keys > threshold).to(tl.int32), axis=0), length


@triton.jit
def _put(
    row, to, keep, columns, bits, positions, page_table, requests, indices, beside, topk, num_requests, max_pages, page_size,
    HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Write the kept columns at ``to`` in the row's result, as positions or slots."""
    where = columns
    if HAS_POSITIONS:
        where = tl.load(positions + columns, mask=keep, other=0).to(tl.int32)
    if SLOTS:
        request = tl.load(requests + row)
        page = where // page_size
        known = keep & as_mask((request >= 0) & (request < num_requests)) & (page >= 0) & (page < max_pages)
        held = tl.load(page_table + request * max_pages + page, mask=known, other=-1)
        where = tl.where(held < 0, -1, held * page_size + where % page_size)
    tl.store(indices + row * topk + to, where, mask=keep)
    if WITH_SCORES:
        tl.store(beside + row * topk + to, bits.to(tl.float32, bitcast=True), mask=keep)


@triton.jit
def _write(
    row, columns, bits, keys, threshold, ties, above, tied, positions, page_table, requests, indices, beside,
    topk, num_requests, max_pages, page_size,
    HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Write the selected columns of one tile, of ascending columns, behind ``above`` greater and ``tied`` equal ones in earlier tiles.

    Returns ``above`` and ``tied`` for the next tile.
    """
    is_above = (keys > threshold).to(tl.int32)
    is_tied = (keys == threshold).to(tl.int32)
    packed = is_above + (is_tied << 16)
    before = tl.cumsum(packed, axis=0) - packed
    tied_before = tied + (before >> 16)
    _put(
        row, above + (before & 0xFFFF) + tl.minimum(tied_before, ties), (is_above > 0) | ((is_tied > 0) & (tied_before < ties)),
        columns, bits, positions, page_table, requests, indices, beside, topk, num_requests, max_pages, page_size,
        HAS_POSITIONS, SLOTS, WITH_SCORES,
    )  # fmt: skip
    total = tl.sum(packed, axis=0)
    return above + (total & 0xFFFF), tied + (total >> 16)


@triton.jit
def _finish(row, length, lengths, indices, beside, topk, TILE: tl.constexpr, WITH_SCORES: tl.constexpr):
    """Write a row's length and its padding."""
    tl.store(lengths + row, length.to(tl.int64))
    for start in range(length, topk, TILE):
        at = start + tl.arange(0, TILE)
        tl.store(indices + row * topk + at, tl.full([TILE], -1, tl.int32), mask=at < topk)
        if WITH_SCORES:
            tl.store(beside + row * topk + at, tl.full([TILE], float("-inf"), tl.float32), mask=at < topk)


@triton.jit
def one_program(
    scores, positions, page_table, requests, indices, lengths, beside,
    width, topk, score_stride, position_stride, num_requests, max_pages, page_size,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """A whole row: its keys stay in registers for the search; the scores are read again, a tile at a time, to be written."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_stride
    if HAS_POSITIONS:
        positions += row * position_stride
    columns = tl.arange(0, BLOCK)
    _, keys = _load(scores, positions, columns, columns < width, HAS_POSITIONS)
    threshold, ties, length = _threshold(keys, topk, _NAN)
    above = length * 0
    tied = length * 0
    for start in range(0, width, TILE):
        at = start + tl.arange(0, TILE)
        bits, tile = _load(scores, positions, at, at < width, HAS_POSITIONS)
        above, tied = _write(
            row, at, bits, tile, threshold, ties, above, tied, positions, page_table, requests, indices, beside,
            topk, num_requests, max_pages, page_size, HAS_POSITIONS, SLOTS, WITH_SCORES,
        )  # fmt: skip
    _finish(row, length, lengths, indices, beside, topk, TILE, WITH_SCORES)


@triton.jit
def guess_level(
    scores, positions, levels, counters, stride, want, slack, score_stride, position_stride,
    SAMPLE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Each row's level: about the ``want``-th largest of SAMPLE scores, 8 neighbours out of every ``stride`` columns.

    Where in its stride a group lies is scattered, so that a period in the data does not meet the sample's own.
    """
    row = tl.program_id(0).to(tl.int64)
    if HAS_POSITIONS:
        positions += row * position_stride
    at = tl.arange(0, SAMPLE)
    group = at // 8
    columns = group * stride + ((group * 40503) & 0xFFFF) % (stride // 8) * 8 + at % 8
    _, keys = _load(scores + row * score_stride, positions, columns, at >= 0, HAS_POSITIONS)
    full = tl.sum((keys > _NONE).to(tl.int32), axis=0) >= want
    level = _search(keys, want, slack, tl.where(full, _NAN, _NONE), tl.where(full, tl.max(keys, axis=0), _NONE))
    # A level must be the key of some score: those between NaN and the lowest number are not, nor is -1, which -0.0 would have.
    level = tl.where((level > _NAN) & (level <= _BELOW), _NAN, level)
    tl.store(levels + row, tl.where(level == -1, 0, level))
    tl.store(counters + row, 0)


@triton.jit
def _count_bits(word):
    """Set bits of uint32 words, as int32."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _pack(flags, lane):
    """Rows of 32 flags as uint32 words."""
    return tl.sum(tl.where(flags, tl.full([1, 32], 1, tl.uint32) << lane.to(tl.uint32), 0), axis=1)


@triton.jit
def collect(
    scores, positions, levels, counters, above_table, tied_table, base_table, found, width, num_chunks, score_stride, position_stride,
    CHUNK: tl.constexpr, ROOM: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Append what lies above the level in one chunk of a row to the row's list, ``found``: score bits and column in one int64.

    The chunks of a row append in any order and note where; inside a chunk columns ascend. Counts are right even where ROOM runs out.
    Few scores pass, so a chunk becomes words of 32 flags, and every word gives up its bits one by one: as many turns as the fullest
    word has bits, each reading its scores again, from L1.
    """
    program = tl.program_id(0)
    row = (program // num_chunks).to(tl.int64)
    first = (program % num_chunks) * CHUNK
    scores += row * score_stride
    lane = tl.arange(0, 32)[None, :]
    words = first + tl.arange(0, CHUNK // 32) * 32
    columns = words[:, None] + lane
    score = tl.load(scores + columns, mask=columns < width, other=float("-inf"))
    if HAS_POSITIONS:
        held = tl.load(positions + row * position_stride + columns, mask=columns < width, other=-1) >= 0
        score = tl.where(held, score, float("-inf"))
    level = tl.load(levels + row)
    if level > _NAN:
        cut = tl.where(level < 0, level ^ _SIGN, level).to(tl.float32, bitcast=True)
        flags = _pack(score > cut, lane)
        num_tied = tl.sum((score == cut).to(tl.int32))
    elif level == _NAN:
        flags = _pack(score > float("-inf"), lane)
        num_tied = tl.sum((score != score).to(tl.int32))
    else:
        flags = _pack(score != float("-inf"), lane)  # NaN too
        num_tied = level * 0
    tl.store(tied_table + program, num_tied)
    flags = tl.gather(flags, tl.arange(0, CHUNK // 32), axis=0)  # the same words, but each now held by one thread and not by eight
    counts = _count_bits(flags)
    num_above = tl.sum(counts, axis=0)
    base = num_above * 0
    if num_above > 0:
        base = tl.atomic_add(counters + row, num_above, sem="relaxed")
        to = base + tl.cumsum(counts, axis=0) - counts
        found += row * ROOM
        for _turn in range(tl.max(counts, axis=0)):
            live = flags != 0
            rest = flags & (flags - 1)
            lowest = flags ^ rest
            at = words + ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127)  # a power of two's exponent
            bits = tl.load(scores + at, mask=live, other=0.0).to(tl.int32, bitcast=True)
            tl.store(found + to, (bits.to(tl.int64) << 32) | at.to(tl.int64), mask=live & (to < ROOM))
            flags = rest
            to += 1
    tl.store(above_table + program, num_above)
    tl.store(base_table + program, base)


@triton.jit
def _search_row(scores, positions, width, topk, TILE: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """The threshold of a whole row that no list holds: four passes, each fixing 8 bits of the key. ``_NONE`` if fewer than topk."""
    want = topk + width * 0
    prefix = width * 0
    short = width < 0
    for step in tl.static_range(4):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, width, TILE):
            at = start + tl.arange(0, TILE)
            _, keys = _load(scores, positions, at, at < width, HAS_POSITIONS)
            if step == 0:
                counts += tl.histogram((keys >> 24) + 128, 256, mask=keys > _NONE)
            else:
                counts += tl.histogram((keys >> (24 - 8 * step)) & 255, 256, mask=(keys > _NONE) & ((keys >> (32 - 8 * step)) == prefix))
        at_least = tl.cumsum(counts, axis=0, reverse=True)
        digit = tl.sum((at_least >= want).to(tl.int32), axis=0) - 1
        want -= tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0), axis=0)
        if step == 0:
            short = digit < 0
            prefix = digit - 128
        else:
            prefix = prefix * 256 + digit
    return tl.where(short, _NONE, prefix)


@triton.jit
def _entries(found, at, count, ends, shifts, LOG_CHUNKS: tl.constexpr):
    """Entries ``at`` of a row's list, in the order of columns: (columns, score bits, chunks).

    An entry belongs to the chunk before which as many chunks stand as end at or before it; ``ends`` are the running counts.
    """
    chunk = at * 0
    for bit in tl.static_range(LOG_CHUNKS):
        half = 1 << (LOG_CHUNKS - 1 - bit)
        chunk = tl.where(tl.gather(ends, chunk + (half - 1), axis=0) <= at, chunk + half, chunk)
    pair = tl.load(found + at + tl.gather(shifts, chunk, axis=0), mask=at < count, other=0)
    return (pair & _SIGN).to(tl.int32), (pair >> 32).to(tl.int32), chunk


@triton.jit
def settle(
    scores, positions, page_table, requests, indices, lengths, beside,
    levels, counters, above_table, tied_table, base_table, found, rescans,
    width, topk, num_chunks, score_stride, position_stride, num_requests, max_pages, page_size,
    CHUNK: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr, LOG_CHUNKS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Select from a row's list if it holds the answer; otherwise find the row's threshold and leave some writing to ``rescan``.

    ``rescans`` int32 ``[Q, 3]``: what to leave (the chunks before which fewer ties than this were counted), threshold, ties to take.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_stride
    if HAS_POSITIONS:
        positions += row * position_stride
    chunk = tl.arange(0, 1 << LOG_CHUNKS)
    in_row = row * num_chunks + chunk
    above_counts = tl.load(above_table + in_row, mask=chunk < num_chunks, other=0)
    tied_counts = tl.load(tied_table + in_row, mask=chunk < num_chunks, other=0)
    ends = tl.cumsum(above_counts, axis=0)
    shifts = tl.load(base_table + in_row, mask=chunk < num_chunks, other=0) - (ends - above_counts)
    found += row * ROOM
    level = tl.load(levels + row)
    count = tl.load(counters + row)
    num_tied = tl.sum(tied_counts, axis=0)
    threshold = level
    ties = topk - count
    length = topk + count * 0
    until = count * 0
    if (count <= ROOM) & ((count >= topk) | (level == _NONE)):  # the list holds the answer
        entry = tl.arange(0, ROOM)
        keys = _order((tl.load(found + entry, mask=entry < count, other=0) >> 32).to(tl.int32))
        threshold, ties, length = _threshold(tl.where(entry < count, keys, _NONE), topk, level + 1)
        above = count * 0
        tied = count * 0
        for start in range(0, count, TILE):
            at = start + tl.arange(0, TILE)
            columns, bits, _ = _entries(found, at, count, ends, shifts, LOG_CHUNKS)
            above, tied = _write(
                row, columns, bits, tl.where(at < count, _order(bits), _NONE), threshold, ties, above, tied,
                positions, page_table, requests, indices, beside, topk, num_requests, max_pages, page_size,
                HAS_POSITIONS, SLOTS, WITH_SCORES,
            )  # fmt: skip
    elif (count < topk) & (count + num_tied >= topk):  # the level is the threshold: the whole list, and some of its ties
        until = ties
        before = tl.cumsum(tied_counts, axis=0) - tied_counts
        for start in range(0, count, TILE):
            at = start + tl.arange(0, TILE)
            columns, bits, of = _entries(found, at, count, ends, shifts, LOG_CHUNKS)
            _put(
                row, at + ties, (at < count) & (tl.gather(before, of, axis=0) >= ties), columns, bits,
                positions, page_table, requests, indices, beside, topk, num_requests, max_pages, page_size,
                HAS_POSITIONS, SLOTS, WITH_SCORES,
            )  # fmt: skip
    else:  # the sample misled
        threshold = _search_row(scores, positions, width, topk, TILE, HAS_POSITIONS)
        num_above = count * 0
        num_tied = count * 0
        for index in range(0, num_chunks):
            at = index * CHUNK + tl.arange(0, CHUNK)
            _, keys = _load(scores, positions, at, at < width, HAS_POSITIONS)
            packed = tl.sum((keys > threshold).to(tl.int32) + (((keys == threshold) & (keys > _NONE)).to(tl.int32) << 16), axis=0)
            tl.store(above_table + row * num_chunks + index, packed & 0xFFFF)
            tl.store(tied_table + row * num_chunks + index, packed >> 16)
            num_above += packed & 0xFFFF
            num_tied += packed >> 16
        length = tl.minimum(num_above + num_tied, topk)
        ties = length - num_above
        until = width + 1
    tl.store(rescans + row * 3, until)
    tl.store(rescans + row * 3 + 1, threshold)
    tl.store(rescans + row * 3 + 2, ties)
    _finish(row, length, lengths, indices, beside, topk, TILE, WITH_SCORES)


@triton.jit
def rescan(
    scores, positions, page_table, requests, indices, beside, above_table, tied_table, rescans,
    width, topk, num_chunks, splits, score_stride, position_stride, num_requests, max_pages, page_size,
    CHUNK: tl.constexpr, TILE: tl.constexpr, LOG_CHUNKS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Write the chunks that ``settle`` left, from the scores; ``splits`` programs a row take them in turn."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    until = tl.load(rescans + row * 3)
    if until > 0:
        threshold = tl.load(rescans + row * 3 + 1)
        ties = tl.load(rescans + row * 3 + 2)
        scores += row * score_stride
        if HAS_POSITIONS:
            positions += row * position_stride
        chunk = tl.arange(0, 1 << LOG_CHUNKS)
        above_counts = tl.load(above_table + row * num_chunks + chunk, mask=chunk < num_chunks, other=0)
        tied_counts = tl.load(tied_table + row * num_chunks + chunk, mask=chunk < num_chunks, other=0)
        for index in range(tl.program_id(0) % splits, num_chunks, splits):
            above = tl.sum(tl.where(chunk < index, above_counts, 0), axis=0)
            tied = tl.sum(tl.where(chunk < index, tied_counts, 0), axis=0)
            if tied < until:
                for start in range(0, CHUNK, TILE):
                    at = index * CHUNK + start + tl.arange(0, TILE)
                    bits, keys = _load(scores, positions, at, at < width, HAS_POSITIONS)
                    above, tied = _write(
                        row, at, bits, keys, threshold, ties, above, tied, positions, page_table, requests, indices, beside,
                        topk, num_requests, max_pages, page_size, HAS_POSITIONS, SLOTS, WITH_SCORES,
                    )  # fmt: skip
