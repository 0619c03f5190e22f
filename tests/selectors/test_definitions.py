"""Each method against its own formula in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch

from thresher.cache import LayerState
from thresher.selectors import DSA, HISA, MISA, MISARandom, MISARerank, MISAStatic, Oracle, Random, Shared, Window
from thresher.types import IndexQuery

from . import definitions as d
from .worlds import HEADS, KINDS, World, make_world, rows_of

CASES = [(kind, seed) for kind in ("normal", "wild", "sparse") for seed in (0, 1)]
every_case = pytest.mark.parametrize(("kind", "seed"), CASES)


def chosen(selector, kind, seed):
    world = make_world([45, 20], seed, kind)
    pairs = world.every_pair()
    return world, list(zip(pairs, world.select(selector, pairs), strict=True))


@every_case
def test_dsa(kind, seed):
    world, rows = chosen(DSA(topk=9), kind, seed)
    for pair, row in rows:
        d.assert_same_set(row, d.scores(world, *pair), 9)


@every_case
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_misa(kind, seed, block_size):
    world, rows = chosen(MISA(active_heads=2, block_size=block_size, topk=9), kind, seed)
    checked = 0
    for pair, row in rows:
        mass = d.head_mass(world, *pair, block_size)
        if d.is_close_call(mass, 2):
            continue
        d.assert_same_set(row, d.scores(world, *pair, d.best(mass, 2)), 9)
        checked += 1
    assert checked > len(rows) * 0.7


@every_case
def test_misa_with_every_head_is_dsa(kind, seed):
    misa, dsa = chosen(MISA(HEADS, 8, 9), kind, seed), chosen(DSA(9), kind, seed)
    assert misa[1] == dsa[1]


@every_case
def test_misa_rerank(kind, seed):
    world, rows = chosen(MISARerank(active_heads=2, block_size=4, candidates=16, topk=9), kind, seed)
    checked = 0
    for pair, row in rows:
        mass = d.head_mass(world, *pair, 4)
        if d.is_close_call(mass, 2):
            continue
        routed = d.scores(world, *pair, d.best(mass, 2))
        if d.is_close_call(routed, 16):
            continue
        d.assert_same_set(row, d.scores(world, *pair), 9, d.best(routed, 16))
        checked += 1
    assert checked > len(rows) * 0.7


def test_misa_rerank_that_proposes_everything_is_dsa():
    for kind in KINDS:
        assert chosen(MISARerank(1, 4, 45, 9), kind, 3)[1] == chosen(DSA(9), kind, 3)[1]


@every_case
@pytest.mark.parametrize("num_blocks", [2, 3, 5])
def test_hisa(kind, seed, num_blocks):
    size = 5
    world, rows = chosen(HISA(size, num_blocks, topk=9), kind, seed)
    checked = 0
    for pair, row in rows:
        own = pair[1] // size
        mean_scores = d.block_scores(world, *pair, size)
        if d.is_close_call(mean_scores[1:], num_blocks - 2):
            continue
        free = d.best(mean_scores, num_blocks - 2, among=list(range(1, own)))
        blocks = sorted({0, own, *free})
        tokens = [t for b in blocks for t in range(b * size, (b + 1) * size) if t <= pair[1]]
        d.assert_same_set(row, d.scores(world, *pair), 9, tokens)
        checked += 1
    assert checked > len(rows) * 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_hisa_whose_blocks_cover_the_context_is_dsa(kind):
    assert chosen(HISA(5, 9, 9), kind, 4)[1] == chosen(DSA(9), kind, 4)[1]
    assert chosen(HISA(64, 2, 9), kind, 4)[1] == chosen(DSA(9), kind, 4)[1]


def test_hisa_breaks_block_ties_towards_the_front():
    for (_, position), row in chosen(HISA(block_size=4, num_blocks=3, topk=12), "zeros", 0)[1]:
        own = position // 4
        assert row == [t for b in sorted({0, min(1, own), own}) for t in range(4 * b, 4 * b + 4) if t <= position]


@pytest.mark.parametrize("selector", [DSA(7), MISA(2, 8, 7), MISARerank(1, 4, 16, 7), MISAStatic((0, 2), 7), MISARandom(2, 0, 7)])
def test_ties_go_to_the_smaller_position(selector):
    for (_, position), row in chosen(selector, "zeros", 0)[1]:
        assert row == list(range(min(7, position + 1)))


@every_case
def test_oracle(kind, seed):
    world, rows = chosen(Oracle(topk=9), kind, seed)
    for pair, row in rows:
        d.assert_same_set(row, d.attention_mass(world, *pair), 9)


def test_window():
    rows = dict(chosen(Window(topk=6, sinks=2), "normal", 0)[1])
    assert rows[0, 3] == [0, 1, 2, 3]
    assert rows[0, 5] == [0, 1, 2, 3, 4, 5]
    assert rows[0, 6] == [0, 1, 3, 4, 5, 6]
    assert rows[0, 44] == [0, 1, 41, 42, 43, 44]
    assert dict(chosen(Window(topk=3, sinks=0), "normal", 0)[1])[1, 19] == [17, 18, 19]
    assert dict(chosen(Window(topk=3, sinks=3), "normal", 0)[1])[1, 19] == [0, 1, 2]


def without_heads(world: World, kept) -> World:
    silent = [h for h in range(HEADS) if h not in kept]
    weights = [w.index_fill(1, torch.tensor(silent), 0.0) for w in world.weights]
    return World(world.keys, world.q, weights, world.attention_q, world.attention_k)


def test_static_heads_are_dsa_with_the_other_heads_silent():
    world = make_world([45], 5)
    pairs = world.every_pair()
    assert world.select(MISAStatic((2, 0), 9), pairs) == without_heads(world, (0, 2)).select(DSA(9), pairs)


def test_random_heads_are_some_pair_for_each_query_and_every_pair_for_some():
    world = make_world([200], 5)
    pairs = world.every_pair()
    rows = world.select(MISARandom(active_heads=2, seed=1, topk=9), pairs)
    by_heads = {heads: without_heads(world, heads).select(DSA(9), pairs) for heads in itertools.combinations(range(HEADS), 2)}
    seen = dict.fromkeys(by_heads, 0)
    for i, row in enumerate(rows):
        matching = [heads for heads, sets in by_heads.items() if sets[i] == row]
        assert matching
        if len(matching) == 1:
            seen[matching[0]] += 1
    assert min(seen.values()) >= 10
    assert world.select(MISARandom(2, 2, 9), pairs) != rows
    assert world.select(MISARandom(2, 1, 9), pairs, state=LayerState(7)) != rows


def test_random_is_uniform_and_independent_between_queries_seeds_and_layers():
    # Queries far past the 16 keys held see all of them: many draws of 8 of 16 for little work.
    world = make_world([16], 0)
    num = 3000
    one = world.query([(0, 15)])
    many = IndexQuery(
        one.q.view(torch.uint8).expand(num, -1, -1).view(torch.float8_e4m3fn),
        one.weights.expand(num, -1),
        torch.arange(15, 15 + num),
        torch.zeros(num, dtype=torch.int64),
    )
    keys = world.view()

    def picks(seed, layer=0):
        selection = Random(topk=8, seed=seed).select(many, keys, LayerState(layer))
        rows_of(selection, many, keys)
        return torch.zeros(num, 16).scatter_(1, selection.indices.long(), 1.0)

    first = picks(0)
    assert (first.sum(1) == 8).all()
    sigma = (num * 0.25) ** 0.5
    assert (first.sum(0) - num / 2).abs().max() < 4.5 * sigma
    # Two independent 8-of-16 draws share 4 on average, with variance 4 * 64 / (15 * 16).
    sigma = (4 * 64 / (15 * 16) / num) ** 0.5
    for other in (first.roll(1, 0), picks(1), picks(0, layer=1), picks(2**32 - 1)):
        assert abs(float((first * other).sum(1).mean()) - 4) < 4.5 * sigma


def test_shared_hands_on_the_other_layers_set():
    world = make_world([20], 0)
    query, keys = world.query(world.every_pair()), world.view()
    selections: dict = {}
    earlier, later = LayerState(2, selections), LayerState(3, selections)
    earlier.selections[2] = DSA(5).select(query, keys, earlier)
    assert Shared(2).select(query, keys, later) is selections[2]
