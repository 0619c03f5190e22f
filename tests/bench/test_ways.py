"""The picture of the fastest way over ranks: which records it takes, and what is drawn of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from thresher.bench.record import append
from thresher.bench.ways import FILE, by_size, draw, fastest, main

from .test_record import make, over_ranks

pytest.importorskip("matplotlib")
TIMES = {"idsa": 50.0, "public_exact": 130.0, "public_replicated": 90.0, "exact": 60.0, "replicated": 75.0}


def size(requests, context, **times):
    return over_ranks(f"layer-{requests}x{context}-h64-r2", **(TIMES | times))


GRID = [size(8, "1m"), size(1, "1m"), size(1, "32k", replicated=40.0), size(1, "128k", public_replicated=30.0)]


def test_records_are_found_by_requests_and_context():
    newer = size(1, "1m", idsa=45.0)
    grid = by_size([*GRID, newer])
    assert {rows: list(line) for rows, line in grid.items()} == {1: [2**15, 2**17, 2**20], 8: [2**20]}
    assert grid[1][2**20] == newer


@pytest.mark.parametrize(
    "changes",
    [
        {"impl": "reference"}, {"inputs": "cruel-plateaus"}, {"selector": "hisa"}, {"case": "layer-1x1m-h32-r2"},
        {"case": "layer-1xmixed-h64-r2"}, {"settings": GRID[0].settings | {"way": "exact"}},
        {"settings": GRID[0].settings | {"timing": "events"}}, {"settings": GRID[0].settings | {"topk": 512}},
    ],
)  # fmt: skip
def test_other_records_are_not_drawn(changes):
    assert by_size([replace(GRID[0], **changes)]) == {}
    assert by_size([make(case="layer-1x1m-h64", op="layer")]) == {}


def test_the_fastest_and_what_comes_next():
    assert fastest(TIMES) == ("idsa", ["exact 1.20", "public 1.80"])
    assert fastest({"idsa": 50.0, "public_exact": 40.0}) == ("public_exact", ["idsa 1.25", "public 1.00"])
    assert fastest({"idsa": 50.0, "exact": 75.0}) == ("idsa", ["exact 1.50"])


def test_each_way_is_a_line_and_each_size_a_cell():
    figure = draw(by_size(GRID), "a title")
    one, eight, table = figure.axes
    assert [axes.get_title() for axes in (one, eight)] == ["1 request", "8 requests"]
    lines = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in one.lines}
    assert lines["replicated"] == {2**15: 40.0, 2**17: 75.0, 2**20: 75.0}
    assert lines["the fastest"] == {2**15: 40.0, 2**17: 30.0, 2**20: 50.0}
    assert list(lines) == ["idsa", "exact", "replicated", "public_exact", "public_replicated", "the fastest"]
    cells = {text.get_position()[0]: text.get_text() for text in table.texts if round(text.get_position()[1] + 0.25, 3) == 0}
    assert cells == {0: "replicated", 1: "public_replicated", 2: "idsa"}
    assert [text.get_text() for text in table.texts][-2:] == ["idsa", "exact 1.20\npublic 1.80"]
    (legend,) = figure.subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(lines)


def test_the_command(tmp_path, capsys):
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    assert main([str(results), str(docs)]) == 1
    assert "take them with torchrun --nproc-per-node 2 tools/records ranks-grid" in capsys.readouterr().err
    for record in GRID:
        append(results / "a.jsonl", record)
    assert main([str(results), str(docs)]) == 0
    first = (docs / FILE).read_bytes()
    assert main([str(results), str(docs)]) == 0
    assert (docs / FILE).read_bytes() == first
    assert main([str(results), str(docs), "--gpu", "another"]) == 1
