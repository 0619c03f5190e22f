# mypy: disable-error-code="no-untyped-def"
"""Rows whose lists did not hold the answer: scored into memory and selected from there, without a word from the host."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.index_score.triton_kernels import row_ends, score_rows
from thresher.ops.select.triton_search import write_row

FLAGS = tl.constexpr(1024)  # looked at together


@triton.jit
def _marks(redo, start, seen, num_queries):
    """Rows from ``start`` on, whether ``redo`` marks each, and how many before it are marked, ``seen`` of them before ``start``."""
    row = start + tl.arange(0, FLAGS)
    marked = tl.load(redo + row, mask=row < num_queries, other=0) != 0
    count = marked.to(tl.int32)
    return row, marked, seen + tl.cumsum(count, axis=0) - count


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_requests", "num_pages", "max_pages"])
def score_marked_kernel(
    q, weights, values, scales, page_table, held, positions, requests, redo, scratch,
    num_queries, num_heads, num_requests, num_pages, max_pages, width, slots, q_row, q_head, w_row, page_words, table_row,
    PAGE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Score the first ``slots`` rows that ``redo`` marks, each shared by all programs, into as many rows of ``scratch`` fp32 ``[>= slots,
    width]``. Where it marks none, they leave."""
    share = tl.cdiv(tl.cdiv(width, BN), tl.num_programs(0)) * BN
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, width)
    seen = first * 0
    for start in range(0, num_queries, FLAGS):
        row, marked, before = _marks(redo, start, seen, num_queries)
        seen += tl.sum(marked.to(tl.int32), axis=0)
        marked = marked & (before < slots)
        index = tl.min(tl.where(marked, row, num_queries), axis=0)
        while (index < num_queries) & (first < width):
            slot = tl.sum(tl.where(row == index, before, 0), axis=0)
            # A row of its own, whichever it is: so the scores' rows lie 0 apart.
            score_rows(
                q, weights, values, scales, page_table, held, positions, requests, scratch + slot.to(tl.int64) * width,
                num_queries, num_heads, num_requests, num_pages, max_pages, width, index, first, last,
                q_row, q_head, w_row, page_words, table_row, 0, 1, PAGE, False, HEADS, D, BN, BQ, INTERPRET,
            )  # fmt: skip
            index = tl.min(tl.where(marked & (row > index), row, num_queries), axis=0)


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_requests", "num_pages", "max_pages"])
def redo_kernel(
    q, weights, values, scales, page_table, held, positions, requests, redo, scratch, indices, lengths, beside,
    num_queries, num_heads, num_requests, num_pages, max_pages, width, topk, slots, q_row, q_head, w_row, page_words, table_row,
    TILE: tl.constexpr, WITH_SCORES: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Of the rows that ``redo`` marks, program p of P does the p-th again, and every P-th after that; where none is left for it, it leaves.

    ``scratch`` fp32 ``[P, width]``: a row of scores for each program, as wide as the page table has room for. It holds the scores of the
    first ``slots`` rows, no more than P; those of the others are computed here. ``held``: the requests' lengths. ``indices``, ``lengths``
    and ``beside`` are the selection's.
    """
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * width
    seen = program * 0
    for start in range(0, num_queries, FLAGS):
        row, marked, before = _marks(redo, start, seen, num_queries)
        seen += tl.sum(marked.to(tl.int32), axis=0)
        marked = marked & (before % tl.num_programs(0) == program)
        index = tl.min(tl.where(marked, row, num_queries), axis=0)
        while index < num_queries:
            if tl.sum(tl.where(row == index, before, 0), axis=0) >= slots:
                score_rows(
                    q, weights, values, scales, page_table, held, positions, requests, scratch,
                    num_queries, num_heads, num_requests, num_pages, max_pages, width, index, index * 0, width,
                    q_row, q_head, w_row, page_words, table_row, 0, 1, PAGE, False, HEADS, D, BN, BQ, INTERPRET,
                )  # fmt: skip
                tl.debug_barrier()  # scores are read by other threads of the program than wrote them: what they see is settled by this
            room = max_pages.to(tl.int64) * PAGE
            end, _ = row_ends(index, num_queries, num_requests, held, positions, requests, room, width)
            write_row(
                index.to(tl.int64), scratch, positions, page_table, requests, indices, lengths, beside, end, width, topk,
                num_requests, max_pages, PAGE, TILE, False, True, False, WITH_SCORES,
            )  # fmt: skip
            tl.debug_barrier()  # before the next row's scores
            index = tl.min(tl.where(marked & (row > index), row, num_queries), axis=0)
