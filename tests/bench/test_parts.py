"""The picture of a layer's parts: which records it takes, and what is drawn of them."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from thresher.bench.parts import FILE, PARTS, by_part, draw, main
from thresher.bench.record import append
from thresher.selectors.parse import parse

from .test_record import ALONE, make

pytest.importorskip("matplotlib")
TIMES = {"store": 2.5, "select": 45.0, "sparse_attend_mla_fp8": 30.0, "layer": 80.0}


def step(case="layer-8x128k-h64", selector="dsa", times=TIMES, **changes):
    """A record of each part and of the whole."""
    settings = {**asdict(parse(selector)), "timing": "graph"}
    return [
        make(
            **{
                "case": case, "op": op, "selector": selector.partition(":")[0], "settings": settings,
                "time_us": {"p20": us, "p50": us, "p80": us}, **ALONE, **changes,
            }
        )
        for op, us in times.items()
    ]  # fmt: skip


def test_a_bar_has_every_part_of_one_case_and_selector():
    records = [*step(), *step(selector="hisa:num_blocks=32"), *step("layer-1x1m-h64")[:3]]
    bars = by_part(records)
    assert list(bars) == ["layer-8x128k-h64\ndsa, 64 heads", "layer-8x128k-h64\nhisa, 64 heads, num_blocks=32"]
    assert bars["layer-8x128k-h64\ndsa, 64 heads"] == {record.op: record for record in records[:4]}
    newer = replace(records[1], time_us={"p20": 1.0, "p50": 1.0, "p80": 1.0})
    assert by_part([*records, newer])["layer-8x128k-h64\ndsa, 64 heads"]["select"] == newer


@pytest.mark.parametrize(
    "changes",
    [{"impl": "reference"}, {"ranks": 2}, {"inputs": "cruel-plateaus"}, {"settings": {"topk": 2048, "timing": "events"}}],
)
def test_other_records_are_not_drawn(changes):
    assert by_part(step(**changes)) == {}
    assert by_part(step("decode-8x128k-h64")) == {}


def test_parts_stand_one_after_the_other_and_the_whole_is_marked():
    figure = draw(by_part([*step(), *step("layer-1x1m-h64", times={**TIMES, "layer": 200.0})]), "a title")
    (axes,) = figure.axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars[:3] == [(0.0, 2.5), (2.5, 45.0), (47.5, 30.0)]
    assert [line.get_xdata()[0] for line in axes.lines] == [80.0, 200.0]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["45.0", "30.0", "80.0", "45.0", "30.0", "200.0"], "no room for 2.5"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*PARTS.values(), "the whole, as one"]


def test_the_command(tmp_path, capsys):
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    assert main([str(results), str(docs)]) == 1
    assert "take them with tools/records layer" in capsys.readouterr().err
    for record in step():
        append(results / "a.jsonl", record)
    assert main([str(results), str(docs)]) == 0
    first = (docs / FILE).read_bytes()
    assert main([str(results), str(docs)]) == 0
    assert (docs / FILE).read_bytes() == first
    assert main([str(results), str(docs), "--gpu", "another"]) == 1
