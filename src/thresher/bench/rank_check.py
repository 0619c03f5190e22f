"""The check of a step over ranks, before any time: sets and outputs of some rows, held against the reference on a CPU.

Every rank checks its own heads, over the union of what all ranks attend to, and its own part of a set. Sets of our ways, of all rows, are
then held against one process, to the bit (``rank_alone``). A public way is held to what other packages promise: a top-k by its own
roundings, in any order, outputs rounded to bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from thresher.bench.check import (
    BITS,
    attention_agrees,
    outputs_agree,
    reference_attention,
    rows_to_cpu,
    same_bits,
    sample_rows,
    score_bound,
    selections_agree,
)
from thresher.bench.inputs import AttendInputs
from thresher.bench.peer_steps import topk_differs
from thresher.bench.rank_alone import OneProcess
from thresher.bench.rank_steps import RankStep, selector_here
from thresher.bench.ranks import OURS, Held, RankWork
from thresher.distributed import ExactMerge, Replicated, split_keys, union
from thresher.distributed.collectives import Collectives
from thresher.distributed.shards import local_query
from thresher.ops import paged_index_score, select_topk
from thresher.ops.dispatch import using
from thresher.selectors import DSA
from thresher.types import IndexKeys, IndexQuery, PartialAttention, Selection


@dataclass(frozen=True)
class Reference:
    """Some rows of a case, on a CPU: their queries, of logical positions, and all keys of their requests. What takes long is kept.

    ``bits`` are those that a matrix unit of the device keeps, as in ``check.BITS``; ``alone`` is of other rows.
    """

    rows: Tensor
    query: IndexQuery
    keys: IndexKeys
    bits: int
    alone: OneProcess

    @classmethod
    def of(cls, whole: Held, works: Mapping[str, RankWork]) -> Reference:
        query, keys = whole.index.query, whole.index.keys
        rows = sample_rows(query.num_queries)
        return cls(rows, *rows_to_cpu(query, keys, rows), BITS[query.q.device.type], OneProcess.of(whole, works))

    @cached_property
    def scores(self) -> Tensor:
        """fp32 ``[rows, N]`` of all keys."""
        with using("reference"):
            return paged_index_score(self.query, self.keys)

    @cached_property
    def bound(self) -> Tensor:
        """``check.score_bound`` of all keys."""
        with using("reference"):
            return score_bound(self.query, self.keys, self.bits)

    def wanted(self, over: ExactMerge | Replicated) -> Selection:
        """What one device selects of all keys. A selector whose ranks see other blocks than one device would is merged as ranks do it."""
        selector = over.selector
        with using("reference"):
            if isinstance(selector, DSA):
                return select_topk(self.scores, selector.topk)
            return selector.select(self.query, self.keys) if isinstance(over, Replicated) else over.select(self.query, self.keys)


def check_step(step: RankStep, reference: Reference, group: Collectives) -> tuple[Tensor, str | None]:
    """Check a step on every rank. All call it, and tell one another all they must before one judges.

    Args:
        step: over the copy that the reference is of.
        reference: the rows to look at.
        group: the ranks.

    Returns:
        sets: ``[ranks, Q, k]`` on a CPU, for ``OneProcess.differs``, by which other ranks than the one at fault are red too.
        why: what is wrong on this rank, in one line, or None.
    """
    work, rows = step.work, reference.rows
    here = rows.to(work.held.positions.device)
    first = _kept(step.run())
    second = _kept(step.run())
    every = step.select()
    picked = every[here]
    beside = _scored(work) if work.way in OURS else None
    scores = None if beside is None or beside.scores is None else beside.scores[here]
    sets = _of_all(work, every, group)
    proposed = None if scores is None or beside is None else (_of_all(work, beside.indices[here], group), _of_all(work, scores, group))
    attend = _attended(work, picked, here, group)
    if beside is not None and not same_bits(first, second):
        return sets, "a second run gives other bits"
    why = _sets_differ(work, sets[:, rows], proposed, beside, reference)
    return sets, why or _outputs_differ(first, attend, rows, work.dealt)


def _kept(result: Any) -> Any:
    """A result that the next run does not write over."""
    return result if isinstance(result, PartialAttention) else result.clone()


def _scored(work: RankWork) -> Selection:
    """What the rank selects, or proposes, with scores, which the timed run may not make: they excuse near-ties."""
    held = work.held
    with using(work.impl):
        return selector_here(work).select(held.local(held.index.query), held.index.keys, work.state)


def _of_all(work: RankWork, x: Tensor, group: Collectives) -> Tensor:
    """``[ranks, ...]`` on a CPU: every rank's where tokens are dealt, the one that is everyone's where they are not."""
    return (group.gather(x.contiguous()) if work.dealt else x[None]).cpu()


def _attended(work: RankWork, picked: Tensor, here: Tensor, group: Collectives) -> tuple[AttendInputs, Tensor]:
    """The rank's own queries of these rows, and all latents that any rank attends to for them, with their slots; on a CPU."""
    held = work.held
    keys, local = held.index.keys, picked.clamp(min=0).long()
    page = keys.page_table[held.index.query.requests[here, None], local // keys.page_size].long()
    records = _of_all(work, held.attend.latents[page, local % keys.page_size, 0], group)
    there = _of_all(work, picked >= 0, group)
    num = here.numel()
    slots = torch.arange(there.numel(), dtype=torch.int32).view(num, -1)
    slots = slots.masked_fill(~there.transpose(0, 1).reshape(num, -1), -1)
    latents = records.transpose(0, 1).reshape(slots.numel(), 1, 1, records.shape[3])
    return AttendInputs(held.attend.q[here].cpu(), latents, None), slots


def _sets_differ(
    work: RankWork, sets: Tensor, proposed: tuple[Tensor, Tensor] | None, beside: Selection | None, reference: Reference
) -> str | None:
    """``sets`` are all ranks' of the rows, ``proposed`` all ranks' candidates with scores, ``beside`` this rank's."""
    over, rank = work.over, work.ranks.rank
    if beside is None or proposed is None:
        logical = torch.cat([over.placement.to_logical(number, part.long()) for number, part in enumerate(sets)], 1)
        return topk_differs(logical.tolist(), reference.scores, work.case.topk)
    parts = [_with_scores(part, *theirs) for part, *theirs in zip(sets, *proposed, strict=True)]
    if isinstance(over, ExactMerge):
        got = union(parts, over.placement, over.topk)
        return selections_agree(got, reference.wanted(over), reference.bound, reference.query, reference.keys)
    mine = rank if work.dealt else 0
    if not torch.equal(sets[mine], proposed[0][mine]):
        return "beside scores other tokens are selected"
    if isinstance(over, Replicated):
        return selections_agree(parts[0], reference.wanted(over), reference.bound, reference.query, reference.keys)
    query, keys = local_query(reference.query, over.placement, rank), split_keys(reference.keys, over.placement)[rank]
    with using("reference"):
        want, bound = over.local_selector.select(query, keys), score_bound(query, keys, reference.bits)
    return selections_agree(parts[rank], want, bound, query, keys)


def _with_scores(kept: Tensor, proposed: Tensor, scores: Tensor) -> Selection:
    """A rank's part of a set, with the scores that it proposed those tokens with; NaN for one that it did not propose."""
    same = (kept[:, :, None] == proposed[:, None, :]) & (kept >= 0)[:, :, None]
    found = torch.where(same.any(2), scores.gather(1, same.int().argmax(2)), torch.nan)
    return Selection(kept, (kept >= 0).sum(1), "local", found.masked_fill(kept < 0, -torch.inf))


def _outputs_differ(result: Any, attend: tuple[AttendInputs, Tensor], rows: Tensor, rounded: bool) -> str | None:
    """With ``rounded``, parts travelled as bf16."""
    inputs, slots = attend
    some = torch.arange(len(rows))
    if isinstance(result, PartialAttention):
        got = PartialAttention(result.out[rows.to(result.out.device)].cpu(), result.lse[rows.to(result.lse.device)].cpu())
        return attention_agrees(inputs, got, some, slots, rounded)
    got_out = result[rows.to(result.device)].float().cpu()
    return outputs_agree(got_out, reference_attention(inputs, some, slots).out, rounded=True)
