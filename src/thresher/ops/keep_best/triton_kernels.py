"""The Triton kernel that ``triton.py`` launches.

A candidate is ahead of another if its key is larger, or, where keys tie, its place: keys follow the scores, and a place is -1 minus the
logical position. What a query keeps is then told by two int32, the cut and the limit: keys above the cut, and ties from the limit on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.cache.device import wait_for_inputs
from thresher.ops.select.triton_find import find, normal_guess
from thresher.ops.select.triton_search import LOWEST, finish, key_number, number_key

_NONE = tl.constexpr(-(2**31))  # the key of no token, and the limit where all ties are kept
_NAN = tl.constexpr(-(2**31) + 1)


@triton.jit
def _key(score, position):
    """int32, in the order of scores: -0.0 is 0.0, NaN comes below -inf."""
    key = tl.where(score == 0.0, 0, number_key(score))
    return tl.where(position < 0, _NONE, tl.where(score != score, _NAN, key))


@triton.jit
def _place(position, rank, ranks, GRANULARITY: tl.constexpr):
    """int32, negative: larger for a smaller logical position."""
    return -1 - ((position // GRANULARITY * ranks + rank) * GRANULARITY + position % GRANULARITY)


@triton.jit
def _read(scores, positions, at, ranks, width, score_rank, position_rank, COLUMNS: tl.constexpr, FULL: tl.constexpr):
    """(scores, positions, ranks) of candidates ``at``, where each rank's ``width`` stand for COLUMNS; positions are -1 where there is none.

    With FULL there is one everywhere: under no mask, all loads are under way before the first of them is waited for.
    """
    rank, column = at // COLUMNS, at % COLUMNS
    scores += rank.to(tl.int64) * score_rank + column
    positions += rank.to(tl.int64) * position_rank + column
    if FULL:
        score, position = tl.load(scores), tl.load(positions)
    else:
        there = (rank < ranks) & (column < width)
        score, position = tl.load(scores, mask=there, other=0.0), tl.load(positions, mask=there, other=-1)
    return score, position, rank


@triton.jit
def _cut_held(
    scores, positions, ranks, width, topk, score_rank, position_rank,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, GRANULARITY: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """(cut, limit), of BLOCK candidates that are held in registers."""
    GROUPS: tl.constexpr = BLOCK // (128 * WARPS)
    at = tl.arange(0, BLOCK)
    score, position, _rank = _read(scores, positions, at, ranks, width, score_rank, position_rank, COLUMNS, FULL)
    held = tl.reshape(tl.where(position < 0, float("-inf"), score), [GROUPS, 32 * WARPS, 4])
    end = tl.zeros([], tl.int32) + ranks * width
    guess, reach = normal_guess(held, topk, end)
    cut, found, _above = find(held, topk, 0, end, guess, reach)
    limit = end * 0 + _NONE
    if (cut < LOWEST) | (found != topk):
        # Read again, rather than kept through the search.
        score, position, rank = _read(scores, positions, at, ranks, width, score_rank, position_rank, COLUMNS, FULL)
        key = _key(score, position)
        if cut < LOWEST:  # fewer than topk are above -inf, or topk are all there are
            cut = tl.where(tl.sum((key > _NAN).to(tl.int32)) < topk, _NAN, LOWEST - 1)
        tie = key == cut
        want = topk - tl.sum((key > cut).to(tl.int32))
        ties = tl.sum(tie.to(tl.int32))
        if ties > want:
            # A place is the key of a number, whose size follows the position: the same search finds the limit.
            place = _place(position, rank, ranks, GRANULARITY)
            number = tl.reshape(tl.where(tie, key_number(place), float("-inf")), [GROUPS, 32 * WARPS, 4])
            last = tl.min(tl.where(tie, place, -1))
            guess = key_number((last.to(tl.float32) * want / ties).to(tl.int32) - 1)
            limit, _, _ = find(number, want, 0, ties, guess, ((-1 - last) >> 3).to(tl.float32, bitcast=True))
            limit = tl.minimum(limit, -1)  # as a number, 0 is what -1 is
    return cut, limit


@triton.jit
def _count(
    scores, positions, ranks, width, score_rank, position_rank, cut, one, two, three,
    COLUMNS: tl.constexpr, GRANULARITY: tl.constexpr, TILE: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """How many keys are >= each of three numbers; with TIES, how many places of what ties with the cut."""
    first, second, third = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.int32)
    for start in range(0, ranks * COLUMNS, TILE):
        at = start + tl.arange(0, TILE)
        score, position, rank = _read(scores, positions, at, ranks, width, score_rank, position_rank, COLUMNS, False)
        word = _key(score, position)
        if TIES:
            word = tl.where(word == cut, _place(position, rank, ranks, GRANULARITY), _NONE)
        first += (word >= one).to(tl.int32)
        second += (word >= two).to(tl.int32)
        third += (word >= three).to(tl.int32)
    pair, last = tl.split(tl.sum(tl.join(tl.join(first, second), tl.join(third, third)), axis=0))  # one sum over the block
    first, second = tl.split(pair)
    return first, second, tl.max(last, axis=0)


@triton.jit
def _search(
    scores, positions, ranks, width, want, score_rank, position_rank, cut,
    COLUMNS: tl.constexpr, GRANULARITY: tl.constexpr, TILE: tl.constexpr, TIES: tl.constexpr,
):  # fmt: skip
    """A number that just ``want`` of what ``_count`` counts are >=, or the largest that more are; two of its bits a turn."""
    low = want * 0 + _NONE
    count = want * 0 - 1
    shift = want * 0 + 30
    while (shift >= 0) & (count != want):
        one = low + (1 << shift)
        two = one + (1 << shift)
        three = two + (1 << shift)
        first, second, third = _count(
            scores, positions, ranks, width, score_rank, position_rank, cut, one, two, three, COLUMNS, GRANULARITY, TILE, TIES
        )  # fmt: skip
        low = tl.where(third >= want, three, tl.where(second >= want, two, tl.where(first >= want, one, low)))
        count = tl.where(third >= want, third, tl.where(second >= want, second, tl.where(first >= want, first, count)))
        shift -= 2
    return low


@triton.jit
def _cut_walked(
    scores, positions, ranks, width, topk, score_rank, position_rank,
    COLUMNS: tl.constexpr, GRANULARITY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(cut, limit), of candidates that are too many to hold."""
    want = tl.zeros([], tl.int32) + topk
    cut = want * 0 + _NAN
    limit = want * 0 + _NONE
    every, _, _ = _count(scores, positions, ranks, width, score_rank, position_rank, cut, cut, cut, cut, COLUMNS, GRANULARITY, TILE, False)
    if every > want:
        cut = _search(scores, positions, ranks, width, want, score_rank, position_rank, cut, COLUMNS, GRANULARITY, TILE, False)
        least, above, _ = _count(
            scores, positions, ranks, width, score_rank, position_rank, cut, cut, cut + 1, cut + 1, COLUMNS, GRANULARITY, TILE, False
        )  # fmt: skip
        if least > want:
            limit = _search(scores, positions, ranks, width, want - above, score_rank, position_rank, cut, COLUMNS, GRANULARITY, TILE, True)
    return cut, limit


@triton.jit(do_not_specialize=["rank"])
def keep_kernel(
    scores, positions, indices, lengths, beside, ranks, width, rank, topk, score_rank, score_row, position_rank, position_row,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr, HELD: tl.constexpr, TILE: tl.constexpr,
    GRANULARITY: tl.constexpr, WARPS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """What one rank keeps for a query.

    COLUMNS: a power of two that holds a rank's ``width`` candidates. BLOCK: with HELD, one that holds those of all ranks; else how many are
    looked at together. TILE: how many of its own are written together.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_row
    positions += row * position_row
    wait_for_inputs(OVERLAP)
    if HELD:
        cut, limit = _cut_held(scores, positions, ranks, width, topk, score_rank, position_rank, COLUMNS, BLOCK, FULL, GRANULARITY, WARPS)
    else:
        cut, limit = _cut_walked(scores, positions, ranks, width, topk, score_rank, position_rank, COLUMNS, GRANULARITY, BLOCK)
    scores += rank.to(tl.int64) * score_rank
    positions += rank.to(tl.int64) * position_rank
    length = cut * 0
    for start in range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        score = tl.load(scores + column, mask=column < width, other=0.0)
        position = tl.load(positions + column, mask=column < width, other=-1)
        key = _key(score, position)
        kept = (key > cut) | ((key == cut) & (_place(position, rank, ranks, GRANULARITY) >= limit))
        to = row * topk + length + tl.cumsum(kept.to(tl.int32)) - 1
        # Not true, and harmless under a mask that nothing is known of: so threads keep the neighbours that they loaded.
        tl.store(tl.max_contiguous(tl.multiple_of(indices + to, 16), 4), position, mask=kept)
        tl.store(tl.max_contiguous(tl.multiple_of(beside + to, 16), 4), score, mask=kept)
        length += tl.sum(kept.to(tl.int32))
    finish(row, length, lengths, indices, beside, topk, TILE, True)
