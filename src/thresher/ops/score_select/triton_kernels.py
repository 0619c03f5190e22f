# mypy: disable-error-code="no-untyped-def"
"""What comes before all else: what rows see, and the sample's pages."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prepare_kernel(
    positions, requests, lengths, page_table, ends, levels, level_keys, last_seen, table,
    num_rows, num_requests, room_tokens, stride, num_sampled, table_row, table_page,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """What the others ask of rows, and the sample's page table: every stride-th page, ``num_sampled`` for each request.

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
        tl.store(last_seen + at, (end // TILE + stride - 1) // stride * TILE - 1, mask=here)
        page = tl.load(
            page_table + (at // num_sampled).to(tl.int64) * table_row + (at % num_sampled).to(tl.int64) * stride * table_page,
            mask=at < num_requests * num_sampled,
        )
        tl.store(table + at, page, mask=at < num_requests * num_sampled)
