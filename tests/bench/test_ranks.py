"""Cases over ranks: what a rank holds, ways over gloo with stand-ins for other packages, and one line for whatever goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from thresher import cli
from thresher.bench import run
from thresher.bench.cases import parse_case
from thresher.bench.peers import PEERS, peer_reason
from thresher.bench.rank_peers import public_exact_fits, public_replicated_fits
from thresher.bench.rank_run import check_ways
from thresher.bench.ranks import PLACED, deal, make_whole, make_works, tell
from thresher.bench.record import read
from thresher.bench.run import Settings, listing, run_bench
from thresher.bench.timing import WARM_UPS, interleave_ranks
from thresher.cache import Placement, load_keys
from thresher.cache.latents import decode_records
from thresher.distributed import group as group_module
from thresher.distributed import split_keys
from thresher.errors import ThresherError
from thresher.selectors import DSA, HISA

from ..distributed.launch import launch
from .ranks_worker import MANY, SMALL

CPU = torch.device("cpu")
RED = "under normal inputs must agree with the reference; got: "
ALONE = RED.replace("the reference", "one process")


class Twins:
    """Rank 0 of two, whose other rank has the same of everything."""

    rank, ranks = 0, 2

    def __init__(self):
        self.met = 0

    def gather(self, x):
        self.met += 1
        return torch.stack([x, x])


@pytest.fixture(autouse=True)
def not_interpreting(monkeypatch):
    """Other tests of the same process set it, and processes inherit it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def ranks_run(tmp_path):
    """What each rank of a task found."""

    def started(task, ranks):
        for process in launch("tests.bench.ranks_worker", ranks, task, tmp_path):
            said = process.communicate(timeout=240)[1]
            assert process.returncode == 0, said
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]

    return started


def whole_of(name, rank=0, ranks=2, copy=0):
    return make_whole(parse_case(name), "auto", "normal", 0, CPU, SimpleNamespace(rank=rank, ranks=ranks), copy=copy)


@pytest.mark.parametrize("name", ["layer-3x131-h4-d32-k32-q2-r2", "layer-2x67-h4-d32-k32-r3", "layer-1x3-h4-d32-k32-r3"])
def test_a_rank_holds_its_own_tokens(name):
    case = parse_case(name)
    placement = Placement(case.ranks)
    for rank in range(case.ranks):
        whole = whole_of(name, rank, case.ranks)
        held = deal(whole, placement, rank)
        keys, own = whole.index.keys, held.index.keys
        want = split_keys(keys, placement)[rank]
        for request in range(keys.num_requests):
            for mine, theirs in zip(load_keys(own, request), load_keys(want, request), strict=True):
                assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
            logical = placement.to_logical(rank, torch.arange(int(own.lengths[request])))
            assert torch.equal(latents_at(held, request, torch.arange(len(logical))), latents_at(whole, request, logical))
        stored = held.tokens.slots
        mine = placement.holds(whole.index.query.positions, rank)
        assert torch.equal(stored >= 0, mine)
        new = [each.attend.latents.flatten(0, 2)[each.tokens.slots[mine]] for each in (whole, held)]
        assert torch.equal(*new)
        assert torch.equal(held.positions, placement.local_end(whole.index.query.positions, rank))
        assert held.cache_bytes == own.pages.numel() + held.attend.latents.numel()


def latents_at(held, request, positions):
    keys = held.index.keys
    page = keys.page_table[request, positions // keys.page_size].long()
    return held.attend.latents[page, positions % keys.page_size]


def test_every_rank_draws_the_same_context_and_its_own_heads():
    first, second = (whole_of("layer-2x67-h4-d32-k32-r2", rank) for rank in range(2))
    assert torch.equal(first.index.keys.pages, second.index.keys.pages)
    assert torch.equal(first.attend.latents, second.attend.latents)
    assert first.attend.q.shape == second.attend.q.shape == (2, 4, 576)
    assert not torch.equal(first.attend.q, second.attend.q)
    assert not torch.equal(first.attend.q, whole_of("layer-2x67-h4-d32-k32-r2", copy=1).attend.q)
    assert decode_records(first.attend.latents.flatten(0, 2)).isfinite().all()


def test_ways_share_what_they_hold_and_no_state():
    case, group = parse_case("layer-2x67-h4-d32-k32-r2"), SimpleNamespace(rank=1, ranks=2)
    works = make_works(case, tuple(PLACED), HISA(8, 8, 32), "auto", group, whole_of(case.name, 1))
    assert works["idsa"].held is works["exact"].held is works["public_exact"].held
    assert works["replicated"].held is works["public_replicated"].held is not works["idsa"].held
    assert len({id(work.state) for work in works.values()}) == len(works)
    assert {name: work.over.selector for name, work in works.items() if "public" in name} == dict.fromkeys(
        ("public_exact", "public_replicated"), DSA(topk=32)
    )
    assert [name for name, work in works.items() if not work.dealt] == ["replicated", "public_replicated"]


def test_our_ways_over_two_ranks(ranks_run, tmp_path):
    first, second = ranks_run("ours", 2)
    assert first.pop("still held") == second.pop("still held") == [], "memory is free for the next case"
    assert first.pop("shared") == second.pop("shared") == []
    assert second == {name: [] for name in first}, "rank 0 writes"
    name = f"{SMALL}-r2"
    for lines, words in (("all", "dsa normal reference: idsa"), ("hisa", "hisa normal reference: idsa")):
        assert first[lines][0].startswith(f"{name} layer {words} ")
    assert first["misa"][0].startswith(f"{name} layer misa normal reference: replicated ")
    assert all(f", {way} " in first["hisa"][0] for way in ("exact", "replicated"))
    assert [line.split()[3] for line in first["cruel"]] == ["cruel-plateaus", "cruel-ascending", "cruel-descending"]
    assert first["checked"] == [f"{name} layer dsa normal: idsa, exact: right, and not timed"]
    assert not (tmp_path / "checked.jsonl").exists()
    (record,) = read(tmp_path / "all.jsonl")
    assert (record.case, record.op, record.ranks, record.peer) == (name, "layer", 2, "exact")
    assert record.options == {"topk": 32}
    how = record.settings
    assert (how["way"], how["exchange"], how["m"], how["timing"], how["copies"]) == ("idsa", "gloo", 27, "clock", 2)
    assert list(how["others"]) == ["replicated"]
    half, all_of_it = 4 * 64 * (36 + 656), 8 * 64 * (36 + 656)
    assert how["cache_bytes"] == {"idsa": half, "exact": half, "replicated": all_of_it}
    assert list(record.beside) == ["exact", "replicated"]
    p50 = {way: times["p50"] for way, times in record.beside.items()}
    said = ", ".join(f"{way} {time:.1f} us, ratio {time / record.time_us['p50']:.2f}" for way, time in p50.items())
    assert first["all"][0] == f"{name} layer dsa normal reference: idsa {record.time_us['p50']:.1f} us, {said}"


@pytest.mark.slow
def test_our_ways_over_four_ranks(ranks_run, tmp_path):
    ranks_run("ours", 4)
    (record,) = read(tmp_path / "all.jsonl")
    held = record.settings["cache_bytes"]
    assert (record.ranks, held["replicated"] // held["idsa"]) == (4, 4)


def test_what_one_rank_cannot_do_ends_all_in_one_line(ranks_run, tmp_path):
    first, second = ranks_run("wrong", 2)
    assert first.pop("together")[1] == "0"
    assert second.pop("together") == ["rank 1 of 2: out of memory", "1"]
    assert first == second
    for name, words in (
        ("other tokens", f"rank 1 of 2: idsa of {SMALL}-r2 {RED}beside scores other tokens are selected; no time is taken on a red check"),
        ("other tokens of all", f"rank 1 of 2: replicated of {SMALL}-r2 {RED}beside scores other tokens"),
        ("another row", f"rank 1 of 2: idsa of {MANY}-r2 {ALONE}row 1: 27 of 54 tokens are not those that it selects; no time is"),
        ("another tie", f"exact of {SMALL}-r2 {ALONE.replace('normal', 'cruel-plateaus')}row 0: 1 of 32 tokens are not those that"),
        ("fewer tokens", f"exact of {SMALL}-r2 {RED}row 0: 31 tokens, not 32"),
        ("outputs", f"rank 1 of 2: idsa of {SMALL}-r2 {RED}outputs are off by 0.1"),
        ("twice", f"rank 1 of 2: idsa of {SMALL}-r2 {RED}a second run gives other bits"),
        ("dealt", f"rank 1 of 2: idsa of {SMALL}-r2 {RED}row 0: "),
        ("inputs", "rank 1 of 2: out of memory"),
        ("drawn", "rank 1 of 2: out of memory"),
        ("write", "rank 0 of 2: records must be writable; got "),
    ):
        (line,) = first[name]
        assert line.startswith(words), line
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.slow
def test_public_ways_over_two_ranks(ranks_run, tmp_path):
    """Rank 1 misuses a package, or a kernel of rank 0 is wrong."""
    first, second = ranks_run("public", 2)
    for lines in ("long", "short", "kernels"):
        assert len(first[lines]) == 1
        assert "reference: idsa " in first[lines][0], first[lines]
        assert second[lines] == []
    assert first["schedules"] == 4, "made before, for two ways and copies"
    assert first["attention"] == second["attention"]
    assert RED + "outputs are off by " in first["attention"][0]
    assert RED + "row 0: " in first["logits"][0]
    assert "not among ours" in second["logits"][0]
    (record,) = read(tmp_path / "public.jsonl")
    kernel = record.settings["peer_kernel"]
    assert kernel["public_exact"].split(", then ")[0] in ("cooperative_topk", "persistent_topk")
    assert kernel["public_exact"].split(", then ")[1] in ("cooperative_topk", "persistent_topk", "flashinfer")
    assert list(record.beside) == ["public_exact", "public_replicated"]
    (record,) = read(tmp_path / "kernels.jsonl")
    assert record.settings["peer_kernel"]["public_replicated"].startswith("top_k_per_row_")
    assert first["no kernel"] == second["no kernel"]
    assert first["no kernel"][0].startswith("rank 1 of 2: peer public_exact must give our result; got: cooperative_topk: row 0: 1 distinct")


def test_ranks_meet_before_each_sample():
    group, calls = Twins(), []
    ways = {"ours": [lambda: calls.append("ours")] * 2, "peer": [lambda: calls.append("peer")]}
    assert list(interleave_ranks(ways, CPU, 2, "clock", group)) == ["ours", "peer"]
    assert calls == ["ours", "ours", "peer"] * (2 + WARM_UPS)
    assert group.met == 2 + 2 * (2 + WARM_UPS) + 1, "before each way is recorded too, and once to tell"


def test_a_sample_is_the_slowest_ranks(monkeypatch):
    class Other(Twins):
        def gather(self, x):
            return torch.stack([x, torch.tensor([[9.0, 1.0], [0.0, 8.0]], dtype=x.dtype)]) if x.dim() == 2 else super().gather(x)

    monkeypatch.setattr("thresher.bench.timing._samples", lambda *a: {"ours": [2.0, 3.0], "peer": [4.0, 5.0]})
    taken = interleave_ranks({}, CPU, 2, "clock", Other())
    assert (taken["ours"].p50, taken["peer"].p50) == ((9 + 3) / 2, (4 + 8) / 2)


def test_texts_are_told():
    assert tell(Twins(), CPU, "") == ["", ""]
    assert tell(Twins(), CPU, "süß") == ["süß", "süß"]


@pytest.mark.parametrize(
    ("case", "options", "ranks", "words"),
    [
        (SMALL, {}, 2, "must run in as many processes as it has ranks, 1; got 2; name one that ends in -r2"),
        (f"{SMALL}-r4", {}, 2, "ranks, 4; got 2; torchrun --nproc-per-node 4 -m thresher bench starts them"),
        (f"{SMALL}-r2", {}, 1, "ranks, 2; got 1; torchrun --nproc-per-node 2 -m thresher bench starts them"),
        (SMALL, {"way": "exact"}, 1, "--way and several peers must come with a case over ranks"),
        (SMALL, {"peer": "exact", "others": ("replicated",)}, 1, "--way and several peers must come with a case over ranks"),
        (SMALL, {"peer": "exact"}, 1, "got: it needs at least 2 ranks: torchrun, and a case such as layer-1x1m-h64-r2"),
        (f"{SMALL}-r2", {"way": "public_exact"}, 2, "--way must be one of idsa, exact, replicated; got 'public_exact'"),
        (f"{SMALL}-r2", {"peer": "idsa"}, 2, "each way must be named once; got idsa, idsa"),
        (f"{SMALL}-r2", {"peer": "exact", "others": ("exact",)}, 2, "each way must be named once"),
        (f"{SMALL}-r2", {"peer": "flash_mla"}, 2, "flash_mla is timed on sparse_attend_mla_fp8"),
        (f"{SMALL}-r2", {"peer": "exact", "others": ("public_exact",)}, 2, "peer public_exact must be able to run"),
        (f"{SMALL}-r2", {"op": "select"}, 2, "the op of a layer case must be one of layer; got 'select'"),
        (f"{SMALL}-r2", {"selector": "dense"}, 2, "a selector over ranks must have a topk; got dense"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(case, options, ranks, words, monkeypatch):
    for name in ("make_work", "measure"):
        monkeypatch.setattr(run, name, lambda *a: pytest.fail("inputs were made first"))
    with pytest.raises(ThresherError, match=words.replace("(", r"\(")):
        run_bench(Settings((case,), device="cpu", **options), print, ranks=Twins() if ranks == 2 else None)


def test_several_processes_of_one_device_are_not_mistaken():
    settings = Settings((SMALL,), peer="exact")
    assert check_ways(settings, parse_case(SMALL), 1) == ("exact",)
    assert check_ways(replace(settings, others=("replicated",)), parse_case(f"{SMALL}-r2"), 2) == ("idsa", "exact", "replicated")
    assert check_ways(replace(settings, way="exact", peer=None), parse_case(f"{SMALL}-r2"), 2) == ("exact",)


@pytest.mark.parametrize(
    ("fits", "case", "words"),
    [
        (public_replicated_fits, "layer-1x1m-h64-r4", "needs 64 or 128 heads a rank, not 32"),
        (public_exact_fits, "layer-1x1m-h16-r2", "needs 32 or 64 heads, not 16"),
        (public_exact_fits, "layer-1x1m-h64-r3", "needs as many heads on each rank, and 128 are for 3"),
        (public_exact_fits, "layer-1x1m-h64-k100-r2", "needs a multiple of 64 slots, not 100"),
        (public_exact_fits, "layer-1x8k-h64-k4096-r2", "topk is at most 2048"),
        (public_replicated_fits, "layer-32x1m-h64-r2", None),
        (public_exact_fits, "layer-1x1m-h64-r4", None),
    ],
)
def test_cases_that_public_parts_cannot_take(fits, case, words):
    why = fits(parse_case(case), "layer")
    assert (why is None) if words is None else (words in why)


def test_ways_are_listed_with_what_they_need(monkeypatch):
    listed = listing(CPU).splitlines()
    for name in ("idsa", "exact", "replicated"):
        assert next(line for line in listed if line.startswith(f"  {name}: ")).endswith(", under torchrun; ok")
    assert ", under torchrun; " in next(line for line in listed if line.startswith("  public_exact: "))
    assert {name for name, peer in PEERS.items() if peer.ranks > 1} == set(PLACED)
    assert peer_reason("exact", CPU, ranks=2) is None
    monkeypatch.setattr("thresher.bench.peers.absent", lambda module: None)
    assert peer_reason("deep_gemm+vllm", CPU, ranks=2) == "it needs a CUDA device"
    assert peer_reason("deep_gemm", torch.device("cuda"), ranks=2) == "it runs on one device, not on 2"


def test_the_command_joins_the_ranks_that_there_are(monkeypatch):
    asked = []

    class Joined:
        def __init__(self, device, timeout_s):
            assert (device, timeout_s) == ("cpu", 300.0)

        def __enter__(self):
            return "the ranks"

        def __exit__(self, *_):
            asked.append("left")

    monkeypatch.setattr(group_module, "started", Joined)
    monkeypatch.setattr(group_module, "world_size", lambda: 2)
    monkeypatch.setattr(run, "run_bench", lambda settings, write, ranks: asked.append((settings, ranks)))
    words = ["--case", f"{SMALL}-r2", "--device", "cpu", "--way", "exact", "--peer", "idsa", "replicated"]
    assert cli.main(["bench", *words]) == 0
    (settings, ranks), left = asked
    assert (ranks, left) == ("the ranks", "left")
    assert (settings.way, settings.peer, settings.others) == ("exact", "idsa", ("replicated",))
    monkeypatch.setattr(group_module, "world_size", lambda: 1)
    asked.clear()
    assert cli.main(["bench", *words]) == 0
    assert asked[0][1] is None
