"""A rank's piece of a layer, and the step of queries, keys and selections between logical and local positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thresher.cache.index_keys import load_keys, pack_keys
from thresher.cache.placement import Placement
from thresher.cache.state import LayerState
from thresher.distributed.collectives import Collectives
from thresher.errors import require
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, PartialAttention, Selection

Attend = Callable[[Selection], PartialAttention]


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one layer.

    Attributes:
        keys: index keys of the rank's tokens, at local positions.
        state: the rank's own layer state (its block means are means of local blocks), or None.
        attend: ``attend(selection) -> PartialAttention`` of the whole query batch over the local positions selected; None where only
            selections are wanted.
    """

    keys: IndexKeys
    state: LayerState | None = None
    attend: Attend | None = None

    def attend_to(self, selection: Selection) -> PartialAttention:
        """Call ``attend``. Raises ``ThresherError`` where there is none."""
        require(self.attend is not None, "a shard that attends must have attend set", None, "pass Shard(keys, state, attend)")
        assert self.attend is not None
        return self.attend(selection)


def local_query(query: IndexQuery, placement: Placement, rank: int) -> IndexQuery:
    """The same queries with positions turned into the last local position on ``rank`` that is not after each of them (-1 if none)."""
    return replace(query, positions=placement.local_end(query.positions, rank))


def split_keys(keys: IndexKeys, placement: Placement) -> list[IndexKeys]:
    """Deal the keys of every request over the ranks; value and scale bits are copied as they are."""
    loaded = [load_keys(keys, request) for request in range(keys.num_requests)]
    pieces = []
    for rank in range(placement.ranks):
        rows = []
        for values, scales in loaded:
            mine = _held(placement, scales.shape[0], rank, scales.device)
            rows.append((values.view(torch.uint8)[mine].view(torch.float8_e4m3fn), scales[mine]))
        pieces.append(pack_keys(rows, keys.page_size))
    return pieces


def local_attention(attention: AttentionInputs | None, placement: Placement, rank: int) -> AttentionInputs | None:
    """The attention's inputs as ``rank`` sees them: the same queries, the keys at its own positions."""
    if attention is None:
        return None
    load_all = attention.load_keys

    def load_mine(request: int) -> Tensor:
        keys = load_all(request)
        return keys[_held(placement, keys.shape[0], rank, keys.device)]

    return replace(attention, load_keys=load_mine)


def localise(selection: Selection, placement: Placement, rank: int) -> Selection:
    """The part of a logical selection that ``rank`` holds, at local positions; as wide as it was."""
    require(selection.space == "logical", "selection must be logical", selection.space, "pass logical positions")
    logical = selection.indices.long()
    mine = placement.owner(logical) == rank
    return _packed(placement.to_local(logical).masked_fill(~mine, -1), selection.scores, "local", selection.topk)


def union(selections: Sequence[Selection], placement: Placement, width: int | None = None) -> Selection:
    """Every rank's local selection, as one logical selection, ascending.

    Args:
        selections: one local selection per rank, in rank order, of the same queries.
        placement: where the tokens live.
        width: columns of the result, at least the longest row; the sum of the parts' columns when None.

    Returns:
        A logical ``Selection``; with scores when every part has them.
    """
    must = f"there must be one selection for each of the {placement.ranks} ranks"
    require(len(selections) == placement.ranks, must, len(selections), "pass them in rank order")
    logical = [placement.to_logical(rank, part.indices.long()) for rank, part in enumerate(selections)]
    scores = [part.scores for part in selections if part.scores is not None]
    columns = sum(part.topk for part in selections)
    joined = torch.cat(scores, dim=1) if len(scores) == len(selections) else None
    return _packed(torch.cat(logical, dim=1), joined, "logical", columns if width is None else width)


def gather_union(selection: Selection, placement: Placement, ranks: Collectives) -> Selection:
    """``union`` of the local selections that all ranks made for the same queries; on every rank the same. For measuring."""
    if placement.kind == "replicated":
        return replace(selection, space="logical")
    widths = ranks.gather(torch.tensor([selection.topk], device=selection.indices.device))
    padded = torch.nn.functional.pad(selection.indices, (0, int(widths.max()) - selection.topk), value=-1)
    return union([Selection(part, (part >= 0).sum(1), "local") for part in ranks.gather(padded)], placement)


def _held(placement: Placement, length: int, rank: int, device: torch.device) -> Tensor:
    """int64: the logical positions below ``length`` that ``rank`` holds, ascending."""
    num = int(placement.local_length(torch.tensor([length]), rank))
    return placement.to_logical(rank, torch.arange(num, device=device))


def _packed(positions: Tensor, scores: Tensor | None, space: str, width: int) -> Selection:
    """A selection of int64 ``positions [Q, n]`` (-1 anywhere is padding), ascending, cut or padded to ``width`` columns."""
    last = torch.iinfo(torch.int64).max
    ordered, order = positions.masked_fill(positions < 0, last).sort(dim=1)
    lengths = (positions >= 0).sum(dim=1)
    grow = max(width - positions.shape[1], 0)
    indices = torch.nn.functional.pad(ordered.masked_fill(ordered == last, -1), (0, grow), value=-1)[:, :width]
    if scores is not None:
        scores = scores.gather(1, order).masked_fill(ordered == last, float("-inf"))
        scores = torch.nn.functional.pad(scores, (0, grow), value=float("-inf"))[:, :width]
    return Selection(indices.to(torch.int32), lengths, space, scores)
