"""One rank's step among others: what ``simulate.run`` does for all of them, with real exchanges."""

from __future__ import annotations

from collections.abc import Sequence

from thresher.distributed.collectives import Collectives, check_ranks
from thresher.distributed.shards import Shard
from thresher.distributed.simulate import OverRanks
from thresher.types import AttentionInputs, IndexQuery, PartialAttention, Selection


def run_on_rank(
    over: OverRanks, query: IndexQuery, shard: Shard, ranks: Collectives, shares: Sequence[int], attention: AttentionInputs | None = None
) -> tuple[PartialAttention, Selection]:
    """Select and attend on this rank, then merge with the others.

    Args:
        over: how tokens are placed, and the selector inside.
        query: Q queries of logical positions, the same on every rank.
        shard: this rank's keys and state, and its ``attend``: over all heads where tokens are dealt, over the rank's own where they are
            replicated.
        ranks: the ranks.
        shares: how many of the attention's heads each rank has, such as ``collectives.share_heads`` says.
        attention: the attention's inputs with the rank's own keys, for selectors that look at true mass.

    Returns:
        The merged attention of all heads, the same bits on every rank and as ``simulate.run``; and what this rank attended to, local.

    Raises:
        ThresherError: a placement for another number of ranks than there are.
    """
    check_ranks(over.placement.ranks, ranks)
    picked = over.own_set(query, shard, ranks, attention)
    part = shard.attend_to(picked)
    if over.placement.kind == "replicated":
        return PartialAttention(ranks.gather_heads(part.out, shares), ranks.gather_heads(part.lse, shares)), picked
    return ranks.merge(part), picked
