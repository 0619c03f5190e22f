"""Selectors and plans as text, the refusals, and the cost columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thresher.errors import ThresherError
from thresher.selectors import (
    DSA,
    HISA,
    MISA,
    SELECTORS,
    Dense,
    LayerPlan,
    MISARandom,
    MISARerank,
    MISAStatic,
    Oracle,
    Random,
    Shared,
    Window,
    parse,
    to_text,
)

from .worlds import SMALL, make_world


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("dense", Dense()),
        ("dsa", DSA()),
        ("misa:active_heads=8,block_size=128,topk=512", MISA(8, 128, 512)),
        (" misa : topk = 512 , active_heads = 4 ", MISA(active_heads=4, topk=512)),
        ("misa_rerank:candidates=4096", MISARerank(candidates=4096)),
        ("hisa:num_blocks=32", HISA(num_blocks=32)),
        ("window:topk=512,sinks=0", Window(512, 0)),
        ("random:topk=5,seed=7", Random(5, 7)),
        ("oracle:topk=5", Oracle(5)),
        ("shared:layer=4", Shared(4)),
        ("misa_static:heads=1+5+7", MISAStatic((1, 5, 7))),
        ("misa_static:heads=3", MISAStatic((3,))),
        ("misa_random:seed=2", MISARandom(seed=2)),
    ],
)
def test_parse(text, selector):
    assert parse(text) == selector
    assert parse(to_text(selector)) == selector


def test_every_selector_has_a_name():
    assert {type(s) for s in SMALL.values()} | {Shared} == set(SELECTORS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mysa", r"must be one of dense, dsa, misa, misa_rerank, hisa, .*; got 'mysa'"),
        ("", r"must be one of dense"),
        ("misa:heads=8", r"options of misa must be among: active_heads, block_size, topk; got 'heads'"),
        ("dense:topk=8", r"options of dense must be among: none; got 'topk'"),
        ("dsa:topk=many", r"topk must be an int; got 'many'"),
        ("dsa:topk=1.5", r"topk must be an int; got '1.5'"),
        ("misa_static:heads=1,5", r"options of misa_static must be among: heads, topk; got '5'"),
        ("misa_static:heads=1+x", r"heads must be ints joined by \+"),
        ("dsa:topk", r"topk must have a value"),
        ("dsa:topk=", r"topk must have a value"),
        ("dsa:", r"options must follow the colon"),
        ("dsa:topk=5,", r"options of dsa must be among: topk; got ''"),
        ("dsa:topk=5,topk=6", r"topk must be given once"),
        ("window", r"window needs topk; .*; write window:topk=\.\.\."),
        ("dsa:topk=0", r"topk must be an int of at least 1; got 0"),
        ("hisa:num_blocks=2", r"num_blocks \* block_size must be at least topk=2048; got 256"),
    ],
)
def test_parse_refuses(text, message):
    with pytest.raises(ThresherError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DSA(0), "topk must be an int of at least 1; got 0"),
        (lambda: DSA(True), "topk must be an int"),
        (lambda: DSA(2.0), "topk must be an int"),
        (lambda: MISA(active_heads=0), "active_heads must be an int of at least 1"),
        (lambda: MISA(block_size=0), "block_size must be an int of at least 1"),
        (lambda: MISARerank(candidates=2047), "candidates must be at least topk=2048; got 2047"),
        (lambda: HISA(num_blocks=1, block_size=4096), "num_blocks must be an int of at least 2"),
        (lambda: HISA(128, 15, 2048), "num_blocks \\* block_size"),
        (lambda: Window(3), "sinks must be at most topk=3; got 4"),
        (lambda: Random(5, -1), "seed must be an int of at least 0"),
        (lambda: Shared(-1), "layer must be an int of at least 0"),
        (lambda: MISAStatic(()), "heads must be a tuple"),
        (lambda: MISAStatic([1]), "heads must be a tuple"),
        (lambda: MISAStatic((1, 1)), "heads must be distinct"),
        (lambda: DSA().shard(0, 5), "ranks must be an int of at least 1"),
        (lambda: DSA().shard(2, 0), "topk must be an int of at least 1"),
    ],
)
def test_values_refused_when_made(make, message):
    with pytest.raises(ThresherError, match=message):
        make()


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (MISA(5, 8, 7), "active_heads must be at most the query's 4 heads; got 5"),
        (MISARerank(5, 8, 9, 7), "active_heads must be at most"),
        (MISARandom(5, 0, 7), "active_heads must be at most"),
        (MISAStatic((0, 4), 7), "heads must be below the query's 4 heads; got 4"),
    ],
)
def test_heads_the_query_does_not_have(selector, message):
    world = make_world([9])
    with pytest.raises(ThresherError, match=message):
        world.select(selector, world.every_pair())


def test_a_plan_reads_text_later_entries_winning():
    plan = LayerPlan.from_text("0-1=dense; 2-7=dsa:topk=512 ;5=shared:layer=4;7 = misa:topk=9", 8)
    assert plan.layers == (Dense(), Dense(), DSA(512), DSA(512), DSA(512), Shared(4), DSA(512), MISA(topk=9))
    assert plan[5] == Shared(4)
    assert len(plan) == 8
    assert list(plan) == list(plan.layers)
    assert LayerPlan.from_text("0-2=dsa;", 3) == LayerPlan.uniform(DSA(), 3)


@given(st.lists(st.sampled_from([Dense(), DSA(3), HISA(4, 4, 7), MISAStatic((1, 5)), Shared(0)]), min_size=1, max_size=9))
def test_a_plan_survives_the_round_trip(layers):
    layers[0] = DSA(9)
    plan = LayerPlan(tuple(layers))
    assert LayerPlan.from_text(plan.to_text(), len(layers)) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-2=dense", r"each of the 4 layers must have a selector; got none for \[3\]"),
        ("", r"each of the 4 layers must have a selector"),
        ("0-4=dense", r"layers of an entry must be ascending and below 4; got '0-4=dense'; name layers 0-3"),
        ("3-0=dense", r"must be ascending"),
        ("dense", r"must be layer=selector or first-last=selector; got 'dense'"),
        ("0-3=dense;2=shared:layer=2", r"layer 2 must share with an earlier layer"),
        ("0-3=dense;2=shared:layer=3", r"layer 2 must share with an earlier layer"),
        ("0-3=dense;1=shared:layer=0;2=shared:layer=1", r"layer 2 must share with an earlier layer that is not itself shared"),
        ("0-3=densest", r"a selector must be one of"),
    ],
)
def test_a_plan_refuses(text, message):
    with pytest.raises(ThresherError, match=message):
        LayerPlan.from_text(text, 4)


def test_a_plan_has_a_layer():
    with pytest.raises(ThresherError, match="at least one layer"):
        LayerPlan(())


@pytest.mark.parametrize(
    ("selector", "flops", "num_bytes"),
    [
        # 64 heads of 128 over 131072 keys of 132 bytes; multiply-adds count twice.
        (DSA(), 2 * 64 * 128 * 131072, 132 * 131072),
        (MISA(8, 1024), 2 * 8 * 128 * 131072 + 2 * 64 * 128 * 128, 132 * (131072 + 128)),
        (MISARerank(8, 1024, 8192), 2 * 128 * (8 * 131072 + 64 * 128 + 64 * 8192), 132 * (131072 + 128 + 8192)),
        (HISA(128, 64), 2 * 64 * 128 * (1024 + 8192), 132 * (1024 + 8192)),
        (MISAStatic((0, 9)), 2 * 2 * 128 * 131072, 132 * 131072),
        (MISARandom(8), 2 * 8 * 128 * 131072, 132 * 131072),
        (Dense(), 0, 0),
        (Window(2048), 0, 0),
        (Random(2048), 0, 0),
        (Oracle(2048), 0, 0),
        (Shared(0), 0, 0),
    ],
)
def test_costs(selector, flops, num_bytes):
    assert selector.index_flops(131072, 64, 128) == flops
    assert selector.index_bytes(131072, 64, 128) == num_bytes


def test_costs_round_blocks_up_and_stop_at_the_context():
    assert MISA(8, 100).index_bytes(201, 4, 28) == 32 * (201 + 3)
    assert MISA(8, 100).index_flops(201, 4, 28) == 2 * 28 * (4 * 201 + 4 * 3), "no more active heads than there are"
    assert HISA(100, 64).index_bytes(201, 4, 28) == 32 * (3 + 201)
    assert MISARerank(1, 100, 8192).index_bytes(201, 4, 28) == 32 * (201 + 3 + 201)
