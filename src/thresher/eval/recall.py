"""How much of one selection another one holds."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.errors import require
from thresher.types import Selection


def recall_rows(selection: Selection, of: Selection) -> Tensor:
    """Share of each row of ``of`` that ``selection`` holds: ``|S and T| / |T|``.

    Args:
        selection: S, any width; rows may come in any order of positions, -1 padded anywhere.
        of: T, same queries, same index space.

    Returns:
        fp64 ``[Q]`` on ``of``'s device; 1 where T is empty (nothing to miss).

    Raises:
        ThresherError: for different numbers of queries or different index spaces.
    """
    num_held = _num_common(selection, of)
    num_wanted = (of.indices >= 0).sum(1)
    return torch.where(num_wanted > 0, num_held.double() / num_wanted.clamp(min=1), 1.0)


def recall(selection: Selection, of: Selection) -> float:
    """Mean of ``recall_rows`` over the queries whose context exceeds k: those whose row of ``of`` is full to its width.

    A row that is not full holds every token the query can see, so any selector gets it right; counting it would flatter.
    nan when no row is full.

    Raises:
        ThresherError: as ``recall_rows``.
    """
    rows = recall_rows(selection, of)
    full = (of.indices >= 0).all(1) if of.topk else torch.zeros_like(rows, dtype=torch.bool)
    return float(rows[full].mean())


def _num_common(selection: Selection, of: Selection) -> Tensor:
    """int64 ``[Q]``: distinct entries in both rows. One sort over both, then equal neighbours from different sides are counted."""
    require(selection.space == of.space, f"both selections must be in the same index space ({of.space})", selection.space, "convert one")
    num_queries = of.indices.shape[0]
    num_rows = selection.indices.shape[0]
    require(num_rows == num_queries, f"selection must have {num_queries} rows", num_rows, "pass the same queries")
    ours, theirs = selection.indices.to(of.indices.device).long(), of.indices.long()
    # The low bit says which side an entry is from, so a pair that both sides hold ends up as 2p, 2p + 1.
    ours, theirs = torch.where(ours < 0, -2, 2 * ours), torch.where(theirs < 0, -1, 2 * theirs + 1)
    both = torch.cat([ours, theirs], 1).sort(1).values
    return ((both[:, 1:] == both[:, :-1] + 1) & (both[:, 1:] % 2 == 1) & (both[:, :-1] >= 0)).sum(1)
