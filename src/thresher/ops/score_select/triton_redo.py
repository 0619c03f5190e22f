# mypy: disable-error-code="no-untyped-def"
"""Rows whose lists did not hold the answer: scored into memory and selected from there, without a word from the host."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.ops.index_score.triton_kernels import row_ends, score_rows
from thresher.ops.select.triton_search import write_row

FLAGS = tl.constexpr(128)  # looked at together, one a thread


@triton.jit(do_not_specialize=["num_queries", "num_heads", "num_requests", "num_pages", "max_pages"])
def redo_kernel(
    q, weights, values, scales, page_table, held, positions, requests, redo, scratch, indices, lengths, beside,
    num_queries, num_heads, num_requests, num_pages, max_pages, width, topk, q_row, q_head, w_row, page_words, table_row,
    TILE: tl.constexpr, WITH_SCORES: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Program p of P does those of the rows p, p + P, p + 2P ... again that ``redo`` marks; where it marks none, it leaves.

    ``scratch`` fp32 ``[P, width]``: a row of scores for each program, as wide as the page table has room for. ``held``: the requests'
    lengths. ``indices``, ``lengths`` and ``beside`` are the selection's.
    """
    program = tl.program_id(0)
    scratch += program.to(tl.int64) * width
    for turn in range(0, tl.cdiv(num_queries, tl.num_programs(0)), FLAGS):
        mine = (turn + tl.arange(0, FLAGS)) * tl.num_programs(0) + program
        marked = tl.load(redo + mine, mask=mine < num_queries, other=0) != 0
        index = tl.min(tl.where(marked, mine, num_queries), axis=0)
        while index < num_queries:
            # A row of its own, whichever it is: so the scores' rows lie 0 apart.
            score_rows(
                q, weights, values, scales, page_table, held, positions, requests, scratch,
                num_queries, num_heads, num_requests, num_pages, max_pages, width, index, index * 0, width,
                q_row, q_head, w_row, page_words, table_row, 0, 1, PAGE, False, HEADS, D, BN, BQ, INTERPRET,
            )  # fmt: skip
            tl.debug_barrier()  # scores are read by other threads of the program than wrote them; what they see is settled by this alone
            room = max_pages.to(tl.int64) * PAGE
            end, _ = row_ends(index, num_queries, num_requests, held, positions, requests, room, width)
            write_row(
                index.to(tl.int64), scratch, positions, page_table, requests, indices, lengths, beside, end, width, topk,
                num_requests, max_pages, PAGE, TILE, False, True, False, WITH_SCORES,
            )  # fmt: skip
            tl.debug_barrier()  # before the next row's scores
            index = tl.min(tl.where(marked & (mine > index), mine, num_queries), axis=0)
