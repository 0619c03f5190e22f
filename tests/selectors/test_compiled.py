"""Selection and attention inside torch.compile(fullgraph=True): one operator each, with the results of the plain functions."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from thresher.cache import LatentCache, LayerState
from thresher.errors import ThresherError
from thresher.ops import sparse_attend_mla_fp8
from thresher.ops.sparse_attend.compiled import attend_mla_fp8
from thresher.selectors import Dense, LayerPlan
from thresher.selectors.compiled import InGraph
from thresher.selectors.shared import Shared

from .worlds import SMALL, make_world

FITTING = {name: selector for name, selector in SMALL.items() if selector.topk is not None and name != "oracle"}


def tensors(query, keys):
    return query.q, query.weights, query.positions, query.requests, keys.pages, keys.page_table, keys.lengths


@pytest.fixture
def world():
    made = make_world([37, 5, 20], seed=4)
    return made.query(made.every_pair()), made.view()


@pytest.mark.parametrize("name", FITTING)
def test_a_compiled_step_selects_the_same(name, world):
    selector, given = FITTING[name], tensors(*world)
    layer = InGraph(selector, LayerState(0))

    def step(*tensors):
        indices, lengths = layer(*tensors)
        return indices + 1, lengths * 2, (indices >= 0).sum(1)

    indices, lengths, kept = torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    want = selector.select_indices(*world)
    assert torch.equal(indices - 1, want.indices)
    assert torch.equal(lengths, want.lengths * 2)
    assert torch.equal(kept, want.lengths)


def test_the_operator_keeps_the_rules_of_operators(world):
    layer = InGraph(SMALL["dsa"])
    query, keys = world
    query = replace(query, q=query.q.float())  # opcheck compares inputs by arithmetic, which FP8 has none of
    torch.library.opcheck(torch.ops.thresher.select.default, (layer.number, layer.topk, *tensors(query, keys)))
    q, cache = torch.randn(3, 2, 576).bfloat16(), LatentCache(4, 3)
    slots = torch.tensor([[0, 5, -1], [7, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.thresher.attend_mla_fp8.default, (q, cache.data, slots, 0.05))


def test_other_numbers_of_queries_need_no_other_graph(world):
    query, keys = world
    layer, traced = InGraph(SMALL["dsa"]), []

    def backend(graph, _):
        traced.append(graph)
        return graph.forward

    step = torch.compile(lambda *given: layer(*given), fullgraph=True, dynamic=True, backend=backend)
    for num in (11, 17, 30):
        some = query.rows(slice(num))
        assert torch.equal(step(*tensors(some, keys))[0], layer.selector.select_indices(some, keys).indices)
    assert len(traced) == 1


def test_what_a_state_holds_is_not_handed_out(world):
    """A compiler may write to an operator's result when nobody in its graph reads it any more."""
    state = LayerState(1)
    state.selections[0] = SMALL["dsa"].select(*world)

    class Again(Shared):
        topk = 7

    indices, lengths = InGraph(Again(layer=0), state)(*tensors(*world))
    assert torch.equal(indices, state.selections[0].indices)
    assert indices.data_ptr() != state.selections[0].indices.data_ptr()
    assert lengths.data_ptr() != state.selections[0].lengths.data_ptr()


def test_attention():
    gen = torch.Generator().manual_seed(3)
    cache = LatentCache(4, 3)
    cache.store(torch.arange(12), torch.randn(12, 512, generator=gen), torch.randn(12, 64, generator=gen))
    q, slots = torch.randn(3, 2, 576, generator=gen).bfloat16(), torch.tensor([[0, 5, -1], [7, 11, 2], [-1, -1, -1]], dtype=torch.int32)
    out, lse = torch.compile(attend_mla_fp8, fullgraph=True, backend="aot_eager")(q, cache.data, slots, 0.05)
    want = sparse_attend_mla_fp8(q, cache.data, slots, 0.05)
    assert torch.equal(out, want.out)
    assert torch.equal(lse, want.lse)


def test_user_errors(world):
    with pytest.raises(ThresherError, match="selector must have a topk; got Dense"):
        InGraph(Dense())
    with pytest.raises(ThresherError, match="selector must be"):
        InGraph(LayerPlan)
    layer = InGraph(SMALL["dsa"])
    topk, number = layer.topk, layer.number
    del layer
    gc.collect()
    with pytest.raises(ThresherError, match="must live as long"):
        torch.ops.thresher.select(number, topk, *tensors(*world))
