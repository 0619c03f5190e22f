# mypy: disable-error-code="no-untyped-def"
"""Before and after ``gluon_kernels.collect_kernel``: ends and a level for each row, and the selection from a row's lists."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.select.triton_find import find, normal_guess, tail_guess
from thresher.ops.select.triton_search import LOWEST, count_bits, key_number, lowest_bit, pack

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
    BLOCK: tl.constexpr, KEPT: tl.constexpr, LISTS: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr,
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
    if tl.load(ends + row) > whole:
        held = tl.reshape(score, [BLOCK // (128 * WARPS), 32 * WARPS, 4])
        want = want + row.to(tl.int32) * 0
        guess, reach = normal_guess(held, want, width)
        low, count, above = find(held, want, slack, want * 0 + BLOCK, guess, reach)
        if low >= LOWEST:
            level = key_number(low)
            level_key = want * 0 + _SIGN
            if count > want + slack:
                # A plateau is cut at a key, so that not all of it passes: a column stands for as many keys as the stride.
                tied = (score == level).to(tl.int32)
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
def _last_tied(score, key, cut, excess, end):
    """The key up to which those tied with the cut are taken, so that ``excess`` of them are not."""
    back = tl.where(score == cut, -key, -_SIGN)
    num = tl.sum(tl.sum(tl.sum((back > -_SIGN).to(tl.int32), axis=2), axis=1), axis=0)
    low, high = 1 - end, end * 0
    while low < high:
        middle = low + (high - low + 1) // 2
        short = tl.sum(tl.sum(tl.sum((back >= middle).to(tl.int32), axis=2), axis=1), axis=0) < num - excess
        low = tl.where(short, low, middle)
        high = tl.where(short, middle - 1, high)
    return -low


@triton.jit
def _mark(bits, key, score, cut, INTERPRET: tl.constexpr):
    """Set the bits of the keys whose scores are not below the cut."""
    if INTERPRET:
        tl.atomic_or(bits + (key >> 5), (key & 0) + 1 << (key & 31), mask=score >= cut, sem="relaxed")
    else:  # the same, but Triton's masked atomics are branches, before which all addresses wait in registers
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 word, bit;
            .reg .b64 to;
            setp.ge.f32 p, $3, $4;
            shr.u32 word, $2, 5;
            mad.wide.u32 to, word, 4, $1;
            shf.l.wrap.b32 bit, 0, 1, $2;
            @p red.relaxed.gpu.global.or.b32 [to], bit;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,f,f",
            [bits.to(tl.int64), key, score, cut],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _nth_bit(word, left, WIDTH: tl.constexpr):
    """Which of ``2 * WIDTH`` bits is the set one that ``left`` others stand before."""
    low = word & ((1 << WIDTH) - 1)
    num = _num_bits(low)
    high = left >= num
    at = tl.where(high, WIDTH, 0)
    if WIDTH > 1:
        at += _nth_bit(tl.where(high, word >> WIDTH, low), tl.where(high, left - num, left), WIDTH // 2)
    return at


@triton.jit
def _emit(mask, upto, start, before, indices, WORDS: tl.constexpr, SLOTS: tl.constexpr):
    """Write the keys of a mask's set bits, ascending, from place ``before`` on, neighbours by neighbouring threads.

    ``upto``: bits up to each word's end. The r-th key is found by two searches: for its group of 64 words (or all), and in it for its word.
    """
    GROUP: tl.constexpr = min(64, WORDS)
    GROUPS: tl.constexpr = WORDS // GROUP
    below = upto - _num_bits(mask)
    packed = mask.to(tl.uint32, bitcast=True).to(tl.int64) | below.to(tl.int64) << 32
    ends = tl.max(tl.reshape(upto, [GROUPS, GROUP]), axis=1)
    total = tl.max(ends, axis=0)
    for first in range(0, total, SLOTS):
        rank = first + tl.arange(0, SLOTS)
        which = rank * 0
        which = _upper(ends, which, rank, GROUPS)
        which = _upper(upto, which * GROUP, rank, GROUP)
        its = tl.gather(packed, which, axis=0)
        at = (start + which) * 32 + _nth_bit(its.to(tl.int32), rank - (its >> 32).to(tl.int32), 16)
        tl.store(indices + before + rank, at, mask=rank < total)


@triton.jit
def _upper(upto, first, rank, SIZE: tl.constexpr):
    """From ``first`` on, past all but the last of ``SIZE`` ascending numbers that are not above the rank; a power of two."""
    if SIZE > 1:
        first = tl.where(tl.gather(upto, first + (SIZE // 2 - 1), axis=0) <= rank, first + SIZE // 2, first)
        first = _upper(upto, first, rank, SIZE // 2)
    return first


@triton.jit
def _settle_row(
    found, counts, level, length, num, end, bits, indices, beside, num_words,
    LISTS: tl.constexpr, ROOM: tl.constexpr, ENTRIES: tl.constexpr, DEEP: tl.constexpr, WORDS: tl.constexpr, WARPS: tl.constexpr,
    SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Write the ``length`` largest of a row's ``num`` pairs, of which no list holds more than ``DEEP``. ``indices`` is at the row's start.

    Entries are ``[threads, groups, 2]``, in which order Triton deals the first dim out to threads: each has the same ones to the end.
    """
    GROUPS: tl.constexpr = ENTRIES // (64 * WARPS)
    first = tl.arange(0, GROUPS)[None, :, None] * (64 * WARPS) + tl.arange(0, 32 * WARPS)[:, None, None] * 2
    which, place = first // DEEP, tl.multiple_of(first % DEEP, [1, 1, 2])
    two = tl.arange(0, 2)[None, None, :]
    count = tl.load(counts + which, mask=which < LISTS, other=0)
    at = which * ROOM + place + two
    there = tl.broadcast_to(place < count, at.shape)  # twos are read whole, and at once
    score = (tl.load(found + at, mask=there, other=0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    score = tl.where(place + two < count, score, float("-inf"))
    scores = tl.permute(score, (1, 0, 2))
    if level == float("-inf"):
        guess, reach = normal_guess(scores, length, num)
    else:
        guess, reach = tail_guess(scores, level, num, length)
    low, low_count, _above = find(scores, length, 0, num, guess, reach)
    cut = key_number(tl.maximum(low, LOWEST))  # all of them where no number is found
    tl.debug_barrier()  # the mask is all zeros, and no compiler holds keys from the first look on, for which there are no registers
    key = (tl.load(found + at, mask=there, other=0) & _SIGN).to(tl.int32)
    if (low_count > length) & (num > length):
        last = _last_tied(score, key, cut, low_count - length, end)
        score = tl.where((score == cut) & (key > last), float("-inf"), score)
    _mark(bits, key, score, cut, INTERPRET)
    key = tl.where(score >= cut, key, -1)
    tl.debug_barrier()
    words = tl.minimum((end + 31) // 32, num_words)
    before = length * 0
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        mask = tl.load(bits + word, mask=word < words, other=0, cache_modifier=".cg")
        set_bits = _num_bits(mask)
        upto = tl.cumsum(set_bits, axis=0)
        if WITH_SCORES:
            packed = mask.to(tl.uint32, bitcast=True).to(tl.int64) | (before + upto - set_bits).to(tl.int64) << 32
            inside = (key >> 5) - start
            take = inside.to(tl.uint32, bitcast=True) < WORDS
            its = tl.reshape(tl.gather(packed, tl.reshape(tl.where(take, inside, 0), [ENTRIES]), axis=0), [32 * WARPS, GROUPS, 2])
            to = (its >> 32).to(tl.int32) + _num_bits(its.to(tl.int32) & (((key & 0) + 1 << (key & 31)) - 1))
            to = to.to(tl.uint32, bitcast=True)
            # What is claimed of contiguity is not true, and harmless: neighbours stay in the threads that read them.
            tl.store(tl.max_contiguous(tl.multiple_of(indices + to, [1, 1, 16]), [1, 1, 2]), key, mask=take)
            tl.store(tl.max_contiguous(tl.multiple_of(beside + to, [1, 1, 16]), [1, 1, 2]), score, mask=take)
        else:
            _emit(mask, upto, start, before, indices, WORDS, SLOTS)
        if start + WORDS < words:
            before += tl.sum(set_bits, axis=0)
        tl.debug_barrier()  # of few words several threads have read the same
        tl.store(bits + word, tl.zeros([WORDS], tl.int32), mask=word < words)  # for the next row


@triton.jit
def _most_and_sum(a, b, c, d):
    return tl.maximum(a, c), b + d


@triton.jit
def settle_kernel(
    found, counts, ends, levels, bits, indices, lengths, beside, redo, topk, num_rows, num_words, found_row,
    LISTS: tl.constexpr, ROOM: tl.constexpr, ALL: tl.constexpr, DEEP: tl.constexpr, WORDS: tl.constexpr,
    TILE: tl.constexpr, WARPS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Select from a row's lists: the ``topk`` largest pairs, keys ascending. ``redo`` is 1 where the lists do not hold the answer.

    Nothing is sorted: the keys taken become bits of a mask as long as the row, and a key's place is the number of bits before its own.
    ``bits`` int32 ``[programs, num_words]`` is a program's own mask, for one row after the other. ``WORDS`` of it at a time are counted and
    handed to all threads, each with what lies before it. ``DEEP`` entries of each list are looked at where none holds more, which is the
    rule, and else twice as many.
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
        end, level = tl.load(ends + row).to(tl.int32), tl.load(levels + row)
        most, num = tl.reduce((count, tl.minimum(count, ROOM)), 0, _most_and_sum)
        wanted = tl.minimum(end, topk)
        wrong = (most > ROOM) | (num < wanted)
        length = tl.where(wrong, 0, wanted)
        tl.store(redo + row, wrong.to(tl.int32))
        tl.store(lengths + row, length.to(tl.int64))
        to, also = indices + row * topk, beside + row * topk
        if length > 0:
            if most <= DEEP:
                _settle_row(
                    pairs, own, level, length, num, end, bits, to, also, num_words,
                    LISTS, ROOM, ALL * DEEP, DEEP, WORDS, WARPS, SLOTS, WITH_SCORES, INTERPRET,
                )  # fmt: skip
            elif DEEP < ROOM:
                _settle_row(
                    pairs, own, level, length, num, end, bits, to, also, num_words,
                    LISTS, ROOM, 2 * ALL * DEEP, 2 * DEEP, WORDS, WARPS, SLOTS, WITH_SCORES, INTERPRET,
                )  # fmt: skip
        for start in range(length, topk, TILE):
            place = start + tl.arange(0, TILE)
            tl.store(to + place, tl.full([TILE], -1, tl.int32), mask=place < topk)
            if WITH_SCORES:
                tl.store(also + place, tl.full([TILE], float("-inf"), tl.float32), mask=place < topk)
