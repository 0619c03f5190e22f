"""The exact baseline: ranks exchange their candidates' scores and keep their part of one global top-k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thresher.cache.placement import Placement
from thresher.cache.state import LayerState
from thresher.distributed.collectives import Collectives
from thresher.distributed.shards import Shard, local_attention, local_query, localise, union
from thresher.distributed.simulate import select_over_ranks
from thresher.errors import require
from thresher.ops.keep_best import keep_best
from thresher.ops.keep_best.reference import rank_keys
from thresher.selectors.base import Selector
from thresher.types import AttentionInputs, IndexKeys, IndexQuery, Selection


@dataclass(frozen=True)
class ExactMerge:
    """Local top-k, all-gather of scores and positions, global top-k in the order (score descending, logical position ascending).

    Where a score depends on the query and the key alone (DSA) the result is bit-equal to one device. Selectors whose ranks route heads,
    choose blocks or normalise by their own tokens (MISA, HISA, the oracle) are merged by the scores their ranks report.

    Attributes:
        selector: the selector of one device; it must return scores.
        ranks: R.
        granularity: neighbouring tokens kept on one rank.

    Raises:
        ThresherError: ranks or granularity under 1.
    """

    selector: Selector
    ranks: int
    granularity: int = 1

    def __post_init__(self) -> None:
        _ = self.placement

    @property
    def placement(self) -> Placement:
        return Placement(self.ranks, self.granularity)

    @property
    def topk(self) -> int | None:
        """The selector's own, k."""
        return self.selector.topk

    @property
    def width(self) -> int | None:
        """Columns of the logical union, k; None where the selector has no bound of its own."""
        return self.topk

    def local_query(self, query: IndexQuery, rank: int) -> IndexQuery:
        """The queries, of logical positions, as ``rank`` sees them."""
        return local_query(query, self.placement, rank)

    def candidates(self, query: IndexQuery, shard: Shard, rank: int, attention: AttentionInputs | None = None) -> tuple[Tensor, Tensor]:
        """What ``rank`` proposes: its k best tokens.

        Args:
            query: Q queries of logical positions.
            shard: the rank's keys and state.
            rank: which rank this is.
            attention: the attention's inputs with the rank's own keys.

        Returns:
            scores: fp32 ``[Q, k]``, -inf where there is no candidate.
            logical: int32 ``[Q, k]``, -1 there.

        Raises:
            ThresherError: the selector has no topk, or returns no scores.
        """
        positions, scores = self._proposed(self.local_query(query, rank), shard, attention)
        logical = self.placement.to_logical(rank, positions.long()).to(torch.int32)
        return scores.view(torch.float32).masked_fill(positions < 0, float("-inf")), logical

    def merged(self, all_scores: Tensor, all_logical: Tensor) -> Selection:
        """The global top-k of all ranks' candidates.

        Args:
            all_scores: fp32 ``[R, Q, k]``, every rank's ``candidates`` in rank order.
            all_logical: int32 ``[R, Q, k]``.

        Returns:
            A logical ``Selection`` of k columns, ascending, with scores.
        """
        scores, logical = (x.transpose(0, 1).flatten(1) for x in (all_scores, all_logical))
        topk = self._bounded_topk()
        order = rank_keys(scores, logical).topk(min(topk, logical.shape[1]), dim=1).indices
        scores, logical = scores.gather(1, order), logical.gather(1, order)
        return union([Selection(logical, (logical >= 0).sum(dim=1), "local", scores)], Placement(1), topk)

    def owned(self, all_scores: Tensor, all_logical: Tensor, rank: int) -> Selection:
        """The part of ``merged`` that ``rank`` holds: a local ``Selection`` of k columns."""
        return localise(self.merged(all_scores, all_logical), self.placement, rank)

    def own_set(
        self, query: IndexQuery, shard: Shard, ranks: Collectives, attention: AttentionInputs | None = None
    ) -> Selection:
        """The part of the global top-k that the rank holds, after all ranks' candidates are gathered."""
        return self.own_set_of(self.local_query(query, ranks.rank), shard, ranks, attention)

    def own_set_of(
        self, local: IndexQuery, shard: Shard, ranks: Collectives, attention: AttentionInputs | None = None
    ) -> Selection:
        """``own_set`` of queries as the rank sees them (``local_query``), which layers of one step have in common."""
        if self.topk is None:
            return self._all_of(local, shard, attention)
        everyone = ranks.gather(self._proposed(local, shard, attention))
        return keep_best(everyone[:, 1].view(torch.float32), everyone[:, 0], ranks.rank, self._bounded_topk(), self.granularity)

    def local_sets(self, query: IndexQuery, shards: Sequence[Shard], attention: AttentionInputs | None = None) -> list[Selection]:
        """Every rank's local selection, in one process; ``attention`` holds all keys."""
        inputs = [local_attention(attention, self.placement, rank) for rank in range(len(shards))]
        if self.topk is None:
            return [self._all_of(self.local_query(query, rank), shard, inputs[rank]) for rank, shard in enumerate(shards)]
        proposed = [self.candidates(query, shard, rank, inputs[rank]) for rank, shard in enumerate(shards)]
        whole = self.merged(torch.stack([p[0] for p in proposed]), torch.stack([p[1] for p in proposed]))
        return [localise(whole, self.placement, rank) for rank in range(self.ranks)]

    def select(
        self, query: IndexQuery, keys: IndexKeys, state: LayerState | None = None, attention: AttentionInputs | None = None
    ) -> Selection:
        """The global top-k as logical positions; see ``simulate.select_over_ranks``."""
        return select_over_ranks(self, query, keys, state, attention)

    def _proposed(self, local: IndexQuery, shard: Shard, attention: AttentionInputs | None) -> Tensor:
        """A rank's candidates in one tensor: int32 ``[2, Q, k]``, local positions and the bits of their scores; -1 where there is none."""
        topk = self._bounded_topk()
        picked = self.selector.shard(self.ranks, topk).select(local, shard.keys, shard.state, attention)
        require(picked.scores is not None, "ExactMerge needs a selector that returns scores", type(self.selector).__name__, "use IDSA")
        assert picked.scores is not None
        both = torch.stack([picked.indices, picked.scores.view(torch.int32)])
        return torch.nn.functional.pad(both, (0, topk - picked.topk), value=-1) if picked.topk < topk else both

    def _all_of(self, local: IndexQuery, shard: Shard, attention: AttentionInputs | None) -> Selection:
        """A rank's set where the selector has no topk: nothing is left out for want of room, so there is nothing to compare."""
        return replace(self.selector.select(local, shard.keys, shard.state, attention), space="local")

    def _bounded_topk(self) -> int:
        require(
            self.topk is not None, "ExactMerge compares candidates of a selector with a topk", type(self.selector).__name__, "use Single"
        )
        assert self.topk is not None
        return self.topk
