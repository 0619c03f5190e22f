"""The Triton kernels in which one program takes a row; the method is told in ``triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.select.triton_search import (
    LOWEST,
    append,
    count_bits,
    finish,
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
    write,
    write_row,
)  # fmt: skip


@triton.jit
def one_program(
    scores, positions, ends, page_table, requests, indices, lengths, beside,
    width, topk, score_stride, position_stride, num_requests, max_pages, page_size,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr, HAS_ENDS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """A whole row that stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_stride
    if SPAN:
        positions += row * position_stride
    columns = tl.arange(0, BLOCK)
    score = load_row(scores, positions, columns, row_end(ends, row, width, HAS_ENDS), width, SPAN, HAS_ENDS)
    cut, ties, length = threshold(score, topk, LOWEST)
    write(
        row, columns, score, cut, ties, length * 0, length * 0, positions, page_table, requests, indices, beside,
        topk, num_requests, max_pages, page_size, SPAN, SLOTS, WITH_SCORES,
    )  # fmt: skip
    finish(row, length, lengths, indices, beside, topk, BLOCK, WITH_SCORES)


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
