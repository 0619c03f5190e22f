"""What the top-k kernels of ``triton_kernels.py`` and ``triton_split.py`` share: levels, thresholds, and writing a row in column order.

Scores are compared as fp32: so -0.0 equals 0.0 and NaN is greater than nothing without a word about either. A candidate that may not be
chosen (a position of -1, a column past the end) counts as -inf. A search runs over the ordered int32 keys of numbers, one scalar a step.

SPAN: how many columns an entry of ``positions`` stands for, which follow each other: 1, or a block's tokens, and then the entry is the
block's number; 0 where columns are positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.cache.device import as_mask

_NONE = tl.constexpr(-(2**31))  # -inf, or a position of -1
_NAN = tl.constexpr(-(2**31) + 1)
INF = tl.constexpr(0x7F800000)
_SIGN = tl.constexpr(0x7FFFFFFF)  # every bit but the sign
LOWEST = tl.constexpr(-0x7F800000)  # the key of the lowest number
_TURNS = tl.constexpr(12)  # steps that interpolate before bisection ends a search


@triton.jit
def order(bits):
    """int32 bits of fp32 scores -> int32 keys in their order, -0.0 as 0.0, NaN below every number and -inf below NaN."""
    size = bits & _SIGN
    key = tl.where(bits < 0, bits ^ _SIGN, bits)
    key = tl.where(size == 0, 0, key)
    key = tl.where(size > INF, _NAN, key)
    return tl.where((size == INF) & (bits < 0), _NONE, key)


@triton.jit
def number_key(score):
    """The key of a number; -0.0 has one of its own, just below that of 0.0, which compares alike."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ _SIGN, bits)


@triton.jit
def key_number(key):
    """The number of a key."""
    return tl.where(key < 0, key ^ _SIGN, key).to(tl.float32, bitcast=True)


@triton.jit
def row_end(ends, row, width, HAS_ENDS: tl.constexpr):
    """One past a row's last candidate."""
    end = width
    if HAS_ENDS:
        end = tl.minimum(tl.maximum(tl.load(ends + row), 0), width).to(tl.int32)
    return end


@triton.jit
def load_row(scores, positions, columns, end, width, SPAN: tl.constexpr, HAS_ENDS: tl.constexpr):
    """Scores of one row's columns, -inf from ``end`` on and where no candidate is. Both pointers are at the row's start."""
    there = columns < width
    if HAS_ENDS:
        there = there & (columns < (end + 3) // 4 * 4)  # fours are read whole, and at once where rows are aligned
    score = tl.load(scores + columns, mask=there, other=float("-inf"))
    if HAS_ENDS:
        score = tl.where(columns < end, score, float("-inf"))
    if SPAN:
        score = tl.where(tl.load(positions + columns // SPAN, mask=there, other=-1) >= 0, score, float("-inf"))
    return score


@triton.jit
def search(score, want, slack, low, high, low_count):
    """The key t, low <= t <= high, with at least ``want`` scores >= t: at most ``want + slack`` of them, or else the largest such t.

    ``low_count`` scores are >= low, no fewer than ``want``; fewer are > high. Interpolates between the two ends by
    their counts, halving the weight of an end that stays for a second time (the Illinois method); a search that this does not end is ended
    by bisection.
    """
    over = high + 1
    excess = (low_count - want).to(tl.float32)
    lack = want.to(tl.float32)
    side = low_count * 0
    turn = low_count * 0
    while (low < over - 1) & (low_count > want + slack):
        span = (over - low).to(tl.uint32, bitcast=True)
        part = tl.where(turn < _TURNS, excess / (excess + lack), 0.5)
        step = tl.minimum(tl.maximum((span.to(tl.float32) * part).to(tl.uint32), 1), span - 1)
        middle = low + step.to(tl.int32, bitcast=True)
        count = tl.sum((score >= key_number(middle)).to(tl.int32), axis=0)
        below = count < want
        excess = tl.where(below, tl.where(side < 0, excess * 0.5, excess), (count - want).to(tl.float32))
        lack = tl.where(below, (want - count).to(tl.float32), tl.where(side > 0, lack * 0.5, lack))
        side = tl.where(below, -1, 1)
        low_count = tl.where(below, low_count, count)
        low = tl.where(below, low, middle)
        over = tl.where(below, middle, over)
        turn += 1
    return low


@triton.jit
def sample_cut(
    scores, positions, end, width, aim, SAMPLE: tl.constexpr, ROOM: tl.constexpr, SPAN: tl.constexpr, HAS_ENDS: tl.constexpr
):
    """A level that about ``aim`` of a row's scores lie above, by SAMPLE of them; -inf if numbers are too few, or all have room in the list.

    4 neighbours are looked at out of every stride. Where in its stride a group lies is scattered, so that a period in the data does not
    meet the sample's own. A row of fewer than SAMPLE columns is looked at as a whole.
    """
    level = tl.zeros([], tl.float32) + float("-inf")
    if end > ROOM:
        at = tl.arange(0, SAMPLE)
        group = at // 4
        stride = end // (SAMPLE // 4)
        scattered = (group * stride + (((group * 40503) & 0xFFFF) * tl.maximum(stride - 3, 1) >> 16)) // 4
        columns = tl.where(stride < 4, group, scattered) * 4 + at % 4
        score = load_row(scores, positions, columns, end, width, SPAN, HAS_ENDS)
        score = tl.where(score == score, score, float("-inf"))
        num = tl.sum((score > float("-inf")).to(tl.int32), axis=0)
        seen = tl.minimum(end, SAMPLE)
        want = tl.minimum((aim * seen + end - 1) // end, seen) + num * 0
        full = num >= want
        top = tl.max(score, axis=0)
        low = num * 0 + LOWEST
        key = search(score, want, want // 16, low, tl.where(full, number_key(top), low - 1), num)
        level = tl.where(full, key_number(key), float("-inf"))
    return level


@triton.jit
def ties_of(score, cut):
    """Which scores tie with a cut; with -inf, NaN does."""
    every = tl.zeros_like(score) + cut == float("-inf")
    return ((score == cut) & ~every) | ((score != score) & every)


@triton.jit
def threshold(score, topk, low):
    """(cut, ties, length) for the topk best of ``score``, all of whose numbers have keys >= ``low``.

    Taken are the scores > cut and the first ``ties`` of those equal to it, ``length`` in all. Where numbers fall short of topk the cut is
    -inf, and the ties are NaN.
    """
    numbers = tl.sum((score > float("-inf")).to(tl.int32), axis=0)
    candidates = numbers + tl.sum((score != score).to(tl.int32), axis=0)
    short = numbers < topk
    top = tl.max(tl.where(score == score, score, float("-inf")), axis=0)
    low = numbers * 0 + low
    key = search(score, topk + numbers * 0, 0, low, tl.where(short, low - 1, number_key(top)), numbers)
    cut = tl.where(short, float("-inf"), key_number(key))
    length = tl.minimum(candidates, topk)
    return cut, length - tl.sum((score > cut).to(tl.int32), axis=0), length


@triton.jit
def count_chosen(score, cut):
    """1 for each score above the cut, and 1 << 16 for each tie."""
    return (score > cut).to(tl.int32) + (ties_of(score, cut).to(tl.int32) << 16)


@triton.jit
def put(
    row, to, keep, columns, score, positions, page_table, requests, indices, beside, topk, num_requests, max_pages, page_size,
    SPAN: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Write the kept columns at ``to`` in the row's result, as positions or slots. ``positions`` is at the row's start."""
    where = columns
    if SPAN:
        where = tl.load(positions + columns // SPAN, mask=keep, other=0).to(tl.int32) * SPAN + columns % SPAN
    if SLOTS:
        request = tl.load(requests + row)
        page = where // page_size
        known = keep & as_mask((request >= 0) & (request < num_requests)) & (page >= 0) & (page < max_pages)
        held = tl.load(page_table + request * max_pages + page, mask=known, other=-1)
        where = tl.where(held < 0, -1, held * page_size + where % page_size)
    # Not true, and harmless under a mask that nothing is known of: so threads keep the four neighbours that they loaded, and a count along
    # them is short. Triton would deal scattered stores out one by one.
    tl.store(tl.max_contiguous(tl.multiple_of(indices + row * topk + to, 16), 4), where, mask=keep)
    if WITH_SCORES:
        tl.store(tl.max_contiguous(tl.multiple_of(beside + row * topk + to, 16), 4), score, mask=keep)


@triton.jit
def load_chunk(scores, positions, first, end, width, CHUNK: tl.constexpr, SPAN: tl.constexpr, HAS_ENDS: tl.constexpr):
    """One chunk of a row's scores, ``[CHUNK // 32, 32]``."""
    columns = first + tl.arange(0, CHUNK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    if first + CHUNK <= end:  # without a mask, four scores come at a time whatever the width
        score = tl.load(scores + columns)
        if SPAN:
            score = tl.where(tl.load(positions + columns // SPAN) >= 0, score, float("-inf"))
    else:
        score = load_row(scores, positions, columns, end, width, SPAN, HAS_ENDS)
    return score


@triton.jit
def pack(flags, CHUNK: tl.constexpr):
    """Flags of a chunk as uint32 words of 32 columns, one held by each thread."""
    bit = tl.full([1, 32], 1, tl.uint32) << tl.arange(0, 32)[None, :].to(tl.uint32)
    word = tl.sum(tl.where(flags, bit, 0), axis=1)
    return tl.gather(word, tl.arange(0, CHUNK // 32), axis=0)  # the same words, but each was held by eight threads


@triton.jit
def count_bits(word):
    """Set bits of uint32 words, as int32."""
    count = word - ((word >> 1) & 0x55555555)
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F
    count += count >> 8
    return ((count + (count >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def lowest_bit(word):
    """The place of the lowest set bit of uint32 words: a power of two's exponent as a float."""
    return ((word ^ (word & (word - 1))).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def append(scores, found, first, word, counts, base, CHUNK: tl.constexpr, ROOM: tl.constexpr):
    """Append what a chunk's words mark to a row's list from place ``base`` on, as far as there is room: int32 ``[2, ROOM]``, bits, columns.

    Few scores pass, so every word gives up its bits one by one: as many turns as the fullest has, each reading its scores again, from L1.
    """
    to = base + tl.cumsum(counts, axis=0) - counts
    for _turn in range(tl.max(counts, axis=0)):
        live = word != 0
        column = first + tl.arange(0, CHUNK // 32) * 32 + lowest_bit(word)
        bits = tl.load(scores + column, mask=live, other=0.0).to(tl.int32, bitcast=True)
        tl.store(found + to, bits, mask=live & (to < ROOM))
        tl.store(found + ROOM + to, column, mask=live & (to < ROOM))
        word = word & (word - 1)
        to += 1


@triton.jit
def listed(found, at, count, CACHE: tl.constexpr):
    """Entries ``at`` of a list, or of its columns with ``found`` there; past ``count``, anything. Fours are read whole, as ROOM permits."""
    return tl.load(found + at, mask=at < (count + 3) // 4 * 4, other=0, cache_modifier=CACHE)


@triton.jit
def listed_scores(found, at, count, CACHE: tl.constexpr):
    """Scores of entries ``at`` of a list, -inf past ``count``."""
    return tl.where(at < count, listed(found, at, count, CACHE).to(tl.float32, bitcast=True), float("-inf"))


@triton.jit
def write(
    row, columns, score, cut, ties, above, tied, positions, page_table, requests, indices, beside,
    topk, num_requests, max_pages, page_size,
    SPAN: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Write the chosen of one tile, of ascending columns, behind ``above`` greater and ``tied`` equal ones in earlier tiles.

    Returns ``above`` and ``tied`` for the next tile.
    """
    chosen = count_chosen(score, cut)
    before = tl.cumsum(chosen, axis=0) - chosen
    total = tl.sum(chosen, axis=0)
    # 0, since a tile is shorter; a compiler that cannot know keeps words across the count, and not predicates, of which few fit.
    chosen ^= (total >> 15) & 1
    tied_before = tied + (before >> 16)
    put(
        row, above + (before & 0xFFFF) + tl.minimum(tied_before, ties), ((chosen & 1) > 0) | ((chosen > 1) & (tied_before < ties)),
        columns, score, positions, page_table, requests, indices, beside, topk, num_requests, max_pages, page_size,
        SPAN, SLOTS, WITH_SCORES,
    )  # fmt: skip
    return above + (total & 0xFFFF), tied + (total >> 16)


@triton.jit
def finish(row, length, lengths, indices, beside, topk, TILE: tl.constexpr, WITH_SCORES: tl.constexpr):
    """Write a row's length and its padding."""
    tl.store(lengths + row, length.to(tl.int64))
    for start in range(length, topk, TILE):
        at = start + tl.arange(0, TILE)
        tl.store(indices + row * topk + at, tl.full([TILE], -1, tl.int32), mask=at < topk)
        if WITH_SCORES:
            tl.store(beside + row * topk + at, tl.full([TILE], float("-inf"), tl.float32), mask=at < topk)


@triton.jit
def search_row(scores, positions, end, width, topk, TILE: tl.constexpr, SPAN: tl.constexpr, HAS_ENDS: tl.constexpr):
    """(cut, ties) as ``threshold`` has them, for a whole row that no list holds: four passes, each fixing 8 bits of the key."""
    want = topk + end * 0
    prefix = end * 0
    lacking = end < 0
    for step in tl.static_range(4):
        counts = tl.zeros([256], tl.int32)  # each warp has all of them in registers: more would spill
        for start in range(0, end, TILE):
            at = start + tl.arange(0, TILE)
            keys = order(load_row(scores, positions, at, end, width, SPAN, HAS_ENDS).to(tl.int32, bitcast=True))
            if step == 0:
                counts += tl.histogram((keys >> 24) + 128, 256, mask=keys > _NONE)
            else:
                counts += tl.histogram((keys >> (24 - 8 * step)) & 255, 256, mask=(keys > _NONE) & ((keys >> (32 - 8 * step)) == prefix))
        at_least = tl.cumsum(counts, axis=0, reverse=True)
        digit = tl.sum((at_least >= want).to(tl.int32), axis=0) - 1
        want -= tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0), axis=0)
        if step == 0:
            lacking = digit < 0
            prefix = digit - 128
        else:
            prefix = prefix * 256 + digit
    short = lacking | (prefix <= _NAN)
    cut = tl.where(short, float("-inf"), key_number(prefix))
    return cut, tl.where(lacking, end, want)


@triton.jit
def write_row(
    row, scores, positions, page_table, requests, indices, lengths, beside, end, width, topk, num_requests, max_pages, page_size,
    TILE: tl.constexpr, SPAN: tl.constexpr, HAS_ENDS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Select from the row itself, where the sample misled: five passes at most."""
    cut, ties = search_row(scores, positions, end, width, topk, TILE, SPAN, HAS_ENDS)
    above = end * 0
    tied = end * 0
    start = end * 0
    while (start < end) & (above + tl.minimum(tied, ties) < topk):
        at = start + tl.arange(0, TILE)
        score = load_row(scores, positions, at, end, width, SPAN, HAS_ENDS)
        above, tied = write(
            row, at, score, cut, ties, above, tied, positions, page_table, requests, indices, beside,
            topk, num_requests, max_pages, page_size, SPAN, SLOTS, WITH_SCORES,
        )  # fmt: skip
        start += TILE
    finish(row, above + tl.minimum(tied, ties), lengths, indices, beside, topk, TILE, WITH_SCORES)
