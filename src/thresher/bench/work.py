"""One copy of a case's inputs, and the run that is timed: from the FP8 query and the cached keys to the int32 selection or the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.bench.cases import Case, size_text
from thresher.bench.inputs import INPUTS, SCALE, AttendInputs, Inputs, NewTokens, make_attend_inputs, make_inputs, make_new_tokens
from thresher.cache import LayerState, load_keys
from thresher.cache.index_keys import visible_counts
from thresher.errors import require
from thresher.ops import (
    index_score,
    keep_best,
    paged_index_score,
    select_topk,
    sparse_attend_mla,
    sparse_attend_mla_fp8,
    store_step,
    to_slots,
)
from thresher.ops.dispatch import AUTO, TABLE, preferred, using
from thresher.ops.sparse_attend import kernel_over_fp8
from thresher.ops.to_slots import slots_of
from thresher.selectors.base import Selector
from thresher.types import IndexKeys, IndexQuery, PartialAttention, Selection

THETA, STYLE = 1e4, "interleaved"  # of RoPE, as in V3.2
# op -> kinds of case it is timed on; the first op of a kind is its default.
OPS = {
    "layer": ("layer",),
    "store": ("layer",),
    "select": ("prefill", "decode", "layer"),
    "to_slots": ("layer",),
    "index_score": ("prefill", "decode"),
    "select_topk": ("prefill", "decode"),
    "keep_best": ("decode",),
    "sparse_attend_mla_fp8": ("mla-decode", "layer"),
    "sparse_attend_mla": ("mla-decode",),
}
# Ops that touch a few bytes of a layer's caches, and in every copy others: hundreds of copies share the caches.
SHARING = ("store", "to_slots", "sparse_attend_mla_fp8")


@dataclass(frozen=True)
class Work:
    """What one copy is made of; ``run`` does it once.

    Attributes:
        case: the case.
        op: a key of ``OPS``.
        selector: for "select" and for layers, else None.
        impl: of every operation inside.
        index: index inputs, None for an mla-decode.
        attend: attention inputs of layers, "sparse_attend_mla" and, over the FP8 cache, "sparse_attend_mla_fp8".
        tokens: of layers: what is quantised and stored.
        picked: of layers: the selection, for "to_slots".
        contiguous: a prefill's keys and ranges, for "index_score": ``(k, k_scales, starts, ends)``.
        scores: fp32 ``[Q, N]``, for "select_topk".
        proposed: for "keep_best": scores ``[R, Q, k]``, of tokens dealt out to ranks that propose all they hold, and their positions.
        ends: int64 ``[Q]``, how many of a row's scores count, where rows of "select_topk" differ in that.
        state: what a decoding step finds from the steps before it.
    """

    case: Case
    op: str
    selector: Selector | None
    impl: str
    index: Inputs | None
    attend: AttendInputs | None
    tokens: NewTokens | None
    picked: Selection | None
    contiguous: tuple[Tensor, Tensor, Tensor, Tensor] | None
    scores: Tensor | None
    proposed: tuple[Tensor, Tensor] | None
    ends: Tensor | None
    state: LayerState | None

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        if self.index is not None:
            return self.index.query.q.device
        assert self.attend is not None
        return self.attend.q.device

    def run(self) -> Any:
        """The timed run; a ``Selection``, scores, or a ``PartialAttention``."""
        with using(self.impl):
            return _RUNS[self.op](self)


def make_work(
    case: Case,
    op: str,
    selector: Selector | None,
    impl: str,
    inputs: str,
    seed: int,
    device: torch.device,
    recorded: Path | None = None,
    copy: int = 0,
    beside: Work | None = None,
) -> Work:
    """Make a copy's inputs.

    Args:
        case, op, selector, impl, inputs: as in ``Work`` and ``INPUTS``.
        seed, device, recorded, copy: as for ``make_inputs``.
        beside: for ops of ``SHARING`` another copy, whose index keys and latents this one takes as they lie, with a page table, queries and
            new tokens of its own; what it stores goes to other slots.

    Raises:
        ThresherError: an op that is not timed on this kind of case, and what ``make_inputs`` refuses.
    """
    check_op(case, op)
    check_inputs(case, inputs)
    needs_attention = case.kind in ("layer", "mla-decode")
    index: Inputs | None
    attend: AttendInputs | None
    if beside is not None:
        index, attend = _shared(beside)
    else:
        index = None if case.kind == "mla-decode" else make_inputs(case, inputs, seed, device, recorded, copy)
        attend = make_attend_inputs(case, seed, device, copy, op != "sparse_attend_mla") if needs_attention else None
    tokens = contiguous = scores = proposed = ends = state = picked = None
    if case.kind == "layer":
        assert index is not None
        assert attend is not None
        assert selector is not None
        tokens = make_new_tokens(case, index, seed, copy, 0 if beside is None else copy)
        with using(impl):
            index = Inputs(store_tokens(tokens, index, attend), index.keys)
            picked = selector.select_indices(index.query, index.keys, LayerState(0))
            attend = replace(attend, slots=_slots(picked, index))
    if index is not None and op == "index_score" and case.kind == "prefill":
        past = index.query.positions + 1
        contiguous = (*load_keys(index.keys, 0), torch.zeros_like(past), past)
    if index is not None and op == "keep_best":
        with using(impl):
            dealt = paged_index_score(index.query, index.keys)[:, : case.length].unflatten(1, (case.topk, -1)).permute(2, 0, 1).contiguous()
        proposed = dealt, torch.arange(case.topk, dtype=torch.int32, device=device).repeat(*dealt.shape[:2], 1)
    if index is not None and op == "select_topk":
        with using(impl):
            scores = paged_index_score(index.query, index.keys)
        ends = visible_counts(index.query, index.keys) if case.length is None else None
    if case.kind != "prefill" and op in ("select", "layer"):
        state = LayerState(0)
    return Work(case, op, selector, impl, index, attend, tokens, picked, contiguous, scores, proposed, ends, state)


def _shared(work: Work) -> tuple[Inputs, AttendInputs]:
    """A copy's inputs in the same caches: all else has memory of its own."""
    assert work.index is not None
    assert work.attend is not None
    query, keys = work.index.query, work.index.keys
    query = replace(query, positions=query.positions.clone(), requests=query.requests.clone())
    return Inputs(query, IndexKeys(keys.pages, keys.page_table.clone(), keys.lengths.clone())), work.attend


def check_op(case: Case, op: str) -> None:
    """Raise ``ThresherError`` unless ``op`` is timed on this kind of case."""
    fitting = [name for name, kinds in OPS.items() if case.kind in kinds and (case.ranks == 1 or name == "layer")]
    require(op in fitting, f"the op of a {case.kind} case must be one of {', '.join(fitting)}", repr(op), "choose another op or case")
    if op == "keep_best":
        ranks, rest = divmod(case.length or 0, case.topk)
        must = f"contexts of keep_best must be the {case.topk} candidates of each of several ranks"
        require(ranks > 1 and rest == 0, must, case.name, f"name one such as decode-1x{size_text(8 * case.topk)}")


def check_inputs(case: Case, name: str) -> None:
    """Raise ``ThresherError`` unless a case has inputs of this name; an attention has no scores to be cruel with."""
    names = ("normal",) if case.kind == "mla-decode" else INPUTS
    require(name in names, f"inputs of {case.name} must be one of {', '.join(names)}", repr(name), "choose other inputs")


def default_op(case: Case) -> str:
    """The whole job of a case: to select, to attend, or both."""
    return next(name for name, kinds in OPS.items() if case.kind in kinds)


def resolved(work: Work) -> str:
    """What the work's ``impl`` stands for: the implementations of the operations inside, joined by + where they differ."""
    if work.impl != AUTO:
        return work.impl
    if work.op == "sparse_attend_mla_fp8":  # the one row where shapes decide between two kernels
        assert work.attend is not None
        assert work.attend.slots is not None
        q, cache, slots = work.attend.q, work.attend.latents, work.attend.slots
        kernel = kernel_over_fp8(q, cache, slots, AUTO, q.device)
        return "reference" if kernel is None else kernel.__module__.rpartition(".")[2]
    return all_preferred(work.device)


def all_preferred(device: torch.device) -> str:
    """What "auto" stands for in a whole step, but for the attention."""
    return "+".join(sorted({preferred(operation, device) for operation in TABLE if operation != "sparse_attend_mla_fp8"}))


def _slots(picked: Selection, index: Inputs) -> Tensor:
    return slots_of(picked, index.keys.page_table, index.query.requests, index.keys.page_size)


def attend_picked(picked: Selection, index: Inputs, attend: AttendInputs) -> PartialAttention:
    """Attention to what was picked of these keys, in latents that share their page table."""
    return sparse_attend_mla_fp8(attend.q, attend.latents, _slots(picked, index), SCALE, early=picked.slots is None)


def store_tokens(tokens: NewTokens, index: Inputs, attend: AttendInputs) -> IndexQuery:
    """Quantises a layer's new tokens: key and latent into the caches, and the index query, which it returns."""
    return IndexQuery(*store_step(*store_arguments(tokens, index, attend)), index.query.positions, index.query.requests)


def store_arguments(tokens: NewTokens, index: Inputs, attend: AttendInputs) -> tuple[Any, ...]:
    """Those of ``ops.store_step``."""
    dim = tokens.key.shape[1]
    factor = (tokens.q.shape[1] * dim) ** -0.5
    return (
        index.keys.pages, attend.latents, tokens.slots, tokens.key, tokens.latent, tokens.rope, tokens.q, tokens.weights,
        index.query.positions, THETA, dim // 2, STYLE, factor,
    )  # fmt: skip


def _store(work: Work) -> IndexQuery:
    assert work.tokens is not None
    assert work.index is not None
    assert work.attend is not None
    return store_tokens(work.tokens, work.index, work.attend)


def _to_slots(work: Work) -> Tensor:
    assert work.picked is not None
    assert work.index is not None
    keys = work.index.keys
    return to_slots(work.picked.indices, keys.page_table, work.index.query.requests, keys.page_size)


def _select(work: Work) -> Selection:
    assert work.index is not None
    assert work.selector is not None
    return work.selector.select_indices(work.index.query, work.index.keys, work.state)


def _index_score(work: Work) -> Tensor:
    assert work.index is not None
    query = work.index.query
    if work.contiguous is None:
        return paged_index_score(query, work.index.keys, filled=False)  # as peers do: what a row does not see is left unwritten
    return index_score(query.q, query.weights, *work.contiguous)


def _select_topk(work: Work) -> Selection:
    assert work.scores is not None
    return select_topk(work.scores, work.case.topk, ends=work.ends, with_scores=False)


def _keep_best(work: Work) -> Selection:
    assert work.proposed is not None
    return keep_best(*work.proposed, 0, work.case.topk)


def _attend(work: Work) -> Any:
    assert work.attend is not None
    assert work.attend.slots is not None
    if work.op == "sparse_attend_mla_fp8":
        return sparse_attend_mla_fp8(work.attend.q, work.attend.latents, work.attend.slots, SCALE)
    return sparse_attend_mla(work.attend.q, work.attend.latents, work.attend.slots, SCALE)


def _layer(work: Work) -> Any:
    """A token's step through a layer's indexer and attention: quantise and store it, select, attend."""
    assert work.attend is not None
    assert work.index is not None
    index = Inputs(_store(work), work.index.keys)
    return attend_picked(_select(replace(work, index=index)), index, work.attend)


_RUNS: dict[str, Callable[[Work], Any]] = {
    "select": _select,
    "index_score": _index_score,
    "select_topk": _select_topk,
    "keep_best": _keep_best,
    "sparse_attend_mla_fp8": _attend,
    "sparse_attend_mla": _attend,
    "layer": _layer,
    "store": _store,
    "to_slots": _to_slots,
}
