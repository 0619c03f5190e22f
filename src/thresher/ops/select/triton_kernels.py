"""The Triton kernels in which one program takes a row; the method is told in ``triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.select.triton_search import (
    append,
    finish,
    flag,
    listed,
    listed_scores,
    load_chunk,
    load_row,
    number_key,
    sample_cut,
    threshold,
    write,
    write_row,
)  # fmt: skip

_LOWEST = tl.constexpr(-0x7F800000)


@triton.jit
def one_program(
    scores, positions, page_table, requests, indices, lengths, beside,
    width, topk, score_stride, position_stride, num_requests, max_pages, page_size,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """A whole row that stays in registers for the search. Where TILE is less, its scores are read again to be written."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_stride
    if HAS_POSITIONS:
        positions += row * position_stride
    columns = tl.arange(0, BLOCK)
    score = load_row(scores, positions, columns, columns < width, HAS_POSITIONS)
    cut, ties, length = threshold(score, topk, _LOWEST)
    above = length * 0
    tied = length * 0
    if TILE == BLOCK:
        write(
            row, columns, score, cut, ties, above, tied, positions, page_table, requests, indices, beside,
            topk, num_requests, max_pages, page_size, HAS_POSITIONS, SLOTS, WITH_SCORES,
        )  # fmt: skip
    else:
        for start in range(0, width, TILE):
            at = start + tl.arange(0, TILE)
            tile = load_row(scores, positions, at, at < width, HAS_POSITIONS)
            above, tied = write(
                row, at, tile, cut, ties, above, tied, positions, page_table, requests, indices, beside,
                topk, num_requests, max_pages, page_size, HAS_POSITIONS, SLOTS, WITH_SCORES,
            )  # fmt: skip
    finish(row, length, lengths, indices, beside, topk, TILE, WITH_SCORES)


@triton.jit
def _select_listed(
    row, found, count, level, positions, page_table, requests, indices, lengths, beside,
    topk, num_requests, max_pages, page_size,
    ROOM: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Select from a list of at most SIZE entries, in the order of columns, that holds the answer."""
    entry = tl.arange(0, SIZE)
    score = listed_scores(found, entry, count, "")
    low = tl.where(level == float("-inf"), _LOWEST, number_key(level) + 1)
    cut, ties, length = threshold(score, topk, low)
    above = count * 0
    tied = count * 0
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        tile = listed_scores(found, at, count, "")
        columns = listed(found + ROOM, at, count, "")
        above, tied = write(
            row, columns, tile, cut, ties, above, tied, positions, page_table, requests, indices, beside,
            topk, num_requests, max_pages, page_size, HAS_POSITIONS, SLOTS, WITH_SCORES,
        )  # fmt: skip
    finish(row, length, lengths, indices, beside, topk, TILE, WITH_SCORES)


@triton.jit
def one_pass(
    scores, positions, page_table, requests, indices, lengths, beside, found,
    width, topk, stride, want, slack, score_stride, position_stride, num_requests, max_pages, page_size,
    SAMPLE: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr, SMALL: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """A row read once in full: what stands above a level from a sample goes to a list in order, and the list is searched.

    ``found`` int32 ``[Q, 2, ROOM]``: score bits, columns. A list of at most SMALL entries is searched with fewer registers' work. With
    AHEAD the next chunk is on its way while a chunk is appended.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * score_stride
    if HAS_POSITIONS:
        positions += row * position_stride
    found += row * (2 * ROOM)
    level = sample_cut(scores, positions, stride, want, slack, SAMPLE, HAS_POSITIONS)
    count = width * 0
    score = load_chunk(scores, positions, 0, width, CHUNK, HAS_POSITIONS)
    for start in range(0, width, CHUNK):
        word, counts = flag(score, level, CHUNK)
        if AHEAD:
            score = load_chunk(scores, positions, start + CHUNK, width, CHUNK, HAS_POSITIONS)
        append(scores, found, start, word, counts, count, CHUNK, ROOM)
        if not AHEAD:
            score = load_chunk(scores, positions, start + CHUNK, width, CHUNK, HAS_POSITIONS)
        count += tl.sum(counts, axis=0)
    tl.debug_barrier()  # a list is read by other threads than wrote it
    holds = (count <= ROOM) & ((count >= topk) | (level == float("-inf")))
    if holds & (count <= SMALL):
        _select_listed(
            row, found, count, level, positions, page_table, requests, indices, lengths, beside,
            topk, num_requests, max_pages, page_size, ROOM, SMALL, TILE, HAS_POSITIONS, SLOTS, WITH_SCORES,
        )  # fmt: skip
    elif holds:
        _select_listed(
            row, found, count, level, positions, page_table, requests, indices, lengths, beside,
            topk, num_requests, max_pages, page_size, ROOM, ROOM, TILE, HAS_POSITIONS, SLOTS, WITH_SCORES,
        )  # fmt: skip
    else:  # the sample misled, or the place of the last lies on a plateau
        write_row(
            row, scores, positions, page_table, requests, indices, lengths, beside, width, topk, num_requests, max_pages, page_size,
            TILE, HAS_POSITIONS, SLOTS, WITH_SCORES,
        )  # fmt: skip
