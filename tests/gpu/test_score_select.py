"""Score and select in one: the sets, order and scores of the two steps, bit for bit."""

from __future__ import annotations

import importlib

import pytest
import torch

from thresher.types import IndexKeys, IndexQuery

from .compare import differ, fail_on
from .draw import generator, queries, vectors
from .machine import DEVICE, INTERPRET

fused = importlib.import_module("thresher.ops.score_select.triton")
scores_of = importlib.import_module("thresher.ops.index_score.triton")
select = importlib.import_module("thresher.ops.select.triton")
pytestmark = pytest.mark.skipif(INTERPRET, reason="Gluon kernels cannot be interpreted")


def world(kind: str, lengths: list[int], num: int, heads: int, dim: int) -> tuple[IndexQuery, IndexKeys]:
    """Shuffled pages; ``kind`` says what the keys are like."""
    total = sum(-(-n // 64) for n in lengths)
    order = torch.randperm(total, generator=generator(7))
    table = torch.full((len(lengths), max(-(-n // 64) for n in lengths)), -1, dtype=torch.int32)
    pages = torch.zeros(total, 64, 1, dim + 4, dtype=torch.uint8)
    q, weights = queries(num, heads, dim, seed=1)
    at = 0
    for request, length in enumerate(lengths):
        k, scales = (x.cpu() for x in vectors(length, dim, seed=100 + request))
        if kind == "plateaus":
            few = torch.arange(length) // 3 % 7
            k, scales = k.view(torch.uint8)[few].view(k.dtype), scales[few]
        if kind in ("ascending", "descending"):
            k = k.view(torch.uint8)[:1].expand(length, -1).contiguous().view(k.dtype)
            scales = torch.exp2((torch.arange(length) // 997 - 15).float())
            scales = scales.flip(0) if kind == "descending" else scales
        held = -(-length // 64)
        table[request, :held] = order[at : at + held].int()
        for page in range(held):
            part = slice(page * 64, min(page * 64 + 64, length))
            size = part.stop - part.start
            flat = pages[order[at + page]].view(-1)
            flat[: size * dim] = k[part].view(torch.uint8).flatten()
            flat[64 * dim : 64 * dim + 4 * size] = scales[part].view(torch.uint8).flatten()
        at += held
    requests = torch.randint(0, len(lengths), (num,), generator=generator(3))
    requests = requests.sort().values if kind == "sorted" else requests
    positions = torch.tensor(lengths)[requests] - 1 - torch.arange(num) % 300
    keys = IndexKeys(pages.to(DEVICE), table.to(DEVICE), torch.tensor(lengths, device=DEVICE))
    if kind == "signs":
        weights = weights.abs()
    return IndexQuery(q, weights, positions.clamp(min=-1).to(DEVICE), requests.to(DEVICE)), keys


@pytest.mark.parametrize(
    ("kind", "lengths", "num", "heads", "dim", "topk"),
    [
        ("normal", [40000], 201, 64, 128, 2048),
        ("sorted", [33000, 9000, 70], 128, 64, 128, 512),
        ("mixed", [20011, 900, 12000], 77, 32, 128, 2048),
        ("plateaus", [30000], 64, 64, 128, 2048),
        ("plateaus", [30000], 64, 24, 64, 100),
        ("ascending", [30000], 64, 32, 128, 2048),
        ("descending", [30000], 64, 64, 64, 2048),
        ("signs", [8000, 100], 300, 40, 128, 2048),
        ("normal", [70000], 203, 8, 128, 2048),
        ("mixed", [40011, 900, 33000, 65], 150, 5, 128, 512),
        ("sorted", [33000, 9000, 70], 128, 16, 128, 2048),
        ("plateaus", [30000], 64, 8, 64, 2048),
        ("plateaus", [33000, 20000], 90, 16, 128, 100),
        ("ascending", [30000], 64, 16, 64, 2048),
        ("descending", [50000], 64, 1, 128, 2048),
        ("signs", [8000, 100], 300, 12, 128, 2048),
        ("normal", [70000], 1024, 8, 128, 2048),
    ],
)
def test_it_is_the_two_steps(kind, lengths, num, heads, dim, topk, record_property):
    query, keys = world(kind, lengths, num, heads, dim)
    first, redo = fused.first_try(query, keys, topk)
    got = fused.score_select(query, keys, topk)
    want = select.select_topk(scores_of.paged_index_score(query, keys), topk)
    record_property("measured", f"score_select {kind} {lengths} h{heads}: {int(redo.sum())} of {num} rows done again")
    settled = redo == 0
    fail_on(
        [
            differ("indices", got.indices, want.indices),
            differ("lengths", got.lengths, want.lengths),
            differ("scores", got.scores, want.scores),
            differ("settled at once", first.indices[settled], want.indices[settled]),
        ]
    )
    assert kind in ("plateaus", "ascending", "descending") or redo.sum() <= num // 50, "rows done again"
    for _ in range(20):
        again, redone = fused.first_try(query, keys, topk, with_scores=False)
        fail_on([differ("again", again.indices, first.indices), differ("rows", redone, redo)])
