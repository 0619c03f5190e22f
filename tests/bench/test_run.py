"""The command's work on a CPU: check, time, record; and that a red check gives no time."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from thresher import cli
from thresher.bench import check, run, work
from thresher.bench.cases import parse_case
from thresher.bench.floor import Ceilings, floor_us, measure_ceilings, useful_work
from thresher.bench.peer_steps import Prepared
from thresher.bench.peers import PEERS, Peer, peer_reason
from thresher.bench.record import read
from thresher.bench.run import Settings, run_bench
from thresher.bench.work import make_work
from thresher.errors import ThresherError
from thresher.ops import dispatch, paged_index_score
from thresher.ops.score_select.marks import keep
from thresher.selectors import DSA, HISA, MISA, MISARerank
from thresher.types import PartialAttention, Selection

CPU = torch.device("cpu")
DECODE, PREFILL = "decode-2x300-h4-d64-k32", "prefill-6x300-h4-d64-k32"
LAYER, MLA = "layer-2x300-h4-d64-k32", "mla-decode-2-h4-k32-n256"


@pytest.fixture(autouse=True)
def not_interpreting(monkeypatch):
    """Other tests of the same process set it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def bench(*cases, **options):
    lines = []
    return run_bench(Settings(tuple(cases), device="cpu", repeats=2, **options), lines.append), lines


def test_every_kind_of_case_runs_and_is_recorded(tmp_path):
    out = tmp_path / "a.jsonl"
    records, lines = bench(DECODE, PREFILL, LAYER, MLA, out=out)
    assert read(out) == records
    assert [record.case for record in records] == [DECODE, PREFILL, LAYER, MLA]
    assert [record.op for record in records] == ["select", "select", "layer", "sparse_attend_mla_fp8"]
    assert [record.selector for record in records] == ["dsa", "dsa", "dsa", None]
    for record, line in zip(records, lines, strict=True):
        assert record.impl == "reference"
        assert (record.floor_us, record.peak_bytes, record.peer, record.ratio) == (None, None, None, None)
        assert record.settings["timing"] == "clock"
        assert record.gpu.startswith("cpu")
        assert line.startswith(f"{record.case} {record.op} ")
        assert f"{record.time_us['p50']:.1f} us" in line


def test_a_check_alone_takes_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "interleave", lambda *a: pytest.fail("it was timed"))
    out = tmp_path / "a.jsonl"
    records, lines = bench(DECODE, LAYER, MLA, inputs=("normal",), out=out, check_only=True)
    assert (records, out.exists()) == ([], False)
    ops = (f"{DECODE} select dsa", f"{LAYER} layer dsa", f"{MLA} sparse_attend_mla_fp8")
    assert lines == [f"{what} normal: right, and not timed" for what in ops]
    monkeypatch.setattr(run, "check_work", lambda work: "wrong")
    with pytest.raises(ThresherError, match="got: wrong; no time is taken on a red check"):
        bench(DECODE, check_only=True)


@pytest.mark.parametrize(
    "selector",
    ["misa:active_heads=2,block_size=32", "misa_rerank:active_heads=2,block_size=32,candidates=64", "hisa:block_size=16,num_blocks=4"],
)
def test_selectors(selector):
    for record in bench(DECODE, PREFILL, selector=selector)[0]:
        assert record.selector == selector.partition(":")[0]
        assert record.settings["topk"] == 32


def test_cruel_stands_for_three_and_parts_can_be_timed():
    records, _ = bench(DECODE, inputs=("normal", "cruel"), op="index_score")
    assert [record.inputs for record in records] == ["normal", "cruel-plateaus", "cruel-ascending", "cruel-descending"]
    assert {record.op for record in bench(PREFILL, DECODE, op="select_topk")[0]} == {"select_topk"}
    assert bench(PREFILL, op="index_score")[0][0].selector is None


def test_on_a_cpu_nothing_is_written_unless_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench(DECODE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inputs": ("gentle",)}, "inputs of decode-2x300-h4-d64-k32 must be one of normal"),
        ({"op": "layer"}, "the op of a decode case must be one of select, index_score, select_topk, keep_best"),
        ({"op": "sparse_attend_mla"}, "the op of a decode case"),
        ({"op": "keep_best"}, "contexts of keep_best must be the 32 candidates of each of several ranks"),
        ({"impl": "fast"}, "impl must be one of auto, triton, reference"),
        ({"selector": "bogus"}, "a selector must be one of"),
        ({"selector": "hisa:block_size=1,num_blocks=2"}, "must be at least topk=32"),
        ({"peer": "cublas"}, "a peer must be one of deep_gemm"),
        ({"peer": "flash_mla"}, "flash_mla is timed on sparse_attend_mla_fp8, sparse_attend_mla"),
        ({"timing": "graph", "repeats": 0}, "repeats"),
    ],
)
def test_options_that_do_not_fit(options, words, monkeypatch):
    if "repeats" not in options:
        monkeypatch.setattr(run, "make_work", lambda *a: pytest.fail("inputs were made first"))
    with pytest.raises(ThresherError, match=words):
        run_bench(Settings((DECODE,), **{"device": "cpu", **options}), print)


def test_mla_has_no_scores_to_be_cruel_with():
    with pytest.raises(ThresherError, match="must be one of normal; got 'cruel-plateaus'"):
        bench(MLA, inputs=("cruel",))


def test_peers_that_are_not_here_say_what_to_install(monkeypatch):
    monkeypatch.delenv("THRESHER_VLLM_OPS", raising=False)
    monkeypatch.setattr(dispatch, "installed", lambda module: module.startswith("thresher"))
    with pytest.raises(ThresherError, match=r"not installed: deep_gemm \(pip install sgl-deep-gemm==\S+\), vllm \(.*THRESHER_VLLM_OPS"):
        bench(DECODE, peer="deep_gemm+vllm")
    monkeypatch.setattr(dispatch, "installed", lambda module: True)
    assert peer_reason("flash_mla", CPU) == "it needs a CUDA device"
    assert "ranks" in peer_reason("exact", CPU)
    assert set(PEERS) >= {
        "deep_gemm+vllm",
        "flash_mla",
        "flashinfer",
        "vllm",
        "deep_gemm",
        "public_replicated",
        "public_exact",
        "replicated",
        "exact",
    }
    monkeypatch.setattr(dispatch, "capability", lambda device: (8, 0))
    for name in ("deep_gemm", "deep_gemm+vllm", "vllm", "flashinfer", "flash_mla"):
        assert "compute capability" in peer_reason(name, torch.device("cuda"))


def test_a_peer_is_timed_on_the_same_inputs_in_turn(tmp_path):
    given, order = [], []

    def prepare(ours):
        given.extend(ours)
        return Prepared(tuple(lambda: order.append("peer") for _ in ours), "the fast one")

    peers = {"twin": Peer("a twin", {"torch": "torch"}, ("select",), prepare=prepare)}
    with pytest.raises(ThresherError, match="it needs a CUDA device"):
        run_bench(Settings((DECODE,), device="cpu", peer="twin"), print, peers)
    peers["twin"] = dataclasses.replace(peers["twin"], modules={})
    lines = []
    (record,) = run_bench(Settings((DECODE,), device="cpu", peer="twin", repeats=3, out=tmp_path / "a"), lines.append, peers)
    assert len(given) == 2
    assert given[0].index.keys.pages.data_ptr() != given[1].index.keys.pages.data_ptr()
    assert len(order) == 2 * (3 + 3)
    assert record.ratio == round(record.peer_time_us["p50"] / record.time_us["p50"], 4)
    assert record.settings["peer_kernel"] == "the fast one"
    assert read(tmp_path / "a") == [record]
    assert "twin" in lines[0]


def test_a_case_that_a_peer_cannot_take_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(run, "make_work", lambda *a: pytest.fail("inputs were made first"))
    peers = {"small": Peer("small", {}, ("select",), prepare=lambda ours: None, fits=lambda case, op: f"{op} of {case.heads} heads")}
    with pytest.raises(ThresherError, match=f"peer small must be able to take {DECODE}; got: select of 4 heads; leave out --peer"):
        run_bench(Settings((DECODE,), device="cpu", peer="small"), print, peers)


def spoilt(result, how):
    """A result with one thing wrong."""
    if how == "scores":
        return result * 1.01
    if how == "out":
        return PartialAttention(result.out + 0.1, result.lse)
    if how == "lse":
        return PartialAttention(result.out, result.lse + 0.1)
    if how == "slots":
        return result + 1
    if how == "queries":
        return dataclasses.replace(result, weights=result.weights * 1.01)
    if how == "order":
        return dataclasses.replace(result, indices=result.indices.flip(1))
    indices = result.indices.clone()
    if how == "wrong tokens":
        absent = [p for p in range(300) if p not in indices[0].tolist()][: indices.shape[1]]
        indices[0] = torch.tensor(absent, dtype=torch.int32)
    elif how == "one wrong token":
        picked = indices[0].tolist()
        worst = next(p for p in range(300) if p not in picked)
        indices[0] = torch.tensor(sorted([*picked[1:], worst]), dtype=torch.int32)
    elif how == "out of sight":
        indices[0, -1] = 300
    elif how == "twice":
        indices[0, 1] = indices[0, 0]
    elif how == "short":
        indices[0, -1] = -1
        return dataclasses.replace(result, indices=indices, lengths=result.lengths - 1)
    return dataclasses.replace(result, indices=indices)


@pytest.mark.parametrize(
    ("case", "op", "how"),
    [
        *((DECODE, "select", how) for how in ("order", "wrong tokens", "one wrong token", "out of sight", "twice", "short")),
        (PREFILL, "select", "wrong tokens"),
        (DECODE, "index_score", "scores"),
        (PREFILL, "index_score", "scores"),
        (DECODE, "select_topk", "one wrong token"),
        ("decode-2x64-h4-d32-k16", "keep_best", "one wrong token"),
        (MLA, "sparse_attend_mla_fp8", "out"),
        (MLA, "sparse_attend_mla_fp8", "lse"),
        (MLA, "sparse_attend_mla", "out"),
        (LAYER, "layer", "out"),
        (LAYER, "store", "queries"),
        (LAYER, "select", "wrong tokens"),
        (LAYER, "to_slots", "slots"),
        (LAYER, "sparse_attend_mla_fp8", "lse"),
    ],
)
def test_no_time_on_a_red_check(monkeypatch, tmp_path, case, op, how):
    right = work._RUNS[op]
    monkeypatch.setitem(work._RUNS, op, lambda given: spoilt(right(given), how))
    monkeypatch.setattr(run, "interleave", lambda *a: pytest.fail("a time was taken"))
    lines = []
    with pytest.raises(ThresherError, match=f"{case} under normal inputs must agree with the reference; got: .*; no time is taken"):
        run_bench(Settings((case,), op=op, device="cpu", out=tmp_path / "a.jsonl"), lines.append)
    assert lines == []
    assert not (tmp_path / "a.jsonl").exists()


def test_rows_done_again_are_recorded_where_kernels_do_that(monkeypatch):
    right = work._RUNS["select"]

    def run_with(*marks):
        def select(given):
            for mark in marks:
                keep(torch.tensor(mark))
            return right(given)

        monkeypatch.setitem(work._RUNS, "select", select)
        (record,), (line,) = bench(DECODE)
        assert line.endswith("us" if record.rows_redone is None else f"us, {record.rows_redone} rows redone")
        return record.rows_redone

    assert run_with() is None
    assert run_with([0, 0]) == 0
    assert run_with([0, 1, 1], [1]) == 3


def test_a_run_that_is_not_repeatable_is_red(monkeypatch):
    right, count = work._RUNS["index_score"], iter(range(9))
    monkeypatch.setitem(work._RUNS, "index_score", lambda given: right(given) * (1 + 1e-6 * next(count)))
    with pytest.raises(ThresherError, match="a second run gives other bits"):
        bench(DECODE, op="index_score")


def test_a_token_within_the_bound_is_excused_and_one_beyond_is_not():
    case = make_work(parse_case("decode-1x300-h16-d64-k100"), "select", DSA(topk=100), "auto", "normal", 0, CPU)
    query, keys = case.index.query, case.index.keys
    want = DSA(topk=100).select(query, keys)
    scores = paged_index_score(query, keys)[0]
    order = scores.sort(descending=True, stable=True).indices.tolist()
    near = Selection(torch.tensor([sorted([*order[:99], order[100]])], dtype=torch.int32), torch.tensor([100]))
    near = dataclasses.replace(near, scores=scores[near.indices.long()])
    gap = float(scores[order[99]] - scores[order[100]])
    assert gap > 0
    assert check.selections_agree(near, want, torch.tensor([gap]), query, keys) is None
    assert "from the k-th" in check.selections_agree(near, want, torch.tensor([gap / 4]), query, keys)
    assert "no scores" in check.selections_agree(dataclasses.replace(near, scores=None), want, torch.tensor([gap]), query, keys)


def test_the_bound_covers_a_coarse_dot_product():
    """Dot products cut to 14 bits once stay within e, and e is not absurdly wide."""
    case = make_work(parse_case("decode-2x300-h8-d64-k32"), "select", DSA(topk=32), "auto", "normal", 0, CPU)
    query, keys = case.index.query, case.index.keys
    exact = paged_index_score(query, keys)
    bound = check.score_bound(query, keys, 14)
    assert (bound > check.score_bound(query, keys, 24)).all()
    assert (bound < exact.amax(1) * 0.5).all()
    assert (bound > exact.amax(1) * 2.0**-14).all()


def test_rows_keep_their_requests():
    made = make_work(parse_case("decode-9x100-h4-d64-k32"), "select", DSA(topk=32), "auto", "normal", 0, CPU)
    rows = check.sample_rows(9)
    assert rows.tolist() == [0, 3, 5, 8] or (rows[0] == 0 and rows[-1] == 8)
    query, keys = check.rows_to_cpu(made.index.query, made.index.keys, rows)
    assert keys.num_requests == len(rows)
    assert len(keys.pages) == 2 * len(rows)
    assert torch.equal(paged_index_score(query, keys), paged_index_score(made.index.query, made.index.keys)[rows])


def test_useful_work_of_known_cases():
    """By hand: 132 bytes and 2 H D operations a key."""
    card = Ceilings(copy=4.27e12, fp8=1331e12, bf16=729e12)
    case = parse_case("decode-1x1m-h64")
    flops, moved = useful_work(case, "select", DSA(topk=2048), [2**20])
    assert flops == 2 * 64 * 128 * 2**20
    assert moved == 132 * 2**20 + 64 * 132 + 4 * 2048
    assert floor_us(card, "select", flops, moved) == pytest.approx(32.42, abs=0.01)
    case = parse_case("prefill-1024x128k-h64")
    flops, moved = useful_work(case, "index_score", None, [131072])
    assert flops == 2 * 64 * 128 * sum(range(131072 - 1023, 131073))
    assert moved > 132 * 131072 + 4 * 1024 * 130000
    assert useful_work(case, "select", HISA(), [131072])[0] < useful_work(case, "select", MISA(), [131072])[0] < flops

    short = parse_case("decode-2x2k-h64")
    assert useful_work(short, "select", DSA(topk=2048), [2048, 2048]) == (0, 2 * (64 * 132 + 4 * 2048)), "few enough to be taken whole"
    assert useful_work(short, "index_score", None, [2048, 2048])[0] > 0

    one, four = parse_case("decode-2x1k-h64"), parse_case("decode-2x1k-h64-q4")
    (flops, moved), (more, as_much) = (useful_work(x, "index_score", None, [1024, 1024]) for x in (one, four))
    assert more == flops * (4 - (1 + 2 + 3) / 1024), "drafts see a token fewer each"
    assert as_much - moved == 6 * 64 * 132 + 4 * (2 * (1021 + 1022 + 1023)), "of keys nothing twice; queries and scores"
    flops, moved = useful_work(parse_case("mla-decode-32-h128"), "sparse_attend_mla_fp8", None, [32768] * 32)
    assert moved == 32 * (2048 * 656 + 128 * (576 * 2 + 512 * 4 + 4))
    assert floor_us(card, "sparse_attend_mla_fp8", 729e12, 0.0) == pytest.approx(1e6)
    assert useful_work(parse_case("mla-decode-32-h128"), "sparse_attend_mla", None, [32768] * 32)[0] == flops
    flops, moved = useful_work(parse_case("mla-decode-32-h128"), "sparse_attend_mla", None, [32768] * 32)
    assert flops == 2 * 32 * 128 * (576 + 512) * 2048
    assert moved == 32 * (2048 * 1152 + 128 * (576 * 2 + 512 * 4 + 4))
    assert floor_us(card, "sparse_attend_mla", 729e12, 0.0) == pytest.approx(1e6)
    assert floor_us(measure_ceilings(torch.device("cpu")), "select", flops, moved) is None


@pytest.mark.parametrize("selector", [DSA(), MISA(), MISARerank(), HISA()])
def test_useful_work_moves_each_byte_once(selector):
    """Keys and means of 132 bytes, queries of 64 heads, selections of int32; FLOPs are 256 for a key and a head."""
    length, rows = 131072, 1024
    once = {DSA: length, MISA: length + 128, MISARerank: length + 128, HISA: length + 1024}[type(selector)]
    flops, moved = useful_work(parse_case("prefill-1024x128k-h64"), "select", selector, [length])
    assert moved == 132 * once + rows * (64 * 132 + 4 * 2048), "a prefill reads every key, for the means too"
    seen = range(length - rows + 1, length + 1)
    by_hand = {
        DSA: sum(64 * n for n in seen),
        MISA: sum(8 * n + 64 * -(-n // 1024) for n in seen),
        MISARerank: sum(8 * n + 64 * (-(-n // 1024) + 8192) for n in seen),
        HISA: sum(64 * (-(-n // 128) + 64 * 128) for n in seen),
    }
    assert flops == 256 * by_hand[type(selector)]
    alone = {**dict.fromkeys((DSA, MISA, MISARerank), once), HISA: 1024 + 8192}[type(selector)]
    flops, moved = useful_work(parse_case("decode-1x128k-h64"), "select", selector, [length])
    assert moved == 132 * alone + 64 * 132 + 4 * 2048, "a decoding step finds the means; what is scored again is read once"


def test_info_says_what_can_run(capsys, monkeypatch):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for operation in dispatch.TABLE:
        assert f"{operation:<22}* reference: ok" in out
        for name in dispatch.implementations(operation)[1:]:
            assert f" {name}: " in next(line for line in out.splitlines() if line.startswith(f"  {operation:<22}") and f" {name}: " in line)
    assert "paged_index_score       deep_gemm: " in out
    assert f"torch {torch.__version__}" in out
    assert "peers of thresher bench:" in out
    assert "gloo: ok" in out
    monkeypatch.setattr(dispatch, "reason", lambda operation, impl, device: None if impl == "reference" else "the moon is full")
    monkeypatch.setattr("thresher.bench.info.reason", dispatch.reason)
    assert cli.main(["info"]) == 0
    assert "merge                   triton: the moon is full" in capsys.readouterr().out


def test_the_command(capsys, tmp_path):
    out = tmp_path / "a.jsonl"
    options = ["--device", "cpu", "--repeats", "2", "--out", str(out), "--selector", "misa:active_heads=2,block_size=32", "--seed", "3"]
    assert cli.main(["bench", "--case", DECODE, PREFILL, *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert [(record.selector, record.seed) for record in read(out)] == [("misa", 3)] * 2


def test_the_commands_mistakes_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in [
        ([], "--case must name at least one case"),
        (["--case", DECODE], "needs a CUDA device"),
        (["--case", "fast", "--device", "cpu"], "a case must be named like"),
        (["--case", DECODE, "--device", "cpu", "--peer", "cublas"], "a peer must be one of"),
    ]:
        assert cli.main(["bench", *arguments, *([] if arguments else ["--device", "cpu"])]) == 2
        seen = capsys.readouterr()
        assert seen.out == ""
        assert seen.err.count("\n") == 1
        assert words in seen.err
    assert cli.main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out
    for name in ("decode-1x1m-h64", "cruel-ascending", "deep_gemm+vllm"):
        assert f"  {name}" in listed


def test_the_kernel_of_a_run_is_the_one_asked_for(monkeypatch):
    seen = []
    scores = lambda *given, **k: seen.append(given) or paged_index_score(*given, impl="reference")  # noqa: E731
    module = SimpleNamespace(paged_index_score=scores, unsupported=lambda *a: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "installed", lambda package: True)
    monkeypatch.setattr(dispatch, "import_module", lambda path: module)
    records, _ = bench(DECODE, op="index_score", impl="triton")
    assert records[0].impl == "triton"
    assert len(seen) == 2 + 2 * (2 + 3)
