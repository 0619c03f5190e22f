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
from thresher.bench.cases import parse_case
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
MANY = "layer-6x256-h4-d32-k32"  # more rows than the reference looks at
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
        found["shared"] = not_shared(group)
        found["hisa"] = bench(group, SMALL, "exact", "replicated", selector="hisa:block_size=8,num_blocks=8")
        found["misa"] = bench(group, SMALL, "idsa", selector="misa:block_size=8,active_heads=2", way="replicated")
        found["cruel"] = bench(group, "layer-2x256-h4-d32-k32-q2", "exact", inputs=("cruel",))
        with patch("thresher.bench.timing._samples", fail):
            found["checked"] = bench(group, SMALL, "exact", out=folder / "checked.jsonl", check_only=True)
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


def not_shared(group: Collectives) -> list[str]:
    """What of a shared context is not as the rank would draw it, before and after each rank writes to the same place of its own."""
    given = parse_case(f"{SMALL}-r{group.ranks}"), "auto", "normal", 0, CPU, group
    whole, want = ranks.share_whole(*given, copy=1), ranks.make_whole(*given, copy=1)
    odd = []
    for _ in range(2):
        mine, theirs = ((x.index.keys.pages, x.attend.latents, x.attend.q, x.tokens.q, x.positions) for x in (whole, want))
        odd += [str(at) for at, (one, other) in enumerate(zip(mine, theirs, strict=True)) if not torch.equal(one, other)]
        for held in (whole, want):
            held.attend.latents[0, 0, 0, :4] = 7 + group.rank
        group.gather(torch.zeros(1))
    return odd


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("out of memory\nat home")


def wrong(group: Collectives, folder: Path) -> dict[str, list[str]]:
    """What goes wrong on the last rank alone."""
    select, merged, deal, count = rank_steps._select, rank_steps.attend_merged, ranks.deal, iter(range(99))
    last = group.rank == group.ranks - 1

    def other_tokens(work, query):
        picked = select(work, query)
        rest = [[p for p in range(60) if p not in row][: picked.topk] for row in picked.indices.tolist()]
        return dataclasses.replace(picked, indices=torch.tensor(rest, dtype=torch.int32))

    def other_tokens_of_a_row(work, query):
        """One that the reference does not look at."""
        picked, other = select(work, query), other_tokens(work, query)
        at = torch.arange(len(picked.indices))[:, None] == 1
        return dataclasses.replace(picked, indices=torch.where(at, other.indices, picked.indices))

    def another_tie(work, query):
        """In the place of a token kept another one of its score."""
        picked, held = select(work, query), work.held
        proposed = rank_steps.selector_here(work).select(held.local(query), held.index.keys)
        rows = []
        for kept, candidates, scores in zip(*(x.tolist() for x in (picked.indices, proposed.indices, proposed.scores)), strict=True):
            score = dict(zip(candidates, scores, strict=True))
            own = [p for p in kept if p >= 0]
            tie = next(p for p in candidates if p not in own and score[p] == score[own[-1]])
            rows.append([*sorted([*own[:-1], tie]), *kept[len(own) :]])
        return dataclasses.replace(picked, indices=torch.tensor(rows, dtype=torch.int32))

    def fewer_tokens(work, query):
        picked = select(work, query)
        return dataclasses.replace(picked, indices=picked.indices.clone().index_fill_(1, torch.tensor([0]), -1))

    def off(by):
        def attend(*given):
            part = merged(*given)
            return PartialAttention(part.out + by(), part.lse)

        return attend

    found = {}
    for name, where, what, options in (
        ("other tokens", (rank_steps, "_select"), other_tokens, {}),
        ("other tokens of all", (rank_steps, "_select"), other_tokens, {"way": "replicated"}),
        ("another row", (rank_steps, "_select"), other_tokens_of_a_row, {"case": MANY}),
        ("another tie", (rank_steps, "_select"), another_tie, {"way": "exact", "inputs": ("cruel-plateaus",)}),
        ("fewer tokens", (rank_steps, "_select"), fewer_tokens, {"way": "exact"}),
        ("outputs", (rank_steps, "attend_merged"), off(lambda: 0.1), {}),
        ("twice", (rank_steps, "attend_merged"), off(lambda: 1e-6 * next(count)), {}),
        ("dealt", (ranks, "deal"), lambda whole, placement, rank: deal(whole, placement, 0), {}),
        ("inputs", (ranks, "deal"), fail, {}),
        ("drawn", (ranks, "_map"), fail, {}),
    ):
        with patch.object(*where, what) if last else ExitStack(), patch("thresher.bench.timing._samples", fail):
            found[name] = bench(group, **{"case": SMALL, "out": folder / "wrong.jsonl", **options})
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
