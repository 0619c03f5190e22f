# mypy: disable-error-code="no-untyped-def"
"""Before and after ``gluon_kernels.collect_kernel``: a level for each row, and the selection from a row's lists.

A score becomes an int32 key in the order of scores: the fp32 bits, ordered, with -0.0 as 0.0; NaN and -inf come last.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LAST = tl.constexpr(-(2**31))
_SIGN = tl.constexpr(0x7FFFFFFF)
_INF = tl.constexpr(0x7F800000)


@triton.jit
def _order(bits):
    """int32 bits of fp32 scores to keys; ``_LAST`` for NaN and -inf."""
    size = bits & _SIGN
    key = tl.where(bits < 0, bits ^ _SIGN, bits)
    key = tl.where(size == 0, 0, key)
    return tl.where((size > _INF) | ((size == _INF) & (bits < 0)), _LAST, key)


@triton.jit
def _kth(values, want, slack, low, high):
    """A t in [low, high] with at least ``want`` values >= t: at most ``want + slack`` of them, or else the largest such t.

    At least ``want`` values must be >= low. Bisection whose first steps down from high are short: the best are seldom far apart.
    """
    step = (low & 0) + (1 << 22)
    while low < high:
        half = high - ((low | high) - ((low ^ high) >> 1))  # the mean rounded up, without overflow
        middle = high - tl.minimum(half, step)
        step = tl.where(step < (1 << 30), step * 2, step)
        count = tl.sum((values >= middle).to(tl.int32), axis=0)
        high = tl.where(count < want, middle - 1, tl.where(count <= want + slack, middle, high))
        low = tl.where(count < want, low, middle)
    return low


@triton.jit
def level_kernel(sample, ends, levels, level_keys, width, stride, want, slack, whole, sample_row, BLOCK: tl.constexpr):
    """One row's level: the pair (score, key) that ``want`` to ``want + slack`` of the sample's pairs do not lie below.

    Column c of the sample is the key ``c // 64 * stride * 64 + c % 64``. A row of up to ``whole`` keys gets -inf: all of it is collected.
    So does one whose sample has too few scores, which its lists will not hold.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    bits = tl.load(sample + row * sample_row + column, mask=column < width, other=float("-inf")).to(tl.int32, bitcast=True)
    keys = _order(bits)
    level = tl.full([], float("-inf"), tl.float32)
    level_key = tl.full([], -1, tl.int32)
    few = tl.sum((keys > _LAST).to(tl.int32), axis=0) < want
    if (tl.load(ends + row) > whole) & (not few):
        cut = _kth(keys, want, slack, (want & 0) + (_LAST + 1), tl.max(keys, axis=0))
        level = tl.where(cut < 0, cut ^ _SIGN, cut).to(tl.float32, bitcast=True)
        tied = (keys == cut).to(tl.int32)
        above = tl.sum((keys > cut).to(tl.int32), axis=0)
        upto = tl.cumsum(tied, axis=0)
        # A plateau is cut at a key, so that not all of it passes: a column stands for as many keys as the stride.
        last = tl.max(tl.where((tied > 0) & (upto <= want - above), column, -1), axis=0)
        plateau = above + tl.sum(tied, axis=0) > want + slack
        level_key = tl.where(plateau, (last + 1) * stride - 1, _SIGN)
    tl.store(levels + row, level)
    tl.store(level_keys + row, level_key)


@triton.jit
def _num_bits(word):
    """Set bits of int32 words."""
    word = word.to(tl.uint32, bitcast=True)
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def settle_kernel(
    found, counts, ends, indices, lengths, beside, redo, masks, before, topk, num_rows, num_words, found_row,
    LISTS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, WORDS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Select from a row's lists: the ``topk`` largest pairs, keys ascending. ``redo`` is 1 where the lists do not hold the answer.

    Nothing is sorted: the keys taken become bits of a mask as long as the row, and a key's place is the number of bits before its own.
    ``masks`` and ``before`` int32 ``[programs, num_words]`` are a program's own, for one row after the other.
    """
    program = tl.program_id(0).to(tl.int64)
    masks += program * num_words
    before += program * num_words
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = program * 0 + index
        entry = tl.arange(0, BLOCK)
        count = tl.load(counts + row * LISTS + entry // ROOM, mask=entry < LISTS * ROOM, other=0)
        live = entry % ROOM < count
        pair = tl.load(found + row * found_row + entry, mask=live, other=0)
        key = (pair & 0xFFFFFFFF).to(tl.int32)
        score = tl.where(live, _order((pair >> 32).to(tl.int32)), _LAST)
        held = tl.sum(live.to(tl.int32), axis=0)
        end = tl.load(ends + row)
        wanted = tl.minimum(end, topk).to(tl.int32)
        wrong = (tl.max(count, axis=0) > ROOM) | (held < wanted)
        length = tl.where(wrong, 0, wanted)
        tl.store(redo + row, wrong.to(tl.int32))
        tl.store(lengths + row, length.to(tl.int64))
        if length > 0:
            cut = _kth(score, length, 0, (length & 0) + (_LAST + 1), tl.max(score, axis=0))
            above = tl.sum((score > cut).to(tl.int32), axis=0)
            tied = score == cut
            last = tl.full([], _SIGN, tl.int32)
            if tl.sum(tied.to(tl.int32), axis=0) > length - above:  # ties go to the smaller key
                last = -_kth(tl.where(tied, -key, _LAST), length - above, 0, (length & 0) - _SIGN, length & 0)
            take = (score > cut) | (tied & (key <= last))
            words = tl.minimum((end + 31) // 32, num_words).to(tl.int32)
            for start in range(0, words, WORDS):
                word = start + tl.arange(0, WORDS)
                tl.store(masks + word, tl.zeros([WORDS], tl.int32), mask=word < words)
            tl.debug_barrier()
            bit = (key & 0) + 1 << (key & 31)
            tl.atomic_or(masks + key // 32, bit, mask=take, sem="relaxed")
            tl.debug_barrier()
            total = length * 0
            for start in range(0, words, WORDS):
                word = start + tl.arange(0, WORDS)
                num = _num_bits(tl.load(masks + word, mask=word < words, other=0, cache_modifier=".cg"))
                tl.store(before + word, total + tl.cumsum(num, axis=0) - num, mask=word < words)
                total += tl.sum(num, axis=0)
            tl.debug_barrier()
            mine = tl.load(masks + key // 32, mask=take, other=0, cache_modifier=".cg")
            to = tl.load(before + key // 32, mask=take, other=0, cache_modifier=".cg") + _num_bits(mine & (bit - 1))
            tl.store(indices + row * topk + to, key, mask=take)
            if WITH_SCORES:
                tl.store(beside + row * topk + to, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=take)
            tl.debug_barrier()  # before the next row's zeros
        place = tl.arange(0, BLOCK_K)
        none = (place >= length) & (place < topk)
        tl.store(indices + row * topk + place, tl.full([BLOCK_K], -1, tl.int32), mask=none)
        if WITH_SCORES:
            tl.store(beside + row * topk + place, tl.full([BLOCK_K], float("-inf"), tl.float32), mask=none)
