"""What each query sees, read from the attention mask that a model hands its indexer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.errors import require


@dataclass(frozen=True)
class Seen:
    """Queries of all batch rows, one after the other, and the requests they belong to: one for each document of a batch row.

    Attributes:
        first: int64 ``[Q]``, the column of the first token of a query's document; 0 where it sees none.
        positions: int64 ``[Q]``, the last token that it sees, counted from there; -1 where it sees none.
        requests: int64 ``[Q]``, an index of ``spans``.
        spans: batch row, first column and the column past the last one, of every document.
    """

    first: Tensor
    positions: Tensor
    requests: Tensor
    spans: list[tuple[int, int, int]]


def read_mask(mask: Tensor) -> Seen:
    """Documents and positions of a mask under which every query sees neighbouring columns alone.

    Causal masks are such, with padding on either side, packed documents, or columns of a static cache that are not filled yet. Queries that
    see the same first column are of one document.

    Args:
        mask: ``[B, S, T]``, bool and True where a query sees a key, or float to be added to scores: 0 there and hugely negative elsewhere.

    Raises:
        ThresherError: a query that sees columns with a gap between them, or a float mask with other values.
    """
    seen = mask if mask.dtype == torch.bool else _zeros_of(mask)
    columns = seen.shape[-1]
    count = seen.sum(dim=-1)
    marks = seen.to(torch.uint8)  # argmax takes no bool; of equal values it finds the first
    first = marks.argmax(dim=-1)
    last = columns - 1 - marks.flip(-1).argmax(dim=-1)
    whole = bool(((last - first + 1 == count) | (count == 0)).all())
    require(whole, "each query must see neighbouring columns", "an attention mask with gaps", "pad left or right, not between tokens")
    first = first.masked_fill(count == 0, 0)
    row = torch.arange(seen.shape[0], device=mask.device)[:, None]
    code, some = (row * columns + first).flatten(), (count > 0).flatten()
    codes, which = code[some].unique(return_inverse=True)
    requests = torch.zeros_like(code)
    requests[some] = which
    ends = torch.zeros_like(codes).scatter_reduce(0, which, (first + count).flatten()[some], "amax")
    spans = [(start // columns, start % columns, end) for start, end in zip(codes.tolist(), ends.tolist(), strict=True)]
    return Seen(first.flatten(), count.flatten() - 1, requests, spans)


def _zeros_of(mask: Tensor) -> Tensor:
    """Where a float mask is 0; elsewhere it must hide."""
    shown = mask == 0
    clear = bool((shown | (mask <= torch.finfo(mask.dtype).min / 2)).all())
    require(clear, "a float attention mask must hold 0 and the smallest numbers alone", "values between", "pass a mask that shows or hides")
    return shown
