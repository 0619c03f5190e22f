"""A layer's step as a case: its parts, and what its check finds."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

from thresher.bench import check, run, work
from thresher.bench.cases import parse_case
from thresher.bench.inputs import make_new_tokens
from thresher.cache.index_keys import planes
from thresher.errors import ThresherError
from thresher.ops.to_slots import slots_of, to_slots
from thresher.selectors import DSA

from .test_run import CPU, LAYER, bench, spoilt


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


@pytest.fixture
def made(monkeypatch):
    """Every copy that a case makes, as ``run`` sees it; weakly."""
    found, right = [], run.make_work

    def make(*given):
        copy = right(*given)
        found.append(weakref.ref(copy))
        found.extend(weakref.ref(held) for held in (copy.index.keys.pages, copy.attend.latents))
        return copy

    monkeypatch.setattr(run, "make_work", make)
    return found


@pytest.mark.parametrize("op", [op for op, kinds in work.OPS.items() if "layer" in kinds])
def test_nothing_of_a_case_is_held_when_the_next_begins(made, op):
    gc.collect()
    gc.disable()
    try:
        bench(LAYER, op=op)
        assert len(made) == 2 * 3
        assert [there() for there in made] == [None] * 6
    finally:
        gc.enable()


@pytest.mark.parametrize("op", ["store", "select", "to_slots", "sparse_attend_mla_fp8"])
def test_copies_share_the_caches_where_little_of_them_is_touched(monkeypatch, op):
    """Of "store" 256 copies are asked for, each of them gigabytes where the context is long."""
    given, right = [], run.make_copies
    monkeypatch.setattr(run, "make_copies", lambda *asked: given.extend(right(*asked)) or given)
    bench("layer-2x300-h4-d64-k32-q2", op=op)
    first, second = given
    caches = [(copy.index.keys.pages.data_ptr(), copy.attend.latents.data_ptr()) for copy in given]
    shared = op != "select"
    assert (caches[0] == caches[1]) == shared
    for one, two in (
        (first.tokens.key, second.tokens.key), (first.index.query.q, second.index.query.q), (first.picked.indices, second.picked.indices),
        (first.index.query.positions, second.index.query.positions), (first.index.query.requests, second.index.query.requests),
        (first.index.keys.page_table, second.index.keys.page_table), (first.tokens.slots, second.tokens.slots),
    ):  # fmt: skip
        assert one.data_ptr() != two.data_ptr()
    assert torch.equal(first.tokens.slots - second.tokens.slots, torch.full((4,), 64 if shared else 0))
    assert torch.equal(first.index.query.positions, second.index.query.positions)
    assert not torch.equal(first.picked.indices, second.picked.indices)


def test_what_is_stored_pages_back_begins_again_at_the_end():
    first = work.make_work(parse_case(LAYER), "store", DSA(topk=32), "auto", "normal", 0, torch.device("cpu"))
    slots = [make_new_tokens(first.case, first.index, 0, 0, back).slots.tolist() for back in range(6)]
    assert slots == [[(299 - 64 * back) % 300, 320 + (299 - 64 * back) % 300] for back in range(6)]


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


def test_slots_follow_the_page_table():
    made = work.make_work(parse_case(LAYER), "layer", DSA(topk=32), "auto", "normal", 0, CPU)
    picked = made.selector.select(made.index.query, made.index.keys)
    picked.indices[1, -2:] = -1
    keys = made.index.keys
    slots = slots_of(picked, keys.page_table, made.index.query.requests, keys.page_size)
    for row in range(2):
        for position, slot in zip(picked.indices[row].tolist(), slots[row].tolist(), strict=True):
            page = int(keys.page_table[row, position // 64])
            assert slot == (-1 if position < 0 else page * 64 + position % 64)


def test_slots_that_a_selection_has_are_taken_and_checked(monkeypatch):
    """Those that are wrong fail the check, though the attention is right for them. The attention begins after such a selection."""
    made = work.make_work(parse_case(LAYER), "layer", DSA(topk=32), "auto", "normal", 0, CPU)
    keys, requests = made.index.keys, made.index.query.requests
    select, shift = DSA.select_indices, 0

    def with_slots(self, *given):
        picked = select(self, *given)
        slots = to_slots(picked.indices, keys.page_table, requests, keys.page_size)
        return dataclasses.replace(picked, slots=torch.where(slots < 0, slots, slots ^ shift))

    began, attend = [], work.sparse_attend_mla_fp8
    monkeypatch.setattr(work, "sparse_attend_mla_fp8", lambda *given, early: began.append(early) or attend(*given, early=early))
    made.run()
    monkeypatch.setattr(DSA, "select_indices", with_slots)
    made.run()
    assert began == [True, False]
    assert check.check_work(made) is None
    shift = 1
    picked = made.selector.select_indices(made.index.query, keys, made.state)
    assert slots_of(picked, keys.page_table, requests, keys.page_size) is picked.slots
    assert check.check_work(made) == "slots are not the reference's"
