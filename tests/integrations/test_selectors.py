"""Every selector inside a DSA model of transformers, alone and in plans: it picks its own tokens, in prefill and in decoding."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import thresher
from thresher.selectors import (
    DSA,
    HISA,
    MISA,
    Dense,
    LayerPlan,
    MISARandom,
    MISARerank,
    MISAStatic,
    Oracle,
    Random,
    Selector,
    Shared,
    Window,
)
from thresher.types import Selection

from .models import HEADS, TOPK, both, decode, indexers, make_cache, make_ids, make_model, run

SELECTORS = {
    "dense": Dense(),
    "dsa": DSA(topk=7),
    "misa": MISA(active_heads=2, block_size=4, topk=TOPK),
    "misa_rerank": MISARerank(active_heads=2, block_size=4, candidates=16, topk=TOPK),
    "hisa": HISA(block_size=4, num_blocks=4, topk=TOPK),
    "window": Window(topk=TOPK, sinks=2),
    "random": Random(topk=TOPK, seed=1),
    "oracle": Oracle(topk=TOPK),
    "misa_static": MISAStatic(heads=(0, 5), topk=TOPK),
    "misa_random": MISARandom(active_heads=2, topk=TOPK),
}


@both
@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_picks_its_own_and_decodes_what_it_prefills(family, precision, name):
    model, ids = make_model(family), make_ids(2, 30)
    own, _ = run(model, ids)
    with thresher.use(model, SELECTORS[name], precision):
        hidden, picked = run(model, ids)
        stepped, steps = decode(model, ids, make_cache(model), start=22)
    assert (hidden - own).abs().max() > 0.01
    topk = SELECTORS[name].topk or 30
    assert torch.equal(picked.sets[0].sum(-1), picked.seen[0].sum(-1).clamp(max=topk))
    assert all(row.sum(-1).max() <= topk for row in picked.sets)
    assert (picked.indices[0].long() <= torch.arange(30)[:, None]).all(), "no index points past the query"
    torch.testing.assert_close(stepped, hidden[:, 22:], atol=1e-4, rtol=1e-4)
    layers = len(indexers(model))
    for t in range(22, 30):
        for layer in range(layers):
            assert torch.equal(steps.sets[(t - 22) * layers + layer][:, 0], picked.sets[layer][:, t, : t + 1])


@dataclass(frozen=True)
class Own(Selector):
    """Nothing but the query's own token."""

    topk: int = 3

    def select(self, query, keys, state=None, attention=None):
        indices = torch.nn.functional.pad(query.positions[:, None].int(), (0, self.topk - 1), value=-1)
        return Selection(indices, (query.positions >= 0).long())


@both
def test_a_selector_of_the_caller_s_may_pick_fewer(family):
    model = make_model(family)
    with thresher.use(model, Own()):
        _, picked = run(model, make_ids(2, 9))
    for one in picked.sets:
        assert torch.equal(one, torch.eye(9, dtype=torch.bool).expand(2, -1, -1))


@both
def test_what_is_drawn_by_chance_differs_by_layer(family):
    model = make_model(family)
    with thresher.use(model, Random(TOPK)):
        _, picked = run(model, make_ids(2, 30))
    assert not torch.equal(picked.sets[0], picked.sets[1])


@both
def test_selectors_that_come_to_dsa(family):
    """All heads active, and blocks enough for every token, score what DSA does."""
    model, ids = make_model(family), make_ids(2, 40)
    with thresher.use(model, DSA(TOPK)):
        want, _ = run(model, ids)
    for selector in (MISA(HEADS, 4, TOPK), MISARerank(HEADS, 4, 20, TOPK), HISA(4, 10, TOPK), MISAStatic(tuple(range(HEADS)), TOPK)):
        with thresher.use(model, selector):
            assert torch.equal(run(model, ids)[0], want)


@both
def test_oracle_picks_what_the_attention_weighs_most(family):
    """The first layer's attention over all tokens, read from the model itself, says what is heaviest."""
    model, ids = make_model(family, "eager"), make_ids(2, 30)
    with thresher.use(model, Dense()):
        mass = model(ids, output_attentions=True, use_cache=False).attentions[0].sum(dim=1)
    with thresher.use(model, Oracle(TOPK)):
        _, picked = run(model, ids)
        _, steps = decode(model, ids, make_cache(model), start=26)
    want = torch.zeros_like(picked.sets[0]).scatter(-1, mass.topk(TOPK).indices, True) & picked.seen[0]
    assert torch.equal(picked.sets[0], want)
    for t in range(26, 30):
        assert torch.equal(steps.sets[(t - 26) * len(indexers(model))][:, 0], want[:, t, : t + 1])


def test_a_plan_gives_each_layer_its_own():
    model, ids = make_model("deepseek_v32"), make_ids(2, 30)
    with thresher.use(model, LayerPlan((Window(6, sinks=1), Dense(), Shared(0)))):
        hidden, picked = run(model, ids)
        stepped, _ = decode(model, ids, make_cache(model), start=24)
    window, dense, shared = picked.sets
    assert torch.equal(window.sum(-1), picked.seen[0].sum(-1).clamp(max=6))
    assert window[:, 20, [0, 16, 17, 18, 19, 20]].all()
    assert torch.equal(dense, picked.seen[1])
    assert torch.equal(shared, window)
    torch.testing.assert_close(stepped, hidden[:, 24:], atol=1e-4, rtol=1e-4)


def test_layers_without_an_indexer_share_the_selection_before():
    model, ids = make_model("glm_moe_dsa"), make_ids(2, 30)
    given = []
    handles = [layer.self_attn.register_forward_hook(lambda module, args, out: given.append(out[2])) for layer in model.model.layers]
    try:
        for plan in (
            LayerPlan((Window(6), Window(6), DSA(TOPK), DSA(TOPK))),
            LayerPlan((Window(6), Shared(0), DSA(TOPK), Shared(2))),
            LayerPlan((DSA(TOPK), Shared(0), Shared(0), Shared(0))),
        ):
            given.clear()
            with thresher.use(model, plan):
                hidden, picked = run(model, ids)
                stepped, _ = decode(model, ids, make_cache(model), start=24)
            torch.testing.assert_close(stepped, hidden[:, 24:], atol=1e-4, rtol=1e-4)
            one, two = picked.indices
            assert [torch.equal(a, b) for a, b in zip(given[:4], (one, one, two, two), strict=True)] == [True] * 4
            assert torch.equal(one, two) == (plan[2] == Shared(0))
    finally:
        for handle in handles:
            handle.remove()
