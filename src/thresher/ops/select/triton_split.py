"""The Triton kernels in which many programs share a long row; the method is told in ``triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thresher.ops.select.triton_search import (
    LOWEST,
    append,
    count_bits,
    count_chosen,
    finish,
    listed,
    listed_scores,
    load_chunk,
    load_row,
    lowest_bit,
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
def guess_level(
    scores, positions, ends, levels, counters, tickets, width, aim, score_stride, position_stride,
    SAMPLE: tl.constexpr, ROOM: tl.constexpr, SPAN: tl.constexpr, HAS_ENDS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each row's level, from a sample, and its counters at zero. With OVERLAP, ``collect`` may already start to read scores."""
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if SPAN:
        positions += row * position_stride
    end = row_end(ends, row, width, HAS_ENDS)
    tl.store(counters + row, 0)
    tl.store(tickets + row, 0)
    level = sample_cut(scores + row * score_stride, positions, end, width, aim, SAMPLE, ROOM, SPAN, HAS_ENDS)
    tl.store(levels + row, level)


@triton.jit
def _select_shared(
    row, found, in_row, num_chunks, base_table, count_table, count, level,
    positions, page_table, requests, indices, lengths, beside, topk, num_requests, max_pages, page_size,
    CHUNK: tl.constexpr, ROOM: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr,
    SPAN: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Select from a list of at most SIZE entries that holds the answer: chunks in any order, each in the order of its columns.

    An entry's place is counted along the list, then moved by what chosen entries its chunk has before it in the list but not in the row.
    """
    entry = tl.arange(0, SIZE)
    score = listed_scores(found, entry, count, ".cg")
    low = tl.where(level == float("-inf"), LOWEST, number_key(level) + 1)
    cut, ties, length = threshold(score, topk, low)
    chosen = count_chosen(score, cut)
    upto = tl.cumsum(chosen, axis=0)
    chunk = tl.arange(0, CHUNKS)
    bases = tl.load(base_table + in_row + chunk, mask=chunk < num_chunks, other=0, cache_modifier=".cg")
    counts = tl.load(count_table + in_row + chunk, mask=chunk < num_chunks, other=0, cache_modifier=".cg")
    before = tl.where(bases > 0, tl.gather(upto, tl.maximum(bases, 1) - 1, axis=0), 0)
    last = tl.where(counts > 0, tl.gather(upto, tl.maximum(bases + counts, 1) - 1, axis=0), before)
    moved = tl.cumsum(last - before, axis=0) - last
    columns = listed(found + ROOM, entry, count, ".cg")
    place = upto - chosen + tl.gather(moved, tl.where(entry < count, columns // CHUNK, 0), axis=0)
    tied_before = place >> 16
    put(
        row, (place & 0xFFFF) + tl.minimum(tied_before, ties), ((chosen & 1) > 0) | ((chosen > 1) & (tied_before < ties)),
        columns, score, positions, page_table, requests, indices, beside, topk, num_requests, max_pages, page_size,
        SPAN, SLOTS, WITH_SCORES,
    )  # fmt: skip
    finish(row, length, lengths, indices, beside, topk, SIZE, WITH_SCORES)


@triton.jit
def _write_marked(
    row, scores, marks, tie_marks, tie_table, count, ties, positions, page_table, requests, indices, lengths, beside,
    num_words, topk, num_requests, max_pages, page_size,
    CHUNK: tl.constexpr, WORDS: tl.constexpr, SPAN: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """All ``count`` scores above the level and the first ``ties`` that tie with it, from their marks: 1/32 of the scores' bytes.

    ``marks``, ``tie_marks``, ``tie_table`` are at the row's start; a chunk that has no ties left no marks of them.
    """
    above = count * 0
    tied = count * 0
    start = count * 0
    while (start < num_words) & (above + tl.minimum(tied, ties) < count + ties):
        at = start + tl.arange(0, WORDS)
        num_tied = tl.load(tie_table + at // (CHUNK // 32), mask=at < num_words, other=0, cache_modifier=".cg")
        mark = tl.load(marks + at, mask=at < num_words, other=0, cache_modifier=".cg").to(tl.uint32, bitcast=True)
        tie_mark = tl.load(tie_marks + at, mask=num_tied > 0, other=0, cache_modifier=".cg").to(tl.uint32, bitcast=True)
        bits = count_bits(mark)
        tie_bits = count_bits(tie_mark)
        to_above = above + tl.cumsum(bits, axis=0) - bits
        to_tied = tied + tl.cumsum(tie_bits, axis=0) - tie_bits
        above += tl.sum(bits, axis=0)
        tied += tl.sum(tie_bits, axis=0)
        word = mark | tl.where(to_tied < ties, tie_mark, 0)
        for _turn in range(tl.max(count_bits(word), axis=0)):
            bit = word ^ (word & (word - 1))
            columns = at * 32 + lowest_bit(word)
            is_above = (mark & bit) != 0
            keep = (word != 0) & (is_above | (to_tied < ties))
            score = tl.load(scores + columns, mask=keep, other=0.0)
            put(
                row, to_above + tl.minimum(to_tied, ties), keep,
                columns, score, positions, page_table, requests, indices, beside, topk, num_requests, max_pages, page_size,
                SPAN, SLOTS, WITH_SCORES,
            )  # fmt: skip
            to_above += ((word != 0) & is_above).to(tl.int32)
            to_tied += ((word != 0) & ~is_above).to(tl.int32)
            word = word & (word - 1)
        start += WORDS
    finish(row, count + ties, lengths, indices, beside, topk, WORDS, WITH_SCORES)


@triton.jit
def _select_chunk(
    row, scores, positions, page_table, requests, indices, lengths, beside,
    end, width, topk, num_requests, max_pages, page_size,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, HAS_ENDS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Select from a row that ends in its first chunk: all of it would be in the list."""
    columns = tl.arange(0, CHUNK)
    score = load_row(scores, positions, columns, end, width, SPAN, HAS_ENDS)
    cut, ties, length = threshold(score, topk, LOWEST)
    write(
        row, columns, score, cut, ties, length * 0, length * 0, positions, page_table, requests, indices, beside,
        topk, num_requests, max_pages, page_size, SPAN, SLOTS, WITH_SCORES,
    )  # fmt: skip
    finish(row, length, lengths, indices, beside, topk, CHUNK, WITH_SCORES)


@triton.jit
def collect(
    scores, positions, ends, page_table, requests, indices, lengths, beside,
    levels, counters, tickets, base_table, count_table, tie_table, found, marks, tie_marks,
    width, topk, num_chunks, score_stride, position_stride, num_requests, max_pages, page_size,
    CHUNK: tl.constexpr, ROOM: tl.constexpr, SMALL: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr,
    SPAN: tl.constexpr, HAS_ENDS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Append what stands above the level in one chunk of a row to the row's list; the row's last program selects.

    The chunks of a row append in any order and note where; counts are right even where ROOM runs out. Ties with the level are counted, and
    marks of both are left behind: what a plateau of ties is written from. Chunks past a row's end have no part in it, and a row of one
    chunk has no list.
    ``found`` int32 ``[Q, 2, ROOM]``: score bits, columns. ``marks``, ``tie_marks`` int32 ``[Q, num_chunks * CHUNK / 32]``.
    """
    program = tl.program_id(0)
    row = (program // num_chunks).to(tl.int64)
    index = program % num_chunks
    first = index * CHUNK
    end = row_end(ends, row, width, HAS_ENDS)
    live = (end + CHUNK - 1) // CHUNK
    scores += row * score_stride
    if SPAN:
        positions += row * position_stride
    if HAS_ENDS:  # noqa: SIM102 (the compiler's condition, and the program's)
        if end <= CHUNK:
            if index == 0:
                _select_chunk(
                    row, scores, positions, page_table, requests, indices, lengths, beside,
                    end, width, topk, num_requests, max_pages, page_size, CHUNK, SPAN, HAS_ENDS, SLOTS, WITH_SCORES,
                )  # fmt: skip
                if OVERLAP:
                    gdc_wait()  # or else, where all rows are short, this launch could end before the one ahead of it
            return
    if index < live:
        found += row * (2 * ROOM)
        num_words = live * (CHUNK // 32)
        in_row = row * num_chunks
        score = load_chunk(scores, positions, first, end, width, CHUNK, SPAN, HAS_ENDS)
        if OVERLAP:
            gdc_wait()  # for the level; the scores were there before
        level = tl.load(levels + row)
        none = level == float("-inf")
        word = pack(score > level, CHUNK)
        counts = count_bits(word)
        num = tl.sum(counts, axis=0)
        num_tied = tl.sum((score == level).to(tl.int32))
        if none:
            num_tied = tl.sum((score != score).to(tl.int32))
        in_words = program.to(tl.int64) * (CHUNK // 32) + tl.arange(0, CHUNK // 32)
        tl.store(marks + in_words, word.to(tl.int32, bitcast=True))
        if num_tied > 0:
            tl.store(tie_marks + in_words, pack(ties_of(score, level), CHUNK).to(tl.int32, bitcast=True))
        base = num * 0
        if num > 0:
            base = tl.atomic_add(counters + row, num, sem="relaxed")
            append(scores, found, first, word, counts, base, CHUNK, ROOM)
        tl.store(base_table + program, base)
        tl.store(count_table + program, num)
        tl.store(tie_table + program, num_tied)
        tl.debug_barrier()  # all of this program's stores come before its ticket
        if tl.atomic_add(tickets + row, 1, sem="acq_rel") == live - 1:
            count = tl.load(counters + row, cache_modifier=".cg")
            chunk = tl.arange(0, CHUNKS)
            all_tied = tl.sum(tl.load(tie_table + in_row + chunk, mask=chunk < live, other=0, cache_modifier=".cg"), axis=0)
            lacking = topk - count
            ties = tl.where(none, tl.minimum(lacking, all_tied), lacking)
            if (count > ROOM) | (ties > all_tied):  # the sample misled
                write_row(
                    row, scores, positions, page_table, requests, indices, lengths, beside,
                    end, width, topk, num_requests, max_pages, page_size, TILE, SPAN, HAS_ENDS, SLOTS, WITH_SCORES,
                )  # fmt: skip
            elif ties > 0:  # the place of the last lies among the ties
                _write_marked(
                    row, scores, marks + in_row * (CHUNK // 32), tie_marks + in_row * (CHUNK // 32), tie_table + in_row, count, ties,
                    positions, page_table, requests, indices, lengths, beside, num_words, topk, num_requests, max_pages, page_size,
                    CHUNK, 2048, SPAN, SLOTS, WITH_SCORES,
                )  # fmt: skip
            elif count <= SMALL:
                _select_shared(
                    row, found, in_row, live, base_table, count_table, count, level,
                    positions, page_table, requests, indices, lengths, beside, topk, num_requests, max_pages, page_size,
                    CHUNK, ROOM, SMALL, CHUNKS, SPAN, SLOTS, WITH_SCORES,
                )  # fmt: skip
            else:
                _select_shared(
                    row, found, in_row, live, base_table, count_table, count, level,
                    positions, page_table, requests, indices, lengths, beside, topk, num_requests, max_pages, page_size,
                    CHUNK, ROOM, ROOM, CHUNKS, SPAN, SLOTS, WITH_SCORES,
                )  # fmt: skip
