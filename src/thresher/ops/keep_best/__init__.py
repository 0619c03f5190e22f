"""A rank's part of one global top-k, from what every rank proposes: the end of an exact merge.

```python
logical = torch.stack([Placement(R, granularity).to_logical(r, positions[r].long()) for r in range(R)])
indices = torch.full((Q, topk), -1)
for q in range(Q):
    candidates = [(scores[r, q, c], logical[r, q, c], r, c) for r, c in (positions[:, q] >= 0).nonzero().tolist()]
    candidates.sort(key=lambda x: (x[0] != x[0], -x[0] if x[0] == x[0] else 0.0, x[1]))  # NaN after every number
    kept = sorted(c for _, _, r, c in candidates[:topk] if r == rank)
    indices[q, : len(kept)] = positions[rank, q, kept].long()
```
"""

from __future__ import annotations

from torch import Tensor

from thresher.checks import FP32, INT32, check_count, check_tensor
from thresher.errors import require
from thresher.ops.arguments import check_values
from thresher.ops.dispatch import AUTO, checks_values, choose, device_of
from thresher.ops.keep_best.reference import keep_best_reference
from thresher.types import Selection

MOST_HELD = 65536
"""Candidates of a query, each rank's padded to a power of two and ranks to one, that a kernel keeps in registers; more it reads again."""
LOGICAL_END = 0x7F800000
"""Logical positions are below this: each, as the bits of a float, is a finite one."""


def keep_best(scores: Tensor, positions: Tensor, rank: int, topk: int, granularity: int = 1, impl: str = AUTO) -> Selection:
    """Which of its own candidates a rank keeps: those among the topk best of all ranks' together.

    Score descending, ties to the smaller logical position. NaN ranks below every number, and -inf is one. -0.0 equals 0.0. Tokens are
    dealt as ``Placement(R, granularity)`` deals them.

    Args:
        scores: fp32 ``[R, Q, n]``, every rank's candidates, in rank order.
        positions: int32 ``[R, Q, n]``, where they are on their rank: ascending, -1 padded. What scores hold beside -1 does not matter.
        rank: whose part is wanted, 0..R - 1.
        topk: how many all ranks keep together, at least 1.
        granularity: neighbouring tokens kept on one rank, at least 1.
        impl: "auto" or an implementation named in ``thresher.ops.dispatch``; a named one never falls back.

    Returns:
        A local Selection with indices int32 ``[Q, topk]`` ascending and -1 padded, lengths, and scores beside (-inf where padded).

    Raises:
        ThresherError: a shape, dtype or device that does not fit, a rank outside 0..R - 1, topk or granularity below 1, positions out of
            order, below -1 or so large that logical ones pass 2**31 - 2**23, or an impl that cannot run.
    """
    check_tensor("scores", scores, FP32, ("ranks", "num_queries", "n"), "gather every rank's, as .float()")
    check_tensor("positions", positions, INT32, tuple(scores.shape), "pass one per score, as .int()")
    ranks = scores.shape[0]
    check_count("rank", rank, 0, ranks - 1, "name one of the ranks that scores are of")
    check_count("topk", topk, 1, do="ask for at least one token")
    check_count("granularity", granularity, 1, LOGICAL_END // max(ranks, 1), "1 deals token by token")
    device = device_of(scores=scores, positions=positions)
    check_values(("positions", positions, -1, LOGICAL_END // ranks - granularity, "pass local positions, and -1 for none"))
    if checks_values(device):
        rows = positions.where(positions >= 0, LOGICAL_END)
        ordered = (rows[..., 1:] > rows[..., :-1]) | (rows[..., 1:] == LOGICAL_END)
        require(bool(ordered.all()), "positions must ascend strictly, with -1 at the end", "another order", "sort each row")
    kernel = choose("keep_best", impl, device)
    if kernel is None:
        return keep_best_reference(scores, positions, rank, topk, granularity)
    kept: Selection = kernel(scores, positions, rank, topk, granularity)
    return kept
