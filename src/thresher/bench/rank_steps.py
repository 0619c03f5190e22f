"""A layer's step on one rank among others, in our three ways: what a CUDA graph holds, exchanges included.

A step quantises and stores the new tokens (every rank the queries, of tokens its own alone), selects, and attends with 128 heads over what
is held here (``idsa``, ``exact``) or with the rank's own heads over the whole context (``replicated``). It ends with the rank's own heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from thresher.bench.inputs import SCALE, Inputs
from thresher.bench.ranks import RankWork
from thresher.bench.timing import Prepared
from thresher.bench.work import attend_picked, store_arguments, store_tokens
from thresher.distributed import IDSA, ExactMerge, Shard
from thresher.distributed.attend import attend_merged, counts_of, slots_and_heads, store_and_send
from thresher.ops.dispatch import using
from thresher.selectors.base import Selector
from thresher.types import IndexQuery, PartialAttention, Selection


@dataclass(frozen=True)
class RankStep:
    """One way's step over one copy; called, it gives the output of the rank's own heads.

    Attributes:
        work: over what.
        select: int32 ``[Q, k]``, what the step attends to among the tokens held, in any order, -1 for none. Ranks call it together.
        run: the step: a ``PartialAttention``, or bf16 outputs alone.
    """

    work: RankWork
    select: Callable[[], Tensor]
    run: Callable[[], Any]

    def __call__(self) -> Any:
        return self.run()


def our_steps(works: Sequence[RankWork]) -> Prepared:
    """The steps of ``idsa``, ``exact`` or ``replicated``."""
    run = _dealt if works[0].dealt else _whole
    return Prepared(tuple(RankStep(work, partial(_picked, work), partial(run, work)) for work in works))


def selector_here(work: RankWork) -> Selector:
    """What the rank runs over what it holds: for ``exact`` its candidates'."""
    over = work.over
    if isinstance(over, IDSA):
        return over.local_selector
    if isinstance(over, ExactMerge):
        assert over.topk is not None
        return over.selector.shard(over.ranks, over.topk)
    return over.selector


def _whole(work: RankWork) -> PartialAttention:
    held = work.held
    with using(work.impl):
        query = store_tokens(held.tokens, held.index, held.attend)
        return attend_picked(_select(work, query), Inputs(query, held.index.keys), held.attend)


def _dealt(work: RankWork) -> PartialAttention:
    """The heads' queries are on their way while tokens are selected."""
    held, keys, asked = work.held, work.held.index.keys, work.held.index.query
    with using(work.impl):
        stored = store_arguments(held.tokens, held.index, held.attend)
        made, coming = store_and_send(work.ranks, held.attend.q, work.shares, keys, work.state.scratch, *stored)
        picked = _select(work, IndexQuery(*made, asked.positions, asked.requests))
        slots, q = slots_and_heads(coming, picked, keys.page_table, asked.requests, keys.page_size)
        counts, early = counts_of(work.over, picked), picked.slots is None
        return attend_merged(work.ranks, q, held.attend.latents, slots, SCALE, work.shares, counts, early)


def _select(work: RankWork, query: IndexQuery) -> Selection:
    """Of queries with logical positions."""
    return work.over.own_set_of(work.held.local(query), Shard(work.held.index.keys, work.state), work.ranks)


def _picked(work: RankWork) -> Tensor:
    held = work.held
    with using(work.impl):
        return _select(work, store_tokens(held.tokens, held.index, held.attend)).indices
