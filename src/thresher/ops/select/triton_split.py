"""The Triton kernels in which many programs share a long row; the method is told in ``triton.py``."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from thresher.ops.select.triton_search import (
    append,
    count_chosen,
    finish,
    flag,
    listed,
    listed_scores,
    load_chunk,
    number_key,
    put,
    sample_cut,
    threshold,
    write_row,
)  # fmt: skip

_LOWEST = tl.constexpr(-0x7F800000)


@triton.jit
def guess_level(
    scores, positions, levels, counters, tickets, stride, want, slack, score_stride, position_stride,
    SAMPLE: tl.constexpr, HAS_POSITIONS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Each row's level, from a sample, and its counters at zero. With OVERLAP, ``collect`` may already start to read scores."""
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    if HAS_POSITIONS:
        positions += row * position_stride
    tl.store(counters + row, 0)
    tl.store(tickets + row, 0)
    tl.store(levels + row, sample_cut(scores + row * score_stride, positions, stride, want, slack, SAMPLE, HAS_POSITIONS))


@triton.jit
def _select_shared(
    row, found, in_row, num_chunks, base_table, count_table, count, level,
    positions, page_table, requests, indices, lengths, beside, topk, num_requests, max_pages, page_size,
    CHUNK: tl.constexpr, ROOM: tl.constexpr, SIZE: tl.constexpr, CHUNKS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr,
):  # fmt: skip
    """Select from a list of at most SIZE entries that holds the answer: chunks in any order, each in the order of its columns.

    An entry's place is counted along the list, then moved by what chosen entries its chunk has before it in the list but not in the row.
    """
    entry = tl.arange(0, SIZE)
    score = listed_scores(found, entry, count, ".cg")
    low = tl.where(level == float("-inf"), _LOWEST, number_key(level) + 1)
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
        HAS_POSITIONS, SLOTS, WITH_SCORES,
    )  # fmt: skip
    finish(row, length, lengths, indices, beside, topk, SIZE, WITH_SCORES)


@triton.jit
def collect(
    scores, positions, page_table, requests, indices, lengths, beside, levels, counters, tickets, base_table, count_table, found,
    width, topk, num_chunks, score_stride, position_stride, num_requests, max_pages, page_size,
    CHUNK: tl.constexpr, ROOM: tl.constexpr, SMALL: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, SLOTS: tl.constexpr, WITH_SCORES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Append what stands above the level in one chunk of a row to the row's list; the row's last program selects.

    The chunks of a row append in any order and note where; counts are right even where ROOM runs out.
    ``found`` int32 ``[Q, 2, ROOM]``: score bits, columns.
    """
    program = tl.program_id(0)
    row = (program // num_chunks).to(tl.int64)
    scores += row * score_stride
    if HAS_POSITIONS:
        positions += row * position_stride
    found += row * (2 * ROOM)
    first = (program % num_chunks) * CHUNK
    score = load_chunk(scores, positions, first, width, CHUNK, HAS_POSITIONS)
    if OVERLAP:
        gdc_wait()  # for the level; the scores were there before
    level = tl.load(levels + row)
    word, counts = flag(score, level, CHUNK)
    num = tl.sum(counts, axis=0)
    base = num * 0
    if num > 0:
        base = tl.atomic_add(counters + row, num, sem="relaxed")
        append(scores, found, first, word, counts, base, CHUNK, ROOM)
    tl.store(base_table + program, base)
    tl.store(count_table + program, num)
    tl.debug_barrier()  # all of this program's stores come before its ticket
    if tl.atomic_add(tickets + row, 1, sem="acq_rel") == num_chunks - 1:
        in_row = row * num_chunks
        count = tl.load(counters + row, cache_modifier=".cg")
        holds = (count <= ROOM) & ((count >= topk) | (level == float("-inf")))
        if holds & (count <= SMALL):
            _select_shared(
                row, found, in_row, num_chunks, base_table, count_table, count, level,
                positions, page_table, requests, indices, lengths, beside, topk, num_requests, max_pages, page_size,
                CHUNK, ROOM, SMALL, CHUNKS, HAS_POSITIONS, SLOTS, WITH_SCORES,
            )  # fmt: skip
        elif holds:
            _select_shared(
                row, found, in_row, num_chunks, base_table, count_table, count, level,
                positions, page_table, requests, indices, lengths, beside, topk, num_requests, max_pages, page_size,
                CHUNK, ROOM, ROOM, CHUNKS, HAS_POSITIONS, SLOTS, WITH_SCORES,
            )  # fmt: skip
        else:  # the sample misled, or the place of the last lies on a plateau
            write_row(
                row, scores, positions, page_table, requests, indices, lengths, beside, width, topk, num_requests, max_pages, page_size,
                TILE, HAS_POSITIONS, SLOTS, WITH_SCORES,
            )  # fmt: skip
