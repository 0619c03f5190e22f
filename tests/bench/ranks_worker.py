"""One rank of ``test_ranks.py``: ``python -m tests.bench.ranks_worker TASK FOLDER``, with the environment that ``torchrun`` gives."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from thresher.bench import rank_steps, ranks
from thresher.bench.peers import PEERS
from thresher.bench.ranks import together
from thresher.bench.run import Settings, run_bench
from thresher.distributed.collectives import Collectives
from thresher.distributed.group import started
from thresher.errors import ThresherError
from thresher.ops import dispatch
from thresher.ops.select import vllm
from thresher.types import PartialAttention

from ..distributed.launch import as_a_rank
from ..ops.vendors import DeepGemm, FlashInfer, FlashMla, VllmOps

CPU = torch.device("cpu")
SMALL = "layer-2x256-h4-d32-k32"
PUBLIC = {name: dataclasses.replace(peer, modules={}) for name, peer in PEERS.items()}


def bench(group: Collectives, case: str, *peers: str, **options: Any) -> list[str]:
    """The lines that this rank writes, or what it is refused with."""
    lines: list[str] = []
    settings = Settings((f"{case}-r{group.ranks}",), device="cpu", repeats=2, peer=next(iter(peers), None), others=peers[1:], **options)
    try:
        run_bench(settings, lines.append, PUBLIC, group)
    except ThresherError as error:
        lines.append(str(error))
    return lines


def ours(group: Collectives, folder: Path) -> dict[str, list[str]]:
    """All that is right."""
    found = {"all": bench(group, SMALL, "exact", "replicated", out=folder / "all.jsonl")}
    if group.ranks == 2:
        found["still held"] = held_afterwards(group)
        found["hisa"] = bench(group, SMALL, "exact", "replicated", selector="hisa:block_size=8,num_blocks=8")
        found["misa"] = bench(group, SMALL, "idsa", selector="misa:block_size=8,active_heads=2", way="replicated")
        found["cruel"] = bench(group, "layer-2x256-h4-d32-k32-q2", "exact", inputs=("cruel",))
    return found


def held_afterwards(group: Collectives) -> list[str]:
    """Caches that are still there when a case is over, and one that failed; without help from the garbage collector."""
    made: list[weakref.ref] = []
    right = ranks.deal

    def deal(whole, placement, rank):
        held = right(whole, placement, rank)
        made.extend(weakref.ref(x) for x in (whole.attend.latents, held.attend.latents, held.index.keys.pages))
        return held

    gc.collect()
    gc.disable()
    with patch.object(ranks, "deal", deal):
        bench(group, SMALL, "exact", "replicated")
        with patch.object(rank_steps, "attend_merged", fail):
            bench(group, SMALL, "exact", "replicated")
    gc.enable()
    assert len(made) == 3 * (2 + 2)
    return [str(there().shape) for there in made if there() is not None]


def fail(*_: object) -> None:
    raise RuntimeError("out of memory\nat home")


def wrong(group: Collectives, folder: Path) -> dict[str, list[str]]:
    """What goes wrong on the last rank alone."""
    select, merged, deal, count = rank_steps._select, rank_steps.attend_merged, ranks.deal, iter(range(99))
    last = group.rank == group.ranks - 1

    def other_tokens(work, query):
        picked = select(work, query)
        rest = [[p for p in range(60) if p not in row][: picked.topk] for row in picked.indices.tolist()]
        return dataclasses.replace(picked, indices=torch.tensor(rest, dtype=torch.int32))

    def fewer_tokens(work, query):
        picked = select(work, query)
        return dataclasses.replace(picked, indices=picked.indices.clone().index_fill_(1, torch.tensor([0]), -1))

    def off(by):
        def attend(*given):
            part = merged(*given)
            return PartialAttention(part.out + by(), part.lse)

        return attend

    found = {}
    for name, where, what, ways in (
        ("other tokens", (rank_steps, "_select"), other_tokens, ()),
        ("other tokens of all", (rank_steps, "_select"), other_tokens, ("replicated",)),
        ("fewer tokens", (rank_steps, "_select"), fewer_tokens, ("exact",)),
        ("outputs", (rank_steps, "attend_merged"), off(lambda: 0.1), ()),
        ("twice", (rank_steps, "attend_merged"), off(lambda: 1e-6 * next(count)), ()),
        ("dealt", (ranks, "deal"), lambda whole, placement, rank: deal(whole, placement, 0), ()),
        ("inputs", (ranks, "deal"), fail, ()),
    ):
        with patch.object(*where, what) if last else ExitStack(), patch("thresher.bench.timing._samples", fail):
            found[name] = bench(group, SMALL, out=folder / "wrong.jsonl", way=next(iter(ways), None))
    found["write"] = bench(group, SMALL, out=folder)
    try:
        together(group, CPU, (lambda: fail()) if last else (lambda: None))
    except ThresherError as error:
        found["together"] = [str(error), str(together(group, CPU, lambda: group.rank))]
    return found


@contextmanager
def packages():
    """Stand-ins for other packages, on a CPU."""
    gemm, mla, ops = DeepGemm(), FlashMla(), VllmOps()
    with ExitStack() as stack:
        stack.callback(ops.close)
        stack.enter_context(patch.dict(sys.modules, {"deep_gemm": gemm, "flash_mla": mla, "flashinfer": FlashInfer()}))
        stack.enter_context(patch.object(dispatch, "absent", lambda module: None))
        stack.enter_context(patch.object(dispatch, "wrong_device", lambda impl, device: None))
        yield gemm, mla, ops


def public(group: Collectives, folder: Path) -> dict[str, Any]:
    """The public ways with stand-ins: contexts of which a rank holds more than it keeps, and fewer; then each package misused."""
    found: dict[str, Any] = {}
    last = group.rank == group.ranks - 1
    with packages() as (gemm, mla, ops):
        long, short, one = "layer-2x1500-h64-d32-k512", "layer-1x400-h64-d32-k512-q2", "layer-1x1100-h64-d32-k512"
        found["long"] = bench(group, long, "public_exact", "public_replicated", out=folder / "public.jsonl")
        schedules = len(gemm.schedules)
        found["short"] = bench(group, short, "public_exact", "public_replicated")
        found["schedules"] = len(gemm.schedules) - schedules
        attend = mla.flash_mla_with_kvcache
        if last:
            mla.flash_mla_with_kvcache = lambda q, *a, **k: attend(q.flip(2), *a, **k)
        found["attention"] = bench(group, one, "public_exact")
        mla.flash_mla_with_kvcache = attend
        score = gemm.fp8_paged_mqa_logits
        if last:
            gemm.fp8_paged_mqa_logits = lambda q, *a, **k: score(q.flip(2), *a, **k)
        found["logits"] = bench(group, one, "public_exact")
        gemm.fp8_paged_mqa_logits = score
        if group.rank == 0:  # whose choice holds for all
            ops.spoil.update(dict.fromkeys((vllm.COOPERATIVE, vllm.PERSISTENT), lambda out: out.fill_(0)))
        found["kernels"] = bench(group, one, "public_replicated", out=folder / "kernels.jsonl")
        if last:
            ops.spoil.update(dict.fromkeys(vllm.KERNELS, lambda out: out.fill_(0)))
        found["no kernel"] = bench(group, one, "public_exact")
    return found


def main(task: str, folder: str) -> None:
    torch.set_num_threads(1)
    with started("cpu", 60.0) as group:
        found = {"ours": ours, "wrong": wrong, "public": public}[task](group, Path(folder))
        (Path(folder) / f"{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    as_a_rank(main)
