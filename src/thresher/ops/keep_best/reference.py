"""Top-k of all ranks' candidates through integer keys, and one rank's part of it."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.cache.placement import Placement
from thresher.types import Selection


def rank_keys(scores: Tensor, logical: Tensor) -> Tensor:
    """int64, larger first in the order (score descending, position ascending); NaN below every number, no token below that.

    All keys of a row but those of no token differ, so any top-k of them is the same top-k.
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    ordered = ordered.masked_fill(scores.isnan(), -(2**31))
    keys = ordered * 2**31 + (2**31 - 1 - logical.to(torch.int64))
    return keys.masked_fill(logical < 0, torch.iinfo(torch.int64).min)


def keep_best_reference(scores: Tensor, positions: Tensor, rank: int, topk: int, granularity: int) -> Selection:
    """The rank's selection; see ``keep_best``."""
    ranks, _, num = scores.shape
    placement = Placement(ranks, granularity)
    logical = torch.stack([placement.to_logical(r, held) for r, held in enumerate(positions.long())])
    keys = rank_keys(*(x.transpose(0, 1).flatten(1) for x in (scores, logical)))
    best = torch.zeros_like(keys, dtype=torch.bool).scatter(1, keys.topk(min(topk, ranks * num), dim=1).indices, True)
    own = best.unflatten(1, (ranks, num))[:, rank] & (positions[rank] >= 0)
    columns = own.long().sort(dim=1, descending=True, stable=True).indices[:, :topk]
    there, missing = own.gather(1, columns), (0, topk - columns.shape[1])
    indices = positions[rank].gather(1, columns).masked_fill(~there, -1)
    beside = scores[rank].gather(1, columns).masked_fill(~there, -torch.inf)
    pad = torch.nn.functional.pad
    return Selection(pad(indices, missing, value=-1), own.sum(dim=1), "local", pad(beside, missing, value=-torch.inf))
