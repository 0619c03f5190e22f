"""One rank of ``test_two_gpus.py``: ``python -m tests.gpu.two_gpus TASK FOLDER``, with the environment that ``torchrun`` gives."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from thresher.cache.scratch import Scratch
from thresher.distributed.collectives import Collectives, ProcessGroup, own_heads, rounded, share_heads
from thresher.distributed.group import started
from thresher.distributed.symmetric import SymmetricMemory
from thresher.ops.merge import merge
from thresher.ops.score_select import score_select
from thresher.types import IndexKeys, IndexQuery, PartialAttention

from ..distributed.launch import as_a_rank
from .test_score_select import world

REPEATS = 20


def part_of(made: torch.Generator, num: int, heads: int, dim: int) -> PartialAttention:
    out, lse = torch.randn(num, heads, dim, generator=made), torch.randn(num, heads, generator=made) * 5
    lse[torch.rand(num, heads, generator=made) < 0.1] = -torch.inf  # empty, and what they hold is no number
    out[lse == -torch.inf] = torch.nan
    return PartialAttention(out.cuda(), lse.cuda())


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)


def exchanges(ranks: Collectives) -> list[str]:
    """What differs from what each rank computes from all ranks' inputs, which it makes itself."""
    made, wrong, R = torch.Generator().manual_seed(1), [], ranks.ranks
    for shape in ((1, 64, 576), (32, 64, 576), (3, 5, 7), (1,), (0, 4), (1000, 1001)):
        for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn):
            every = torch.randn(R, *shape, generator=made).to(dtype).cuda()
            if not same(ranks.gather(every[ranks.rank]).float(), every.float()):
                wrong.append(f"gather {dtype} {shape}")
    for num, heads, dim in ((1, 128, 512), (32, 128, 512), (128, 64, 512), (5, 7, 64), (2, 1, 16)):
        for _ in range(REPEATS):
            parts = [part_of(made, num, heads, dim) for _ in range(R)]
            want = merge([PartialAttention(part.out.nan_to_num(0.0), part.lse) for part in parts])
            shares = share_heads(heads, R)
            own = own_heads(shares, ranks.rank)
            whole, mine = ranks.merge(parts[ranks.rank]), ranks.merge_heads(parts[ranks.rank], shares)
            if not (same(whole.out, want.out) and same(whole.lse, want.lse)):
                wrong.append(f"merge {num} {heads} {dim}: {(whole.out - want.out).abs().max():.1e}")
            want = merge([rounded(PartialAttention(part.out.nan_to_num(0.0), part.lse)) for part in parts])
            if not (same(mine.out, want.out[:, own]) and same(mine.lse, want.lse[:, own])):
                wrong.append(f"merge_heads {num} {heads} {dim}")
            q = torch.randn(num, heads, dim, generator=made).bfloat16().cuda()
            if not same(ranks.gather_heads(q[:, own], shares), q):
                wrong.append(f"gather_heads {num} {heads} {dim}")
    return wrong


def recorded(job: Callable[[], Any], times: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a job, so many times, and what the last of them gives."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        job()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            given = job()
    return graph, given


def in_a_graph(ranks: Collectives) -> list[str]:
    """Replayed with other numbers, ranks apart in time."""
    made, wrong, shares = torch.Generator().manual_seed(2), [], share_heads(128, ranks.ranks)
    q = torch.zeros(4, shares[ranks.rank], 576, dtype=torch.bfloat16, device="cuda")
    part = PartialAttention(torch.zeros(4, 128, 512, device="cuda"), torch.zeros(4, 128, device="cuda"))

    def step() -> tuple[torch.Tensor, PartialAttention]:
        return ranks.gather_heads(q, shares), ranks.merge_heads(part, shares)

    graph, (gathered, merged) = recorded(step, 1)
    for turn in range(REPEATS):
        every = torch.randn(4, 128, 576, generator=made).bfloat16().cuda()
        parts = [part_of(made, 4, 128, 512) for _ in range(ranks.ranks)]
        own = own_heads(shares, ranks.rank)
        q.copy_(every[:, own])
        part.out.copy_(parts[ranks.rank].out), part.lse.copy_(parts[ranks.rank].lse)
        if turn % 3 == ranks.rank:
            torch.cuda._sleep(10**7)
        graph.replay()
        want = merge([rounded(PartialAttention(one.out.nan_to_num(0.0), one.lse)) for one in parts])
        if not (same(gathered, every) and same(merged.out, want.out[:, own]) and same(merged.lse, want.lse[:, own])):
            wrong.append(f"replay {turn}")
    return wrong


def times(ranks: Collectives) -> dict[str, float]:
    """us of an exchange, 16 in a graph, medians of 15."""
    took, shares = {}, share_heads(128, ranks.ranks)
    for num in (1, 8, 32):
        q = torch.randn(num, shares[ranks.rank], 576, device="cuda").bfloat16()
        part = part_of(torch.Generator().manual_seed(0), num, 128, 512)
        own = torch.empty(num, 128, 512, device="cuda")
        jobs = {"gather q": lambda q=q: ranks.gather_heads(q, shares), "merge": lambda part=part: ranks.merge_heads(part, shares)}
        jobs["copy"] = lambda part=part, own=own: own.copy_(part.out)
        for name, job in jobs.items():
            graph, _ = recorded(job, 16)
            samples = []
            for _ in range(15):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record(), graph.replay(), end.record()
                end.synchronize()
                samples.append(begin.elapsed_time(end) * 1000 / 16)
            took[f"{name} {num}"] = round(sorted(samples)[7], 2)
    return took


def asked(num: int) -> tuple[IndexQuery, IndexKeys]:
    return world("normal", [20000] * num, num, 64, 128)


def selecting(
    ranks: SymmetricMemory, q: torch.Tensor, shares: list[int], query: IndexQuery, keys: IndexKeys
) -> tuple[torch.Tensor, torch.Tensor]:
    """All ranks' queries and what is selected, by one launch."""
    scratch = Scratch()
    scratch.errand, received = ranks.sending(q, shares)
    picked = score_select(query, keys, 512, with_scores=False, impl="cuda", scratch=scratch)
    assert scratch.errand is None
    return received.heads(), picked.indices


def selections(ranks: SymmetricMemory) -> list[str]:
    """Ranks apart in time: nobody reads what has not come."""
    made, wrong, shares = torch.Generator().manual_seed(3), [], share_heads(128, ranks.ranks)
    for num in (1, 32):
        little, of, first = part_of(made, 1, 4, 16), asked(num), None
        for turn in range(REPEATS):
            q = torch.randn(num, 128, 576, generator=made).bfloat16().cuda()
            own = q[:, own_heads(shares, ranks.rank)].contiguous()
            if turn % 3 == ranks.rank:
                torch.cuda._sleep(10**7)
            got, picked = selecting(ranks, own, shares, *of)
            first = picked if first is None else first
            if not (same(got, q) and same(picked, first)):
                wrong.append(f"selection {num}, turn {turn}")
            ranks.merge(little)
    return wrong


def lose_one(ranks: Collectives, how: str) -> None:
    """The last rank is gone, or hangs, while the other waits for it."""
    ranks.gather(torch.zeros(2, device="cuda")).sum().item()
    if ranks.rank == ranks.ranks - 1:
        if how.startswith("dies"):
            os._exit(9)
        time.sleep(600)
    if how.endswith("selection"):
        selecting(ranks, torch.zeros(1, 64, 576, device="cuda", dtype=torch.bfloat16), [64, 64], *asked(1))
        torch.cuda.synchronize()
    ranks.gather(torch.zeros(2, device="cuda")).sum().item()


def main(task: str, folder: str) -> None:
    with started("cuda", 60.0 if task == "exchanges" else 5.0) as memory, torch.inference_mode():
        assert isinstance(memory, SymmetricMemory), "what is chosen here"
        if task != "exchanges":
            lose_one(ProcessGroup(timeout_s=5.0) if task.endswith("nccl") else memory, task)
        group = ProcessGroup(timeout_s=60.0)
        found = {"symmetric": exchanges(memory), "nccl": exchanges(group), "graph": in_a_graph(memory), "selections": selections(memory)}
        measured = {"symmetric": times(memory), "nccl": times(group)}
        (Path(folder) / f"{group.rank}.json").write_text(json.dumps([found, measured]))
        group.gather(torch.zeros(1, device="cuda"))


if __name__ == "__main__":
    as_a_rank(main)
