"""Records: the fields, the file, and that no figure disagrees with its times."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest

from thresher.bench.record import RESULTS, Record, append, read, results_path
from thresher.bench.table import BEGIN, END, load, table, updated
from thresher.errors import ThresherError
from thresher.eval.source import source_state

ROOT = Path(__file__).parents[2]
FIELDS = (
    "case op selector settings inputs seed impl peer time_us peer_time_us ratio useful_flops useful_bytes floor_us peak_bytes rows_redone "
    "ranks gpu torch triton peer_versions commit dirty date"
)


def make(**changes):
    values = {
        **{"case": "decode-1x1m-h64", "op": "select", "selector": "dsa", "settings": {"topk": 2048, "timing": "graph"}, "inputs": "normal"},
        **{"seed": 0, "impl": "triton", "peer": "deep_gemm+vllm", "time_us": {"p20": 49.0, "p50": 50.0, "p80": 52.5}},
        **{"peer_time_us": {"p20": 64.0, "p50": 64.8, "p80": 66.0}, "ratio": 1.296, "useful_flops": 1.7e10, "useful_bytes": 1.38e8},
        **{"floor_us": 32.4, "peak_bytes": 10, "rows_redone": 0, "ranks": 1, "gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0"},
        **{"peer_versions": {"a": "1"}, "commit": "abc", "dirty": False, "date": "2026-01-02"},
    }
    return Record(**{**values, **changes})


def over_ranks(case="layer-1x1m-h64-r2", way="idsa", **times):
    """A record of a case over ranks: the times of ``way``, of a peer, and of others."""
    quantiles = {name: {"p20": time, "p50": time, "p80": time} for name, time in times.items()}
    own, (peer, *others) = quantiles.pop(way), quantiles
    how = {"topk": 2048, "timing": "graph", "way": way, "others": {name: quantiles[name] for name in others}, "m": 1105}
    how |= {"cache_bytes": dict.fromkeys(times, 413 * 10**6), "exchange": "symmetric memory", "peer_kernel": {"public_exact": "a, then b"}}
    ratio = round(quantiles[peer]["p50"] / own["p50"], 4)
    return make(case=case, op="layer", ranks=2, settings=how, peer=peer, time_us=own, peer_time_us=quantiles[peer], ratio=ratio)


ALONE = {"peer": None, "peer_time_us": None, "ratio": None, "peer_versions": {}}


def test_the_fields_of_a_line_in_order(tmp_path):
    append(tmp_path / "a.jsonl", make())
    assert " ".join(json.loads((tmp_path / "a.jsonl").read_text())) == FIELDS


def test_records_read_back_and_files_only_grow(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    append(path, make())
    before = path.read_bytes()
    append(path, make(**ALONE))
    assert path.read_bytes().startswith(before)
    assert read(path) == [make(), make(**ALONE)]


def write_many(path):
    for _ in range(50):
        append(path, make(settings={"long": "x" * 3000}))


def test_two_processes_do_not_mix_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read(path)) == 100


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": 1.3}, "ratio must be 1.296"),
        ({"ratio": None}, "ratio must be 1.296"),
        ({"time_us": {"p20": 51.0, "p50": 50.0, "p80": 52.0}}, "time_us must hold ascending"),
        ({"time_us": {"p20": 49.0, "p50": 50.0}}, "time_us must hold ascending"),
        ({"time_us": {"p20": 0.0, "p50": 50.0, "p80": 52.0}}, "time_us must hold ascending"),
        ({"peer": None}, "a peer and its times come together"),
        ({"peer_time_us": None, "ratio": None}, "a peer and its times come together"),
    ],
)
def test_a_record_that_contradicts_itself(changes, words, tmp_path):
    with pytest.raises(ThresherError, match=words):
        make(**changes)
    (tmp_path / "a.jsonl").write_text(json.dumps({**dataclasses.asdict(make()), **changes}) + "\n")
    with pytest.raises(ThresherError, match=f"a.jsonl:1: {words}"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"case": "x"}', json.dumps({**dataclasses.asdict(make()), "more": 1})])
def test_lines_that_are_no_records(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(dataclasses.asdict(make())) + "\n" + line + "\n")
    with pytest.raises(ThresherError, match=r"a\.jsonl:2 must"):
        read(tmp_path / "a.jsonl")


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(ThresherError, match="records must be writable"):
        append(tmp_path, make())


def test_results_are_named_by_card_and_date():
    assert results_path("NVIDIA H100 80GB HBM3", "2026-01-02") == RESULTS / "h100-80gb-hbm3-2026-01-02.jsonl"


def test_options_are_the_selectors_alone():
    how = {"timing": "graph", "copies": 2, "repeats": 20, "peer_kernel": "x", "ceilings": {"copy": 1.0}}
    assert make(settings={"topk": 2048, "active_heads": 8, **how}).options == {"topk": 2048, "active_heads": 8}


def test_a_record_over_ranks():
    record = over_ranks(idsa=50.0, exact=60.0, replicated=75.5)
    assert record.options == {"topk": 2048}
    assert record.ways == {"idsa": 50.0, "exact": 60.0, "replicated": 75.5}
    assert list(record.beside) == ["exact", "replicated"]
    assert make().beside == {"deep_gemm+vllm": make().peer_time_us}
    assert make(**ALONE).beside == {}


def test_the_state_of_the_source():
    commit, dirty = source_state()
    assert (commit is None) == (dirty is None)
    assert commit is None or len(commit) == 40


def test_the_table_keeps_the_newest_of_each_and_marks_uncommitted_ones():
    newer = make(time_us={"p20": 30.0, "p50": 32.4, "p80": 40.0}, ratio=2.0, date="2026-01-03", dirty=True, commit="0123456789abcdef")
    other = make(case="mla-decode-32-h128", op="sparse_attend_mla", selector=None, floor_us=None, **ALONE)
    said, _, *lines = table([make(), newer, other]).splitlines()
    assert said == "In every row: inputs normal, impl triton, GPU NVIDIA H200."
    assert len(lines) == 4
    assert lines[2] == "| decode-1x1m-h64 | select | dsa | 32.4* | deep_gemm+vllm | 64.8 | 2.00 | 32.4 | 2026-01-03 | 01234567 |"
    assert "| 50.0 | - | - | - | - |" in lines[3]
    layer = {"case": "layer-1x1m-h64", **ALONE}
    assert table([make(), make(op="layer", **layer), make(op="store", **layer)]).count("layer-1x1m-h64") == 1, "parts are in a picture"
    more = table([make(), make(settings={"topk": 512, "timing": "graph"}), make(gpu="NVIDIA H100")]).splitlines()
    assert len(more) == 7, "other settings are another row, and so is another GPU"
    assert more[4].count("|") == more[2].count("|") == 9


def test_cases_over_ranks_have_a_table_of_their_own():
    first = over_ranks(idsa=50.0, exact=60.0, replicated=75.5)
    newer, other = dataclasses.replace(first, date="2026-01-03", dirty=True), over_ranks("layer-8x32k-h64-r2", "exact", exact=9.0, idsa=6.0)
    assert table([make()]) in table([make(), first]), "the other stays what it is"
    said, _, *lines = table([make(), first, newer, other]).removeprefix(table([make()])).strip().splitlines()
    assert said == "In every row: selector dsa, inputs normal, exchange symmetric memory, impl triton, GPU NVIDIA H200, commit abc."
    assert lines == [
        "| case | idsa us | exact us | replicated us | best other / ours | MB held | date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| layer-1x1m-h64-r2 | 50.0* | 60.0 | 75.5 | 1.20 | 413.0 | 2026-01-03 |",
        "| layer-8x32k-h64-r2 | 6.0 | 9.0 | - | 0.67 | 413.0 | 2026-01-02 |",
    ]
    assert table([first]).splitlines()[0].endswith("date 2026-01-02, commit abc.")
    slower = dataclasses.replace(over_ranks(idsa=70.0, exact=80.0, replicated=75.5), date="2026-01-04")
    slower.settings["exchange"] = "NCCL"
    both = table([first, slower]).splitlines()
    assert [line.split(" | ")[1:3] for line in both[4:]] == [["NCCL", "70.0"], ["symmetric memory", "50.0"]]


def test_a_page_is_updated_between_its_marks(tmp_path):
    page = f"# A\n\n{BEGIN}\nold\n{END}\n\nB\n"
    new = updated(page, [make()])
    assert new == f"# A\n\n{BEGIN}\n{table([make()])}{END}\n\nB\n"
    assert updated(new, [make()]) == new
    assert updated("# A\n", []) == "# A\n"
    for bad in ("# A\n", f"{BEGIN}\n", f"{END}{BEGIN}", page + page):
        with pytest.raises(ThresherError, match="the page must hold"):
            updated(bad, [make()])


def test_committed_results_are_sound_and_the_readme_shows_them():
    """Reading checks every field and recomputes every ratio."""
    records = load(ROOT / RESULTS)
    readme = (ROOT / "README.md").read_text()
    assert updated(readme, records) == readme, "run: python -m thresher.bench.table README.md benchmarks/results"
    if not records:
        assert BEGIN not in readme, "figures without records"
    for record in records:
        assert record.gpu.startswith("NVIDIA"), "figures are a GPU's"
