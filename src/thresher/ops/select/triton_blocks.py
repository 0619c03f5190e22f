"""The Triton kernel that chooses blocks: two that are given, and the best between them, in one program a row."""

from __future__ import annotations

import triton
import triton.language as tl

from thresher.cache.device import as_mask
from thresher.ops.select.triton_search import LOWEST, load_row, threshold, write

_PADDED = tl.constexpr(128)  # entries looked at together for what is not from the scores


@triton.jit
def blocks_kernel(
    scores, positions, requests, lengths, blocks, width, kept, free, score_stride, num_requests, room,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``kept`` entries of ``blocks`` a row: 0, at most ``free`` of those before the query's own by score, its own, and -1 for the rest.

    BLOCK: a power of two that holds ``width`` scores. ``room``: tokens that a request can hold.
    """
    row = tl.program_id(0).to(tl.int64)
    request = tl.load(requests + row)
    known = (request >= 0) & (request < num_requests)
    held = tl.minimum(tl.load(lengths + tl.where(known, request, 0), mask=known, other=0), room)
    last = tl.minimum(tl.load(positions + row), held - 1)
    there = last >= 0
    own = tl.where(there, tl.maximum(last, 0) // BLOCK_SIZE, 0).to(tl.int32)
    column = tl.arange(0, BLOCK)
    score = load_row(scores + row * score_stride, positions, column, tl.minimum(own, width), width, 0, True)
    score = tl.where(column > 0, score, float("-inf"))  # block 0 is given, not chosen
    cut, ties, chosen = threshold(score, free, LOWEST)
    first = (own > 0).to(tl.int32)
    write(
        row, column, score, cut, ties, first, first * 0, positions, positions, requests, blocks, scores, kept, 0, 0, 1, 0, False, False
    )  # fmt: skip
    behind = first + chosen
    for start in range(0, kept, _PADDED):
        at = start + tl.arange(0, _PADDED)
        entry = tl.where(at < first, 0, tl.where(as_mask(there) & (at == behind), own, -1))
        tl.store(blocks + row * kept + at, entry, mask=(at < kept) & ((at < first) | (at >= behind)))
