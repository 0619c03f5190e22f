# mypy: disable-error-code="no-untyped-def"
"""Before and after ``gluon_kernels.collect_kernel``: ends and a level for each row, and the selection from a row's lists."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.select.triton_search import LOWEST, count_bits, key_number, lowest_bit, number_key, pack, search

_SIGN = tl.constexpr(0x7FFFFFFF)  # every bit but the sign


@triton.jit
def prepare_kernel(
    positions, requests, lengths, page_table, ends, levels, level_keys, last_seen, table,
    num_rows, num_requests, room_tokens, stride, num_sampled, table_row, table_page,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """What the others ask of rows, and the sample's page table: every stride-th page, ``num_sampled`` for each request.

    ``ends``: keys that a row sees, none of a request that is not there. Levels that let all pass. ``last_seen``: the last of the sample's
    columns that a row sees, which are the tiles that it sees to their end.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < num_rows
    request = tl.load(requests + at, mask=here, other=-1)
    known = (request >= 0) & (request < num_requests)
    held = tl.minimum(tl.load(lengths + tl.where(known, request, 0), mask=known, other=0), room_tokens)
    end = tl.maximum(tl.minimum(tl.load(positions + at, mask=here, other=-1), held - 1) + 1, 0)
    tl.store(ends + at, end, mask=here)
    tl.store(levels + at, tl.full([BLOCK], float("-inf"), tl.float32), mask=here)
    tl.store(level_keys + at, tl.full([BLOCK], -1, tl.int32), mask=here)
    if SAMPLED:
        tl.store(last_seen + at, (end // TILE + stride - 1) // stride * TILE - 1, mask=here)
        page = tl.load(
            page_table + (at // num_sampled).to(tl.int64) * table_row + (at % num_sampled).to(tl.int64) * stride * table_page,
            mask=at < num_requests * num_sampled,
        )
        tl.store(table + at, page, mask=at < num_requests * num_sampled)


@triton.jit
def _kth(values, want, low, high):
    """The largest t in [low, high] with at least ``want`` values >= t; as many must be >= low."""
    while low < high:
        middle = low + (high - low + 1) // 2
        short = tl.sum((values >= middle).to(tl.int32), axis=0) < want
        low = tl.where(short, low, middle)
        high = tl.where(short, middle - 1, high)
    return low


@triton.jit
def _search(score, want, slack, low, high, low_count, guess):
    """The number whose key ``search`` finds from these and a first guess, low <= guess <= high."""
    count = tl.sum((score >= key_number(guess)).to(tl.int32), axis=0)
    few = count < want
    low, high = tl.where(few, low, guess), tl.where(few, guess - 1, high)
    return key_number(search(score, want, slack, low, high, tl.where(few, low_count, count), tl.where(few, count, 0)))


@triton.jit
def _keep(
    row, passes, sample, requests, ends, found, counts, num_rows, stride, whole, found_row,
    BLOCK: tl.constexpr, LISTS: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Enter what passes of a row's sample into its lists, whose counts are 0, from the tiles that collecting then leaves out.

    ``ROWS`` rows collect together. Of those that have one request, the tiles are left out that all see to their end, none if any of these
    rows is so short that it needs no level. ``sample`` is at the row's start. Few pass, so each thread enters its own one by one.
    """
    near = row // ROWS * ROWS + tl.arange(0, ROWS)
    same = (near < num_rows) & (tl.load(requests + near, mask=near < num_rows, other=-1) == tl.load(requests + row))
    end = tl.load(ends + near, mask=same, other=0)
    stop = tl.min(tl.where(same, tl.where(end > whole, end // 64, 0), 2**31 - 1), axis=0)
    passes = passes & (tl.arange(0, BLOCK) // 64 * stride < stop)
    word = pack(tl.reshape(passes, [BLOCK // 32, 32]), BLOCK)
    for _turn in range(tl.max(count_bits(word), axis=0)):
        live = word != 0
        column = tl.arange(0, BLOCK // 32) * 32 + lowest_bit(word)
        key = column // 64 * (stride * 64) + column % 64
        to = key % LISTS  # any would do
        place = tl.atomic_add(counts + row * LISTS + to, 1, mask=live, sem="relaxed")
        bits = tl.load(sample + column, mask=live, other=0.0).to(tl.int32, bitcast=True)
        pair = (bits.to(tl.int64) << 32) | key.to(tl.int64)
        tl.store(found + row * found_row + to * ROOM + place, pair, mask=live & (place < ROOM))
        word = word & (word - 1)


@triton.jit
def level_kernel(
    sample, ends, levels, level_keys, requests, found, counts, num_rows, width, stride, want, slack, whole, sample_row, found_row,
    BLOCK: tl.constexpr, KEPT: tl.constexpr, LISTS: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One row's level: the pair (score, key) that ``want`` to ``want + slack`` of the sample's pairs do not lie below.

    Column c of the sample is the key ``c // 64 * stride * 64 + c % 64``. A row of up to ``whole`` keys gets -inf: all of it is collected.
    So does one whose sample has too few scores, which its lists will not hold. Where ``KEPT``, the sample's own pairs go to the lists.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    sample += row * sample_row
    score = tl.load(sample + column, mask=column < width, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    level = tl.full([], float("-inf"), tl.float32)
    level_key = tl.full([], -1, tl.int32)
    if KEPT:
        tl.store(counts + row * LISTS + column, tl.zeros([BLOCK], tl.int32), mask=column < LISTS)
        tl.debug_barrier()
    num = tl.sum((score > float("-inf")).to(tl.int32), axis=0)
    if (tl.load(ends + row) > whole) & (num >= want):
        top = number_key(tl.max(score, axis=0))
        guess = tl.maximum(top - (5 << 20), LOWEST)  # five eighths of an octave down: the best are seldom far apart
        level = _search(score, want + num * 0, slack, num * 0 + LOWEST, top, num, guess)
        level_key = level_key * 0 + _SIGN
        if tl.sum((score >= level).to(tl.int32), axis=0) > want + slack:
            # A plateau is cut at a key, so that not all of it passes: a column stands for as many keys as the stride.
            tied = (score == level).to(tl.int32)
            above = tl.sum((score > level).to(tl.int32), axis=0)
            upto = tl.cumsum(tied, axis=0)
            last = tl.max(tl.where((tied > 0) & (upto <= want - above), column, -1), axis=0)
            level_key = (last + 1) * stride - 1
    if KEPT:  # with a level or without: collecting leaves the tiles out either way
        key = column // 64 * (stride * 64) + column % 64
        passes = (score > level) | ((score == level) & (key <= level_key))
        _keep(row, passes, sample, requests, ends, found, counts, num_rows, stride, whole, found_row, BLOCK, LISTS, ROOM, ROWS)
    tl.store(levels + row, level)
    tl.store(level_keys + row, level_key)


@triton.jit
def _num_bits(word):
    """Set bits of int32 words, in the form that the compiler knows for an instruction's."""
    word = word.to(tl.uint32, bitcast=True)
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _places(counts, first, LISTS: tl.constexpr, ROOM: tl.constexpr, ALL: tl.constexpr, WIDE: tl.constexpr):
    """Of places ``first`` to ``first + WIDE`` in all of a row's lists: where each is in the row, whether to read it, whether it is held."""
    which = tl.arange(0, ALL)
    count = tl.load(counts + which, mask=which < LISTS, other=0)[:, None]
    place = first + tl.arange(0, WIDE)[None, :]
    return which[:, None] * ROOM + place, place < (count + 1) // 2 * 2, place < count  # twos are read whole, and at once


@triton.jit
def _is_taken(pair, held, cut, last):
    """A pair's key, and whether it is among the held that are taken."""
    key = (pair & _SIGN).to(tl.int32)
    score = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return key, held & ((score > cut) | ((score == cut) & (key <= last)))


@triton.jit
def _find_cut(found, counts, level, length, num, end, LISTS: tl.constexpr, ROOM: tl.constexpr, ALL: tl.constexpr, DEEP: tl.constexpr):
    """``(cut, last)`` for a row whose lists hold ``num`` pairs, up to ``DEEP`` each.

    Taken are the ``length`` scores larger than the cut, or equal to it at keys up to ``last``.
    """
    at, there, held = _places(counts, 0, LISTS, ROOM, ALL, DEEP)
    score = (tl.load(found + at, mask=there, other=0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    score = tl.where(held, score, float("-inf"))
    low = tl.where(level == float("-inf"), LOWEST, number_key(level))
    flat = tl.reshape(score, [ALL * DEEP], can_reorder=True)
    top = number_key(tl.max(flat, axis=0))
    # Two fifths of what lies above the level lie above this in usual distributions. It saves two steps of nine.
    guess = low + ((top - low).to(tl.uint32, bitcast=True) >> 2).to(tl.int32, bitcast=True)
    cut = _search(flat, length, 0, low, top, num, guess)
    more = tl.sum((flat >= cut).to(tl.int32), axis=0) - length
    last = length * 0 + _SIGN
    if more > 0:
        tied = score == cut
        key = (tl.load(found + at, mask=tied, other=0) & _SIGN).to(tl.int32)
        back = tl.reshape(tl.where(tied, -key, -_SIGN), [ALL * DEEP], can_reorder=True)
        last = -_kth(back, tl.sum((back > -_SIGN).to(tl.int32), axis=0) - more, 1 - end, length * 0)
    return cut, last


@triton.jit
def settle_kernel(
    found, counts, ends, levels, bits, indices, lengths, beside, redo, topk, num_rows, num_words, found_row,
    LISTS: tl.constexpr, ROOM: tl.constexpr, ALL: tl.constexpr, DEEP: tl.constexpr, WIDE: tl.constexpr, WORDS: tl.constexpr,
    TILE: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Select from a row's lists: the ``topk`` largest pairs, keys ascending. ``redo`` is 1 where the lists do not hold the answer.

    Nothing is sorted: the keys taken become bits of a mask as long as the row, and a key's place is the number of bits before its own.
    ``bits`` int32 ``[programs, num_words]`` is a program's own mask, for one row after the other. ``WORDS`` of it at a time are counted and
    handed to all threads, each with what lies before it. A search looks at ``DEEP`` entries of each list where none holds more, which is
    the rule, and else at twice as many; the rest at ``WIDE`` of each together.
    """
    program = tl.program_id(0).to(tl.int64)
    bits += program * num_words
    for start in range(0, num_words, WORDS):
        word = start + tl.arange(0, WORDS)
        tl.store(bits + word, tl.zeros([WORDS], tl.int32), mask=word < num_words)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = program * 0 + index
        pairs = found + row * found_row
        own = counts + row * LISTS
        which = tl.arange(0, ALL)
        count = tl.load(own + which, mask=which < LISTS, other=0)
        most = tl.max(count, axis=0)
        num = tl.sum(tl.minimum(count, ROOM), axis=0)
        end = tl.load(ends + row).to(tl.int32)
        wanted = tl.minimum(end, topk)
        wrong = (most > ROOM) | (num < wanted)
        length = tl.where(wrong, 0, wanted)
        tl.store(redo + row, wrong.to(tl.int32))
        tl.store(lengths + row, length.to(tl.int64))
        if length > 0:
            level = tl.load(levels + row)
            cut = level
            last = length
            if most <= DEEP:
                cut, last = _find_cut(pairs, own, level, length, num, end, LISTS, ROOM, ALL, DEEP)
            elif DEEP < ROOM:
                cut, last = _find_cut(pairs, own, level, length, num, end, LISTS, ROOM, ALL, 2 * DEEP)
            tl.debug_barrier()  # the mask is all zeros
            for first in range(0, most, WIDE):
                at, there, held = _places(own, first, LISTS, ROOM, ALL, WIDE)
                key, take = _is_taken(tl.load(pairs + at, mask=there, other=0), held, cut, last)
                # What is claimed of contiguity, here and below, is not true, and harmless: neighbours stay in the threads that read them.
                word = tl.max_contiguous(tl.multiple_of(bits + key // 32, [1, 16]), [1, 2])
                tl.atomic_or(word, (key & 0) + 1 << (key & 31), mask=take, sem="relaxed")
            tl.debug_barrier()
            words = tl.minimum((end + 31) // 32, num_words)
            before = length * 0
            for start in range(0, words, WORDS):
                word = start + tl.arange(0, WORDS)
                mask = tl.load(bits + word, mask=word < words, other=0, cache_modifier=".cg")
                tl.store(bits + word, tl.zeros([WORDS], tl.int32), mask=word < words)  # for the next row
                set_bits = _num_bits(mask)
                upto = tl.cumsum(set_bits, axis=0)
                packed = mask.to(tl.uint32, bitcast=True).to(tl.int64) | (before + upto - set_bits).to(tl.int64) << 32
                before += tl.sum(set_bits, axis=0)
                for first in range(0, most, WIDE):
                    at, there, held = _places(own, first, LISTS, ROOM, ALL, WIDE)
                    pair = tl.load(pairs + at, mask=there, other=0)
                    key, take = _is_taken(pair, held, cut, last)
                    inside = key // 32 - start
                    take = take & (inside >= 0) & (inside < WORDS)
                    its = tl.gather(packed, tl.reshape(tl.where(take, inside, 0), [ALL * WIDE]), axis=0)
                    its = tl.reshape(its, [ALL, WIDE])
                    to = row * topk + (its >> 32).to(tl.int32) + _num_bits(its.to(tl.int32) & (((key & 0) + 1 << (key & 31)) - 1))
                    tl.store(tl.max_contiguous(tl.multiple_of(indices + to, [1, 16]), [1, 2]), key, mask=take)
                    if WITH_SCORES:
                        score = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                        tl.store(tl.max_contiguous(tl.multiple_of(beside + to, [1, 16]), [1, 2]), score, mask=take)
        for start in range(length, topk, TILE):
            place = start + tl.arange(0, TILE)
            tl.store(indices + row * topk + place, tl.full([TILE], -1, tl.int32), mask=place < topk)
            if WITH_SCORES:
                tl.store(beside + row * topk + place, tl.full([TILE], float("-inf"), tl.float32), mask=place < topk)
