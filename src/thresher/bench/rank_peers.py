"""A layer's step over ranks from public parts: DeepGEMM's logits, vLLM's top-k, FlashMLA, and NCCL, put together as an engine would.

New tokens are quantised and stored by our own operation, and positions become slots by our own, as in our ways: nothing public does as
much in a launch. All else is other packages' and PyTorch's. Outside the time is what ``peer_steps`` names, and buffers are there before.

``public_replicated``: the rank's own heads over the whole context; nothing is exchanged. ``public_exact``: queries are gathered beside the
local top-k, then its scores and positions; of a second top-k over all of them a rank keeps what it holds, attends to that with all heads,
and outputs, weighted by their share of the softmax, are added up over the ranks in bf16, each rank's own heads to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thresher.bench.cases import Case
from thresher.bench.check import sample_rows
from thresher.bench.inputs import SCALE
from thresher.bench.peer_steps import deep_gemm_vllm_fits, fastest_top_k, topk_differs
from thresher.bench.rank_steps import RankStep
from thresher.bench.ranks import RankWork, together
from thresher.bench.timing import Prepared, in_turns
from thresher.bench.work import store_tokens
from thresher.cache.index_keys import visible_counts
from thresher.ops import to_slots
from thresher.ops.dispatch import reason, using
from thresher.ops.index_score import deep_gemm
from thresher.ops.select import flashinfer, vllm
from thresher.ops.sparse_attend import flash_mla

FLASHINFER = "flashinfer"
# Their names from PyTorch 2.13 on, which warns of the others. All are asynchronous, and so on one stream, the queries' among them.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def public_replicated_fits(case: Case, op: str) -> str | None:
    """Why ``public_replicated`` cannot take a case, or None."""
    return deep_gemm_vllm_fits(case, op) or _attention_fits(case, case.attention_heads // case.ranks)


def public_exact_fits(case: Case, op: str) -> str | None:
    """Why ``public_exact`` cannot take a case, or None."""
    return deep_gemm_vllm_fits(case, op) or _attention_fits(case, case.attention_heads)


def _attention_fits(case: Case, heads: int) -> str | None:
    if case.attention_heads % case.ranks:
        return f"needs as many heads on each rank, and {case.attention_heads} are for {case.ranks}"
    if heads not in flash_mla.HEADS:
        return f"needs 64 or 128 heads a rank, not {heads}"
    return None if case.topk % flash_mla.DECODE_TILE == 0 else f"needs a multiple of {flash_mla.DECODE_TILE} slots, not {case.topk}"


def public_replicated_steps(works: Sequence[RankWork]) -> Prepared:
    """The steps of ``public_replicated``."""
    parts = [_Local.of(work) for work in works]
    kernel = _first_kernel(parts)
    steps = [RankStep(part.work, partial(part.best, kernel), partial(_replicated, part, kernel)) for part in parts]
    return Prepared(tuple(steps), kernel)


def public_exact_steps(works: Sequence[RankWork]) -> Prepared:
    """The steps of ``public_exact``."""
    parts = [_Local.of(work) for work in works]
    room = _Room.of(works[0])
    first = _first_kernel(parts)
    second = _second_kernel(parts[0], first, room)
    kernels = first, second
    steps = [RankStep(part.work, partial(_kept, part, kernels, room), partial(_exact, part, kernels, room)) for part in parts]
    return Prepared(tuple(steps), f"{first}, then {second}")


@dataclass(frozen=True)
class _Local:
    """One copy of what a rank scores and attends to, as the packages want it.

    Attributes:
        work: whose tokens.
        paged: for DeepGEMM; query and weights are replaced by those of the step.
        lengths: int32 ``[Q]``, keys that each query sees here.
        longest: the largest of them.
        full: whether every query sees as many as are kept.
        buffers: for vLLM.
        schedule: for FlashMLA.
    """

    work: RankWork
    paged: deep_gemm.PagedInputs
    lengths: Tensor
    longest: int
    full: bool
    buffers: vllm.Buffers
    schedule: Any

    @classmethod
    def of(cls, work: RankWork) -> _Local:
        held, topk = work.held, work.case.topk
        query, keys = held.local(held.index.query), held.index.keys
        lengths = visible_counts(query, keys).int()
        longest = max(int(lengths.max()), 1)
        buffers = vllm.make_buffers(query.num_queries, topk, lengths.device)
        paged = deep_gemm.paged_inputs(query, keys, longest)
        return cls(work, paged, lengths, longest, int(lengths.min()) >= topk, buffers, flash_mla.load().get_mla_metadata()[0])

    def logits(self) -> Tensor:
        """Stores the new tokens; fp32 ``[Q, longest]``, of which the first ``lengths`` of a row count."""
        held = self.work.held
        with using(self.work.impl):
            query = store_tokens(held.tokens, held.index, held.attend)
        return deep_gemm.paged_logits(self.paged._replace(q=query.q[:, None], weights=query.weights))

    def best(self, kernel: str) -> Tensor:
        """int32 ``[Q, k]``: positions of the largest logits, -1 where there are fewer."""
        return self.top_k(kernel, self.logits())

    def top_k(self, kernel: str, logits: Tensor) -> Tensor:
        """The second half of ``best``."""
        return vllm.top_k(kernel, logits, self.lengths, self.buffers, self.longest)

    def attend(self, q: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Over these positions, -1 for none: out bf16 ``[Q, heads, 512]`` and lse fp32 ``[Q, heads]``, +inf for an empty row."""
        keys, requests = self.work.held.index.keys, self.work.held.index.query.requests
        with using(self.work.impl):
            slots = to_slots(positions, keys.page_table, requests, keys.page_size)
        inputs = flash_mla.DecodeInputs(q[:, None], self.work.held.attend.latents, slots[:, None], self.schedule)
        out, lse = flash_mla.decode(inputs, SCALE)
        return out[:, 0], lse[:, :, 0]


@dataclass(frozen=True)
class _Room:
    """What the exchanges of a step fill, one for all copies; Q queries, N heads, ``own`` of them here.

    Attributes:
        rank: int32, this one.
        q: bf16 ``[R, Q, own, 576]``.
        sent: int32 ``[2, Q, k]``: the bits of scores, and positions; ``came``: ``[R, 2, Q, k]``, everyone's.
        widths: int32 ``[Q]``, R * k; ``offsets``: zeros.
        buffers: for vLLM.
        lse: fp32 ``[Q, N]``; ``lses``: ``[R, Q, N]``, everyone's.
        parts: bf16 ``[R, Q, own, 512]``, outputs by the rank they go to; ``out``: ``[Q, own, 512]``.
    """

    rank: Tensor
    q: Tensor
    sent: Tensor
    came: Tensor
    widths: Tensor
    offsets: Tensor
    buffers: vllm.Buffers
    lse: Tensor
    lses: Tensor
    parts: Tensor
    out: Tensor

    @classmethod
    def of(cls, work: RankWork) -> _Room:
        q, topk, ranks = work.held.attend.q, work.case.topk, work.ranks.ranks
        num, own = q.shape[:2]
        made = partial(torch.empty, device=q.device)
        values = {"dtype": torch.bfloat16}
        return cls(
            rank=torch.tensor(work.ranks.rank, dtype=torch.int32, device=q.device),
            q=made(ranks, *q.shape, **values),
            sent=made(2, num, topk, dtype=torch.int32),
            came=made(ranks, 2, num, topk, dtype=torch.int32),
            widths=torch.full((num,), ranks * topk, dtype=torch.int32, device=q.device),
            offsets=torch.zeros(num, dtype=torch.int32, device=q.device),
            buffers=vllm.make_buffers(num, topk, q.device),
            lse=made(num, ranks * own, dtype=torch.float32),
            lses=made(ranks, num, ranks * own, dtype=torch.float32),
            parts=made(ranks, num, own, 512, **values),
            out=made(num, own, 512, **values),
        )

    def top_k(self, kernel: str, scores: Tensor) -> Tensor:
        """int32 ``[Q, k]``: columns of the largest of ``scores [Q, R * k]``."""
        topk = self.sent.shape[2]
        if kernel == FLASHINFER:
            return flashinfer.top_k(flashinfer.Inputs(scores, self.offsets, self.widths), topk)
        return vllm.top_k(kernel, scores, self.widths, self.buffers, scores.shape[1])


def _replicated(part: _Local, kernel: str) -> Tensor:
    return part.attend(part.work.held.attend.q, part.best(kernel))[0]


def _exact(part: _Local, kernels: tuple[str, str], room: _Room) -> Tensor:
    """bf16 ``[Q, own, 512]``."""
    ranks, num, own, dim = room.q.shape
    under_way = _all_gather(room.q.view(-1), part.work.held.attend.q.view(-1), async_op=True)
    kept = _kept(part, kernels, room)
    under_way.wait()
    out, lse = part.attend(room.q.transpose(0, 1).reshape(num, ranks * own, dim), kept)
    torch.nan_to_num(lse, nan=torch.nan, posinf=-torch.inf, out=room.lse)
    _all_gather(room.lses.view(-1), room.lse.view(-1), async_op=True).wait()
    share = room.lses.softmax(0)[part.work.ranks.rank]
    by_rank = (x.view(num, ranks, own, -1).transpose(0, 1) for x in (out, share))
    torch.mul(*by_rank, out=room.parts)
    _reduce_scatter(room.out.view(-1), room.parts.view(-1), async_op=True).wait()
    return room.out


def _kept(part: _Local, kernels: tuple[str, str], room: _Room) -> Tensor:
    """int32 ``[Q, k]``: positions here of what the rank holds of the best of all ranks, -1 in place of the others'."""
    scores, positions = _exchanged(part, kernels[0], room)
    ranks, rank = part.work.ranks.ranks, part.work.ranks.rank
    chosen = positions.gather(1, room.top_k(kernels[1], scores).long())
    return chosen.div(ranks, rounding_mode="floor").masked_fill_(chosen % ranks != rank, -1)


def _exchanged(part: _Local, kernel: str, room: _Room) -> tuple[Tensor, Tensor]:
    """Scores fp32 and logical positions int32 ``[Q, R * k]`` of what every rank proposes. Where one has nothing to, the score is -inf, and
    the position so negative that on its rank it is -1 again."""
    logits = part.logits()
    columns = part.top_k(kernel, logits)
    scores, positions = room.sent[0].view(torch.float32), room.sent[1]
    torch.gather(logits, 1, (columns if part.full else columns.clamp(min=0)).long(), out=scores)
    if not part.full:
        scores.masked_fill_(columns < 0, -torch.inf)
    torch.add(room.rank, columns, alpha=part.work.ranks.ranks, out=positions)
    _all_gather(room.came.view(-1), room.sent.view(-1), async_op=True).wait()
    every = room.came.permute(1, 2, 0, 3).flatten(2)
    return every[0].view(torch.float32), every[1]


def _first_kernel(parts: Sequence[_Local]) -> str:
    """The better of vLLM's for the logits of these copies; of all ranks the one that rank 0 finds to be."""
    work, logits = parts[0].work, parts[0].logits()
    rows = sample_rows(work.case.rows).to(logits.device)
    seen = torch.arange(logits.shape[1], device=logits.device) < parts[0].lengths[rows, None]
    given = logits[rows].masked_fill(~seen, -torch.inf).cpu()
    steps = {kernel: [partial(part.best, kernel) for part in parts] for kernel in vllm.fitting(logits, work.case.topk)}
    return _of_rank_0(work, steps, rows, given)


def _second_kernel(part: _Local, first: str, room: _Room) -> str:
    """Likewise for what is exchanged; FlashInfer's too where it can run."""
    scores, _ = _exchanged(part, first, room)
    rows = sample_rows(part.work.case.rows).to(scores.device)
    kernels = list(vllm.fitting(scores, part.work.case.topk))
    if reason("select_topk", FLASHINFER, scores.device) is None:
        kernels.append(FLASHINFER)
    steps = {kernel: in_turns([partial(room.top_k, kernel, scores)]) for kernel in kernels}
    return _of_rank_0(part.work, steps, rows, scores[rows].cpu())


def _of_rank_0(work: RankWork, steps: Mapping[str, Sequence[Callable[[], Tensor]]], rows: Tensor, scores: Tensor) -> str:
    """The fastest of the kernels that find the largest ``scores`` of these rows; what is -inf may be among them where nothing is left."""

    def differs(columns: Tensor) -> str | None:
        picked = columns[rows].cpu()
        none = scores.gather(1, picked.clamp(0, scores.shape[1] - 1).long()) == -torch.inf
        return topk_differs(picked.masked_fill(none, -1).tolist(), scores, work.case.topk)

    device, names = rows.device, (*vllm.KERNELS, FLASHINFER)
    mine = together(work.ranks, device, partial(fastest_top_k, work.way, steps, differs, device))
    return names[int(work.ranks.gather(torch.tensor([names.index(mine)], device=device))[0])]
