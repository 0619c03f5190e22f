"""tools/records: its cases exist, are timed on what it says, and suit the peers it names; each is timed once."""

from __future__ import annotations

import importlib.util
import itertools
from contextlib import nullcontext
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from thresher.bench.cases import parse_case
from thresher.bench.inputs import CRUEL
from thresher.bench.peers import PEERS
from thresher.bench.record import append
from thresher.bench.work import check_inputs, check_op, default_op
from thresher.errors import ThresherError
from thresher.eval.source import source_state
from thresher.selectors.parse import parse

from .test_record import ALONE, make

TOOL = Path(__file__).parents[2] / "tools" / "records"


def load():
    loader = SourceFileLoader("records_tool", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


GROUPS = load().GROUPS
CASES = [(row, name, i) for rows in GROUPS.values() for row in rows for name in row.names for i in row.inputs]
ROWS = sorted({(*row[:3], name, i, row.others) for row, name, i in CASES}, key=str)


@pytest.mark.parametrize(("op", "peer", "selector", "name", "inputs", "others"), ROWS)
def test_a_case_suits_its_op_its_selector_its_peers_and_its_inputs(op, peer, selector, name, inputs, others):
    case = parse_case(name)
    assert (op is None or case.kind == "layer") == (selector is not None)
    if selector is not None:
        parse(selector, defaults={"topk": case.topk})
    op = op or default_op(case)
    check_op(case, op)
    check_inputs(case, inputs)
    if inputs == "recorded":  # what thresher record stores: docs/benchmarks.md
        assert (case.length, case.heads, case.head_dim) == (7680, 32, 64)
        assert case.rows <= (1024 if case.kind == "prefill" else 8)
    assert others == () or case.ranks > 1
    for beside in () if peer is None else (peer, *others):
        assert op in PEERS[beside].ops
        assert PEERS[beside].fits(case, op) is None
        assert (PEERS[beside].ranks > 1) == (case.ranks > 1)


def test_the_plots_have_their_cases():
    """Issue 4: 8K to 1M, and 1 to 64 heads."""
    sizes = ("8k", "16k", "32k", "64k", "128k", "256k", "512k", "1m")
    whole = {(selector, name) for _, _, selector, name, inputs, _ in ROWS if inputs == "normal"}
    assert whole >= {("dsa", f"prefill-1024x{size}-h{heads}") for size in sizes for heads in (64, 32)}
    assert whole >= {(selector, f"prefill-1024x{size}-h64") for size in sizes for selector in ("misa:active_heads=8", "hisa")}
    assert whole >= {("dsa", f"prefill-1024x128k-h{heads}") for heads in (1, 2, 4, 8, 16, 32, 64)}
    odd = {(selector.partition(":")[0], inputs) for _, _, selector, _, inputs, _ in ROWS if inputs != "normal"}
    assert odd == {(name, inputs) for name in ("dsa", "misa", "hisa") for inputs in (*CRUEL, "recorded")}


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """``main`` as a function of its words, on a machine that seems to have a GPU; gives the settings that were timed, each recorded."""
    module, timed = load(), []

    def bench(settings, write, ranks=None):
        timed.append(settings)
        if isinstance(module.fails, Exception):
            raise module.fails
        case = parse_case(settings.cases[0])
        picked = parse(settings.selector, defaults={"topk": case.topk})
        over = {}
        if ranks is not None:
            others = dict.fromkeys(settings.others, make().time_us)
            over = {"way": "idsa", "others": others, "exchange": module.exchange_of(ranks)}
        how = {"op": settings.op or default_op(case), "selector": settings.selector.partition(":")[0], "ranks": case.ranks}
        how["settings"] = {**vars(picked), "copies": 2, **over}
        peer = ALONE if settings.peer is None else {"peer": settings.peer}
        if ranks is None or ranks.rank == 0:
            append(settings.out, make(case=case.name, inputs=settings.inputs[0], commit=source_state()[0], **how, **peer))

    def main(*words):
        timed.clear()
        monkeypatch.setattr("sys.argv", ["records", "--out", str(tmp_path / "a.jsonl"), *words])
        return module.main(), list(timed)

    module.fails = None
    monkeypatch.setattr(module, "run_bench", bench)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    main.module = module
    return main


def test_no_case_is_timed_twice(tool):
    for rows in GROUPS.values():
        names = [(*row[:3], name, i, row.nccl) for row in rows for name in row.names for i in row.inputs]
        assert len(set(names)) == len(names)
    code, timed = tool("heads", "lengths")
    assert code == 0
    asked = [(settings.cases, settings.selector, settings.peer) for settings in timed]
    assert len(asked) == len(set(asked)) == 32 + 5, "the two of 32 and 64 heads are also in lengths"
    assert tool("lengths", "heads") == (0, [])
    more = [(settings.selector, settings.cases[0]) for settings in tool("select")[1]]
    assert ("dsa", "prefill-1024x4k-h64") in more
    assert ("dsa", "prefill-1024x8k-h64") not in more, "done with the lengths"


def test_inputs_and_options_make_another_case(tool, monkeypatch):
    cases = tool.module.Cases
    names = ["prefill-1024x128k-h64"]
    monkeypatch.setitem(tool.module.GROUPS, "heads", [cases(None, None, "misa", names)])
    assert len(tool("heads")[1]) == 1
    monkeypatch.setitem(tool.module.GROUPS, "heads", [cases(None, None, text, names) for text in ("misa", "misa:active_heads=4")])
    assert [settings.selector for settings in tool("heads")[1]] == ["misa:active_heads=4"]
    monkeypatch.setitem(tool.module.GROUPS, "heads", [cases(None, None, "misa:active_heads=8", names, ("normal", *CRUEL))])
    assert [settings.inputs for settings in tool("heads")[1]] == [(name,) for name in CRUEL]


def test_recorded_inputs_need_a_file(tool, capsys):
    code, timed = tool("inputs")
    assert code == 1
    assert {settings.inputs for settings in timed} == {(name,) for name in CRUEL}
    assert capsys.readouterr().out.splitlines() == [
        "4 cases with recorded inputs left: make a file with thresher record --out FILE and pass --recorded FILE"
    ]
    code, timed = tool("inputs", "--recorded", "there.safetensors")
    assert code == 0
    assert [(settings.inputs, settings.recorded) for settings in timed] == [(("recorded",), Path("there.safetensors"))] * 4


def test_a_case_that_fails_stops_no_other(tool, capsys):
    tool.module.fails = ThresherError("no")
    code, timed = tool("heads")
    assert code == 1
    assert len(timed) == 7
    assert capsys.readouterr().out.splitlines()[0] == "failed: prefill-1024x128k-h1 dsa beside None, inputs normal: no"
    tool.module.fails = None
    assert tool("heads", "--seconds", "0") == (1, [])
    assert capsys.readouterr().out == "7 cases left for want of time\n"
    assert tool("heads")[0] == 0


class Pair:
    """A rank of two; the second hears what the first said before it began."""

    ranks = 2

    def __init__(self, rank, said):
        self.rank, self.said = rank, said

    def gather(self, x):
        if self.rank == 0:
            self.said.append(x)
        return torch.stack([x if self.rank == 0 else self.said.pop(0), x])


@pytest.fixture
def both(tool, monkeypatch):
    """``both(words)``: what each of two ranks timed, rank 0 first, whose clock ticks seconds; the other's ticks hours."""

    def main(*words, num=2):
        said, timed = [], []
        for rank, tick in enumerate((1, 3600)):
            clock = itertools.count(0, tick)
            monkeypatch.setattr(tool.module, "world_size", lambda: num)
            monkeypatch.setattr(tool.module, "started", lambda *a, rank=rank: nullcontext(Pair(rank, said)))
            monkeypatch.setattr(tool.module, "DEVICE", "cpu")
            monkeypatch.setattr(tool.module, "time", SimpleNamespace(monotonic=lambda clock=clock: next(clock)))
            timed.append(tool(*words))
        assert said == [], "both asked the same"
        return timed

    return main


def test_ranks_do_what_rank_0_says(both, capsys):
    """It alone looks at the clock and at the file, which has all by the time that rank 1 begins here."""
    (code, first), (other, second) = both("ranks", "--seconds", "1")
    assert (code, other) == (1, 1)
    assert [settings.cases for settings in first] == [settings.cases for settings in second] == [("layer-1x1m-h64-r2",)]
    assert capsys.readouterr().out == "1 cases left for want of time\n", "rank 0 speaks"
    (code, first), (_, second) = both("ranks")
    assert code == 0
    assert [settings.cases for settings in first] == [settings.cases for settings in second] == [("layer-32x128k-h64-r2",)]
    assert first == second
    assert (first[0].way, first[0].peer, first[0].others) == (None, "public_exact", ("public_replicated", "exact", "replicated"))
    grid = both("ranks-grid")[0][1]
    assert len(grid) == 18 - 2
    assert both() == [(0, []), (0, [])], "those of one rank are left to one process"
    with pytest.raises(SystemExit, match="2"):
        both("heads")
    assert "heads is timed by as many processes as it has ranks, 1, not 2" in capsys.readouterr().err


class Nccl(Pair):
    """The same pair, told apart."""

    def __init__(self, timeout_s):
        super().__init__(0, [])


def test_layers_that_are_predicted_are_timed_over_both_exchanges(both, tool, monkeypatch):
    """Where ranks read one another's memory; else all goes through NCCL, and once."""
    module, timed = tool.module, []
    bench = module.run_bench

    def noted(settings, write, ranks):
        timed.append((settings.cases[0], isinstance(ranks, Nccl)))
        bench(settings, write, ranks=ranks)

    monkeypatch.setattr(module, "run_bench", noted)
    monkeypatch.setattr(module, "ProcessGroup", Nccl)
    monkeypatch.setattr(module, "exchange_of", lambda ranks: "NCCL" if isinstance(ranks, Nccl) else "symmetric memory")
    code, first = both("ranks-8", num=8)[0]
    names = [f"layer-{size}-h64-r8" for size in ("1x1m", "8x256k", "32x128k")]
    assert (code, timed[:6]) == (0, [(name, nccl) for nccl in (False, True) for name in names])
    assert {(settings.peer, settings.others) for settings in first} == {("public_exact", ("exact", "replicated"))}
    assert both(num=8) == [(0, []), (0, [])], "all of eight ranks is done"
    monkeypatch.setattr(module, "exchange_of", lambda ranks: "NCCL")
    assert [settings.cases[0] for settings in both("ranks-4", num=4)[0][1]] == [name.replace("-r8", "-r4") for name in names]


def test_a_lost_rank_is_one_line(tool, monkeypatch, capsys):
    class Gone(Pair):
        def gather(self, x):
            raise ThresherError("every rank must answer")

    monkeypatch.setattr(tool.module, "world_size", lambda: 2)
    monkeypatch.setattr(tool.module, "started", lambda *a: nullcontext(Gone(0, [])))
    monkeypatch.setattr(tool.module, "DEVICE", "cpu")
    assert tool("ranks") == (2, [])
    assert capsys.readouterr().err == "records: every rank must answer\n"


def test_wrong_words_are_refused(capsys, monkeypatch):
    refused = ((["nonsense"], "groups are score"), ([], "a CUDA device is needed"), (["ranks"], "processes as it has ranks, 2, not 1"))
    for words, why in refused:
        monkeypatch.setattr("sys.argv", ["records", *words])
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(SystemExit, match="2"):
            load().main()
        assert why in capsys.readouterr().err
