"""What a ``use`` block leaves as it was: nested ones, saved and copied models, compiled graphs; and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

import thresher
from thresher.errors import ThresherError
from thresher.selectors import DSA, MISA, Dense, LayerPlan, Oracle, Shared, Window

from .models import CACHE, HEADS, TOPK, both, indexers, make_cache, make_ids, make_model, run


@both
def test_nested_repeated_and_after_an_exception(family):
    model, ids = make_model(family), make_ids(2, 30)
    own, inner, outer = run(model, ids)[0], Window(TOPK), Oracle(TOPK)
    with thresher.use(model, inner):
        of_inner = run(model, ids)[0]
    with thresher.use(model, outer):
        of_outer = run(model, ids)[0]
        for _ in range(2):
            with thresher.use(model, inner):
                assert torch.equal(run(model, ids)[0], of_inner)
            assert torch.equal(run(model, ids)[0], of_outer)
        with pytest.raises(RuntimeError, match="broken"), thresher.use(model, outer):
            raise RuntimeError("broken")
        assert torch.equal(run(model, ids)[0], of_outer)
    assert len({own.sum(), of_inner.sum(), of_outer.sum()}) == 3
    assert torch.equal(run(model, ids)[0], own)
    for layer in model.model.layers:
        assert "expand_kv" not in vars(layer.self_attn)
    assert all("forward" not in vars(indexer) for indexer in indexers(model))


def test_a_forward_of_the_caller_s_own_comes_back():
    model = copy.deepcopy(make_model("deepseek_v32"))
    indexer = indexers(model)[0]
    mine = indexer.forward
    indexer.forward = mine
    with thresher.use(model, Dense()):
        assert indexer.forward is not mine
    assert indexer.forward is mine


@both
def test_saving_inside_writes_the_model_s_own_tensors(family, tmp_path):
    model, ids = make_model(family), make_ids(1, 20)
    model.save_pretrained(tmp_path / "before")
    with thresher.use(model, Window(5)):
        model.save_pretrained(tmp_path / "inside")
        loaded = type(model).from_pretrained(tmp_path / "inside")
        twin = copy.deepcopy(model)
        picked = run(model, ids)[0]
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("before", "inside")]
    assert files[0] == files[1]
    assert torch.equal(run(loaded, ids)[0], run(model, ids)[0])
    # A copy made inside stays as it was, with parts of its own.
    assert torch.equal(run(twin, ids)[0], picked)
    assert all(indexer.forward.__self__.attention.indexer is indexer for indexer in indexers(twin))


@both
def test_compiled(family):
    """One graph, compiled outside or inside; each block meets the graph of its own selector again."""
    model, ids = make_model(family), make_ids(2, 20)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        for selector in (DSA(TOPK), Window(5)):
            with thresher.use(model, selector):
                assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert len(graphs) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind", "backend"), [("deepseek_v32", "static", "eager"), ("glm_moe_dsa", "dynamic", "eager")])
def test_compiled_with_a_cache_that_fills(family, kind, backend):
    model, ids = make_model(family), make_ids(2, 16)
    plan = (Oracle(TOPK), Oracle(TOPK), Shared(0), Shared(0))
    torch._dynamo.reset()
    compiled = torch.compile(model.model, backend=backend, fullgraph=True, dynamic=True)
    own, others = make_cache(model, kind), make_cache(model, kind)
    with thresher.use(model, LayerPlan(plan[: len(model.model.layers)])):
        for part in (ids, *ids[:, :4].split(1, dim=1)):
            want = model.model(part, use_cache=True, **{CACHE: own}).last_hidden_state
            got = compiled(part, use_cache=True, **{CACHE: others}).last_hidden_state
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@both
def test_errors_are_one_clear_line(family):
    model, ids = make_model(family), make_ids(1, 6)
    num = len(model.model.layers)
    refused = [
        ("model must be a DeepseekV32 or GlmMoeDsa model", (torch.nn.Linear(2, 2), DSA())),
        ("model must be a DeepseekV32 or GlmMoeDsa model", ("deepseek", DSA())),
        ("selector must be a Selector or a LayerPlan", (model, DSA)),
        ("selector must be a Selector or a LayerPlan", (model, "dsa")),
        ("Shared stands in a LayerPlan alone", (model, Shared(0))),
        (f"the plan must have {num} layers, as the model has; got {num + 1}", (model, LayerPlan.uniform(DSA(), num + 1))),
        ("precision must be one of model, fp8; got 'fp16'", (model, DSA(), "fp16")),
    ]
    if family == "glm_moe_dsa":
        refused.append(("layer 1 has no indexer and shares the selection of layer 0", (model, LayerPlan((DSA(), Dense(), DSA(), DSA())))))
        refused.append(("give it Shared\\(2\\)", (model, LayerPlan((DSA(), DSA(), Dense(), Shared(0))))))
    for message, arguments in refused:
        with pytest.raises(ThresherError, match=message) as caught, thresher.use(*arguments):
            pass
        assert "\n" not in str(caught.value)
    gaps = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    gaps[..., 5, 2] = False
    with thresher.use(model, DSA()), pytest.raises(ThresherError, match="neighbouring columns"):
        model(ids, attention_mask=dict.fromkeys(("indexed_attention", "deepseek_sparse_attention"), gaps))
    with thresher.use(model, MISA(active_heads=HEADS + 1)), pytest.raises(ThresherError, match="active_heads must be at most"):
        model(ids)


def test_another_attention_is_refused():
    model = copy.deepcopy(make_model("deepseek_v32"))
    model.config._attn_implementation_internal = "flash_mla"
    inputs = torch.zeros(1, 2, 32), torch.zeros(1, 2, 24), (torch.zeros(1, 2, 8),) * 2, torch.ones(1, 2, 2, dtype=torch.bool), None
    with thresher.use(model, DSA()), pytest.raises(ThresherError, match="must be eager or sdpa; got flash_mla"):
        indexers(model)[0](*inputs)
