"""Pictures over lengths and heads: which records they take, what is drawn of them, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from thresher.bench import curves
from thresher.bench.curves import by_heads, by_length, draw, main, origin, spread
from thresher.bench.record import append, ratio_of
from thresher.errors import ThresherError
from thresher.selectors.parse import parse

from .test_record import ALONE, make

pytest.importorskip("matplotlib")


def timed(size, heads, us, selector="dsa", peer_us=None, **changes):
    """A record of a whole prefill; the floor is half of the time."""
    times, peer_times = ({"p20": t, "p50": t, "p80": t} for t in (us, peer_us or 1.0))
    beside = {"peer_time_us": peer_times, "ratio": ratio_of(times, peer_times)} if peer_us else ALONE
    settings = {**asdict(parse(selector)), "timing": "graph", "copies": 2}
    case = {"case": f"prefill-1024x{size}-h{heads}", "selector": selector.partition(":")[0], "settings": settings}
    return make(**{**case, "time_us": times, "floor_us": us / 2, **beside, **changes})


RECORDS = [
    timed("128k", 64, 2300.0, peer_us=2200.0),
    timed("8k", 64, 200.0, peer_us=150.0),
    timed("8k", 32, 110.0),
    timed("128k", 32, 1300.0),
    timed("128k", 64, 660.0, "misa:active_heads=8"),
    timed("1m", 64, 4000.0, "misa:active_heads=8", peer_us=9000.0, peer="another"),
    timed("128k", 1, 300.0),
    timed("128k", 64, 1500.0, "misa_rerank"),
]


def test_a_line_for_each_selector_and_number_of_heads():
    lines = by_length(RECORDS[::-1])
    assert {name: list(line) for name, line in lines.items()} == {
        "dsa, 64 heads": [8192, 131072],
        "dsa, 32 heads": [8192, 131072],
        "misa, 8 of 64 heads": [131072, 2**20],
    }
    assert lines["dsa, 64 heads"] == {8192: RECORDS[1], 131072: RECORDS[0]}
    assert by_heads(RECORDS) == {"dsa": {1: RECORDS[6], 32: RECORDS[3], 64: RECORDS[0]}}
    assert list(by_heads(RECORDS)["dsa"]) == [1, 32, 64]


def test_other_options_are_another_line():
    lines = by_length([*RECORDS, *(timed(size, 64, 9.0, "misa:active_heads=4,block_size=64") for size in ("8k", "128k"))])
    assert list(lines)[2:] == ["misa, 4 of 64 heads, block_size=64", "misa, 8 of 64 heads"]
    assert lines["misa, 8 of 64 heads"] == by_length(RECORDS)["misa, 8 of 64 heads"]


@pytest.mark.parametrize("collect", [by_length, by_heads])
@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": "cruel-plateaus"},
        {"impl": "reference"},
        {"floor_us": None},
        {"ranks": 2},
        {"op": "index_score", "selector": None, "settings": {"timing": "graph"}},
        {"settings": {"topk": 2048, "timing": "events"}},
        {"case": "decode-8x128k-h64"},
        {"case": "prefill-512x128k-h64"},
        {"case": "prefill-1024x128k-h64-k512"},
    ],
)
def test_other_work_is_not_drawn(collect, changes):
    assert collect([*RECORDS, replace(timed("128k", 64, 7.0), **changes)]) == collect(RECORDS)


def test_heads_are_of_dsa_alone_at_one_length():
    assert by_heads([*RECORDS, timed("256k", 16, 7.0), timed("128k", 16, 7.0, "misa"), timed("128k", 16, 7.0, "dsa:topk=512")]) == by_heads(
        RECORDS
    )


def test_the_newest_of_a_case_counts_with_its_own_peer():
    newer = timed("128k", 64, 2000.0)
    lines = by_length([*RECORDS, newer])
    assert lines["dsa, 64 heads"][131072] is newer
    drawn = {line.get_label(): line for line in draw(lines, "t", "x").axes[0].lines}
    assert drawn["dsa, 64 heads: peer"].get_ydata().tolist() == [150.0]


def test_what_is_drawn_are_the_figures_of_the_records():
    figure = draw(by_length(RECORDS), "Title\nGPU", "context, tokens")
    (axes,) = figure.axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert drawn["dsa, 64 heads"] == ([8192, 131072], [200.0, 2300.0])
    assert drawn["dsa, 64 heads: floor"] == ([8192, 131072], [100.0, 1150.0])
    assert drawn["dsa, 64 heads: peer"] == ([8192, 131072], [150.0, 2200.0])
    assert drawn["dsa, 32 heads: peer"] == ([], [])
    assert drawn["misa, 8 of 64 heads"] == ([131072, 2**20], [660.0, 4000.0])
    assert drawn["misa, 8 of 64 heads: peer"] == ([], []), "that is DSA's work"
    assert len(drawn) == 9
    colours = {line.get_label(): line.get_color() for line in axes.lines}
    for name in by_length(RECORDS):
        assert colours[name] == colours[f"{name}: floor"]
        assert colours[f"{name}: peer"] == curves.PEER
    names = {text.get_text(): text for text in axes.texts}
    assert {name: text.get_color() for name, text in names.items()} == {name: colours[name] for name in by_length(RECORDS)}
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title()) == ("log", "log", "Title\nGPU")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8k", "128k", "1m"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours", "floor", "deep_gemm+vllm"]
    assert axes.get_xlabel() == "context, tokens"
    assert ", us" in axes.get_ylabel()


def test_names_do_not_touch():
    records = [timed(size, heads, 100.0 + heads / 64) for size in ("8k", "16k") for heads in (64, 32, 16)]
    figure = draw(by_length(records), "t", "x")
    figure.canvas.draw()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 3
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


def test_spread_keeps_what_is_apart_and_the_order():
    assert spread([0.9, 0.1, 0.5]) == [0.9, 0.1, 0.5]
    assert spread([0.5, 0.5 - curves.GAP / 2]) == pytest.approx([0.5 + curves.GAP / 2, 0.5 - curves.GAP / 2])
    assert spread([0.2, 0.2]) == pytest.approx([0.2, 0.2 + curves.GAP])


def test_two_gpus_are_not_mixed(tmp_path, capsys):
    other = timed("16k", 64, 300.0, gpu="NVIDIA H100", commit="0123456789", dirty=True)
    assert origin(by_length(RECORDS)) == "NVIDIA H200, commit abc"
    with pytest.raises(ThresherError, match="a picture must be of one GPU; got NVIDIA H100, NVIDIA H200; name the one to draw with --gpu"):
        origin(by_length([*RECORDS, other]))
    for record in (*RECORDS, other):
        append(tmp_path / "a.jsonl", record)
    assert main([str(tmp_path), str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))
    assert main([str(tmp_path), str(tmp_path), "--gpu", "NVIDIA H200"]) == 0
    newest = [timed(size, 64, 5.0, gpu="NVIDIA H100", commit="0123456789", dirty=True) for size in ("8k", "128k")]
    assert origin({"dsa, 64 heads": by_length([*RECORDS, *newest])["dsa, 64 heads"]}) == "NVIDIA H100, commit 01234567*"


def test_the_command_draws_the_same_bytes_of_the_same_records(tmp_path, capsys):
    for record in RECORDS:
        append(tmp_path / "records" / "a.jsonl", record)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        assert main([str(tmp_path / "records"), str(folder)]) == 0
    names = ["select-by-heads.png", "select-by-length.png"]
    assert sorted(path.name for path in folders[0].iterdir()) == names
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert capsys.readouterr().out.splitlines()[:2] == [str(folders[0] / name) for name in names[::-1]]


def test_too_few_records_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(tmp_path)]) == 1
    seen = capsys.readouterr()
    assert seen.out == ""
    assert (
        seen.err
        == f"{tmp_path / 'none'} has no line of records for select-by-length.png and select-by-heads.png; take them with tools/records\n"
    )
    for record in RECORDS[:2]:
        append(tmp_path / "a.jsonl", record)
    assert main([str(tmp_path), str(tmp_path)]) == 1
    assert [path.name for path in tmp_path.glob("*.png")] == ["select-by-length.png"]
    assert "select-by-heads.png" in capsys.readouterr().err
