"""Top-k through integer keys that no two columns share, so no tie is left to a sorting routine."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.index_keys import visible_counts
from thresher.ops.to_slots.reference import to_slots_reference
from thresher.types import IndexKeys, IndexQuery, Selection

_LOWEST = -(2**31)
_NAN = _LOWEST + 1


def candidates(scores: Tensor, positions: Tensor | None, ends: Tensor | None = None) -> Tensor:
    """Scores with -inf where a column stands for no position, and from a row's end on."""
    if positions is not None:
        scores = scores.masked_fill(positions < 0, -torch.inf)
    if ends is not None:
        scores = scores.masked_fill(torch.arange(scores.shape[1], device=scores.device) >= ends[:, None], -torch.inf)
    return scores


def order_keys(scores: Tensor) -> Tensor:
    """int64 ``[Q, N]``, distinct in a row: a larger key comes first in the order (score descending, column ascending).

    High half: the score's bits as an order-preserving int32, with NaN between -inf and every number. Low half: the column, inverted.
    """
    bits = (scores + 0.0).view(torch.int32)  # adding 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = ordered.masked_fill(scores.isnan(), _NAN).masked_fill(scores == -torch.inf, _LOWEST)
    column = torch.arange(scores.shape[1], device=scores.device)
    return (ordered.long() << 32) | (2**32 - 1 - column)


def select_reference(scores: Tensor, topk: int, space: str, positions: Tensor | None, ends: Tensor | None = None) -> Selection:
    """The selection; see ``select_topk``."""
    num, width = scores.shape
    candidate = candidates(scores, positions, ends)
    kept = min(topk, width)
    columns = order_keys(candidate).topk(kept, dim=1, sorted=False).indices
    chosen = candidate.gather(1, columns)
    # Columns that are no candidate move past the end, so that one sort both orders and pads.
    columns = columns.masked_fill(chosen == -torch.inf, width).sort(dim=1).values
    padded = columns == width
    columns = columns.masked_fill(padded, 0)

    indices = torch.full((num, topk), -1, dtype=torch.int32, device=scores.device)
    beside = torch.full((num, topk), -torch.inf, device=scores.device)
    if kept:
        where = columns if positions is None else positions.gather(1, columns)
        indices[:, :kept] = where.int().masked_fill(padded, -1)
        beside[:, :kept] = candidate.gather(1, columns).masked_fill(padded, -torch.inf)
    return Selection(indices=indices, lengths=(~padded).sum(1), space=space, scores=beside)


def select_slots_reference(
    scores: Tensor,
    topk: int,
    page_table: Tensor,
    requests: Tensor,
    page_size: int,
    positions: Tensor | None,
    ends: Tensor | None = None,
) -> Selection:
    """The selection through the page table; see ``select_topk_slots``."""
    picked = select_reference(scores, topk, "logical", positions, ends)
    slots = to_slots_reference(picked.indices, page_table, requests, page_size)
    return Selection(indices=slots, lengths=picked.lengths, space="slot")


def select_in_blocks_reference(scores: Tensor, topk: int, blocks: Tensor, block_size: int, space: str) -> Selection:
    """The selection among the tokens of blocks; see ``select_topk_in_blocks``."""
    tokens = blocks.long()[:, :, None] * block_size + torch.arange(block_size, device=blocks.device)
    return select_reference(scores, topk, space, tokens.masked_fill(blocks[:, :, None] < 0, -1).flatten(1))


def select_blocks_reference(scores: Tensor, num_blocks: int, query: IndexQuery, keys: IndexKeys, block_size: int) -> Tensor:
    """int32 ``[Q, min(num_blocks, M + 1)]``; see ``select_blocks``."""
    own = torch.div(visible_counts(query, keys) - 1, block_size, rounding_mode="floor")
    kept = min(num_blocks, scores.shape[1] + 1)
    columns = [torch.where(own > 0, 0, -1)[:, None], own[:, None]]
    if kept > 2:
        between = select_reference(scores[:, 1:], kept - 2, "logical", None, (own - 1).clamp(min=0)).indices.long()
        columns.insert(1, torch.where(between < 0, -1, between + 1))
    blocks = torch.cat(columns, dim=1)
    none = torch.iinfo(torch.int64).max
    blocks = blocks.masked_fill(blocks < 0, none).sort(dim=1).values[:, :kept]
    return blocks.masked_fill(blocks == none, -1).int()
