# mypy: disable-error-code="no-untyped-def"
"""Before ``gluon_kernels.collect_kernel``: ends and a level for each row."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.select.triton_find import find, normal_guess
from thresher.ops.select.triton_search import LOWEST, count_bits, key_number, lowest_bit, pack

_SIGN = tl.constexpr(0x7FFFFFFF)  # every bit but the sign


@triton.jit
def sampled_turn(number, stride, spread):
    """Which turn of ``TILES`` tiles is in the sample as this one: one of every stride turns, in run ``number % spread``.

    ``spread``: the runs that collecting shares turns out to, run r those that leave r, so that each has as many to leave out; or 1, for
    every stride-th turn. Both are powers of two, the stride no less.
    """
    return number * stride + (number & (spread - 1))


@triton.jit
def prepare_kernel(
    positions, requests, lengths, page_table, ends, levels, level_keys, last_seen, table,
    num_rows, num_requests, room_tokens, stride, spread, num_sampled, table_width, table_row, table_page,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """What the others ask of rows, and the sample's page table: that of ``sampled_turn``, ``num_sampled`` pages for each request.

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
        seen = end // TILE
        turns = seen // TILES
        number = turns // stride
        edge = sampled_turn(number, stride, spread)
        tiles = number * TILES + tl.where(edge < turns, TILES, tl.where(edge == turns, seen % TILES, 0))
        tl.store(last_seen + at, tiles * TILE - 1, mask=here)
        column = at % num_sampled
        tile = sampled_turn(column // TILES, stride, spread) * TILES + column % TILES
        inside = at < num_requests * num_sampled
        page = tl.load(
            page_table + (at // num_sampled).to(tl.int64) * table_row + tile.to(tl.int64) * table_page,
            mask=inside & (tile < table_width), other=-1,
        )  # fmt: skip
        tl.store(table + at, page, mask=inside)


@triton.jit
def _key_of(column, stride, spread, TILES: tl.constexpr):
    """The key that a column of the sample is."""
    tile = column // 64
    return (sampled_turn(tile // TILES, stride, spread) * TILES + tile % TILES) * 64 + column % 64


@triton.jit
def _keep(
    row, passes, sample, near_ends, found, counts, stride, spread, whole, found_row,
    BLOCK: tl.constexpr, LISTS: tl.constexpr, ROOM: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Enter what passes of a row's sample into its lists, whose counts are 0, from the turns that collecting then leaves out.

    Those are the turns that all rows of one request which collect together, with ends ``near_ends``, see to their end; none if any of these
    rows is so short that it needs no level. ``sample`` is at the row's start. Few pass, so each thread enters its own one by one.
    """
    stop = tl.min(tl.where(near_ends > whole, near_ends // (64 * TILES), 0), axis=0)
    turn = sampled_turn(tl.arange(0, BLOCK) // (64 * TILES), stride, spread)
    word = pack(tl.reshape(passes & (turn < stop), [BLOCK // 32, 32]), BLOCK)
    for _turn in range(tl.max(count_bits(word), axis=0)):
        live = word != 0
        column = tl.arange(0, BLOCK // 32) * 32 + lowest_bit(word)
        key = _key_of(column, stride, spread, TILES)
        to = key % LISTS  # any would do
        place = tl.atomic_add(counts + row * LISTS + to, 1, mask=live, sem="relaxed")
        bits = tl.load(sample + column, mask=live, other=0.0).to(tl.int32, bitcast=True)
        pair = (bits.to(tl.int64) << 32) | key.to(tl.int64)
        tl.store(found + row * found_row + to * ROOM + place, pair, mask=live & (place < ROOM))
        word = word & (word - 1)


@triton.jit
def level_kernel(
    sample, ends, levels, level_keys, requests, found, counts, num_rows, width, stride, spread, want, slack, whole, sample_row,
    found_row, BLOCK: tl.constexpr, KEPT: tl.constexpr, LISTS: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """One row's level: the pair (score, key) that ``want`` to ``want + slack`` of the sample's pairs do not lie below.

    Which keys the sample's columns are, ``_key_of`` says. A row of up to ``whole`` keys gets -inf: all of it is collected. So does one
    whose sample has too few scores, which its lists will not hold. Where ``KEPT``, the sample's own pairs go to the lists.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    sample += row * sample_row
    score = tl.load(sample + column, mask=column < width, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    level = tl.full([], float("-inf"), tl.float32)
    level_key = tl.full([], -1, tl.int32)
    if KEPT:
        # Of the rows that collect with this one: asked for here, so that nothing waits for the answer.
        near = row // ROWS * ROWS + tl.arange(0, ROWS)
        request, near_request = tl.load(requests + row), tl.load(requests + near, mask=near < num_rows, other=-1)
        near_ends = tl.load(ends + near, mask=near < num_rows, other=0)
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
        key = _key_of(column, stride, spread, TILES)
        passes = (score > level) | ((score == level) & (key <= level_key))
        near_ends = tl.where((near < num_rows) & (near_request == request), near_ends, 2**31 - 1)
        _keep(row, passes, sample, near_ends, found, counts, stride, spread, whole, found_row, BLOCK, LISTS, ROOM, TILES)
    tl.store(levels + row, level)
    tl.store(level_keys + row, level_key)
