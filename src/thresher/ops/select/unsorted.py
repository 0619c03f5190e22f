"""From the unsorted columns that other packages' top-k kernels return to a ``Selection``."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.types import Selection


def sorted_selection(scores: Tensor, picked: Tensor, space: str, positions: Tensor | None, with_scores: bool = True) -> Selection:
    """Ascending and -1 padded.

    Args:
        scores: fp32 ``[Q, N]``, N at least 1; -inf marks no candidate, picked or not.
        picked: int32 ``[Q, k]``, distinct columns in any order, -1 for none.
        space, positions, with_scores: as for ``select_topk``.
    """
    width = scores.shape[1]
    columns = picked.clamp(min=0).long()
    absent = (picked < 0) | (scores.gather(1, columns) == -torch.inf)
    # Columns that are no candidate move past the end, so that one sort both orders and pads.
    columns = columns.masked_fill(absent, width).sort(dim=1).values
    padded = columns == width
    columns = columns.masked_fill(padded, 0)
    where = columns if positions is None else positions.gather(1, columns)
    beside = scores.gather(1, columns).masked_fill(padded, -torch.inf) if with_scores else None
    return Selection(indices=where.int().masked_fill(padded, -1), lengths=(~padded).sum(1), space=space, scores=beside)
