"""The Triton kernels in which one program takes a row; the method is told in ``triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.select.triton_find import find, normal_guess
from thresher.ops.select.triton_search import (
    LOWEST,
    append,
    count_bits,
    finish,
    key_number,
    listed,
    listed_scores,
    load_chunk,
    load_row,
    number_key,
    pack,
    put,
    row_end,
    sample_cut,
    threshold,
    ties_of,
    write,
    write_row,
)  # fmt: skip


@triton.jit
def _bases(flags, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """(bases, zero): how many flags, 0 or 1, columns before each four have, ``[groups, threads]``; and 0, which no compiler can know.

    Four groups' counts along a warp's lanes are bytes of one word, so that there are few to scan.
    """
    GROUPS: tl.constexpr = BLOCK // (128 * WARPS)
    PACKED: tl.constexpr = min(4, GROUPS)
    shift = 8 * tl.arange(0, PACKED)[None, :, None]
    num = tl.sum(tl.reshape(flags, [GROUPS, 32 * WARPS, 4]), axis=2)
    word = tl.sum(tl.reshape(num, [GROUPS // PACKED, PACKED, WARPS, 32]) << shift[:, :, :, None], axis=1)
    before = tl.cumsum(word, axis=2) - word
    before = tl.reshape((before[:, None, :, :] >> shift[:, :, :, None]) & 0xFF, [GROUPS, WARPS, 32])
    count = tl.reshape((tl.sum(word, axis=2)[:, None, :] >> shift) & 0xFF, [GROUPS, WARPS])
    in_warp = tl.sum(count, axis=0)
    first = tl.cumsum(count, axis=0) - count + (tl.cumsum(in_warp, axis=0) - in_warp)[None, :]
    return tl.reshape(before + first[:, :, None], [GROUPS, 32 * WARPS]), tl.sum(in_warp, axis=0) >> 20


@triton.jit
def _places(bases, flags, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """How many flags columns before each one have."""
    four = tl.reshape(flags, [BLOCK // (128 * WARPS), 32 * WARPS, 4])
    return tl.reshape(bases[:, :, None] + (tl.cumsum(four, axis=2) - four), [BLOCK])


@triton.jit
def _columns(zero, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """The columns of a row as threads hold them: fours of neighbours, 128 columns of a warp beside each other, a warp's in one run."""
    GROUPS: tl.constexpr = BLOCK // (128 * WARPS)
    thread = tl.arange(0, 32 * WARPS) + zero
    first = thread // 32 * (128 * GROUPS) + thread % 32 * 4
    more = tl.arange(0, GROUPS)[:, None, None] * 128 + tl.arange(0, 4)[None, None, :]
    return tl.reshape(first[None, :, None] + more, [BLOCK])


@triton.jit
def one_program(
    scores, positions, ends, page_table, requests, indices, lengths, beside,
    width, topk, score_stride, position_stride, num_requests, max_pages, page_size,
    BLOCK: tl.constexpr, WARPS: tl.constexpr,
    SPAN: tl.constexpr, HAS_ENDS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """A whole row that stays in registers. BLOCK: a power of two, at least 128 for each of the program's WARPS and at most 16384."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_stride
    if SPAN:
        positions += row * position_stride
    at = tl.arange(0, BLOCK)
    # ``_columns``, in a form of which the compiler knows that fours are neighbours.
    columns = at // 128 % WARPS * (BLOCK // WARPS) + at // (128 * WARPS) * 128 + at % 128
    end = row_end(ends, row, width, HAS_ENDS)
    score = load_row(scores, positions, columns, end, width, SPAN, HAS_ENDS)
    held = tl.reshape(score, [BLOCK // (128 * WARPS), 32 * WARPS, 4])
    guess, reach = normal_guess(held, topk, end)
    low, low_count, above = find(held, topk, 0, end, guess, reach)
    cut = key_number(low)
    length = topk + end * 0
    mark = score
    if (low < LOWEST) | (low_count != topk):  # not what is at the cut or above it: ties are left over, or NaN fills up
        cut = tl.where(low < LOWEST, float("-inf"), cut)
        tie = ties_of(score, cut)
        if low < LOWEST:
            above = tl.sum((score > cut).to(tl.int32), axis=0)
            length = tl.minimum(above + tl.sum(tie.to(tl.int32), axis=0), topk)
        bases, _zero = _bases(tie.to(tl.int32), BLOCK, WARPS)
        chosen = (score > cut) | (tie & (_places(bases, tie.to(tl.int32), BLOCK, WARPS) < length - above))
        mark = tl.where(chosen, 1.0, 0.0)
        cut = length * 0 + 1.0
    bases, zero = _bases((mark >= cut).to(tl.int32), BLOCK, WARPS)
    # Compared once more, and columns counted anew, since registers would not hold all of either across the scan.
    chosen = mark >= cut + zero
    columns = _columns(zero, BLOCK, WARPS)
    if WITH_SCORES:  # beside the marks there is no room for them
        score = tl.load(scores + columns, mask=chosen, other=0.0)
    put(
        row, _places(bases, chosen.to(tl.int32), BLOCK, WARPS), chosen, columns, score, positions, page_table, requests, indices, beside,
        topk, num_requests, max_pages, page_size, SPAN, SLOTS, WITH_SCORES,
    )  # fmt: skip
    finish(row, length, lengths, indices, beside, topk, BLOCK // 4, WITH_SCORES)


@triton.jit
def _select_listed(
    row, found, count, level, positions, page_table, requests, indices, lengths, beside,
    topk, num_requests, max_pages, page_size,
    ROOM: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Select from a list of at most SIZE entries, in the order of columns, that holds the answer."""
    entry = tl.arange(0, SIZE)
    score = listed_scores(found, entry, count, "")
    low = tl.where(level == float("-inf"), LOWEST, number_key(level) + 1)
    cut, ties, length = threshold(score, topk, low)
    above = count * 0
    tied = count * 0
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        tile = listed_scores(found, at, count, "")
        columns = listed(found + ROOM, at, count, "")
        above, tied = write(
            row, columns, tile, cut, ties, above, tied, positions, page_table, requests, indices, beside,
            topk, num_requests, max_pages, page_size, SPAN, SLOTS, WITH_SCORES,
        )  # fmt: skip
    finish(row, length, lengths, indices, beside, topk, TILE, WITH_SCORES)


@triton.jit
def _write_ties(
    row, scores, found, count, level, ties, positions, page_table, requests, indices, lengths, beside, end,
    width, topk, num_requests, max_pages, page_size,
    ROOM: tl.constexpr, TILE: tl.constexpr,
    SPAN: tl.constexpr, HAS_ENDS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """The whole list and the row's first ``ties`` that tie with the level; returns how many there were.

    The row is read up to the last of them; what lies behind comes from the list, whose columns ascend.
    """
    above = count * 0
    tied = count * 0
    start = count * 0
    while (start < end) & (tied < ties):
        at = start + tl.arange(0, TILE)
        score = load_row(scores, positions, at, end, width, SPAN, HAS_ENDS)
        above, tied = write(
            row, at, score, level, ties, above, tied, positions, page_table, requests, indices, beside,
            topk, num_requests, max_pages, page_size, SPAN, SLOTS, WITH_SCORES,
        )  # fmt: skip
        start += TILE
    for first in range(above, count, TILE):
        at = first + tl.arange(0, TILE)
        # Not fours at once: the list is entered anywhere.
        score = tl.load(found + at, mask=at < count, other=0).to(tl.float32, bitcast=True)
        columns = tl.load(found + ROOM + at, mask=at < count, other=0)
        put(
            row, at + ties, at < count, columns, score, positions, page_table, requests, indices, beside,
            topk, num_requests, max_pages, page_size, SPAN, SLOTS, WITH_SCORES,
        )  # fmt: skip
    finish(row, count + ties, lengths, indices, beside, topk, TILE, WITH_SCORES)
    return tied


@triton.jit
def one_pass(
    scores, positions, ends, page_table, requests, indices, lengths, beside, found,
    width, topk, aim, score_stride, position_stride, num_requests, max_pages, page_size,
    SAMPLE: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr, SMALL: tl.constexpr, TILE: tl.constexpr,
    SPAN: tl.constexpr, HAS_ENDS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """A row read once in full: what stands above a level from a sample goes to a list in order, and the list is searched.

    ``found`` int32 ``[Q, 2, ROOM]``: score bits, columns. A list of at most SMALL entries is searched with fewer registers' work.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_stride
    if SPAN:
        positions += row * position_stride
    found += row * (2 * ROOM)
    end = row_end(ends, row, width, HAS_ENDS)
    level = sample_cut(scores, positions, end, width, aim, SAMPLE, ROOM, SPAN, HAS_ENDS)
    none = level == float("-inf")
    count = (level != level).to(tl.int32)  # 0
    missing = count  # NaN, counted where few numbers are
    for start in range(0, end, CHUNK):
        score = load_chunk(scores, positions, start, end, width, CHUNK, SPAN, HAS_ENDS)
        if none:
            missing += tl.sum((score != score).to(tl.int32))
        word = pack(score > level, CHUNK)
        counts = count_bits(word)
        append(scores, found, start, word, counts, count, CHUNK, ROOM)
        count += tl.sum(counts, axis=0)
    tl.debug_barrier()  # a list is read by other threads than wrote it
    lacking = topk - count
    # How many others ties with a finite level are is not known yet: they are looked for, and nearly always found.
    ties = tl.where(none, tl.minimum(lacking, missing), lacking)
    searched = count > ROOM
    if (count <= ROOM) & (ties > 0):
        tied = _write_ties(
            row, scores, found, count, level, ties, positions, page_table, requests, indices, lengths, beside, end,
            width, topk, num_requests, max_pages, page_size, ROOM, TILE, SPAN, HAS_ENDS, SLOTS, WITH_SCORES,
        )  # fmt: skip
        searched = tied < ties
    elif count <= SMALL:
        _select_listed(
            row, found, count, level, positions, page_table, requests, indices, lengths, beside,
            topk, num_requests, max_pages, page_size, ROOM, SMALL, TILE, SPAN, SLOTS, WITH_SCORES,
        )  # fmt: skip
    elif count <= ROOM:
        _select_listed(
            row, found, count, level, positions, page_table, requests, indices, lengths, beside,
            topk, num_requests, max_pages, page_size, ROOM, ROOM, TILE, SPAN, SLOTS, WITH_SCORES,
        )  # fmt: skip
    if searched:  # the sample misled
        tl.debug_barrier()
        write_row(
            row, scores, positions, page_table, requests, indices, lengths, beside, end, width, topk, num_requests, max_pages, page_size,
            TILE, SPAN, HAS_ENDS, SLOTS, WITH_SCORES,
        )  # fmt: skip
