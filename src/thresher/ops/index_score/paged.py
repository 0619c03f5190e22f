"""The paged, gathered and block forms: one request at a time, through the same score."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.index_keys import load_keys, visible_counts
from thresher.ops.index_score.reference import chunk_elements, ragged_scores, score_pairs, to_double
from thresher.types import IndexKeys, IndexQuery


@torch.no_grad()
def paged_scores(query: IndexQuery, keys: IndexKeys, width: int | None = None) -> Tensor:
    """fp32 ``[Q, max(lengths)]``, or ``[Q, width]``."""
    widest = width if width is not None else int(keys.lengths.max()) if keys.num_requests else 0
    out = torch.full((query.num_queries, widest), -torch.inf, device=query.q.device)
    for request, rows, ends in _by_request(query, keys):
        ends = ends.clamp(max=widest)
        high = int(ends.max())
        if high:
            values, scales = load_keys(keys, request, 0, high)
            mine = query.rows(rows)
            out[rows, :high] = ragged_scores(mine.q, mine.weights, values, scales, [0] * len(rows), ends.tolist())
    return out


@torch.no_grad()
def gathered_scores(query: IndexQuery, keys: IndexKeys, positions: Tensor) -> Tensor:
    """fp32 ``[Q, C]``."""
    out = torch.full(positions.shape, -torch.inf, device=query.q.device)
    per_query = positions.shape[1] * max(query.num_heads, query.q.shape[2])
    step = max(1, chunk_elements(query.q.device) // max(per_query, 1))
    for request, rows, ends in _by_request(query, keys):
        high = int(ends.max())
        if not high:
            continue
        values, scales = load_keys(keys, request, 0, high)
        for row in range(0, len(rows), step):
            some = rows[row : row + step]
            wanted = positions[some].long()
            seen = (wanted >= 0) & (wanted < ends[row : row + step, None])
            safe = wanted.masked_fill(~seen, 0)
            k = to_double(values.view(torch.uint8)[safe].view(values.dtype))
            mine = query.rows(some)
            score = score_pairs(to_double(mine.q), mine.weights, k, scales[safe])
            out[some] = score.masked_fill_(~seen, -torch.inf)
    return out


def block_scores(query: IndexQuery, keys: IndexKeys, blocks: Tensor, block_size: int) -> Tensor:
    """fp32 ``[Q, m * block_size]``."""
    tokens = blocks.long()[:, :, None] * block_size + torch.arange(block_size, device=blocks.device)
    return gathered_scores(query, keys, tokens.masked_fill(blocks[:, :, None] < 0, -1).flatten(1))


def _by_request(query: IndexQuery, keys: IndexKeys) -> list[tuple[int, Tensor, Tensor]]:
    """``(request, its query rows, the end of each row's keys)`` for every request asked about."""
    ends = visible_counts(query, keys)
    groups = []
    for request in query.requests.unique().tolist():
        rows = (query.requests == request).nonzero()[:, 0]
        groups.append((request, rows, ends[rows]))
    return groups
