"""Work on query rows: what a query sees, bounded memory, a subset of its heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thresher.ops.dispatch import can_read
from thresher.ops.score_select import one_pass
from thresher.types import IndexKeys, IndexQuery, Selection

# Score elements alive at once. Large enough that a launch fills a GPU at 128k keys, small enough for a laptop's memory.
CPU_ELEMENTS = 2**24
GPU_ELEMENTS = 2**26


def longest(keys: IndexKeys) -> int:
    """The largest length of any request, 0 when there are none; what the page table has room for while a CUDA graph is recorded."""
    if not can_read(keys.lengths.device):
        return keys.room
    return int(keys.lengths.max()) if keys.num_requests else 0


def scan_columns(query: IndexQuery, keys: IndexKeys, topk: int) -> int:
    """Elements alive for each query while ``score_select`` runs: a row of scores, or none where it holds no matrix of them.

    The longest request is looked up, which waits for the device, only where what the page table has room for would be too much at once.
    """
    if one_pass(query, keys, topk) is not None:
        return 0
    room = keys.room
    return room if query.num_queries * room <= _budget(query) else longest(keys)


def in_chunks(query: IndexQuery, columns: int, select_rows: Callable[[IndexQuery, slice], Selection]) -> Selection:
    """Run ``select_rows`` over slices of the queries so that about ``rows * columns`` elements are alive at once.

    Rows are independent, so the result does not depend on where the slices fall.
    """
    step = max(1, _budget(query) // max(columns, 1))
    if query.num_queries <= step:
        return select_rows(query, slice(0, query.num_queries))
    parts = -(-query.num_queries // step)
    step = -(-query.num_queries // parts)  # all but equal, so that no few rows are left over
    bounds = [slice(i, min(i + step, query.num_queries)) for i in range(0, query.num_queries, step)]
    return concat([select_rows(query.rows(s), s) for s in bounds])  # type: ignore[arg-type]


def _budget(query: IndexQuery) -> int:
    return GPU_ELEMENTS if query.q.is_cuda else CPU_ELEMENTS


def concat(parts: Sequence[Selection]) -> Selection:
    """Rows of several selections of one index space below one another, -1 padded to the widest."""
    width = max(p.topk for p in parts)
    scores = [pad_columns(p.scores, width, float("-inf")) for p in parts if p.scores is not None]
    return Selection(
        torch.cat([pad_columns(p.indices, width, -1) for p in parts]),
        torch.cat([p.lengths for p in parts]),
        parts[0].space,
        torch.cat(scores) if len(scores) == len(parts) else None,
    )


def pad_columns(x: Tensor, width: int, value: float) -> Tensor:
    """``x [Q, n]`` with columns of ``value`` added up to ``width``."""
    return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value) if x.shape[1] < width else x


def first_heads(query: IndexQuery, count: int) -> IndexQuery:
    """The query with only its first heads, which stands for one with any ``count`` of them where no value matters."""
    return replace(query, q=query.q[:, :count], weights=query.weights[:, :count])
