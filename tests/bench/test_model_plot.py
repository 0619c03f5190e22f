"""The picture of a layer's attention block over the context: which records it takes, where lines cross, what is said of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from thresher.bench.model_plot import FILE, LINES, by_panel, crossings, draw, main, said, table
from thresher.bench.record import RESULTS, append, read

from .test_record import ALONE, make

pytest.importorskip("matplotlib")
TIMES = {
    "dense": {"8k": 150.0, "32k": 190.0, "128k": 400.0, "512k": 1200.0},
    "dsa": {"8k": 180.0, "32k": 182.0, "128k": 200.0, "512k": 240.0},
    "hisa": {"8k": 190.0, "32k": 190.0, "128k": 192.0, "512k": 195.0},
}


def timed(selector, context, time, batch=1, model="deepseek-v3.2", **changes):
    settings = {**asdict(LINES[selector][0]), "timing": "graph", "layers": 2, "parts_us": {"inner": {"p50": time - 100}}}
    times = dict.fromkeys(("p20", "p50", "p80"), time)
    case = f"model-{model}-{batch}x{context}"
    return make(**{"case": case, "op": "attention", "selector": selector, "settings": settings, "time_us": times, **ALONE, **changes})


def grid(**changes):
    return [timed(selector, context, time, **changes) for selector, line in TIMES.items() for context, time in line.items()]


def test_the_newest_record_of_each_is_taken():
    newer = timed("dsa", "8k", 120.0)
    panels = by_panel([*grid(batch=8), *grid()[::-1], newer, timed("hisa", "1m", 200.0, model="glm-5")])
    assert list(panels) == [("deepseek-v3.2", 1), ("deepseek-v3.2", 8), ("glm-5", 1)]
    assert list(panels["deepseek-v3.2", 1]) == list(TIMES)
    assert all(list(line) == [2**13, 2**15, 2**17, 2**19] for line in panels["deepseek-v3.2", 1].values())
    assert panels["deepseek-v3.2", 1]["dsa"][2**13] == newer
    assert list(panels["glm-5", 1]["hisa"]) == [2**20]


@pytest.mark.parametrize(
    "changes",
    [{"case": "layer-1x128k-h64"}, {"op": "layer"}, {"selector": "misa"}, {"settings": {"timing": "clock", "topk": 2048}},
     {"settings": {"timing": "graph", "topk": 512}}],
)  # fmt: skip
def test_other_records_are_not_drawn(changes):
    assert by_panel([replace(timed("dsa", "8k", 1.0), **changes)]) == {}


def test_lines_cross_where_they_are_equal_on_logarithmic_axes():
    """t = c and t = 4 sqrt(c) are straight there, and meet at c = 16."""
    steep, flat = {4: 4.0, 64: 64.0}, {4: 8.0, 64: 32.0}
    ((context, time, later),) = crossings(steep, flat)
    assert (context, time, later) == (pytest.approx(16), pytest.approx(16), True)
    assert crossings(flat, steep)[0][2] is False
    assert crossings(steep, {4: 1.0, 64: 2.0}) == []
    assert crossings({4: 1.0, 8: 2.0}, {4: 2.0, 8: 2.0}) == [(pytest.approx(8), pytest.approx(2.0), True)], "equal at the end"
    assert crossings({4: 1.0}, {8: 1.0}) == [], "no context that both have"


def test_every_pair_is_said():
    lines = by_panel(grid())["deepseek-v3.2", 1]
    one, two, three = said(lines)
    assert one.startswith("DSA is faster than dense MLA from 24.6k on")
    assert two == "HISA is faster than dense MLA from 32k on"
    assert three.startswith("HISA is faster than DSA from 65.2k on")
    assert said({"dense": lines["hisa"], "dsa": lines["dense"]})[0].startswith("dense MLA is faster than DSA from 32k on")
    assert said({"dsa": by_panel([timed("dsa", "8k", 109.0)])["deepseek-v3.2", 1]["dsa"], "hisa": lines["hisa"]}) == [
        "DSA is faster than HISA from 8k to 8k"
    ]


def test_the_table_has_all_times_and_the_crossings():
    text = table(by_panel([*grid(), timed("dsa", "8k", 177.25, batch=8)]))
    assert text.splitlines()[0] == "| model | requests | context | dense MLA us | DSA us | HISA us |"
    assert "| deepseek-v3.2 | 1 | 128k | 400.0 (300.0) | 200.0 (100.0) | 192.0 (92.0) |" in text
    assert "| deepseek-v3.2 | 8 | 8k | - | 177.2 (77.2) | - |" in text
    assert "- deepseek-v3.2, batch 1: HISA is faster than dense MLA from 32k on." in text
    assert "- deepseek-v3.2, batch 1, between the projections: DSA is faster than dense MLA from 25.4k on." in text


def test_each_selector_is_a_line_and_each_crossing_a_ring():
    (axes,) = draw(by_panel(grid()), "a title").axes
    named = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines[:6]}
    assert list(named)[::2] == ["dense MLA", "DSA", "HISA"]
    assert named["HISA, between the projections"] == {2**13: 90.0, 2**15: 90.0, 2**17: 92.0, 2**19: 95.0}
    assert named["DSA"] == {2**13: 180.0, 2**15: 182.0, 2**17: 200.0, 2**19: 240.0}
    assert len(axes.lines) == len(axes.texts) + 6 == 9
    assert "HISA is faster than DSA from" in axes.get_xlabel()


def test_the_command(tmp_path, capsys):
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    assert main([str(results), str(docs)]) == 1
    assert "take them with thresher bench-model" in capsys.readouterr().err
    for record in grid():
        append(results / "a.jsonl", record)
    assert main([str(results), str(docs)]) == 0
    assert "| deepseek-v3.2 | 1 | 8k | 150.0 (50.0) | 180.0 (80.0) | 190.0 (90.0) |" in capsys.readouterr().out
    first = (docs / FILE).read_bytes()
    assert main([str(results), str(docs)]) == 0
    assert (docs / FILE).read_bytes() == first
    assert main([str(results), str(docs), "--gpu", "another"]) == 1


def committed():
    root = Path(__file__).resolve().parents[2]
    return root, by_panel([record for path in sorted((root / RESULTS / "model").glob("*.jsonl")) for record in read(path)])


def test_memory_was_as_planned():
    _, panels = committed()
    records = [record for lines in panels.values() for line in lines.values() for record in line.values()]
    assert {len(line) for lines in panels.values() for line in lines.values()} == {7}, "8k to 512k"
    for record in records:
        for name, planned in record.settings["planned_bytes"].items():
            assert record.settings["bytes"][name] == pytest.approx(planned, rel=0.1 if name == "peak" else 0.002), (record.case, name)


def test_the_table_of_the_docs_is_that_of_the_records():
    root, panels = committed()
    (commit,) = {record.commit for lines in panels.values() for line in lines.values() for record in line.values()}
    docs = (root / "docs" / "benchmarks.md").read_text()
    assert table(panels).strip() in docs, "run: python -m thresher.bench.model_plot benchmarks/results/model docs --gpu 'NVIDIA H200'"
    assert f"at {commit}" in docs
