"""A layer's step as a case: its parts, and what its check finds."""

from __future__ import annotations

import pytest

from thresher.bench import work
from thresher.cache.index_keys import planes
from thresher.errors import ThresherError

from .test_run import LAYER, bench, spoilt


@pytest.fixture(autouse=True)
def not_interpreting(monkeypatch):
    """Other tests of the same process set it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_parts_of_a_layer_run_and_are_recorded():
    """Of a layer whose requests have several queries, too."""
    parts = ("store", "select", "to_slots", "sparse_attend_mla_fp8", "layer")
    case = "layer-2x300-h4-d64-k32-q2"
    records = {op: bench(case, op=op)[0][0] for op in parts}
    assert [record.selector for record in records.values()] == ["dsa"] * 5
    whole = records.pop("layer")
    assert whole.useful_flops == sum(record.useful_flops for record in records.values())
    assert whole.useful_bytes < sum(record.useful_bytes for record in records.values()), "what a part hands on, the next one reads"


@pytest.mark.parametrize("what", ["keys", "latents"])
def test_a_layer_that_stores_something_else_is_red(monkeypatch, what):
    right = work._RUNS["store"]

    def store(given):
        query = right(given)
        slots, held = given.tokens.slots, given.index.keys.pages if what == "keys" else given.attend.latents
        if what == "keys":
            planes(held)[1][slots // 64, slots % 64] *= 2
        else:
            held.flatten(0, 2)[slots, 640:] = 0
        return query

    monkeypatch.setitem(work._RUNS, "store", store)
    with pytest.raises(ThresherError, match=f"got: {what} are off by"):
        bench(LAYER, op="store")


def test_a_layer_with_a_wrong_selection_is_red(monkeypatch):
    right = work._RUNS["select"]
    monkeypatch.setattr(work, "_select", lambda given: spoilt(right(given), "wrong tokens"))
    monkeypatch.setitem(work._RUNS, "select", work._select)
    with pytest.raises(ThresherError, match="other tokens are selected"):
        bench(LAYER)
