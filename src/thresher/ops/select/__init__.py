"""Top-k of scores, the same set run after run.

```python
indices = torch.full((Q, topk), -1)
for i, row in enumerate(scores.tolist()):
    candidates = [p for p in range(N) if row[p] != -torch.inf]
    candidates.sort(key=lambda p: (row[p] != row[p], -row[p] if row[p] == row[p] else 0.0, p))  # NaN after every number
    kept = sorted(candidates[:topk])
    indices[i, : len(kept)] = torch.tensor(kept)
```
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.errors import require
from thresher.ops.dispatch import can_read, choose, device_of
from thresher.ops.select.reference import select_reference
from thresher.types import Selection


def select_topk(scores: Tensor, topk: int, space: str = "logical", positions: Tensor | None = None, impl: str = "auto") -> Selection:
    """Keep the topk best candidates of each row: score descending, ties to the smaller position.

    -inf marks "not a candidate" and is never kept, so a row may hold fewer than topk. NaN ranks below every number. -0.0 equals 0.0.

    Args:
        scores: fp32 ``[Q, N]``.
        topk: how many to keep, at least 1.
        space: the index space of the columns (or of ``positions``).
        positions: int32 or int64 ``[Q, N]``, ascending and -1 padded: column c stands for ``positions[:, c]``, -1 for no candidate.
            None: column c is position c.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        Selection with indices int32 ``[Q, topk]`` ascending and -1 padded, lengths, and scores beside (-inf where padded).

    Raises:
        ThresherError: a shape or dtype that does not fit, topk below 1, positions out of order, or an impl that cannot run.
    """
    require(
        scores.dim() == 2 and scores.dtype == torch.float32,
        "scores must be float32 [num_queries, n]",
        f"{scores.dtype} {tuple(scores.shape)}",
        "convert them",
    )
    require(topk >= 1, "topk must be at least 1", topk, "ask for at least one token")
    device = device_of(scores=scores, positions=positions)
    if positions is not None:
        ok = positions.shape == scores.shape and positions.dtype in (torch.int32, torch.int64)
        require(ok, f"positions must be int32 or int64 {list(scores.shape)}", f"{positions.dtype} {tuple(positions.shape)}", "convert them")
        if can_read(device):
            before, after = positions[:, :-1], positions[:, 1:]
            ordered = torch.where(before < 0, after < 0, (after > before) | (after < 0))
            require(bool(ordered.all()), "positions must ascend strictly, with -1 at the end", "another order", "sort each row")
    kernel = choose("select_topk", impl, device, lambda module: module.unsupported(*scores.shape, topk))
    return select_reference(scores, topk, space, positions) if kernel is None else kernel(scores, topk, space, positions)
