"""One rank of ``test_ranks.py``: ``python -m tests.distributed.worker TASK FOLDER``, with the environment that ``torchrun`` gives."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from thresher.distributed import IDSA, ExactMerge, Replicated, local_attention, run
from thresher.distributed.collectives import Collectives, own_heads, rounded, share_heads
from thresher.distributed.group import agree, started
from thresher.distributed.ranks import run_on_rank
from thresher.errors import ThresherError
from thresher.models.decoder import Decoder
from thresher.ops.merge import merge
from thresher.selectors import DSA, HISA, MISA, Dense, Oracle
from thresher.types import PartialAttention

from ..models.tiny import CONFIG, tiny_indexers, tiny_model, tokens
from .cases import ATTN_HEADS, KV_HEADS, Layer
from .launch import as_a_rank

LENGTHS = [3, 0, 61, 140, 1]


def methods(ranks: int) -> list:
    over = [IDSA(selector, ranks) for selector in (DSA(12), MISA(2, 8, 12), HISA(4, 8, 12), Oracle(12), Dense())]
    over += [ExactMerge(selector, ranks) for selector in (DSA(12), HISA(4, 8, 12), Dense())]
    over += [Replicated(selector, ranks) for selector in (DSA(12), MISA(2, 8, 12), Oracle(12))]
    return [*over, IDSA(DSA(12), ranks, 12, 4), ExactMerge(DSA(200), ranks, 3)]


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y)


def steps(ranks: Collectives) -> list[str]:
    """What differs from one process that simulates all ranks; every rank makes the same layer."""
    wrong = []
    for lengths in (LENGTHS, [1], [0, 2]):
        for over in methods(ranks.ranks):
            layer = Layer(lengths, queries=12, coarse=True)
            shards = layer.shards(over.placement)
            want, _ = run(over, layer.query, shards, layer.attention)
            sets = over.local_sets(layer.query, shards, layer.attention)
            attention = local_attention(layer.attention, over.placement, ranks.rank)
            shares = [ATTN_HEADS // KV_HEADS * share for share in share_heads(KV_HEADS, ranks.ranks)]
            got, picked = run_on_rank(over, layer.query, shards[ranks.rank], ranks, shares, attention)
            alike = same(got.out, want.out), same(got.lse, want.lse), same(picked.indices, sets[ranks.rank].indices)
            if not all(alike):
                wrong.append(f"{over} of {lengths}: output, lse, set {alike}")
    return wrong


def exchanges(ranks: Collectives) -> list[str]:
    made = torch.Generator().manual_seed(0)
    wrong = []
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.bool):
        for shape in ((5, 3), (), (0, 4)):
            every = [(torch.randn(shape, generator=made) * 9).to(dtype) for _ in range(ranks.ranks)]
            got = ranks.gather(every[ranks.rank])
            if not same(got.view(ranks.ranks, -1).float(), torch.stack(every).float().view(ranks.ranks, -1)) or got.dtype != dtype:
                wrong.append(f"gather {dtype} {shape}")
    for heads in (ranks.ranks, 7, 1):
        shares = share_heads(heads, ranks.ranks)
        own = own_heads(shares, ranks.rank)
        q = torch.randn(4, heads, 6, generator=made)
        if not same(ranks.gather_heads(q[:, own], shares), q):
            wrong.append(f"gather_heads {heads}")
        outs, lses = torch.randn(ranks.ranks, 4, heads, 6, generator=made), torch.randn(ranks.ranks, 4, heads, generator=made)
        parts = [PartialAttention(*both) for both in zip(outs, lses, strict=True)]
        parts[-1].lse[1:3] = -torch.inf  # a rank that had nothing
        want, whole = merge(parts), ranks.merge(parts[ranks.rank])
        if not (same(whole.out, want.out) and same(whole.lse, want.lse)):
            wrong.append(f"merge {heads}")
        mine, want = ranks.merge_heads(parts[ranks.rank], shares), merge([rounded(part) for part in parts])
        if not (same(mine.out, want.out[:, own]) and same(mine.lse, want.lse[:, own])):
            wrong.append(f"merge_heads {heads}")
    return wrong


def decoding(ranks: Collectives) -> list[str]:
    """Logits after a prefill, steps, a rollback and steps again, and what is held, beside one process that simulates the ranks."""
    model, indexers, ids, wrong = tiny_model(), tiny_indexers(), tokens(130), []
    selectors = [DSA(20), MISA(2, 8, 20), HISA(4, 8, 20), Dense(), Oracle(20)]
    for kind in (IDSA, ExactMerge, Replicated):
        for selector in selectors:
            if kind is ExactMerge and isinstance(selector, MISA):
                continue
            plan = [kind(selector, ranks.ranks)] * CONFIG.num_hidden_layers
            runs = [Decoder(model, indexers, plan[0].placement, 200, group) for group in (None, ranks)]
            for turn in ("prefill", (100, 104), (104, 105), 102, (102, 110)):
                if turn == "prefill":
                    want, got = (decoder.prefill(ids[:100]) for decoder in runs)
                elif isinstance(turn, int):
                    want, got = (decoder.rollback(turn) or torch.zeros(1) for decoder in runs)
                else:
                    want, got = (decoder.step(ids[slice(*turn)], plan) for decoder in runs)
                if not same(got, want):
                    wrong.append(f"{plan[0]} at {turn}")
            held = [decoder.layers[0][at].table.length(0) for decoder, at in zip(runs, (ranks.rank, 0), strict=True)]
            if held[0] != held[1] or (kind is not Replicated and held[1] > -(-110 // ranks.ranks)):
                wrong.append(f"{plan[0]} holds {held}")
    return wrong


def disagree(ranks: Collectives) -> str:
    agree(ranks, {"k": 512, "m": "300"})
    try:
        agree(ranks, {"k": 512, "m": 300 + (ranks.rank == ranks.ranks - 1), "length": 9})
    except ThresherError as error:
        return str(error)
    return "agreed"


def lose_one(ranks: Collectives, how: str) -> None:
    """The last rank is gone, or hangs, while the others wait for it."""
    ranks.gather(torch.zeros(2))
    if ranks.rank == ranks.ranks - 1:
        if how == "dies":
            os._exit(9)
        time.sleep(600)
    ranks.gather(torch.zeros(2))


def main(task: str, folder: str) -> None:
    torch.set_num_threads(1)
    with started("cpu", 4.0 if task in ("dies", "hangs") else 60.0) as ranks:
        if task in ("dies", "hangs"):
            lose_one(ranks, task)
        with torch.inference_mode():
            found = disagree(ranks) if task == "disagree" else steps(ranks) + exchanges(ranks) + decoding(ranks)
        (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    as_a_rank(main)
