"""The DSA decoder as a machine for requests: any selector, rollback, several requests, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

from thresher.errors import ThresherError
from thresher.models.dsa_decoder import CHUNK, DsaDecoder
from thresher.models.dsa_moe import MoE
from thresher.models.published import random_model, true_shapes
from thresher.ops.dispatch import using
from thresher.selectors import DSA, HISA, MISA, Dense, LayerPlan, MISARerank, Oracle, Random, Shared, Window

from .dsa_peer import FAMILIES, TOPK, rows, text, tiny_model

GLM = "glm_moe_dsa"
each = pytest.mark.parametrize("family", FAMILIES)


def near(got: torch.Tensor, wanted: torch.Tensor, relative: float = 0.02) -> None:
    """One matmul's order of summation or another: in FP8 a number on an edge goes to another value, a 16th away."""
    assert got.shape == wanted.shape
    assert (got.float() - wanted.float()).norm() < relative * wanted.float().norm()


def both(*tokens: int) -> torch.Tensor:
    return torch.tensor(tokens)


@pytest.fixture
def one_thread():
    """Several share out a product by its rows, and so round it by how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@each
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("precision", ["fp8", "fp32"])
def test_rollback_leaves_no_trace(family, precision):
    ids, made = text(100), DsaDecoder(tiny_model(family), 128, precision=precision)
    made.prefill(ids[:30])
    made.run(ids[30:60])
    wanted = made.run(ids[60:])
    made.rollback(30)
    made.run(text(50, seed=9))
    made.rollback(60 - 30)
    made.run(ids[30:60])  # as many at once as before: a product is rounded by how many there are
    assert torch.equal(made.run(ids[60:]), wanted)
    assert made.length() == 100


@pytest.mark.parametrize("selector", [MISA(active_heads=4, block_size=8, topk=TOPK), HISA(block_size=8, num_blocks=6, topk=TOPK)])
def test_rollback_forgets_block_means(selector):
    """A text that goes on otherwise selects by its own blocks, not by those of the text that was there."""
    first, second, model = text(80, seed=1), text(80, seed=2), tiny_model(GLM)
    made, fresh = DsaDecoder(model, 128), DsaDecoder(model, 128)
    made.run(first, selector)
    made.rollback(20)
    made.run(second[20:], selector)
    fresh.run(first[:20], selector)
    fresh.run(second[20:], selector)
    assert rows(made.selections[0]) == rows(fresh.selections[0])


def test_a_random_model_of_true_shapes_runs():
    """As many heads as published, and no file: what a measurement starts from."""
    narrow = {"hidden_size": 64, "q_lora_rank": 32, "vocab_size": 160, "intermediate_size": 64, "moe_intermediate_size": 16}
    config = true_shapes("deepseek_v32", 2, 16, **narrow, first_k_dense_replace=1, index_topk=8)
    made = DsaDecoder(random_model(config), 64)
    hidden = made.run(text(20))
    assert hidden.shape == (20, 64)
    assert hidden.isfinite().all()
    assert made.caches[0].load(torch.tensor([0])).abs().max() > 0
    assert [len(kept) for kept in rows(made.selections[1])] == [min(t, 8) for t in range(1, 21)]
    same, other = (random_model(config, seed=seed) for seed in (0, 1))
    assert torch.equal(same.embed.weight, made.model.embed.weight)
    assert not torch.equal(other.embed.weight, made.model.embed.weight)


@pytest.mark.parametrize(
    "selector",
    [DSA(TOPK), MISA(active_heads=4, block_size=16, topk=TOPK), HISA(block_size=8, num_blocks=6, topk=TOPK), Window(TOPK), Random(TOPK),
     MISARerank(active_heads=4, block_size=16, candidates=40, topk=TOPK), Oracle(TOPK)],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_any_selector_runs_and_decides(selector):
    """Decoded token by token it gives what one pass gives, and it selects as the model's own indexer only where it is that."""
    ids, model = text(100), tiny_model(GLM)
    made, whole, own = (DsaDecoder(model, 128) for _ in range(3))
    made.prefill(ids[:90], selector)
    stepped = torch.cat([made.step(ids[t : t + 1], selector) for t in range(90, 100)])
    near(stepped, whole.step(ids, selector)[90:])
    assert [len(kept) for kept in rows(whole.selections[0])] == [min(t, TOPK) for t in range(1, 101)]
    own.run(ids)
    assert (rows(whole.selections[0]) == rows(own.selections[0])) == isinstance(selector, DSA)


@each
def test_all_that_keep_everything_agree(family):
    ids, model = text(70), tiny_model(family)
    wanted = DsaDecoder(model, 128).run(ids, Dense())
    for selector in (DSA(128), Window(128), Oracle(128), LayerPlan.uniform(Dense(), model.config.num_hidden_layers)):
        torch.testing.assert_close(DsaDecoder(model, 128).run(ids, selector), wanted, rtol=1e-5, atol=1e-5)
    near(DsaDecoder(model, 128, precision="fp32").run(ids, Dense()), wanted, 0.1)


def test_a_plan_names_each_layer():
    """Dense below, DSA above; the layers without an indexer ask as the one before them that has one, so DSA there is sharing."""
    ids, model = text(80), tiny_model(GLM)
    made = DsaDecoder(model, 128)
    made.run(ids, LayerPlan((Dense(), DSA(TOPK), Shared(1), DSA(TOPK), Window(9))))
    assert [len(rows(made.selections[layer])[-1]) for layer in range(5)] == [80, TOPK, TOPK, TOPK, 9]
    assert torch.equal(made.selections[3].indices, made.selections[1].indices)


def test_steps_of_several_requests_are_their_own():
    model, texts = tiny_model("deepseek_v32"), [text(70, seed=1), text(33, seed=2)]
    made = DsaDecoder(model, 128, num_requests=2)
    made.prefill(texts[0][:50], request=0)
    made.prefill(texts[1][:20], request=1)
    mixed = made.step(both(texts[1][20], texts[0][50], texts[0][51]), requests=both(1, 0, 0))
    alone = [DsaDecoder(model, 128).step(ids[:end])[-1] for ids, end in ((texts[1], 21), (texts[0], 51), (texts[0], 52))]
    near(mixed, torch.stack(alone))
    made.rollback(0, request=1)
    near(made.prefill(texts[0][:52], request=1), alone[2])


def test_chunks_do_not_show(monkeypatch):
    ids, model = text(100), tiny_model(GLM)
    wanted = DsaDecoder(model, 128).run(ids)
    monkeypatch.setattr("thresher.models.dsa_decoder.CHUNK", 32)
    made = DsaDecoder(model, 128)
    near(made.run(ids), wanted)
    assert len(ids) < CHUNK
    assert rows(made.selections[0]) == rows(made.selections[0])[-4:]


@pytest.mark.parametrize("precision", ["fp8", "fp32"])
def test_filled_as_by_a_prefill(precision, monkeypatch):
    """Every request has its tokens, in slots of their own, and decodes on from there; equal seeds give equal caches."""
    model, made = tiny_model(GLM), {}
    monkeypatch.setattr("thresher.models.dsa_decoder.FILLED", 64)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        made[name] = DsaDecoder(model, 80, num_requests=2, precision=precision)
        made[name].fill(70, seed)
    one = made["one"]
    assert (one.length(0), one.length(1)) == (70, 70)
    held = torch.cat([one.caches[4].load(one.table.slots(request, torch.arange(70))) for request in (0, 1)])
    assert (held.std(1) > 0.5).all(), "no token is left out"
    assert len(held.sum(1).unique()) == 140
    hidden = {name: each.run(both(5, 6), requests=both(0, 1)) for name, each in made.items()}
    assert torch.equal(hidden["one"], hidden["same"])
    assert not torch.equal(hidden["one"], hidden["other"])
    assert [len(kept) for kept in rows(one.selections[4])] == [TOPK, TOPK]
    with pytest.raises(ThresherError, match="only an empty decoder can be filled; got 142 tokens held"):
        one.fill(70)
    for length in (0, 81):
        with pytest.raises(ThresherError, match=r"length must lie in 1\.\.80"):
            DsaDecoder(model, 80).fill(length)


def test_kernels_take_what_the_decoder_gives_them():
    """Every operation as a Triton kernel, interpreted: the same bytes in the caches, the same sets."""
    pytest.importorskip("triton")
    from ..interpreter import mend

    mend()
    ids, model = text(3), tiny_model("deepseek_v32", torch.bfloat16)
    made, wanted = DsaDecoder(model, 64), DsaDecoder(model, 64)
    expected = wanted.run(ids)
    with using("triton"):
        near(made.run(ids), expected)
    assert torch.equal(made.caches[0].latents.data, wanted.caches[0].latents.data)
    assert torch.equal(made.caches[0].keys.pages, wanted.caches[0].keys.pages)
    assert rows(made.selections[0]) == rows(wanted.selections[0])


def test_bf16_weights_run_close_to_fp32():
    ids = text(30)
    wanted = DsaDecoder(tiny_model(GLM), 64).run(ids, Dense())
    got = DsaDecoder(tiny_model(GLM, torch.bfloat16), 64).run(ids, Dense())
    assert got.dtype == torch.bfloat16
    near(got, wanted, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.run(torch.zeros(0, dtype=torch.int64)), "there must be a token"),
        (lambda d: d.run(both(1, 160)), r"ids must lie in \[0, 160\)"),
        (lambda d: d.run(both(1, 2), requests=both(0)), r"ids and requests must be int64 \[T\]"),
        (lambda d: d.run(both(1), requests=both(2)), r"requests must lie in \[0, 2\)"),
        (lambda d: d.run(text(49)), "text of request 0 must fit its 64 tokens; got 69"),
        (lambda d: d.run(both(1), LayerPlan.uniform(DSA(), 3)), "plan must name 5 layers"),
        (lambda d: d.prefill(both(1)), "prefill starts a request"),
        (lambda d: d.rollback(21), r"rollback length must lie in \[0, 20\]"),
        (lambda d: d.run(both(1), LayerPlan((DSA(), DSA(), Shared(1), Shared(1), Oracle(0)))), "topk must be an int"),
    ],
)
def test_what_it_refuses_leaves_it_as_it_was(call, message):
    ids = text(21)
    made = DsaDecoder(tiny_model(GLM), 64, num_requests=2)
    made.prefill(ids[:20])
    with pytest.raises(ThresherError, match=message):
        call(made)
    assert (made.length(0), made.length(1)) == (20, 0)
    near(made.step(ids[20:])[-1], DsaDecoder(tiny_model(GLM), 64).prefill(ids))


def test_a_failure_in_a_late_layer_forgets_all_requests(monkeypatch):
    made = DsaDecoder(tiny_model(GLM), 64, num_requests=2)
    made.prefill(text(10), request=1)
    monkeypatch.setattr(made.caches[4], "attend", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.step(both(5, 6), requests=both(0, 1))
    assert (made.length(0), made.length(1)) == (0, 10)


def test_fp32_refuses_what_would_read_fp8_keys():
    made = DsaDecoder(tiny_model(GLM), 64, precision="fp32")
    with pytest.raises(ThresherError, match=r"with precision fp32 a selector must be one of DSA, Dense.*got MISA"):
        made.run(text(4), MISA(active_heads=4))
    assert made.length() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"capacity": 2561}, "capacity must lie in 1..2560"), ({"precision": "fp16"}, "precision must be one of fp8, fp32; got 'fp16'"),
     ({"num_requests": 0}, "num_requests must be at least 1")],
)  # fmt: skip
def test_what_the_constructor_refuses(options, message):
    with pytest.raises(ThresherError, match=message):
        DsaDecoder(tiny_model(GLM), **{"capacity": 64, **options})


@each
def test_layers_compile_whole(family):
    """What lies between the exchanges is one graph, and the same arithmetic."""
    model = copy.deepcopy(tiny_model(family))
    for layer in model.layers:
        if not isinstance(layer.mlp, MoE):  # which loops over experts on a CPU
            layer.compile(backend="aot_eager")
    got, wanted = (DsaDecoder(made, 64).run(text(20)) for made in (model, tiny_model(family)))
    near(got, wanted, 1e-3)
