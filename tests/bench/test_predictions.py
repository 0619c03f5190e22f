"""Predictions of layers over 4 and 8 GPUs: the planner's own, one file for good, and held against what is measured later."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from thresher.bench import prediction_plot, prediction_table
from thresher.bench.cases import CASES
from thresher.bench.plan_exchange import MEASURED, Exchange
from thresher.bench.plan_rows import WAYS, make_plan
from thresher.bench.plan_rows import Settings as PlanSettings
from thresher.bench.prediction_table import BEGIN, END, measured, table, updated
from thresher.bench.predictions import LAYERS, RANKS, main, predict, read_predictions
from thresher.bench.record import append
from thresher.bench.table import load
from thresher.distributed import local_topk
from thresher.errors import ThresherError

from .test_record import over_ranks

ROOT = Path(__file__).parents[2]
RESULTS, FOLDER = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "predictions"
CASE = "layer-32x128k-h64-r8"


@pytest.fixture(scope="module")
def made():
    return predict(RESULTS)


def of(made, case=CASE, exchange="symmetric"):
    """Way -> its prediction."""
    return {layer.way: layer for layer in made.layers if (layer.case, layer.exchange) == (case, exchange)}


def timed(case=CASE, exchange="symmetric memory", **times):
    """A record over ranks that comes after the predictions; times of idsa, exact and so on."""
    record = over_ranks(case, **times)
    settings = record.settings | {"exchange": exchange}
    return replace(record, settings=settings, ranks=int(case.rpartition("-r")[2]), date="2099-01-01")


def test_they_are_the_planner_s(made):
    """Every case, number of GPUs, exchange and way, and nothing but what thresher plan says."""
    keys = [(layer.case, layer.exchange, layer.way) for layer in made.layers]
    assert keys == [(f"{name}-r{ranks}", kind, way) for name in LAYERS for ranks in RANKS for kind in MEASURED for way in WAYS]
    assert {case for case, _, _ in keys} <= set(CASES)
    for exchange in MEASURED:
        asked = PlanSettings("deepseek-v3.2", 8, context="128k", batch="32", selector=("dsa",), exchange=exchange, records=RESULTS)
        plan = make_plan(asked)
        for row in plan.rows:
            layer = of(made, exchange=exchange)[row.way]
            assert (layer.layer_us, layer.parts_us, layer.outside) == (row.layer_us, row.parts_us, row.outside)
        assert made.layer_error == max(abs(error.relative) for error in plan.layers)
    assert (made.gpu, made.model, made.selector) == ("NVIDIA H200", "deepseek-v3.2", "dsa")


def test_the_floor_by_hand(made):
    """A rank of 8 at 1 x 1M: 131072 keys of 132 bytes; m latents of 656; a token made and stored; queries and outputs of all heads."""
    layer, m = of(made, "layer-1x1m-h64-r8")["idsa"], local_topk(2048, 8)
    index_query = 64 * (128 + 4)
    stored = 2 * (128 + 576 + 64 * 128 + 64) + 132 + 656 + index_query
    attended = 656 * m + 128 * (2 * 576 + 4 * 512 + 4)
    assert layer.rank_bytes == 131072 * 132 + index_query + 4 * m + stored + attended
    # Whole, though queries meet while tokens are selected.
    exchanges = Exchange(8).time_us("gather", 16 * 2 * 576) + Exchange(8).time_us("merge", 16 * (2 * 512 + 4))
    assert layer.floor_us == pytest.approx(layer.rank_bytes / made.bandwidth * 1e6 + exchanges)
    copies = [record.settings["ceilings"]["copy"] for record in load(RESULTS) if record.gpu == made.gpu]
    assert min(copies) <= made.bandwidth <= max(copies)
    for layer in made.layers:
        assert (layer.rank_bytes is None) == (layer.floor_us is None) == (layer.way != "idsa")


def test_a_file_is_written_once(tmp_path, monkeypatch, capsys, made):
    monkeypatch.setenv("THRESHER_COMMIT", "0123456789abcdef")
    out = tmp_path / "a.json"
    assert main([str(out), "--records", str(RESULTS)]) == 0
    assert read_predictions(out) == replace(made, commit="0123456789abcdef", dirty=None, date=json.loads(out.read_text())["date"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"], "no temporary file is left"
    before = out.read_bytes()
    for path, words in ((out, "must go to a new file"), (tmp_path / "no" / "a.json", "in a folder that exists")):
        assert main([str(path), "--records", str(RESULTS)]) == 1
        assert words in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([str(tmp_path / "b.json"), "--records", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    for text in ("{", "[]", "{}", before.decode().replace('"way"', '"means"')):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ThresherError, match=r"must be a file that python -m thresher.bench.predictions wrote; got .*c.json"):
            read_predictions(tmp_path / "c.json")


def rows_of(text, case=CASE):
    """``(exchange, its other cells)`` of a case: of the times, then of the ratios."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(f"| {case} ")]
    return cells[:2], cells[2:]


def test_nothing_is_measured_until_it_is(made):
    times, ratios = rows_of(table(made, []))
    said = of(made)
    assert times[0][1:] == ["symmetric memory", *(text for way in WAYS for text in (f"{said[way].layer_us:.1f}", "-"))]
    assert ratios[0][1] == "symmetric memory"
    assert ratios[0][3] == ratios[0][6] == ratios[0][9] == "-"
    replicated = said["replicated"].layer_us / said["idsa"].layer_us
    assert ratios[0][2] == f"{replicated:.2f}" + ("!" if replicated < 2.2 else "")
    assert (ratios[0][4], ratios[0][10], ratios[1][4], ratios[1][10]) == ("2.2", "1.5", "-", "-"), "bars are of symmetric memory"
    assert ratios[0][8].rstrip("!") == f"{said['idsa'].layer_us / said['idsa'].floor_us:.2f}"
    bars = {ranks: [rows_of(table(made, []), f"{name}-r{ranks}")[1][0][4::6] for name in LAYERS] for ranks in RANKS}
    assert bars == {4: [["-", "-"]] * 3, 8: [["1.5", "1.5"], ["-", "1.5"], ["2.2", "1.5"]]}, "and of 8 GPUs"


def test_what_is_measured_stands_beside_with_its_error(made, tmp_path):
    said = {way: layer.layer_us for way, layer in of(made).items()}
    near, far = said["idsa"] / 1.1, said["exact"] / 0.75
    append(tmp_path / "a.jsonl", timed(idsa=9.0, exact=9.0, replicated=9.0))
    append(tmp_path / "a.jsonl", timed(idsa=near, exact=far, replicated=2.5 * near, public_exact=1000.0))
    append(tmp_path / "a.jsonl", timed(exchange="NCCL", idsa=2 * near, exact=far, replicated=2.5 * near))
    (symmetric, nccl), (ratio, over_nccl) = rows_of(table(made, load(tmp_path)))
    off = said["replicated"] / 2.5 / near - 1
    whole = f"{2.5 * near:.1f} ({off:+.0%}{'!' if abs(off) > 0.2 else ''})"
    assert symmetric[3::2] == [whole, f"{far:.1f} (-25%!)", f"{near:.1f} (+10%)"]
    assert nccl[7].startswith(f"{2 * near:.1f} (")
    assert ratio[3] == "2.50", "over its bar"
    assert ratio[6] == f"{far / near:.2f}"
    assert ratio[9].rstrip("!") == f"{near / of(made)['idsa'].floor_us:.2f}"
    assert over_nccl[3] == "1.25", "no bar"
    slower = [*load(tmp_path), timed(idsa=near, exact=far, replicated=2.1 * near)]
    assert rows_of(table(made, slower))[1][0][3] == "2.10!"
    edge = of(made)["idsa"].floor_us
    for times, want in ((1.49, "1.49"), (1.51, "1.51!")):
        assert rows_of(table(made, [timed(idsa=times * edge, exact=far)]))[1][0][9] == want


def test_an_error_is_marked_from_twenty_percent_on(made):
    said = of(made)["idsa"].layer_us
    cells = [rows_of(table(made, [timed(idsa=said / over, exact=9.0)]))[0][0][7] for over in (1.199, 1.201, 0.801, 0.799)]
    assert [cell.endswith("!)") for cell in cells] == [False, True, False, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"date": "2020-01-01"}, {"gpu": "NVIDIA H100"}, {"inputs": "cruel-plateaus"}, {"impl": "reference"}, {"selector": "hisa"},
        {"case": "layer-32x128k-h64-r2"}, {"case": "layer-8x128k-h64-r8"}, {"settings": {"timing": "events"}}, {"settings": {"topk": 512}},
        {"settings": {"exchange": "gloo"}},
    ],
)  # fmt: skip
def test_other_records_are_not_held_against_them(made, changes):
    record = timed(idsa=9.0, exact=9.0)
    assert measured(made, [record]) == {(CASE, "symmetric", "idsa"): 9.0, (CASE, "symmetric", "exact"): 9.0}
    settings = record.settings | changes.get("settings", {})
    assert measured(made, [replace(record, **{**changes, "settings": settings})]) == {}


def test_where_they_are_from_is_said(made):
    first = table(replace(made, dirty=True, commit="0123456789abcdef", date="2026-01-02"), [])
    assert first.startswith("Predicted on 2026-01-02 at 01234567*: NVIDIA H200, deepseek-v3.2, dsa. ")
    assert table(replace(made, dirty=False, commit=None), []).startswith(f"Predicted on {made.date} at no commit: ")
    assert first.rstrip().endswith("by the letters of [plan.md](plan.md): replicated h; exact kx; idsa kx.")


def committed():
    """The page, and the file that its commands take; the page names every one that there is."""
    page = (ROOT / "docs" / "predictions.md").read_text()
    assert set(re.findall(r"benchmarks/predictions/([\w.-]+\.json)", page)) == {path.name for path in FOLDER.iterdir()}
    (name,) = set(re.findall(r"\.prediction\w+ .*benchmarks/predictions/([\w.-]+\.json)", page))
    return page, FOLDER / name


def test_the_page_shows_what_is_committed():
    page, file = committed()
    how = f"python -m thresher.bench.prediction_table docs/predictions.md {file.relative_to(ROOT)} benchmarks/results"
    assert updated(page, read_predictions(file), load(RESULTS)) == page, f"run: {how}"
    for layer in read_predictions(file).layers:
        assert layer.layer_us == pytest.approx(sum(layer.parts_us.values()))


def test_the_command_of_the_page(tmp_path, capsys):
    _, file = committed()
    page = tmp_path / "page.md"
    page.write_text(f"# A\n\n{BEGIN}\nold\n{END}\n\nB\n")
    assert prediction_table.main([str(page), str(file), str(tmp_path)]) == 0
    assert page.read_text() == f"# A\n\n{BEGIN}\n{table(read_predictions(file), [])}{END}\n\nB\n"
    page.write_text("# A\n")
    for words in ([page, file, tmp_path], [page], [page, page, tmp_path], ["no.md", file, tmp_path]):
        capsys.readouterr()
        assert prediction_table.main([str(word) for word in words]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_the_picture(tmp_path, capsys, made):
    pytest.importorskip("matplotlib")
    _, file = committed()
    assert prediction_plot.main([str(file), str(tmp_path), str(tmp_path)]) == 0
    assert (tmp_path / prediction_plot.FILE).read_bytes().startswith(b"\x89PNG")
    assert prediction_plot.main([str(file)]) == prediction_plot.main([str(tmp_path), str(tmp_path), str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    figure = prediction_plot.draw(made, measured(made, [timed(idsa=9.0, exact=999.0)]), "a title")
    panel = next(axes for axes in figure.axes if axes.get_title() == "32 x 128k, symmetric memory")
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == [f"{ranks} GPUs, {way}" for ranks in RANKS for way in WAYS]
    ends = [0.0] * len(names)
    for bar in panel.patches:
        at = round(bar.get_y() + bar.get_height() / 2)
        ends[at] = max(ends[at], bar.get_x() + bar.get_width())
    assert ends == pytest.approx([of(made, f"layer-32x128k-h64-r{ranks}")[way].layer_us for ranks in RANKS for way in WAYS])
    strokes = {line.get_xdata()[0]: names[round(sum(line.get_ydata()) / 2)] for line in panel.lines if len(line.get_xdata())}
    assert strokes == {9.0: "8 GPUs, idsa", 999.0: "8 GPUs, exact"}
    assert panel.get_xlim()[1] > 999
