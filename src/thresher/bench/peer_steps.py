"""The steps of peers: other packages' kernels on our inputs, which are converted before and outside the time.

Outside are: int32 lengths and ranges, one row of the page table a query, contiguous keys for a prefill, workspaces, and the schedules of
DeepGEMM's paged kernel and of FlashMLA's decode kernel. Both schedules depend on a step's lengths and shapes alone; engines make them once
for all layers, so they are not part of a layer's time. Nor is what our own result holds beyond theirs: order, lengths, scores beside.

Before a peer is timed, some rows of its result are held against our own, so that a misused peer cannot look fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from thresher.bench.cases import Case
from thresher.bench.check import ODD_SHARE, attention_agrees, sample_rows, scores_agree
from thresher.bench.inputs import SCALE
from thresher.bench.timing import Prepared, Step, interleave
from thresher.bench.work import Work
from thresher.cache import load_keys
from thresher.cache.index_keys import visible_counts
from thresher.errors import ThresherError
from thresher.ops import paged_index_score
from thresher.ops.dispatch import AUTO, implementations, using
from thresher.ops.index_score import deep_gemm
from thresher.ops.select import flashinfer, vllm
from thresher.ops.sparse_attend import flash_mla
from thresher.types import PartialAttention

FP8 = torch.float8_e4m3fn
CHOICE_REPEATS = 10
# Kernels of two packages round differently: how far apart similar scores may be, and a score from the k-th, next to the row's largest.
PEER_SIMILARITY = 1e-4
PEER_SLACK = 1e-3


@dataclass(frozen=True)
class _Scores:
    """``run`` gives logits fp32 ``[Q, N]``, of which the first ``lengths[i]`` (int32) of row i count; ``longest`` is the largest length."""

    run: Callable[[], Tensor]
    lengths: Tensor
    longest: int


def deep_gemm_steps(works: Sequence[Work]) -> Prepared:
    """Logits alone: the ragged form for a prefill, the paged one for decoding."""
    scores = [_deep_gemm_scores(work) for work in works]
    rows = sample_rows(works[0].case.rows)
    want = _our_scores(works[0], rows)
    got = scores[0].run()[rows.to(want.device), : want.shape[1]]
    column = torch.arange(got.shape[1], device=got.device)
    got = got.masked_fill(column >= scores[0].lengths[rows.to(got.device), None], -torch.inf)
    _agree("deep_gemm", scores_agree(got.cpu(), want.cpu(), PEER_SIMILARITY))
    return Prepared(tuple(each.run for each in scores))


def deep_gemm_vllm_steps(works: Sequence[Work]) -> Prepared:
    """DeepGEMM's logits, then the fastest of vLLM's kernels: DSA's selection, as int32 in any order."""
    return _with_vllm("deep_gemm+vllm", works, [_deep_gemm_scores(work) for work in works])


def vllm_steps(works: Sequence[Work]) -> Prepared:
    """The fastest of vLLM's kernels on our scores."""
    return _with_vllm("vllm", works, [_given_scores(work) for work in works])


def flashinfer_steps(works: Sequence[Work]) -> Prepared:
    """FlashInfer's top-k on our scores in its fastest mode: unsorted, which of equal scores are kept left open."""
    steps = []
    for work in works:
        given = _given_scores(work)
        steps.append(partial(flashinfer.top_k, flashinfer.make_inputs(given.run(), given.lengths), work.case.topk))
    _agree("flashinfer", _selection_differs(works[0], steps[0]()))
    return Prepared(tuple(steps))


def flash_mla_steps(works: Sequence[Work]) -> Prepared:
    """FlashMLA's decode kernel over the FP8 cache; its prefill kernel where the latents are bf16."""
    steps: list[Step] = []
    for work in works:
        assert work.attend is not None
        assert work.attend.slots is not None
        q, latents, slots = work.attend.q, work.attend.latents, work.attend.slots
        if work.op == "sparse_attend_mla_fp8":
            steps.append(partial(flash_mla.decode, flash_mla.decode_inputs(q, latents, slots), SCALE))
        else:
            steps.append(partial(flash_mla.prefill, q.contiguous(), latents[:, None], slots[:, None].contiguous(), SCALE))
    _agree("flash_mla", _attention_differs(works[0], steps[0]))
    return Prepared(tuple(steps))


def deep_gemm_fits(case: Case, op: str) -> str | None:
    """Why DeepGEMM cannot take a case, or None."""
    return deep_gemm.unsupported(FP8, FP8, case.heads, case.head_dim, max(case.lengths(0)))


def deep_gemm_vllm_fits(case: Case, op: str) -> str | None:
    """Why DeepGEMM or vLLM cannot take a case, or None."""
    return deep_gemm_fits(case, op) or vllm_fits(case, op)


def vllm_fits(case: Case, op: str) -> str | None:
    """Why vLLM cannot take a case, or None."""
    return vllm.unsupported(case.rows, max(case.lengths(0)), case.topk)


def flashinfer_fits(case: Case, op: str) -> str | None:
    """Why FlashInfer cannot take a case, or None."""
    return flashinfer.unsupported(case.rows, max(case.lengths(0)), case.topk)


def flash_mla_fits(case: Case, op: str) -> str | None:
    """Why FlashMLA cannot take a case, or None."""
    tile = flash_mla.DECODE_TILE if op == "sparse_attend_mla_fp8" else flash_mla.PREFILL_TILE
    if case.attention_heads not in flash_mla.HEADS:
        return f"needs 64 or 128 heads, not {case.attention_heads}"
    return None if case.topk % tile == 0 else f"needs a multiple of {tile} slots a query, not {case.topk}"


def _deep_gemm_scores(work: Work) -> _Scores:
    assert work.index is not None
    query, keys = work.index.query, work.index.keys
    ends = visible_counts(query, keys)
    lengths, longest = ends.int(), int(ends.max())
    if work.case.kind == "prefill":
        ragged = deep_gemm.ragged_inputs(query.q, query.weights, *load_keys(keys, 0), torch.zeros_like(ends), ends)
        return _Scores(partial(deep_gemm.ragged_logits, ragged), lengths, longest)
    return _Scores(partial(deep_gemm.paged_logits, deep_gemm.paged_inputs(query, keys, longest)), lengths, longest)


def _given_scores(work: Work) -> _Scores:
    """The scores that ours is timed on, and how many of each row count."""
    assert work.scores is not None
    assert work.index is not None
    ends = visible_counts(work.index.query, work.index.keys)
    given = work.scores
    return _Scores(lambda: given, ends.int(), int(ends.max()))


def _with_vllm(name: str, works: Sequence[Work], scores: Sequence[_Scores]) -> Prepared:
    fitting = vllm.fitting(scores[0].run(), works[0].case.topk)
    steps = {kernel: [_vllm_step(kernel, work, each) for work, each in zip(works, scores, strict=True)] for kernel in fitting}
    kernel = fastest_top_k(name, steps, partial(_selection_differs, works[0]), works[0].device)
    return Prepared(tuple(steps[kernel]), kernel)


def fastest_top_k(
    name: str, steps: Mapping[str, Sequence[Callable[[], Tensor]]], differs: Callable[[Tensor], str | None], device: torch.device
) -> str:
    """Of kernels for DSA's sizes, or else of those that take a row a block, the fastest whose result agrees.

    Args:
        name: of the peer, for the message.
        steps: kernel -> its steps, one for each copy.
        differs: ``differs(columns)``: why the first step's result is wrong, or None.
        device: where they run.

    Raises:
        ThresherError: none agrees.
    """
    slow = (vllm.DECODE, vllm.PREFILL)
    wrong = []
    for group in ([kernel for kernel in steps if kernel not in slow], [kernel for kernel in steps if kernel in slow]):
        whys = {kernel: differs(steps[kernel][0]()) for kernel in group}
        wrong += [f"{kernel}: {why}" for kernel, why in whys.items() if why is not None]
        ways = {kernel: steps[kernel] for kernel, why in whys.items() if why is None}
        if ways:
            return _fastest(ways, device)
    _agree(name, "; ".join(wrong))
    raise AssertionError("some kernel always fits")


def _vllm_step(kernel: str, work: Work, scores: _Scores) -> Callable[[], Tensor]:
    buffers = vllm.make_buffers(work.case.rows, work.case.topk, scores.lengths.device)
    return lambda: vllm.top_k(kernel, scores.run(), scores.lengths, buffers, scores.longest)


def _fastest(ways: Mapping[str, Sequence[Step]], device: torch.device) -> str:
    if len(ways) == 1:
        return next(iter(ways))
    times = interleave(ways, device, CHOICE_REPEATS, "graph" if device.type == "cuda" else "clock")
    return min(times, key=lambda kernel: times[kernel].p50)


def _our_scores(work: Work, rows: Tensor) -> Tensor:
    """fp32 ``[rows, N]``, -inf out of sight: given, or by the implementation under test where it gives scores alone."""
    assert work.index is not None
    query = work.index.query.rows(rows.to(work.device))
    if work.scores is not None:
        return work.scores[rows.to(work.device)]
    with using(work.impl if work.impl in implementations("paged_index_score") else AUTO):
        return paged_index_score(query, work.index.keys)


def _selection_differs(work: Work, picked: Tensor) -> str | None:
    """Why a selection in any order is not the top-k of our scores, or None, in some rows."""
    rows = sample_rows(work.case.rows)
    return topk_differs(picked[rows.to(picked.device)].tolist(), _our_scores(work, rows).cpu(), work.case.topk)


def topk_differs(picked: Sequence[Sequence[int]], scores: Tensor, topk: int) -> str | None:
    """Why sets are not the top-k of their rows of ``scores [rows, N]``, or None. A token belongs to it when its score is that of the k-th,
    give or take ``PEER_SLACK``: then another package's rounding or order of ties may prefer it."""
    for row, (columns, mine) in enumerate(zip(picked, scores, strict=True)):
        kept = [column for column in columns if column >= 0]
        candidates = int((mine != -torch.inf).sum())
        want = min(topk, candidates)
        if len(set(kept)) != len(kept) or len(kept) != want or (kept and max(kept) >= len(mine)):
            return f"row {row}: {len(set(kept))} distinct tokens of {len(kept)}, not {want} below {len(mine)}"
        kth = mine.topk(want).values[-1] if want else 0.0
        slack = PEER_SLACK * float(mine[mine != -torch.inf].abs().max()) if want else 0.0
        odd = int((mine[kept] < kth - slack).sum())
        if odd > max(1, int(ODD_SHARE * want)):
            return f"row {row}: {odd} of {want} tokens are not among ours"
    return None


def _attention_differs(work: Work, step: Step) -> str | None:
    assert work.attend is not None
    assert work.attend.slots is not None
    result = step()
    assert isinstance(result, tuple)
    out, lse = result
    if work.op == "sparse_attend_mla_fp8":
        out, lse = out[:, 0], lse[:, :, 0]
    part = flash_mla.to_part(out, lse)
    rows = sample_rows(work.case.rows)
    here = rows.to(out.device)
    return attention_agrees(work.attend, PartialAttention(part.out[here].cpu(), part.lse[here].cpu()), rows, work.attend.slots[here])


def _agree(name: str, why: str | None) -> None:
    if why:
        raise ThresherError(f"peer {name} must give our result; got: {why}; no time is taken of a peer that is used wrongly")
