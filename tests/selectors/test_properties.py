"""What must hold for every selector, whatever it chooses."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.cache import LayerState
from thresher.ops.pool_keys import grow_means
from thresher.selectors import Dense, MISAStatic
from thresher.selectors import rows as row_tools
from thresher.types import AttentionInputs, IndexQuery

from . import definitions as d
from .worlds import SMALL, World, make_world, rows_of, splice, worlds

every_selector = pytest.mark.parametrize("selector", SMALL.values(), ids=SMALL.keys())
few = settings(max_examples=6, deadline=None, derandomize=True)


@every_selector
@few
@given(world=worlds())
def test_rows_are_causal_ascending_without_duplicates_and_full(selector, world: World):
    pairs = world.every_pair()
    for (_, position), row in zip(pairs, world.select(selector, pairs), strict=True):
        kept = position + 1 if selector.topk is None else min(selector.topk, position + 1)
        assert len(row) == kept


@every_selector
@few
@given(world=worlds(max_length=20), extra=st.integers(0, 3))
def test_a_budget_that_covers_the_context_keeps_everything_visible(selector, world: World, extra):
    if not isinstance(selector, Dense):
        topk = max(world.lengths) + extra
        more = {"candidates": topk, "num_blocks": 2 + topk // 4, "sinks": min(2, topk)}
        fields = {f.name for f in dataclasses.fields(selector)}
        selector = dataclasses.replace(selector, topk=topk, **{name: n for name, n in more.items() if name in fields})
    pairs = world.every_pair()
    for (_, position), row in zip(pairs, world.select(selector, pairs), strict=True):
        assert row == list(range(position + 1))


@every_selector
@few
@given(world=worlds(), data=st.data())
def test_a_set_does_not_depend_on_the_batch_around_it(selector, world: World, data):
    together = dict(zip(world.every_pair(), world.select(selector, world.every_pair()), strict=True))
    shuffled = data.draw(st.permutations(world.every_pair()))[:20]
    assert world.select(selector, shuffled) == [together[pair] for pair in shuffled]
    for request in range(len(world.lengths)):
        alone = world.only(request)
        pairs = [(0, p) for p in range(world.lengths[request])]
        assert alone.select(selector, pairs) == [together[request, p] for _, p in pairs]


@every_selector
@few
@given(world=worlds(), cut=st.integers(1, 30))
def test_a_set_does_not_depend_on_how_queries_are_split(selector, world: World, cut):
    pairs = world.every_pair()
    together = world.select(selector, pairs)
    parts = [world.select(selector, pairs[i : i + cut]) for i in range(0, len(pairs), cut)]
    assert list(itertools.chain(*parts)) == together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_tools, "CPU_ELEMENTS", 100)
        assert world.select(selector, pairs) == together


@every_selector
def test_repetition_gives_the_same_bits(selector):
    world = make_world([40, 13], seed=1, kind="plateau")
    pairs = world.every_pair()
    query, keys, attention = world.query(pairs), world.view(), world.attention(pairs)
    first = selector.select(query, keys, None, attention)
    for _ in range(5):
        assert torch.equal(selector.select(query, keys, None, attention).indices, first.indices)


@every_selector
@few
@given(world=worlds(max_length=30), data=st.data())
def test_decode_with_a_state_equals_prefill_without(selector, world: World, data):
    pairs = world.every_pair()
    fresh = dict(zip(pairs, world.select(selector, pairs), strict=True))
    assert dict(zip(pairs, world.select(selector, pairs, state=LayerState(0)), strict=True)) == fresh
    state, lengths = LayerState(0), [0] * len(world.lengths)
    while lengths != world.lengths:
        steps = [data.draw(st.integers(0, min(4, end - now))) for now, end in zip(lengths, world.lengths, strict=True)]
        if not any(steps):
            steps = [min(4, end - now) for now, end in zip(lengths, world.lengths, strict=True)]
        new = [(r, lengths[r] + i) for r, n in enumerate(steps) for i in range(n)]
        lengths = [now + n for now, n in zip(lengths, steps, strict=True)]
        assert world.select(selector, new, lengths, state) == [fresh[pair] for pair in new]


@every_selector
@few
@given(seed=st.integers(0, 999), length=st.integers(2, 40), data=st.data())
def test_rollback_then_regrowth_equals_a_fresh_start(selector, seed, length, data):
    kept = data.draw(st.integers(0, length - 1))
    before, after = make_world([length, 9], seed), make_world([length, 9], seed + 1)
    joined = splice(before, after, kept)
    state = LayerState(0)
    before.select(selector, before.every_pair(), state=state)
    state.rollback(0, kept)
    rewritten = [(0, p) for p in range(kept, length)]
    if kept:
        joined.select(selector, [(0, kept - 1)], [kept, 9], state)
    assert joined.select(selector, rewritten, state=state) == joined.select(selector, rewritten)
    assert joined.select(selector, joined.every_pair([1]), state=state) == before.select(selector, before.every_pair([1]))


@every_selector
@few
@given(world=worlds(max_requests=1), other=st.integers(0, 999), length=st.integers(1, 60))
def test_nothing_leaks_between_requests(selector, world: World, other, length):
    pairs = world.every_pair([0])
    for seed in (other, other + 1):
        neighbour = make_world([length], seed)
        both = World(*(getattr(world, f.name) + getattr(neighbour, f.name) for f in dataclasses.fields(World)))
        assert both.select(selector, pairs) == world.select(selector, pairs)


@every_selector
@few
@given(world=worlds(max_requests=1))
def test_later_keys_do_not_matter(selector, world: World):
    position = world.lengths[0] // 2
    pairs = [(0, p) for p in range(position + 1)]
    assert world.select(selector, pairs) == world.select(selector, pairs, [position + 1])


@every_selector
def test_a_query_that_sees_nothing_selects_nothing(selector):
    world = make_world([6, 3])
    pairs = [(0, 5), (1, 2)]
    query = world.query(pairs)
    query = IndexQuery(query.q, query.weights, torch.tensor([5, -1]), query.requests)
    selection = selector.select(query, world.view(), None, world.attention(pairs))
    assert selection.lengths.tolist() == [6, 0]
    assert (selection.indices[1] == -1).all()


@every_selector
def test_an_empty_request_in_the_batch_is_no_trouble(selector):
    world = make_world([6, 3])
    query, keys = world.query([(0, 5)]), world.view([6, 0])
    assert rows_of(selector.select(query, keys, LayerState(0), world.attention([(0, 5)])), query, keys) == [[0, 1, 2, 3, 4, 5]]


@every_selector
def test_no_queries_give_no_rows(selector):
    world = make_world([6])
    query, attention = world.query([(0, 0)]), world.attention([(0, 0)])
    none = slice(0, 0)
    selection = selector.select(query.rows(none), world.view(), None, AttentionInputs(attention.q[none], attention.load_keys, 1.0))
    assert selection.indices.shape[0] == 0
    assert selection.lengths.shape == (0,)


SCORED = ["dsa", "misa", "misa_rerank", "hisa"]


@pytest.mark.parametrize("name", SCORED)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), order=st.permutations(range(4)))
def test_the_order_of_heads_moves_no_key_far_from_the_threshold(name, seed, order):
    world = make_world([40], seed)
    query, keys, order = world.query(world.every_pair()), world.view(), torch.tensor(order)
    q = query.q.view(torch.uint8)[:, order].view(query.q.dtype)
    permuted = IndexQuery(q, query.weights[:, order], query.positions, query.requests)
    selector = SMALL[name]
    rows, others = (rows_of(selector.select(x, keys), query, keys) for x in (query, permuted))
    checked = 0
    for position, (row, other) in enumerate(zip(rows, others, strict=True)):
        if hasattr(selector, "active_heads"):
            mass = d.head_mass(world, 0, position, selector.block_size)
            last, after = mass.sort(descending=True).values[selector.active_heads - 1 :][:2]
            if last - after <= 1e-5 * last:
                continue  # a tie between heads goes to the smaller head, whose number the order changes
        if name == "misa":
            assert row == other, "a sum of two heads has the same bits in either order"
        else:
            scores = d.scores(world, 0, position)
            kth = min(scores[s] for s in row)
            assert all(abs(scores[s] - kth) < 1e-5 * scores.abs().max() for s in set(row) ^ set(other))
        checked += 1
    assert checked > 20


def test_static_heads_in_any_order_have_the_same_scores_to_the_last_bit():
    world = make_world([40], 2, "wild")
    query, keys = world.query(world.every_pair()), world.view()
    first, second = (MISAStatic(heads, topk=40).select(query, keys).scores for heads in ((0, 1, 2, 3), (3, 0, 2, 1)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["misa", "misa_rerank", "hisa"])
def test_means_are_pooled_once_when_there_is_a_state(name, monkeypatch):
    selector, world, state = SMALL[name], make_world([40, 7], 2), LayerState(0)
    size = selector.block_size
    pooled = []

    def grow(keys, means, old, tickets, block_size, impl="auto"):
        pooled.append(int((keys.lengths // block_size - old // block_size).sum()))
        grow_means(keys, means, old, tickets, block_size, impl)

    monkeypatch.setattr(sys.modules["thresher.ops.hisa_select.reference"], "grow_means", grow)  # HISA's own way
    assert state.block_means(size, grow) is state.block_means(size, grow)
    for length in range(1, 41):
        world.select(selector, [(0, length - 1)], [length, 7], state)
    assert sum(pooled) == 40 // size + 7 // size
