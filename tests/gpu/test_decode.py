"""Thousands of steps of decoding with a state: after each the sets are those of a prefill of the same tokens, bit for bit.

Requests of mixed lengths grow by one token or by a few drafts, of which some are rejected; they end, and others take their rows and pages.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from thresher.bench.check import BITS, score_bound, selections_agree
from thresher.cache import IndexKeyCache, LayerState, PageTable
from thresher.ops.dispatch import using
from thresher.selectors import DSA, HISA, MISA, MISARerank
from thresher.selectors.base import Selector
from thresher.types import IndexKeys, IndexQuery, Selection

from .compare import differ_all, fail_on
from .draw import on_cpu, queries, vectors
from .machine import DEVICE, INTERPRET, sized

STEPS, EVERY = sized((4096, 64), (16, 8))
ROWS, PAGE, HEADS, DIM = 4, 64, sized(64, 4), sized(128, 64)
LONGEST, TOPK, BLOCK = sized((6000, 512, 128), (100, 24, 16))
SELECTORS: dict[str, tuple[Selector, str]] = {
    "dsa": (DSA(TOPK), "auto"),
    "dsa in one launch": (DSA(TOPK), "cuda"),
    "misa": (MISA(4, BLOCK, TOPK), "auto"),
    "misa_rerank": (MISARerank(4, BLOCK, 2 * TOPK, TOPK), "auto"),
    "hisa": (HISA(BLOCK, TOPK // BLOCK + 4, TOPK), "auto"),
}


@dataclass
class Requests:
    """What an engine keeps: pages handed out and taken back, keys in them, and a state per layer that hears of every cut."""

    state: LayerState
    seed: int
    dice: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        pages = 3 * LONGEST // PAGE + ROWS  # too few for all rows to be long, so they are used again
        self.table, self.cache = PageTable(ROWS, pages, PAGE, DEVICE), IndexKeyCache(pages, DIM, PAGE, DEVICE)
        self.cache.pages.fill_(0xFF)  # NaN
        self.drafts, self.begun = [0] * ROWS, 0
        # Drawn once: a step takes a run of them from anywhere.
        self.vectors, self.queries = vectors(4 * LONGEST, DIM, seed=self.seed), queries(16 * ROWS, HEADS, DIM, seed=self.seed)

    def append(self, row: int, num: int) -> None:
        first = self.dice.randint(0, 3 * LONGEST)
        self.cache.store(self.table.append(row, num), *(x[first : first + num] for x in self.vectors))

    def cut(self, row: int, length: int) -> None:
        self.table.rollback(row, length)
        self.state.rollback(row, length)

    def step(self) -> None:
        """Rejects drafts, ends requests and begins others, and appends to each 1 token or up to 4."""
        for row in range(ROWS):
            self.cut(row, self.table.length(row) - self.dice.randint(0, self.drafts[row]))
            num = self.dice.choice((1, 1, 1, 2, 4))
            over = self.table.length(row) + num > LONGEST or self.table.num_free < ROWS
            if over or self.dice.random() < sized(0.01, 0.1):
                self.begun += 1
                self.cut(row, 0)
                self.append(row, self.dice.randint(0, min(LONGEST // 2, self.table.num_free * PAGE // 2)))
            self.append(row, num)
            self.drafts[row] = num - 1

    def asked(self) -> tuple[IndexQuery, IndexKeys]:
        """A query for each token that the step appended."""
        rows = [row for row in range(ROWS) for _ in range(self.drafts[row] + 1)]
        positions = [self.table.length(row) - back - 1 for row in range(ROWS) for back in range(self.drafts[row], -1, -1)]
        first = self.dice.randint(0, 12 * ROWS)
        q, weights = (x[first : first + len(rows)] for x in self.queries)
        query = IndexQuery(q, weights, torch.tensor(positions, device=DEVICE), torch.tensor(rows, device=DEVICE))
        return query, self.cache.view(self.table.table, self.table.lengths)


def parts(picked: Selection) -> list[Tensor]:
    return [picked.indices, picked.lengths]


@pytest.mark.parametrize("name", SELECTORS)
def test_steps_select_what_a_prefill_does(name):
    selector, impl = SELECTORS[name]
    if impl == "cuda" and INTERPRET:
        pytest.skip("a kernel in CUDA C++ cannot be interpreted")
    requests = Requests(LayerState(0), seed=1000)
    problems: list[str | None] = []
    for step in range(STEPS):
        requests.step()
        query, keys = requests.asked()
        with using("triton" if INTERPRET else impl):
            picked = selector.select_indices(query, keys, requests.state)
            if step % EVERY and step + 1 < STEPS:
                continue
            scored = selector.select(query, keys, requests.state)
        with using("triton"):  # kernels of a prefill
            afresh = selector.select_indices(query, keys)
        problems += differ_all(f"step {step}", parts(picked), parts(afresh))
        problems += differ_all(f"step {step}, with scores", parts(scored), parts(afresh))
        if isinstance(selector, DSA):  # of the others the first stage may fall either way at its edge: see test_selectors.py
            here, there = on_cpu(query, keys)
            with using("reference"):
                want = selector.select(here, there)
            found = Selection(scored.indices.cpu(), scored.lengths.cpu(), scored.space, scored.scores.cpu())
            bound = score_bound(here, there, sized(BITS["cuda"], BITS["cpu"] - 1))
            problems.append(selections_agree(found, want, bound, here, there))
    fail_on(problems)
    assert requests.begun > sized(50, 1)
