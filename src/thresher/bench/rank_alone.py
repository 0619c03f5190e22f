"""What one process selects of a whole context: what ranks select together must be the same, bit for bit.

``exact`` and ``replicated`` are held against one device, ``idsa`` against all its ranks simulated in one process. A score has the same bits
wherever it is computed (docs/numerics.md), so no token may differ, near-ties and ties included. Selectors whose ranks see other blocks or
route other heads than one device are merged in one process too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.bench.check import rows_of
from thresher.bench.ranks import OURS, Held, RankWork
from thresher.distributed import IDSA, ExactMerge, Replicated
from thresher.ops.dispatch import using
from thresher.selectors import DSA
from thresher.selectors.base import Selector


@dataclass(frozen=True)
class OneProcess:
    """This rank's part of the rows, since rows are shared out, and what is selected for them without ranks.

    Attributes:
        rows: int64 ``[n]`` on a CPU: the rank's own number and every R-th after it.
        sets: way of ours -> int32 ``[n, width]`` on a CPU: logical positions, -1 padded.
    """

    rows: Tensor
    sets: Mapping[str, Tensor]

    @classmethod
    def of(cls, whole: Held, works: Mapping[str, RankWork]) -> OneProcess:
        """Of the whole context, by the implementation that the ways take."""
        query, ranks = whole.index.query, next(iter(works.values())).ranks
        rows = torch.arange(query.num_queries)[ranks.rank :: ranks.ranks]
        if not len(rows):
            return cls(rows, {})
        asked, keys = rows_of(query, whole.index.keys, rows)
        alone = {way: _alone(work.over) for way, work in works.items() if way in OURS}
        with using(next(iter(works.values())).impl):
            made = {chooser: chooser.select(asked, keys).indices.cpu() for chooser in set(alone.values())}
        return cls(rows, {way: made[chooser] for way, chooser in alone.items()})

    def differs(self, work: RankWork, sets: Tensor) -> str | None:
        """Why what ranks select is not that, in one line, or None.

        Args:
            work: in one of our ways.
            sets: ``[ranks, Q, k]`` on a CPU, all ranks' local positions in any order, -1 for none; of one rank where all hold everything.
        """
        placement = work.over.placement
        local = sets[:, self.rows].long()
        logical = torch.cat([placement.to_logical(rank, part) for rank, part in enumerate(local)], 1)
        for at, row in enumerate(self.rows.tolist()):
            got, want = (Counter(p for p in one[at].tolist() if p >= 0) for one in (logical, self.sets[work.way]))
            if got != want:
                odd = max((got - want).total(), (want - got).total())
                return f"row {row}: {odd} of {want.total()} tokens are not those that it selects"
        return None


def _alone(over: IDSA | ExactMerge | Replicated) -> Selector | IDSA | ExactMerge:
    """What selects in one process: the selector itself where ranks change nothing about what it sees."""
    return over.selector if isinstance(over, Replicated) or (isinstance(over, ExactMerge) and isinstance(over.selector, DSA)) else over
