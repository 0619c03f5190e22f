"""A look-up in the page table."""

from __future__ import annotations

import torch
from torch import Tensor


def to_slots_reference(indices: Tensor, page_table: Tensor, requests: Tensor, page_size: int) -> Tensor:
    """int32 ``[Q, k]``; see ``to_slots``."""
    page = indices.long() // page_size
    there = (indices >= 0) & (page < page_table.shape[1])
    # One more column: an empty table has something to look up too.
    table = torch.nn.functional.pad(page_table, (0, 1), value=-1)
    held = table[requests[:, None], page.masked_fill(~there, page_table.shape[1])]
    return (held * page_size + indices % page_size).masked_fill(held < 0, -1)
