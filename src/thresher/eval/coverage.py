"""Whether the local sets of IDSA hold the global top-k, measured on a selection instead of derived from a model.

A rank keeps the best m of its own tokens. Where a score depends on query and key alone (DSA), scores have the same bits on every rank and
ties go to the smaller position everywhere, so the tokens of the global top-k that a rank holds come first in its own order, and it keeps
exactly ``min(X_r, m)`` of its X_r. The counts X_r therefore say all there is to say, for every m at once; a test holds that against
``IDSA.select``.

The rule of ``thresher.distributed.coverage`` takes which tokens are the top-k to say nothing about which rank holds them. That is what is
put to the test here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.cache.placement import Placement
from thresher.distributed import expected_coverage, local_topk
from thresher.distributed.idsa import MISS_PROBABILITY
from thresher.errors import require
from thresher.types import IndexQuery, Selection

CONTIGUOUS = "contiguous"


def rank_counts(picked: Selection, placement: Placement) -> Tensor:
    """How many tokens of each row each rank holds.

    Args:
        picked: Q rows of logical positions, such as DSA's top-k.
        placement: where the tokens live.

    Returns:
        int64 ``[Q, R]``, X_r; a row sums to the tokens picked.

    Raises:
        ThresherError: a selection that is not logical, or positions past a contiguous placement's capacity.
    """
    require(picked.space == "logical", "picked must be logical", picked.space, "pass logical positions")
    # A row's padding is counted as one rank more, which is dropped.
    owner = placement.owner(picked.indices.long())
    owner = torch.where(owner < 0, placement.ranks, owner)
    counts = torch.zeros(len(owner), placement.ranks + 1, dtype=torch.int64, device=owner.device)
    return counts.scatter_add_(1, owner, torch.ones_like(owner))[:, :-1]


def share_held(counts: Tensor, local_topk: int) -> Tensor:
    """fp64 ``[Q]``: share of the global top-k in the union of local sets of m tokens, ``sum_r min(X_r, m) / k``; 1 for an empty row."""
    total = counts.sum(1)
    return torch.where(total > 0, counts.clamp_max(local_topk).sum(1).double() / total.clamp_min(1), 1.0)


def rows_missing(counts: Tensor, local_topk: int) -> Tensor:
    """bool ``[Q]``: rows of ``counts [Q, R]`` in which some rank holds more than m tokens of the global top-k, so that one is lost."""
    return counts.amax(1) > local_topk


def smallest_enough(counts: Tensor, probability: float = MISS_PROBABILITY) -> int:
    """The smallest m with which at most this share of the rows of ``counts [Q, R]`` misses a token; never over k, which misses none.

    Raises:
        ThresherError: no rows, or a probability outside [0, 1).
    """
    require(len(counts) > 0, "there must be rows to count", 0, "pass queries whose context exceeds k")
    require(0 <= probability < 1, "probability must lie in [0, 1)", probability, "1e-4 is what IDSA promises")
    # Multiplied, so that a share of exactly the probability passes whatever a division would round to.
    allowed = int(probability * len(counts) + 1e-9)
    return int(counts.amax(1).sort(descending=True).values[allowed])


def counted(query: IndexQuery, topk: int) -> IndexQuery:
    """The queries whose context exceeds k; the others keep everything, and counting them would flatter."""
    return query.rows(query.positions >= topk)


@dataclass(frozen=True)
class Coverage:
    """One placement against the rule.

    Attributes:
        ranks: R.
        local_topk: m by the rule, ``local_topk(k, R, promise, length)``.
        expected: the share of the global top-k held at this m by the rule's model.
        held_by_layer: the share measured, mean over a layer's queries, a fraction.
        missing_by_layer: rows (queries) of each layer in which a token is lost.
        rows: queries and layers together.
        needed: the smallest m that loses a token in at most ``promise`` of the rows.
        promise: share of rows that may lose a token.
    """

    ranks: int
    local_topk: int
    expected: float
    held_by_layer: tuple[float, ...]
    missing_by_layer: tuple[int, ...]
    rows: int
    needed: int
    promise: float

    @property
    def held(self) -> float:
        """Mean over layers."""
        return sum(self.held_by_layer) / len(self.held_by_layer)

    @property
    def worst(self) -> float:
        """The layer of the smallest share."""
        return min(self.held_by_layer)

    @property
    def missing(self) -> float:
        """Share of rows in which a token is lost."""
        return sum(self.missing_by_layer) / self.rows

    @property
    def obeys(self) -> bool:
        """Whether the rule kept its promise: no larger m was needed."""
        return self.needed <= self.local_topk


def measure(layers: Sequence[Selection], placement: Placement, length: int, promise: float = MISS_PROBABILITY) -> Coverage:
    """Hold a placement's counts against the rule.

    Args:
        layers: the global top-k of each layer, each with a row for every query whose context exceeds k.
        placement: where the tokens live.
        length: the longest of those contexts, which the rule's m grows with.
        promise: share of rows that may lose a token.

    Raises:
        ThresherError: no layers, a layer without rows, a row that is not full, or what ``rank_counts`` refuses.
    """
    require(len(layers) > 0, "there must be a layer", 0, "pass a selection for each")
    topk = layers[0].topk
    for picked in layers:
        full = picked.topk == topk and len(picked.indices) > 0 and bool((picked.indices >= 0).all())
        require(full, f"each layer must have rows of {topk} tokens", f"{list(picked.indices.shape)}, or padded", "leave short contexts out")
    m = local_topk(topk, placement.ranks, promise, length)
    counts = [rank_counts(picked, placement) for picked in layers]
    return Coverage(
        ranks=placement.ranks,
        local_topk=m,
        expected=expected_coverage(topk, placement.ranks, m, length),
        held_by_layer=tuple(float(share_held(each, m).mean()) for each in counts),
        missing_by_layer=tuple(int(rows_missing(each, m).sum()) for each in counts),
        rows=sum(len(each) for each in counts),
        needed=smallest_enough(torch.cat(counts), promise),
        promise=promise,
    )


def placements(ranks: int, granularity: Sequence[int], capacity: int) -> dict[str, Placement]:
    """Name -> where the tokens live: interleaved at each granularity (``g=16``), then contiguous shards of ``capacity`` tokens in all."""
    named = {f"g={g}": Placement(ranks, g) for g in granularity}
    return {**named, CONTIGUOUS: Placement(ranks, kind=CONTIGUOUS, capacity=capacity)}
