"""CUDA graphs: a replay has the eager bits, also when lengths have changed since it was recorded.

In the interpreter a replay is one more call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from thresher import ops
from thresher.cache import IndexKeyCache, LayerState, pack_keys
from thresher.ops.dispatch import using
from thresher.selectors import DSA, HISA, MISA, MISARerank
from thresher.selectors.base import Selector
from thresher.types import IndexKeys, IndexQuery

from .compare import differ_all, fail_on
from .draw import generator, paged, queries, take, vectors
from .machine import DEVICE, INTERPRET, sized

score = importlib.import_module("thresher.ops.index_score.triton")
select = importlib.import_module("thresher.ops.select.triton")
attention = importlib.import_module("thresher.ops.sparse_attend.triton")
pooling = importlib.import_module("thresher.ops.pool_keys.triton")
quantizing = importlib.import_module("thresher.ops.quantize.triton")
routing = importlib.import_module("thresher.ops.route_heads.triton")

HEADS, DIM, PAGE = 16, sized(128, 64), 64
LENGTHS = sized([3000, 1000, 20000], [100, 70, 256])
TOPK = sized(512, 32)


class Recorded:
    """``step`` in a graph. Its results lie in the graph's own memory: ``replay`` returns copies."""

    def __init__(self, step: Callable[[], list[Tensor]]) -> None:
        self.step = step
        if INTERPRET:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # compiles
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = step()

    def replay(self) -> list[Tensor]:
        if INTERPRET:
            return self.step()
        self.graph.replay()
        torch.cuda.synchronize()
        return [x.clone() for x in self.results]


class World:
    """Three requests in shuffled pages, one query each; lengths and queries are written in place."""

    def __init__(self) -> None:
        self.keys = paged([vectors(n, DIM, seed=n) for n in LENGTHS], PAGE)
        self.most = self.keys.lengths.clone()
        total = len(self.keys.pages) * PAGE
        gen = generator(1)
        self.latents = torch.randn(total, 576, generator=gen).bfloat16().to(DEVICE)
        self.attention_q = torch.randn(3, 32, 576, generator=gen).bfloat16().to(DEVICE)
        q, weights = queries(3, HEADS, DIM, seed=2)
        self.query = IndexQuery(q, weights, self.most - 1, torch.arange(3, device=DEVICE))
        self.room = self.keys.page_table.shape[1] * PAGE

    def move_to(self, lengths: list[int], seed: int) -> None:
        self.keys.lengths.copy_(torch.tensor(lengths))
        self.query.positions.copy_(torch.tensor(lengths) - 1)
        q, weights = queries(3, HEADS, DIM, seed=seed)
        self.query.q.view(torch.uint8).copy_(q.view(torch.uint8))
        self.query.weights.copy_(weights)
        self.attention_q.mul_(-0.5)


STEPS = sized(([3000, 1000, 20000], [2999, 64, 513], [1, 0, 19999]), ([100, 70, 256], [99, 64, 129], [1, 0, 255]))


def check(world: World, step: Callable[[], list[Tensor]], eager: Callable[[], list[Tensor]]) -> None:
    recorded, problems = Recorded(step), []
    for seed, lengths in enumerate(STEPS):
        world.move_to(lengths, seed + 10)
        want = [x.clone() for x in eager()]
        for turn in range(2):
            problems += differ_all(f"lengths {lengths}, replay {turn}", recorded.replay(), want)
    fail_on(problems)


def test_score_select_attend():
    world = World()

    def step() -> list[Tensor]:
        scores = score.paged_index_score(world.query, world.keys, width=world.room)
        picked = select.select_topk_slots(scores, TOPK, world.keys.page_table, world.query.requests, PAGE)
        part = attention.sparse_attend_mla(world.attention_q, world.latents, picked.indices, 0.07)
        return [scores, picked.indices, picked.lengths, part.out, part.lse]

    check(world, step, step)


def test_public_functions():
    """As wide as the table has room for while recording, and as the longest request when not: the same set and output."""
    world = World()

    def step() -> list[Tensor]:
        with using("triton"):
            picked = DSA(TOPK).select(world.query, world.keys)
            at = picked.indices.long().clamp(min=0)
            slots = world.keys.page_table.gather(1, at // PAGE) * PAGE + at.int() % PAGE
            slots = slots.masked_fill(picked.indices < 0, -1)
            part = ops.sparse_attend_mla(world.attention_q, world.latents, slots, 0.07)
            whole = ops.merge([part, part])
            return [picked.indices, picked.lengths, picked.scores, part.out, part.lse, whole.out, whole.lse]

    check(world, step, step)


def test_append_pool_and_route():
    """A new key a request is quantised, stored, pooled where it ends a block, and heads are routed over the means."""
    block = 16
    world = World()
    room = world.room // block
    fresh = torch.randn(3, DIM, generator=generator(5)).bfloat16().to(DEVICE)

    def make_means() -> IndexKeys:
        empty = vectors(room, DIM, seed=3)
        means = pack_keys([(take(empty[0], torch.arange(room, device=DEVICE)), empty[1])] * 3, 8)
        pages, lengths = torch.zeros_like(means.pages), torch.zeros_like(means.lengths)
        return IndexKeys(pages, means.page_table, lengths)

    def step_with(means: IndexKeys, cache: IndexKeyCache) -> list[Tensor]:
        keys = IndexKeys(cache.pages, world.keys.page_table, world.keys.lengths)
        last = keys.lengths - 1
        page = keys.page_table.gather(1, (last.clamp(min=0) // PAGE)[:, None])[:, 0].long()
        slots = torch.where(last < 0, -1, page * PAGE + last % PAGE)
        quantizing.store_index_keys(cache.pages, slots, fresh, last.clamp(min=0), 1e4, DIM // 2, "half")
        pooling.pool_paged_keys(keys, torch.zeros_like(last), block, max(LENGTHS), means)
        means.lengths.copy_(keys.lengths // block)
        mass, heads = routing.routed_heads(world.query, means, keys, block, 4)
        return [cache.pages, means.pages, mass, heads]

    caches = [IndexKeyCache(len(world.keys.pages), DIM, PAGE, DEVICE) for _ in range(2)]
    for cache in caches:
        cache.pages.copy_(world.keys.pages)
    means = [make_means(), make_means()]
    check(world, lambda: step_with(means[0], caches[0]), lambda: step_with(means[1], caches[1]))


WITH_MEANS = [HISA(16, 6, 32), MISA(4, 16, 32), MISARerank(4, 16, 64, 32)]


@pytest.mark.parametrize("selector", WITH_MEANS, ids=lambda selector: type(selector).__name__)
def test_selectors_without_a_state(selector: Selector):
    """Their means are made in the graph."""
    world = World()

    def step() -> list[Tensor]:
        with using("triton"):
            picked = selector.select(world.query, world.keys)
            return [picked.indices, picked.lengths, picked.scores]

    check(world, step, step)


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("selector", [HISA(64, 6, 128), *WITH_MEANS], ids=lambda selector: f"{type(selector).__name__}-{selector.topk}")
def test_selectors_with_a_state(selector: Selector, impl: str):
    """Means are brought up to date in the graph, after cuts too: as in a state made for the lengths at hand."""
    if impl == "auto" and INTERPRET:
        pytest.skip('for tensors on a CPU "auto" is no kernel')
    world, state = World(), LayerState(0)

    def select_with(held: LayerState) -> list[Tensor]:
        with using(impl):
            picked = selector.select(world.query, world.keys, held)
            return [picked.indices, picked.lengths, picked.scores]

    recorded, problems = Recorded(lambda: select_with(state)), []
    for seed, lengths in enumerate(STEPS):
        for request, length in enumerate(lengths):
            state.rollback(request, length)
        world.move_to(lengths, seed + 10)
        want = [x.clone() for x in select_with(LayerState(0))]
        for turn in range(2):
            problems += differ_all(f"lengths {lengths}, replay {turn}", recorded.replay(), want)
    fail_on(problems)


def test_a_launch_waits_for_copies_and_for_other_streams():
    """Score kernels may start while the launch ahead still runs: what that writes, a copy or another stream's kernel too, is there."""
    world = World()
    query = IndexQuery(*(torch.zeros_like(x) for x in (world.query.q, world.query.weights, world.query.positions, world.query.requests)))
    ballast = torch.zeros(sized(2**27, 16), device=DEVICE)
    side = None if INTERPRET else torch.cuda.Stream()

    def slow_copy(to: Tensor, what: Tensor) -> None:
        ballast.add_(1.0)
        to.copy_(what)

    def score_copied() -> Tensor:
        query.positions.copy_(world.query.positions)
        query.requests.copy_(world.query.requests)
        query.weights.copy_(world.query.weights)
        slow_copy(query.q.view(torch.uint8), world.query.q.view(torch.uint8))
        first = score.paged_index_score(query, world.keys, width=world.room)
        query.weights.zero_()
        if side is None:
            slow_copy(query.weights, world.query.weights)
        else:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                slow_copy(query.weights, world.query.weights)
            torch.cuda.current_stream().wait_stream(side)
        query.q.view(torch.uint8).zero_()
        slow_copy(query.q.view(torch.uint8), world.query.q.view(torch.uint8))
        return torch.stack((first, score.paged_index_score(query, world.keys, width=world.room)))

    check(world, lambda: [score_copied()], lambda: [score_copied()])
    want = score.paged_index_score(world.query, world.keys, width=world.room)
    fail_on(differ_all("after slow copies", [score_copied()], [torch.stack((want, want))]))
