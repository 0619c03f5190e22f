"""A model's step of decoding: check, parts, memory against the plan, and records; tiny shapes on a CPU."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
import torch

from thresher import cli
from thresher.bench import model, timing
from thresher.bench.model import FAMILY, Settings, config_of, planned_bytes, run_model, shape_of, useful_work
from thresher.bench.model_plot import by_panel
from thresher.bench.model_step import ModelStep, layers_of, to_all, without_indexers
from thresher.bench.plan_models import MODELS
from thresher.bench.record import read
from thresher.errors import ThresherError
from thresher.models.dsa_config import DsaConfig, parse_config
from thresher.models.dsa_decoder import DsaDecoder
from thresher.models.dsa_layers import DsaModel
from thresher.models.published import PUBLISHED, random_model
from thresher.selectors import DSA, HISA, Dense, Random

TINY = Settings("deepseek-v3.2", experts=8, context=("96",), device="cpu", repeats=1)
FEW_BLOCKS = "hisa:block_size=8,num_blocks=4"
TRUE = replace(TINY, device="cuda", experts=16)


def test_every_batch_context_and_selector_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "WARM_UPS", 0)
    lines, out = [], tmp_path / "a.jsonl"
    asked = replace(TINY, context=("64", "128"), batch=(2, 1), selector=("dense", "dsa", FEW_BLOCKS), out=out)
    records = run_model(asked, lines.append)
    assert read(out) == records
    cases = [f"model-deepseek-v3.2-{batch}x{context}" for batch in (2, 1) for context in (64, 128)]
    assert [(r.case, r.selector) for r in records] == [(case, name) for case in cases for name in ("dense", "dsa", "hisa")]
    for record, line in zip(records, lines, strict=True):
        told, batch = record.settings, int(record.case.split("-")[3].partition("x")[0])
        assert list(told["parts_us"]) == ["inner", "mlp", "experts", "step"]
        assert told["tokens_per_second"] == pytest.approx(1e6 * batch / told["parts_us"]["step"]["p50"], rel=1e-3)
        for name, held in told["bytes"].items():
            assert held == pytest.approx(told["planned_bytes"][name], rel=0.1)
        assert (record.op, record.impl, record.floor_us) == ("attention", "reference", None)
        assert line.startswith(f"{record.case} {record.selector}: a layer's attention {record.time_us['p50']:.1f} us, inner ")
        assert "tokens/s; weights 0.0" in line
    assert {r.settings["bytes"]["caches"] for r in records[3:6]} == {2 * 2 * 128 * (656 + 132)}, "2 requests and layers"
    assert by_panel(records) == {}, "times of a CPU are not drawn"


def test_glm_and_a_single_layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (record,) = run_model(replace(TINY, model="glm-5", layers=1, experts=6, selector=("dsa",)), lambda line: None)
    assert list(record.settings["parts_us"]) == ["inner", "experts", "step"], "its one layer has experts"
    assert list(tmp_path.iterdir()) == [], "nothing is written on a CPU unless asked"


@pytest.mark.parametrize("name", FAMILY)
def test_the_planner_knows_a_published_config(name):
    same = {field: getattr(MODELS[name], field) for field in ("title", "source")}
    assert replace(shape_of(parse_config(PUBLISHED[FAMILY[name]])), **same) == MODELS[name]


@pytest.mark.parametrize("name", FAMILY)
def test_true_shapes_weigh_what_is_planned(name):
    config = config_of(replace(TRUE, model=name), 2**19)
    made = random_model(config, device="meta")
    planned = planned_bytes(config, HISA(), 2**19, 8)
    assert sum(p.nbytes for p in made.parameters()) == pytest.approx(planned["weights"], rel=1e-3)
    assert planned["caches"] == 8 * 2 * (2**19 * (656 + 132) + 2**12 * 132)
    assert planned["peak"] == planned["weights"] + planned["caches"]
    assert [layer.attention.indexer is not None for layer in layers_of(made)] == [True, True]
    assert config.sparse_mlp == (False, True)


def test_useful_work_of_true_shapes():
    attention = layers_of(random_model(config_of(TRUE, 2**17), device="meta"))[0].attention
    heads, long = 2 * 128 * (576 + 512), 2**17
    dense, sparse = (useful_work(attention, selector, long, 1) for selector in (Dense(), DSA()))
    indexer = 1536 * 8192 + 7168 * 128 + 7168 * 64
    assert sparse[0] - dense[0] == pytest.approx(2 * (indexer + 64 * 128 * long) - heads * (long - 2048), rel=1e-4)
    assert sparse[1] - dense[1] == pytest.approx(2 * indexer + 2 * 7168 * 64 + 132 * long - 656 * (long - 2048), rel=1e-4)
    flops, moved = useful_work(attention, DSA(), long, 8)
    assert flops == 8 * sparse[0]
    assert moved - sparse[1] == 7 * (132 * long + 656 * 2048), "weights are read once"


def test_a_rank_has_a_share_of_the_work_and_of_the_memory():
    """Over 8 ranks: dealt, an eighth of the tokens with all heads; replicated, all tokens with an eighth of the heads."""
    config, long = config_of(TRUE, 2**17), 2**17
    with torch.device("meta"):
        attention = layers_of(DsaModel(config, torch.bfloat16, Eighth()))[0].attention
    replicated, dealt = (useful_work(attention, DSA(), long, 1, 8, dealt) for dealt in (False, True))
    assert replicated[0] - dealt[0] == pytest.approx(2 * 64 * 128 * (long - long // 8), rel=1e-4), "as many scores for as many heads fewer"
    assert replicated[1] - dealt[1] == pytest.approx((132 * long + 656 * 2048) * 7 / 8, rel=1e-4)
    whole, split, tokens = (planned_bytes(config, DSA(), long, 4, *share) for share in ((1, False), (8, False), (8, True)))
    assert split["weights"] == tokens["weights"] < 0.2 * whole["weights"]
    assert split["caches"] == whole["caches"] == 8 * tokens["caches"]
    assert tokens["peak"] == tokens["weights"] + tokens["caches"]


class Eighth:
    rank, ranks = 3, 8


def decoder(length=96, requests=2):
    made = DsaDecoder(random_model(config_of(TINY, 96)), 96, requests)
    made.fill(length)
    return made


@pytest.mark.parametrize("selector", [Dense(), DSA(24)])
def test_a_step_is_the_decoders_own_and_leaves_no_trace(selector):
    """``fill`` and one token appended, against the last token in its place."""
    ids, made, other = torch.tensor([3, 4]), decoder(), decoder()
    with without_indexers(made.model) if selector == Dense() else nullcontext():
        step = ModelStep(made, selector, ids)
        got = step.whole()
        assert step.attention(0).shape == step.mlp(1).shape == (2, 192)
        assert step.inner(1).shape == (2, 4, 512)
        assert torch.equal(step.whole(), got)
    assert made.length(0) == made.length(1) == 96
    for request in (0, 1):
        other.rollback(95, request)
    torch.testing.assert_close(got, other.step(ids, selector, torch.tensor([0, 1])), rtol=1e-2, atol=1e-2)


def test_indexers_come_back():
    made = random_model(config_of(TINY, 96), device="meta")
    held = [layer.attention.indexer for layer in layers_of(made)]
    with suppress(ZeroDivisionError), without_indexers(made):
        assert [layer.attention.indexer for layer in layers_of(made)] == [None, None]
        raise ZeroDivisionError
    assert [layer.attention.indexer for layer in layers_of(made)] == held


@pytest.mark.parametrize("wrong", ["bits", "logits", "selection", "dense"])
def test_a_red_check_gives_no_time(wrong, monkeypatch):
    monkeypatch.setattr(model, "interleave", lambda *a: pytest.fail("it was timed"))
    whole, plan = ModelStep.whole, DsaConfig.plan
    if wrong == "bits":
        monkeypatch.setattr(ModelStep, "whole", lambda self: whole(self) + 0.01 * torch.rand(()))
    elif wrong == "logits":
        monkeypatch.setattr(ModelStep, "whole", lambda self: 1.03 * whole(self))
    elif wrong == "selection":
        monkeypatch.setattr(DsaConfig, "plan", lambda self, selector: plan(self, Random(24)))
    else:
        monkeypatch.setattr("thresher.bench.model_step.to_all", lambda made, slots, held: to_all(made, slots, held[:, ::8]))
    words = {"bits": "a second run gives other bits", "logits": "logits are off by 0.0", "selection": "of a selection is not selected"}
    name = "dense" if wrong == "dense" else "dsa"
    with pytest.raises(ThresherError, match=rf"a step by {name} must agree .*{words.get(wrong, 'logits are off')}.*no time is taken"):
        run_model(replace(TINY, selector=(name,)), print)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"model": "deepseek-v2"}, "--model must be one of deepseek-v3.2, glm-5"), ({"context": ("1",)}, "--context must name contexts"),
     ({"context": ("many",)}, "--context must be a number"), ({"batch": (0,)}, "--batch must name"), ({"batch": ()}, "--batch must name"),
     ({"selector": ("bogus",)}, "a selector must be one of"), ({"selector": ()}, "--selector must name"),
     ({"layers": 0}, "num_hidden_layers must be"), ({"experts": 7}, "n_group must part")],
)  # fmt: skip
def test_options_that_do_not_fit(changes, words, monkeypatch):
    monkeypatch.setattr(model, "random_model", lambda *a: pytest.fail("a model was made first"))
    with pytest.raises(ThresherError, match=words):
        run_model(replace(TINY, **changes), print)


def test_the_command(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(model, "run_model", lambda settings, write, ranks: asked.append(settings))
    arguments = ["--model", "glm-5", "--context", "8k", "1m", "--batch", "1", "8", "--selector", "dsa", "--out", str(tmp_path / "a")]
    assert cli.main(["bench-model", "--device", "cpu", *arguments]) == 0
    assert asked == [Settings("glm-5", context=("8k", "1m"), batch=(1, 8), selector=("dsa",), device="cpu", out=tmp_path / "a")]
    assert cli.main(["bench-model", "--device", "cpu"]) == 0
    assert asked[1] == Settings("deepseek-v3.2", device="cpu")
    if not torch.cuda.is_available():
        assert cli.main(["bench-model"]) == 2
        assert "--device cuda needs a CUDA device" in capsys.readouterr().err
