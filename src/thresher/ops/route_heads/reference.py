"""Head mass over block means, and the heads it picks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.cache.index_keys import load_keys
from thresher.ops.index_score.reference import chunk_elements, score_pairs, to_double
from thresher.ops.pool_keys import partial_means
from thresher.types import IndexKeys, IndexQuery

# Of each request, values and scales; or all of them in pages, whose positions are block numbers.
Means = Sequence[tuple[Tensor, Tensor]] | IndexKeys


@torch.no_grad()
def head_mass_reference(query: IndexQuery, means: Means, keys: IndexKeys, block_size: int) -> Tensor:
    """fp32 ``[Q, H]``, one request at a time."""
    mass = torch.zeros(query.num_queries, query.num_heads, device=query.q.device)
    lengths = keys.lengths.tolist()
    for request in query.requests.unique().tolist():
        mine = (query.requests == request) & (query.positions >= 0)
        if not lengths[request] or not bool(mine.any()):
            continue
        rows = mine.nonzero()[:, 0]
        last = query.positions[rows].clamp(max=lengths[request] - 1)
        values, scales = load_keys(means, request) if isinstance(means, IndexKeys) else means[request]
        needed = (int(last.max()) + 1) // block_size
        start = int(last.min()) // block_size * block_size
        # A block that the query completes is a full one; -1 leaves its partial mean out.
        inside = torch.where((last + 1) % block_size == 0, -1, last - start)
        own = partial_means(*load_keys(keys, request, start, int(last.max()) + 1), block_size, inside, impl="reference")
        asked = query.rows(rows)
        mass[rows] = _request_mass(asked.q, asked.weights, (values[:needed], scales[:needed]), own, last, block_size)
    return mass


def _request_mass(
    q: Tensor, weights: Tensor, full: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], last: Tensor, block_size: int
) -> Tensor:
    num, heads, dim = q.shape
    seen = (last + 1) // block_size
    partial = (last + 1) % block_size != 0
    q_double, full_double, own_double = to_double(q), to_double(full[0]), to_double(own[0])
    index = torch.arange(len(full_double), device=q.device)
    mass = torch.zeros(num, heads, dtype=torch.float64, device=q.device)
    step = max(1, chunk_elements(q.device) // (heads * max(len(full_double), dim)))
    for row in range(0, num, step):
        part = slice(row, row + step)
        terms = _terms(q_double[part], weights[part], full_double, full[1])
        terms = terms.masked_fill_(seen[part, None, None] <= index, 0.0).permute(2, 0, 1).double()
        # One block at a time, ascending: the bits do not depend on how many blocks come later, nor on a device's scan.
        total = mass[part]
        for term in terms.contiguous().unbind(0):
            total.add_(term)
        last_term = _terms(q_double[part], weights[part], own_double[part, None], own[1][part, None])[:, :, 0]
        total.add_(last_term.masked_fill(~partial[part, None], 0.0))
    return (mass / (seen + partial)[:, None]).float()


def _terms(q: Tensor, weights: Tensor, k: Tensor, k_scales: Tensor) -> Tensor:
    """``|w relu(q . kbar)|`` fp32 ``[Q, H, M]``: the index score of every head on its own. k is shared, or ``[Q, M, D]``."""
    num, heads, dim = q.shape
    if k.dim() == 3:
        k, k_scales = k.repeat_interleave(heads, 0), k_scales.repeat_interleave(heads, 0)
    alone = score_pairs(q.reshape(num * heads, 1, dim), weights.reshape(num * heads, 1), k, k_scales)
    return alone.view(num, heads, -1).abs_()


def routed_query_reference(query: IndexQuery, means: Means, keys: IndexKeys, block_size: int, active_heads: int) -> IndexQuery:
    """The query with the heads of largest mass alone."""
    return keep_heads(query, route_reference(head_mass_reference(query, means, keys, block_size), active_heads))


def keep_heads(query: IndexQuery, heads: Tensor) -> IndexQuery:
    """The query with only the heads int64 ``[Q, h]`` of each row, in the given (ascending) order."""
    rows = torch.arange(query.num_queries, device=heads.device)[:, None]
    # fp8 tensors cannot be gathered on every device; their bytes can
    q = query.q.view(torch.uint8)[rows, heads].view(query.q.dtype) if query.q.element_size() == 1 else query.q[rows, heads]
    return IndexQuery(q, query.weights.gather(1, heads), query.positions, query.requests)


def route_reference(mass: Tensor, active_heads: int) -> Tensor:
    """int64 ``[Q, active_heads]``, ascending; a stable sort keeps the smaller head first among equals."""
    ranked = (mass + 0.0).masked_fill(mass.isnan(), -torch.inf)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    return order[:, :active_heads].sort(dim=1).values
