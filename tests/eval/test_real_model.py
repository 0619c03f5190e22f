"""The shipped model and indexers, end to end on one case, and the committed record of the whole demo."""

import json
from pathlib import Path

import pytest

from thresher.eval.demo import run_demo
from thresher.eval.settings import TOPK, candidates
from thresher.models.checkpoint import load_record

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "demo"
APPROXIMATIONS = ("misa", "misa_rerank", "hisa", "idsa")


@pytest.mark.slow
def test_one_case_of_the_demo(tmp_path):
    run = tmp_path / "run"
    table = run_demo(str(run), lengths=[2048], depths=[0.5])
    rows = json.loads((run / "metrics.json").read_text())["selectors"]
    assert rows["dense"]["found"] == rows["dsa"]["found"] == 1
    assert rows["random"]["found"] == 0
    assert rows["dsa"]["recall"] == 1
    assert rows["idsa"]["recall"] >= 0.999
    assert rows["misa"]["recall"] > rows["misa_static"]["recall"] + 0.05 > rows["misa_random"]["recall"]
    assert rows["random"]["recall"] == pytest.approx(TOPK / 2048, abs=0.02)
    assert all(name in table for name in rows)
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.json", "table.txt", "needle.png", "recall.png"}


@pytest.fixture
def metrics():
    return json.loads((RECORD / "metrics.json").read_text())


def test_the_record_is_of_the_shipped_indexers():
    assert json.loads((RECORD / "config.json").read_text())["indexers_sha256"] == load_record()["sha256"]


def test_the_record_meets_the_bars(metrics):
    rows = metrics["selectors"]
    assert rows["dense"]["found"] == rows["dense"]["total"] == 9
    for name in ("dsa", *APPROXIMATIONS):
        assert rows[name]["found"] >= rows["dense"]["found"] - 1, name
    assert rows["random"]["found"] <= 3
    assert rows["idsa"]["recall"] >= 0.999
    assert rows["misa_rerank"]["recall"] >= 0.97
    assert rows["hisa"]["recall"] >= 0.92
    assert rows["misa"]["recall"] >= 0.92
    assert rows["misa"]["recall"] >= rows["misa_static"]["recall"] + 0.1
    assert rows["misa"]["recall"] >= rows["misa_random"]["recall"] + 0.1


def test_nothing_in_the_record_equals_dsa_by_construction():
    assert candidates(7680) <= 7680 / 4
    text = json.loads((RECORD / "config.json").read_text())["selectors"]["7680"]
    options = dict(item.split("=") for item in text["hisa"].split(":")[1].split(","))
    assert int(options["block_size"]) * int(options["num_blocks"]) <= 7680 / 4
    options = dict(item.split("=") for item in text["misa_rerank"].split(":")[1].split(","))
    assert int(options["candidates"]) <= 7680 / 4
    options = dict(item.split("=") for item in text["misa"].split(":")[1].split(","))
    assert int(options["active_heads"]) * 4 <= load_record()["indexer"]["num_heads"]


def test_the_readme_shows_the_record():
    assert (RECORD / "table.txt").read_text().split("\n\n")[0] in (ROOT / "README.md").read_text()
