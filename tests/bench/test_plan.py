"""``thresher plan``: memory by hand, what must grow, what is marked, and the command over the repository's own records."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from thresher import cli
from thresher.bench.plan import run_plan, text_of
from thresher.bench.plan_exchange import MEASURED, Exchange
from thresher.bench.plan_fit import SELECTORS, Error, load_records
from thresher.bench.plan_models import MODELS
from thresher.bench.plan_rows import (
    INDEXER,
    ROW_PARTS,
    WAYS,
    Settings,
    batches_of,
    best,
    exchanged,
    make_plan,
    rank_step,
    size_of,
)
from thresher.bench.record import append
from thresher.distributed import local_topk
from thresher.errors import ThresherError

from .test_plan_fit import synthetic
from .test_record import ALONE, make

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"
V32, GLM = MODELS["deepseek-v3.2"], MODELS["glm-5"]
DSA, MISA, HISA = SELECTORS["dsa"], SELECTORS["misa"], SELECTORS["hisa"]
MIB = 2**20


@pytest.fixture(scope="module")
def planned():
    made = {}

    def plan(**changes):
        settings = Settings(**{"model": "deepseek-v3.2", "records": RECORDS, **changes})
        return made.setdefault(settings, make_plan(settings))

    return plan


def test_the_cache_of_a_million_tokens_by_hand():
    """1048576 tokens: latents 656 MiB a layer, index keys 132 MiB; block means of HISA one key in 128, of MISA one in 1024."""
    assert V32.cache_bytes(DSA, MIB) == 61 * (656 + 132) * MIB
    assert V32.cache_bytes(HISA, MIB) == 61 * (656 * MIB + 132 * (MIB + 8192))
    assert V32.cache_bytes(MISA, MIB) == 61 * (656 * MIB + 132 * (MIB + 1024))
    assert V32.cache_bytes(MISA, 1) == 61 * (656 + 132 * 2), "the block begun has room for its mean"
    assert MODELS["glm-5.2"].cache_bytes(DSA, MIB) == (78 * 656 + 21 * 132) * MIB, "layers without an indexer hold no index keys"


def test_weights_are_the_published_ones():
    """671B and 744B parameters are published; to half a percent, since norms and others are left out."""
    for model, billions in ((V32, 671), (GLM, 744)):
        assert sum(model.parameters) == pytest.approx(1e9 * billions, rel=5e-3)
    split, whole = V32.parameters
    embeddings = 2 * 129280 * 7168
    assert V32.weight_bytes(1) == split + whole + embeddings
    assert V32.weight_bytes(8) == pytest.approx((split + embeddings) / 8 + whole)
    indexer = 1536 * 64 * 128 + 7168 * (128 + 64)
    assert whole == 61 * (indexer + 7168 * (1536 + 576)) + 58 * 7168 * 256


def test_dealt_ways_hold_a_share_of_the_tokens(planned):
    rows = {(row.way, row.selector): row for row in planned(batch="1").rows}
    for name in SELECTORS:
        whole = rows["replicated", name].cache_bytes
        for way in ("exact", "idsa"):
            assert rows[way, name].cache_bytes == pytest.approx(whole / 8, rel=1e-5)
    assert rows["idsa", "dsa"].cache_bytes * 8 == rows["replicated", "dsa"].cache_bytes
    assert rank_step(V32, "idsa", "dsa", 1001, 1, 8).lengths == (126,), "the fullest rank"


def test_memory_of_a_row_and_the_largest_batch(planned):
    plan = planned(batch="1,4,8")
    assert plan.room_bytes == 0.9 * 141e9
    for row in plan.rows:
        assert row.gpu_bytes == plan.weight_bytes + row.batch * row.cache_bytes
        assert row.fits == (row.batch <= row.largest_batch) == (row.gpu_bytes <= plan.room_bytes)
    wide = planned(gpus=16, context="128k", batch="1..64", selector=("dsa",))
    (largest,) = {row.largest_batch for row in wide.rows if row.way == "replicated"}
    assert largest == int((0.9 * 141e9 - V32.weight_bytes(16)) // (61 * 788 * 131072))
    fitting = [row.batch for row in wide.rows if row.way == "replicated" and row.fits]
    assert fitting == [1, 2, 4, 8], "and no larger one after one that does not"


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_more_context_and_more_requests_never_take_less(planned, gpus):
    contexts = ("8k", "32k", "100k", "128k", "512k", "1m")
    plans = [planned(gpus=gpus, context=context, batch="1..64") for context in contexts]
    for shorter, longer in pairwise(plans):
        for a, b in zip(shorter.rows, longer.rows, strict=True):
            assert (a.batch, a.way, a.selector) == (b.batch, b.way, b.selector)
            assert a.layer_us <= b.layer_us * (1 + 1e-12)  # where a gather takes longer than selecting, they add up to it in any case
            assert a.cache_bytes < b.cache_bytes
            assert a.largest_batch >= b.largest_batch
    for plan in plans:
        for way in ("replicated", "exact", "idsa"):
            times = [row.layer_us for row in plan.rows if row.way == way and row.selector == "dsa"]
            assert times == sorted(times)
            assert times[0] < times[-1]


def test_what_each_way_runs():
    m = local_topk(2048, 8)
    replicated, exact, idsa = (rank_step(V32, way, "hisa", MIB, 3, 8) for way in ("replicated", "exact", "idsa"))
    assert (replicated.lengths, replicated.attention_heads, replicated.columns, replicated.attended) == ((MIB,) * 3, 16, 2048, 2048)
    assert (idsa.lengths, idsa.attention_heads, idsa.columns, idsa.attended) == ((MIB // 8,) * 3, 128, m, m)
    assert (exact.lengths, exact.attention_heads, exact.columns, exact.attended) == ((MIB // 8,) * 3, 128, 2048, m)
    assert replicated.selector == HISA
    assert idsa.selector == HISA.shard(8, m)
    assert exact.selector == HISA.shard(8, 2048)
    short = rank_step(V32, "replicated", "dsa", 1000, 1, 8)
    assert short.attended == 1000, "no more than there are"


def test_bytes_exchanged_by_hand():
    """Two requests on 8 GPUs: 16 heads each. Queries 576 bf16; outputs 512 bf16 and a log-sum-exp; candidates 8 bytes."""
    assert exchanged(V32, "replicated", 2, 8) == {}
    assert exchanged(V32, "idsa", 2, 8) == {"gather": 2 * 16 * 1152, "merge": 2 * 16 * 1028}
    assert exchanged(V32, "exact", 2, 8)["candidates"] == 2 * 2048 * 8


def test_an_exchange_is_what_was_measured_and_a_link_adds_to_it():
    for kind, parts in MEASURED.items():
        pair = Exchange(2, kind=kind)
        for part, size in (("gather", 64 * 576 * 2), ("merge", 64 * (512 * 2 + 4))):
            assert list(parts[part]) == [size, 8 * size, 32 * size]
            for measured, us in parts[part].items():
                assert pair.time_us(part, measured) == pytest.approx(us, rel=0.2)
                assert pair.outside(part, measured) == []
    assert Exchange(1).time_us("merge", 1e9) == 0.0
    near, far = Exchange(8), Exchange(16, nodes=2, latency_us=5.0, bandwidth=50e9)
    for part in ("gather", "merge"):
        assert far.time_us(part, 1e5) - near.time_us(part, 1e5) == pytest.approx(5.0 + 1e6 * 8 * 1e5 / 50e9)
        assert any("16 ranks" in text for text in far.outside(part, 1e5))
        fixed, slope = near.coefficients(part)
        assert near.time_us(part, 1e5) == pytest.approx(fixed + slope * 7e5)


def test_a_merge_is_not_a_gather():
    """Candidates are; over NCCL a merge of as few bytes takes three times as long, over symmetric memory less."""
    for kind, low, high in (("symmetric", 0.6, 0.9), ("nccl", 2.5, 3.5)):
        pair = Exchange(2, kind=kind)
        assert low < pair.time_us("merge", 1e5) / pair.time_us("gather", 1e5) < high
        assert pair.time_us("candidates", 1e5) == pair.time_us("gather", 1e5)
        assert pair.outside("merge", 70000) == [] != pair.outside("candidates", 70000) == pair.outside("gather", 70000)


def test_parts_of_a_row_add_up(planned):
    for row in planned(batch="1,4").rows:
        assert list(row.parts_us) == list(ROW_PARTS)
        assert row.layer_us == pytest.approx(sum(row.parts_us.values()))
        assert row.step_us == pytest.approx(61 * row.layer_us)
        assert row.tokens_per_second == pytest.approx(1e6 * row.batch / row.step_us)
        second = {"candidates", "topk", "to_slots"}
        none = {"replicated": second | {"merge"}, "idsa": second, "exact": set()}[row.way] | {"gather"}
        assert {part for part, us in row.parts_us.items() if us == 0} == none


def test_queries_meet_while_tokens_are_selected(planned):
    """Over symmetric memory only what takes longer than selecting counts; NCCL gathers them first."""
    late = 0
    for kind, batch, context in (("nccl", 4, "1m"), ("symmetric", 4, "1m"), ("symmetric", 4096, "16k")):
        asked = planned(batch=str(batch), context=context, exchange=kind, gpus=8, selector=("dsa",))
        (row,) = (row for row in asked.rows if row.way == "idsa")
        whole, meanwhile = Exchange(8, kind=kind).time_us("gather", batch * 16 * 1152), row.parts_us["select"]
        assert row.parts_us["gather"] == pytest.approx(whole if kind == "nccl" else max(0.0, whole - meanwhile))
        late += kind == "symmetric" and whole > meanwhile
    assert late == 1


def test_layers_without_an_indexer_skip_its_parts(planned):
    for row in planned(model="glm-5.2", batch="4").rows:
        rest = sum(us for part, us in row.parts_us.items() if part not in INDEXER)
        assert row.step_us == pytest.approx(21 * row.layer_us + 57 * rest)


def test_what_lies_outside_the_records_is_marked(tmp_path):
    """Records of 1 to 128 requests, 16k to 1m, 64 index heads, 64 and 128 attention heads; the second top-k of another GPU."""
    for record in synthetic():
        append(tmp_path / "a.jsonl", replace(record, gpu="NVIDIA H100") if record.op == "keep_best" else record)

    def marks(**changes):
        rows = make_plan(Settings(**{"model": "deepseek-v3.2", "records": tmp_path, "selector": ("dsa", "hisa"), **changes})).rows
        return {(row.batch, row.way, row.selector): row.outside for row in rows}

    wide = marks(batch="1,64,256", context="1m")
    assert set(wide[1, "replicated", "dsa"]) == {"h"}, "16 attention heads were not timed"
    assert wide[1, "replicated", "dsa"]["h"] == ["attend: 16 attention heads, measured 64 to 128"]
    assert set(wide[64, "replicated", "dsa"]) == {"h", "n"}, "64 x 1m are more bytes than any record's"
    assert "b" in wide[256, "idsa", "dsa"]
    assert set(wide[1, "idsa", "dsa"]) == {"k", "x"}
    assert set(wide[1, "exact", "dsa"]) == {"g", "k", "x"}
    assert any("num_blocks=9, measured 64" in text for text in wide[1, "idsa", "hisa"]["k"])
    assert marks(gpus=1, batch="8", context="128k") == {(8, "replicated", "dsa"): {}, (8, "replicated", "hisa"): {}}, "one GPU has one way"
    assert marks(gpus=1, batch="1", context="4m")[1, "replicated", "dsa"]["c"] == [
        "select dsa: 4194304 tokens of a request, measured 16384 to 1048576"
    ]
    assert "h" in marks(model="glm-5", gpus=1, batch="8", context="128k")[8, "replicated", "dsa"], "32 index heads were not timed"


def test_the_best_way_is_the_fastest_that_fits(planned):
    plan = planned(batch="1,4,64")
    for (batch, name), ways in best(plan.rows).items():
        fitting = [row for row in plan.rows if row.batch == batch and row.selector == name and row.fits]
        assert sorted(fitting, key=lambda row: row.step_us) == ways
        assert (ways == []) == (batch == 64)


def test_sizes_and_batches_are_read():
    assert (size_of("1m"), size_of("128K"), size_of("4096")) == (MIB, 131072, 4096)
    assert batches_of("1..64") == [1, 2, 4, 8, 16, 32, 64]
    assert batches_of("3..20") == [4, 8, 16]
    assert batches_of("8") == [8]
    assert batches_of("16,1,4,4") == [1, 4, 16]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt"], "--model must be one of deepseek-v3.2, glm-5"),
        (["--context", "many"], "--context must be"),
        (["--context", ""], "--context must be"),
        (["--context", "0"], "--context must be"),
        (["--batch", "0"], "--batch must be like"),
        (["--batch", "1..x"], "--batch must be like"),
        (["--batch", "1..9999999"], "batches are 1 to"),
        (["--batch", "9..15"], "must hold a power of two"),
        (["--gpus", "6"], "--gpus must divide the 128 attention heads"),
        (["--gpus", "0"], "--gpus must divide"),
        (["--nodes", "3"], "nodes must divide 8 GPUs"),
        (["--nodes", "2"], "need the link's latency"),
        (["--nodes", "2", "--link-latency-us", "5", "--link-bandwidth-gbs", "0"], "need the link's latency"),
        (["--nodes", "2", "--link-latency-us", "inf", "--link-bandwidth-gbs", "50"], "need the link's latency"),
        (["--link-latency-us", "5"], "must come with several nodes"),
        (["--selector", "window"], "--selector must be among dsa, misa, hisa"),
        (["--exchange", "mail"], "the exchange must be one of symmetric, nccl"),
        (["--memory-share", "1.5"], "--memory-share must lie in"),
        (["--gpu", "b200"], "named 'b200'; got NVIDIA"),
        (["--records", "no-such-folder"], "--records must name"),
        (["--json", "no-such-folder/plan.json"], "--json must name a file in a folder that exists"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    given = ["--model", "deepseek-v3.2"] if "--model" not in arguments else []
    records = ["--records", str(RECORDS)] if "--records" not in arguments else []
    assert cli.main(["plan", *given, *records, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


def test_a_gpu_of_unknown_memory(tmp_path):
    append(tmp_path / "a.jsonl", make(gpu="NVIDIA B200", **ALONE))
    with pytest.raises(ThresherError, match="must be one of known memory: h100, h200; got NVIDIA B200"):
        make_plan(Settings("glm-5", gpu="b200", records=tmp_path))


def test_the_command_over_the_repository_s_own_records(tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = ["--model", "deepseek-v3.2", "--gpus", "8", "--context", "1m", "--batch", "1..8", "--json", str(file)]
    assert cli.main(["plan", "--records", str(RECORDS), *arguments]) == 0
    out = capsys.readouterr().out
    plan = json.loads(file.read_text())
    assert len(plan["rows"]) == 4 * 3 * 3
    for row in plan["rows"]:
        cells = [str(row["batch"]), row["way"], row["selector"], f"{row['layer_us']:.1f}", f"{row['tokens_per_second']:.0f}"]
        assert any(line.split()[:3] == cells[:3] and set(cells) <= set(line.split()) for line in out.splitlines())
    for batch in (1, 2, 4, 8):
        assert sum(line.startswith(f"batch {batch}: ") for line in out.splitlines()) == 1
    assert "a pair of GPUs" in out
    assert out.count("gather, symmetric: ") == out.count("merge, symmetric: ") == 1
    assert "mixtures of experts, all-reduces and sampling are not in them" in out
    errors = [error["relative"] for error in plan["layers"]]
    worst = max(errors, key=abs)
    assert len(errors) >= 8
    assert f"{worst:+.1%}" in next(line for line in out.splitlines() if line.startswith("whole layer"))
    assert list(plan["layers_over_ranks"]) == list(WAYS)
    for way, found in plan["layers_over_ranks"].items():
        worst = max((error["relative"] for error in found), key=abs)
        line = next(line for line in out.splitlines() if line.startswith(f"layer over ranks, {way} "))
        assert {str(len(found)), f"{median(abs(error['relative']) for error in found):.1%}", f"{worst:+.1%}"} <= set(line.split())
    for part, fitted in plan["fits"].items():
        assert all(value >= 0 for value in fitted["coefficients"].values())
        assert any(line.startswith(part) for line in out.splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"], "no temporary file is left"


def test_the_repository_s_layers_are_predicted_within_a_quarter(planned):
    """What docs/plan.md says of the error, in round numbers; the text has the figures."""
    plan = planned(batch="1")
    assert max(abs(error.relative) for error in plan.layers) < 0.25
    assert {error.case.split()[1] for error in plan.layers} >= {"dsa", "hisa"}
    for errors in plan.over_ranks.values():
        assert len(errors) >= 18
        assert max(abs(error.relative) for error in errors) < 0.25


def test_ways_too_close_to_call_are_marked(planned):
    """By the worst layer over ranks; by the worst whole layer where there are none over ranks."""
    plan = planned(batch="1", selector=("dsa",))
    first, then = best(plan.rows)[1, "dsa"][:2]
    apart = then.step_us / first.step_us - 1
    for over, layers, what in (
        ({"idsa": (0.01, -1.1 * apart), "exact": (0.02,)}, (0.9 * apart,), "a layer over ranks"),
        ({"idsa": (0.9 * apart,)}, (1.1 * apart,), None),
        ({}, (0.01, 1.1 * apart), "a whole layer"),
    ):
        errors = {way: tuple(Error("a", 1.0, 1 + off) for off in offs) for way, offs in over.items()}
        text = text_of(replace(plan, over_ranks=errors, layers=tuple(Error("a", 1.0, 1 + off) for off in layers)))
        assert (f"{1e-3 * then.step_us:.2f}~" in text) == (what is not None)
        assert (f"~ closer than the worst error of {what}, {1.1 * apart:.0%}: measure both" in text) == (what is not None)
        assert ("layer over ranks, exact" in text) == ("exact" in over), "a way without such records has no line"


def test_other_records_give_other_times(tmp_path):
    """Nothing is held in the program: with every H200 record twice as slow, every part but the exchanges takes twice as long."""
    for record in load_records(RECORDS):
        times = {name: 2 * us for name, us in record.time_us.items()}
        append(tmp_path / "a.jsonl", replace(record, time_us=times, peer=None, peer_time_us=None, ratio=None))
    asked = Settings("glm-5", batch="4", selector=("dsa", "misa"))
    slow = run_plan(replace(asked, records=tmp_path), lambda text: None)
    for once, twice in zip(make_plan(replace(asked, records=RECORDS)).rows, slow.rows, strict=True):
        for part in ROW_PARTS:
            factor = 1 if part in ("gather", "candidates", "merge") else 2
            assert twice.parts_us[part] == pytest.approx(factor * once.parts_us[part]), part
